use std::{borrow::Cow, collections::HashMap};

use gptq_format::PackedLinear;

use super::{Tensor, TensorData, WeightSource};
use crate::{
    Layer, LlamaConfig, LlamaError, Rng,
    names::{self, Module},
};

/// Weights in memory, possibly in front of another source.
///
/// ```
/// use gptq_kernels::cpu::Cpu;
/// use gptq_llama::{GenerateOptions, Llama, LlamaConfig, LoadOptions, MemoryWeights, generate};
///
/// let config = LlamaConfig::from_json(
///     r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
///         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}"#,
/// )
/// .unwrap();
/// let weights = MemoryWeights::random(&config, 1);
/// let model = Llama::from_source(config, &weights, Cpu, &LoadOptions::default())?;
/// let options = GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() };
/// let text = generate(&model, &[1, 2, 3], options, |_| std::ops::ControlFlow::Continue(()))?;
/// assert_eq!(text.len(), 5);
/// # Ok::<(), gptq_llama::LlamaError>(())
/// ```
#[derive(Default)]
pub struct MemoryWeights<'a> {
    tensors: HashMap<String, Tensor<'static>>,
    packed: HashMap<String, PackedLinear>,
    behind: Option<&'a dyn WeightSource>,
}

impl<'a> MemoryWeights<'a> {
    /// No weights yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What is not here is looked up in `source`.
    pub fn in_front_of(source: &'a dyn WeightSource) -> Self {
        Self { behind: Some(source), ..Self::default() }
    }

    /// Adds a float32 tensor, row-major.
    ///
    /// Errors: [`LlamaError::TensorShape`] if there are more or fewer numbers than the shape says.
    pub fn insert(&mut self, name: &str, shape: &[usize], data: Vec<f32>) -> Result<(), LlamaError> {
        if shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size)) != Some(data.len()) {
            return Err(LlamaError::TensorShape {
                tensor: name.to_owned(),
                expected: shape.to_vec(),
                got: vec![data.len()],
            });
        }
        let tensor = Tensor { shape: shape.to_vec(), data: TensorData::F32(Cow::Owned(data)) };
        self.tensors.insert(name.to_owned(), tensor);
        Ok(())
    }

    /// Adds a quantised layer. It hides a dense one of the same name.
    pub fn insert_packed(&mut self, module: &str, layer: PackedLinear) {
        self.packed.insert(module.to_owned(), layer);
    }

    /// A dense model with random weights: uniform, with a variance of `1 / in_features` for linear layers and of 1 for
    /// the embedding; norms are 1, biases small. For tests and benches.
    pub fn random(config: &LlamaConfig, seed: u64) -> Self {
        let mut weights = Self::new();
        let mut rng = Rng::new(seed);
        let mut uniform = |len: usize, deviation: f64| -> Vec<f32> {
            let width = 12f64.sqrt() * deviation;
            (0..len).map(|_| ((rng.next_f64() - 0.5) * width) as f32).collect()
        };
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let mut put = |name: String, shape: &[usize], data| {
            let tensor = Tensor { shape: shape.to_vec(), data: TensorData::F32(Cow::Owned(data)) };
            weights.tensors.insert(name, tensor);
        };
        put(names::EMBEDDING.to_owned(), &[vocabulary, hidden], uniform(vocabulary * hidden, 1.0));
        put(names::FINAL_NORM.to_owned(), &[hidden], vec![1.0; hidden]);
        if !config.tie_word_embeddings {
            let head = uniform(vocabulary * hidden, 1.0 / (hidden as f64).sqrt());
            put(format!("{}.weight", names::LM_HEAD), &[vocabulary, hidden], head);
        }
        for layer in 0..config.layers {
            for norm in [names::INPUT_NORM, names::POST_NORM] {
                put(format!("{}{norm}", names::layer_prefix(layer)), &[hidden], vec![1.0; hidden]);
            }
            for module in Module::ALL {
                let name = Layer { layer, module }.linear(config);
                let (inputs, outputs) = (name.in_features, name.out_features);
                let weight = uniform(outputs * inputs, 1.0 / (inputs as f64).sqrt());
                put(format!("{}.weight", name.module), &[outputs, inputs], weight);
                if name.bias {
                    put(format!("{}.bias", name.module), &[outputs], uniform(outputs, 0.1));
                }
            }
        }
        weights
    }
}

impl WeightSource for MemoryWeights<'_> {
    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, LlamaError> {
        match (self.tensors.get(name), self.behind) {
            (Some(tensor), _) => {
                Ok(Some(Tensor { shape: tensor.shape.clone(), data: tensor.data.reborrow() }))
            }
            (None, Some(source)) => source.tensor(name),
            (None, None) => Ok(None),
        }
    }

    fn packed(&self, module: &str) -> Result<Option<PackedLinear>, LlamaError> {
        match (self.packed.get(module), self.behind) {
            (Some(layer), _) => Ok(Some(layer.clone())),
            (None, Some(source)) => source.packed(module),
            (None, None) => Ok(None),
        }
    }
}
