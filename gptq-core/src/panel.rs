//! The matrix product that everything here is built on: one tile of `A^T B` from two packed panels.
//!
//! A panel stores, for each step `k` of the inner dimension, the operand's elements of one tile side by side: [`LANES`] of
//! them for the operand whose elements fill vector registers, [`COLS`] for the one whose elements are broadcast. Panels
//! are padded with zeros, so that no kernel has an edge.

/// Width of the vectorised side of a tile.
pub(crate) const LANES: usize = 64;

/// Width of the broadcast side of a tile.
pub(crate) const COLS: usize = 12;

/// One step of a vectorised panel, or one column of a tile, on a cache line of its own.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Lane<T>(pub(crate) [T; LANES]);

impl<T: Real> Lane<T> {
    pub(crate) const ZERO: Self = Self([T::ZERO; LANES]);
}

/// `tile[j][i] = sum over k of a[k][i] * b[k][j]`, k ascending, each step one fused multiply-add.
pub(crate) type Tile<T> = [Lane<T>; COLS];

/// An element type that tiles can be computed in.
pub(crate) trait Real: Copy + Send + Sync + 'static {
    const ZERO: Self;

    /// Overwrites `tile` with the product of two panels of equally many steps.
    fn multiply(a: &[Lane<Self>], b: &[[Self; COLS]], tile: &mut Tile<Self>);
}

macro_rules! real {
    ($type:ty) => {
        impl Real for $type {
            const ZERO: Self = 0.0;

            fn multiply(a: &[Lane<Self>], b: &[[Self; COLS]], tile: &mut Tile<Self>) {
                debug_assert_eq!(a.len(), b.len());
                *tile = [Lane::ZERO; COLS];
                for (a, b) in a.iter().zip(b) {
                    for (column, &b) in tile.iter_mut().zip(b) {
                        for (sum, &a) in column.0.iter_mut().zip(&a.0) {
                            *sum += a * b;
                        }
                    }
                }
            }
        }
    };
}
real!(f32);
real!(f64);
