use std::collections::HashSet;
use std::fmt;

use regex_lite::{Regex, RegexBuilder};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::{ConfigError, ModuleConfig, invalid, shorten_text};

/// Real configs have a rule for each module at most; models have some ten thousand.
const MAX_RULES: usize = 1 << 16;
/// Repetitions let a pattern of some bytes become megabytes when it is compiled. Most patterns stay below this,
const PLAIN_SIZE: usize = 1 << 10;
/// with this for each of their bytes.
const PLAIN_SIZE_OF_BYTE: usize = 128;
/// Those that do not may be so large,
const LARGE_SIZE: usize = 1 << 18;
/// and so many. Together these bound the memory of all rules by a multiple of the file's size.
const MAX_LARGE: usize = 64;

/// The rules of `dynamic`, in their order: settings of single layers, by the names of the layers.
///
/// ```
/// use gptq_format::DynamicRules;
///
/// let rules = DynamicRules::from_json(r#"{"-:.*down_proj": {}, "+:model\\.layers\\.0\\.": {"bits": 8}}"#)?;
/// let first = |name| rules.find(name).map(|(index, _)| index);
/// assert_eq!(first("model.layers.0.mlp.down_proj"), Some(0));
/// assert_eq!(first("model.layers.0.mlp.up_proj"), Some(1));
/// assert_eq!(first("model.layers.1.mlp.up_proj"), None);
/// # Ok::<(), gptq_format::ConfigError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DynamicRules(Vec<DynamicRule>);

/// One rule of `dynamic`: `"+:PATTERN": {overrides}`, or `"-:PATTERN": {}` for layers that are not quantised.
#[derive(Clone, Debug)]
pub struct DynamicRule {
    key: String,
    regex: Regex,
    /// `None`: skip the layer.
    overrides: Option<Map<String, Value>>,
}

impl DynamicRules {
    /// Parses a JSON object: patterns with `+:`, `-:` or nothing before them, and their overrides.
    ///
    /// # Errors
    /// [`ConfigError`] for what is no such object, a pattern that is no regular expression or stands twice, and bits,
    /// group sizes and switches that cannot be.
    pub fn from_json(json: &str) -> Result<Self, ConfigError> {
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let entries = deserializer
            .deserialize_map(Entries)
            .and_then(|entries| deserializer.end().map(|()| entries))
            .map_err(|error| ConfigError::Json(error.to_string()))?;
        Self::new(entries.iter().map(|(key, value)| (key.as_str(), value)))
    }

    pub(super) fn new<'a>(
        entries: impl IntoIterator<Item = (&'a str, &'a Value)>,
    ) -> Result<Self, ConfigError> {
        let mut rules: Vec<DynamicRule> = Vec::new();
        let mut keys = HashSet::new();
        let mut large = 0;
        for (key, value) in entries {
            if rules.len() == MAX_RULES {
                let (key, value) = ("dynamic".into(), format!("more than {MAX_RULES} rules"));
                return Err(ConfigError::Value { key, value, expected: "fewer" });
            }
            if !keys.insert(key) {
                let (pattern, reason) = (shorten_text(key), "it stands twice".into());
                return Err(ConfigError::Pattern { pattern, reason });
            }
            rules.push(DynamicRule::new(key, value, &mut large)?);
        }
        Ok(Self(rules))
    }

    /// The rules.
    pub fn rules(&self) -> &[DynamicRule] {
        &self.0
    }

    /// The rule that decides about a layer, the first that matches its name, and its index.
    pub fn find(&self, prefix: &str) -> Option<(usize, &DynamicRule)> {
        self.0.iter().enumerate().find(|(_, rule)| rule.matches(prefix))
    }

    /// As [`from_json`](Self::from_json) reads it.
    pub fn to_json(&self) -> String {
        format!("{:#}", Value::Object(self.fields()))
    }

    pub(super) fn fields(&self) -> Map<String, Value> {
        let value = |rule: &DynamicRule| Value::Object(rule.overrides.clone().unwrap_or_default());
        self.0.iter().map(|rule| (rule.key.clone(), value(rule))).collect()
    }
}

/// A JSON object with all its entries: a map would keep only the last of equal keys.
struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of patterns and their overrides")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }
}

/// Compiles a pattern within bounded memory; `large` counts those that needed much.
fn compile(pattern: &str, large: &mut usize) -> Result<Regex, ConfigError> {
    // The tools use Python's `re.match`, which anchors at the start only.
    let anchored = format!("^(?:{pattern})");
    let build = |limit| RegexBuilder::new(&anchored).size_limit(limit).build();
    if let Ok(regex) = build(PLAIN_SIZE + PLAIN_SIZE_OF_BYTE * pattern.len()) {
        return Ok(regex);
    }
    let error = |reason| ConfigError::Pattern { pattern: shorten_text(pattern), reason };
    if *large == MAX_LARGE {
        return Err(error(format!("not a regular expression, or the {MAX_LARGE} before it repeat too much")));
    }
    *large += 1;
    build(LARGE_SIZE).map_err(|reason| error(reason.to_string()))
}

impl DynamicRule {
    fn new(key: &str, value: &Value, large: &mut usize) -> Result<Self, ConfigError> {
        let (skip, pattern) = match key.split_at_checked(2) {
            Some(("-:", pattern)) => (true, pattern),
            Some(("+:", pattern)) => (false, pattern),
            _ => (false, key),
        };
        let regex = compile(pattern, large)?;
        let name = shorten_text(key);
        let overrides = match value {
            _ if skip => None,
            Value::Object(overrides) => Some(overrides.clone()),
            other => return Err(invalid(&format!("dynamic[{name:?}]"), other, "an object")),
        };
        let rule = Self { key: key.into(), regex, overrides };
        if let Some(overrides) = &rule.overrides {
            // Bad values are an error when the config is read, not when a layer matches.
            ModuleConfig::PROBE.apply_rule(&format!("dynamic[{name:?}]."), overrides)?;
        }
        Ok(rule)
    }

    /// The pattern with what stands before it.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether the pattern matches from the start of this name.
    pub fn matches(&self, prefix: &str) -> bool {
        self.regex.is_match(prefix)
    }

    /// The overrides as a JSON object, or `None` if the rule says that a layer is not quantised.
    pub fn overrides(&self) -> Option<String> {
        self.overrides.clone().map(|overrides| Value::Object(overrides).to_string())
    }

    /// The settings of a layer that matches, or `None` if it is not quantised.
    pub(super) fn apply(&self, module: ModuleConfig) -> Option<ModuleConfig> {
        let overrides = self.overrides.as_ref()?;
        Some(module.apply_rule("", overrides).expect("invariant: `new` has applied the same overrides"))
    }
}

impl PartialEq for DynamicRule {
    fn eq(&self, other: &Self) -> bool {
        (&self.key, &self.overrides) == (&other.key, &other.overrides)
    }
}

impl ModuleConfig {
    const PROBE: Self = Self { bits: crate::Bits::B4, group_size: None, desc_act: false, sym: true };

    fn apply_rule(mut self, rule: &str, overrides: &Map<String, Value>) -> Result<Self, ConfigError> {
        self.apply(rule, overrides)?;
        Ok(self)
    }
}
