//! The layer's Hessian `H = 2/n sum x x^T`, and GPTAQ's `D = 2/n sum (x~ - x) x^T`, from calibration inputs.

mod accumulator;

use ndarray::parallel::prelude::*;
use ndarray::{Array2, ArrayView1, ArrayView2};

pub use accumulator::{HessianAccumulator, SampleUnit};

use crate::error::GptqError;

/// Second moments of a layer's inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Hessian {
    matrix: Array2<f64>,
    cross: Option<Array2<f64>>,
    samples: u64,
}

impl Hessian {
    /// Takes a Hessian computed elsewhere: `matrix` (in_features, in_features), from `samples` calibration samples.
    ///
    /// # Errors
    /// If `matrix` is not square, not finite, not exactly symmetric, or has a negative diagonal element; if it is empty.
    pub fn from_matrix(matrix: Array2<f64>, samples: u64) -> Result<Self, GptqError> {
        let (rows, columns) = matrix.dim();
        if columns == 0 {
            return Err(GptqError::EmptyWeight { rows, columns });
        }
        if rows != columns {
            return Err(GptqError::Features { what: "Hessian", expected: columns, found: rows });
        }
        check_finite(matrix.view())?;
        for ((row, column), &value) in matrix.indexed_iter() {
            if (row == column && value < 0.0) || value != matrix[[column, row]] {
                return Err(GptqError::NotSymmetric { row, column });
            }
        }
        Ok(Self { matrix, cross: None, samples })
    }

    /// Adds GPTAQ's second moment `2/n sum (x~ - x) x^T`, (in_features, in_features), x~ the inputs of the unquantised
    /// model and x those of the quantised one.
    ///
    /// # Errors
    /// If its shape is not the Hessian's, or an element is not finite.
    pub fn with_cross(mut self, cross: Array2<f64>) -> Result<Self, GptqError> {
        for found in [cross.nrows(), cross.ncols()] {
            if found != self.in_features() {
                return Err(GptqError::Features {
                    what: "cross moment",
                    expected: self.in_features(),
                    found,
                });
            }
        }
        check_finite(cross.view())?;
        self.cross = Some(cross);
        Ok(self)
    }

    /// The number of input features.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.matrix.ncols()
    }

    /// The number of calibration samples behind it.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// `2/n sum x x^T`, (in_features, in_features), symmetric.
    #[must_use]
    pub fn matrix(&self) -> ArrayView2<'_, f64> {
        self.matrix.view()
    }

    /// `2/n sum (x~ - x) x^T`, (in_features, in_features), if reference inputs were accumulated.
    #[must_use]
    pub fn cross(&self) -> Option<ArrayView2<'_, f64>> {
        self.cross.as_ref().map(|cross| cross.view())
    }

    /// `tr(E H E^T) / 2` for a weight error E (out_features, in_features): the squared error of the layer's output, summed
    /// over output features and averaged over samples. Undamped, so it compares any two ways to quantise a weight.
    ///
    /// # Errors
    /// If `error` has not as many columns as the Hessian.
    pub fn output_error(&self, error: ArrayView2<'_, f32>) -> Result<f64, GptqError> {
        let found = error.ncols();
        if found != self.in_features() {
            return Err(GptqError::Features { what: "weight error", expected: self.in_features(), found });
        }
        let error = error.mapv(f64::from);
        let product = error.dot(&self.matrix);
        Ok(product.iter().zip(&error).map(|(p, e)| p * e).sum::<f64>() / 2.0)
    }
}

fn check_finite(matrix: ArrayView2<'_, f64>) -> Result<(), GptqError> {
    // Without early exit inside a row, so that it vectorises.
    let finite = |row: ArrayView1<'_, f64>| row.iter().fold(true, |finite, x| finite & x.is_finite());
    let bad_row = matrix.outer_iter().into_par_iter().position_first(|row| !finite(row));
    match bad_row.and_then(|row| Some(row).zip(matrix.row(row).iter().position(|x| !x.is_finite()))) {
        Some((row, column)) => Err(GptqError::NonFiniteHessian { row, column, value: matrix[[row, column]] }),
        None => Ok(()),
    }
}
