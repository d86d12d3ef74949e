//! The whole job on the bundled model: quantise, save, reload, compare.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::Parser;
use gptq_core::GptqConfig;
use gptq_examples::{
    data::RowSource,
    failure::{Failure, run},
    progress, table,
    text::TextCodec,
};
use gptq_format::{Checkpoint, PackedLinear};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{
    GenerateOptions, Generator, Layer, Llama, LlamaConfig, LoadOptions, ModelWriter, Module, Precision,
    QuantizeMethod, QuantizeOptions, Sampling, TokenRows, Watch, perplexity, quantize, round_to_nearest,
};

/// Quantises the bundled model tiny-books (Llama, 4.2 million parameters) to 4 bits in groups of 128 by rounding and by
/// GPTQ, saves and reloads both, and compares them with the original.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Keep the quantised models in this folder [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Evaluation rows of 512 tokens to measure perplexity on, at most 128
    #[arg(long, default_value_t = 128, value_name = "N")]
    rows: usize,
    /// Text to continue
    #[arg(long, default_value = "The old man looked at the sea", value_name = "TEXT")]
    prompt: String,
}

/// Tokens of each text sample.
const SAMPLE: usize = 48;

fn main() -> ExitCode {
    run(|args: Args| compare(&args))
}

fn compare(args: &Args) -> Result<(), Failure> {
    let start = Instant::now();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny-books");
    let config = LlamaConfig::read(&source)?;
    let ids = source.join("ids.safetensors");
    let rows = |key, rows| {
        RowSource { file: &ids, key, model: &source, rows, seq_len: None, drop_short: false }.read(&config)
    };
    let (calibration, evaluation) = (rows("calibration", None)?, rows("evaluation", Some(args.rows))?);

    let temporary = tempfile::tempdir()?;
    let out = args.out.as_deref().unwrap_or(temporary.path());
    let (rtn, gptq) = (out.join("rtn"), out.join("gptq"));
    let options = QuantizeOptions::best(4, Some(128))?;
    println!("quantising {} to 4 bits, groups of 128 ...", source.display());
    write(&source, &rtn, &config, &QuantizeOptions::new(GptqConfig::default()), None)?;
    let seconds = write(&source, &gptq, &config, &options, Some(&calibration))?;
    println!("GPTQ: {} calibration tokens, {seconds:.1} s", calibration.tokens());

    let mut table_rows = Vec::new();
    let mut samples = Vec::new();
    for (name, dir) in [("float32", &source), ("RTN", &rtn), ("GPTQ", &gptq)] {
        let result = measure(name, dir, &evaluation, &args.prompt)?;
        samples.push((name, result.sample));
        table_rows.push(vec![
            name.to_owned(),
            format!("{:.2} MB", result.file_bytes as f64 / 1e6),
            format!("{:.2}", result.bits_per_weight),
            format!("{:.3}", result.perplexity),
            format!("{:.0}", result.tokens_per_second),
        ]);
    }
    println!();
    for line in table::lines(&["model", "on disk", "bits/weight", "perplexity", "tokens/s"], &table_rows) {
        println!("{line}");
    }
    for (name, sample) in samples {
        println!("\n{name}: {} ...", sample.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    println!();
    if args.out.is_some() {
        println!("the quantised models are in {}", out.display());
    }
    println!("{:.1} s in all", start.elapsed().as_secs_f64());
    Ok(())
}

/// Quantises a folder, by GPTQ if there are calibration rows; returns the seconds it took.
fn write(
    source: &Path,
    out: &Path,
    config: &LlamaConfig,
    options: &QuantizeOptions,
    calibration: Option<&TokenRows>,
) -> Result<f64, Failure> {
    let checkpoint = Checkpoint::open(source)?;
    let method = match calibration {
        Some(_) => QuantizeMethod::Gptq,
        None => QuantizeMethod::RoundToNearest,
    };
    let mut writer = ModelWriter::create(out, &checkpoint, config, options, method)?;
    let bar = progress::quantization_bar(method.name());
    let mut watch = Watch::default().on_progress(|progress| progress::show(&bar, progress));
    let mut sink = |layer: Layer, packed: PackedLinear| writer.layer(layer, &packed);
    let report = match calibration {
        Some(rows) => quantize(config, &checkpoint, &Cpu, rows, options, &mut watch, &mut sink)?,
        None => round_to_nearest(config, &checkpoint, options, &mut watch, &mut sink)?,
    };
    bar.finish_and_clear();
    writer.finish(&report)?;
    Ok(report.elapsed.as_secs_f64())
}

struct Measured {
    file_bytes: u64,
    bits_per_weight: f64,
    perplexity: f64,
    tokens_per_second: f64,
    sample: String,
}

fn measure(name: &str, dir: &Path, rows: &TokenRows, prompt: &str) -> Result<Measured, Failure> {
    // Perplexity compares weights, so it is computed in float32; text comes from the fastest kernels.
    let exact = Llama::load(dir, Cpu, &LoadOptions::default().with_precision(Precision::Float32))?;
    let bar = progress::bar(&format!("perplexity, {name}"), rows.rows().len() as u64);
    let result = perplexity(&exact, rows, |done, _| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    drop(exact);

    let model = Llama::load(dir, Cpu, &LoadOptions::default())?;
    let codec = TextCodec::open(dir)?;
    let options = GenerateOptions {
        max_new_tokens: SAMPLE,
        sampling: Sampling { temperature: 0.7, top_p: 0.9, ..Sampling::default() },
        stop_tokens: model.config().eos_token_ids.clone(),
        seed: 1,
    };
    let mut generator = Generator::new(&model, &codec.encode(prompt)?, options)?;
    generator.prefill()?;
    let start = Instant::now();
    while generator.next().transpose()?.is_some() {}
    let seconds = start.elapsed().as_secs_f64();
    let new = generator.text().len();
    let sample = format!("{prompt}{}", codec.decode(generator.text())?);
    Ok(Measured {
        file_bytes: fs::metadata(dir.join("model.safetensors"))?.len(),
        bits_per_weight: bits_per_weight(&Checkpoint::open(dir)?, model.config()),
        perplexity: result.value(),
        tokens_per_second: new as f64 / seconds.max(1e-9),
        sample,
    })
}

/// Bits of all that belongs to the decoder's linear layers, over the number of their weights.
fn bits_per_weight(checkpoint: &Checkpoint, config: &LlamaConfig) -> f64 {
    let linear = |name: &str| Module::ALL.iter().any(|module| name.contains(module.name()));
    let bytes: usize =
        checkpoint.tensors().filter(|tensor| linear(tensor.name())).map(|tensor| tensor.bytes().len()).sum();
    let weights: usize = Module::ALL
        .iter()
        .map(|module| {
            let (inputs, outputs) = module.shape(config);
            inputs * outputs * config.layers
        })
        .sum();
    8.0 * bytes as f64 / weights as f64
}
