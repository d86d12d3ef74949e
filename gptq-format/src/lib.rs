//! Packed GPTQ weights and the checkpoints that hold them.
//!
//! This crate knows bytes and names, never mathematics: it does not choose a scale, it does not multiply a matrix.

mod bits;
mod bitstream;
mod packed;

pub use bits::Bits;
pub use packed::{CodesRef, PackError, PackedLinear, PackedParts};
