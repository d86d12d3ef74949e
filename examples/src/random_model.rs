//! Models of real shapes with random int4 weights, made layer by layer when they are asked for.

use std::borrow::Cow;

use gptq_format::{Bits, PackedLinear, PackedParts};
use gptq_llama::{LlamaConfig, LlamaError, Module, Rng, Tensor, TensorData, WeightSource};
use half::{bf16, f16};
use rayon::prelude::*;

/// Features of a group.
pub const GROUP: usize = 128;

/// How random weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// 4 bits in symmetric groups of 128.
    Int4,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

/// Random weights of a decoder.
///
/// No quantiser is involved: codes are random words, and one scale a layer gives its weights a variance of
/// `1 / in_features`, so that activations keep their size from layer to layer.
pub struct RandomModel {
    config: LlamaConfig,
    layers: Weights,
    head: Weights,
    dense: Weights,
    act_order: bool,
}

impl RandomModel {
    /// A model of this shape: its decoder layers, its output projection, and embedding and norms, which are never int4.
    pub fn new(config: LlamaConfig, layers: Weights, head: Weights, dense: Weights) -> Self {
        let dense = if dense == Weights::Int4 { Weights::Bf16 } else { dense };
        Self { config, layers, head, dense, act_order: false }
    }

    /// With the input features of int4 layers in random groups, as `desc_act` makes them: those of layers with the same input
    /// are the same.
    #[must_use]
    pub fn with_act_order(mut self, act_order: bool) -> Self {
        self.act_order = act_order;
        self
    }

    /// Whether it is [`with_act_order`](Self::with_act_order).
    pub fn act_order(&self) -> bool {
        self.act_order
    }

    /// Groups of a layer's input features.
    fn g_idx(&self, module: &str, in_features: usize) -> Vec<u32> {
        let mut g_idx: Vec<u32> = (0..in_features as u32).map(|i| i / GROUP as u32).collect();
        if self.act_order {
            let input = match module_of(module) {
                Some(Module::Q | Module::K | Module::V) => "qkv",
                Some(Module::Gate | Module::Up) => "gate and up",
                _ => module,
            };
            let layer = module.rsplit_once('.').map_or("", |(layer, _)| layer);
            let mut rng = Self::rng(&format!("order of {layer} {input}"));
            for i in (1..in_features).rev() {
                g_idx.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
            }
        }
        g_idx
    }

    /// A seed of each tensor's own, whatever the order of loading (FNV-1a of the name).
    fn rng(name: &str) -> Rng {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Rng::new(hash)
    }

    fn dense(name: &str, shape: &[usize], deviation: f64, weights: Weights) -> Tensor<'static> {
        let len: usize = shape.iter().product();
        // A 16-bit uniform has a variance of 2^32 / 12.
        let scale = (deviation * 12f64.sqrt() / 65_536.0) as f32;
        let first = Self::rng(name).next_u64();
        let data = if weights == Weights::F16 {
            TensorData::F16(Cow::Owned(fill(len, first, |x| f16::from_f32(x * scale))))
        } else {
            TensorData::Bf16(Cow::Owned(fill(len, first, |x| bf16::from_f32(x * scale))))
        };
        Tensor { shape: shape.to_vec(), data }
    }

    fn int4(&self, name: &str, in_features: usize, out_features: usize) -> Result<PackedLinear, LlamaError> {
        let first = Self::rng(name).next_u64();
        let words = Bits::B4.words(in_features) * out_features;
        let mut qweight = vec![0; words];
        qweight.par_chunks_mut(1 << 16).enumerate().for_each(|(i, block)| {
            let mut rng = Rng::new(first.wrapping_add(i as u64));
            for pair in block.chunks_mut(2) {
                let word = rng.next_u64();
                for (part, to) in pair.iter_mut().enumerate() {
                    *to = without_zeros((word >> (32 * part)) as u32);
                }
            }
        });
        let groups = in_features.div_ceil(GROUP);
        // Codes of 1..=15, 8 twice as often, have a mean square of 17.5 around 8.
        let scale = f16::from_f64(1.0 / (17.5 * in_features as f64).sqrt());
        let zeros = Bits::B4.words(out_features);
        PackedLinear::from_parts(PackedParts {
            bits: Bits::B4,
            group_size: GROUP.min(in_features),
            in_features,
            out_features,
            qweight,
            qzeros: vec![0x8888_8888; groups * zeros],
            scales: vec![scale; groups * out_features],
            g_idx: self.g_idx(name, in_features),
            bias: None,
        })
        .map_err(|source| LlamaError::Pack { tensor: name.to_owned(), source })
    }

    /// Weights in linear layers, the output projection included.
    pub fn linear_weights(&self) -> usize {
        let layer: usize = Module::ALL
            .iter()
            .map(|module| {
                let (inputs, outputs) = module.shape(&self.config);
                inputs * outputs
            })
            .sum();
        layer * self.config.layers + self.config.vocab_size * self.config.hidden_size
    }
}

/// `len` numbers made of 16-bit uniforms, in parallel; every block of them has a generator of its own.
fn fill<E: Send + Copy + Default>(len: usize, seed: u64, make: impl Fn(f32) -> E + Sync) -> Vec<E> {
    let mut data = vec![E::default(); len];
    data.par_chunks_mut(1 << 16).enumerate().for_each(|(i, block)| {
        let mut rng = Rng::new(seed.wrapping_add(i as u64));
        for four in block.chunks_mut(4) {
            let word = rng.next_u64();
            for (part, x) in four.iter_mut().enumerate() {
                *x = make(f32::from((word >> (16 * part)) as u16 as i16));
            }
        }
    });
    data
}

impl WeightSource for RandomModel {
    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, LlamaError> {
        let (vocabulary, hidden) = (self.config.vocab_size, self.config.hidden_size);
        if name.ends_with("norm.weight") {
            let data = match self.dense {
                Weights::F16 => TensorData::F16(Cow::Owned(vec![f16::ONE; hidden])),
                _ => TensorData::Bf16(Cow::Owned(vec![bf16::ONE; hidden])),
            };
            return Ok(Some(Tensor { shape: vec![hidden], data }));
        }
        let linear = |inputs: usize, outputs: usize, weights| {
            Some(Self::dense(name, &[outputs, inputs], 1.0 / (inputs as f64).sqrt(), weights))
        };
        Ok(match name {
            "model.embed_tokens.weight" => Some(Self::dense(name, &[vocabulary, hidden], 1.0, self.dense)),
            "lm_head.weight" => linear(hidden, vocabulary, self.head),
            _ => match module_of(name.trim_end_matches(".weight")) {
                Some(module) if name.ends_with(".weight") => {
                    let (inputs, outputs) = module.shape(&self.config);
                    linear(inputs, outputs, self.layers)
                }
                _ => None,
            },
        })
    }

    fn packed(&self, module: &str) -> Result<Option<PackedLinear>, LlamaError> {
        let (weights, (inputs, outputs)) = match module_of(module) {
            _ if module == "lm_head" => (self.head, (self.config.hidden_size, self.config.vocab_size)),
            Some(found) => (self.layers, found.shape(&self.config)),
            None => return Ok(None),
        };
        (weights == Weights::Int4).then(|| self.int4(module, inputs, outputs)).transpose()
    }
}

/// The codes of a word with 8 in place of 0, so that their mean is 8. Around another mean, a layer would amplify what its
/// inputs have in common by a multiple of `sqrt(in_features)`: in the shape of 70B fp16 then overflows.
fn without_zeros(word: u32) -> u32 {
    let any = (word | word >> 1 | word >> 2 | word >> 3) & 0x1111_1111;
    word | (any ^ 0x1111_1111) << 3
}

fn module_of(name: &str) -> Option<Module> {
    Module::ALL.into_iter().find(|module| name.ends_with(module.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_becomes_eight() {
        assert_eq!(without_zeros(0x0f01_8200), 0x8f81_8288);
    }

    #[test]
    fn weights_have_the_variance_they_should() {
        let config = LlamaConfig::from_json(
            r#"{"model_type": "llama", "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 1,
                "num_attention_heads": 4, "vocab_size": 64}"#,
        )
        .unwrap();
        let model = RandomModel::new(config, Weights::Int4, Weights::Int4, Weights::F16);
        let layer = |name| model.int4(name, 512, 64).unwrap();
        let weight = layer("a").dequantize();
        let mean = weight.iter().map(|w| f64::from(w * w)).sum::<f64>() / weight.len() as f64;
        // 32768 squares; their relative deviation is below 1, so five standard errors are 3 %, and fp16 adds 0.1 %.
        assert!((mean * 512.0 - 1.0).abs() < 0.03, "{mean}");
        // And five of the mean, in units of a weight's deviation.
        let mean = weight.iter().map(|&w| f64::from(w)).sum::<f64>() / weight.len() as f64;
        assert!((mean * 512f64.sqrt()).abs() < 0.03, "{mean}");
        assert_eq!(weight, layer("a").dequantize());
        assert_ne!(weight, layer("b").dequantize());

        let model = model.with_act_order(true);
        let order = |name: &str| model.packed(name).unwrap().unwrap().group_order().unwrap();
        let q = "model.layers.0.self_attn.q_proj";
        assert_eq!(order(q), order(&q.replace('q', "v")));
        assert_ne!(order(q), order(&q.replace('q', "o")));
        assert_ne!(order(q), order(&q.replace("s.0", "s.1")));
    }
}
