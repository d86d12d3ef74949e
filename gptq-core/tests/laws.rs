//! Laws that hold for every weight and Hessian.

use gptq_core::{Gptq, GptqConfig, GptqConfigBuilder, Hessian, HessianAccumulator, QuantizedWeight, rtn};
use ndarray::{Array1, Array2, Axis};
use proptest::prelude::*;

/// A weight (out, in) with entries of a few units.
fn weight(columns: usize) -> impl Strategy<Value = Array2<f32>> {
    (1usize..40).prop_flat_map(move |rows| {
        proptest::collection::vec(-4.0f32..4.0, rows * columns)
            .prop_map(move |values| Array2::from_shape_vec((rows, columns), values).expect("shape"))
    })
}

/// The Hessian of correlated inputs, twice as many tokens as features.
fn hessian(columns: usize) -> impl Strategy<Value = Hessian> {
    proptest::collection::vec(-1.0f32..1.0, 2 * columns * columns).prop_map(move |values| {
        let mut inputs = Array2::from_shape_vec((2 * columns, columns), values).expect("shape");
        for column in 1..columns {
            let previous = inputs.column(column - 1).to_owned();
            inputs.column_mut(column).scaled_add(0.7, &previous);
        }
        let mut accumulator = HessianAccumulator::new(columns);
        accumulator.add_batch(inputs.view()).expect("finite");
        accumulator.finish().expect("samples")
    })
}

/// All the settings that shape the column loop.
fn settings() -> impl Strategy<Value = GptqConfigBuilder> {
    let bits = prop_oneof![Just(2u32), Just(3), Just(4), Just(8)];
    let group_size = prop_oneof![Just(None), Just(Some(8usize)), Just(Some(16)), Just(Some(32))];
    let mse = prop_oneof![4 => Just(None), 1 => Just(Some(2.4f32))];
    (bits, group_size, any::<bool>(), any::<bool>(), 0..3, mse, 1usize..40).prop_map(
        |(bits, group_size, sym, static_groups, order, mse, block_size)| {
            GptqConfig::builder()
                .bits(bits)
                .group_size(group_size)
                .sym(sym)
                .static_groups(static_groups)
                .desc_act(order == 1)
                .act_group_aware(order == 2)
                .mse(mse)
                .block_size(block_size)
        },
    )
}

/// The default settings with the order of columns of others.
fn settings_of_factor(config: &GptqConfig) -> GptqConfigBuilder {
    let groups = config.group_size().map(|size| size.get());
    GptqConfig::builder()
        .desc_act(config.desc_act())
        .act_group_aware(config.act_group_aware())
        .group_size(if config.act_group_aware() { groups } else { Some(128) })
}

fn quantize(config: &GptqConfig, weight: &Array2<f32>, hessian: &Hessian) -> QuantizedWeight {
    Gptq::new(config.clone()).quantize(weight.view(), hessian.clone()).expect("quantisable")
}

/// `H` as it is factorised: with `damp` times the mean diagonal on its diagonal.
fn damped(hessian: &Hessian, damp: f64) -> Hessian {
    let mut matrix = hessian.matrix().to_owned();
    let mut diagonal = matrix.diag_mut();
    let mean = diagonal.mean().expect("not empty");
    diagonal += damp * mean;
    Hessian::from_matrix(matrix, 1).expect("symmetric")
}

const COLUMNS: usize = 44; // groups of 8, 16 and 32 all leave a ragged tail

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Without correlations no error can be compensated: whatever the order, the codes are those of round to nearest. Under
    /// desc_act groups must be static, or they are other groups.
    #[test]
    fn a_diagonal_hessian_gives_rtn(
        weight in weight(COLUMNS),
        diagonal in proptest::collection::vec(0.1f64..10.0, COLUMNS),
        settings in settings(),
    ) {
        let desc_act = settings.clone().build().expect("valid").desc_act();
        let settings = if desc_act { settings.static_groups(true) } else { settings };
        let config = settings.build().expect("valid");
        let hessian = Hessian::from_matrix(Array2::from_diag(&Array1::from(diagonal)), 1).expect("diagonal");
        let gptq = quantize(&config, &weight, &hessian);
        let rtn = rtn(weight.view(), &config).expect("finite");
        prop_assert_eq!(gptq.codes, rtn.codes);
        prop_assert_eq!(gptq.scales, rtn.scales);
        prop_assert_eq!(gptq.zeros, rtn.zeros);
        prop_assert_eq!(gptq.g_idx, rtn.g_idx);
    }

    /// A factorisation that other settings may share is the one that they would have made.
    #[test]
    fn shared_factorisations_change_nothing(
        weight in weight(COLUMNS),
        hessian in hessian(COLUMNS),
        settings in settings(),
        other in settings(),
    ) {
        let (config, other) = (settings.build().expect("valid"), other.block_size(16).build().expect("valid"));
        let prepared = Gptq::new(config.clone()).prepare(hessian.clone()).expect("positive definite");
        let own = quantize(&config, &weight, &hessian);
        let again = prepared.for_settings(&config).expect("its own").quantize(weight.view()).expect("quantisable");
        prop_assert_eq!((&own.codes, &own.scales, &own.g_idx), (&again.codes, &again.scales, &again.g_idx));
        let prepared = Gptq::new(
            settings_of_factor(&other).block_size(16).build().expect("valid")
        ).prepare(hessian.clone()).expect("positive definite");
        let shared = prepared.for_settings(&other).expect("the same order and damping");
        let (shared, own) = (shared.quantize(weight.view()).expect("quantisable"), quantize(&other, &weight, &hessian));
        prop_assert_eq!((&own.codes, &own.scales, &own.g_idx), (&shared.codes, &shared.scales, &shared.g_idx));
        let damped = GptqConfig::builder().damp_percent(0.5).block_size(16).build().expect("valid");
        prop_assert!(prepared.for_settings(&damped).is_none());
    }

    /// The reported loss is `tr(D H D^T) / 2`, D the quantisation error and H the damped Hessian.
    #[test]
    fn the_loss_is_the_damped_output_error(
        weight in weight(COLUMNS),
        hessian in hessian(COLUMNS),
        settings in settings(),
    ) {
        let config = settings.build().expect("valid");
        let quantized = quantize(&config, &weight, &hessian);
        let error = &weight - &quantized.dequantize();
        let recomputed = damped(&hessian, config.damp_percent()).output_error(error.view()).expect("same shape");
        let reported = quantized.report.loss.expect("a loss");
        // The loss is |E|^2 / 2 with E = D U^-1 summed in float32: D is off by a rounding of the running weight, below 16 in
        // size here, for each of up to 44 updates, so |dD| <= 44 * 16 * 2^-24 = 4.2e-5 per element; with |d(D H D)| <=
        // 2 |D| |H| |dD| + |dD|^2 |H| and, as the loss itself, |D|^2 <= 2 loss / lambda, the bound follows with the
        // largest and smallest eigenvalue of H bounded by its trace and by its damping.
        let matrix = damped(&hessian, config.damp_percent());
        let trace = matrix.matrix().diag().sum();
        let smallest = config.damp_percent() * hessian.matrix().diag().mean().expect("not empty");
        let elements = (weight.len() as f64).sqrt();
        let error_norm = (2.0 * reported / smallest).sqrt().min(f64::from(error.mapv(|e| e * e).sum()).sqrt() * 1.01 + 1e-3);
        let off = 4.2e-5 * elements;
        let bound = trace * (error_norm * off + off * off);
        prop_assert!((reported - recomputed).abs() <= bound, "{reported} {recomputed} {bound}");
    }

    /// desc_act sorts columns itself, so another order of them coming in changes nothing, as long as the diagonal has no
    /// equal elements and groups are not bound to the incoming order (static_groups).
    #[test]
    fn permuting_columns_commutes_with_desc_act(
        weight in weight(COLUMNS),
        hessian in hessian(COLUMNS),
        settings in settings(),
        permutation in Just((0..COLUMNS).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let config =
            settings.act_group_aware(false).static_groups(false).desc_act(true).build().expect("valid");
        let mut energies = hessian.matrix().diag().to_vec();
        energies.sort_by(f64::total_cmp);
        prop_assume!(energies.windows(2).all(|pair| pair[0] < pair[1]));
        let straight = quantize(&config, &weight, &hessian);
        let matrix = hessian.matrix().select(Axis(0), &permutation).select(Axis(1), &permutation);
        let permuted = Hessian::from_matrix(matrix, hessian.samples()).expect("symmetric");
        // The mean of the diagonal is summed in another order, so damping differs by some 1e-15 of itself: less than what
        // rounding U to float32 notices but in one of 10^8 elements.
        let permuted = quantize(&config, &weight.select(Axis(1), &permutation), &permuted);
        let differing = (0..COLUMNS)
            .filter(|&i| permuted.codes.column(i) != straight.codes.column(permutation[i]))
            .count();
        prop_assert!(differing == 0, "{differing} columns differ");
        for (i, &original) in permutation.iter().enumerate() {
            prop_assert_eq!(permuted.g_idx[i], straight.g_idx[original]);
        }
    }

    /// A power of two scales everything without rounding, so not a bit may change.
    #[test]
    fn scaling_the_hessian_changes_nothing(
        weight in weight(COLUMNS),
        hessian in hessian(COLUMNS),
        settings in settings(),
        exponent in -20i32..20,
    ) {
        let config = settings.build().expect("valid");
        // An even exponent, so that the square roots of the factorisation scale exactly too.
        let scaled = hessian.matrix().mapv(|x| x * 4f64.powi(exponent));
        let scaled = quantize(&config, &weight, &Hessian::from_matrix(scaled, 1).expect("symmetric"));
        let straight = quantize(&config, &weight, &hessian);
        prop_assert_eq!(&scaled.codes, &straight.codes);
        prop_assert_eq!(&scaled.scales, &straight.scales);
        prop_assert_eq!(&scaled.zeros, &straight.zeros);
    }

    /// Round to nearest is off by at most half a step, but for symmetric grids, whose top is one step short of their bottom:
    /// there a value near the top is off by up to a whole step (and by more where no value is negative, the quirk that
    /// halves such a grid).
    #[test]
    fn rtn_stays_within_half_a_step(weight in weight(COLUMNS), settings in settings()) {
        let config = settings.sym(false).mse(None).build().expect("valid");
        let quantized = rtn(weight.view(), &config).expect("finite");
        for ((row, column), &w) in weight.indexed_iter() {
            let group = quantized.g_idx[column] as usize;
            let scale = quantized.scales[[row, group]];
            let zero = f32::from(quantized.zeros[[row, group]]);
            let q = scale * (f32::from(quantized.codes[[row, column]]) - zero);
            // The zero is rounded, so the grid's ends are off by up to half a step, and a weight there by as much: never more,
            // but for the roundings of w / s, s (c - z) and the difference, three times eps |w|, |w| <= 255 s.
            prop_assert!((w - q).abs() <= scale * (0.5 + 255.0 * 3.0 * f32::EPSILON), "{w} {q} {scale}");
        }
    }

    #[test]
    fn a_zero_weight_stays_zero(rows in 1usize..70, hessian in hessian(COLUMNS), settings in settings()) {
        let config = settings.build().expect("valid");
        let weight = Array2::zeros((rows, COLUMNS));
        prop_assert!(quantize(&config, &weight, &hessian).dequantize().iter().all(|&w| w == 0.0));
        prop_assert!(rtn(weight.view(), &config).expect("finite").dequantize().iter().all(|&w| w == 0.0));
    }

    /// How inputs are split into batches does not matter, to the bit.
    #[test]
    fn batches_do_not_matter(
        values in proptest::collection::vec(-3.0f32..3.0, 2500 * 5),
        cuts in proptest::collection::vec(0usize..2500, 0..6),
    ) {
        let inputs = Array2::from_shape_vec((2500, 5), values).expect("shape");
        let mut whole = HessianAccumulator::new(5);
        whole.add_batch(inputs.view()).expect("finite");
        let mut cuts = cuts;
        cuts.sort_unstable();
        let mut parts = HessianAccumulator::new(5);
        let mut start = 0;
        for end in cuts.into_iter().chain([2500]) {
            parts.add_batch(inputs.slice(ndarray::s![start..end, ..])).expect("finite");
            start = end;
        }
        prop_assert_eq!(whole.finish().expect("samples"), parts.finish().expect("samples"));
    }
}
