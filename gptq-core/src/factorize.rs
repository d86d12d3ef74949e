//! The one operation of linear algebra that GPTQ needs: from H the upper triangular U with `H^-1 = U^T U`.

mod blocked;
#[cfg(feature = "lapack")]
mod lapack;

use ndarray::Array2;
use rayon::prelude::*;

#[cfg(feature = "lapack")]
pub use lapack::Lapack;

use crate::error::NotPositiveDefinite;

/// Computes the Cholesky factor of a matrix's inverse.
pub trait Factorize: Send + Sync {
    /// The upper triangular U with positive diagonal and `damped^-1 = U^T U`; elements below the diagonal are 0.
    ///
    /// `damped` is square, symmetric and finite.
    ///
    /// # Errors
    /// If `damped` is not positive definite in float64 arithmetic.
    fn inverse_cholesky(&self, damped: Array2<f64>) -> Result<Array2<f64>, NotPositiveDefinite>;
}

/// Pure Rust, blocked and in place.
///
/// With `J` the matrix that reverses the order of rows, `J H J = L L^T` gives `H = R R^T` with `R = J L J` upper
/// triangular, so `U = R^-1 = J L^-1 J`: one factorisation and one triangular inverse, `2 n^3 / 3` operations, where
/// factorising H, inverting it and factorising the inverse takes twice as many.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockedCholesky;

impl Factorize for BlockedCholesky {
    fn inverse_cholesky(&self, damped: Array2<f64>) -> Result<Array2<f64>, NotPositiveDefinite> {
        let n = damped.nrows();
        let mut matrix = damped.as_standard_layout().into_owned().into_raw_vec_and_offset().0;
        reverse(&mut matrix);
        blocked::factor(&mut matrix, n)
            .map_err(|failure| NotPositiveDefinite { index: n - 1 - failure.index, ..failure })?;
        blocked::invert(&mut matrix, n);
        reverse(&mut matrix);
        Ok(Array2::from_shape_vec((n, n), matrix).expect("invariant: n * n elements came in"))
    }
}

/// Reverses a slice in parallel. On a square matrix stored row by row this is `J A J`.
fn reverse(values: &mut [f64]) {
    const CHUNK: usize = 1 << 14;
    let (front, back) = values.split_at_mut(values.len() / 2);
    // An odd middle element is the first of `back`; counted from its end, chunks pair up without it.
    front.par_chunks_mut(CHUNK).zip(back.par_rchunks_mut(CHUNK)).for_each(|(front, back)| {
        for (a, b) in front.iter_mut().zip(back.iter_mut().rev()) {
            std::mem::swap(a, b);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_reproduces_the_inverse() {
        for n in [1, 2, 3, 11, 12, 13, 64, 65, 200, 300] {
            let mut h = Array2::from_shape_fn((n, n), |(i, j)| 1.0 / (1.0 + i.abs_diff(j) as f64));
            h.diag_mut().iter_mut().enumerate().for_each(|(i, d)| *d += (i % 7) as f64);
            let u = BlockedCholesky.inverse_cholesky(h.clone()).expect("positive definite");
            for ((i, j), &x) in u.indexed_iter() {
                assert!(if i > j { x == 0.0 } else { i < j || x > 0.0 }, "U[{i}, {j}] = {x}");
            }
            // U^T U H = 1; the condition number is below 100, so a few hundred roundings stay far below 1e-11.
            let product = u.t().dot(&u).dot(&h);
            let worst =
                (&product - &Array2::<f64>::eye(n)).iter().fold(0.0f64, |worst, x| worst.max(x.abs()));
            assert!(worst < 1e-11, "n = {n}: {worst:e}");
        }
    }

    #[test]
    fn an_indefinite_matrix_names_its_pivot() {
        let mut h = Array2::<f64>::eye(200);
        h[[150, 150]] = -3.0;
        let error = BlockedCholesky.inverse_cholesky(h).expect_err("indefinite");
        assert_eq!(error, NotPositiveDefinite { index: 150, pivot: -3.0 });
    }
}
