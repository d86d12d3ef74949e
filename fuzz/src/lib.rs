//! What the fuzz targets do with an input: plain functions that panic where a law of gptq-format is broken. libFuzzer calls
//! them with inputs that it makes up, `tests/replay.rs` with the corpus.
//!
//! | target | an input is |
//! |---|---|
//! | [`open_checkpoint`] | a folder: configs, index and safetensors files, see [`folder`] |
//! | [`unpack_linear`] | sizes and words of one layer, see [`layer`] |
//! | [`quantize_config`] | `quantize_config.json` |
//! | [`tensor_file`] | a safetensors file |

mod checkpoint;
mod config;
mod file;
pub mod folder;
pub mod layer;
mod memory;
mod scratch;

pub use checkpoint::open_checkpoint;
pub use config::quantize_config;
pub use file::tensor_file;
pub use layer::unpack_linear;

/// A target's name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 4] = [
    ("open_checkpoint", open_checkpoint),
    ("quantize_config", quantize_config),
    ("tensor_file", tensor_file),
    ("unpack_linear", unpack_linear),
];
