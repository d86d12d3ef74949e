use std::{collections::HashMap, path::Path};

use super::{
    LoraError,
    config::{AdapterConfig, Modules},
    is_lm_head, layer_number, modules,
};
use crate::{LlamaConfig, names::EMBEDDING};

/// The modules that an adapter says it changes.
pub(super) struct Targets(HashMap<String, (usize, usize)>);

impl Targets {
    /// Errors: [`LoraError::Config`] if no module of the model is meant; [`LoraError::Unsupported`] if one is that cannot
    /// be changed alone.
    pub(super) fn new(path: &Path, adapter: &AdapterConfig, config: &LlamaConfig) -> Result<Self, LoraError> {
        let embedding = EMBEDDING.trim_end_matches(".weight");
        let is_target = |module: &str| {
            let named = match &adapter.target_modules {
                // PEFT takes all linear layers but the output layer.
                Modules::AllLinear => !is_lm_head(module) && module != embedding,
                other => other.names(module),
            };
            let layers = adapter.layers_to_transform.as_ref();
            let layer = layers.is_none_or(|layers| layer_number(module).is_some_and(|n| layers.contains(&n)));
            named && layer && !adapter.exclude_modules.as_ref().is_some_and(|excluded| excluded.names(module))
        };
        let targets: HashMap<_, _> = modules(config).filter(|(module, _)| is_target(module)).collect();
        if targets.is_empty() {
            return Err(LoraError::Config {
                path: path.to_owned(),
                key: "target_modules".to_owned(),
                expected: "must name modules of the model".to_owned(),
            });
        }
        let tied = |module: &String| is_lm_head(module) || module == embedding;
        if let Some(module) = targets.keys().find(|module| config.tie_word_embeddings && tied(module)) {
            return Err(LoraError::Unsupported {
                path: path.to_owned(),
                key: "target_modules",
                value: module.clone(),
                reason: "embedding and output layer are one matrix (tie_word_embeddings), and would both change",
            });
        }
        Ok(Self(targets))
    }

    pub(super) fn contains(&self, module: &str) -> bool {
        self.0.contains_key(module)
    }

    pub(super) fn modules(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// `(out_features, in_features)`
    pub(super) fn shape(&self, module: &str) -> (usize, usize) {
        self.0[module]
    }
}
