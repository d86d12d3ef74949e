//! Speed of a whole model on the CPU, with random weights of a real model's shape.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{
    collections::BTreeMap,
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use gptq_examples::{
    failure::{Failure, run},
    random_model::RandomModel,
    table,
};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{Feed, KvCache, Llama, LlamaConfig, LoadOptions, Rng, SequenceId, Timings, Wanted};

/// Measures prefill and decode of a model with random int4 weights (symmetric groups of 128) made in memory.
///
/// Decode is greedy, one sequence. GB/s counts the bytes of linear weights that one token has to read.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Shape of the model
    #[arg(long, value_enum, default_value_t = Shape::Tinyllama)]
    shape: Shape,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512, value_name = "P")]
    prompt: usize,
    /// Tokens of the prompt that are fed in one step
    #[arg(long, default_value_t = 512, value_name = "N")]
    step: usize,
    /// Tokens to generate
    #[arg(long = "new", default_value_t = 128, value_name = "N")]
    new_tokens: usize,
    /// Output projection
    #[arg(long, value_enum, default_value_t = Head::Int4)]
    lm_head: Head,
    /// Kernel of quantised layers, by name [default: chosen by capability]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shape {
    #[value(name = "tinyllama-1.1b")]
    Tinyllama,
    #[value(name = "llama-2-7b")]
    Llama2,
    #[value(name = "tiny")]
    Tiny,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Head {
    /// bfloat16
    Dense,
    /// quantised like the other layers
    Int4,
}

impl Shape {
    fn config(self, positions: usize) -> Result<LlamaConfig, Failure> {
        let [hidden, inner, layers, heads, kv_heads, vocabulary] = match self {
            Self::Tinyllama => [2048, 5632, 22, 32, 4, 32_000],
            Self::Llama2 => [4096, 11_008, 32, 32, 32, 32_000],
            Self::Tiny => [256, 768, 4, 4, 2, 2048],
        };
        Ok(LlamaConfig::from_json(&format!(
            r#"{{"model_type": "llama", "hidden_size": {hidden}, "intermediate_size": {inner},
                 "num_hidden_layers": {layers}, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
                 "vocab_size": {vocabulary}, "max_position_embeddings": {positions}}}"#
        ))?)
    }
}

fn main() -> ExitCode {
    run(|args: Args| {
        // One pool for everything, and this thread inside it: operations then start without waking another thread first.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0)).build()?;
        pool.install(|| measure(&args))
    })
}

fn measure(args: &Args) -> Result<(), Failure> {
    if args.prompt == 0 || args.step == 0 {
        return Err("--prompt and --step must be positive".into());
    }
    let config = args.shape.config(args.prompt + args.new_tokens + 1)?;
    let vocabulary = config.vocab_size as u64;
    let source = RandomModel::new(config.clone(), args.lm_head == Head::Int4);
    let start = Instant::now();
    let model =
        Llama::from_source(config, &source, Cpu, &LoadOptions::default().with_kernel(args.kernel.clone()))?;
    let mut kernels: BTreeMap<&str, usize> = BTreeMap::new();
    for linear in model.linears() {
        *kernels.entry(linear.kernel()).or_default() += 1;
    }
    println!("threads         {}", rayon::current_num_threads());
    println!("linear weights  {:.3} billion", source.linear_weights() as f64 / 1e9);
    println!("kernels         {kernels:?}");
    println!("load            {:.2} s (weights made in memory)", start.elapsed().as_secs_f64());
    println!("weights read    {:.1} MB a token", model.weight_bytes() as f64 / 1e6);

    let mut rng = Rng::new(1);
    let prompt: Vec<u32> = (0..args.prompt).map(|_| (rng.next_u64() % vocabulary) as u32).collect();
    let mut cache = model.cache(args.prompt + args.new_tokens + 1)?;
    // Buffers, pages and weights are touched once before anything is measured.
    let warm = cache.add();
    feed(&model, &mut cache, warm, &prompt[..args.step.min(args.prompt)])?;
    cache.remove(warm)?;

    let sequence = cache.add();
    cache.set_timing(true);
    let start = Instant::now();
    let mut token = 0;
    for part in prompt.chunks(args.step) {
        token = feed(&model, &mut cache, sequence, part)?;
    }
    let prefill = start.elapsed();
    let prefill_parts = cache.timings().copied().unwrap_or_default();

    cache.set_timing(true);
    let mut steps = Vec::with_capacity(args.new_tokens);
    for _ in 0..args.new_tokens {
        let start = Instant::now();
        token = feed(&model, &mut cache, sequence, &[token])?;
        steps.push(start.elapsed());
    }
    let decode: Duration = steps.iter().sum();
    let decode_parts = cache.timings().copied().unwrap_or_default();

    if let Some(memory) = resident_megabytes() {
        println!("memory          {memory:.0} MB resident");
    }
    println!(
        "prefill         {:.1} tokens/s ({} tokens in {:.3} s)",
        args.prompt as f64 / prefill.as_secs_f64(),
        args.prompt,
        prefill.as_secs_f64()
    );
    if args.new_tokens > 0 {
        steps.sort();
        let rate = args.new_tokens as f64 / decode.as_secs_f64();
        println!(
            "decode          {rate:.1} tokens/s ({} tokens in {:.3} s; median {:.2} ms a token)",
            args.new_tokens,
            decode.as_secs_f64(),
            steps[steps.len() / 2].as_secs_f64() * 1e3
        );
        println!("                {:.1} GB/s of weights", rate * model.weight_bytes() as f64 / 1e9);
    }
    println!();
    let rows = parts(&prefill_parts, &decode_parts, args.prompt, args.new_tokens);
    for line in table::lines(&["part", "prefill us/token", "share", "decode us/token", "share"], &rows) {
        println!("{line}");
    }
    Ok(())
}

/// Feeds tokens and returns the likeliest next one.
fn feed(
    model: &Llama<Cpu>,
    cache: &mut KvCache<Cpu>,
    sequence: SequenceId,
    tokens: &[u32],
) -> Result<u32, Failure> {
    let feed = Feed { sequence, tokens, logits: Wanted::Last };
    let next = model.forward(cache, &[feed])?.argmax()?;
    Ok(next[0].ok_or("the model computed NaN")?)
}

fn parts(prefill: &Timings, decode: &Timings, prompt: usize, new: usize) -> Vec<Vec<String>> {
    let list = |timings: &Timings| {
        [
            ("norms, residual", timings.norms),
            ("qkv", timings.qkv),
            ("rope, cache", timings.rope),
            ("attention", timings.attention),
            ("o", timings.o),
            ("gate, up", timings.gate_up),
            ("silu * up", timings.activation),
            ("down", timings.down),
            ("lm_head", timings.lm_head),
        ]
    };
    let (prefill, decode) = (list(prefill), list(decode));
    let total = |parts: &[(&str, Duration)]| parts.iter().map(|(_, time)| time.as_secs_f64()).sum::<f64>();
    let totals = (total(&prefill), total(&decode));
    let cells = |time: Duration, tokens: usize, total: f64| {
        let time = time.as_secs_f64();
        let share = if total > 0.0 { 100.0 * time / total } else { 0.0 };
        [format!("{:.1}", time * 1e6 / tokens.max(1) as f64), format!("{share:.1} %")]
    };
    prefill
        .iter()
        .zip(&decode)
        .map(|((name, prefill), (_, decode))| {
            let mut row = vec![(*name).to_owned()];
            row.extend(cells(*prefill, prompt, totals.0));
            row.extend(cells(*decode, new, totals.1));
            row
        })
        .collect()
}

/// Memory of this process, where the system tells it as Linux does.
fn resident_megabytes() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kilobytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes / 1e3)
}
