use std::path::Path;

use serde_json::{Map, Value};

use crate::folder::{Folder, MAX_CONFIG, read_json};
use crate::{Bits, FormatError};

mod builder;
mod calibration;
mod dynamic;
#[cfg(test)]
mod tests;

pub use builder::QuantizeConfigBuilder;
pub use dynamic::{DynamicRule, DynamicRules};

/// The files that may hold a quantisation config, in the order in which AutoGPTQ and GPTQModel look for it.
pub(crate) const CONFIG_FILES: [&str; 2] = ["quantize_config.json", "quant_config.json"];
/// The key of `config.json` that holds it otherwise.
pub(crate) const CONFIG_KEY: &str = "quantization_config";

/// Words into which GPTQModel packs codes; a tensor's own type says which, so this is only checked.
const PACK_DTYPES: [&str; 4] = ["int32", "int64", "int16", "int8"];

/// How a checkpoint's tensors are laid out, the key `checkpoint_format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CheckpointFormat {
    /// `gptq`: zero points are stored minus one.
    Gptq,
    /// `gptq_v2`: zero points are stored as they are.
    GptqV2,
    /// `gptq_p`: bit planes instead of a continuous stream, zero points as they are.
    Planar,
    /// `marlin`: tiles for tensor cores; 4 bits, symmetric, no act-order.
    Marlin,
}

impl CheckpointFormat {
    /// The name in a config.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq_v2",
            Self::Planar => "gptq_p",
            Self::Marlin => "marlin",
        }
    }

    /// The format with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Gptq, Self::GptqV2, Self::Planar, Self::Marlin]
            .into_iter()
            .find(|format| format.name() == name)
    }
}

/// `quantize_config.json`, or `quantization_config` in `config.json`.
///
/// Keys that this crate does not know are kept and written back, in their order.
#[derive(Clone, Debug)]
pub struct QuantizeConfig {
    module: ModuleConfig,
    format: Option<CheckpointFormat>,
    rules: DynamicRules,
    /// Everything as it was read; the typed fields above are derived from it.
    fields: Map<String, Value>,
}

/// The settings of one linear layer: those of the whole checkpoint, overridden by the first matching rule of `dynamic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleConfig {
    /// Width of one code.
    pub bits: Bits,
    /// Features in a group; `None` for one group (`-1` in the file).
    pub group_size: Option<usize>,
    /// Whether columns were quantised in the order of their activations.
    pub desc_act: bool,
    /// Whether every zero point is `2^(bits-1)`.
    pub sym: bool,
}

/// Why a quantisation config cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("not valid JSON: {0}")]
    Json(String),
    /// A needed key is absent.
    #[error("key `{0}` is missing")]
    Missing(&'static str),
    /// A value has the wrong type or is out of range.
    #[error("{key} = {value} should be {expected}")]
    Value {
        /// The key, with the rule of `dynamic` before it where it stands in one.
        key: String,
        /// The value as JSON, shortened.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Quantised by another method.
    #[error("quant_method is {0}, this crate reads gptq")]
    Method(String),
    /// A layout that this crate does not read.
    #[error("checkpoint_format is {0}, this crate reads gptq, gptq_v2, gptq_p and marlin")]
    Format(String),
    /// A pattern of `dynamic` that is no regular expression, or uses look-around or back-references.
    #[error("dynamic pattern `{pattern}`: {reason}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl QuantizeConfig {
    /// A config for [`CheckpointWriter`](crate::CheckpointWriter).
    pub fn builder(bits: Bits, group_size: Option<usize>) -> QuantizeConfigBuilder {
        QuantizeConfigBuilder::new(bits, group_size)
    }

    /// Parses the JSON object.
    ///
    /// Synonyms are `w_bit` and `q_group_size`, `format` for `checkpoint_format`, and `is_marlin_format`. A missing
    /// `sym` means true, a missing `desc_act` false, a missing `group_size` one group.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn from_json(json: &str) -> Result<Self, ConfigError> {
        let fields = serde_json::from_str(json).map_err(|error| ConfigError::Json(error.to_string()))?;
        Self::from_fields(fields)
    }

    /// Reads `quantize_config.json`, `quant_config.json` or `config.json`'s `quantization_config`, whichever a folder
    /// has first. `None` if it has none: the model is not quantised.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Json`] and [`FormatError::Config`] with the file.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>, FormatError> {
        Self::find(&Folder::open(dir)?)
    }

    pub(crate) fn find(folder: &Folder) -> Result<Option<Self>, FormatError> {
        for name in CONFIG_FILES {
            if let Some(path) = folder.locate(name)? {
                let fields = read_json(&path, MAX_CONFIG)?;
                return match Self::from_fields(fields) {
                    Ok(config) => Ok(Some(config)),
                    Err(source) => Err(FormatError::Config { path, source }),
                };
            }
        }
        let Some(path) = folder.locate("config.json")? else { return Ok(None) };
        let config = match read_json::<Map<String, Value>>(&path, MAX_CONFIG)?.remove(CONFIG_KEY) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(fields)) => Self::from_fields(fields),
            Some(other) => Err(invalid(CONFIG_KEY, &other, "an object")),
        };
        config.map(Some).map_err(|source| FormatError::Config { path, source })
    }

    fn from_fields(fields: Map<String, Value>) -> Result<Self, ConfigError> {
        // Without a format in any key the old marker decides, and its absence means the oldest format, which is left to
        // the evidence in the zero points.
        let marlin = matches!(fields.get("is_marlin_format"), Some(Value::Bool(true)));
        match first(&fields, &["quant_method", "method"]) {
            None => {}
            Some(Value::String(method)) if method == "gptq" || method == "marlin" => {}
            Some(other) => return Err(ConfigError::Method(shorten(other))),
        }
        let method_is_marlin =
            first(&fields, &["quant_method"]).is_some_and(|method| method.as_str() == Some("marlin"));
        let format = match first(&fields, &["checkpoint_format", "format"]) {
            Some(value) => match value.as_str().and_then(CheckpointFormat::from_name) {
                Some(_) if marlin => Some(CheckpointFormat::Marlin),
                Some(format) => Some(format),
                None => return Err(ConfigError::Format(shorten(value))),
            },
            None if marlin || method_is_marlin => Some(CheckpointFormat::Marlin),
            None => None,
        };
        match first(&fields, &["pack_dtype"]) {
            None => {}
            Some(Value::String(name)) if PACK_DTYPES.contains(&name.as_str()) => {}
            Some(other) => return Err(invalid("pack_dtype", other, "int8, int16, int32 or int64")),
        }
        let bits = first(&fields, &["bits", "w_bit"]).ok_or(ConfigError::Missing("bits"))?;
        let mut module =
            ModuleConfig { bits: parse_bits("bits", bits)?, group_size: None, desc_act: false, sym: true };
        module.apply("", &fields)?;
        let rules = match first(&fields, &["dynamic"]) {
            None => DynamicRules::default(),
            Some(Value::Object(rules)) => {
                DynamicRules::new(rules.iter().map(|(key, value)| (key.as_str(), value)))?
            }
            Some(other) => return Err(invalid("dynamic", other, "an object")),
        };
        // Widths that only one layout has decide it, as GPTQModel does when it reads such a config.
        let widths = rules.rules().iter().filter_map(|rule| rule.apply(module)).chain([module]);
        let planar_only = widths.into_iter().any(|module| module.bits.is_planar_only());
        let format = if planar_only && format != Some(CheckpointFormat::Marlin) {
            Some(CheckpointFormat::Planar)
        } else {
            format
        };
        Ok(Self { module, format, rules, fields })
    }

    /// Width of one code, where no rule of `dynamic` says otherwise.
    pub fn bits(&self) -> Bits {
        self.module.bits
    }

    /// Features in a group, `None` for one group, where no rule of `dynamic` says otherwise.
    pub fn group_size(&self) -> Option<usize> {
        self.module.group_size
    }

    /// Whether columns were quantised in the order of their activations, where no rule of `dynamic` says otherwise.
    pub fn desc_act(&self) -> bool {
        self.module.desc_act
    }

    /// Whether every zero point is `2^(bits-1)`, where no rule of `dynamic` says otherwise.
    pub fn sym(&self) -> bool {
        self.module.sym
    }

    /// The layout that the config claims; `None` if it claims none. Readers do not trust it, see
    /// [`ZeroEvidence`](crate::ZeroEvidence).
    pub fn checkpoint_format(&self) -> Option<CheckpointFormat> {
        self.format
    }

    /// The settings of one linear layer, or `None` if a rule of `dynamic` says that it is not quantised.
    pub fn module(&self, prefix: &str) -> Option<ModuleConfig> {
        match self.rules.find(prefix) {
            None => Some(self.module),
            Some((_, rule)) => rule.apply(self.module),
        }
    }

    /// The rules of `dynamic`.
    pub fn dynamic(&self) -> &DynamicRules {
        &self.rules
    }

    /// The programs that wrote the checkpoint, `meta.quantizer`, such as `gptqmodel:7.7.0`.
    pub fn quantizers(&self) -> Vec<&str> {
        match self.fields.get("meta").and_then(|meta| meta.get("quantizer")) {
            Some(Value::String(name)) => vec![name],
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// The dampening that was used, which stands at the top level or under `meta`.
    pub fn damp_percent(&self) -> Option<f64> {
        let nested = self.fields.get("meta").and_then(|meta| meta.get("damp_percent"));
        self.fields.get("damp_percent").or(nested)?.as_f64()
    }

    /// The file name, without `.safetensors`, that AutoGPTQ wrote the model to, if the config has one.
    pub fn model_basename(&self) -> Option<&str> {
        first(&self.fields, &["model_file_base_name", "model_basename"])?.as_str()
    }

    /// The value of any key, as JSON.
    pub fn get(&self, key: &str) -> Option<String> {
        self.fields.get(key).map(Value::to_string)
    }

    /// The keys, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }

    /// The whole object as JSON, unknown keys included.
    pub fn to_json(&self) -> String {
        format!("{:#}", Value::Object(self.fields.clone()))
    }

    pub(crate) fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The same config without calibration data, and the keys that held some: transformers stores the texts themselves under
    /// `dataset`. A dataset's name stays if it is one word, and so do numbers. [`CheckpointWriter`] does this with every
    /// config.
    ///
    /// [`CheckpointWriter`]: crate::CheckpointWriter
    pub fn without_calibration_data(&self) -> (Self, Vec<String>) {
        let mut config = self.clone();
        let removed = calibration::strip(&mut config.fields);
        (config, removed)
    }

    /// The same config for another layout: what a converter writes. Markers of the old layout disappear.
    pub fn with_checkpoint_format(&self, format: CheckpointFormat) -> Self {
        let mut config = self.clone();
        config.format = Some(format);
        match format {
            // The marker by which vLLM knows such a checkpoint.
            CheckpointFormat::Marlin => config.fields.insert("is_marlin_format".into(), true.into()),
            _ => config.fields.shift_remove("is_marlin_format"),
        };
        config.fields.insert("quant_method".into(), "gptq".into());
        config.fields.insert("checkpoint_format".into(), format.name().into());
        // Writers pack into 32 bits, whatever the layers were read from.
        if let Some(pack_dtype) = config.fields.get_mut("pack_dtype") {
            *pack_dtype = "int32".into();
        }
        for key in ["method", "format"] {
            if let Some(value) = config.fields.get_mut(key) {
                *value = if key == "method" { "gptq".into() } else { format.name().into() };
            }
        }
        config
    }
}

impl PartialEq for QuantizeConfig {
    fn eq(&self, other: &Self) -> bool {
        self.fields == other.fields
    }
}

impl ModuleConfig {
    /// Takes over what `fields` has; `rule` goes before the key in errors.
    fn apply(&mut self, rule: &str, fields: &Map<String, Value>) -> Result<(), ConfigError> {
        if let Some(value) = first(fields, &["bits", "w_bit"]) {
            self.bits = parse_bits(&format!("{rule}bits"), value)?;
        }
        if let Some(value) = first(fields, &["group_size", "q_group_size"]) {
            self.group_size = match (value.as_i64(), value.as_i64().map(usize::try_from)) {
                (Some(-1), _) => None,
                (_, Some(Ok(size))) if size > 0 => Some(size),
                _ => return Err(invalid(&format!("{rule}group_size"), value, "-1 or above 0")),
            };
        }
        for (key, target) in [("desc_act", &mut self.desc_act), ("sym", &mut self.sym)] {
            if let Some(value) = first(fields, &[key]) {
                *target = value
                    .as_bool()
                    .ok_or_else(|| invalid(&format!("{rule}{key}"), value, "true or false"))?;
            }
        }
        Ok(())
    }
}

/// The first of these keys that is there and not null.
fn first<'a>(fields: &'a Map<String, Value>, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().filter_map(|&key| fields.get(key)).find(|value| !value.is_null())
}

fn parse_bits(key: &str, value: &Value) -> Result<Bits, ConfigError> {
    let number = value.as_u64().and_then(|bits| u32::try_from(bits).ok());
    number.and_then(|bits| Bits::try_from(bits).ok()).ok_or_else(|| invalid(key, value, "2 to 8"))
}

fn invalid(key: &str, value: &Value, expected: &'static str) -> ConfigError {
    ConfigError::Value { key: key.into(), value: shorten(value), expected }
}

/// A value for an error message: a config may hold megabytes in one.
fn shorten(value: &Value) -> String {
    match value {
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
        Value::String(text) => Value::from(shorten_text(text)).to_string(),
        other => other.to_string(),
    }
}

/// The beginning of a text.
fn shorten_text(text: &str) -> String {
    text.chars().take(80).collect()
}
