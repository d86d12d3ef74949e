//! How much must be added to the diagonal before the Hessian can be factorised.

use ndarray::{Array2, ArrayView2, Axis, Zip};

use crate::config::GptqConfig;
use crate::error::NotPositiveDefinite;
use crate::factorize::Factorize;
use crate::order::ColumnOrder;
use crate::report::DampReport;

/// Diagonal floors tried when no damping below 1 suffices: `1e-6 * 10^(k - 1)` of the largest diagonal element.
const FLOORS: i32 = 6;

/// A Hessian in the order of quantisation, waiting for its damping.
pub(crate) struct Damping<'a> {
    pub(crate) matrix: ArrayView2<'a, f64>,
    /// In original order, dead columns already set to 1.
    pub(crate) diagonal: &'a [f64],
    pub(crate) order: &'a ColumnOrder,
}

/// No damping sufficed.
#[derive(Debug)]
pub(crate) struct DampingFailure {
    pub(crate) last_damp: f64,
    pub(crate) source: NotPositiveDefinite,
}

impl Damping<'_> {
    /// Factorises with the smallest damping of the grid `d, d + increment, ... < 1` that suffices; if none does, with the
    /// smallest diagonal floor with which one does.
    ///
    /// A larger damping keeps a matrix positive definite, so the grid is bisected, with the outcome of a linear walk.
    pub(crate) fn factorize(
        &self,
        config: &GptqConfig,
        factorizer: &impl Factorize,
    ) -> Result<(Array2<f64>, DampReport), DampingFailure> {
        let mut grid = vec![config.damp_percent()];
        if config.damp_auto_increment() > 0.0 {
            // Summed step by step, as the references do, so that the grid has the same values.
            let mut damp = config.damp_percent() + config.damp_auto_increment();
            while damp < 1.0 {
                grid.push(damp);
                damp += config.damp_auto_increment();
            }
        }
        let largest = self.diagonal.iter().fold(0.0f64, |largest, d| largest.max(d.abs()));
        let floors = if config.damp_auto_increment() > 0.0 { FLOORS } else { 0 };
        let mut failure = None;
        for attempt in 0..=floors {
            let floor = if attempt == 0 { 0.0 } else { largest * 1e-6 * 10f64.powi(attempt - 1) };
            match self.smallest(&grid, floor, factorizer) {
                Ok((upper, raised)) => {
                    let percent = grid[raised];
                    let report = DampReport { percent, raised: raised as u32, floor };
                    if report.raised > 0 || report.floor > 0.0 {
                        tracing::warn!(
                            asked = config.damp_percent(),
                            used = percent,
                            raised,
                            floor,
                            "Hessian was not positive definite: damping raised"
                        );
                    }
                    return Ok((upper, report));
                }
                Err(source) => failure = Some(source),
            }
        }
        let source =
            failure.expect("invariant: the loop ran at least once and only failures reach this line");
        Err(DampingFailure { last_damp: grid[grid.len() - 1], source })
    }

    /// The first index of `grid` whose damping suffices, and the factor with it.
    fn smallest(
        &self,
        grid: &[f64],
        floor: f64,
        factorizer: &impl Factorize,
    ) -> Result<(Array2<f64>, usize), NotPositiveDefinite> {
        let attempt = |index: usize| factorizer.inverse_cholesky(self.damped(grid[index], floor));
        let first_failure = match attempt(0) {
            Ok(upper) => return Ok((upper, 0)),
            Err(failure) => failure,
        };
        let (mut fails, mut suffices) = (0, grid.len() - 1);
        if suffices == 0 {
            return Err(first_failure);
        }
        // Only the newest factor is kept: memory is worth more here than one more factorisation in a rare case.
        let mut newest = Some((attempt(suffices)?, suffices));
        while suffices - fails > 1 {
            newest = None;
            let middle = fails.midpoint(suffices);
            match attempt(middle) {
                Ok(upper) => {
                    suffices = middle;
                    newest = Some((upper, middle));
                }
                Err(_) => fails = middle,
            }
        }
        match newest {
            Some((upper, index)) if index == suffices => Ok((upper, index)),
            _ => Ok((attempt(suffices)?, suffices)),
        }
    }

    /// The matrix in the order of quantisation with `damp` times its mean diagonal, and `floor`, added to its diagonal.
    fn damped(&self, damp: f64, floor: f64) -> Array2<f64> {
        let columns = self.diagonal.len();
        let diagonal = |column: usize| (self.diagonal[column] + floor).max(floor);
        let mean = (0..columns).map(diagonal).sum::<f64>() / columns as f64;
        let mut damped = Array2::zeros((columns, columns));
        Zip::indexed(damped.axis_iter_mut(Axis(0))).par_for_each(|position, mut row| {
            let column = self.order.column[position];
            let source = self.matrix.row(column);
            for (x, &other) in row.iter_mut().zip(&self.order.column) {
                *x = source[other];
            }
            row[position] = diagonal(column) + damp * mean;
        });
        damped
    }
}
