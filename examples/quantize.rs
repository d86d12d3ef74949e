//! Quantises a model folder.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, ValueEnum};
use gptq_core::GptqConfig;
use gptq_examples::{
    data::RowSource,
    device::{Activations, DeviceArgs, Job, Machine},
    failure::{Failure, run},
    plot, progress, tune,
};
use gptq_format::{Checkpoint, DynamicRules};
use gptq_kernels::{cpu::Cpu, quantize::QuantizeBackend};
use gptq_llama::{
    Existing, LlamaConfig, LlamaError, LoraWeights, Module, OutputError, QuantizeJob, QuantizeOptions,
    QuantizeReport, TokenRows, Watch, WeightSource,
};

/// Quantises the linear layers of a Llama, Mistral or Qwen2 and writes a GPTQ checkpoint.
///
/// Without options: 4 bits, groups of 128, symmetric, columns in natural order, no grid search, damping 0.01, layers
/// calibrated behind their quantised predecessors, calibration rows as they stand.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Model folder: config.json and safetensors in float32, float16 or bfloat16
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder to write
    #[arg(long, value_name = "DIR", required_unless_present_any = ["try_recipes", "propose"])]
    out: Option<PathBuf>,
    /// Go on with the run in --out that was interrupted; where there is none, start one
    #[arg(long)]
    resume: bool,
    /// Start again in a folder that is not empty; a checkpoint in it is replaced once the new one is complete
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Calibration rows: .jsonl with a key `text` on each line, .txt (one long text), or .safetensors with token ids in a
    /// tensor `calibration`. Not needed for --method rtn
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Bits of a code: 2, 3, 4 or 8
    #[arg(long, default_value_t = 4, value_name = "B")]
    bits: u32,
    /// Input features that share a scale, a multiple of 8; -1 for all
    #[arg(long, default_value_t = 128, allow_negative_numbers = true, value_name = "G")]
    group_size: i64,
    /// Quantise columns in the order of their activations; groups then follow that order
    #[arg(long)]
    desc_act: bool,
    /// Fix the scales of all groups before the first column
    #[arg(long)]
    static_groups: bool,
    /// Order columns within groups, and the groups, by activations; costs nothing at inference
    #[arg(long)]
    act_group_aware: bool,
    /// Zero points chosen by group, instead of the middle of the range
    #[arg(long)]
    asym: bool,
    /// Search scales that minimise the sum of |error|^P; 2.4 is usual
    #[arg(long, value_name = "P")]
    mse: Option<f32>,
    /// Correct for the error of preceding layers (GPTAQ) with strength A; 0.25 is usual
    #[arg(long, value_name = "A")]
    gptaq: Option<f32>,
    /// Share of the Hessian's mean diagonal added to its diagonal
    #[arg(long, default_value_t = 0.01, value_name = "D")]
    damp: f64,
    /// Calibration rows to use [default: all]
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
    /// Tokens a calibration row [default: ids as they stand; texts by the model's context, at most 2048]
    #[arg(long, value_name = "N")]
    seq_len: Option<usize>,
    /// Settings of single layers: a JSON object of regular expressions for names and their overrides, such as
    /// {"-:.*down_proj": {}, "+:.*\.0\..*": {"bits": 8}}; the first that matches decides, -: leaves a layer as it is
    #[arg(long, value_name = "FILE")]
    dynamic: Option<PathBuf>,
    /// Quantise the output layer too
    #[arg(long)]
    lm_head: bool,
    /// Merge the LoRA adapter in this folder (adapter_config.json, adapter_model.safetensors) into the model first
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,
    /// Mebibytes of calibration activations in memory; what does not fit goes to a file in --out
    #[arg(long, default_value_t = 4096, value_name = "MIB")]
    memory_budget: usize,
    /// Mebibytes of activations in GPU memory [default: what the work on a layer leaves]; what does not fit goes to the
    /// host's memory, up to --memory-budget
    #[arg(long, value_name = "MIB")]
    device_budget: Option<usize>,
    /// Say where the time went
    #[arg(long)]
    times: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Draw the loss of every layer, beside what rounding to nearest would have lost, into this SVG file
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// gptq, or rtn: round to nearest, the baseline
    #[arg(long, value_enum, default_value_t = Method::Gptq)]
    method: Method,
    /// Try variants of the recipe on one decoder layer, behind its quantised predecessors, and print a table; write nothing
    #[arg(long = "try", conflicts_with_all = ["out", "propose"], requires = "calibration")]
    try_recipes: bool,
    /// The decoder layer for --try; the first is 0
    #[arg(long, default_value_t = 0, value_name = "N", requires = "try_recipes")]
    layer: usize,
    /// Only this module of the layer for --try, such as down_proj
    #[arg(long, value_name = "NAME", requires = "try_recipes")]
    module: Option<String>,
    /// Write rules for --dynamic into this file under which layers take --budget bits a weight, chosen by what each layer's
    /// quantisation does to the model's predictions, and what was measured beside it; quantise nothing
    #[arg(long, value_name = "FILE", conflicts_with = "out", requires_all = ["calibration", "budget"])]
    propose: Option<PathBuf>,
    /// Bits a weight for --propose, with scales, zero points and g_idx
    #[arg(long, value_name = "BITS", requires = "propose")]
    budget: Option<f64>,
    /// Let --propose choose for q, k and v, and for gate and up, apart: better, but engines that run them as one layer may
    /// refuse the result
    #[arg(long, requires = "propose")]
    apart: bool,
    /// Calibration rows, the last ones, that --try and --propose measure on [default: an eighth]
    #[arg(long, value_name = "N")]
    held_out: Option<usize>,
    /// A set of options chosen by measurement, in place of those above but --bits and --group-size
    #[arg(long, value_enum, conflicts_with_all = ["desc_act", "static_groups", "act_group_aware", "asym", "mse", "gptaq", "damp"])]
    recipe: Option<Recipe>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Method {
    Gptq,
    Rtn,
}

#[derive(Clone, Copy, ValueEnum)]
enum Recipe {
    /// The lowest perplexity: --asym --desc-act --mse 2.4 --gptaq 0.5
    Best,
}

fn main() -> ExitCode {
    run(|args: Args| args.device.run(&args))
}

impl Job for Args {
    // Half precision is twice as fast, and its codes are others than the CPU's: benches/RESULTS-quantize.md.
    const ACTIVATIONS: Activations = Activations::Fp32;

    fn run<D: QuantizeBackend>(&self, device: D, _: &Machine) -> Result<(), Failure> {
        write_quantized(self, &device)
    }
}

fn options(args: &Args) -> Result<QuantizeOptions, Failure> {
    let group_size = match args.group_size {
        -1 => None,
        size => {
            Some(usize::try_from(size).map_err(|_| format!("--group-size {size}: must be positive, or -1"))?)
        }
    };
    let builder = GptqConfig::builder().bits(args.bits).group_size(group_size);
    let options = match args.recipe {
        Some(Recipe::Best) => QuantizeOptions::best(args.bits, group_size)?,
        None => QuantizeOptions::new(
            builder
                .sym(!args.asym)
                .desc_act(args.desc_act)
                .static_groups(args.static_groups)
                .act_group_aware(args.act_group_aware)
                .mse(args.mse)
                .gptaq(args.gptaq)
                .damp_percent(args.damp)
                .build()?,
        ),
    };
    let rules = match &args.dynamic {
        Some(file) => rules(file).map_err(|error| format!("{}: {error}", file.display()))?,
        None => DynamicRules::default(),
    };
    let bytes = |mebibytes: usize| mebibytes.saturating_mul(1 << 20);
    Ok(options
        .with_dynamic(rules)
        .with_lm_head(args.lm_head)
        .with_activation_bytes(bytes(args.memory_budget))
        .with_device_activation_bytes(args.device_budget.map(bytes)))
}

fn rules(file: &Path) -> Result<DynamicRules, Failure> {
    Ok(DynamicRules::from_json(&fs::read_to_string(file)?)?)
}

fn write_quantized<D: QuantizeBackend>(args: &Args, device: &D) -> Result<(), Failure> {
    let options = options(args)?;
    let config = LlamaConfig::read(&args.model)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let rows = match (args.method, &args.calibration) {
        (Method::Rtn, _) => None,
        (Method::Gptq, None) => return Err("--calibration FILE is needed for --method gptq".into()),
        (Method::Gptq, Some(file)) => {
            let source = RowSource {
                file,
                key: "calibration",
                model: &args.model,
                rows: args.rows,
                seq_len: args.seq_len,
                drop_short: true,
            };
            Some(source.read(&config)?)
        }
    };
    let merged = match &args.lora {
        Some(adapter) => Some(LoraWeights::open(adapter, &checkpoint, &config)?),
        None => None,
    };
    let weights: &dyn WeightSource = match &merged {
        Some(merged) => merged,
        None => &checkpoint,
    };
    if let Some(rows) = rows.as_ref().filter(|_| args.try_recipes || args.propose.is_some()) {
        return tune(args, &config, weights, rows, &options);
    }
    let out = args.out.as_deref().ok_or("--out DIR is needed")?;
    let existing = match (args.resume, args.overwrite) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Overwrite,
        _ => Existing::Refuse,
    };
    let bar = progress::quantization_bar("quantising");
    let mut watch = Watch::default().on_progress(|progress| progress::show(&bar, progress));
    let mut job = QuantizeJob::new(&config, &checkpoint, device, options).existing(existing);
    if let Some(merged) = &merged {
        job = job.weights(merged);
    }
    if let Some(rows) = &rows {
        job = job.calibration(rows);
    }
    let outcome = job.run(out, &mut watch).map_err(|error| hint(&error, out))?;
    bar.finish_and_clear();
    let Some(written) = outcome.written else {
        println!("{} holds the result of this very run already", out.display());
        return Ok(());
    };
    let report = outcome.report;
    if outcome.resumed > 0 {
        println!("{} layers were finished before", outcome.resumed);
    }
    if let Some(file) = &args.plot {
        fs::write(file, plot::losses(&report)).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    if let Some(rows) = &rows {
        println!("calibration: {} rows, {} tokens", rows.rows().len(), rows.tokens());
    }
    if let Some(merged) = &merged {
        println!("adapter merged: {} tensors changed", merged.changed().len());
    }
    if !report.skipped.is_empty() {
        println!("left as they are: {} layers", report.skipped.len());
    }
    println!(
        "{} layers quantised in {:.1} s, {:.2} MB written to {}",
        report.layers.len(),
        report.elapsed.as_secs_f64(),
        written.tensor_bytes as f64 / 1e6,
        out.display()
    );
    if !report.moved.is_empty() {
        let (times, rows) = (report.moved.len(), report.moved.iter().map(|event| event.moved).sum::<usize>());
        println!("the GPU was out of memory {times} times: activations of {rows} rows went to the host");
    }
    if args.times {
        print_times(&report);
    }
    Ok(())
}

/// Seconds of each phase, and the most memory.
fn print_times(report: &QuantizeReport) {
    for (phase, time) in report.times.parts() {
        println!("{phase:>10} {:8.2} s", time.as_secs_f64());
    }
    let gigabytes = |bytes: Option<u64>| {
        bytes.map_or_else(|| "unknown".to_owned(), |b| format!("{:.2} GB", b as f64 / 1e9))
    };
    println!("memory of the host: {}", gigabytes(report.peak_memory));
    if let Some(device) = &report.device {
        println!("memory of the GPU: {} ({device})", gigabytes(report.device_memory));
    }
}

/// Prints what helps to choose options, and quantises nothing. Calculates on the CPU.
fn tune(
    args: &Args,
    config: &LlamaConfig,
    weights: &dyn WeightSource,
    rows: &TokenRows,
    options: &QuantizeOptions,
) -> Result<(), Failure> {
    let lines = match (&args.propose, args.budget) {
        (Some(file), Some(budget)) => {
            tune::propose(config, weights, rows, args.held_out, options, (budget, args.apart), file)?
        }
        _ => {
            let module = args.module.as_deref().map(module).transpose()?;
            tune::try_recipes(config, weights, rows, args.held_out, options, (args.layer, module))?
        }
    };
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn module(name: &str) -> Result<Module, Failure> {
    let short = |module: &Module| module.name().rsplit('.').next() == Some(name) || module.name() == name;
    Ok(Module::ALL
        .into_iter()
        .find(short)
        .ok_or_else(|| format!("--module {name}: no decoder layer has it"))?)
}

/// Says which option helps.
fn hint(error: &LlamaError, out: &Path) -> Failure {
    let hint = match error {
        LlamaError::Output(OutputError::Exists { .. }) => " (--overwrite)",
        LlamaError::Output(OutputError::Unfinished { .. }) => " (--resume or --overwrite)",
        LlamaError::Output(OutputError::Different { .. } | OutputError::NothingToResume { .. }) => {
            " (--overwrite starts again)"
        }
        _ if QuantizeJob::<Cpu>::is_resumable(out) => " (finished layers are kept: run again with --resume)",
        _ => "",
    };
    format!("{error}{hint}").into()
}
