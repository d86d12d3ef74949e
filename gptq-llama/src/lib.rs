//! A reference Llama made of the GPTQ crates: load, calibrate, quantise, measure, generate.
//!
//! | to | use |
//! |---|---|
//! | load a Hugging Face folder, quantised or not | [`Llama::load`], [`LoadOptions`] |
//! | run token ids, several sequences at a time | [`Llama::forward`], [`KvCache`], [`Feed`] |
//! | generate | [`generate()`], or [`Generator`] as an iterator |
//! | measure | [`perplexity()`] |
//! | quantise a folder, so that it can be resumed | [`QuantizeJob`] |
//! | quantise in memory | [`quantize()`], [`round_to_nearest`], and [`ModelWriter`] to save the result |
//! | merge a LoRA adapter | [`LoraWeights`] |
//! | bring weights from elsewhere | [`WeightSource`], [`MemoryWeights`] |
//!
//! The model is generic over a [`Backend`](gptq_kernels::Backend): the CPU, or with feature `cuda` an NVIDIA GPU in fp16 or
//! bf16. It names no kernel, and takes quantised and dense layers alike. What is computed for a sequence depends on that
//! sequence alone, to the bit, as long as its steps stay in one row class of the layers' kernels.
//!
//! A random model, quantised in memory and compared with itself:
//!
//! ```
//! use gptq_core::GptqConfig;
//! use gptq_kernels::cpu::Cpu;
//! use gptq_llama::{
//!     Llama, LlamaConfig, LlamaError, LoadOptions, MemoryWeights, QuantizeOptions, TokenRows, Watch, perplexity,
//!     quantize,
//! };
//!
//! let config = LlamaConfig::from_json(
//!     r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
//!         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}"#,
//! )
//! .expect("a valid configuration");
//! let original = MemoryWeights::random(&config, 1);
//! let rows = TokenRows::new(vec![(0..60).collect(), (20..100).collect()])?;
//!
//! let options = QuantizeOptions::new(GptqConfig::builder().group_size(Some(32)).build().expect("valid settings"));
//! let mut quantized = MemoryWeights::in_front_of(&original);
//! let mut sink = |layer: gptq_llama::Layer, packed| {
//!     quantized.insert_packed(&layer.to_string(), packed);
//!     Ok(())
//! };
//! let report = quantize(&config, &original, &Cpu, &rows, &options, &mut Watch::default(), &mut sink)?;
//! assert_eq!(report.layers.len(), 2 * 7);
//!
//! let model = Llama::from_source(config, &quantized, Cpu, &LoadOptions::default())?;
//! let result = perplexity(&model, &rows, |rows_done, so_far| println!("{rows_done}: {:.2}", so_far.value()))?;
//! assert_eq!(result.tokens, 59 + 79);
//! # Ok::<(), LlamaError>(())
//! ```
#![forbid(unsafe_code)]

mod buffers;
mod cache;
pub mod config;
mod error;
mod generate;
mod lora;
mod memory;
mod model;
mod names;
mod perplexity;
mod progress;
mod projections;
mod quantize;
mod random;
mod rows;
mod sampling;
mod save;
mod weights;

pub use cache::{KvCache, SequenceId, Timings};
pub use config::LlamaConfig;
pub use error::LlamaError;
pub use generate::{Finish, GenerateOptions, Generator, generate};
pub use lora::{LoraError, LoraWeights};
pub use model::{Drawing, Feed, Llama, LoadOptions, Logits, Next, Turn, Wanted};
pub use names::{Layer, Module};
pub use perplexity::{Perplexity, perplexity};
pub use progress::{CancelToken, Progress, QuantizePhase, Watch};
pub use projections::Precision;
pub use quantize::{
    Allocation, BudgetError, Choice, Divergence, Existing, FormatCost, FormatLoss, LayerFormat,
    LayerSensitivity, LayerSink, LayerSummary, OutputError, QuantizeJob, QuantizeMethod, QuantizeOptions,
    QuantizeOutcome, QuantizeReport, Recipe, RowsMoved, RuleError, RunTimes, Sensitivities, SensitivityJob,
    Trial, TrialError, TrialResult, TrialScore, allocate, quantize, round_to_nearest,
};
pub use random::Rng;
pub use rows::TokenRows;
pub use sampling::Sampling;
pub use save::ModelWriter;
pub use weights::{Fingerprint, MemoryWeights, Tensor, TensorData, WeightSource};
