//! Which kernel runs a layer, and how fast the others would have been: `select()` against the clock.
//!
//! ```text
//! cargo bench -p gptq-benches --bench kernel_selection [FILTER]                    # kernels of the CPU
//! cargo bench -p gptq-benches --features cuda --bench kernel_selection [FILTER]    # and of the first GPU, if there is one
//! ```
//!
//! A group is a layer and a number of rows; its members are all kernels that support it. What a `Selector` says of them, for
//! calls of that many rows, is printed above each group; its costs are those that ship for this model of machine, or else are
//! measured when the bench begins. Weights of the CPU are small enough to stay in a cache: bench `int4_matmul -- --table`
//! measures from memory. Weights of a GPU rotate over copies that its cache does not hold, in CUDA graphs; bench `cuda_linear`
//! says how exact the results are, too.

// What was selected has to be said somewhere; criterion's macros write undocumented functions.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

mod layer;

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gptq_format::{Bits, PackedLinear};
use gptq_kernels::{
    CostTable, Device, LinearKernel, LinearSpec, MatMut, MatRef, Measurement, Selector, Workload, Workspace,
    cpu,
};
use layer::Layer;

/// What is measured on a device.
struct Plan {
    /// Input features, output features, bits, group size.
    layers: &'static [(usize, usize, Bits, usize)],
    rows: &'static [usize],
    /// Bytes of all copies of a layer.
    rotated_bytes: usize,
}

const CPU: Plan = Plan {
    layers: &[
        (2048, 2048, Bits::B4, 128),
        (2048, 5632, Bits::B4, 128),
        (2048, 2048, Bits::B8, 128),
        (2048, 2048, Bits::B3, 32),
    ],
    rows: &[1, 8, 128],
    rotated_bytes: 0,
};

#[cfg(feature = "cuda")]
const GPU: Plan = Plan {
    layers: &[
        (4096, 4096, Bits::B4, 128),
        (4096, 11008, Bits::B4, 128),
        (4096, 4096, Bits::B8, 128),
        (4096, 4096, Bits::B3, 32),
    ],
    rows: &[1, 8, 16, 64, 256],
    rotated_bytes: 256 << 20,
};

/// The costs that ship, or else those of this machine, now.
fn costs<D: Device>(
    device: &D,
    kernels: &[Box<dyn LinearKernel<D>>],
    specs: &[LinearSpec],
    plan: &Plan,
) -> CostTable {
    if let Some(table) = CostTable::shipped(&device.model()) {
        for name in table.stale(kernels) {
            println!("the costs of {name} that ship are of another version of it");
        }
        return table;
    }
    let mut table = CostTable::new(&device.model());
    let settings = Measurement { rotated_bytes: plan.rotated_bytes, seconds: 0.05 };
    for spec in specs {
        table.measure_with(device, kernels, spec, plan.rows, settings).unwrap();
    }
    table
}

fn bench<D: Device>(
    criterion: &mut Criterion,
    device: &D,
    name: &str,
    kernels: &[Box<dyn LinearKernel<D>>],
    plan: &Plan,
) {
    println!("{name}: {}", device.model());
    let made = plan.layers.iter().map(|&(in_features, out_features, bits, group_size)| {
        Layer { in_features, out_features, bits, group_size, sym: true, act_order: false }.packed()
    });
    let layers: Vec<PackedLinear> = made.collect();
    let specs: Vec<LinearSpec> = layers.iter().map(LinearSpec::of).collect();
    let table = costs(device, kernels, &specs, plan);
    for (packed, spec) in layers.iter().zip(&specs) {
        let (k, n, bits) = (packed.in_features(), packed.out_features(), packed.bits().get());
        let able = kernels.iter().filter(|kernel| {
            // The float64 reference takes seconds and is never selected.
            kernel.supports(spec).is_ok() && kernel.name() != "cpu-reference-f64"
        });
        let prepared: Vec<Vec<_>> = able
            .map(|kernel| {
                let first = kernel.prepare(packed).unwrap();
                let copies = plan.rotated_bytes.div_ceil(first.weight_bytes()).clamp(1, 64);
                let rest = (1..copies).map(|_| kernel.prepare(packed).unwrap());
                std::iter::once(first).chain(rest).collect()
            })
            .collect();
        for &rows in plan.rows {
            let selector = Selector::new().costs(&table).workload(Workload::rows(rows));
            let (_, selection) = selector.select(kernels, spec).unwrap();
            println!("{name}, {k} x {n}, {bits} bits, M = {rows}: {selection}");
            let mut group = criterion.benchmark_group(format!("{name}/{k}x{n}/{bits}bit/M={rows}"));
            group.throughput(Throughput::Elements((k * n * rows) as u64)).sample_size(10);
            group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(500));
            let x_host: Vec<f32> = (0..rows * k).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
            let (mut x, mut y) = (device.alloc(rows * k).unwrap(), device.alloc(rows * n).unwrap());
            device.upload(&x_host, D::slice_mut(&mut x, 0..rows * k)).unwrap();
            for copies in &prepared {
                let mut workspace = Workspace::new(device, copies[0].workspace_len(rows)).unwrap();
                group.bench_function(copies[0].kernel(), |bencher| {
                    bencher.iter_custom(|times| {
                        // A round through all copies, some times.
                        let mut round = || {
                            for copy in copies {
                                let x = MatRef::new(D::slice(&x, 0..rows * k), rows, k)?;
                                let y = MatMut::new(D::slice_mut(&mut y, 0..rows * n), rows, n)?;
                                copy.forward(x, y, &mut workspace)?;
                            }
                            Ok(())
                        };
                        let count = times.div_ceil(copies.len() as u64);
                        let seconds: f64 = device.seconds(&mut round, count as usize).unwrap().iter().sum();
                        Duration::from_secs_f64(seconds * times as f64 / (count * copies.len() as u64) as f64)
                    });
                });
            }
            group.finish();
        }
    }
}

fn cpu_kernels(criterion: &mut Criterion) {
    bench(criterion, &cpu::Cpu, "cpu", &cpu::kernels(), &CPU);
}

#[cfg(feature = "cuda")]
fn gpu_kernels(criterion: &mut Criterion) {
    use gptq_kernels::cuda;
    match cuda::CudaDevice::<half::f16>::new(0) {
        Ok(device) => bench(criterion, &device, "cuda", &cuda::kernels(&device), &GPU),
        Err(reason) => println!("no kernels of a GPU: {reason}"),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu_kernels(_: &mut Criterion) {}

criterion_group!(benches, cpu_kernels, gpu_kernels);
criterion_main!(benches);
