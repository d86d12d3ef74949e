//! Logits of token ids, for comparison with other software.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use gptq_examples::{
    data::token_rows,
    device::{DeviceArgs, Job, Machine},
    failure::{Failure, run},
};
use gptq_format::TensorFile;
use gptq_kernels::Backend;
use gptq_llama::{Feed, Llama, LoadOptions, Precision, Wanted};
use safetensors::{Dtype, serialize_to_file, tensor::TensorView};

/// Runs token ids through a model and writes the logits: in float32 on the CPU, with its activations on a GPU.
///
/// Reads a tensor `input_ids` of int32 or int64, (n) or (rows, n), every row a sequence of its own; writes a float32 tensor
/// `logits`, (n, vocabulary) or (rows, n, vocabulary).
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Model folder: config.json and safetensors, quantised or not
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// .safetensors file with `input_ids`
    #[arg(long, value_name = "FILE")]
    ids: PathBuf,
    /// .safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Kernel of quantised layers, by name [default: the fastest that computes in float32]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
}

fn main() -> ExitCode {
    run(|args: Args| args.device.run(&args))
}

impl Job for Args {
    fn run<D: Backend>(&self, device: D, _: &Machine) -> Result<(), Failure> {
        write_logits(self, device)
    }
}

fn write_logits<D: Backend>(args: &Args, device: D) -> Result<(), Failure> {
    let options = LoadOptions::default().with_precision(Precision::Float32).with_kernel(args.kernel.clone());
    let model = Llama::load(&args.model, device, &options)?;
    let file = TensorFile::open(&args.ids)?;
    let ids = file.tensor("input_ids")?;
    let rows = token_rows(&ids)?;
    let vocabulary = model.config().vocab_size;
    let mut bytes = Vec::with_capacity(rows.tokens() * vocabulary * 4);
    let mut cache = model.cache(rows.longest())?;
    for tokens in rows.rows() {
        let sequence = cache.add();
        let feed = Feed { sequence, tokens, logits: Wanted::All };
        let logits = model.forward(&mut cache, &[feed])?.to_array()?;
        bytes.extend(logits.iter().flat_map(|logit| logit.to_le_bytes()));
        cache.remove(sequence)?;
    }
    let mut shape = ids.shape().to_vec();
    shape.push(vocabulary);
    let view = TensorView::new(Dtype::F32, shape.clone(), &bytes)?;
    serialize_to_file([("logits", view)], None, &args.out)
        .map_err(|error| format!("{}: {error}", args.out.display()))?;
    println!("logits {shape:?} written to {}", args.out.display());
    Ok(())
}
