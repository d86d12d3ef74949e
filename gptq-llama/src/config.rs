//! `config.json` of a Hugging Face folder.

mod json;
mod rope;

use std::path::Path;

pub use rope::{RopeConfig, RopeScaling};

use crate::LlamaError;
use json::Object;

/// Shape of a decoder: everything of `config.json` that the forward pass depends on.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LlamaConfig {
    /// Which family.
    pub family: Family,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Features between the MLP's projections.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; `heads` is a multiple.
    pub kv_heads: usize,
    /// Features a head.
    pub head_dim: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Positions that the model was trained for.
    pub max_positions: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f32,
    /// Rotary position embeddings.
    pub rope: RopeConfig,
    /// The output projection is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// For each layer, how many tokens attention sees, the current one included; `None` for all.
    pub windows: Vec<Option<usize>>,
    /// First token of a sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
}

/// The architectures that this crate runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2 and 3, and what copies them.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2: Llama with biases on q, k and v.
    Qwen2,
}

/// Why a configuration cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{reason}")]
    Read {
        /// What the system says.
        reason: String,
    },
    /// The file is not JSON, or not an object.
    #[error("not a JSON object: {reason}")]
    Json {
        /// What the parser says.
        reason: String,
    },
    /// A key is missing.
    #[error("{key} is missing")]
    Missing {
        /// The key.
        key: String,
    },
    /// A value has the wrong type or is out of range.
    #[error("{key} is {value}: {expected}")]
    Value {
        /// The key.
        key: String,
        /// The value as JSON.
        value: String,
        /// What it may be.
        expected: String,
    },
    /// Another architecture.
    #[error("model_type {model_type:?}: there are llama, mistral and qwen2")]
    ModelType {
        /// The type.
        model_type: String,
    },
    /// Another kind of rotary scaling.
    #[error("rope_type {rope_type:?}: there are default, linear and llama3")]
    RopeType {
        /// The type.
        rope_type: String,
    },
}

impl LlamaConfig {
    /// Reads `config.json` in `dir`.
    pub fn read(dir: &Path) -> Result<Self, LlamaError> {
        let path = dir.join("config.json");
        std::fs::read_to_string(&path)
            .map_err(|error| ConfigError::Read { reason: error.to_string() })
            .and_then(|text| Self::from_json(&text))
            .map_err(|source| LlamaError::Config { path, source })
    }

    /// Parses the text of a `config.json`.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let json = Object::parse(text)?;
        let family = match json.string("model_type")?.ok_or_else(|| json.missing("model_type"))? {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            other => return Err(ConfigError::ModelType { model_type: other.to_owned() }),
        };
        if let Some(act) = json.string("hidden_act")?
            && !["silu", "swish"].contains(&act)
        {
            return Err(json.value("hidden_act", "only silu is supported"));
        }
        let hidden_size = json.positive("hidden_size")?;
        let heads = json.positive("num_attention_heads")?;
        let kv_heads = json.positive_or("num_key_value_heads", heads)?;
        if heads % kv_heads != 0 {
            return Err(json.value("num_key_value_heads", "must divide num_attention_heads"));
        }
        let head_dim = match json.optional_positive("head_dim")? {
            Some(dim) => dim,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => {
                return Err(
                    json.value("hidden_size", "num_attention_heads must divide it if there is no head_dim")
                );
            }
        };
        if head_dim % 2 != 0 {
            return Err(json.value("head_dim", "must be even for rotary embeddings"));
        }
        let layers = json.positive("num_hidden_layers")?;
        if layers > MAX_LAYERS {
            return Err(json.value("num_hidden_layers", "must be at most 65536"));
        }
        let eps = json.number_or("rms_norm_eps", 1e-6)?;
        if !(0.0..1.0).contains(&eps) {
            return Err(json.value("rms_norm_eps", "must be in [0, 1)"));
        }
        let attention_bias = match family {
            Family::Qwen2 => false,
            Family::Llama | Family::Mistral => json.bool_or("attention_bias", false)?,
        };
        Ok(Self {
            family,
            hidden_size,
            intermediate_size: json.positive("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab_size: json.positive("vocab_size")?,
            max_positions: json.positive_or("max_position_embeddings", 2048)?,
            rms_norm_eps: eps as f32,
            rope: RopeConfig::from_json(&json)?,
            tie_word_embeddings: json.bool_or("tie_word_embeddings", false)?,
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias,
            mlp_bias: json.bool_or("mlp_bias", false)?,
            windows: windows(&json, family, layers)?,
            bos_token_id: json.tokens("bos_token_id")?.first().copied(),
            eos_token_ids: json.tokens("eos_token_id")?,
        })
    }

    /// Columns of the queries.
    pub fn q_features(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the keys, and of the values.
    pub fn kv_features(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Above all models that exist; keeps a damaged file from asking for absurd amounts of memory.
const MAX_LAYERS: usize = 1 << 16;

/// `layer_types` decides where it is given (transformers 5). Without it Mistral slides in every layer unless the key is
/// null, and Qwen2 only if `use_sliding_window`, from `max_window_layers` on.
fn windows(json: &Object<'_>, family: Family, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let none = vec![None; layers];
    let first_layer = match family {
        Family::Llama => return Ok(none),
        Family::Mistral => 0,
        Family::Qwen2 if json.bool_or("use_sliding_window", false)? => {
            json.count_or("max_window_layers", layers)?
        }
        Family::Qwen2 => return Ok(none),
    };
    let Some(tokens) = json.optional_positive("sliding_window")? else { return Ok(none) };
    let window = |slides| if slides { Some(tokens) } else { None };
    match json.strings("layer_types")? {
        None => Ok((0..layers).map(|layer| window(layer >= first_layer)).collect()),
        Some(types) if types.len() != layers => {
            Err(json.value("layer_types", "must have an entry for each layer"))
        }
        Some(types) => types
            .into_iter()
            .map(|name| match name {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(window(true)),
                _ => Err(json.value("layer_types", "may hold full_attention and sliding_attention")),
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests;
