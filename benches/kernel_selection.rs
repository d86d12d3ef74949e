//! Which kernel runs a layer, and how fast the others would have been: `select()` against the clock.
//!
//! ```text
//! cargo bench -p gptq-benches --bench kernel_selection [FILTER]                    # kernels of the CPU
//! cargo bench -p gptq-benches --features cuda --bench kernel_selection [FILTER]    # and of the first GPU, if there is one
//! ```
//!
//! A group is a layer and a number of rows; its members are all kernels that support it, and what `select()` says of them
//! is printed above. Weights are small enough to stay in a cache: bench `int4_matmul -- --table` and bench `cuda_linear`
//! measure from memory.

// What was selected has to be said somewhere; criterion's macros write undocumented functions.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::{Device, LinearKernel, LinearSpec, MatMut, MatRef, Workspace, cpu, select};

/// Input features, output features, bits, group size.
const LAYERS: [(usize, usize, Bits, usize); 4] = [
    (2048, 2048, Bits::B4, 128),
    (2048, 5632, Bits::B4, 128),
    (2048, 2048, Bits::B8, 128),
    (2048, 2048, Bits::B3, 32),
];
const ROWS: [usize; 3] = [1, 8, 128];

fn layer(k: usize, n: usize, bits: Bits, group_size: usize) -> PackedLinear {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8 & bits.max_code()
    };
    let groups = k / group_size;
    let codes: Vec<u8> = (0..k * n).map(|_| random()).collect();
    let zeros = vec![1 << (bits.get() - 1); groups * n];
    let scales = vec![0.01; groups * n];
    let g_idx: Vec<u32> = (0..k).map(|i| (i / group_size) as u32).collect();
    PackedLinear::pack(&CodesRef {
        bits,
        group_size,
        in_features: k,
        out_features: n,
        codes: &codes,
        zeros: &zeros,
        scales: &scales,
        g_idx: &g_idx,
        bias: None,
    })
    .unwrap()
}

fn bench<D: Device>(criterion: &mut Criterion, device: &D, name: &str, kernels: &[Box<dyn LinearKernel<D>>]) {
    for (k, n, bits, group_size) in LAYERS {
        let packed = layer(k, n, bits, group_size);
        let spec = LinearSpec::of(&packed);
        let (_, selection) = select(kernels, &spec, None).unwrap();
        println!("{name}, {k} x {n}, {} bits: {selection}", bits.get());
        for rows in ROWS {
            let mut group = criterion.benchmark_group(format!("{name}/{k}x{n}/{}bit/M={rows}", bits.get()));
            group.throughput(Throughput::Elements((k * n * rows) as u64)).sample_size(10);
            let x_host: Vec<f32> = (0..rows * k).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
            let (mut x, mut y) = (device.alloc(rows * k).unwrap(), device.alloc(rows * n).unwrap());
            device.upload(&x_host, D::slice_mut(&mut x, 0..rows * k)).unwrap();
            for kernel in kernels {
                // The float64 reference takes seconds and is never selected.
                if kernel.supports(&spec).is_err() || kernel.name() == "cpu-reference-f64" {
                    continue;
                }
                let prepared = kernel.prepare(&packed).unwrap();
                let mut workspace = Workspace::new(device, prepared.workspace_len(rows)).unwrap();
                group.bench_function(kernel.name(), |bencher| {
                    bencher.iter(|| {
                        let x = MatRef::new(D::slice(&x, 0..rows * k), rows, k).unwrap();
                        let y = MatMut::new(D::slice_mut(&mut y, 0..rows * n), rows, n).unwrap();
                        prepared.forward(x, y, &mut workspace).unwrap();
                        device.synchronize().unwrap();
                    });
                });
            }
            group.finish();
        }
    }
}

fn cpu_kernels(criterion: &mut Criterion) {
    bench(criterion, &cpu::Cpu, "cpu", &cpu::kernels());
}

#[cfg(feature = "cuda")]
fn gpu_kernels(criterion: &mut Criterion) {
    use gptq_kernels::cuda;
    match cuda::CudaDevice::<half::f16>::new(0) {
        Ok(device) => bench(criterion, &device, "cuda", &cuda::kernels(&device)),
        Err(reason) => println!("no kernels of a GPU: {reason}"),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu_kernels(_: &mut Criterion) {}

criterion_group!(benches, cpu_kernels, gpu_kernels);
criterion_main!(benches);
