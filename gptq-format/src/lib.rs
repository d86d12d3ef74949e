//! Packed GPTQ weights and the checkpoints that hold them.
//!
//! This crate knows bytes and names, never mathematics: it does not choose a scale, it does not multiply a matrix.
//!
//! | | |
//! |---|---|
//! | [`PackedLinear`] | one layer, validated, in one canonical layout; `pack` and `unpack` |
//! | [`Checkpoint`] | a model folder, mapped: dense tensors as views, quantised layers as [`PackedLinear`] |
//! | [`QuantizeConfig`] | `quantize_config.json`, unknown keys kept |
//! | [`CheckpointWriter`] | streams shards; the folder is the old checkpoint until one rename, and the new one from then on |
//! | [`TensorFile`] | any single safetensors file |
//!
//! ```
//! use gptq_format::{Bits, Checkpoint, CheckpointWriter, CodesRef, Dtype, PackedLinear, QuantizeConfig, WriteOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let dir = folder.path();
//! // What a quantiser produces: integer codes and a grid. Here 64 inputs in two groups, 8 outputs, every weight 0.25.
//! let g_idx: Vec<u32> = (0..64).map(|i| i / 32).collect();
//! let linear = PackedLinear::pack(&CodesRef {
//!     bits: Bits::B4,
//!     group_size: 32,
//!     in_features: 64,
//!     out_features: 8,
//!     codes: &[9; 64 * 8],
//!     zeros: &[8; 2 * 8],
//!     scales: &[0.25; 2 * 8],
//!     g_idx: &g_idx,
//!     bias: None,
//! })?;
//!
//! let config = QuantizeConfig::builder(Bits::B4, Some(32)).damp_percent(0.01).build()?;
//! let mut writer = CheckpointWriter::create(dir, Some(&config), WriteOptions::default())?;
//! writer.linear("model.layers.0.mlp.up_proj", &linear)?;
//! writer.tensor("model.norm.weight", Dtype::F32, &[2], &[0; 8])?;
//! writer.finish()?;
//!
//! let checkpoint = Checkpoint::open(dir)?;
//! let read = checkpoint.linear("model.layers.0.mlp.up_proj")?;
//! assert_eq!(read, linear);
//! assert_eq!(read.dequantize(), [0.25; 64 * 8]);
//! assert_eq!(*checkpoint.tensor("model.norm.weight")?.f32s()?, [0.0, 0.0]);
//! println!("zero points: {}", checkpoint.zero_evidence().ok_or("quantised")?);
//! # Ok(())
//! # }
//! ```
//!
//! # What is read
//!
//! - Layouts `gptq` (v1 zero points), `gptq_v2` and `marlin`, of 2, 3, 4 and 8 bits, and `gptq_p` (planar) of 2 to 8 bits,
//!   with any group size.
//! - The zero convention is decided by evidence, not by the label: see [`ZeroEvidence`]. [`ReadOptions`] overrides it.
//! - The config in `quantize_config.json`, `quant_config.json` or `config.json`, with its synonyms and `dynamic` rules.
//! - `model.safetensors`, sharded indexes, `gptq_model-*.safetensors`, `model_basename`, or one file of any name.
//! - Codes packed into words of 8, 16 or 64 bits (`pack_dtype`) as well as 32, by the tensors' own type.
//! - Missing or all-zero `g_idx`, scales and biases in float32 or bfloat16, ragged shapes: each is a [`Remark`].
//!
//! Pickled files (`.pt`, `.bin`) and float `zeros` from before AutoGPTQ are typed errors. So is everything that is wrong
//! with a file: nothing in it makes the reader panic, and memory is bounded by a multiple of the file's size.
//!
//! # What is written
//!
//! The same layouts, in words of 32 bits; `gptq` where every zero point is at least 1, `gptq_v2` otherwise. See [`CheckpointWriter`] for how
//! a folder is replaced so that every moment shows the old checkpoint or the new one.

mod bits;
mod bitstream;
mod checkpoint;
mod config;
mod dtype;
mod error;
mod folder;
mod header;
mod marlin;
mod packed;
mod planar;
mod tensor_file;
mod writer;
mod zeros;

pub use bits::Bits;
pub use checkpoint::{Checkpoint, ReadOptions, Remark};
pub use config::{
    CheckpointFormat, ConfigError, DynamicRule, DynamicRules, ModuleConfig, QuantizeConfig,
    QuantizeConfigBuilder,
};
pub use dtype::Dtype;
pub use error::{FormatError, Unwritable};
pub use header::HeaderError;
pub use packed::{CodesRef, PackError, PackedLinear, PackedParts};
pub use tensor_file::{Tensor, TensorFile};
pub use writer::{CheckpointWriter, WriteOptions, WriteSummary};
pub use zeros::{ZeroBasis, ZeroConvention, ZeroEvidence};

/// The README's code compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
