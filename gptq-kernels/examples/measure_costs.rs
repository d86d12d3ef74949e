//! Measures the kernels of the first GPU and writes what they cost, as `costs/` holds it for the models that this crate
//! knows:
//!
//! ```text
//! cargo run --release -p gptq-kernels --features cuda --example measure_costs -- gptq-kernels/costs/nvidia-h200.txt
//! ```
//!
//! What the file already has is not measured again, unless it is of another version of the kernel; names of kernels after the
//! file measure these alone, again. How calls are timed is said at `Measurement`. It takes about a minute on an H200,
//! and saves after every layer, so that it may be stopped and goes on from there.

// A program for the terminal, which ends with the first error.
#![allow(clippy::print_stdout)]

use std::{error::Error, io::ErrorKind, path::Path, time::Instant};

use gptq_format::Bits;
use gptq_kernels::{
    CostError, CostTable, DenseType, Device, Epilogue, LinearSpec, Measurement, Prologue, WeightFormat,
    cuda::{self, CudaDevice},
};
use half::f16;

const ROWS: [usize; 7] = [1, 4, 8, 16, 64, 256, 2048];

/// For 4 bits in groups of 128: layers of 7B (q, o; gate, up; down), of 70B (o; gate, up), and a small one. What lies between
/// is estimated by its size.
const SHAPES: [(usize, usize); 6] =
    [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672), (8192, 8192), (2048, 2048)];

fn gptq(bits: Bits, group_size: usize, sym: bool, act_order: bool) -> WeightFormat {
    WeightFormat::Gptq { bits, group_size, sym, act_order }
}

fn layers() -> Vec<(usize, usize, WeightFormat)> {
    let [(k, n), others @ ..] = SHAPES;
    let mut layers = vec![
        (k, n, gptq(Bits::B4, 128, true, false)),
        (k, n, gptq(Bits::B4, 128, true, true)),
        (k, n, gptq(Bits::B4, 128, false, false)),
        (k, n, WeightFormat::Dense(DenseType::F16)),
        (4096, 32000, WeightFormat::Dense(DenseType::F16)),
        (k, n, gptq(Bits::B4, 32, true, false)),
        (k, n, gptq(Bits::B8, 128, true, false)),
        (k, n, gptq(Bits::B3, 128, true, false)),
    ];
    layers.extend(others.map(|(k, n)| (k, n, gptq(Bits::B4, 128, true, false))));
    layers.extend([
        (k, n, gptq(Bits::B2, 128, true, false)),
        (k, n, gptq(Bits::B4, k, true, false)),
        (k, n, gptq(Bits::B4, 32, false, true)),
        (k, n, WeightFormat::Dense(DenseType::F32)),
        (4096, 11008, gptq(Bits::B4, 128, true, true)),
    ]);
    layers
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: measure_costs FILE [KERNEL...]")?;
    let names: Vec<String> = args.collect();
    let device = CudaDevice::<f16>::new(0)?;
    let mut kernels = cuda::kernels(&device);
    let model = device.model();
    let mut table = match CostTable::load(Path::new(&path), &model) {
        Err(CostError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => CostTable::new(&model),
        table => table?,
    };
    println!("of other versions: {:?}", table.stale(&kernels));
    if !names.is_empty() {
        names.iter().for_each(|name| table.forget(name));
        kernels.retain(|kernel| names.iter().any(|name| name == kernel.name()));
    }
    // Three times the second-level cache of an H200.
    let settings = Measurement { seconds: 0.02, rotated_bytes: 192 << 20 };
    let start = Instant::now();
    for (in_features, out_features, weight) in layers() {
        let spec = LinearSpec {
            in_features,
            out_features,
            weight,
            bias: false,
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        };
        let added = table.measure_with(&device, &kernels, &spec, &ROWS, settings)?;
        let seconds = start.elapsed().as_secs_f32();
        println!("{in_features} x {out_features}, {weight:?}: {added} times, {seconds:.0} s in all");
        table.save(Path::new(&path))?;
    }
    Ok(())
}
