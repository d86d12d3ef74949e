//! Matrix multiplication on GPTQ-packed weights, behind one trait.

pub mod conformance;
pub mod cpu;
mod dense;
mod device;
mod error;
mod linear;
mod matrix;
pub mod reference;
mod select;

pub use dense::{DenseData, DenseWeight};
pub use device::{Device, Workspace};
pub use error::{KernelError, Unsupported};
pub use linear::{Linear, LinearKernel, LinearSpec, WeightFormat};
pub use matrix::{MatMut, MatRef};
