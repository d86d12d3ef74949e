//! Accumulating a Hessian: one triangle of `X^T X`.
//!
//! `cargo bench -p gptq-benches --bench hessian`; threads by `RAYON_NUM_THREADS`.

#![allow(missing_docs, reason = "criterion_group! makes public functions without")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gptq_core::HessianAccumulator;
use ndarray::Array2;

fn hessian(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hessian");
    group.sample_size(10);
    for (features, tokens) in [(1024, 4096), (4096, 8192)] {
        let inputs = Array2::from_shape_fn((tokens, features), |(t, i)| {
            ((t * 7919 + i * 104_729) % 1009) as f32 / 1009.0 - 0.5
        });
        // Multiply-adds of the lower triangle, two operations each.
        group.throughput(Throughput::Elements((features * (features + 1) * tokens) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{features}x{tokens}")), |bencher| {
            bencher.iter(|| {
                let mut accumulator = HessianAccumulator::new(features);
                accumulator.add_batch(inputs.view()).expect("finite");
                accumulator.finish().expect("samples")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, hessian);
criterion_main!(benches);
