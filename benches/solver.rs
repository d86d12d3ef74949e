//! Quantising a square layer from a ready Hessian, factorisation included.
//!
//! `cargo bench -p gptq-benches --bench solver`; threads by `RAYON_NUM_THREADS`.

#![allow(missing_docs, reason = "criterion_group! makes public functions without")]

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gptq_core::{Gptq, GptqConfig, Hessian, HessianAccumulator, rtn};
use ndarray::Array2;

/// Deterministic values without visible structure, uniform in (-0.5, 0.5).
fn noise(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed;
    Array2::from_shape_simple_fn((rows, columns), || {
        // Knuth's linear congruential generator (MMIX); the high bits are good enough for a timing.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    })
}

fn hessian(features: usize) -> Hessian {
    let mut accumulator = HessianAccumulator::new(features);
    accumulator.add_batch(noise(2 * features, features, 1).view()).expect("finite");
    accumulator.finish().expect("samples")
}

fn solver(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("solver");
    group.sample_size(10);
    let variants = [
        ("g128", GptqConfig::builder()),
        ("g128-desc_act", GptqConfig::builder().desc_act(true)),
        ("g128-asym-mse2.4", GptqConfig::builder().sym(false).mse(Some(2.4))),
    ];
    for features in [1024, 4096] {
        let weight = noise(features, features, 2);
        let hessian = hessian(features);
        group.throughput(Throughput::Elements((features * features) as u64));
        for (name, builder) in &variants {
            let gptq = Gptq::new(builder.clone().build().expect("valid"));
            group.bench_function(BenchmarkId::new(*name, features), |bencher| {
                bencher.iter_batched(
                    || hessian.clone(),
                    |hessian| gptq.quantize(weight.view(), hessian).expect("quantisable"),
                    BatchSize::PerIteration,
                );
            });
        }
        let config = GptqConfig::default();
        group.bench_function(BenchmarkId::new("rtn", features), |bencher| {
            bencher.iter(|| rtn(weight.view(), &config).expect("finite"));
        });
    }
    group.finish();
}

criterion_group!(benches, solver);
criterion_main!(benches);
