use regex_lite::Regex;
use serde_json::{Map, Value};

use super::{ConfigError, ModuleConfig, invalid};

/// One rule of `dynamic`: `"+:PATTERN": {overrides}`, or `"-:PATTERN": {}` for layers that are not quantised.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    regex: Regex,
    /// `None`: skip the layer.
    overrides: Option<Map<String, Value>>,
}

impl Rule {
    pub(super) fn new(key: &str, value: &Value) -> Result<Self, ConfigError> {
        let (skip, pattern) = match key.split_at_checked(2) {
            Some(("-:", pattern)) => (true, pattern),
            Some(("+:", pattern)) => (false, pattern),
            _ => (false, key),
        };
        // The tools use Python's `re.match`, which anchors at the start only.
        let regex = Regex::new(&format!("^(?:{pattern})"))
            .map_err(|error| ConfigError::Pattern { pattern: pattern.into(), reason: error.to_string() })?;
        let overrides = match value {
            _ if skip => None,
            Value::Object(overrides) => Some(overrides.clone()),
            other => return Err(invalid(&format!("dynamic[{key:?}]"), other, "an object")),
        };
        let rule = Self { regex, overrides };
        if let Some(overrides) = &rule.overrides {
            // Bad values are an error when the config is read, not when a layer matches.
            ModuleConfig::PROBE.apply_rule(&format!("dynamic[{key:?}]."), overrides)?;
        }
        Ok(rule)
    }

    pub(super) fn matches(&self, prefix: &str) -> bool {
        self.regex.is_match(prefix)
    }

    /// The settings of a layer that matches, or `None` if it is not quantised.
    pub(super) fn apply(&self, module: ModuleConfig) -> Option<ModuleConfig> {
        let overrides = self.overrides.as_ref()?;
        Some(module.apply_rule("", overrides).expect("invariant: `new` has applied the same overrides"))
    }
}

impl ModuleConfig {
    const PROBE: Self = Self { bits: crate::Bits::B4, group_size: None, desc_act: false, sym: true };

    fn apply_rule(mut self, rule: &str, overrides: &Map<String, Value>) -> Result<Self, ConfigError> {
        self.apply(rule, overrides)?;
        Ok(self)
    }
}
