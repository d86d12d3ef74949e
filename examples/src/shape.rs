//! Shapes of real models.

use clap::ValueEnum;
use gptq_llama::LlamaConfig;

use crate::failure::Failure;

/// A real model's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// 4 layers of 256 features.
    #[value(name = "tiny")]
    Tiny,
    /// TinyLlama-1.1B.
    #[value(name = "tinyllama-1.1b")]
    Tinyllama,
    /// Llama-2-7B.
    #[value(name = "llama-2-7b")]
    Llama2With7b,
    /// Llama-3-8B.
    #[value(name = "llama-3-8b")]
    Llama3With8b,
    /// Llama-2-13B.
    #[value(name = "llama-2-13b")]
    Llama2With13b,
    /// Llama-2-70B.
    #[value(name = "llama-2-70b")]
    Llama2With70b,
}

impl Shape {
    /// The configuration as Hugging Face writes it, with so many decoder layers, or those of the model.
    pub fn json(self, positions: usize, layers: Option<usize>) -> String {
        let [hidden, inner, own_layers, heads, kv_heads, vocabulary] = match self {
            Self::Tiny => [256, 768, 4, 4, 2, 2048],
            Self::Tinyllama => [2048, 5632, 22, 32, 4, 32_000],
            Self::Llama2With7b => [4096, 11_008, 32, 32, 32, 32_000],
            Self::Llama3With8b => [4096, 14_336, 32, 32, 8, 128_256],
            Self::Llama2With13b => [5120, 13_824, 40, 40, 40, 32_000],
            Self::Llama2With70b => [8192, 28_672, 80, 64, 8, 32_000],
        };
        let layers = layers.unwrap_or(own_layers);
        format!(
            r#"{{"model_type": "llama", "hidden_size": {hidden}, "intermediate_size": {inner},
                 "num_hidden_layers": {layers}, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
                 "vocab_size": {vocabulary}, "max_position_embeddings": {positions}}}"#
        )
    }

    /// The same, read.
    pub fn config(self, positions: usize, layers: Option<usize>) -> Result<LlamaConfig, Failure> {
        Ok(LlamaConfig::from_json(&self.json(positions, layers))?)
    }
}
