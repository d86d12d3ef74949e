//! Quantising a model layer by layer.

mod calibrate;
mod layer;
mod options;
mod original;
mod plan;
mod run;
mod store;

use std::time::Duration;

use gptq_core::{LayerReport, rtn};
use gptq_format::PackedLinear;
use gptq_kernels::Backend;

use crate::{
    Layer, LlamaConfig, LlamaError, Module, QuantizePhase, TokenRows, Watch, WeightSource, progress::Reporter,
};
pub use options::QuantizeOptions;
use original::Original;
pub(crate) use plan::Plan;
pub use plan::RuleError;
use store::Forward;

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

/// What came of a quantisation.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QuantizeReport {
    /// Every quantised layer, in the order of the forward pass.
    pub layers: Vec<LayerSummary>,
    /// Layers that rules of [`QuantizeOptions::dynamic`] leave as they are.
    pub skipped: Vec<Layer>,
    /// Wall-clock time in all.
    pub elapsed: Duration,
}

/// What came of one linear layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LayerSummary {
    /// Which one.
    pub layer: Layer,
    /// The quantiser's account.
    pub report: LayerReport,
}

/// Takes the finished layers, one after the other.
pub type LayerSink<'a> = dyn FnMut(Layer, PackedLinear) -> Result<(), LlamaError> + 'a;

/// Quantises the linear layers of a model by GPTQ. Embedding and norms stay as they are, and so do the output layer, unless
/// [`QuantizeOptions::lm_head`] says otherwise, and what rules take out.
///
/// Every calibration row runs through the model by itself, from position 0; all its tokens count. The inputs of a layer
/// are those behind its quantised predecessors, with scales in float32 as the solver has them. The forward pass runs on
/// `device` in float32, one decoder layer at a time: memory holds one layer's weights, the residual stream of all rows,
/// and one more activation of all rows.
///
/// Finished layers go to `sink`. Errors: [`LlamaError::AlreadyQuantized`], [`LlamaError::Quantize`] with the layer's name,
/// [`LlamaError::DynamicRule`], [`LlamaError::UnusedRule`], [`LlamaError::TiedOutputLayer`], [`LlamaError::Cancelled`],
/// what `sink` returns, and those of loading.
pub fn quantize<D: Backend>(
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
    let span = tracing::info_span!("round_to_nearest", layers = config.layers);
    let _guard = span.enter();
    let plan = Plan::new(config, options)?;
    let mut reporter = Reporter::new(watch, config.layers, plan.quantizes_lm_head(), Module::ALL.len());
    let mut layers = Vec::new();
    for layer in plan.layers(config) {
        let Some(gptq) = plan.get(layer) else { continue };
        let original = Original::read(source, layer.linear(config))?;
        let result = rtn(original.weight().view(), gptq).map_err(|error| original.failed(error))?;
        sink(layer, original.pack(&result, gptq)?)?;
        layers.push(LayerSummary { layer, report: result.report });
        let parts =
            Module::ALL.iter().position(|&module| module == layer.module).unwrap_or(Module::ALL.len() - 1);
        let done = (layer.layer, (parts + 1) as f64);
        reporter.tell(done, &[layer.module], QuantizePhase::Quantized, None)?;
    }
    Ok(QuantizeReport { layers, skipped: plan.skipped().to_vec(), elapsed: reporter.elapsed() })
}
