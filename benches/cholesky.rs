//! From H to the upper triangular U with `H^-1 = U^T U`: the default factorisation, and LAPACK's beside it.
//!
//! `cargo bench -p gptq-benches --bench cholesky`; with `--features lapack-openblas-system` LAPACK is compared. Threads by
//! `RAYON_NUM_THREADS`, and `OPENBLAS_NUM_THREADS` for LAPACK.

#![allow(missing_docs, reason = "criterion_group! makes public functions without")]

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gptq_core::{BlockedCholesky, Factorize};
use ndarray::Array2;

/// A well-conditioned Hessian-like matrix.
fn damped(n: usize) -> Array2<f64> {
    let mut matrix = Array2::from_shape_fn((n, n), |(i, j)| {
        let (i, j) = (i.min(j) as f64, i.max(j) as f64);
        (i * 0.37 + j * 0.11).sin() * (j * 0.37 + i * 0.11).sin() / n as f64
    });
    matrix.diag_mut().iter_mut().enumerate().for_each(|(i, d)| *d = 2.0 + (i as f64).cos());
    matrix
}

fn cholesky(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("inverse_cholesky");
    group.sample_size(10);
    let factorizers: &[(&str, &dyn Factorize)] = &[
        ("blocked", &BlockedCholesky),
        #[cfg(feature = "lapack-openblas-system")]
        ("lapack", &gptq_core::Lapack),
    ];
    for n in [1024, 4096] {
        let matrix = damped(n);
        // Factorisation and triangular inverse, n^3 / 3 operations each.
        group.throughput(Throughput::Elements((2 * n * n * n / 3) as u64));
        for (name, factorizer) in factorizers {
            group.bench_function(BenchmarkId::new(*name, n), |bencher| {
                bencher.iter_batched(
                    || matrix.clone(),
                    |matrix| factorizer.inverse_cholesky(matrix).expect("positive definite"),
                    BatchSize::PerIteration,
                );
            });
        }
    }
    group.finish();
}

criterion_group!(benches, cholesky);
criterion_main!(benches);
