//! The two matrix products of attention, in register tiles.

use crate::cpu::ops::{isa::MulAdd, kv::LANES, step::PAGE_LEN};

/// `scores[i * score_stride + j] = sum_d q[i * dim + d] * keys[d * PAGE_LEN + j]` for all queries and one page.
#[inline(always)]
pub(super) fn scores<I: MulAdd>(
    q: &[f32],
    dim: usize,
    keys: &[f32],
    scores: &mut [f32],
    score_stride: usize,
) {
    let queries = q.len() / dim;
    let mut i = 0;
    while i < queries {
        let (q, out) = (&q[i * dim..], &mut scores[i * score_stride..]);
        let left = queries - i;
        // Four queries by a whole page: sixteen accumulators, and keys are read from memory in order, once.
        i += if left >= 4 {
            score_tile::<I, 4, 4>(q, dim, keys, out, score_stride)
        } else if left >= 2 {
            score_tile::<I, 2, 4>(q, dim, keys, out, score_stride)
        } else {
            score_tile::<I, 1, 4>(q, dim, keys, out, score_stride)
        };
    }
}

/// `R` queries with `V` vectors of keys at a time; returns `R`.
#[inline(always)]
fn score_tile<I: MulAdd, const R: usize, const V: usize>(
    q: &[f32],
    dim: usize,
    keys: &[f32],
    scores: &mut [f32],
    score_stride: usize,
) -> usize {
    let q: [&[f32]; R] = std::array::from_fn(|r| &q[r * dim..][..dim]);
    for column in (0..PAGE_LEN).step_by(V * LANES) {
        let mut sums = [[[0.0f32; LANES]; V]; R];
        for (d, keys) in keys.chunks_exact(PAGE_LEN).take(dim).enumerate() {
            let keys: [[f32; LANES]; V] = std::array::from_fn(|v| lanes(&keys[column + v * LANES..]));
            for r in 0..R {
                let q = q[r][d];
                for v in 0..V {
                    for l in 0..LANES {
                        sums[r][v][l] = I::mul_add(q, keys[v][l], sums[r][v][l]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sums) in sums.iter().enumerate() {
                scores[r * score_stride + column + v * LANES..][..LANES].copy_from_slice(sums);
            }
        }
    }
    R
}

/// `sums[i * padded + d] += sum_j weights[i * weight_stride + j] * values[j * padded + d]` for all queries.
#[inline(always)]
pub(super) fn weighted_sums<I: MulAdd>(
    weights: &[f32],
    weight_stride: usize,
    values: &[f32],
    padded: usize,
    sums: &mut [f32],
) {
    let queries = sums.len() / padded;
    let mut i = 0;
    while i < queries {
        let (weights, sums) = (&weights[i * weight_stride..], &mut sums[i * padded..]);
        i += if queries - i >= 4 {
            sum_rows::<I, 4>(weights, weight_stride, values, padded, sums)
        } else {
            sum_rows::<I, 1>(weights, weight_stride, values, padded, sums)
        };
    }
}

#[inline(always)]
fn sum_rows<I: MulAdd, const R: usize>(
    weights: &[f32],
    weight_stride: usize,
    values: &[f32],
    padded: usize,
    sums: &mut [f32],
) -> usize {
    let mut column = 0;
    while column < padded {
        column += if padded - column >= 4 * LANES {
            sum_tile::<I, R, 4>(weights, weight_stride, values, padded, sums, column)
        } else {
            sum_tile::<I, R, 1>(weights, weight_stride, values, padded, sums, column)
        };
    }
    R
}

/// `R` queries with `V` vectors of features; returns the number of features.
#[inline(always)]
fn sum_tile<I: MulAdd, const R: usize, const V: usize>(
    weights: &[f32],
    weight_stride: usize,
    values: &[f32],
    padded: usize,
    sums: &mut [f32],
    column: usize,
) -> usize {
    let keys = values.len() / padded;
    let weights: [&[f32]; R] = std::array::from_fn(|r| &weights[r * weight_stride..][..keys]);
    let mut tile: [[[f32; LANES]; V]; R] =
        std::array::from_fn(|r| std::array::from_fn(|v| lanes(&sums[r * padded + column + v * LANES..])));
    for (j, values) in values.chunks_exact(padded).enumerate() {
        let values: [[f32; LANES]; V] = std::array::from_fn(|v| lanes(&values[column + v * LANES..]));
        for r in 0..R {
            let weight = weights[r][j];
            for v in 0..V {
                for l in 0..LANES {
                    tile[r][v][l] = I::mul_add(weight, values[v][l], tile[r][v][l]);
                }
            }
        }
    }
    for (r, tile) in tile.iter().enumerate() {
        for (v, tile) in tile.iter().enumerate() {
            sums[r * padded + column + v * LANES..][..LANES].copy_from_slice(tile);
        }
    }
    V * LANES
}

#[inline(always)]
fn lanes(x: &[f32]) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    out.copy_from_slice(&x[..LANES]);
    out
}
