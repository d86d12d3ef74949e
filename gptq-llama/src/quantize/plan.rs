//! Which module is quantised how.

use std::collections::HashMap;

use gptq_core::{GptqConfig, GptqConfigBuilder};
use gptq_format::DynamicRule;
use serde_json::{Map, Value};

use crate::{Layer, LlamaConfig, LlamaError, Module, QuantizeOptions};

/// The settings of every module that is quantised.
#[derive(Debug)]
pub(crate) struct Plan {
    settings: HashMap<Layer, GptqConfig>,
    skipped: Vec<Layer>,
}

impl Plan {
    /// Errors: [`LlamaError::DynamicRule`], [`LlamaError::UnusedRule`], [`LlamaError::TiedOutputLayer`],
    /// [`LlamaError::NothingToQuantize`].
    pub(crate) fn new(config: &LlamaConfig, options: &QuantizeOptions) -> Result<Self, LlamaError> {
        if options.lm_head && config.tie_word_embeddings {
            return Err(LlamaError::TiedOutputLayer);
        }
        let rules = options.dynamic.rules();
        let by_rule: Vec<Option<GptqConfig>> =
            rules.iter().map(|rule| overridden(&options.gptq, rule)).collect::<Result<_, _>>()?;
        let mut used = vec![false; rules.len()];
        let mut plan = Self { settings: HashMap::new(), skipped: Vec::new() };
        let head = options.lm_head.then(|| Layer::lm_head(config));
        let layers: Vec<Layer> = Layer::of_decoder(config).chain(head).collect();
        for &layer in &layers {
            let settings = match options.dynamic.find(&layer.to_string()) {
                Some((rule, _)) => {
                    used[rule] = true;
                    by_rule[rule].as_ref()
                }
                None => Some(&options.gptq),
            };
            match settings {
                Some(settings) => drop(plan.settings.insert(layer, settings.clone())),
                None => plan.skipped.push(layer),
            }
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            let rule = &rules[unused];
            let matches = layers.iter().filter(|layer| rule.matches(&layer.to_string())).count();
            return Err(LlamaError::UnusedRule { rule: rule.key().to_owned(), matches });
        }
        if plan.settings.is_empty() {
            return Err(LlamaError::NothingToQuantize);
        }
        Ok(plan)
    }

    /// The settings of a module, `None` if it stays as it is.
    pub(crate) fn get(&self, layer: Layer) -> Option<&GptqConfig> {
        self.settings.get(&layer)
    }

    /// Modules that rules take out, in the order of the forward pass.
    pub(crate) fn skipped(&self) -> &[Layer] {
        &self.skipped
    }

    /// All modules that are quantised, in the order of the forward pass.
    pub(crate) fn layers(&self, config: &LlamaConfig) -> impl Iterator<Item = Layer> {
        let head = Layer::lm_head(config);
        Layer::of_decoder(config).chain([head]).filter(|layer| self.settings.contains_key(layer))
    }

    pub(crate) fn quantizes_lm_head(&self) -> bool {
        self.settings.keys().any(|layer| layer.module == Module::LmHead)
    }

    /// Whether some module is corrected for the error of its predecessors, so that the unquantised model has to run
    /// beside the quantised one.
    pub(crate) fn needs_reference(&self) -> bool {
        self.settings.values().any(|settings| settings.gptaq().is_some())
    }

    /// Whether every zero point is the middle of its range.
    pub(crate) fn is_symmetric(&self) -> bool {
        self.settings.values().all(GptqConfig::sym)
    }
}

/// What a rule makes of the settings of all modules; `None` if it takes modules out.
fn overridden(base: &GptqConfig, rule: &DynamicRule) -> Result<Option<GptqConfig>, LlamaError> {
    let Some(overrides) = rule.overrides() else { return Ok(None) };
    let fail = |reason| LlamaError::DynamicRule { rule: rule.key().to_owned(), reason };
    let overrides: Map<String, Value> =
        serde_json::from_str(&overrides).expect("invariant: a rule writes its overrides as a JSON object");
    let mut builder = builder_of(base);
    for (key, value) in &overrides {
        builder = set(builder, key, value).map_err(fail)?;
    }
    builder.build().map(Some).map_err(|source| fail(RuleError::Settings { source }))
}

/// Why the overrides of a rule cannot be followed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// No setting of a module is called so.
    #[error("{key} is no setting of a module; there are {}", SETTINGS.join(", "))]
    Key {
        /// The key.
        key: String,
    },
    /// A value has the wrong type.
    #[error("{key} is {value}: it must be {expected}")]
    Value {
        /// The key.
        key: String,
        /// The value as JSON.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The settings exclude each other or are out of range.
    #[error(transparent)]
    Settings {
        /// Why.
        source: gptq_core::ConfigError,
    },
}

const SETTINGS: [&str; 10] = [
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "static_groups",
    "act_group_aware",
    "mse",
    "damp_percent",
    "damp_auto_increment",
    "gptaq",
];

fn set(builder: GptqConfigBuilder, key: &str, value: &Value) -> Result<GptqConfigBuilder, RuleError> {
    let wrong = |expected| RuleError::Value { key: key.to_owned(), value: value.to_string(), expected };
    let switch = || value.as_bool().ok_or_else(|| wrong("true or false"));
    let number = || value.as_f64().ok_or_else(|| wrong("a number"));
    // Other tools write an option that is off as 0, false or null.
    let option = || match value {
        Value::Null | Value::Bool(false) => Ok(None),
        _ => value.as_f64().map(|x| (x != 0.0).then_some(x as f32)).ok_or_else(|| wrong("a number, or null")),
    };
    Ok(match key {
        "bits" => {
            let bits = value.as_u64().and_then(|bits| u32::try_from(bits).ok());
            builder.bits(bits.ok_or_else(|| wrong("2, 3, 4 or 8"))?)
        }
        "group_size" => builder.group_size(match value.as_i64() {
            Some(-1) => None,
            Some(size) => Some(usize::try_from(size).map_err(|_| wrong("a multiple of 8, or -1"))?),
            None => return Err(wrong("a multiple of 8, or -1")),
        }),
        "sym" => builder.sym(switch()?),
        "desc_act" => builder.desc_act(switch()?),
        "static_groups" => builder.static_groups(switch()?),
        "act_group_aware" => builder.act_group_aware(switch()?),
        "mse" => builder.mse(option()?),
        "damp_percent" => builder.damp_percent(number()?),
        "damp_auto_increment" => builder.damp_auto_increment(number()?),
        "gptaq" => builder.gptaq(option()?),
        _ => return Err(RuleError::Key { key: key.to_owned() }),
    })
}

/// A builder that starts from settings.
pub(super) fn builder_of(config: &GptqConfig) -> GptqConfigBuilder {
    GptqConfig::builder()
        .bits(config.bits())
        .group_size(config.group_size().map(|size| size.get()))
        .sym(config.sym())
        .desc_act(config.desc_act())
        .static_groups(config.static_groups())
        .act_group_aware(config.act_group_aware())
        .mse(config.mse())
        .damp_percent(config.damp_percent())
        .damp_auto_increment(config.damp_auto_increment())
        .block_size(config.block_size().get())
        .gptaq(config.gptaq())
        .on_failure(config.on_failure())
}

#[cfg(test)]
mod tests {
    use gptq_core::OnFailure;
    use gptq_format::DynamicRules;

    use super::*;

    fn config(tied: bool) -> LlamaConfig {
        LlamaConfig::from_json(&format!(
            r#"{{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "vocab_size": 50, "tie_word_embeddings": {tied}}}"#
        ))
        .unwrap()
    }

    fn plan(rules: &str, lm_head: bool) -> Result<Plan, LlamaError> {
        let options = QuantizeOptions::default().with_dynamic(DynamicRules::from_json(rules).unwrap());
        Plan::new(&config(false), &options.with_lm_head(lm_head))
    }

    fn layer(layer: usize, module: Module) -> Layer {
        Layer { layer, module }
    }

    #[test]
    fn a_builder_keeps_every_setting() {
        let config = GptqConfig::builder()
            .bits(3)
            .group_size(None)
            .sym(false)
            .desc_act(true)
            .static_groups(true)
            .mse(Some(2.0))
            .damp_percent(0.5)
            .damp_auto_increment(0.25)
            .block_size(64)
            .gptaq(Some(0.5))
            .on_failure(OnFailure::Rtn)
            .build()
            .unwrap();
        assert_eq!(builder_of(&config).build().unwrap(), config);
        let aware = GptqConfig::builder().act_group_aware(true).build().unwrap();
        assert_eq!(builder_of(&aware).build().unwrap(), aware);
    }

    #[test]
    fn the_first_matching_rule_decides() {
        let rules = r#"{"-:.*down_proj": {}, "+:.*layers\\.0\\..*": {"bits": 8, "group_size": -1, "sym": false,
            "desc_act": true, "mse": 2.4, "damp_percent": 0.1, "gptaq": 0.25}, "lm_head": {"bits": 8, "mse": 0}}"#;
        let plan = plan(rules, true).unwrap();
        assert!(plan.get(layer(0, Module::Down)).is_none());
        assert_eq!(plan.skipped(), [layer(0, Module::Down), layer(1, Module::Down)]);
        let first = plan.get(layer(0, Module::Q)).unwrap();
        assert_eq!((first.bits(), first.group_size(), first.sym(), first.desc_act()), (8, None, false, true));
        assert_eq!((first.mse(), first.damp_percent(), first.gptaq()), (Some(2.4), 0.1, Some(0.25)));
        assert_eq!(plan.get(layer(1, Module::Q)), Some(&GptqConfig::default()));
        assert_eq!(plan.get(layer(2, Module::LmHead)).map(|head| (head.bits(), head.mse())), Some((8, None)));
        assert!(plan.quantizes_lm_head() && plan.needs_reference() && !plan.is_symmetric());
        assert_eq!(plan.layers(&config(false)).count(), 2 * 6 + 1);
    }

    #[test]
    fn rules_that_cannot_be_followed_are_named() {
        let error = |rules| plan(rules, false).unwrap_err().to_string();
        assert_eq!(error(r#"{"+:.*k_prj": {"bits": 8}}"#), "dynamic rule \"+:.*k_prj\" matches no module");
        assert_eq!(error(r#"{"lm_head": {"bits": 8}}"#), "dynamic rule \"lm_head\" matches no module");
        assert_eq!(
            error(r#"{"-:.*mlp.*": {}, ".*up_proj": {"bits": 8}}"#),
            "dynamic rule \".*up_proj\" decides no module: earlier rules match all 2 that it matches"
        );
        assert!(error(r#"{"a": {"bitz": 8}}"#).starts_with("dynamic rule \"a\": bitz is no setting"));
        assert_eq!(
            error(r#"{"a": {"mse": "x"}}"#),
            "dynamic rule \"a\": mse is \"x\": it must be a number, or null"
        );
        assert!(error(r#"{"a": {"group_size": 12}}"#).contains("multiple of 8"));
        assert!(
            error(r#"{"a": {"desc_act": true, "act_group_aware": true}}"#).contains("exclude each other")
        );
        assert!(matches!(plan(r#"{"-:.*": {}}"#, true), Err(LlamaError::NothingToQuantize)));
        let tied = Plan::new(&config(true), &QuantizeOptions::default().with_lm_head(true));
        assert!(matches!(tied, Err(LlamaError::TiedOutputLayer)));
    }
}
