//! The grid of one group: scale and zero from the group's weights, for 64 rows at a time.
//!
//! Arithmetic is float32 with one rounding per operation, as in the reference implementations, because a scale that
//! differs in its last bit moves codes at rounding ties.

use crate::config::GptqConfig;
use crate::panel::{LANES, Lane};

/// Candidate ranges of the grid search are `1, 0.99, ..., 0.21` of the full one.
const SEARCH_STEPS: u32 = 80;

/// What all grids of a layer have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GridRule {
    max_code: f32,
    sym: bool,
    mse: Option<f32>,
}

impl GridRule {
    pub(crate) fn new(config: &GptqConfig) -> Self {
        Self { max_code: f32::from(config.max_code()), sym: config.sym(), mse: config.mse() }
    }

    /// The code of `w` on a grid: rounded to nearest, ties to even, before the zero is added.
    #[inline(always)]
    pub(crate) fn code(&self, w: f32, scale: f32, zero: f32) -> f32 {
        ((w / scale).round_ties_even() + zero).clamp(0.0, self.max_code)
    }

    /// The zero of the range that starts at `lo`.
    #[inline(always)]
    fn zero(&self, lo: f32, scale: f32) -> f32 {
        if self.sym {
            (self.max_code + 1.0) / 2.0
        } else {
            // Within 0..=max_code by itself but for scales so small that they are rounded as subnormals.
            (-lo / scale).round_ties_even().clamp(0.0, self.max_code)
        }
    }

    /// The scale of a range. One that underflows becomes the smallest normal number, so that no weight is divided by 0.
    #[inline(always)]
    fn scale(&self, lo: f32, hi: f32) -> f32 {
        let scale = (hi - lo) / self.max_code;
        if scale == 0.0 { f32::MIN_POSITIVE } else { scale }
    }
}

/// Scales and zeros of one group for 64 rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) scale: Lane<f32>,
    pub(crate) zero: Lane<f32>,
}

impl Grid {
    pub(crate) const UNSET: Self = Self { scale: Lane([1.0; LANES]), zero: Lane([0.0; LANES]) };

    /// Fits a grid to the columns of one group.
    #[inline(always)]
    pub(crate) fn fit<'a>(rule: &GridRule, columns: impl Iterator<Item = &'a Lane<f32>> + Clone) -> Self {
        let (lo, hi) = range(rule, columns.clone());
        let mut grid = Self::UNSET;
        for r in 0..LANES {
            grid.scale.0[r] = rule.scale(lo.0[r], hi.0[r]);
            grid.zero.0[r] = rule.zero(lo.0[r], grid.scale.0[r]);
        }
        if let Some(exponent) = rule.mse {
            grid.search(rule, exponent, &lo, &hi, columns);
        }
        grid
    }

    /// Shrinks the range step by step and keeps what makes `sum |q - w|^exponent` strictly smaller.
    #[inline(always)]
    fn search<'a>(
        &mut self,
        rule: &GridRule,
        exponent: f32,
        lo: &Lane<f32>,
        hi: &Lane<f32>,
        columns: impl Iterator<Item = &'a Lane<f32>> + Clone,
    ) {
        // A 2-bit asymmetric grid has so few points that the other integer next to the ideal zero is worth a try.
        let try_other_zero = !rule.sym && rule.max_code == 3.0;
        let mut best = [f64::INFINITY; LANES];
        for step in 0..SEARCH_STEPS {
            let shrink = (1.0 - f64::from(step) / 100.0) as f32;
            let mut candidate = Self::UNSET;
            let mut other = Self::UNSET;
            for r in 0..LANES {
                let (lo, hi) = (shrink * lo.0[r], shrink * hi.0[r]);
                let scale = rule.scale(lo, hi);
                let zero = rule.zero(lo, scale);
                candidate.scale.0[r] = scale;
                candidate.zero.0[r] = zero;
                let ideal = -lo / scale;
                let floor = ideal.floor().clamp(0.0, rule.max_code);
                let ceil = ideal.ceil().clamp(0.0, rule.max_code);
                other.scale.0[r] = scale;
                other.zero.0[r] = if zero == floor { ceil } else { floor };
            }
            self.keep_better(rule, exponent, &candidate, columns.clone(), &mut best);
            if try_other_zero {
                self.keep_better(rule, exponent, &other, columns.clone(), &mut best);
            }
        }
    }

    #[inline(always)]
    fn keep_better<'a>(
        &mut self,
        rule: &GridRule,
        exponent: f32,
        candidate: &Self,
        columns: impl Iterator<Item = &'a Lane<f32>>,
        best: &mut [f64; LANES],
    ) {
        let mut error = [0.0f64; LANES];
        for column in columns {
            for (r, error) in error.iter_mut().enumerate() {
                let (w, scale, zero) = (column.0[r], candidate.scale.0[r], candidate.zero.0[r]);
                let q = scale * (rule.code(w, scale, zero) - zero);
                *error += power((q - w).abs(), f64::from(exponent));
            }
        }
        for r in 0..LANES {
            if error[r] < best[r] {
                best[r] = error[r];
                self.scale.0[r] = candidate.scale.0[r];
                self.zero.0[r] = candidate.zero.0[r];
            }
        }
    }
}

/// `x^exponent` for `x >= 0`, to some 1e-9 of itself: the grid search calls it 80 times per weight, and unlike the library's
/// `powf` this vectorises. float64 leaves the product of exponent and logarithm as exact as that needs.
#[inline(always)]
fn power(x: f32, exponent: f64) -> f64 {
    /// Adding it moves a small integer into the low bits of the mantissa.
    const MAGIC: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    /// Mantissas are taken from [sqrt(1/2), sqrt(2)).
    const SQRT_HALF: u64 = 0x3FE6_A09E_667F_3BCD;

    // log2(x) = k + log2(m), log2(m) = 2 / ln 2 * artanh t with t = (m - 1) / (m + 1), |t| < 0.172.
    let bits = f64::from(x).to_bits();
    let k = (bits.wrapping_sub(SQRT_HALF) as i64) >> 52;
    let m = f64::from_bits(bits.wrapping_sub((k << 52) as u64));
    let k = f64::from_bits(MAGIC.to_bits().wrapping_add(k as u64)) - MAGIC;
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let series = 1.0 + t2 * (1.0 / 3.0 + t2 * (1.0 / 5.0 + t2 * (1.0 / 7.0 + t2 * (1.0 / 9.0 + t2 / 11.0))));
    let log2 = k + 2.0 * std::f64::consts::LOG2_E * t * series;

    // 2^y = 2^n e^(f ln 2), |f| <= 1/2. The lower bound makes 0 to any power as good as 0.
    let y = (exponent * log2).clamp(-1022.0, 1023.0);
    let shifted = y + MAGIC;
    let z = (y - (shifted - MAGIC)) * std::f64::consts::LN_2;
    // Taylor to the ninth power by Horner's rule, written out: a loop here would keep the caller's from vectorising.
    let exp = 1.0 + z * (1.0 / 9.0);
    let exp = 1.0 + z * (1.0 / 8.0) * exp;
    let exp = 1.0 + z * (1.0 / 7.0) * exp;
    let exp = 1.0 + z * (1.0 / 6.0) * exp;
    let exp = 1.0 + z * (1.0 / 5.0) * exp;
    let exp = 1.0 + z * (1.0 / 4.0) * exp;
    let exp = 1.0 + z * (1.0 / 3.0) * exp;
    let exp = 1.0 + z * (1.0 / 2.0) * exp;
    let exp = 1.0 + z * exp;
    exp * f64::from_bits(1f64.to_bits().wrapping_add(shifted.to_bits() << 52))
}

/// The range that a group's grid spans: `lo <= 0 <= hi`, not empty.
#[inline(always)]
fn range<'a>(rule: &GridRule, columns: impl Iterator<Item = &'a Lane<f32>>) -> (Lane<f32>, Lane<f32>) {
    let (mut lo, mut hi) = (Lane::<f32>::ZERO, Lane::<f32>::ZERO);
    for column in columns {
        for r in 0..LANES {
            lo.0[r] = lo.0[r].min(column.0[r]);
            hi.0[r] = hi.0[r].max(column.0[r]);
        }
    }
    for r in 0..LANES {
        if rule.sym {
            hi.0[r] = hi.0[r].max(lo.0[r].abs());
            // Rows without a negative weight keep lo = 0, a quirk of every reference implementation.
            if lo.0[r] < 0.0 {
                lo.0[r] = -hi.0[r];
            }
        }
        if lo.0[r] == 0.0 && hi.0[r] == 0.0 {
            (lo.0[r], hi.0[r]) = (-1.0, 1.0);
        }
    }
    (lo, hi)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_is_as_good_as_promised() {
        for exponent in [0.5f64, 1.0, 2.0, 2.4, 3.7] {
            let mut x = 1e-30f32;
            while x < 1e10 {
                let exact = f64::from(x).powf(exponent);
                assert!((power(x, exponent) - exact).abs() <= 1e-8 * exact, "{x}^{exponent}");
                x *= 1.37;
            }
            assert!(power(0.0, exponent) < 1e-150);
        }
    }

    /// Grids of rows whose codes and scales are known in closed form: (weights, sym, scale, zero), 4 bits.
    #[test]
    fn grids_of_special_rows() {
        let cases: [(&[f32], bool, f32, f32); 6] = [
            (&[0.0, 0.0], true, 2.0 / 15.0, 8.0),
            (&[0.0, 0.0], false, 2.0 / 15.0, 7.0),
            // No negative weight: the range starts at 0 but the zero stays in the middle, as in all references.
            (&[0.5, 1.5], true, 1.5 / 15.0, 8.0),
            (&[0.5, 1.5], false, 1.5 / 15.0, 0.0),
            (&[-1.5, -0.5], true, 3.0 / 15.0, 8.0),
            (&[-1.5, -0.5], false, 1.5 / 15.0, 15.0),
        ];
        for (weights, sym, scale, zero) in cases {
            let rule = GridRule::new(&GptqConfig::builder().sym(sym).build().expect("valid"));
            let columns: Vec<_> = weights.iter().map(|&w| Lane([w; LANES])).collect();
            let grid = Grid::fit(&rule, columns.iter());
            assert_eq!((grid.scale.0[5], grid.zero.0[5]), (scale, zero), "{weights:?} sym {sym}");
        }
    }
}
