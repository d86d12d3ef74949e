#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod config;
mod damping;
mod error;
mod factorize;
mod grid;
mod hessian;
mod order;
mod panel;
mod quantized;
mod report;
mod solver;
mod upper;

pub use config::{GptqConfig, GptqConfigBuilder, OnFailure};
pub use damping::{DampingFailure, factorize_damped};
pub use error::{ConfigError, GptqError, NotPositiveDefinite};
#[cfg(feature = "lapack")]
pub use factorize::Lapack;
pub use factorize::{BlockedCholesky, Factorize};
pub use hessian::{Hessian, HessianAccumulator, SampleUnit};
pub use order::ColumnOrder;
pub use quantized::QuantizedWeight;
pub use report::{DampReport, LayerReport, Method, PhaseTimes};
pub use solver::{Gptq, PreparedHessian, rtn};
