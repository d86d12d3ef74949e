//! Speed of a whole model with random weights of a real model's shape.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{
    collections::BTreeMap,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use gptq_examples::{
    device::{DeviceArgs, Job, Machine, Place},
    failure::{Failure, run},
    random_model::{RandomModel, Weights},
    table,
};
use gptq_kernels::Backend;
use gptq_llama::{Feed, KvCache, Llama, LlamaConfig, LoadOptions, Rng, SequenceId, Timings, Wanted};

/// What an H200 reads in a second, by `--device cuda`'s floor.
const GPU_BANDWIDTH: f64 = 4.3e12;

/// Measures prefill and decode of a model with random weights made in memory, int4 in symmetric groups of 128 or fp16.
///
/// Decode is greedy. GB/s counts the bytes of linear weights that one step has to read; the floor of a GPU is those bytes
/// and those of the caches at 4.3 TB/s, an H200's. The table of parts comes from a second run that waits for every part,
/// which takes some microseconds each time.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Shape of the model
    #[arg(long, value_enum, default_value_t = Shape::Tinyllama)]
    shape: Shape,
    /// Weights of the layers
    #[arg(long, value_enum, default_value_t = Dtype::Int4)]
    dtype: Dtype,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Sequences that are decoded side by side
    #[arg(long, default_value_t = 1, value_name = "B")]
    batch: usize,
    /// Tokens of the prompt of each sequence
    #[arg(long, visible_alias = "context", default_value_t = 512, value_name = "P")]
    prompt: usize,
    /// Tokens of the prompt that are fed in one step
    #[arg(long, default_value_t = 512, value_name = "N")]
    step: usize,
    /// Tokens to generate
    #[arg(long = "new", default_value_t = 128, value_name = "N")]
    new_tokens: usize,
    /// Output projection [default: int4 on the CPU, fp16 on a GPU]
    #[arg(long, value_enum)]
    lm_head: Option<Head>,
    /// Kernel of quantised layers, by name [default: chosen by capability]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shape {
    #[value(name = "tiny")]
    Tiny,
    #[value(name = "tinyllama-1.1b")]
    Tinyllama,
    #[value(name = "llama-2-7b")]
    Llama2With7b,
    #[value(name = "llama-3-8b")]
    Llama3With8b,
    #[value(name = "llama-2-13b")]
    Llama2With13b,
    #[value(name = "llama-2-70b")]
    Llama2With70b,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Dtype {
    /// Symmetric groups of 128
    Int4,
    /// Not quantised
    Fp16,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Head {
    /// bfloat16 on the CPU, fp16 on a GPU
    Dense,
    /// quantised like the other layers
    Int4,
}

impl Shape {
    fn config(self, positions: usize) -> Result<LlamaConfig, Failure> {
        let [hidden, inner, layers, heads, kv_heads, vocabulary] = match self {
            Self::Tiny => [256, 768, 4, 4, 2, 2048],
            Self::Tinyllama => [2048, 5632, 22, 32, 4, 32_000],
            Self::Llama2With7b => [4096, 11_008, 32, 32, 32, 32_000],
            Self::Llama3With8b => [4096, 14_336, 32, 32, 8, 128_256],
            Self::Llama2With13b => [5120, 13_824, 40, 40, 40, 32_000],
            Self::Llama2With70b => [8192, 28_672, 80, 64, 8, 32_000],
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
        pool.install(|| args.device.run(&args))
    })
}

impl Job for Args {
    fn run<D: Backend>(&self, device: D, machine: &Machine) -> Result<(), Failure> {
        measure(self, device, machine)
    }
}

fn measure<D: Backend>(args: &Args, device: D, machine: &Machine) -> Result<(), Failure> {
    if args.step == 0 || args.batch == 0 {
        return Err("--step and --batch must be positive".into());
    }
    let on_gpu = args.device.device == Place::Cuda;
    let config = args.shape.config(args.prompt + args.new_tokens + 3)?;
    let (vocabulary, kv_features) = (config.vocab_size as u64, config.kv_features());
    let (layers, longest) = (config.layers, config.max_positions);
    let layer_weights = match (args.dtype, on_gpu) {
        (Dtype::Int4, _) => Weights::Int4,
        (Dtype::Fp16, _) => Weights::F16,
    };
    let dense = if on_gpu { Weights::F16 } else { Weights::Bf16 };
    let head = match args.lm_head {
        Some(Head::Int4) => Weights::Int4,
        None if !on_gpu && args.dtype == Dtype::Int4 => Weights::Int4,
        _ => dense,
    };
    let source = RandomModel::new(config.clone(), layer_weights, head, dense);
    let start = Instant::now();
    let options = LoadOptions::default().with_kernel(args.kernel.clone());
    let model = Llama::from_source(config, &source, device, &options)?;
    let mut kernels: BTreeMap<String, usize> = BTreeMap::new();
    for linear in model.linears() {
        *kernels.entry(format!("{} {:?}", linear.kernel(), linear.spec().epilogue)).or_default() += 1;
    }
    println!("threads         {}", rayon::current_num_threads());
    println!("linear weights  {:.3} billion", source.linear_weights() as f64 / 1e9);
    println!("kernels         {kernels:?}");
    println!("load            {:.2} s (weights made in memory)", start.elapsed().as_secs_f64());
    println!("weights read    {:.1} MB a token", model.weight_bytes() as f64 / 1e6);
    if let Some(bytes) = machine.used_bytes() {
        println!("memory          {:.0} MB after loading", bytes as f64 / 1e6);
    }

    let mut rng = Rng::new(1);
    let prompt: Vec<u32> = (0..args.prompt.max(1)).map(|_| (rng.next_u64() % vocabulary) as u32).collect();
    let mut bench =
        Bench { model: &model, cache: model.cache(longest)?, sequences: Vec::new(), next: Vec::new() };
    // Buffers, pages and weights are touched once before anything is measured.
    bench.begin(args.batch);
    bench.prefill(&prompt, args.step)?;
    bench.decode(2)?;
    bench.end()?;

    bench.begin(args.batch);
    let start = Instant::now();
    bench.prefill(&prompt, args.step)?;
    let prefill = start.elapsed();
    let mut steps = bench.decode(args.new_tokens)?;
    let decode: Duration = steps.iter().sum();
    bench.end()?;
    if let Some(bytes) = machine.used_bytes() {
        println!("memory          {:.0} MB with caches and scratch", bytes as f64 / 1e6);
    }
    let tokens = prompt.len() * args.batch;
    println!(
        "prefill         {:.1} tokens/s ({tokens} tokens in {:.4} s, the first new ones included)",
        tokens as f64 / prefill.as_secs_f64(),
        prefill.as_secs_f64()
    );
    if args.new_tokens > 0 {
        let seconds = decode.as_secs_f64() / args.new_tokens as f64;
        steps.sort();
        println!(
            "decode          {:.1} tokens/s, batch {} ({:.4} ms a step, median {:.4})",
            args.batch as f64 / seconds,
            args.batch,
            seconds * 1e3,
            steps[steps.len() / 2].as_secs_f64() * 1e3
        );
        println!("                {:.1} GB/s of weights", model.weight_bytes() as f64 / seconds / 1e9);
        if machine.gpu {
            // Keys and values of two bytes, of half the new tokens on average.
            let context = prompt.len() as f64 + args.new_tokens as f64 / 2.0;
            let caches = context * (args.batch * layers * 2 * kv_features * 2) as f64;
            let floor = (model.weight_bytes() as f64 + caches) / GPU_BANDWIDTH;
            println!("floor           {:.4} ms a step; {:.1} % of it", floor * 1e3, 100.0 * floor / seconds);
        }
    }

    bench.cache.set_timing(true);
    bench.begin(args.batch);
    bench.prefill(&prompt, args.step)?;
    let prefill_parts = bench.cache.timings().copied().unwrap_or_default();
    bench.cache.set_timing(true);
    bench.decode(args.new_tokens.min(32))?;
    let decode_parts = bench.cache.timings().copied().unwrap_or_default();
    println!();
    let rows = parts(&prefill_parts, &decode_parts, prompt.len() * args.batch);
    for line in table::lines(&["part", "prefill us/token", "share", "decode us/step", "share"], &rows) {
        println!("{line}");
    }
    Ok(())
}

/// Some sequences in one cache.
struct Bench<'m, D: Backend> {
    model: &'m Llama<D>,
    cache: KvCache<D>,
    sequences: Vec<SequenceId>,
    next: Vec<u32>,
}

impl<D: Backend> Bench<'_, D> {
    fn begin(&mut self, batch: usize) {
        self.sequences = (0..batch).map(|_| self.cache.add()).collect();
        self.next = vec![0; batch];
    }

    fn end(&mut self) -> Result<(), Failure> {
        for sequence in self.sequences.drain(..) {
            self.cache.remove(sequence)?;
        }
        Ok(())
    }

    /// Feeds the prompt to one sequence after the other, in parts.
    fn prefill(&mut self, prompt: &[u32], step: usize) -> Result<(), Failure> {
        for (&sequence, next) in self.sequences.iter().zip(&mut self.next) {
            let mut parts = prompt.chunks(step).peekable();
            while let Some(tokens) = parts.next() {
                let last = parts.peek().is_none();
                let logits = if last { Wanted::Last } else { Wanted::None };
                let logits = self.model.forward(&mut self.cache, &[Feed { sequence, tokens, logits }])?;
                if last {
                    *next = logits.argmax()?[0].ok_or("the model computed NaN")?;
                }
            }
        }
        Ok(())
    }

    /// Greedy steps of all sequences, and the time of each.
    fn decode(&mut self, steps: usize) -> Result<Vec<Duration>, Failure> {
        let mut times = Vec::with_capacity(steps);
        for _ in 0..steps {
            let start = Instant::now();
            let tokens = std::mem::take(&mut self.next);
            let feeds: Vec<Feed<'_>> = self
                .sequences
                .iter()
                .zip(tokens.chunks(1))
                .map(|(&sequence, tokens)| Feed { sequence, tokens, logits: Wanted::Last })
                .collect();
            let best = self.model.forward(&mut self.cache, &feeds)?.argmax()?;
            self.next = best.into_iter().collect::<Option<_>>().ok_or("the model computed NaN")?;
            times.push(start.elapsed());
        }
        Ok(times)
    }
}

fn parts(prefill: &Timings, decode: &Timings, prompt: usize) -> Vec<Vec<String>> {
    let list = |timings: &Timings| {
        [
            ("norms, residual", timings.norms),
            ("qkv", timings.qkv),
            ("rope, attention", timings.attention),
            ("o", timings.o),
            ("gate, up", timings.gate_up),
            ("silu * up", timings.activation),
            ("down", timings.down),
            ("lm_head", timings.lm_head),
        ]
    };
    let steps = decode.steps;
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
            row.extend(cells(*decode, steps, totals.1));
            row
        })
        .collect()
}
