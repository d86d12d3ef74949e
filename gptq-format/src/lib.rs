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
pub use config::{CheckpointFormat, ConfigError, ModuleConfig, QuantizeConfig, QuantizeConfigBuilder};
pub use dtype::Dtype;
pub use error::{FormatError, Unwritable};
pub use header::HeaderError;
pub use packed::{CodesRef, PackError, PackedLinear, PackedParts};
pub use tensor_file::{Tensor, TensorFile};
pub use writer::{CheckpointWriter, WriteOptions, WriteSummary};
pub use zeros::{ZeroBasis, ZeroConvention, ZeroEvidence};
