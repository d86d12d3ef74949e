//! `adapter_config.json`.

use std::path::Path;

use regex_lite::Regex;
use serde_json::{Map, Value};

use super::LoraError;

/// What of an adapter's config decides about the merged weights.
#[derive(Debug)]
pub(super) struct AdapterConfig {
    r: usize,
    lora_alpha: f64,
    pub(super) use_rslora: bool,
    pub(super) bias: Bias,
    pub(super) target_modules: Modules,
    pub(super) exclude_modules: Option<Modules>,
    pub(super) layers_to_transform: Option<Vec<usize>>,
    pub(super) modules_to_save: Vec<String>,
    rank_pattern: Vec<(Regex, f64)>,
    alpha_pattern: Vec<(Regex, f64)>,
}

/// Which biases were trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    None,
    All,
    LoraOnly,
}

/// A choice of modules.
#[derive(Debug)]
pub(super) enum Modules {
    /// Modules of these names, or with these ends of names.
    Names(Vec<String>),
    /// Modules whose whole name matches.
    Pattern(Regex),
    AllLinear,
}

impl Modules {
    pub(super) fn names(&self, module: &str) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|name| is_end_of(name, module)),
            Self::Pattern(regex) => regex.is_match(module),
            Self::AllLinear => true,
        }
    }
}

fn is_end_of(name: &str, module: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

/// Features that change what is computed, with the values that mean they are off. Anything else is refused.
const OFF: [(&str, &str); 12] = [
    ("use_dora", "its magnitudes are no low-rank update"),
    ("lora_bias", "it trains biases that these models do not have"),
    ("use_qalora", "its matrices are pooled over groups of inputs"),
    ("layer_replication", "it changes the number of layers"),
    ("target_parameters", "there are no such parameters"),
    ("trainable_token_indices", "it trains single rows of the embedding"),
    ("alora_invocation_tokens", "it acts from some token on, and cannot be merged"),
    ("arrow_config", "it mixes several adapters by input"),
    ("use_bdlora", "its matrices are block-diagonal"),
    ("kasa_config", "its updates are no plain product of two matrices"),
    ("monteclora_config", "its updates are no plain product of two matrices"),
    ("megatron_config", "its layers are split over devices"),
];

/// Starting points that leave the model as it is.
const PLAIN_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl AdapterConfig {
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, LoraError> {
        let whole =
            |expected: String| LoraError::Config { path: path.to_owned(), key: String::new(), expected };
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| whole(format!("is no JSON object: {error}")))?;
        let fields = Fields { path, fields };
        match fields.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            _ => return Err(fields.unsupported("peft_type", "LORA adapters are merged")),
        }
        for (key, reason) in OFF {
            if fields.get(key).is_some_and(|value| !is_off(value)) {
                return Err(fields.unsupported(key, reason));
            }
        }
        match fields.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => {}
            Some(Value::String(start)) if PLAIN_STARTS.contains(&start.as_str()) => {}
            Some(_) => {
                let reason = "such adapters stand on a changed model; PEFT converts them when it saves them with \
                              path_initial_model_for_weight_conversion";
                return Err(fields.unsupported("init_lora_weights", reason));
            }
        }
        if fields.get("fan_in_fan_out").is_some_and(|value| !is_off(value)) {
            tracing::warn!(
                "fan_in_fan_out is ignored: the layers of this model store (out_features, in_features)"
            );
        }
        if !matches!(fields.get("layers_pattern"), None | Some(Value::String(_))) {
            return Err(fields.unsupported("layers_pattern", "the layers of these models are called layers"));
        }
        let r = fields.get("r").map_or(Ok(8.0), |_| fields.number("r"))?;
        if r < 1.0 || r.fract() != 0.0 || r > MAX_RANK {
            return Err(fields.wrong("r", "must be a whole number from 1 to 65536"));
        }
        let lora_alpha = fields.get("lora_alpha").map_or(Ok(8.0), |_| fields.number("lora_alpha"))?;
        Ok(Self {
            r: r as usize,
            lora_alpha,
            use_rslora: match fields.get("use_rslora") {
                None => false,
                Some(Value::Bool(on)) => *on,
                Some(_) => return Err(fields.wrong("use_rslora", "must be true or false")),
            },
            bias: match fields.get("bias").map(Value::as_str) {
                None | Some(Some("none")) => Bias::None,
                Some(Some("all")) => Bias::All,
                Some(Some("lora_only")) => Bias::LoraOnly,
                Some(_) => return Err(fields.wrong("bias", "must be none, all or lora_only")),
            },
            target_modules: fields
                .modules("target_modules")?
                .ok_or_else(|| fields.wrong("target_modules", "is missing"))?,
            exclude_modules: fields.modules("exclude_modules")?,
            layers_to_transform: fields.layers("layers_to_transform")?,
            modules_to_save: match fields.get("modules_to_save") {
                None => Vec::new(),
                Some(_) => fields.strings("modules_to_save")?,
            },
            rank_pattern: fields.pattern("rank_pattern")?,
            alpha_pattern: fields.pattern("alpha_pattern")?,
        })
    }

    /// Whether a module is saved as a whole.
    pub(super) fn saves(&self, module: &str) -> bool {
        self.modules_to_save.iter().any(|name| is_end_of(name, module))
    }

    /// The rank of a module's update.
    pub(super) fn rank(&self, module: &str) -> usize {
        find(&self.rank_pattern, module).map_or(self.r, |rank| rank as usize)
    }

    pub(super) fn alpha(&self, module: &str) -> f64 {
        find(&self.alpha_pattern, module).unwrap_or(self.lora_alpha)
    }
}

const MAX_RANK: f64 = 65_536.0;

fn find(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(regex, _)| regex.is_match(module)).map(|&(_, value)| value)
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// The object with the file that it is from.
struct Fields<'a> {
    path: &'a Path,
    fields: Map<String, Value>,
}

impl Fields<'_> {
    /// A value that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str) -> LoraError {
        LoraError::Config { path: self.path.to_owned(), key: key.to_owned(), expected: expected.to_owned() }
    }

    fn unsupported(&self, key: &'static str, reason: &'static str) -> LoraError {
        let value: String =
            self.fields.get(key).unwrap_or(&Value::Null).to_string().chars().take(80).collect();
        LoraError::Unsupported { path: self.path.to_owned(), key, value, reason }
    }

    fn number(&self, key: &str) -> Result<f64, LoraError> {
        let number = self.get(key).and_then(Value::as_f64).filter(|number| number.is_finite());
        number.ok_or_else(|| self.wrong(key, "must be a number"))
    }

    fn strings(&self, key: &str) -> Result<Vec<String>, LoraError> {
        let list = self.get(key).and_then(Value::as_array);
        let list = list.ok_or_else(|| self.wrong(key, "must be a list of names"))?;
        let name = |value: &Value| value.as_str().map(str::to_owned);
        list.iter()
            .map(|value| name(value).ok_or_else(|| self.wrong(key, "must be a list of names")))
            .collect()
    }

    fn modules(&self, key: &str) -> Result<Option<Modules>, LoraError> {
        Ok(match self.get(key) {
            None => None,
            Some(Value::String(text)) if text == "all-linear" => Some(Modules::AllLinear),
            // Python's `re.fullmatch`.
            Some(Value::String(pattern)) => {
                Some(Modules::Pattern(self.regex(key, &format!("^(?:{pattern})$"), pattern)?))
            }
            Some(_) => Some(Modules::Names(self.strings(key)?)).filter(|modules| match modules {
                Modules::Names(names) => !names.is_empty(),
                _ => true,
            }),
        })
    }

    fn layers(&self, key: &str) -> Result<Option<Vec<usize>>, LoraError> {
        let number = |value: &Value| {
            let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
            number.ok_or_else(|| self.wrong(key, "must be a layer's number, or a list of them"))
        };
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) if list.is_empty() => Ok(None),
            Some(Value::Array(list)) => list.iter().map(number).collect::<Result<_, _>>().map(Some),
            Some(value) => Ok(Some(vec![number(value)?])),
        }
    }

    /// Ranks or strengths by module: the key is the end of a name, or a regular expression for it.
    fn pattern(&self, key: &str) -> Result<Vec<(Regex, f64)>, LoraError> {
        let map = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Object(map)) => map,
            Some(_) => return Err(self.wrong(key, "must be an object")),
        };
        let entry = |(pattern, value): (&String, &Value)| {
            let rank = key == "rank_pattern";
            let fits = |number: &f64| {
                number.is_finite()
                    && (!rank || (*number >= 1.0 && number.fract() == 0.0 && *number <= MAX_RANK))
            };
            let value =
                value.as_f64().filter(fits).ok_or_else(|| self.wrong(key, "must hold numbers in range"))?;
            Ok((self.regex(key, &format!(r"^(?:.*\.)?(?:{pattern})$"), pattern)?, value))
        };
        map.iter().map(entry).collect()
    }

    fn regex(&self, key: &str, regex: &str, pattern: &str) -> Result<Regex, LoraError> {
        Regex::new(regex)
            .map_err(|error| self.wrong(key, &format!("{pattern:?} is no regular expression: {error}")))
    }
}
