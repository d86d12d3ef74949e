use std::{collections::HashSet, num::NonZeroUsize, path::Path};

use gptq_core::GptqConfig;
use gptq_format::{
    Bits, Checkpoint, CheckpointFormat, CheckpointWriter, Dtype, DynamicRules, PackedLinear, QuantizeConfig,
    WriteOptions, WriteSummary,
};
use half::{bf16, f16};
use serde_json::json;

use crate::{
    Layer, LlamaConfig, LlamaError, QuantizeMethod, QuantizeOptions, QuantizeReport, WeightSource,
    names::LM_HEAD, quantize::Plan,
};

/// What became of each layer, in GPTQModel's columns.
const LOG: &str = "quant_log.csv";
/// Everything about the run.
pub(crate) const REPORT: &str = "quantize_report.json";

/// Writes a quantised model as it comes into being: a folder that this crate, transformers and vLLM read.
///
/// Nothing is in its place before [`finish`](Self::finish) has succeeded; a run that dies leaves the old content.
pub struct ModelWriter<'a> {
    source: &'a Checkpoint,
    /// What tensors hold, if not what the checkpoint says.
    weights: Option<&'a dyn WeightSource>,
    layers: LayerWriter,
}

/// Quantised layers on their way to a checkpoint: the part of a [`ModelWriter`] that another thread can have.
pub(crate) struct LayerWriter {
    writer: CheckpointWriter,
    /// Quantised layers that are still to come.
    missing: HashSet<String>,
}

impl LayerWriter {
    pub(crate) fn layer(&mut self, layer: Layer, packed: &PackedLinear) -> Result<(), LlamaError> {
        let module = layer.to_string();
        if !self.missing.remove(&module) {
            return Err(LlamaError::UnknownLayer { tensor: module });
        }
        Ok(self.writer.linear(&module, packed)?)
    }
}

impl<'a> ModelWriter<'a> {
    /// Starts writing `dir`. Everything that is not quantised will be taken from `source`, whose folder also gives
    /// `config.json` and the tokeniser's files.
    ///
    /// Errors: [`LlamaError::Format`].
    pub fn create(
        dir: &Path,
        source: &'a Checkpoint,
        config: &LlamaConfig,
        options: &QuantizeOptions,
        method: QuantizeMethod,
    ) -> Result<Self, LlamaError> {
        let plan = Plan::new(config, options)?;
        let quantize_config = quantize_config(config, &plan, options, method)?;
        let mut writer = CheckpointWriter::create(dir, Some(&quantize_config), WriteOptions::default())?;
        writer.carry_over(source.dir())?;
        let missing = plan.layers(config).map(|layer| layer.to_string()).collect();
        Ok(Self::with_layers(source, LayerWriter { writer, missing }))
    }

    /// What writes the layers, without the rest.
    pub(crate) fn into_layers(self) -> LayerWriter {
        self.layers
    }

    /// The rest, to go on with layers that [`into_layers`](Self::into_layers) has given and that have been written.
    pub(crate) fn with_layers(source: &'a Checkpoint, layers: LayerWriter) -> Self {
        Self { source, weights: None, layers }
    }

    /// Takes the values of what is not quantised from `weights`, such as [`LoraWeights`](crate::LoraWeights), instead of
    /// the checkpoint. They are rounded to the checkpoint's types.
    #[must_use]
    pub fn with_weights(self, weights: &'a dyn WeightSource) -> Self {
        Self { weights: Some(weights), ..self }
    }

    /// Writes a finished layer.
    ///
    /// Errors: [`LlamaError::Format`], [`LlamaError::UnknownLayer`] if there is no such layer or it has been written.
    pub fn layer(&mut self, layer: Layer, packed: &PackedLinear) -> Result<(), LlamaError> {
        self.layers.layer(layer, packed)
    }

    /// Adds what is not quantised, `quant_log.csv` and `quantize_report.json`, and puts the folder in its place.
    ///
    /// Errors: [`LlamaError::MissingTensor`] if a layer has not been written, [`LlamaError::Format`].
    pub fn finish(self, report: &QuantizeReport) -> Result<WriteSummary, LlamaError> {
        let LayerWriter { mut writer, missing } = self.layers;
        if let Some(tensor) = missing.into_iter().min() {
            return Err(LlamaError::MissingTensor { tensor });
        }
        let quantized: HashSet<String> = report
            .layers
            .iter()
            .flat_map(|summary| ["weight", "bias"].map(|part| format!("{}.{part}", summary.layer)))
            .collect();
        for tensor in self.source.tensors().filter(|tensor| !quantized.contains(tensor.name())) {
            let changed =
                self.weights.map(|weights| changed(weights, self.source, tensor.name())).transpose()?;
            let bytes = changed.flatten();
            let bytes = bytes.as_deref().unwrap_or(tensor.bytes());
            writer.tensor(tensor.name(), tensor.dtype(), tensor.shape(), bytes)?;
        }
        writer.file(LOG, report.to_csv().as_bytes())?;
        writer.file(REPORT, report.to_json().as_bytes())?;
        Ok(writer.finish()?)
    }
}

/// The bytes of a tensor in the checkpoint's type, if `weights` has other values than the checkpoint.
fn changed(
    weights: &dyn WeightSource,
    source: &Checkpoint,
    name: &str,
) -> Result<Option<Vec<u8>>, LlamaError> {
    let Some(stored) = source.get(name) else { return Ok(None) };
    if !matches!(stored.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Ok(None);
    }
    let (Some(new), Some(old)) = (weights.tensor(name)?, WeightSource::tensor(source, name)?) else {
        return Ok(None);
    };
    if new.shape != old.shape {
        return Err(LlamaError::TensorShape { tensor: name.to_owned(), expected: old.shape, got: new.shape });
    }
    let values = new.to_f32();
    if values.iter().zip(old.to_f32()).all(|(new, old)| new.to_bits() == old.to_bits()) {
        return Ok(None);
    }
    let mut finite = true;
    let mut bytes = Vec::with_capacity(stored.bytes().len());
    for value in values {
        match stored.dtype() {
            Dtype::F16 => {
                let half = f16::from_f32(value);
                finite &= half.is_finite();
                bytes.extend(half.to_le_bytes());
            }
            Dtype::BF16 => {
                let half = bf16::from_f32(value);
                finite &= half.is_finite();
                bytes.extend(half.to_le_bytes());
            }
            _ => {
                finite &= value.is_finite();
                bytes.extend(value.to_le_bytes());
            }
        }
    }
    if !finite {
        let dtype = format!("{:?}", stored.dtype());
        return Err(LlamaError::Overflow { tensor: name.to_owned(), dtype });
    }
    Ok(Some(bytes))
}

fn quantize_config(
    config: &LlamaConfig,
    plan: &Plan,
    options: &QuantizeOptions,
    method: QuantizeMethod,
) -> Result<QuantizeConfig, LlamaError> {
    let gptq: &GptqConfig = &options.gptq;
    let bits = Bits::try_from(gptq.bits()).expect("invariant: both crates know the same widths");
    let mut builder = QuantizeConfig::builder(bits, gptq.group_size().map(NonZeroUsize::get))
        .sym(gptq.sym())
        .dynamic(&options.dynamic)
        .lm_head(plan.quantizes_lm_head())
        .recipe_text("method", method.name())
        .recipe_number("mse", gptq.mse().map_or(0.0, f64::from));
    if !plan.is_symmetric() {
        builder = builder.checkpoint_format(CheckpointFormat::GptqV2);
    }
    if let Some(head) = plan.get(Layer::lm_head(config)) {
        // GPTQModel gives the output layer settings of its own unless a rule of this very name has them.
        let named = |key: &str| key.strip_prefix("+:").unwrap_or(key) == LM_HEAD;
        if !options.dynamic.rules().iter().any(|rule| named(rule.key())) {
            let group_size = head.group_size().map_or(json!(-1), |size| json!(size));
            let settings = json!({
                "bits": head.bits(), "group_size": group_size, "sym": head.sym(), "desc_act": head.desc_act(),
            });
            let rule = DynamicRules::from_json(&json!({ LM_HEAD: settings }).to_string());
            builder = builder.dynamic(&rule.map_err(|source| LlamaError::QuantizeConfig { source })?);
        }
    }
    if method == QuantizeMethod::Gptq {
        builder = builder
            .desc_act(gptq.desc_act())
            .static_groups(gptq.static_groups())
            .true_sequential(options.true_sequential)
            .damp_percent(gptq.damp_percent())
            .recipe_number("damp_auto_increment", gptq.damp_auto_increment())
            .recipe_switch("act_group_aware", gptq.act_group_aware());
        if let Some(alpha) = gptq.gptaq() {
            builder = builder.recipe_number("gptaq_alpha", f64::from(alpha));
        }
    }
    builder.build().map_err(|source| LlamaError::QuantizeConfig { source })
}
