use gptq_core::GptqConfig;
use gptq_kernels::quantize::{QuantizeBackend, QuantizeError};

use super::plan::Plan;
use crate::{LlamaConfig, LlamaError};

/// A quantiser for each of the settings of a plan.
pub(super) struct Quantizers<D: QuantizeBackend> {
    settings: Vec<GptqConfig>,
    quantizers: Vec<D::Quantizer>,
}

impl<D: QuantizeBackend> Quantizers<D> {
    pub(super) fn new(device: &D, plan: &Plan, config: &LlamaConfig) -> Result<Self, LlamaError> {
        let (mut settings, mut first): (Vec<GptqConfig>, _) = (Vec::new(), None);
        for layer in plan.layers(config) {
            let Some(own) = plan.get(layer).filter(|own| !settings.contains(own)) else { continue };
            first = first.or(Some(layer));
            settings.push(own.clone());
        }
        let module = first.map_or_else(String::new, |layer| layer.to_string());
        let quantizers = device.quantizers(&settings).map_err(|error| in_module(&module, error))?;
        Ok(Self { settings, quantizers })
    }

    pub(super) fn all(&self) -> &[D::Quantizer] {
        &self.quantizers
    }

    /// Panics for settings that are not in the plan.
    pub(super) fn get(&self, settings: &GptqConfig) -> &D::Quantizer {
        let index = self.settings.iter().position(|own| own == settings);
        &self.quantizers[index.expect("invariant: there is a quantiser for all settings of the plan")]
    }
}

/// What a quantiser says, with the module.
pub(super) fn in_module(module: &str, error: QuantizeError) -> LlamaError {
    let module = module.to_owned();
    match error {
        QuantizeError::Gptq(source) => LlamaError::Quantize { module, source },
        QuantizeError::Kernel(source) => LlamaError::Layer { tensor: module, source },
        QuantizeError::Pack(source) => LlamaError::Pack { tensor: module, source },
        other => LlamaError::Solver { module, source: other },
    }
}
