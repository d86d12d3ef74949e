//! Names and shapes of a decoder's linear layers.

use crate::{LlamaConfig, weights::LinearName};

/// A linear layer by its name in the checkpoint: those of a decoder layer, and the output layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Module {
    /// `self_attn.q_proj`
    Q,
    /// `self_attn.k_proj`
    K,
    /// `self_attn.v_proj`
    V,
    /// `self_attn.o_proj`
    O,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
    /// `lm_head`, which belongs to no decoder layer.
    LmHead,
}

impl Module {
    /// Those of a decoder layer, in the order of the forward pass.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The name within a decoder layer; that of the output layer within the model.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
            Self::LmHead => LM_HEAD,
        }
    }

    /// `(in_features, out_features)`
    pub fn shape(self, config: &LlamaConfig) -> (usize, usize) {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        match self {
            Self::Q => (hidden, config.q_features()),
            Self::K | Self::V => (hidden, config.kv_features()),
            Self::O => (config.q_features(), hidden),
            Self::Gate | Self::Up => (hidden, inner),
            Self::Down => (inner, hidden),
            Self::LmHead => (hidden, config.vocab_size),
        }
    }
}

/// One linear layer of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Layer {
    /// Number of the decoder layer; for the output layer the number of decoder layers.
    pub layer: usize,
    /// Which of its linear layers.
    pub module: Module,
}

impl std::fmt::Display for Layer {
    /// The name in a checkpoint, without `.weight`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.module {
            Module::LmHead => f.write_str(LM_HEAD),
            module => write!(f, "{}{}", layer_prefix(self.layer), module.name()),
        }
    }
}

impl Layer {
    /// The output layer.
    pub fn lm_head(config: &LlamaConfig) -> Self {
        Self { layer: config.layers, module: Module::LmHead }
    }

    /// All linear layers but the output layer, in the order of the forward pass.
    pub(crate) fn of_decoder(config: &LlamaConfig) -> impl Iterator<Item = Self> + use<> {
        (0..config.layers).flat_map(|layer| Module::ALL.into_iter().map(move |module| Self { layer, module }))
    }

    pub(crate) fn linear(self, config: &LlamaConfig) -> LinearName {
        let (in_features, out_features) = self.module.shape(config);
        let bias = match self.module {
            Module::Q | Module::K | Module::V => config.qkv_bias,
            Module::O => config.o_bias,
            Module::Gate | Module::Up | Module::Down => config.mlp_bias,
            Module::LmHead => false,
        };
        LinearName { module: self.to_string(), in_features, out_features, bias }
    }
}

pub(crate) fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const FINAL_NORM: &str = "model.norm.weight";
pub(crate) const LM_HEAD: &str = "lm_head";
pub(crate) const INPUT_NORM: &str = "input_layernorm.weight";
pub(crate) const POST_NORM: &str = "post_attention_layernorm.weight";
