//! Functions of one row: sums, norms, activations.

use super::isa::{MulAdd, multiversion};

/// Partial sums of a reduction: enough to hide the latency of two 16-lane adders. The count is part of the result's
/// definition, so it does not depend on the instruction set.
const LANES: usize = 32;

/// `exp(x)` to within 2 ulp on `[-87, 88]`; 0 below, `exp(88)` above.
///
/// `x = n ln 2 + r` with `|r| <= ln(2) / 2` and `exp(r)` by its Taylor polynomial of degree 7, whose remainder
/// `r^8 / 8!` is below 6e-9 of the value.
#[inline(always)]
pub(super) fn exp<I: MulAdd>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has 9 trailing zero bits, so that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = I::mul_add(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = I::mul_add(n, -LN2_HIGH, clamped);
    let r = I::mul_add(n, -LN2_LOW, r);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = I::mul_add(p, r, c);
    }
    let scaled = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < -87.0 { 0.0 } else { scaled }
}

#[inline(always)]
fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn sum_of_squares<I: MulAdd>(x: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] = I::mul_add(block[i], block[i], lanes[i]);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(tail) {
        *lane = I::mul_add(v, v, *lane);
    }
    sum_lanes(lanes)
}

#[inline(always)]
fn rms_scale_body<I: MulAdd>(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares::<I>(x) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn rms_norm_body<I: MulAdd>(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let scale = rms_scale_body::<I>(x, eps);
    for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
        *y = (x * scale) * w;
    }
}

#[inline(always)]
fn add_rms_norm_body<I: MulAdd>(
    residual: &mut [f32],
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    y: &mut [f32],
) {
    add_body::<I>(delta, residual);
    rms_norm_body::<I>(residual, weight, eps, y);
}

#[inline(always)]
fn add_body<I: MulAdd>(x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

#[inline(always)]
fn silu_mul_body<I: MulAdd>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
        *y = g / (1.0 + exp::<I>(-g)) * u;
    }
}

/// Replaces scores by `exp(score - max)` and returns their sum; scores are finite or the sum is NaN.
#[inline(always)]
pub(super) fn softmax_numerators<I: MulAdd>(scores: &mut [f32]) -> f32 {
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let (blocks, tail) = scores.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            maxima[i] = if block[i] > maxima[i] { block[i] } else { maxima[i] };
        }
    }
    for (lane, &v) in maxima.iter_mut().zip(tail) {
        *lane = if v > *lane { v } else { *lane };
    }
    let max = maxima.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut lanes = [0.0; LANES];
    let (blocks, tail) = scores.as_chunks_mut::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            block[i] = exp::<I>(block[i] - max);
            lanes[i] += block[i];
        }
    }
    for (lane, v) in lanes.iter_mut().zip(tail) {
        *v = exp::<I>(*v - max);
        *lane += *v;
    }
    sum_lanes(lanes)
}

multiversion! {
    /// What [`rms_norm`] multiplies `x` by, before the weight.
    pub(super) fn rms_scale = rms_scale_body(x: &[f32], eps: f32) -> f32
}
multiversion! {
    /// `y = x / rms(x) * weight`
    pub(super) fn rms_norm = rms_norm_body(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32])
}
multiversion! {
    /// `residual += delta; y = residual / rms(residual) * weight`
    pub(super) fn add_rms_norm = add_rms_norm_body(residual: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, y: &mut [f32])
}
multiversion! {
    /// `y += x`
    pub(super) fn add = add_body(x: &[f32], y: &mut [f32])
}
multiversion! {
    /// `y = silu(gate) * up`
    pub(super) fn silu_mul = silu_mul_body(gate: &[f32], up: &[f32], y: &mut [f32])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::ops::isa::{Fused, Separate};

    fn exp_is_close<I: MulAdd>() {
        let mut x = -90.0f32;
        while x < 88.0 {
            let want = f64::from(x).exp();
            let got = f64::from(exp::<I>(x));
            if x < -87.0 {
                assert_eq!(got, 0.0, "exp({x})");
            } else {
                // r carries an error of half an ulp of x's reduction (|r| <= 0.35, so 2^-26), the Horner steps less
                // than one ulp in all, the polynomial 6e-9: 2 ulp of the result bound their sum.
                assert!((got - want).abs() <= 2.0 * 2f64.powi(-23) * want, "exp({x}) = {got}, not {want}");
            }
            x += 0.003_7;
        }
    }

    #[test]
    fn exp_within_two_ulp() {
        exp_is_close::<Fused>();
        exp_is_close::<Separate>();
        assert_eq!(exp::<Fused>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<Fused>(0.0), 1.0);
        assert!(exp::<Fused>(f32::NAN).is_nan());
        assert!(exp::<Fused>(1e9).is_finite());
    }

    #[test]
    fn silu_of_large_magnitudes() {
        let gate = [-1e30, -100.0, 0.0, 100.0, 1e30];
        let mut y = [0.0; 5];
        silu_mul(&gate, &[1.0; 5], &mut y);
        assert!(y[0].abs() < 1e-7 && y[1].abs() < 1e-30, "{y:?}");
        assert_eq!(&y[2..], &[0.0, 100.0, 1e30]);
    }

    #[test]
    fn rms_norm_matches_float64() {
        let n = 301;
        let x: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.1).collect();
        let w: Vec<f32> = (0..n).map(|i| 0.5 + (i % 7) as f32).collect();
        let mut y = vec![0.0; n];
        rms_norm(&x, &w, 1e-5, &mut y);
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
        let scale = 1.0 / (mean + 1e-5).sqrt();
        for i in 0..n {
            let want = f64::from(x[i]) * scale * f64::from(w[i]);
            // At most n/32 + 6 roundings in the sum, halved by the root, and five more: below 12 * 2^-24 relative.
            assert!((f64::from(y[i]) - want).abs() <= 12.0 * 2f64.powi(-24) * want.abs());
        }
    }

    #[test]
    fn add_rms_norm_equals_add_then_norm() {
        let x: Vec<f32> = (0..77).map(|i| (i as f32).sin()).collect();
        let d: Vec<f32> = (0..77).map(|i| (i as f32).cos()).collect();
        let w = vec![1.5; 77];
        let (mut fused, mut y) = (x.clone(), vec![0.0; 77]);
        add_rms_norm(&mut fused, &d, &w, 1e-6, &mut y);
        let (mut plain, mut z) = (x, vec![0.0; 77]);
        add(&d, &mut plain);
        rms_norm(&plain, &w, 1e-6, &mut z);
        assert_eq!((fused, y), (plain, z));
    }

    #[test]
    fn softmax_of_a_ragged_row() {
        let mut s: Vec<f32> = (0..45).map(|i| (i as f32 * 0.7).sin() * 5.0).collect();
        let max = s.iter().copied().fold(f32::MIN, f32::max);
        let want: f64 = s.iter().map(|&v| f64::from(v - max).exp()).sum();
        let sum = softmax_numerators::<Fused>(&mut s);
        // Each term within 2 ulp (one more for the subtraction of values below 16), the sum of 45 positive terms in
        // lanes adds fewer than 8 roundings.
        assert!((f64::from(sum) - want).abs() <= want * 2f64.powi(-24) * (4.0 + 16.0 + 8.0));
    }
}
