use gptq_format::PackedLinear;
use ndarray::Array2;

use super::{LayerSink, LayerSummary};
use crate::{Layer, LlamaError};

/// Where finished layers go, and where those of an earlier run come from.
pub(super) trait Store {
    /// Such a layer's weight as the forward pass needs it; `None` if it turns out that it has to be quantised again.
    fn recover(&mut self, layer: Layer) -> Result<Option<Recovered>, LlamaError>;

    /// Takes a finished layer.
    fn put(&mut self, finished: Finished) -> Result<(), LlamaError>;
}

/// A quantised layer.
pub(super) struct Finished {
    pub(super) packed: PackedLinear,
    pub(super) summary: LayerSummary,
}

/// A layer that an earlier run has quantised.
pub(super) struct Recovered {
    /// Dequantised with scales in float32, `(out_features, in_features)`.
    pub(super) weight: Array2<f32>,
    pub(super) summary: LayerSummary,
}

/// Hands layers to a caller and remembers nothing.
pub(super) struct Forward<'a, 's>(pub(super) &'a mut LayerSink<'s>);

impl Store for Forward<'_, '_> {
    fn recover(&mut self, _: Layer) -> Result<Option<Recovered>, LlamaError> {
        Ok(None)
    }

    fn put(&mut self, finished: Finished) -> Result<(), LlamaError> {
        (self.0)(finished.summary.layer, finished.packed)
    }
}
