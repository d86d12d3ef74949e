use gptq_kernels::{AttentionShape, quantize::QuantizeBackend};

use crate::{
    Layer, LlamaConfig, LlamaError, Module, WeightSource,
    model::{attention_shape, load_norm},
    names,
    projections::Projections,
};

/// Linear layers that share an input, in the order of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Qkv = 0,
    O = 1,
    GateUp = 2,
    Down = 3,
}

impl Stage {
    pub(super) const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    pub(super) fn modules(self) -> &'static [Module] {
        match self {
            Self::Qkv => &[Module::Q, Module::K, Module::V],
            Self::O => &[Module::O],
            Self::GateUp => &[Module::Gate, Module::Up],
            Self::Down => &[Module::Down],
        }
    }

    /// Its layers in decoder layer `layer`.
    pub(super) fn layers(self, layer: usize) -> Vec<Layer> {
        self.modules().iter().map(|&module| Layer { layer, module }).collect()
    }

    /// The stage that a layer belongs to; none for the output layer.
    pub(super) fn of(module: Module) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| stage.modules().contains(&module))
    }
}

/// A decoder layer whose linear layers come one stage after the other.
pub(super) struct Decoder<D: QuantizeBackend> {
    pub(super) attention: AttentionShape,
    pub(super) input_norm: D::Buffer,
    pub(super) post_norm: D::Buffer,
    stages: [Option<Projections<D>>; 4],
}

impl<D: QuantizeBackend> Decoder<D> {
    /// The norms of a layer.
    pub(super) fn load(
        device: &D,
        config: &LlamaConfig,
        source: &dyn WeightSource,
        layer: usize,
    ) -> Result<Self, LlamaError> {
        let norm = |name| {
            load_norm(device, source, &format!("{}{name}", names::layer_prefix(layer)), config.hidden_size)
        };
        Ok(Self {
            attention: attention_shape(config, layer),
            input_norm: norm(names::INPUT_NORM)?,
            post_norm: norm(names::POST_NORM)?,
            stages: [None, None, None, None],
        })
    }

    pub(super) fn set(&mut self, stage: Stage, projections: Projections<D>) {
        self.stages[stage as usize] = Some(projections);
    }

    /// Panics if the stage has not been set: a row is never taken through a stage before it is quantised.
    pub(super) fn stage(&self, stage: Stage) -> &Projections<D> {
        self.stages[stage as usize].as_ref().expect("invariant: stages are set in the order of use")
    }
}
