//! Speed of a whole model with random weights of a real model's shape.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use gptq_examples::{
    device::{DeviceArgs, Job, KvArgs, Machine, Place},
    failure::{Failure, run},
    host_memory, random_checkpoint,
    random_model::{RandomModel, Weights},
    shape::Shape,
    table,
};
use gptq_kernels::{Backend, CostTable, Draw, Fusion, LinearSpec, Selector, WeightFormat, Workload};
use gptq_llama::{
    Drawing, Feed, KvCache, Llama, LlamaConfig, LlamaError, LoadOptions, Next, Rng, SequenceId, Timings,
    Turn, Wanted,
};

/// What an H200 reads and computes in a second, by `--device cuda`'s floor.
const GPU_BANDWIDTH: f64 = 4.3e12;
const GPU_FLOPS: f64 = 790e12;

/// Steps that are not measured.
const WARM_UP: usize = 3;

/// Steps of the table of parts, at most.
const PART_STEPS: usize = 32;

/// Measures prefill and decode of a model with random weights made in memory, int4 in symmetric groups of 128 or fp16, or of
/// a model folder.
///
/// Every context is measured with every batch; what finds no memory is skipped with a line that says why. Decode is greedy
/// unless told otherwise.
/// GB/s counts the bytes of linear weights that one step has to read; the floor of a GPU is those bytes and those of the
/// caches at 4.3 TB/s, or the multiplications at 790 TFLOP/s if that takes longer: an H200's. The table of parts comes from a
/// second run that waits for every part, which takes some microseconds each time.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Shape of the model
    #[arg(long, value_enum, default_value_t = Shape::Tinyllama)]
    shape: Shape,
    /// Weights of the layers
    #[arg(long, value_enum, default_value_t = Dtype::Int4)]
    dtype: Dtype,
    /// Random groups in int4 layers, as desc_act makes them, instead of one after the other
    #[arg(long)]
    desc_act: bool,
    /// Load this folder instead of making weights
    #[arg(long, value_name = "DIR", conflicts_with_all = ["shape", "dtype", "desc_act", "lm_head", "write"])]
    model: Option<PathBuf>,
    /// Write the random model to this folder, and measure nothing
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Sequences that are decoded side by side; several numbers with commas between them
    #[arg(long, default_value = "1", value_delimiter = ',', value_name = "B")]
    batch: Vec<usize>,
    /// Tokens of the prompt of each sequence, at least one; several numbers with commas between them
    #[arg(long, visible_alias = "context", default_value = "512", value_delimiter = ',', value_name = "P")]
    prompt: Vec<usize>,
    /// Tokens of the prompt that are fed in one step
    #[arg(long, default_value_t = 512, value_name = "N")]
    step: usize,
    /// Skip batches whose prompts have more tokens than this in all
    #[arg(long, value_name = "N")]
    most_prompt_tokens: Option<usize>,
    /// Tokens to generate
    #[arg(long = "new", default_value_t = 128, value_name = "N")]
    new_tokens: usize,
    /// Draw with temperature 0.8, top-k 40 and top-p 0.95 instead of taking the likeliest token
    #[arg(long)]
    sample: bool,
    /// Output projection [default: int4 on the CPU, fp16 on a GPU]
    #[arg(long, value_enum)]
    lm_head: Option<Head>,
    /// Kernel of quantised layers, by name [default: chosen by cost and capability]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// A table of parts for every context and batch [default: if there is one of each]
    #[arg(long)]
    parts: bool,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    device: DeviceArgs,
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

fn main() -> ExitCode {
    run(|args: Args| {
        if args.step == 0 || args.batch.contains(&0) {
            return Err("--step and --batch must be positive".into());
        }
        // One pool for everything, and this thread inside it: operations then start without waking another thread first.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0)).build()?;
        pool.install(|| match &args.write {
            Some(dir) => write(&args, dir),
            None => args.device.run(&args),
        })
    })
}

impl Args {
    /// Tokens of the longest sequence, those of warming up and of the table of parts included.
    fn longest(&self) -> usize {
        self.prompt.iter().copied().max().unwrap_or(0).max(1) + self.new_tokens.max(PART_STEPS) + 3
    }

    /// The calls that layers will answer.
    fn workload(&self) -> Workload {
        let mut workload = Workload::rows(1);
        for &prompt in &self.prompt {
            for &batch in &self.batch {
                let prompts = (batch * prompt.div_ceil(self.step)) as f64;
                workload =
                    workload.and(prompt.clamp(1, self.step), prompts).and(batch, self.new_tokens as f64);
            }
        }
        workload
    }

    fn random_model(&self, config: LlamaConfig) -> RandomModel {
        let on_gpu = self.device.device == Place::Cuda || self.write.is_some();
        let layers = match self.dtype {
            Dtype::Int4 => Weights::Int4,
            Dtype::Fp16 => Weights::F16,
        };
        let dense = if on_gpu { Weights::F16 } else { Weights::Bf16 };
        let head = match self.lm_head {
            Some(Head::Int4) => Weights::Int4,
            None if !on_gpu && self.dtype == Dtype::Int4 => Weights::Int4,
            _ => dense,
        };
        RandomModel::new(config, layers, head, dense).with_act_order(self.desc_act)
    }
}

fn write(args: &Args, dir: &Path) -> Result<(), Failure> {
    let json = args.shape.json(args.longest(), None);
    let config = LlamaConfig::from_json(&json)?;
    let start = Instant::now();
    let summary = random_checkpoint::write(dir, &json, &config, &args.random_model(config.clone()))?;
    let bytes: u64 = summary.weights.iter().map(|path| path.metadata().map_or(0, |file| file.len())).sum();
    let files = summary.weights.len();
    println!("{}: {bytes} bytes in {files} files, {:.1} s", dir.display(), start.elapsed().as_secs_f64());
    Ok(())
}

impl Job for Args {
    fn run<D: Backend>(&self, device: D, machine: &Machine) -> Result<(), Failure> {
        let options = LoadOptions::default()
            .with_kernel(self.kernel.clone())
            .with_workload(self.workload())
            .with_kv(self.kv.into());
        let (watch, start) = (host_memory::Watch::start(), Instant::now());
        let (model, from) = match &self.model {
            Some(dir) => (Llama::load(dir, device, &options)?, "from the folder"),
            None => {
                let config = LlamaConfig::from_json(&self.shape.json(self.longest(), None))?;
                let source = self.random_model(config.clone());
                (Llama::from_source(config, &source, device, &options)?, "weights made in memory")
            }
        };
        let loading = start.elapsed();
        println!("threads         {}", rayon::current_num_threads());
        println!("load            {:.2} s ({from})", loading.as_secs_f64());
        if let (Some(anonymous), Some(all)) = (watch.peak(), host_memory::highest_resident()) {
            let (anonymous, all) = (anonymous as f64 / 1e6, all as f64 / 1e6);
            println!(
                "host memory     {anonymous:.0} MB at most while loading; {all:.0} MB with mapped files"
            );
        }
        if let Some(bytes) = machine.used_bytes() {
            println!("memory          {:.0} MB after loading", bytes as f64 / 1e6);
        }
        self.explain(&model, &options)?;
        self.measure(&model, machine)
    }
}

impl Args {
    /// Kernels, how many layers each has, and why.
    fn explain<D: Backend>(&self, model: &Llama<D>, options: &LoadOptions) -> Result<(), Failure> {
        let weights: usize =
            model.linears().map(|linear| linear.spec().in_features * linear.spec().out_features).sum();
        let in_order = model.linears().filter(|linear| linear.input_order().is_some()).count();
        if in_order > 0 {
            println!("act-order       {in_order} layers take their input in their own order");
        }
        println!("linear weights  {:.3} billion", weights as f64 / 1e9);
        println!("weights read    {:.1} MB a token", model.weight_bytes() as f64 / 1e6);
        let mut kernels: BTreeMap<String, (usize, &LinearSpec)> = BTreeMap::new();
        for linear in model.linears() {
            let spec = linear.spec();
            let name = format!("{} {:?} {:?}", linear.kernel(), spec.prologue, spec.epilogue);
            kernels.entry(name).or_insert((0, linear.spec())).0 += 1;
        }
        let costs = CostTable::shipped(&model.device().model());
        for (name, (count, spec)) in kernels {
            let selector = Selector::new().workload(options.workload.clone());
            let selector = match (&costs, spec.weight) {
                (_, WeightFormat::Gptq { .. }) if self.kernel.is_some() => {
                    selector.named(self.kernel.as_deref())
                }
                (Some(costs), _) => selector.costs(costs),
                (None, _) => selector,
            };
            let spec = spec.clone().fused(&Fusion::default());
            let (_, why) = selector.select(&model.device().kernels(), &spec)?;
            println!("kernel          {name}, {count} layers: {why}");
        }
        Ok(())
    }

    fn measure<D: Backend>(&self, model: &Llama<D>, machine: &Machine) -> Result<(), Failure> {
        let single = self.prompt.len() == 1 && self.batch.len() == 1;
        let mut batches = self.batch.clone();
        batches.sort_unstable();
        let vocabulary = model.config().vocab_size as u64;
        let mut lines = 0;
        for &context in &self.prompt {
            let mut rng = Rng::new(1);
            let prompt: Vec<u32> =
                (0..context.max(1)).map(|_| (rng.next_u64() % vocabulary) as u32).collect();
            let draw = match self.sample {
                true => Draw { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.0, random: rng.next_u64() },
                false => Draw::GREEDY,
            };
            let mut bench = Bench::new(model, self.longest(), self.step, draw)?;
            // Buffers, pages and weights are touched once before anything is measured.
            bench.grow(&prompt, 1)?;
            bench.decode(WARM_UP)?;
            bench.clear()?;
            for &batch in &batches {
                let tokens = batch * prompt.len();
                if self.most_prompt_tokens.is_some_and(|most| tokens > most) {
                    println!("skipped         context {context}, batch {batch}: {tokens} tokens of prompts");
                    continue;
                }
                let page = |tokens: usize| tokens.next_multiple_of(D::PAGE_LEN);
                let pages = batch * page(prompt.len() + self.new_tokens.max(PART_STEPS));
                let prefilled = bench.cache.reserve(model.device(), pages);
                let prefilled =
                    match prefilled.map_err(Failure::from).and_then(|()| bench.grow(&prompt, batch)) {
                        Ok(prefilled) => prefilled,
                        Err(error) => {
                            let fits = match error.downcast_ref::<LlamaError>() {
                                Some(LlamaError::CacheMemory { fits, .. }) => {
                                    format!("; a batch of {}", fits * batch / pages)
                                }
                                _ => String::new(),
                            };
                            println!("skipped         context {context}, batch {batch}: {error}{fits}");
                            break;
                        }
                    };
                // The first steps of a batch load kernels and record a graph.
                bench.decode(WARM_UP)?;
                bench.rewind(prompt.len())?;
                let mut steps = bench.decode(self.new_tokens)?;
                let decode = steps.iter().sum::<Duration>().as_secs_f64();
                steps.sort();
                let median = steps.get(steps.len() / 2).map_or(0.0, Duration::as_secs_f64);
                bench.rewind(prompt.len())?;
                let result = Measured {
                    context,
                    batch,
                    prefilled,
                    prompt: prompt.len(),
                    step: decode / self.new_tokens.max(1) as f64,
                    median,
                    memory: machine.used_bytes(),
                    floor: machine.gpu.then(|| {
                        let tokens = batch * (prompt.len() + self.new_tokens / 2);
                        floor(model, &bench.cache, tokens, batch)
                    }),
                };
                if single {
                    result.print(model.weight_bytes(), self.new_tokens > 0);
                } else {
                    if lines == 0 || self.parts {
                        println!("\n{}", Measured::HEADER);
                    }
                    lines += 1;
                    println!("{}", result.line());
                }
                if single || self.parts {
                    println!();
                    print_parts(&mut bench, &prompt, batch, self.new_tokens.min(PART_STEPS))?;
                }
            }
        }
        Ok(())
    }
}

/// Seconds that a step takes at least on an H200, with keys and values of `tokens` tokens in its caches.
fn floor<D: Backend>(model: &Llama<D>, cache: &KvCache<D>, tokens: usize, batch: usize) -> f64 {
    let caches = tokens * cache.bytes_per_token();
    let weights: usize =
        model.linears().map(|linear| linear.spec().in_features * linear.spec().out_features).sum();
    let bytes = (model.weight_bytes() + caches) as f64 / GPU_BANDWIDTH;
    bytes.max((2 * weights * batch) as f64 / GPU_FLOPS)
}

/// One context and batch.
struct Measured {
    context: usize,
    batch: usize,
    /// Tokens of one prompt, the prompts that were fed for this line, and the time of each.
    prompt: usize,
    prefilled: Vec<Duration>,
    /// Seconds of a step.
    step: f64,
    median: f64,
    memory: Option<u64>,
    floor: Option<f64>,
}

impl Measured {
    /// Written line by line: a table that is broken off is better than none.
    const HEADER: &str = "| context | batch | first token, ms | prefill tok/s | step, ms | median | tok/s | of the floor |\n\
                          |---|---|---|---|---|---|---|---|";

    /// The median time of a prompt.
    fn first_token(&self) -> f64 {
        let mut times = self.prefilled.clone();
        times.sort();
        times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64)
    }

    fn line(&self) -> String {
        let floor =
            self.floor.map_or_else(|| "-".to_owned(), |floor| format!("{:.0} %", 100.0 * floor / self.step));
        format!(
            "| {} | {} | {:.2} | {:.0} | {:.3} | {:.3} | {:.0} | {floor} |",
            self.context,
            self.batch,
            self.first_token() * 1e3,
            self.prompt as f64 / self.first_token(),
            self.step * 1e3,
            self.median * 1e3,
            self.batch as f64 / self.step,
        )
    }

    fn print(&self, weight_bytes: usize, decoded: bool) {
        if let Some(bytes) = self.memory {
            println!("memory          {:.0} MB with caches and scratch", bytes as f64 / 1e6);
        }
        let seconds: f64 = self.prefilled.iter().map(Duration::as_secs_f64).sum();
        let tokens = self.prompt * self.prefilled.len();
        println!(
            "prefill         {:.1} tokens/s ({tokens} tokens in {seconds:.4} s, the first new ones included)",
            tokens as f64 / seconds
        );
        if !decoded {
            return;
        }
        println!(
            "decode          {:.1} tokens/s, batch {} ({:.4} ms a step, median {:.4})",
            self.batch as f64 / self.step,
            self.batch,
            self.step * 1e3,
            self.median * 1e3
        );
        println!("                {:.1} GB/s of weights", weight_bytes as f64 / self.step / 1e9);
        if let Some(floor) = self.floor {
            println!(
                "floor           {:.4} ms a step; {:.1} % of it",
                floor * 1e3,
                100.0 * floor / self.step
            );
        }
    }
}

/// Some sequences in one cache, all with the same prompt.
struct Bench<'m, D: Backend> {
    model: &'m Llama<D>,
    cache: KvCache<D>,
    /// Tokens of a prompt that are fed at a time.
    at_a_time: usize,
    sequences: Vec<SequenceId>,
    /// The token after the prompt, and the one to be fed next.
    first: Vec<u32>,
    next: Vec<u32>,
    draw: Draw,
}

impl<'m, D: Backend> Bench<'m, D> {
    fn new(model: &'m Llama<D>, longest: usize, at_a_time: usize, draw: Draw) -> Result<Self, Failure> {
        let cache = model.cache(longest)?;
        Ok(Self { model, cache, at_a_time, sequences: Vec::new(), first: Vec::new(), next: Vec::new(), draw })
    }

    fn clear(&mut self) -> Result<(), Failure> {
        for sequence in self.sequences.drain(..) {
            self.cache.remove(sequence)?;
        }
        self.first.clear();
        Ok(())
    }

    /// Back to where the prompts ended.
    fn rewind(&mut self, prompt: usize) -> Result<(), Failure> {
        self.next.clone_from(&self.first);
        for &sequence in &self.sequences {
            self.cache.truncate(sequence, prompt)?;
        }
        Ok(())
    }

    /// Adds sequences until there are `batch`, feeds each its prompt, in parts, and tells how long each took.
    fn grow(&mut self, prompt: &[u32], batch: usize) -> Result<Vec<Duration>, Failure> {
        let mut times = Vec::new();
        while self.sequences.len() < batch {
            let sequence = self.cache.add();
            self.sequences.push(sequence);
            let start = Instant::now();
            let mut parts = prompt.chunks(self.at_a_time).peekable();
            while let Some(tokens) = parts.next() {
                let last = parts.peek().is_none();
                let logits = if last { Wanted::Last } else { Wanted::None };
                let logits = self.model.forward(&mut self.cache, &[Feed { sequence, tokens, logits }])?;
                if last {
                    self.first.push(logits.argmax()?[0].ok_or("the model computed NaN")?);
                }
            }
            times.push(start.elapsed());
        }
        self.next.clone_from(&self.first);
        Ok(times)
    }

    /// Steps of all sequences, and the time of each, from token to token. Where work is queued, the next step is begun before
    /// the tokens of one are known.
    fn decode(&mut self, steps: usize) -> Result<Vec<Duration>, Failure> {
        let mut times = Vec::with_capacity(steps);
        let given = std::mem::take(&mut self.next);
        let mut start = Instant::now();
        let mut begun = None;
        for left in (0..steps).rev() {
            let drawing = match begun.take() {
                Some(drawing) => drawing,
                None if times.is_empty() => self.begin_step(|i| Next::Tokens(&given[i..=i]))?,
                None => self.begin_step(|_| Next::Drawn)?,
            };
            if D::QUEUES && left > 0 {
                begun = Some(self.begin_step(|_| Next::Drawn)?);
            }
            let tokens = self.model.drawn(&mut self.cache, drawing)?;
            self.next = tokens.into_iter().collect::<Option<_>>().ok_or("the model computed NaN")?;
            times.push(start.elapsed());
            start = Instant::now();
        }
        Ok(times)
    }

    fn begin_step<'t>(&mut self, next: impl Fn(usize) -> Next<'t>) -> Result<Drawing, Failure> {
        let turn = |(i, &sequence)| Turn { sequence, next: next(i), draw: self.draw };
        let turns: Vec<Turn<'_>> = self.sequences.iter().enumerate().map(turn).collect();
        Ok(self.model.step(&mut self.cache, &turns)?)
    }
}

/// Decode and one prefill once more, waiting for every part.
fn print_parts<D: Backend>(
    bench: &mut Bench<'_, D>,
    prompt: &[u32],
    batch: usize,
    steps: usize,
) -> Result<(), Failure> {
    bench.cache.set_timing(true);
    bench.decode(steps)?;
    let decode = bench.cache.timings().copied().unwrap_or_default();
    bench.rewind(prompt.len())?;
    // One prompt is as good as many.
    let last = bench.sequences.pop().ok_or("no sequence")?;
    bench.cache.remove(last)?;
    bench.first.pop();
    bench.cache.set_timing(true);
    bench.grow(prompt, batch)?;
    let prefill = bench.cache.timings().copied().unwrap_or_default();
    bench.cache.set_timing(false);
    let rows = parts(&prefill, &decode, prompt.len());
    for line in table::lines(&["part", "prefill us/token", "share", "decode us/step", "share"], &rows) {
        println!("{line}");
    }
    Ok(())
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
            ("drawing", timings.draw),
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
