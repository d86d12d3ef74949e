//! Quantising layers of a 7B model on a GPU, phase by phase: Hessian, factorisation, column loop, packing.
//!
//! `cargo bench -p gptq-benches --features cuda --bench cuda_quantize`. Activations are random halves with features of
//! different sizes; four buffers of 2048 tokens, more than the L2 holds, take turns. Wall-clock time with the device idle
//! before and after; the fastest of three runs and, in parentheses, the slowest.
#![allow(clippy::print_stdout)]

use std::{error::Error, time::Instant};

use gptq_core::{GptqConfig, GptqConfigBuilder};
use gptq_kernels::{
    DenseData, DenseWeight, Device, MatMut, MatRef,
    cuda::{CudaDevice, CudaQuantizer},
    quantize::Quantizer,
};
use half::f16;

type Gpu = CudaDevice<f16>;
type Outcome<T> = Result<T, Box<dyn Error>>;

const TOKENS: usize = 128 * 2048;
const BATCH: usize = 2048;
const RUNS: usize = 3;

/// About normal numbers from a linear congruential generator.
fn normal(len: usize, seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed;
    (0..len).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = (state ^ (state >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let sum: f32 = (0..4).map(|i| ((x >> (16 * i)) & 0xffff) as f32 / 65536.0 - 0.5).sum();
        sum * 3f32.sqrt()
    })
}

/// The fastest and slowest of some runs, in milliseconds, and the last result.
fn time<R>(device: &Gpu, mut work: impl FnMut() -> Outcome<R>) -> Outcome<(f64, f64, R)> {
    let (mut best, mut worst) = (f64::INFINITY, 0.0f64);
    let mut last = None;
    for _ in 0..RUNS {
        drop(last.take());
        device.synchronize()?;
        let started = Instant::now();
        last = Some(work()?);
        device.synchronize()?;
        let elapsed = 1e3 * started.elapsed().as_secs_f64();
        (best, worst) = (best.min(elapsed), worst.max(elapsed));
    }
    Ok((best, worst, last.ok_or("no run")?))
}

fn sums(
    device: &Gpu,
    quantizer: &CudaQuantizer<f16>,
    inputs: &[<Gpu as Device>::Buffer],
    n: usize,
) -> Outcome<<CudaQuantizer<f16> as Quantizer<Gpu>>::Sums> {
    let mut sums = quantizer.sums(n)?;
    for batch in 0..TOKENS / BATCH {
        let slice = Gpu::slice(&inputs[batch % inputs.len()], 0..BATCH * n);
        quantizer.add_batch(&mut sums, MatRef::new(slice, BATCH, n)?, None)?;
    }
    device.synchronize()?;
    Ok(sums)
}

fn main() -> Outcome<()> {
    let device = match Gpu::new(0) {
        Ok(device) => device,
        Err(reason) => {
            println!("skipped: {reason}");
            return Ok(());
        }
    };
    type Build = fn(GptqConfigBuilder) -> GptqConfigBuilder;
    let recipes: [(&str, Build); 4] = [
        ("g128", |c| c),
        ("desc_act", |c| c.desc_act(true)),
        ("mse", |c| c.mse(Some(2.4))),
        ("best without GPTAQ", |c| c.desc_act(true).mse(Some(2.4)).sym(false)),
    ];
    println!("| phase | shape | ms (slowest) | TFLOP/s |\n|---|---|---|---|");
    // Counts of a layer of 7B shape: (in, out, weights of that shape), Hessians.
    for (n, hessians, weights) in [(4096, 3, vec![(4096, 4), (11008, 2)]), (11008, 1, vec![(4096, 1)])] {
        let inputs: Vec<_> = (0..4)
            .map(|seed| -> Outcome<_> {
                let sizes: Vec<f32> = normal(n, 99).map(f32::exp).collect();
                let values: Vec<f32> =
                    normal(BATCH * n, seed + 1).enumerate().map(|(i, x)| x * sizes[i % n]).collect();
                let mut buffer = device.alloc(values.len())?;
                device.upload(&values, Gpu::slice_mut(&mut buffer, 0..values.len()))?;
                Ok(buffer)
            })
            .collect::<Outcome<_>>()?;
        let flops = |ms: f64, count: f64| count / ms / 1e9;
        let cube = (n as f64).powi(3);
        for (name, build) in recipes {
            let quantizer = CudaQuantizer::new(&device, build(GptqConfig::builder()).build()?)?;
            if name == "g128" {
                let (best, worst, _) = time(&device, || sums(&device, &quantizer, &inputs, n))?;
                let rate = flops(best, TOKENS as f64 * (n * n) as f64);
                println!(
                    "| Hessian, {hessians} a layer | {n} x {TOKENS} | {best:.2} ({worst:.2}) | {rate:.0} of n^2 tokens |"
                );
            }
            let started = sums(&device, &quantizer, &inputs, n)?;
            let now = Instant::now();
            let first = quantizer.prepare(started)?;
            let cold = 1e3 * now.elapsed().as_secs_f64();
            drop(first);
            let mut ready: Vec<_> =
                (0..RUNS).map(|_| sums(&device, &quantizer, &inputs, n)).collect::<Outcome<_>>()?;
            let (best, worst, prepared) =
                time(&device, || Ok(quantizer.prepare(ready.pop().ok_or("no sums")?)?))?;
            let rate = flops(best, 2.0 / 3.0 * cube);
            println!(
                "| prepare, {name} | {n} | {best:.2} ({worst:.2}; first {cold:.2}) | {rate:.1} of 2/3 n^3 |"
            );
            for &(out, count) in &weights {
                let data: Vec<f16> = normal(out * n, 5).map(|x| f16::from_f32(0.02 * x)).collect();
                let weight = DenseWeight {
                    in_features: n,
                    out_features: out,
                    data: DenseData::F16(&data),
                    bias: None,
                };
                let (best, worst, quantized) = time(&device, || Ok(quantizer.quantize(&prepared, &weight)?))?;
                let rate = flops(best, out as f64 * (n * n) as f64);
                let loss = quantizer.report(&quantized).loss;
                println!(
                    "| solve, {name}, {count} a layer | {n} x {out} | {best:.2} ({worst:.2}) | {rate:.1} | loss {loss:?}"
                );
                if name == "g128" {
                    let (best, worst, _) = time(&device, || Ok(quantizer.pack(&quantized, None)?))?;
                    println!("| pack | {n} x {out} | {best:.2} ({worst:.2}) | |");
                    let mut y = device.alloc(out * n)?;
                    let (best, worst, ()) = time(&device, || {
                        let y = MatMut::new(Gpu::slice_mut(&mut y, 0..out * n), out, n)?;
                        Ok(quantizer.dequantize(&quantized, y)?)
                    })?;
                    println!("| dequantise | {n} x {out} | {best:.2} ({worst:.2}) | |");
                    let mut y = device.alloc(out * n)?;
                    let floats: Vec<f32> = data.iter().map(|x| x.to_f32()).collect();
                    let slice = Gpu::slice_mut(&mut y, 0..out * n);
                    let now = Instant::now();
                    device.upload(&floats, slice)?;
                    println!("(upload through f32 {:.2} ms)", 1e3 * now.elapsed().as_secs_f64());
                }
            }
        }
    }
    Ok(())
}
