//! Cholesky factorisation and triangular inverse of a row-major matrix, in place, in blocks of [`BLOCK`] columns.
//!
//! Nearly all operations are tile products ([`Real::multiply`]); what remains is quadratic in the block size.

mod diagonal;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::error::NotPositiveDefinite;
use crate::panel::{COLS, LANES, Lane, Real, Tile};
use diagonal::InvertDiagonal;

/// Columns per block: a panel of this many float64 steps fills two thirds of a 48 KiB first-level cache.
const BLOCK: usize = 128;

/// Rows per task.
const SLAB: usize = 4 * COLS;

/// Overwrites the lower triangle of a symmetric matrix with its Cholesky factor L, but the diagonal blocks with the
/// *inverses* of L's diagonal blocks, which is all that [`invert`] needs of them. The upper triangle ends undefined.
///
/// Right-looking: factor the diagonal block, solve the block column below, subtract its outer product from the rest.
pub(super) fn factor(matrix: &mut [f64], n: usize) -> Result<(), NotPositiveDefinite> {
    let arch = Arch::new();
    let mut narrow = Vec::new();
    let mut wide = Vec::new();
    for start in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - start);
        let end = start + width;
        let (above, below) = matrix.split_at_mut(end * n);
        let diagonal_rows = &mut above[start * n..];
        let inverse = arch
            .dispatch(InvertDiagonal { rows: diagonal_rows, n, start, width })
            .map_err(|failure| NotPositiveDefinite { index: start + failure.index, ..failure })?;

        // L21 = A21 L11^-T, kept in the matrix and packed for the broadcast side of the update.
        let rows_below = n - end;
        narrow.resize(rows_below.div_ceil(COLS) * width, [0.0; COLS]);
        below.par_chunks_mut(SLAB * n).zip(narrow.par_chunks_mut(SLAB / COLS * width)).for_each(
            |(rows, narrow)| arch.dispatch(SolveSlab { rows, n, start, width, inverse: &inverse, narrow }),
        );

        // The same rows packed for the vectorised side.
        wide.resize(rows_below.div_ceil(LANES) * width, Lane::ZERO);
        below.par_chunks(LANES * n).zip(wide.par_chunks_mut(width)).for_each(|(rows, wide)| {
            for (i, row) in rows.chunks_exact(n).enumerate() {
                for (step, &x) in wide.iter_mut().zip(&row[start..end]) {
                    step.0[i] = x;
                }
            }
        });

        // A22 -= L21 L21^T, long rows first.
        below
            .par_chunks_mut(SLAB * n)
            .zip(narrow.par_chunks(SLAB / COLS * width))
            .enumerate()
            .rev()
            .for_each(|(slab, (rows, narrow))| {
                let panels = ((slab + 1) * SLAB).div_ceil(LANES).min(wide.len() / width);
                arch.dispatch(UpdateSlab { rows, n, end, width, narrow, wide: &wide[..panels * width] });
            });
    }
    Ok(())
}

/// Some rows of `L21 = A21 L11^-T`.
struct SolveSlab<'a> {
    rows: &'a mut [f64],
    n: usize,
    start: usize,
    width: usize,
    /// `L11^-T` in panels of [`LANES`] columns.
    inverse: &'a [Lane<f64>],
    narrow: &'a mut [[f64; COLS]],
}

impl WithSimd for SolveSlab<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, n, start, width, inverse, narrow } = self;
        let mut tile: Tile<f64> = [Lane::ZERO; COLS];
        let mut source = vec![[0.0; COLS]; width];
        for (rows, narrow) in rows.chunks_mut(COLS * n).zip(narrow.chunks_exact_mut(width)) {
            for (j, row) in rows.chunks_exact(n).enumerate() {
                for (step, &x) in source.iter_mut().zip(&row[start..start + width]) {
                    step[j] = x;
                }
            }
            for (panel, inverse) in inverse.chunks_exact(width).enumerate() {
                let first = panel * LANES;
                let columns = LANES.min(width - first);
                // L11^-T is upper triangular: steps behind the panel's last column are zero.
                let steps = first + columns;
                f64::multiply(simd, &inverse[..steps], &source[..steps], &mut tile);
                for (row, product) in rows.chunks_exact_mut(n).zip(&tile) {
                    row[start + first..][..columns].copy_from_slice(&product.0[..columns]);
                }
                for (i, step) in narrow[first..first + columns].iter_mut().enumerate() {
                    for (x, product) in step.iter_mut().zip(&tile) {
                        *x = product.0[i];
                    }
                }
            }
        }
    }
}

/// Some rows of `A22 -= L21 L21^T`.
struct UpdateSlab<'a> {
    rows: &'a mut [f64],
    n: usize,
    end: usize,
    width: usize,
    narrow: &'a [[f64; COLS]],
    wide: &'a [Lane<f64>],
}

impl WithSimd for UpdateSlab<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, n, end, width, narrow, wide } = self;
        let mut tile: Tile<f64> = [Lane::ZERO; COLS];
        for (panel, wide) in wide.chunks_exact(width).enumerate() {
            let first = end + panel * LANES;
            let columns = LANES.min(n - first);
            for (rows, narrow) in rows.chunks_mut(COLS * n).zip(narrow.chunks_exact(width)) {
                f64::multiply(simd, wide, narrow, &mut tile);
                for (row, product) in rows.chunks_exact_mut(n).zip(&tile) {
                    for (x, p) in row[first..][..columns].iter_mut().zip(&product.0) {
                        *x -= p;
                    }
                }
            }
        }
    }
}

/// Overwrites what [`factor`] left with `L^-1`, lower triangular; the upper triangle becomes zero.
///
/// Block row by block row: `X[i, ..i] = -X_ii (L[i, ..i] X[..i, ..i])`.
pub(super) fn invert(matrix: &mut [f64], n: usize) {
    let arch = Arch::new();
    let mut narrow = Vec::new();
    let mut result = Vec::new();
    for start in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - start);
        let (above, rows) = matrix.split_at_mut(start * n);
        let rows = &mut rows[..width * n];

        // The block row of L, packed for the broadcast side, and behind it X_ii likewise.
        let steps = start + width;
        narrow.resize(width.div_ceil(COLS) * steps, [0.0; COLS]);
        narrow.par_chunks_mut(steps).zip(rows.par_chunks(COLS * n)).for_each(|(narrow, rows)| {
            for (j, row) in rows.chunks_exact(n).enumerate() {
                for (step, &x) in narrow.iter_mut().zip(&row[..steps]) {
                    step[j] = x;
                }
            }
        });

        result.resize(start.div_ceil(LANES) * width, Lane::ZERO);
        result.par_chunks_exact_mut(width).enumerate().for_each(|(panel, result)| {
            arch.dispatch(InvertPanel {
                above,
                n,
                first: panel * LANES,
                start,
                width,
                narrow: &narrow,
                result,
            });
        });

        rows.par_chunks_exact_mut(n).enumerate().for_each(|(row, values)| {
            for (target, panel) in values[..start].chunks_mut(LANES).zip(result.chunks_exact(width)) {
                target.copy_from_slice(&panel[row].0[..target.len()]);
            }
            values[start + row + 1..].fill(0.0);
        });
    }
}

/// [`LANES`] columns of one block row of the inverse.
struct InvertPanel<'a> {
    /// Finished rows of the inverse.
    above: &'a [f64],
    n: usize,
    first: usize,
    start: usize,
    width: usize,
    narrow: &'a [[f64; COLS]],
    result: &'a mut [Lane<f64>],
}

impl WithSimd for InvertPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { above, n, first, start, width, narrow, result } = self;
        let columns = LANES.min(start - first);
        // Rows above the panel's first column are zero in these columns.
        let finished: Vec<Lane<f64>> = above
            .chunks_exact(n)
            .skip(first)
            .map(|row| {
                let mut lane = Lane::ZERO;
                lane.0[..columns].copy_from_slice(&row[first..first + columns]);
                lane
            })
            .collect();
        let mut product = vec![Lane::ZERO; width];
        let mut tile: Tile<f64> = [Lane::ZERO; COLS];
        let strips = narrow.chunks_exact(start + width);
        for (product, strip) in product.chunks_mut(COLS).zip(strips.clone()) {
            // In runs that stay in the first-level cache.
            for (finished, strip) in finished.chunks(BLOCK).zip(strip[first..start].chunks(BLOCK)) {
                f64::multiply(simd, finished, strip, &mut tile);
                for (sum, tile) in product.iter_mut().zip(&tile) {
                    for (sum, x) in sum.0.iter_mut().zip(&tile.0) {
                        *sum += x;
                    }
                }
            }
        }
        for (result, strip) in result.chunks_mut(COLS).zip(strips) {
            f64::multiply(simd, &product, &strip[start..], &mut tile);
            for (x, tile) in result.iter_mut().zip(&tile) {
                for (x, t) in x.0.iter_mut().zip(&tile.0) {
                    *x = -t;
                }
            }
        }
    }
}
