//! What rounding to nearest would have cost, so that a loss means something.

use gptq_core::{GptqConfig, LayerReport, rtn};
use gptq_kernels::quantize::{QuantizeError, Quantizer};
use ndarray::{Array2, ArrayView2};

/// Rows of a weight whose rounding is measured. Their mean stands for all: the standard error of a mean over 64 rows is an
/// eighth of the spread between rows, and the cost is `64 in_features^2` operations instead of
/// `out_features in_features^2`.
const ROWS: usize = 64;

/// The rows of a weight of so many that are measured: evenly spaced, all if there are few.
pub(super) fn sample(rows: usize) -> Vec<usize> {
    (0..rows.min(ROWS)).map(|k| k * rows / rows.min(ROWS)).collect()
}

/// The sampled rows of a weight and the error `E` of rounding them, `(rows, in_features)`.
pub(super) struct Rounding {
    sampled: Array2<f32>,
    error: Array2<f32>,
    /// Rows of the weight for each that is measured.
    share: f64,
}

/// The quantisation error `E` of rounding under a Hessian, over all rows.
pub(super) struct Baseline {
    /// `tr(E H E^T) / 2`
    undamped: f64,
    /// `tr(W H W^T) / 2`
    norm: f64,
    /// `|E|^2`, without the columns that no token excites.
    square: f64,
    /// Mean of the Hessian's diagonal as damping sees it.
    mean_diagonal: f64,
}

impl Rounding {
    /// Rounds the [`sample`]d rows of a weight of `rows` rows; `None` if they cannot be rounded, which the quantiser will say
    /// better.
    pub(super) fn new(sampled: ArrayView2<'_, f32>, rows: usize, settings: &GptqConfig) -> Option<Self> {
        let error = &sampled - &rtn(sampled, settings).ok()?.dequantize();
        let share = rows as f64 / sampled.nrows() as f64;
        Some(Self { sampled: sampled.to_owned(), error, share })
    }
}

impl Baseline {
    /// Weighs an error by second moments on a device.
    pub(super) fn new<D: gptq_kernels::Device, Q: Quantizer<D>>(
        rounding: &Rounding,
        quantizer: &Q,
        moments: &Q::Moments,
    ) -> Result<Self, QuantizeError> {
        let Rounding { sampled, error, share } = rounding;
        let diagonal = quantizer.diagonal(moments);
        let square = |row: ndarray::ArrayView1<'_, f32>| -> f64 {
            let alive = row.iter().zip(&diagonal).filter(|(_, d)| **d != 0.0);
            alive.map(|(&e, _)| f64::from(e) * f64::from(e)).sum()
        };
        let sum: f64 = diagonal.iter().map(|&d| if d == 0.0 { 1.0 } else { d }).sum();
        Ok(Self {
            undamped: share * quantizer.output_error(moments, error.view())?,
            norm: share * quantizer.output_error(moments, sampled.view())?,
            square: share * error.rows().into_iter().map(square).sum::<f64>(),
            mean_diagonal: sum / diagonal.len() as f64,
        })
    }

    /// `tr(W H W^T) / 2`: what the layer puts out, in the unit of losses.
    pub(super) fn norm(&self) -> f64 {
        self.norm
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
    use gptq_kernels::cpu::CpuQuantizer;

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
        let rounding = Rounding::new(weight.view(), 8, &settings).unwrap();
        let quantizer = CpuQuantizer::new(settings.clone());
        let baseline = Baseline::new(&rounding, &quantizer, &hessian).unwrap();
        let report = Gptq::new(settings).quantize(weight.view(), hessian.clone()).unwrap().report;
        let (loss, rounding) = (report.loss.unwrap(), baseline.loss(&report).unwrap());
        // GPTQ's losses are sums of float32 squares, a part in 10^5 at most for 128 of them.
        assert!((loss / rounding - 1.0).abs() < 1e-5, "{loss} {rounding}");
        let norm = hessian.output_error(weight.view()).unwrap();
        assert!((baseline.norm() / norm - 1.0).abs() < 1e-12, "{} {norm}", baseline.norm());
    }
}
