//! gptq-core alone: one matrix, some inputs, 4-bit codes, and what they are worth beside round to nearest.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::process::ExitCode;

use clap::Parser;
use gptq_core::{Gptq, GptqConfig, HessianAccumulator, rtn};
use gptq_examples::failure::{Failure, run};
use ndarray::Array2;

/// Quantises a made-up 256 x 512 weight by GPTQ and by round to nearest, and compares the layer's output errors.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Code width: 2, 3, 4 or 8
    #[arg(long, default_value_t = 4)]
    bits: u32,
    /// Columns per group
    #[arg(long, default_value_t = 128)]
    group_size: usize,
}

fn main() -> ExitCode {
    run(|args: Args| quantize(&args))
}

fn quantize(args: &Args) -> Result<(), Failure> {
    let weight = Array2::from_shape_fn((256, 512), |(o, i)| ((o * 31 + i * i * 7) % 97) as f32 / 97.0 - 0.5);
    // Inputs of real layers are correlated: every feature here is a mixture of a few signals.
    let inputs = Array2::from_shape_fn((2048, 512), |(t, i)| {
        (0..8).map(|s| ((t * (s + 3)) as f32 * 0.7).sin() * ((i * (s + 5)) as f32 * 0.3).cos()).sum::<f32>()
    });
    let mut accumulator = HessianAccumulator::new(512);
    for batch in inputs.axis_chunks_iter(ndarray::Axis(0), 256) {
        accumulator.add_batch(batch)?;
    }
    let hessian = accumulator.finish()?;

    let config = GptqConfig::builder().bits(args.bits).group_size(Some(args.group_size)).build()?;
    let gptq = Gptq::new(config.clone()).quantize(weight.view(), hessian.clone())?;
    for (name, quantized) in [("GPTQ", gptq), ("RTN ", rtn(weight.view(), &config)?)] {
        let error = &weight - &quantized.dequantize();
        println!("{name}  squared output error per token: {:.6}", hessian.output_error(error.view())?);
    }
    Ok(())
}
