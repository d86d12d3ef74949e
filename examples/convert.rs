//! Writes a quantised checkpoint in another layout, or as dense weights.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use gptq_examples::{
    failure::{Failure, run},
    zeros::Zeros,
};
use gptq_format::{
    Checkpoint, CheckpointFormat, CheckpointWriter, Dtype, PackedLinear, Remark, WriteOptions,
};
use half::{bf16, f16};

/// Converts a GPTQ checkpoint to another layout, without loss.
///
/// Codes, zero points and scales stay as they are, bit for bit; what the new layout cannot hold is an error, and the target
/// folder is then as it was. `dense` multiplies the weights out, for tools that do not know GPTQ.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Folder of the quantised model, in any layout
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Folder to write; a checkpoint in it is replaced, and may be the one that is read
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Layout to write
    #[arg(long, value_enum, value_name = "LAYOUT")]
    format: Layout,
    /// Read zero points by this convention instead of deciding by evidence
    #[arg(long, value_enum, value_name = "CONVENTION")]
    zeros: Option<Zeros>,
    /// Element type of dense weights
    #[arg(long, value_enum, default_value_t = Element::F16, value_name = "TYPE")]
    dtype: Element,
    /// Accept scales and biases in float32 or bfloat16 that change when they are rounded to half precision
    #[arg(long)]
    round: bool,
    /// Largest shard, in bytes
    #[arg(long, default_value_t = 4_000_000_000, value_name = "BYTES")]
    max_shard_bytes: u64,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Layout {
    /// Zero points minus one: every tool reads it; cannot hold a zero point of 0
    #[value(name = "gptq")]
    Gptq,
    /// Zero points as they are
    #[value(name = "gptq_v2")]
    GptqV2,
    /// Bit planes, for GPTQModel; sizes in multiples of 32
    #[value(name = "gptq_p")]
    Planar,
    /// Tensor core tiles: 4 bits, symmetric, no act-order, groups of 128 or one
    #[value(name = "marlin")]
    Marlin,
    /// Ordinary weights
    #[value(name = "dense")]
    Dense,
}

#[derive(Clone, Copy, ValueEnum)]
enum Element {
    F16,
    Bf16,
    F32,
}

fn main() -> ExitCode {
    run(|args: Args| convert(&args))
}

fn convert(args: &Args) -> Result<(), Failure> {
    let source = Checkpoint::open_with(&args.from, &Zeros::read_options(args.zeros))?;
    let Some(config) = source.config() else {
        return Err(format!("{} is not quantised: nothing to convert", args.from.display()).into());
    };
    let format = match args.format {
        Layout::Gptq => Some(CheckpointFormat::Gptq),
        Layout::GptqV2 => Some(CheckpointFormat::GptqV2),
        Layout::Planar => Some(CheckpointFormat::Planar),
        Layout::Marlin => Some(CheckpointFormat::Marlin),
        Layout::Dense => None,
    };
    let config = format.map(|format| config.with_checkpoint_format(format));
    let options = WriteOptions::default().max_shard_bytes(args.max_shard_bytes);
    let mut writer = CheckpointWriter::create(&args.to, config.as_ref(), options)?;
    writer.carry_over(&args.from)?;

    let mut layers = 0;
    for tensor in source.tensors() {
        let (prefix, field) = tensor.name().rsplit_once('.').unwrap_or((tensor.name(), ""));
        let is_part = matches!(field, "qweight" | "qzeros" | "scales" | "g_idx" | "bias" | "B" | "s");
        if !is_part || !source.is_quantized(prefix) {
            writer.tensor(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes())?;
        } else if matches!(field, "qweight" | "B") {
            // The codes stand for the whole layer: its other tensors go with them.
            layers += 1;
            let linear = read(&source, prefix, args.round)?;
            match format {
                Some(_) => writer.linear(prefix, &linear)?,
                None => write_dense(&mut writer, prefix, &linear, args.dtype)?,
            }
        }
    }
    let summary = writer.finish()?;
    let files = summary.weights.len();
    for key in &summary.left_out {
        println!("note: `{key}` of the config held calibration data, which was left out");
    }
    println!("{layers} layers, {} tensors, {} bytes in {files} files", summary.tensors, summary.tensor_bytes);
    Ok(())
}

fn read(source: &Checkpoint, prefix: &str, round: bool) -> Result<PackedLinear, Failure> {
    let (linear, remarks) = source.linear_with_remarks(prefix)?;
    for remark in remarks {
        if matches!(remark, Remark::Rounded { changed: 1.., .. }) && !round {
            return Err(format!("layer `{prefix}`: {remark}; --round accepts that").into());
        }
    }
    Ok(linear)
}

/// `weight`, and `bias` if there is one, as `torch.nn.Linear` has them.
fn write_dense(
    writer: &mut CheckpointWriter,
    prefix: &str,
    linear: &PackedLinear,
    element: Element,
) -> Result<(), Failure> {
    let weight_shape = [linear.out_features(), linear.in_features()];
    let bias: Option<Vec<f32>> = linear.bias().map(|bias| bias.iter().map(|x| x.to_f32()).collect());
    let tensors =
        [("weight", Some(linear.dequantize()), &weight_shape[..]), ("bias", bias, &weight_shape[..1])];
    for (field, values, shape) in tensors {
        let Some(values) = values else { continue };
        let name = format!("{prefix}.{field}");
        let (dtype, bytes) = encode(&values, element);
        if matches!(element, Element::F16)
            && let Some(value) = values.iter().find(|value| !f16::from_f32(**value).is_finite())
        {
            return Err(format!("`{name}` has the value {value}, too large for f16; use --dtype bf16").into());
        }
        writer.tensor(&name, dtype, shape, &bytes)?;
    }
    Ok(())
}

/// Little-endian elements.
fn encode(values: &[f32], element: Element) -> (Dtype, Vec<u8>) {
    match element {
        Element::F32 => (Dtype::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        Element::F16 => {
            (Dtype::F16, values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect())
        }
        Element::Bf16 => {
            (Dtype::BF16, values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect())
        }
    }
}
