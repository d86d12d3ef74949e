//! Perplexity of a model folder, quantised or not, over rows of tokens.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use gptq_examples::{
    data::RowSource,
    device::{DeviceArgs, Job, KvArgs, Machine},
    failure::{Failure, run},
    progress,
};
use gptq_kernels::{Backend, Workload};
use gptq_llama::{Llama, LlamaConfig, LoadOptions, Precision, TokenRows, perplexity};

/// Measures how well a model predicts a text.
///
/// Perplexity is exp(mean negative log-likelihood) of tokens 1..n of each row, every row beginning at position 0. The last
/// line printed is `perplexity: NUMBER`.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Model folder: config.json and safetensors, quantised or not
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Rows: .safetensors with token ids, .jsonl with a key `text` on each line, or .txt (one long text, cut into windows)
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Name of the token ids in a .safetensors file
    #[arg(long, default_value = "evaluation", value_name = "NAME")]
    key: String,
    /// Rows to use [default: all]
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
    /// Tokens a row [default: ids as they stand; texts by the model's context, at most 2048]
    #[arg(long, value_name = "N")]
    seq_len: Option<usize>,
    /// Arithmetic: float32 measures the weights alone, fast runs the kernels that generation uses
    #[arg(long, value_enum, default_value_t = Arithmetic::Float32)]
    precision: Arithmetic,
    /// Kernel of quantised layers, by name [default: chosen by cost and capability]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Arithmetic {
    Float32,
    Fast,
}

fn main() -> ExitCode {
    run(|args: Args| args.device.run(&args))
}

impl Job for Args {
    fn run<D: Backend>(&self, device: D, _: &Machine) -> Result<(), Failure> {
        measure(self, device)
    }
}

fn measure<D: Backend>(args: &Args, device: D) -> Result<(), Failure> {
    let config = LlamaConfig::read(&args.model)?;
    let source = RowSource {
        file: &args.data,
        key: &args.key,
        model: &args.model,
        rows: args.rows,
        seq_len: args.seq_len,
        drop_short: false,
    };
    let rows = source.read(&config)?;
    // A row of one token predicts nothing.
    let rows = TokenRows::new(rows.rows().iter().filter(|row| row.len() > 1).cloned().collect())?;
    let precision = match args.precision {
        Arithmetic::Float32 => Precision::Float32,
        Arithmetic::Fast => Precision::Fast,
    };
    let options = LoadOptions::default()
        .with_precision(precision)
        .with_kernel(args.kernel.clone())
        .with_workload(Workload::rows(rows.longest()))
        .with_kv(args.kv.into());
    let model = Llama::load(&args.model, device, &options)?;
    let bar = progress::bar("perplexity", rows.rows().len() as u64);
    let result = perplexity(&model, &rows, |done, so_far| {
        bar.set_position(done as u64);
        bar.set_message(format!("{:.4}", so_far.value()));
    })?;
    bar.finish_and_clear();
    println!("rows: {}, predicted tokens: {}", rows.rows().len(), result.tokens);
    println!("perplexity: {:.6}", result.value());
    Ok(())
}
