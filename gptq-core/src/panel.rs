//! The matrix product that everything here is built on: one tile of `A^T B` from two packed panels.
//!
//! A panel stores, for each step `k` of the inner dimension, the operand's elements of one tile side by side: [`LANES`] of
//! them for the operand whose elements fill vector registers, [`COLS`] for the one whose elements are broadcast. Panels
//! are padded with zeros, so that no kernel has an edge.
//!
//! An element of a tile is one chain of fused multiply-adds in ascending `k`, whatever the width of the vector registers:
//! results have the same bits on every machine.

use pulp::Simd;

/// Width of the vectorised side of a tile: a multiple of all register widths.
pub(crate) const LANES: usize = 32;

/// Width of the broadcast side of a tile: with two AVX-512 registers per column it leaves 8 of 32 for operands; a machine
/// with 16 registers takes it in two halves.
pub(crate) const COLS: usize = 12;

/// One step of a vectorised panel, or one column of a tile, aligned to cache lines.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Lane<T>(pub(crate) [T; LANES]);

impl<T: Real> Lane<T> {
    pub(crate) const ZERO: Self = Self([T::ZERO; LANES]);
}

/// `tile[j][i] = sum over k of a[k][i] * b[k][j]`.
pub(crate) type Tile<T> = [Lane<T>; COLS];

/// An element type that tiles can be computed in.
pub(crate) trait Real: Copy + Send + Sync + 'static {
    const ZERO: Self;

    /// Overwrites `tile` with the product of two panels of equally many steps.
    fn multiply<S: Simd>(simd: S, a: &[Lane<Self>], b: &[[Self; COLS]], tile: &mut Tile<Self>);
}

macro_rules! real {
    ($type:ident, $width:ident, $as_simd:ident, $as_mut_simd:ident, $splat:ident, $mul_add:ident) => {
        impl Real for $type {
            const ZERO: Self = 0.0;

            #[inline(always)]
            fn multiply<S: Simd>(simd: S, a: &[Lane<Self>], b: &[[Self; COLS]], tile: &mut Tile<Self>) {
                /// Computes the part of the tile that fits in registers: `V` vectors of lanes times `N` columns.
                #[inline(always)]
                fn part<S: Simd, const V: usize, const N: usize>(
                    simd: S,
                    (first_lane, first_column): (usize, usize),
                    a: &[Lane<$type>],
                    b: &[[$type; COLS]],
                    tile: &mut Tile<$type>,
                ) {
                    let lanes = first_lane..first_lane + V * S::$width;
                    let mut sums = [[simd.$splat(0.0); V]; N];
                    for (a, b) in a.iter().zip(b) {
                        let a = &S::$as_simd(&a.0[lanes.clone()]).0[..V];
                        let b = &b[first_column..first_column + N];
                        for n in 0..N {
                            let b = simd.$splat(b[n]);
                            for v in 0..V {
                                sums[n][v] = simd.$mul_add(a[v], b, sums[n][v]);
                            }
                        }
                    }
                    for n in 0..N {
                        let column = &mut tile[first_column + n].0[lanes.clone()];
                        S::$as_mut_simd(column).0[..V].copy_from_slice(&sums[n]);
                    }
                }

                /// Covers the tile with parts.
                #[inline(always)]
                fn cover<S: Simd, const V: usize, const N: usize>(
                    simd: S,
                    a: &[Lane<$type>],
                    b: &[[$type; COLS]],
                    tile: &mut Tile<$type>,
                ) {
                    for first_lane in (0..LANES).step_by(V * S::$width) {
                        for first_column in (0..COLS).step_by(N) {
                            part::<S, V, N>(simd, (first_lane, first_column), a, b, tile);
                        }
                    }
                }

                debug_assert_eq!(a.len(), b.len());
                if S::REGISTER_COUNT >= 32 {
                    cover::<S, 2, 12>(simd, a, b, tile);
                } else {
                    cover::<S, 2, 6>(simd, a, b, tile);
                }
            }
        }
    };
}
real!(f32, F32_LANES, as_simd_f32s, as_mut_simd_f32s, splat_f32s, mul_add_f32s);
real!(f64, F64_LANES, as_simd_f64s, as_mut_simd_f64s, splat_f64s, mul_add_f64s);

#[cfg(test)]
mod tests {
    use pulp::{Arch, Scalar, WithSimd};

    use super::*;

    struct Multiply<'a, T: Real>(&'a [Lane<T>], &'a [[T; COLS]]);

    impl<T: Real> WithSimd for Multiply<'_, T> {
        type Output = Box<Tile<T>>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            let mut tile = Box::new([Lane::ZERO; COLS]);
            T::multiply(simd, self.0, self.1, &mut tile);
            tile
        }
    }

    #[test]
    fn every_instruction_set_computes_the_same_chain() {
        let a: Vec<Lane<f32>> = (0..37)
            .map(|k| Lane(std::array::from_fn(|i| (k as f32 + 1.3).sin() * (i as f32 - 31.7))))
            .collect();
        let b: Vec<[f32; COLS]> =
            (0..37).map(|k| std::array::from_fn(|j| (k * 12 + j) as f32 * 0.37 - 9.0)).collect();
        let fast = Arch::new().dispatch(Multiply(&a, &b));
        let scalar = Multiply(&a, &b).with_simd(Scalar);
        for (j, (fast, scalar)) in fast.iter().zip(scalar.iter()).enumerate() {
            for i in 0..LANES {
                let chain = a.iter().zip(&b).fold(0.0f32, |sum, (a, b)| a.0[i].mul_add(b[j], sum));
                assert_eq!((fast.0[i].to_bits(), scalar.0[i].to_bits()), (chain.to_bits(), chain.to_bits()));
            }
        }
    }

    #[test]
    fn float64_tiles_are_the_same_chain_too() {
        let a: Vec<Lane<f64>> =
            (0..19).map(|k| Lane(std::array::from_fn(|i| (k as f64 + 0.1).cos() + i as f64))).collect();
        let b: Vec<[f64; COLS]> = (0..19).map(|k| std::array::from_fn(|j| (k + j) as f64 * 0.77)).collect();
        let fast = Arch::new().dispatch(Multiply(&a, &b));
        for (j, fast) in fast.iter().enumerate() {
            for i in 0..LANES {
                let chain = a.iter().zip(&b).fold(0.0f64, |sum, (a, b)| a.0[i].mul_add(b[j], sum));
                assert_eq!(fast.0[i].to_bits(), chain.to_bits());
            }
        }
    }
}
