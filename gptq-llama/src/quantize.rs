//! Quantising a model layer by layer.

mod activations;
mod baseline;
mod budget;
mod calibrate;
mod identity;
mod job;
mod journal;
mod layer;
mod options;
mod original;
mod plan;
mod predictions;
mod quantizers;
mod record;
mod report;
mod room;
mod round;
mod run;
mod sensitivity;
mod solve;
mod state;
mod store;
mod summary;
mod trial;
mod walk;

use gptq_format::PackedLinear;
use gptq_kernels::quantize::QuantizeBackend;

use crate::{Layer, LlamaConfig, LlamaError, TokenRows, Watch, WeightSource};
pub use budget::{Allocation, BudgetError, Choice, FormatCost, LayerFormat, allocate};
pub use job::{Existing, QuantizeJob, QuantizeOutcome};
pub use journal::OutputError;
pub use options::QuantizeOptions;
pub(crate) use plan::Plan;
pub use plan::RuleError;
pub use report::{LayerSummary, QuantizeReport, RowsMoved, RunTimes};
pub use sensitivity::{Divergence, FormatLoss, LayerSensitivity, Sensitivities, SensitivityJob};
use store::Forward;
pub use trial::{Recipe, Trial, TrialError, TrialResult, TrialScore};

/// By what a model is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantizeMethod {
    /// [`quantize`]
    Gptq,
    /// [`round_to_nearest`]
    RoundToNearest,
}

impl QuantizeMethod {
    /// `gptq` or `rtn`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::RoundToNearest => "rtn",
        }
    }
}

/// Takes the finished layers, one after the other.
pub type LayerSink<'a> = dyn FnMut(Layer, PackedLinear) -> Result<(), LlamaError> + 'a;

/// Quantises the linear layers of a model by GPTQ. Embedding and norms stay as they are, and so do the output layer, unless
/// [`QuantizeOptions::lm_head`] says otherwise, and what rules take out.
///
/// Every calibration row runs through the model by itself, from position 0; all its tokens count. The inputs of a layer
/// are those behind its quantised predecessors, dequantised with scales in float32 as the solver has them. Forward pass,
/// second moments and solution run on `device`, one decoder layer at a time: memory holds one layer's weights, the residual
/// stream of all rows, and one more activation of all rows. The forward pass has the device's type of activations, and its
/// weights too: float32 on the CPU, on a GPU float32 or half precision.
///
/// Finished layers go to `sink`. Errors: [`LlamaError::AlreadyQuantized`], [`LlamaError::Quantize`] with the layer's name,
/// [`LlamaError::DynamicRule`], [`LlamaError::UnusedRule`], [`LlamaError::TiedOutputLayer`], [`LlamaError::Cancelled`],
/// what `sink` returns, and those of loading.
pub fn quantize<D: QuantizeBackend>(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    device: &D,
    rows: &TokenRows,
    options: &QuantizeOptions,
    watch: &mut Watch<'_>,
    sink: &mut LayerSink<'_>,
) -> Result<QuantizeReport, LlamaError> {
    run::quantize(config, source, device, rows, options, watch, &mut Forward(sink))
}

/// Rounds the same layers to nearest, the baseline of every comparison. Needs no calibration.
///
/// Errors: as [`quantize`].
pub fn round_to_nearest(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    options: &QuantizeOptions,
    watch: &mut Watch<'_>,
    sink: &mut LayerSink<'_>,
) -> Result<QuantizeReport, LlamaError> {
    round::round_to_nearest(config, source, options, watch, &mut Forward(sink))
}
