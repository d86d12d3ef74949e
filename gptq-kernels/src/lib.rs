#![doc = include_str!("../README.md")]

mod backend;
mod bound;
pub mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dense;
mod device;
mod draw;
mod error;
mod fusion;
mod in_order;
mod linear;
mod matrix;
#[cfg(feature = "quantize")]
pub mod quantize;
pub mod reference;
mod select;

pub use backend::{AttentionShape, Backend, DrawnToken, KvFormat, KvShape, SequencePlan, StepPlan};
pub use bound::ErrorBound;
pub use dense::{DenseData, DenseType, DenseWeight};
pub use device::{Device, Workspace};
pub use draw::Draw;
pub use error::{KernelError, Unsupported};
pub use fusion::{Epilogue, Fusion, Prologue, RmsNorm};
pub use linear::{Linear, LinearKernel, LinearSpec, Span, WeightFormat};
pub use matrix::{MatMut, MatRef};
pub use select::{
    CostError, CostPoint, CostTable, Measurement, PassedOver, Reason, Selection, Selector, Workload,
    cached_costs, select,
};
