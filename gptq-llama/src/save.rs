use std::{collections::HashSet, num::NonZeroUsize, path::Path};

use gptq_core::GptqConfig;
use gptq_format::{
    Bits, Checkpoint, CheckpointWriter, PackedLinear, QuantizeConfig, WriteOptions, WriteSummary,
};

use crate::{Layer, LlamaConfig, LlamaError, Module, QuantizeMethod, QuantizeOptions, QuantizeReport};

/// Writes a quantised model as it comes into being: a folder that this crate, transformers and vLLM read.
///
/// Nothing is in its place before [`finish`](Self::finish) has succeeded; a run that dies leaves the old content.
pub struct ModelWriter<'a> {
    source: &'a Checkpoint,
    writer: CheckpointWriter,
    /// Quantised layers that are still to come.
    missing: HashSet<String>,
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
        let quantize_config = quantize_config(options, method)?;
        let mut writer = CheckpointWriter::create(dir, Some(&quantize_config), WriteOptions::default())?;
        writer.carry_over(source.dir())?;
        let layers = (0..config.layers)
            .flat_map(|layer| Module::ALL.into_iter().map(move |module| Layer { layer, module }));
        Ok(Self { source, writer, missing: layers.map(|layer| layer.to_string()).collect() })
    }

    /// Writes a finished layer.
    ///
    /// Errors: [`LlamaError::Format`], [`LlamaError::UnknownLayer`] if there is no such layer or it has been written.
    pub fn layer(&mut self, layer: Layer, packed: &PackedLinear) -> Result<(), LlamaError> {
        let module = layer.to_string();
        if !self.missing.remove(&module) {
            return Err(LlamaError::UnknownLayer { tensor: module });
        }
        Ok(self.writer.linear(&module, packed)?)
    }

    /// Adds what is not quantised and `quant_log.csv`, and puts the folder in its place.
    ///
    /// Errors: [`LlamaError::MissingTensor`] if a layer has not been written, [`LlamaError::Format`].
    pub fn finish(mut self, report: &QuantizeReport) -> Result<WriteSummary, LlamaError> {
        if let Some(tensor) = self.missing.into_iter().min() {
            return Err(LlamaError::MissingTensor { tensor });
        }
        let quantized: HashSet<String> = report
            .layers
            .iter()
            .flat_map(|summary| ["weight", "bias"].map(|part| format!("{}.{part}", summary.layer)))
            .collect();
        for tensor in self.source.tensors().filter(|tensor| !quantized.contains(tensor.name())) {
            self.writer.tensor(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes())?;
        }
        self.writer.file("quant_log.csv", log(report).as_bytes())?;
        Ok(self.writer.finish()?)
    }
}

fn quantize_config(options: &QuantizeOptions, method: QuantizeMethod) -> Result<QuantizeConfig, LlamaError> {
    let gptq: &GptqConfig = &options.gptq;
    let bits = Bits::try_from(gptq.bits()).expect("invariant: both crates know the same widths");
    let mut builder = QuantizeConfig::builder(bits, gptq.group_size().map(NonZeroUsize::get))
        .sym(gptq.sym())
        .recipe_text("method", method.name())
        .recipe_number("mse", gptq.mse().map_or(0.0, f64::from));
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

/// One line a layer: what became of it.
fn log(report: &QuantizeReport) -> String {
    let mut text = String::from("layer,module,loss,samples,damp,time\n");
    for summary in &report.layers {
        let (layer, report) = (&summary.layer, &summary.report);
        let loss = report.loss.map(|loss| loss.to_string()).unwrap_or_default();
        let damp = report.damp.map(|damp| damp.percent.to_string()).unwrap_or_default();
        let times = &report.times;
        let seconds = (times.prepare + times.factorize + times.solve).as_secs_f64();
        text.push_str(&format!(
            "{},{},{loss},{},{damp},{seconds:.3}\n",
            layer.layer,
            layer.module.name(),
            report.samples
        ));
    }
    text
}
