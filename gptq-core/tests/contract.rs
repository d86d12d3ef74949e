//! What callers may rely on: typed errors with their data, reports, GPTAQ, merging, threads.

use gptq_core::{
    BlockedCholesky, ConfigError, Factorize, Gptq, GptqConfig, GptqError, Hessian, HessianAccumulator,
    Method, NotPositiveDefinite, OnFailure, SampleUnit, rtn,
};
use ndarray::{Array2, array, s};

fn noise(rows: usize, columns: usize, mut state: u64) -> Array2<f32> {
    Array2::from_shape_simple_fn((rows, columns), || {
        // Knuth's linear congruential generator (MMIX).
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    })
}

fn hessian(inputs: &Array2<f32>) -> Hessian {
    let mut accumulator = HessianAccumulator::new(inputs.ncols());
    accumulator.add_batch(inputs.view()).expect("finite");
    accumulator.finish().expect("samples")
}

#[test]
fn bad_inputs_are_named_and_not_added() {
    let mut accumulator = HessianAccumulator::new(3);
    let mut inputs = noise(5, 3, 1);
    inputs[[4, 1]] = f32::NEG_INFINITY;
    let error = accumulator.add_batch(inputs.view()).expect_err("infinite");
    assert!(matches!(error, GptqError::NonFiniteInput { what: "inputs", row: 4, column: 1, .. }), "{error}");
    let error = accumulator.add_batch(noise(5, 4, 1).view()).expect_err("shape");
    assert_eq!(error, GptqError::Features { what: "inputs", expected: 3, found: 4 });
    let error = accumulator.add_batch_with_reference(noise(5, 3, 1).view(), noise(5, 3, 2).view());
    assert_eq!(error, Err(GptqError::UnexpectedReference));
    assert_eq!(accumulator.tokens(), 0);
    accumulator.add_batch(noise(0, 3, 1).view()).expect("nothing is fine");
    assert_eq!(accumulator.finish(), Err(GptqError::NoSamples));

    let mut accumulator = HessianAccumulator::with_reference(3);
    assert_eq!(accumulator.add_batch(noise(5, 3, 1).view()), Err(GptqError::MissingReference));
    let error = accumulator.add_batch_with_reference(noise(5, 3, 1).view(), noise(6, 3, 1).view());
    assert_eq!(error, Err(GptqError::ReferenceTokens { expected: 5, found: 6 }));
    let error =
        accumulator.add_batch_with_reference(noise(5, 3, 1).view(), inputs.view()).expect_err("infinite");
    assert!(matches!(error, GptqError::NonFiniteInput { what: "reference inputs", row: 4, column: 1, .. }));
    assert_eq!(accumulator.merge(HessianAccumulator::new(3)), Err(GptqError::MissingReference));
}

#[test]
fn inputs_that_overflow_when_squared_are_told() {
    let mut accumulator = HessianAccumulator::new(2);
    accumulator.add_batch(array![[1.0, 3e19]].view()).expect("finite");
    let error = accumulator.finish().expect_err("overflow");
    assert!(matches!(error, GptqError::NonFiniteHessian { row: 1, column: 1, .. }), "{error}");
}

#[test]
fn bad_weights_are_named() {
    let gptq = Gptq::new(GptqConfig::default());
    let mut weight = noise(4, 16, 1);
    weight[[2, 9]] = f32::NAN;
    let error = gptq.quantize(weight.view(), hessian(&noise(40, 16, 2))).expect_err("NaN");
    assert!(matches!(error, GptqError::NonFiniteWeight { row: 2, column: 9, .. }), "{error}");
    assert!(matches!(
        rtn(weight.view(), gptq.config()),
        Err(GptqError::NonFiniteWeight { row: 2, column: 9, .. })
    ));
    let error = gptq.quantize(noise(4, 15, 1).view(), hessian(&noise(40, 16, 2))).expect_err("shape");
    assert_eq!(error, GptqError::Features { what: "weight", expected: 16, found: 15 });
    let error = gptq.quantize(noise(0, 16, 1).view(), hessian(&noise(40, 16, 2))).expect_err("empty");
    assert_eq!(error, GptqError::EmptyWeight { rows: 0, columns: 16 });
    let mut weight = noise(4, 16, 1);
    weight[[3, 0]] = f32::MAX;
    weight[[3, 1]] = f32::MIN;
    let error = rtn(weight.view(), gptq.config()).expect_err("overflow");
    assert!(matches!(error, GptqError::NonFiniteScale { row: 3, group: 0, .. }), "{error}");
}

#[test]
fn a_hessian_from_elsewhere_is_checked() {
    assert!(matches!(
        Hessian::from_matrix(Array2::zeros((2, 3)), 1),
        Err(GptqError::Features { what: "Hessian", expected: 3, found: 2 })
    ));
    let error = Hessian::from_matrix(array![[1.0, 2.0], [3.0, 4.0]], 1).expect_err("not symmetric");
    assert_eq!(error, GptqError::NotSymmetric { row: 0, column: 1 });
    let error = Hessian::from_matrix(array![[1.0, 0.0], [0.0, -4.0]], 1).expect_err("negative");
    assert_eq!(error, GptqError::NotSymmetric { row: 1, column: 1 });
    let error = Hessian::from_matrix(array![[f64::NAN]], 1).expect_err("NaN");
    assert!(matches!(error, GptqError::NonFiniteHessian { row: 0, column: 0, .. }));
}

/// Eigenvalues 1 + 7 r and 1 - r: positive definite exactly for damping above r - 1.
fn correlated(r: f64) -> Hessian {
    Hessian::from_matrix(Array2::from_shape_fn((8, 8), |(i, j)| if i == j { 1.0 } else { r }), 1)
        .expect("symmetric")
}

#[test]
fn damping_is_raised_as_little_as_needed_and_reported() {
    let config = GptqConfig::builder().damp_percent(0.05).damp_auto_increment(0.01).build().expect("valid");
    let weight = noise(3, 8, 1);
    let report =
        Gptq::new(config.clone()).quantize(weight.view(), correlated(1.205)).expect("quantisable").report;
    let damp = report.damp.expect("GPTQ damps");
    assert_eq!(damp.raised, 16);
    assert!((damp.percent - 0.21).abs() < 1e-12 && damp.floor == 0.0, "{damp:?}");
    let report = Gptq::new(config).quantize(weight.view(), correlated(0.9)).expect("quantisable").report;
    assert_eq!(report.damp.expect("GPTQ damps").raised, 0);
}

#[test]
fn no_damping_is_an_error_or_rtn_if_asked_for() {
    let weight = noise(3, 8, 1);
    let config = GptqConfig::builder().damp_percent(0.05).damp_auto_increment(0.0);
    let gptq = Gptq::new(config.clone().build().expect("valid"));
    let error = gptq.quantize(weight.view(), correlated(1.205)).expect_err("indefinite");
    assert!(matches!(error, GptqError::NotPositiveDefinite { last_damp: 0.05, .. }), "{error}");

    let config = config.on_failure(OnFailure::Rtn).build().expect("valid");
    let fallen_back =
        Gptq::new(config.clone()).quantize(weight.view(), correlated(1.205)).expect("falls back");
    assert!(matches!(fallen_back.report.method, Method::RtnFallback(NotPositiveDefinite { .. })));
    assert_eq!(fallen_back.codes, rtn(weight.view(), &config).expect("finite").codes);
}

#[test]
fn dead_columns_become_zero_and_are_reported() {
    let mut inputs = noise(300, 32, 3);
    for column in [0, 7, 31] {
        inputs.column_mut(column).fill(0.0);
    }
    for desc_act in [false, true] {
        let config = GptqConfig::builder().group_size(Some(8)).desc_act(desc_act).build().expect("valid");
        let quantized =
            Gptq::new(config).quantize(noise(70, 32, 4).view(), hessian(&inputs)).expect("quantisable");
        assert_eq!(quantized.report.dead_columns, [0, 7, 31]);
        let dequantized = quantized.dequantize();
        for column in [0, 7, 31] {
            assert!(dequantized.column(column).iter().all(|&w| w == 0.0));
        }
    }
}

#[test]
fn merging_equals_one_accumulator_up_to_rounding_and_is_reproducible() {
    let inputs = noise(3000, 20, 5);
    let merged = || {
        let mut parts = [0..1300, 1300..1301, 1301..3000].map(|rows| {
            let mut accumulator = HessianAccumulator::new(20);
            accumulator.add_batch(inputs.slice(s![rows, ..])).expect("finite");
            accumulator
        });
        let [first, second, third] = &mut parts;
        first.merge(second.clone()).expect("same kind");
        first.merge(third.clone()).expect("same kind");
        first.clone().finish().expect("samples")
    };
    let (merged, again, whole) = (merged(), merged(), hessian(&inputs));
    assert_eq!(merged, again);
    assert_eq!(merged.samples(), 3000);
    let x = inputs.mapv(f64::from);
    let magnitude = x.mapv(f64::abs);
    // Both sides round as documented, 52 eps, and once to float32 and once in scaling: 54 eps each, eps = 2^-24.
    let bound = magnitude.t().dot(&magnitude) * (2.0 / 3000.0 * 108.0 * 2f64.powi(-24));
    for ((index, m), w) in merged.matrix().indexed_iter().zip(whole.matrix()) {
        assert!((m - w).abs() <= bound[index], "{index:?}: {m} {w}");
    }
}

#[test]
fn the_hessian_is_the_second_moment() {
    for (tokens, features) in [(1, 1), (5, 3), (47, 31), (49, 33), (200, 100), (1200, 45)] {
        let (inputs, reference) = (noise(tokens, features, 6), noise(tokens, features, 7));
        let mut accumulator = HessianAccumulator::with_reference(features);
        accumulator.add_batch_with_reference(inputs.view(), reference.view()).expect("finite");
        let found = accumulator.finish_per(SampleUnit::Batch).expect("samples");
        assert_eq!(found.samples(), 1);
        let x = inputs.mapv(f64::from);
        let d = (&reference - &inputs).mapv(f64::from);
        for (found, (left, right)) in
            [(found.matrix(), (&x, &x)), (found.cross().expect("reference"), (&d, &x))]
        {
            let exact = left.t().dot(right) * 2.0;
            let bound = left.mapv(f64::abs).t().dot(&right.mapv(f64::abs)) * (2.0 * 54.0 * 2f64.powi(-24));
            for ((index, found), exact) in found.indexed_iter().zip(&exact) {
                assert!(
                    (found - exact).abs() <= bound[index],
                    "{tokens}x{features} {index:?}: {found} {exact}"
                );
            }
        }
    }
}

/// GPTAQ restated column by column in float64, without blocks.
fn gptaq_oracle(weight: &Array2<f32>, hessian: &Hessian, config: &GptqConfig, alpha: f64) -> Array2<u8> {
    let columns = weight.ncols();
    let mut damped = hessian.matrix().to_owned();
    let mean = damped.diag().mean().expect("not empty");
    damped.diag_mut().mapv_inplace(|d| d + config.damp_percent() * mean);
    let u = BlockedCholesky.inverse_cholesky(damped).expect("positive definite");
    let mut product = hessian.cross().expect("reference").dot(&u.t());
    product.indexed_iter_mut().for_each(|((i, j), x)| *x = if j > i { alpha * *x } else { 0.0 });
    let p = product.dot(&u);
    // One group: the grid is round-to-nearest's.
    let grid = rtn(weight.view(), config).expect("finite");
    let max_code = f64::from(config.max_code());
    let mut codes = Array2::zeros(weight.raw_dim());
    for (row, values) in weight.outer_iter().enumerate() {
        let (scale, zero) = (f64::from(grid.scales[[row, 0]]), f64::from(grid.zeros[[row, 0]]));
        let mut w = values.mapv(f64::from);
        for column in 0..columns {
            let value = w[column];
            let code = ((value / scale).round_ties_even() + zero).clamp(0.0, max_code);
            codes[[row, column]] = code as u8;
            let error = (value - scale * (code - zero)) / u[[column, column]];
            for later in column + 1..columns {
                w[later] -= error * u[[column, later]] - value * p[[column, later]];
            }
        }
    }
    codes
}

#[test]
fn gptaq_corrects_for_what_the_inputs_lost() {
    let (weight, inputs) = (noise(50, 48, 8), noise(400, 48, 9));
    let reference = &inputs + &(noise(400, 48, 10) * 0.3);
    let mut accumulator = HessianAccumulator::with_reference(48);
    accumulator.add_batch_with_reference(inputs.view(), reference.view()).expect("finite");
    let hessian = accumulator.finish().expect("samples");
    for block_size in [48, 128] {
        let config = GptqConfig::builder()
            .group_size(None)
            .block_size(block_size)
            .gptaq(Some(0.25))
            .build()
            .expect("valid");
        let quantized =
            Gptq::new(config.clone()).quantize(weight.view(), hessian.clone()).expect("quantisable");
        assert_eq!(quantized.report.method, Method::Gptaq);
        assert_eq!(quantized.codes, gptaq_oracle(&weight, &hessian, &config, 0.25));
        let plain = GptqConfig::builder().group_size(None).build().expect("valid");
        let plain = Gptq::new(plain).quantize(weight.view(), hessian.clone()).expect("quantisable");
        assert_ne!(quantized.codes, plain.codes, "the correction must do something");
    }
    let without = Gptq::new(GptqConfig::builder().gptaq(Some(0.25)).build().expect("valid"));
    let error = without.quantize(weight.view(), self::hessian(&inputs)).expect_err("no reference");
    assert_eq!(error, GptqError::MissingReference);
}

#[test]
fn a_prepared_hessian_serves_many_weights() {
    let inputs = noise(500, 40, 11);
    let gptq =
        Gptq::new(GptqConfig::builder().group_size(Some(16)).act_group_aware(true).build().expect("valid"));
    let prepared = gptq.prepare(hessian(&inputs)).expect("positive definite");
    for seed in 12..15 {
        let weight = noise(70, 40, seed);
        let alone = gptq.quantize(weight.view(), hessian(&inputs)).expect("quantisable");
        let shared = prepared.quantize(weight.view()).expect("quantisable");
        assert_eq!(alone.codes, shared.codes);
        assert_eq!(alone.scales, shared.scales);
        // Rows are independent: any subset gives the same.
        let some = prepared.quantize(weight.slice(s![33..50, ..])).expect("quantisable");
        assert_eq!(some.codes, shared.codes.slice(s![33..50, ..]));
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (weight, inputs) = (noise(150, 200, 16), noise(1500, 200, 17));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| {
            let hessian = hessian(&inputs);
            let gptq =
                Gptq::new(GptqConfig::builder().group_size(Some(64)).desc_act(true).build().expect("valid"));
            let quantized = gptq.quantize(weight.view(), hessian.clone()).expect("quantisable");
            (hessian, quantized.codes, quantized.scales, quantized.report.loss)
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn errors_tell_what_they_know() {
    let error = GptqError::from(ConfigError::GroupSize { group_size: 12 });
    assert_eq!(
        error.to_string(),
        "group_size must be a positive multiple of 8 (or None for one group), not 12"
    );
}
