//! The decoder.

mod capacity;
mod forward;
mod load;
mod norm;
mod step;

use gptq_kernels::{AttentionShape, Backend, KvFormat, Linear};

pub use forward::{Feed, Logits, Wanted};
pub use load::LoadOptions;
pub(crate) use load::{attention_shape, load_norm};
pub use step::{Drawing, Next, Turn};

use crate::{KvCache, LlamaConfig, LlamaError, projections::Projections};
use norm::OrderedNorm;

/// A decoder that is ready to run on a device; its layers are dense or quantised, in any mixture.
///
/// ```text
/// h = embedding[token]
/// each layer:  h += o(attention(rope(q, k, v of norm(h))));  h += down(silu(gate) * up of norm(h))
/// logits = lm_head(norm(h))
/// ```
///
/// Layers that are act-ordered take their input in their own order ([`Linear::input_order`]): norms and attention write it
/// that way, and gate and up have their outputs permuted when they are loaded.
pub struct Llama<D: Backend> {
    /// Tells recordings of this model's steps from those of others.
    id: u64,
    device: D,
    config: LlamaConfig,
    /// Of its caches.
    kv: KvFormat,
    embedding: D::Embedding,
    layers: Vec<DecoderLayer<D>>,
    norm: OrderedNorm<D>,
    lm_head: Box<dyn Linear<D>>,
}

struct DecoderLayer<D: Backend> {
    attention: AttentionShape,
    input_norm: OrderedNorm<D>,
    qkv: Projections<D>,
    /// In which o takes what attention gives.
    attention_order: Option<D::Order>,
    o: Box<dyn Linear<D>>,
    post_norm: OrderedNorm<D>,
    gate_up: Projections<D>,
    down: Box<dyn Linear<D>>,
}

impl<D: Backend> Llama<D> {
    /// The configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// All linear layers, the output projection last.
    pub fn linears(&self) -> impl Iterator<Item = &dyn Linear<D>> {
        let layers = self.layers.iter().flat_map(|layer| {
            layer
                .qkv
                .linears()
                .chain([layer.o.as_ref()])
                .chain(layer.gate_up.linears())
                .chain([layer.down.as_ref()])
        });
        layers.chain([self.lm_head.as_ref()])
    }

    /// Bytes of linear weights that one forward pass reads.
    pub fn weight_bytes(&self) -> usize {
        self.linears().map(|linear| linear.weight_bytes()).sum()
    }

    /// An empty cache for sequences of up to `max_tokens` tokens, of the format that [`LoadOptions::kv`] has said.
    pub fn cache(&self, max_tokens: usize) -> Result<KvCache<D>, LlamaError> {
        KvCache::new(&self.device, &self.config, max_tokens, self.kv)
    }
}
