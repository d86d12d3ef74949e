//! The same operation by whichever LAPACK the application links.

use ndarray::Array2;
use ndarray_linalg::{CholeskyInto, Diag, SolveTriangularInto, UPLO, error::LinalgError};

use super::{Factorize, reverse};
use crate::error::NotPositiveDefinite;

/// Factorises with LAPACK (`dpotrf`, `dtrtrs`) through `ndarray-linalg`. Feature `lapack`.
///
/// The feature links no LAPACK by itself: depend on `ndarray-linalg` with a backend feature, or use
/// `lapack-openblas-system`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lapack;

impl Factorize for Lapack {
    fn inverse_cholesky(&self, damped: Array2<f64>) -> Result<Array2<f64>, NotPositiveDefinite> {
        let n = damped.nrows();
        // As in `BlockedCholesky`: J H J = L L^T, U = J L^-1 J.
        let failure = |order: usize| NotPositiveDefinite { index: n - order.clamp(1, n), pivot: f64::NAN };
        let lower = reversed(damped).cholesky_into(UPLO::Lower).map_err(|error| match error {
            // LAPACK numbers the leading minor that is not positive, from 1.
            LinalgError::Lapack(lax::error::Error::LapackComputationalFailure { return_code }) => {
                failure(usize::try_from(return_code).unwrap_or(1))
            }
            _ => failure(1),
        })?;
        let inverse = lower
            .solve_triangular_into(UPLO::Lower, Diag::NonUnit, Array2::eye(n))
            .map_err(|_| failure(1))?;
        Ok(reversed(inverse))
    }
}

/// `J A J`.
fn reversed(matrix: Array2<f64>) -> Array2<f64> {
    let dim = matrix.raw_dim();
    let mut values = matrix.as_standard_layout().into_owned().into_raw_vec_and_offset().0;
    reverse(&mut values);
    Array2::from_shape_vec(dim, values).expect("invariant: as many elements as came in")
}
