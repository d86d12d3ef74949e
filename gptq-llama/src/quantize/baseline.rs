//! What rounding to nearest would have cost, so that a loss means something.

use gptq_core::{GptqConfig, Hessian, LayerReport, rtn};
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;

/// Rows of a weight whose rounding is measured. Their mean stands for all: the standard error of a mean over 64 rows is an
/// eighth of the spread between rows, and the cost is `64 in_features^2` operations instead of
/// `out_features in_features^2`.
const ROWS: usize = 64;
/// Rows of a task.
const CHUNK: usize = 16;

/// The quantisation error `E` of rounding under a Hessian, over all rows.
pub(super) struct Baseline {
    /// `tr(E H E^T) / 2`
    undamped: f64,
    /// `|E|^2`, without the columns that no token excites.
    square: f64,
    /// Mean of the Hessian's diagonal as damping sees it.
    mean_diagonal: f64,
}

impl Baseline {
    /// Measures the rounding of `weight` `(out_features, in_features)`; `None` if it cannot be rounded, which the quantiser
    /// will say better.
    pub(super) fn new(weight: ArrayView2<'_, f32>, hessian: &Hessian, settings: &GptqConfig) -> Option<Self> {
        let rows = weight.nrows();
        let sample: Vec<usize> = (0..rows.min(ROWS)).map(|k| k * rows / rows.min(ROWS)).collect();
        let weight = weight.select(Axis(0), &sample);
        let error = &weight - &rtn(weight.view(), settings).ok()?.dequantize();
        let diagonal = hessian.matrix().diag().mapv(|d| if d == 0.0 { 1.0 } else { d });
        let dead: Vec<bool> = hessian.matrix().diag().iter().map(|&d| d == 0.0).collect();
        let chunks: Vec<_> = error.axis_chunks_iter(Axis(0), CHUNK).collect();
        let undamped: Vec<f64> =
            chunks.into_par_iter().map(|chunk| hessian.output_error(chunk).ok()).collect::<Option<_>>()?;
        let square = |error: &Array2<f32>| -> f64 {
            let row = |row: ndarray::ArrayView1<'_, f32>| -> f64 {
                row.iter()
                    .zip(&dead)
                    .filter(|(_, dead)| !**dead)
                    .map(|(&e, _)| f64::from(e) * f64::from(e))
                    .sum()
            };
            error.rows().into_iter().map(row).sum()
        };
        let share = rows as f64 / sample.len() as f64;
        Some(Self {
            undamped: share * undamped.iter().sum::<f64>(),
            square: share * square(&error),
            mean_diagonal: diagonal.mean().unwrap_or(0.0),
        })
    }

    /// The loss in the sense of [`LayerReport::loss`], `tr(E (H + d) E^T) / 2` with the damping `d` that the quantiser used.
    pub(super) fn loss(&self, report: &LayerReport) -> Option<f64> {
        let damp = report.damp?;
        let added = damp.floor + damp.percent * (self.mean_diagonal + damp.floor);
        Some(self.undamped + added * self.square / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use gptq_core::{Gptq, HessianAccumulator};

    use super::*;

    /// A Hessian whose off-diagonal is zero leaves GPTQ nothing to compensate, so that it rounds, and both losses agree.
    #[test]
    fn without_correlations_gptq_is_rounding() {
        let mut inputs = Array2::zeros((16, 16));
        for i in 0..16 {
            inputs[[i, i]] = 1.0 + i as f32 / 8.0;
        }
        let mut sums = HessianAccumulator::new(16);
        sums.add_batch(inputs.view()).unwrap();
        let hessian = sums.finish().unwrap();
        let weight = Array2::from_shape_fn((8, 16), |(o, i)| ((o * 13 + i * 7) % 17) as f32 / 5.0 - 1.5);
        let settings = GptqConfig::builder().group_size(Some(8)).build().unwrap();
        let baseline = Baseline::new(weight.view(), &hessian, &settings).unwrap();
        let report = Gptq::new(settings).quantize(weight.view(), hessian).unwrap().report;
        let (loss, rounding) = (report.loss.unwrap(), baseline.loss(&report).unwrap());
        // GPTQ's losses are sums of float32 squares, a part in 10^5 at most for 128 of them.
        assert!((loss / rounding - 1.0).abs() < 1e-5, "{loss} {rounding}");
    }
}
