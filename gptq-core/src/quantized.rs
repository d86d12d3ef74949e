//! The result: [`QuantizedWeight`].

use ndarray::{Array2, Zip};

use crate::report::LayerReport;

/// Integer codes of one weight and the grids they count on.
///
/// `weight[o, i] ~ scales[o, g_idx[i]] * (codes[o, i] - zeros[o, g_idx[i]])`.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedWeight {
    /// (out_features, in_features), columns in their original order, each at most `2^bits - 1`.
    pub codes: Array2<u8>,
    /// (out_features, groups).
    pub scales: Array2<f32>,
    /// (out_features, groups), true zeros: no offset of any file format is applied.
    pub zeros: Array2<u8>,
    /// The group of each input feature.
    pub g_idx: Vec<u32>,
    /// How it went.
    pub report: LayerReport,
}

impl QuantizedWeight {
    /// The weight that the codes stand for, (out_features, in_features), in float32 arithmetic.
    #[must_use]
    pub fn dequantize(&self) -> Array2<f32> {
        let mut weight = Array2::zeros(self.codes.raw_dim());
        Zip::from(weight.rows_mut())
            .and(self.codes.rows())
            .and(self.scales.rows())
            .and(self.zeros.rows())
            .par_for_each(|mut weight, codes, scales, zeros| {
                for ((weight, &code), &group) in weight.iter_mut().zip(codes).zip(&self.g_idx) {
                    let group = group as usize;
                    *weight = scales[group] * (f32::from(code) - f32::from(zeros[group]));
                }
            });
        weight
    }
}
