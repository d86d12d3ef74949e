//! A reference Llama made of the GPTQ crates: load, calibrate, quantise, measure, generate.
#![forbid(unsafe_code)]

mod cache;
pub mod config;
mod error;
mod generate;
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
pub use model::{Feed, Llama, LoadOptions, Logits, Wanted};
pub use names::{Layer, Module};
pub use perplexity::{Perplexity, perplexity};
pub use progress::{CancelToken, Progress, QuantizePhase, Watch};
pub use projections::Precision;
pub use quantize::{
    LayerSink, LayerSummary, QuantizeMethod, QuantizeOptions, QuantizeReport, quantize, round_to_nearest,
};
pub use random::Rng;
pub use rows::TokenRows;
pub use sampling::Sampling;
pub use save::ModelWriter;
pub use weights::{MemoryWeights, Tensor, TensorData, WeightSource};
