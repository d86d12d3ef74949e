//! One diagonal block: its Cholesky factor and that factor's inverse.

use pulp::{Simd, WithSimd};

use crate::error::NotPositiveDefinite;
use crate::panel::{LANES, Lane};

/// Factors the block `A11 = L11 L11^T` and leaves `L11^-1` in its place; returns `L11^-T` in panels of [`LANES`] columns.
pub(super) struct InvertDiagonal<'a> {
    /// The block's rows of the whole matrix.
    pub(super) rows: &'a mut [f64],
    pub(super) n: usize,
    /// First column.
    pub(super) start: usize,
    pub(super) width: usize,
}

impl WithSimd for InvertDiagonal<'_> {
    type Output = Result<Vec<Lane<f64>>, NotPositiveDefinite>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let Self { rows, n, start, width } = self;
        // U = L^T row by row, so that every inner loop runs along a row.
        let mut upper = vec![0.0; width * width];
        for (i, row) in rows.chunks_exact(n).enumerate() {
            for (j, &x) in row[start..=start + i].iter().enumerate() {
                upper[j * width + i] = x;
            }
        }
        for k in 0..width {
            let (done, rest) = upper.split_at_mut((k + 1) * width);
            let row = &mut done[k * width..];
            let pivot = row[k];
            if pivot <= 0.0 || !pivot.is_finite() {
                return Err(NotPositiveDefinite { index: k, pivot });
            }
            let root = pivot.sqrt();
            row[k..].iter_mut().for_each(|x| *x /= root);
            for (target, i) in rest.chunks_exact_mut(width).zip(k + 1..) {
                let factor = row[i];
                for (x, u) in target[i..].iter_mut().zip(&row[i..]) {
                    *x -= factor * u;
                }
            }
        }

        // V = U^-1, bottom row first: V[k, ..] = (e_k - sum over j > k of U[k, j] V[j, ..]) / U[k, k].
        let mut inverse = vec![0.0; width * width];
        for k in (0..width).rev() {
            let (before, after) = inverse.split_at_mut((k + 1) * width);
            let target = &mut before[k * width..];
            let factors = &upper[k * width..(k + 1) * width];
            target[k] = 1.0;
            for (source, j) in after.chunks_exact(width).zip(k + 1..) {
                let factor = factors[j];
                for (x, v) in target[j..].iter_mut().zip(&source[j..]) {
                    *x -= factor * v;
                }
            }
            target[k..].iter_mut().for_each(|x| *x /= factors[k]);
        }

        for (i, row) in rows.chunks_exact_mut(n).enumerate() {
            for (j, x) in row[start..=start + i].iter_mut().enumerate() {
                *x = inverse[j * width + i];
            }
            row[start + i + 1..start + width].fill(0.0);
        }
        let mut panels = vec![Lane::ZERO; width.div_ceil(LANES) * width];
        for (panel, steps) in panels.chunks_exact_mut(width).enumerate() {
            let first = panel * LANES;
            let columns = LANES.min(width - first);
            for (step, row) in steps.iter_mut().zip(inverse.chunks_exact(width)) {
                step.0[..columns].copy_from_slice(&row[first..first + columns]);
            }
        }
        Ok(panels)
    }
}
