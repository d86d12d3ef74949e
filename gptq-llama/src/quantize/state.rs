//! What the walk through the decoder and the solution of its layers share.

use gptq_kernels::{DenseType, LinearKernel, Selector, quantize::QuantizeBackend};

use super::{
    LayerSummary, QuantizeOptions, RowsMoved, RunTimes, calibrate::Stream, layer::Stage, plan::Plan,
    quantizers::Quantizers, store::Store,
};
use crate::{LlamaConfig, Precision, WeightSource, progress::Reporter, projections::Preparation};

/// Share of a stage's time that is forward pass and Hessian, for the estimate of the time left.
pub(super) const SHARE_OF_CALIBRATION: f64 = 0.8;

/// Parts of equal weight in the estimate of a layer's time: the stages, and the way to the next layer.
pub(super) const PARTS: usize = Stage::ALL.len() + 1;

/// How layers are prepared that calibration rows pass.
pub(super) fn preparation<D: QuantizeBackend>(kernels: &[Box<dyn LinearKernel<D>>]) -> Preparation<'_, D> {
    // Activations in half precision are what a GPU has; where there is more, weights are all that is measured.
    let precision = if D::ELEMENT == DenseType::F32 { Precision::Float32 } else { Precision::Fast };
    Preparation { kernels, kernel: None, precision, in_order: false, selector: Selector::new() }
}

/// What stays the same from layer to layer.
pub(super) struct Run<'r, 'w, 'a, D: QuantizeBackend> {
    pub(super) device: &'r D,
    pub(super) config: &'r LlamaConfig,
    pub(super) source: &'r dyn WeightSource,
    pub(super) preparation: &'r Preparation<'r, D>,
    pub(super) quantizers: &'r Quantizers<D>,
    pub(super) options: &'r QuantizeOptions,
    pub(super) plan: &'r Plan,
    /// The last decoder layer in which something is left to do; behind all for the output layer.
    pub(super) last: usize,
    pub(super) reporter: Reporter<'w, 'a>,
    pub(super) store: &'r mut dyn Store,
    pub(super) layers: Vec<LayerSummary>,
    /// How often rows had to leave the device.
    pub(super) moved: Vec<RowsMoved>,
    pub(super) times: RunTimes,
}

impl<D: QuantizeBackend> Run<'_, '_, '_, D> {
    /// Notes rows of a stream that had to leave the device.
    pub(super) fn note_moved(&mut self, layer: usize, stream: &mut Stream<D>) {
        let evicted = stream.take_evicted().into_iter();
        self.moved.extend(evicted.map(|rows| RowsMoved { layer, moved: rows.moved, kept: rows.kept }));
    }
}
