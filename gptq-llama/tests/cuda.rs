//! The model on a GPU against the model on the CPU, and what a GPU must not make different. Without a GPU the tests say so
//! and pass.
#![cfg(feature = "cuda")]
// clippy.toml allows both in tests, but not in the functions that tests share.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

#[path = "../../gptq-kernels/tests/gpu/mod.rs"]
mod gpu;
mod root;
#[path = "cuda/schedules.rs"]
mod schedules;
#[path = "cuda/steps.rs"]
mod steps;

use std::collections::VecDeque;

use gptq_core::GptqConfig;
use gptq_format::{Bits, Checkpoint, CodesRef, PackedLinear, TensorFile};
use gptq_kernels::{
    Backend, Device, KvFormat,
    cpu::Cpu,
    cuda::{Activation as _, CudaDevice, Element},
};
use gptq_llama::{
    Feed, GenerateOptions, Generator, KvCache, Layer, Llama, LlamaConfig, LlamaError, LoadOptions,
    MemoryWeights, Module, Precision, QuantizeOptions, Rng, SequenceId, TokenRows, Wanted, Watch,
    WeightSource, generate, perplexity, round_to_nearest,
};
use gpu::gpu;
use half::{bf16, f16};
use ndarray::Array2;
use root::root;
use schedules::schedule;

fn logits<D: Backend>(model: &Llama<D>, tokens: &[u32]) -> Array2<f32> {
    let mut cache = model.cache(tokens.len()).unwrap();
    let feed = Feed { sequence: cache.add(), tokens, logits: Wanted::All };
    model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap()
}

/// `|got - want| / |want|`
fn relative_error<'a>(
    got: impl IntoIterator<Item = &'a f32>,
    want: impl IntoIterator<Item = &'a f32>,
) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&got, &want) in got.into_iter().zip(want) {
        difference += f64::from(got - want).powi(2);
        norm += f64::from(want).powi(2);
    }
    (difference / norm).sqrt()
}

/// The issue's bound for fp16; bfloat16 has an eighth of its precision.
fn tolerance<T: Element>() -> f64 {
    1e-2 * T::UNIT / f16::UNIT
}

const CHECKPOINTS: [&str; 19] = [
    "compat/source",
    "compat/b2_g32",
    "compat/b3_g32",
    "compat/b8_g32",
    "compat/g128_plain",
    "compat/g32_act",
    "compat/g32_act_static",
    "compat/g32_asym_v2",
    "compat/g32_dyn",
    "compat/g32_plain",
    "compat/gm1_plain",
    "compat/min0",
    "compat/ag_desc_actTrue",
    "compat/ag_g32",
    "families/linear_rope",
    "families/llama3_rope",
    "families/mistral_window",
    "families/qwen2_tied",
    "families/qwen2_window",
];

fn checkpoints<T: Element>() {
    let Some(device) = gpu::<T>() else { return };
    let mut wrong = Vec::new();
    for name in CHECKPOINTS {
        let dir = root().join("gptq-llama/tests").join(name);
        let model = Llama::load(&dir, device.clone(), &LoadOptions::default()).unwrap();
        let expected = TensorFile::open(dir.join("expected.safetensors")).unwrap();
        let tokens = expected.tensor("input_ids").unwrap().u32s().unwrap();
        let want = expected.tensor("logits").unwrap().f32s().unwrap();
        let error = relative_error(&logits(&model, &tokens), want.iter());
        println!("{} | {name} | {error:.2e}", T::NAME);
        if error.is_nan() || error > tolerance::<T>() {
            wrong.push((name, error));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn checkpoints_of_other_tools_in_fp16() {
    checkpoints::<f16>();
}

#[test]
fn checkpoints_of_other_tools_in_bf16() {
    checkpoints::<bf16>();
}

fn tiny_books() -> (LlamaConfig, Checkpoint, TokenRows) {
    let dir = root().join("examples/tiny-books");
    let ids = TensorFile::open(dir.join("ids.safetensors")).unwrap();
    let evaluation = ids.tensor("evaluation").unwrap();
    let ids = evaluation.bytes().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let ids: Vec<u32> = ids.collect();
    let rows = ids.chunks(evaluation.shape()[1]).take(12).map(<[u32]>::to_vec).collect();
    (LlamaConfig::read(&dir).unwrap(), Checkpoint::open(&dir).unwrap(), TokenRows::new(rows).unwrap())
}

/// The model with its layers rounded to 4 bits.
fn rounded<'a>(config: &LlamaConfig, source: &'a Checkpoint, options: &QuantizeOptions) -> MemoryWeights<'a> {
    let mut weights = MemoryWeights::in_front_of(source);
    let mut sink = |layer: Layer, packed| {
        weights.insert_packed(&layer.to_string(), packed);
        Ok(())
    };
    round_to_nearest(config, source, options, &mut Watch::default(), &mut sink).unwrap();
    weights
}

/// Logits, perplexity and 200 greedy tokens of the bundled model, float and 4 bits.
fn bundled_model<T: Element>() {
    let Some(device) = gpu::<T>() else { return };
    let (config, source, rows) = tiny_books();
    let gptq = QuantizeOptions::new(GptqConfig::builder().group_size(Some(128)).build().unwrap());
    let int4 = rounded(&config, &source, &gptq);
    let sources: [(&str, &dyn WeightSource); 2] = [("float", &source), ("int4", &int4)];
    for (what, source) in sources {
        let precise = LoadOptions::default().with_precision(Precision::Float32);
        let cpu = Llama::from_source(config.clone(), source, Cpu, &precise).unwrap();
        let gpu =
            Llama::from_source(config.clone(), source, device.clone(), &LoadOptions::default()).unwrap();

        let row = &rows.rows()[0];
        let (want, got) = (logits(&cpu, row), logits(&gpu, row));
        let error = relative_error(&got, &want);
        assert!(error <= tolerance::<T>(), "{what}: {error}");

        let want = perplexity(&cpu, &rows, |_, _| {}).unwrap().value();
        let got = perplexity(&gpu, &rows, |_, _| {}).unwrap().value();
        println!("{} {what}: logits {error:.2e}, perplexity {got:.5}, on the CPU {want:.5}", T::NAME);
        assert!((got / want - 1.0).abs() <= 1e-3 * T::UNIT / f16::UNIT, "{what}: {got} {want}");

        // Each greedy token is the CPU's, unless the CPU's logits of the two differ by no more than twice the largest
        // difference between the two devices' logits.
        let prompt = &row[..16];
        let options = GenerateOptions { max_new_tokens: 200, ..GenerateOptions::default() };
        let text = generate(&gpu, prompt, options, |_| std::ops::ControlFlow::Continue(())).unwrap();
        assert_eq!(text.len(), 200);
        let all = [prompt, &text].concat();
        let (want, got) = (logits(&cpu, &all), logits(&gpu, &all));
        let largest = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let mut same = 0;
        for (i, &token) in text.iter().enumerate() {
            let row = want.row(prompt.len() - 1 + i);
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            same += usize::from(row[token as usize] == best);
            assert!(best - row[token as usize] <= 2.0 * largest, "{what}: token {i}");
        }
        println!(
            "{} {what}: {same} of 200 greedy tokens are the CPU's; logits differ by {largest:.4}",
            T::NAME
        );
    }
}

#[test]
fn bundled_model_in_fp16() {
    bundled_model::<f16>();
}

#[test]
fn bundled_model_in_bf16() {
    bundled_model::<bf16>();
}

/// Groups of 64 inputs, one after the other or in an order.
fn g_idx(inputs: usize, order: Option<u64>) -> Vec<u32> {
    let mut g_idx: Vec<u32> = (0..inputs as u32).map(|i| i / 64).collect();
    if let Some(order) = order {
        let mut rng = Rng::new(order);
        for i in (1..inputs).rev() {
            g_idx.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
        }
    }
    g_idx
}

/// A small random model, all of whose linear layers have 4 bits.
fn random_model(seed: u64, extra: &str, act_order: bool) -> (LlamaConfig, MemoryWeights<'static>) {
    let config = LlamaConfig::from_json(&format!(
        r#"{{"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256,
             "max_position_embeddings": 700, "tie_word_embeddings": false {extra}}}"#
    ))
    .unwrap();
    let mut weights = MemoryWeights::random(&config, seed);
    let mut rng = Rng::new(seed);
    let mut pack = |inputs: usize, outputs: usize, bias: bool, order: u64| {
        let groups = inputs.div_ceil(64);
        let codes: Vec<u8> = (0..inputs * outputs).map(|_| (rng.next_u64() >> 60) as u8).collect();
        let biases: Vec<f32> = (0..outputs).map(|_| (rng.next_f64() as f32 - 0.5) / 4.0).collect();
        PackedLinear::pack(&CodesRef {
            bits: Bits::B4,
            group_size: 64,
            in_features: inputs,
            out_features: outputs,
            codes: &codes,
            zeros: &vec![8; groups * outputs],
            scales: &vec![1.0 / (21.5 * inputs as f32).sqrt(); groups * outputs],
            g_idx: &g_idx(inputs, act_order.then_some(order)),
            bias: bias.then_some(biases.as_slice()),
        })
        .unwrap()
    };
    for layer in 0..config.layers {
        for module in Module::ALL {
            let (inputs, outputs) = module.shape(&config);
            let bias = matches!(module, Module::Q | Module::K | Module::V);
            // Layers with the same input have the same order.
            let order = match module {
                Module::Q | Module::K | Module::V => 1,
                Module::Gate | Module::Up => 2,
                _ => 3,
            };
            let packed = pack(inputs, outputs, bias, order + 10 * layer as u64);
            weights.insert_packed(&Layer { layer, module }.to_string(), packed);
        }
    }
    weights.insert_packed("lm_head", pack(config.hidden_size, config.vocab_size, false, 0));
    (config, weights)
}

fn load<T: Element>(device: &CudaDevice<T>, seed: u64, extra: &str) -> Llama<CudaDevice<T>> {
    load_model(device, random_model(seed, extra, false), KvFormat::Activations)
}

fn load_model<T: Element>(
    device: &CudaDevice<T>,
    (config, weights): (LlamaConfig, MemoryWeights<'static>),
    kv: KvFormat,
) -> Llama<CudaDevice<T>> {
    // A kernel with one class of rows, so that any batch gives the same bits.
    let names: Vec<_> = device.kernels().iter().map(|kernel| kernel.name()).collect();
    let kernel = ["cuda-gemv-sm90", "cuda-plain"].into_iter().find(|name| names.contains(name));
    let options = LoadOptions::default().with_kernel(kernel.map(str::to_owned)).with_kv(kv);
    Llama::from_source(config, &weights, device.clone(), &options).unwrap()
}

const WINDOW: &str = r#", "use_sliding_window": true, "sliding_window": 90, "max_window_layers": 1"#;

fn tokens(rng: &mut Rng, len: usize) -> Vec<u32> {
    (0..len).map(|_| (rng.next_u64() % 256) as u32).collect()
}

/// Keys and values in bytes on both devices: what they do to a perplexity, and that they do it alike.
fn bytes_are_those_of_the_cpu<T: Element>() {
    let Some(device) = gpu::<T>() else { return };
    let (config, source, rows) = tiny_books();
    let options = |kv| LoadOptions::default().with_precision(Precision::Float32).with_kv(kv);
    let measure = |kv| {
        let cpu = Llama::from_source(config.clone(), &source, Cpu, &options(kv)).unwrap();
        let gpu = Llama::from_source(config.clone(), &source, device.clone(), &options(kv)).unwrap();
        let bytes = gpu.cache(100).unwrap().bytes_per_token();
        let value = |result: Result<gptq_llama::Perplexity, LlamaError>| result.unwrap().value();
        (value(perplexity(&cpu, &rows, |_, _| {})), value(perplexity(&gpu, &rows, |_, _| {})), bytes)
    };
    let (_, whole, whole_bytes) = measure(KvFormat::Activations);
    let (cpu, gpu, bytes) = measure(KvFormat::Int8);
    println!("{}: perplexity {whole:.5}, in bytes {gpu:.5}, in bytes on the CPU {cpu:.5}", T::NAME);
    assert!((gpu / cpu - 1.0).abs() <= 1e-3 * T::UNIT / f16::UNIT, "{gpu} {cpu}");
    // A code for each of the 64 features of a head and a scale, instead of two bytes for each.
    assert_eq!(bytes * 128, whole_bytes * (64 + 4));
}

#[test]
fn bytes_are_those_of_the_cpu_in_fp16() {
    bytes_are_those_of_the_cpu::<f16>();
}

#[test]
fn bytes_are_those_of_the_cpu_in_bf16() {
    bytes_are_those_of_the_cpu::<bf16>();
}

/// Norms and attention write in the orders of the layers behind them, and outputs of gate and up are permuted: the model is
/// the CPU's, and batches, parts of prompts and recorded steps change no bit.
#[test]
fn act_ordered_layers_take_their_input_in_order() {
    fn run<T: Element>() {
        let Some(device) = gpu::<T>() else { return };
        for extra in ["", WINDOW] {
            let (config, weights) = random_model(3, extra, true);
            let ordered = (config.clone(), random_model(3, extra, true).1);
            let model = load_model(&device, ordered, KvFormat::Activations);
            assert!(model.linears().all(|linear| linear.input_order().is_some()));
            let precise = LoadOptions::default().with_precision(Precision::Float32);
            let cpu = Llama::from_source(config, &weights, Cpu, &precise).unwrap();
            let tokens = tokens(&mut Rng::new(4), 150);
            let error = relative_error(&logits(&model, &tokens), &logits(&cpu, &tokens));
            println!("{}, act-ordered: {error:.2e}", T::NAME);
            assert!(error <= tolerance::<T>(), "{error}");
            let mut cache = model.cache(700).unwrap();
            for seed in 0..20 {
                schedule(&model, &mut cache, seed);
            }
        }
    }
    run::<f16>();
    run::<bf16>();
}

/// Two loads of the same model, two runs each, recorded steps and the first ones: the same text and the same logits.
#[test]
fn runs_repeat_to_the_bit() {
    let Some(device) = gpu::<f16>() else { return };
    let run = |model: &Llama<CudaDevice<f16>>| {
        let mut cache = model.cache(700).unwrap();
        let (a, b) = (cache.add(), cache.add());
        let prompt = tokens(&mut Rng::new(5), 300);
        let mut all = Vec::new();
        let mut next = [0, 0];
        for i in 0..40 {
            let (first, second) = ([next[0]], [next[1]]);
            let (x, y) = if i == 0 { (&prompt[..280], &prompt[7..20]) } else { (&first[..], &second[..]) };
            let feeds = [
                Feed { sequence: a, tokens: x, logits: Wanted::Last },
                Feed { sequence: b, tokens: y, logits: Wanted::Last },
            ];
            let logits = model.forward(&mut cache, &feeds).unwrap();
            let best = logits.argmax().unwrap();
            next = [best[0].unwrap(), best[1].unwrap()];
            all.push(logits.to_array().unwrap());
        }
        all
    };
    let (first, second) = (load(&device, 9, ""), load(&device, 9, ""));
    let want = run(&first);
    assert!(want == run(&first) && want == run(&second));
}

/// Two models take turns in one cache; what was recorded for one is not replayed for the other.
#[test]
fn a_cache_serves_several_models() {
    let Some(device) = gpu::<f16>() else { return };
    let models = [load(&device, 1, ""), load(&device, 2, "")];
    let tokens = tokens(&mut Rng::new(6), 12);
    let alone = |model: &Llama<CudaDevice<f16>>| {
        let mut cache = model.cache(700).unwrap();
        let id = cache.add();
        let feed = |token| Feed { sequence: id, tokens: std::slice::from_ref(token), logits: Wanted::Last };
        let step = |token| model.forward(&mut cache, &[feed(token)]).unwrap().to_array().unwrap();
        tokens.iter().map(step).collect::<Vec<_>>()
    };
    let want = models.each_ref().map(alone);
    assert_ne!(want[0], want[1]);
    let mut cache = models[0].cache(700).unwrap();
    for turn in 0..6 {
        let (model, want) = (&models[turn % 2], &want[turn % 2]);
        let sequence = cache.add();
        for (token, want) in tokens.iter().zip(want) {
            let feed = Feed { sequence, tokens: std::slice::from_ref(token), logits: Wanted::Last };
            assert_eq!(&model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap(), want);
        }
        cache.remove(sequence).unwrap();
    }
}

#[test]
fn a_cancelled_generation_leaves_the_model_usable() {
    let Some(device) = gpu::<f16>() else { return };
    let model = load(&device, 4, "");
    let prompt = tokens(&mut Rng::new(8), 33);
    let options = GenerateOptions { max_new_tokens: 30, ..GenerateOptions::default() };
    let whole = || {
        let generator = Generator::new(&model, &prompt, options.clone()).unwrap();
        generator.map(Result::unwrap).collect::<Vec<_>>()
    };
    let want = whole();
    for stop in [0, 1, 2, 17] {
        let cancelled = generate(&model, &prompt, options.clone(), {
            let mut seen = 0;
            move |_| {
                seen += 1;
                if seen > stop {
                    std::ops::ControlFlow::Break(())
                } else {
                    std::ops::ControlFlow::Continue(())
                }
            }
        });
        assert_eq!(cancelled.unwrap(), want[..=stop]);
        assert_eq!(whole(), want);
    }
    // Bad input in the middle of a sequence changes nothing either.
    let mut cache = model.cache(40).unwrap();
    let sequence = cache.add();
    let feed = |tokens| Feed { sequence, tokens, logits: Wanted::Last };
    model.forward(&mut cache, &[feed(&prompt[..20])]).unwrap();
    let error = model.forward(&mut cache, &[feed(&[300])]).map(|_| ()).unwrap_err();
    assert!(matches!(error, LlamaError::Token { token: 300, .. }), "{error}");
    let got = model.forward(&mut cache, &[feed(&prompt[20..])]).unwrap().to_array().unwrap();
    assert_eq!(got.row(0), logits(&model, &prompt).row(32));
}

#[test]
fn loading_and_unloading_leaks_nothing() {
    let Some(device) = gpu::<f16>() else { return };
    let cycle = |seed| {
        let model = load(&device, seed, "");
        let options = GenerateOptions { max_new_tokens: 10, ..GenerateOptions::default() };
        generate(&model, &[1, 2, 3], options, |_| std::ops::ControlFlow::Continue(())).unwrap();
        drop(model);
        device.synchronize().unwrap();
        device.stream().context().mem_get_info().unwrap().0
    };
    // The first cycles load kernels and warm the driver's pools.
    cycle(1);
    let before = cycle(2);
    let after = (0..10).map(cycle).fold(0, |_, free| free);
    println!("free memory before ten cycles {before}, after them {after}");
    assert!(after >= before, "{} bytes are gone", before - after);
}

/// Takes all but `left` bytes of the GPU's memory.
fn ballast(device: &CudaDevice<f16>, left: usize) -> <CudaDevice<f16> as Device>::Buffer {
    let free = device.free_memory().unwrap();
    device
        .alloc(free.checked_sub(left).expect("more free memory than the test needs") / size_of::<f16>())
        .unwrap()
}

#[test]
#[ignore = "takes all of the GPU's memory: to be run alone"]
fn running_out_of_memory_says_what_would_have_fitted() {
    let Some(device) = gpu::<f16>() else { return };
    // 16.8 million float32 weights a layer: 540 MB, or 71 MB in 4 bits.
    let config = LlamaConfig::from_json(
        r#"{"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000}"#,
    )
    .unwrap();
    let weights = MemoryWeights::random(&config, 1);
    let rest = ballast(&device, 300 << 20);
    let load_large = || Llama::from_source(config.clone(), &weights, device.clone(), &LoadOptions::default());
    let error = load_large().map(|_| ()).unwrap_err();
    println!("{error}");
    let LlamaError::ModelMemory { needed, free, layers: 8, layers_that_fit, in_4_bits } = error else {
        panic!("{error}")
    };
    assert!(needed > 530_000_000 && free <= 310 << 20 && (2..5).contains(&layers_that_fit), "{error}");
    assert!(in_4_bits.is_some_and(|bytes| bytes < 90_000_000), "{error}");
    drop(rest);
    drop(load_large().unwrap());

    let model = load(&device, 6, "");
    let mut cache = model.cache(400_000).unwrap();
    let sequence = cache.add();
    let feed = |tokens| Feed { sequence, tokens, logits: Wanted::Last };
    let prompt = tokens(&mut Rng::new(1), 300_000);
    let want = model.forward(&mut cache, &[feed(&prompt[..100])]).unwrap().to_array().unwrap();
    cache.truncate(sequence, 0).unwrap();
    let rest = ballast(&device, 256 << 20);
    // 3 layers of 2 heads of 32 features, keys and values: 768 bytes a token.
    let error = cache.reserve(&device, 800_000).unwrap_err();
    println!("{error}");
    let LlamaError::CacheMemory { tokens: 800_000, bytes_per_token: 768, fits, sequences: 1, .. } = error
    else {
        panic!("{error}")
    };
    assert!((250_000..370_000).contains(&fits), "{error}");
    cache.reserve(&device, 150_000).unwrap();
    let error = model.forward(&mut cache, &[feed(&prompt[..150_000])]).map(|_| ()).unwrap_err();
    println!("{error}");
    let LlamaError::StepMemory { rows: 150_000, fits } = error else { panic!("{error}") };
    assert!((1000..150_000).contains(&fits), "{error}");
    // Nothing has changed, and what was said to fit does.
    assert_eq!(cache.len(sequence).unwrap(), 0);
    assert_eq!(model.forward(&mut cache, &[feed(&prompt[..100])]).unwrap().to_array().unwrap(), want);
    cache.truncate(sequence, 0).unwrap();
    model.forward(&mut cache, &[feed(&prompt[..fits])]).unwrap();
    drop(rest);
}
