//! What is computed for a sequence does not depend on what else is computed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use gptq_kernels::{KvFormat, cpu::Cpu};
use gptq_llama::{
    Feed, GenerateOptions, Generator, KvCache, Llama, LlamaConfig, LlamaError, LoadOptions, MemoryWeights,
    Sampling, SequenceId, Wanted, generate,
};
use ndarray::{Array2, s};

fn config(extra: &str) -> LlamaConfig {
    LlamaConfig::from_json(&format!(
        r#"{{"model_type": "qwen2", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 211,
             "max_position_embeddings": 300, "tie_word_embeddings": true {extra}}}"#
    ))
    .unwrap()
}

fn model(config: LlamaConfig) -> Llama<Cpu> {
    model_with(config, KvFormat::Activations)
}

fn model_with(config: LlamaConfig, kv: KvFormat) -> Llama<Cpu> {
    let weights = MemoryWeights::random(&config, 3);
    Llama::from_source(config, &weights, Cpu, &LoadOptions::default().with_kv(kv)).unwrap()
}

fn tokens(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 37 + seed * 101 + i * i) % 211).collect()
}

fn run(
    model: &Llama<Cpu>,
    cache: &mut KvCache<Cpu>,
    feeds: &[(SequenceId, &[u32], Wanted)],
) -> Result<Array2<f32>, LlamaError> {
    let feeds: Vec<_> =
        feeds.iter().map(|&(sequence, tokens, logits)| Feed { sequence, tokens, logits }).collect();
    model.forward(cache, &feeds)?.to_array()
}

fn alone(model: &Llama<Cpu>, tokens: &[u32]) -> Array2<f32> {
    let mut cache = model.cache(tokens.len()).unwrap();
    let sequence = cache.add();
    run(model, &mut cache, &[(sequence, tokens, Wanted::All)]).unwrap()
}

#[test]
fn batched_prefill_and_decode_change_no_bit() {
    let window = r#", "use_sliding_window": true, "sliding_window": 40, "max_window_layers": 1"#;
    for (extra, kv) in [("", KvFormat::Activations), (window, KvFormat::Activations), ("", KvFormat::Int8)] {
        let model = model_with(config(extra), kv);
        let (a, b, c) = (tokens(150, 1), tokens(90, 2), tokens(7, 3));
        let (want_a, want_b, want_c) = (alone(&model, &a), alone(&model, &b), alone(&model, &c));
        let mut cache = model.cache(150).unwrap();
        let [id_a, id_b, id_c] = [cache.add(), cache.add(), cache.add()];
        let got = run(
            &model,
            &mut cache,
            &[(id_b, &b[..80], Wanted::Last), (id_a, &a[..3], Wanted::None), (id_c, &c[..5], Wanted::All)],
        )
        .unwrap();
        assert_eq!(got.row(0), want_b.row(79));
        assert_eq!(got.slice(s![1.., ..]), want_c.slice(s![..5, ..]));
        let got =
            run(&model, &mut cache, &[(id_a, &a[3..140], Wanted::All), (id_b, &b[80..81], Wanted::Last)])
                .unwrap();
        assert_eq!(got.slice(s![..137, ..]), want_a.slice(s![3..140, ..]));
        assert_eq!(got.row(137), want_b.row(80));
        for i in 0..2 {
            let got = run(
                &model,
                &mut cache,
                &[
                    (id_c, &c[5 + i..6 + i], Wanted::Last),
                    (id_a, &a[140 + i..141 + i], Wanted::Last),
                    (id_b, &b[81 + i..82 + i], Wanted::Last),
                ],
            )
            .unwrap();
            assert_eq!(got.row(0), want_c.row(5 + i));
            assert_eq!(got.row(1), want_a.row(140 + i));
            assert_eq!(got.row(2), want_b.row(81 + i));
        }
    }
}

/// How near they are, attention's own tests say.
#[test]
fn keys_and_values_in_bytes() {
    let [whole, bytes] = [KvFormat::Activations, KvFormat::Int8].map(|kv| model_with(config(""), kv));
    let tokens = tokens(150, 1);
    assert_ne!(alone(&whole, &tokens), alone(&bytes, &tokens), "nothing was rounded");
    // 3 layers of 2 heads: 24 features of keys and 32 of values, padded, as floats, or as codes and two scales.
    let [whole, bytes] = [whole, bytes].map(|model| model.cache(10).unwrap().bytes_per_token());
    assert_eq!((whole, bytes), (6 * 4 * (24 + 32), 6 * (24 + 32 + 8)));
}

#[test]
fn pages_of_removed_sequences_are_used_again() {
    let model = model(config(""));
    let (a, b) = (tokens(130, 1), tokens(140, 2));
    let mut cache = model.cache(200).unwrap();
    let first = cache.add();
    run(&model, &mut cache, &[(first, &a, Wanted::None)]).unwrap();
    cache.remove(first).unwrap();
    let second = cache.add();
    let got = run(&model, &mut cache, &[(second, &b, Wanted::All)]).unwrap();
    assert_eq!(got, alone(&model, &b));
    // Going back and on along another path.
    cache.truncate(second, 70).unwrap();
    let mut path = b[..70].to_vec();
    path.extend_from_slice(&a[..20]);
    let got = run(&model, &mut cache, &[(second, &a[..20], Wanted::All)]).unwrap();
    assert_eq!(got, alone(&model, &path).slice(s![70.., ..]));
    assert_eq!(cache.len(second).unwrap(), 90);
}

#[test]
fn wrong_feeds_are_refused_and_change_nothing() {
    let model = model(config(""));
    let a = tokens(20, 1);
    let mut cache = model.cache(20).unwrap();
    let id = cache.add();
    run(&model, &mut cache, &[(id, &a[..10], Wanted::None)]).unwrap();
    let gone = cache.add();
    cache.remove(gone).unwrap();
    let error = |cache: &mut KvCache<Cpu>, feeds: &[(SequenceId, &[u32], Wanted)]| {
        run(&model, cache, feeds).unwrap_err().to_string()
    };
    assert_eq!(
        error(&mut cache, &[(id, &a[..11], Wanted::Last)]),
        "21 tokens in a sequence, the cache was made for 20"
    );
    assert_eq!(
        error(&mut cache, &[(id, &[1, 211], Wanted::Last)]),
        "token 211 at position 11: the vocabulary has 211 entries"
    );
    assert_eq!(error(&mut cache, &[(id, &[], Wanted::Last)]), "a feed has no tokens");
    assert_eq!(error(&mut cache, &[(gone, &[1], Wanted::Last)]), "sequence 1 is not in this cache");
    let twice: [(SequenceId, &[u32], Wanted); 2] = [(id, &[1], Wanted::Last), (id, &[2], Wanted::Last)];
    assert_eq!(error(&mut cache, &twice), "sequence 0 stands twice in one step");
    let got = run(&model, &mut cache, &[(id, &a[10..], Wanted::Last)]).unwrap();
    assert_eq!(got.row(0), alone(&model, &a).row(19));
}

#[test]
fn generation_is_reproducible() {
    // A tied embedding of unit variance would repeat its last token for ever.
    let model = model(config(r#", "tie_word_embeddings": false"#));
    let prompt = tokens(5, 4);
    let sampled = |seed| {
        let sampling =
            Sampling { temperature: 1.5, top_p: 0.9, repetition_penalty: 1.1, ..Sampling::default() };
        let options = GenerateOptions { max_new_tokens: 20, sampling, seed, ..GenerateOptions::default() };
        Generator::new(&model, &prompt, options).unwrap().map(Result::unwrap).collect::<Vec<_>>()
    };
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));

    // Greedy decoding takes the largest logit of a fresh forward pass at each step.
    let options = GenerateOptions { max_new_tokens: 10, ..GenerateOptions::default() };
    let mut seen = Vec::new();
    let text = generate(&model, &prompt, options.clone(), |token| {
        seen.push(token);
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(seen, text);
    let mut all = prompt.clone();
    for &token in &text {
        let logits = alone(&model, &all);
        let last = logits.row(all.len() - 1);
        assert!(last.iter().all(|&logit| logit <= last[token as usize]));
        all.push(token);
    }

    let stop = text[4];
    let first = text.iter().position(|&token| token == stop).unwrap();
    let options = GenerateOptions { stop_tokens: vec![stop], ..options };
    let mut generator = Generator::new(&model, &prompt, options).unwrap();
    assert_eq!(generator.by_ref().map(Result::unwrap).collect::<Vec<_>>(), text[..first]);
    assert_eq!(generator.finish(), Some(gptq_llama::Finish::Stop(stop)));
}

#[test]
fn generation_ends_with_the_context() {
    let model = model(config(""));
    let options = GenerateOptions { max_new_tokens: 50, ..GenerateOptions::default() };
    let mut generator = Generator::new(&model, &tokens(298, 1), options.clone()).unwrap();
    // 300 positions hold the 298 of the prompt and two more; the third new token needs no position of its own.
    assert_eq!(generator.by_ref().map(Result::unwrap).count(), 3);
    assert_eq!(generator.finish(), Some(gptq_llama::Finish::Context));
    assert!(matches!(
        Generator::new(&model, &tokens(301, 1), options.clone()),
        Err(LlamaError::ContextLength { needed: 301, limit: 300 })
    ));
    assert!(matches!(Generator::new(&model, &[], options), Err(LlamaError::NoTokens { .. })));
}
