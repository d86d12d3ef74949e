use std::{collections::HashMap, path::Path, sync::mpsc::SyncSender};

use ndarray::Array2;

use super::{LayerSink, LayerSummary, journal::Records, record::Finished};
use crate::{Layer, LlamaError};

/// Where finished layers go, and where those of an earlier run come from.
pub(super) trait Store {
    /// The summary of a layer that an earlier run has finished.
    fn finished(&self, layer: Layer) -> Option<&LayerSummary>;

    /// Such a layer's weight as the forward pass needs it, `(out_features, in_features)`: dequantised with scales in
    /// float32.
    fn weight(&mut self, layer: Layer) -> Result<Option<Array2<f32>>, LlamaError>;

    /// Folder for activations that do not fit in memory.
    fn folder(&self) -> Option<&Path>;

    /// Takes a finished layer.
    fn put(&mut self, finished: Finished) -> Result<(), LlamaError>;
}

/// Hands layers to a caller and remembers nothing.
pub(super) struct Forward<'a, 's>(pub(super) &'a mut LayerSink<'s>);

impl Store for Forward<'_, '_> {
    fn finished(&self, _: Layer) -> Option<&LayerSummary> {
        None
    }

    fn weight(&mut self, _: Layer) -> Result<Option<Array2<f32>>, LlamaError> {
        Ok(None)
    }

    fn folder(&self) -> Option<&Path> {
        None
    }

    fn put(&mut self, finished: Finished) -> Result<(), LlamaError> {
        (self.0)(finished.summary.layer, finished.packed)
    }
}

/// Hands layers to the thread that writes them, and has those of the run before.
pub(super) struct Resumed {
    pub(super) before: HashMap<Layer, LayerSummary>,
    pub(super) records: Records,
    pub(super) writer: SyncSender<Finished>,
}

impl Store for Resumed {
    fn finished(&self, layer: Layer) -> Option<&LayerSummary> {
        self.before.get(&layer)
    }

    fn weight(&mut self, layer: Layer) -> Result<Option<Array2<f32>>, LlamaError> {
        if self.before.contains_key(&layer) { self.records.weight(layer).map(Some) } else { Ok(None) }
    }

    fn folder(&self) -> Option<&Path> {
        Some(self.records.folder())
    }

    fn put(&mut self, finished: Finished) -> Result<(), LlamaError> {
        // The writer ends early only with an error of its own, which goes before this one.
        self.writer.send(finished).map_err(|_| LlamaError::Cancelled)
    }
}
