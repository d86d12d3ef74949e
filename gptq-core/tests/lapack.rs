//! LAPACK behind the same trait gives the same codes. Needs a LAPACK to link: feature `lapack-openblas-system`.
#![cfg(feature = "lapack-openblas-system")]

use gptq_core::{BlockedCholesky, Factorize, Gptq, GptqConfig, HessianAccumulator, Lapack};
use ndarray::Array2;

fn noise(rows: usize, columns: usize, mut state: u64) -> Array2<f32> {
    Array2::from_shape_simple_fn((rows, columns), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    })
}

#[test]
fn both_factorisations_give_the_same_codes() {
    for (seed, desc_act) in [(1, false), (2, true), (3, false)] {
        let (weight, inputs) = (noise(96, 320, seed), noise(700, 320, seed + 100));
        let mut accumulator = HessianAccumulator::new(320);
        accumulator.add_batch(inputs.view()).expect("finite");
        let hessian = accumulator.finish().expect("samples");
        let config = GptqConfig::builder().group_size(Some(64)).desc_act(desc_act).build().expect("valid");
        let ours = Gptq::new(config.clone()).quantize(weight.view(), hessian.clone()).expect("quantisable");
        let theirs =
            Gptq::with_factorizer(config, Lapack).quantize(weight.view(), hessian).expect("quantisable");
        assert_eq!(ours.codes, theirs.codes);
        assert_eq!(ours.g_idx, theirs.g_idx);
        assert_eq!(ours.zeros, theirs.zeros);
    }
}

#[test]
fn both_name_the_same_pivot() {
    let mut matrix = Array2::<f64>::eye(40);
    matrix[[17, 17]] = -1.0;
    let ours = BlockedCholesky.inverse_cholesky(matrix.clone()).expect_err("indefinite");
    let theirs = Lapack.inverse_cholesky(matrix).expect_err("indefinite");
    assert_eq!((ours.index, theirs.index), (17, 17));
}
