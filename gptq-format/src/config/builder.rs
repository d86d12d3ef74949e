use serde_json::{Map, Value, json};

use super::{CheckpointFormat, DynamicRules, QuantizeConfig};
use crate::Bits;

/// Builds the [`QuantizeConfig`] of a checkpoint that is to be written.
#[derive(Clone, Debug)]
pub struct QuantizeConfigBuilder {
    bits: Bits,
    group_size: Option<usize>,
    sym: bool,
    desc_act: bool,
    static_groups: bool,
    true_sequential: bool,
    lm_head: bool,
    damp_percent: Option<f64>,
    format: Option<CheckpointFormat>,
    dynamic: Map<String, Value>,
    meta: Map<String, Value>,
}

impl QuantizeConfigBuilder {
    pub(super) fn new(bits: Bits, group_size: Option<usize>) -> Self {
        let mut meta = Map::new();
        meta.insert("quantizer".into(), json!([concat!("gptq-rs:", env!("CARGO_PKG_VERSION"))]));
        meta.insert("uri".into(), json!(env!("CARGO_PKG_REPOSITORY")));
        Self {
            bits,
            group_size,
            sym: true,
            desc_act: false,
            static_groups: false,
            true_sequential: true,
            lm_head: false,
            damp_percent: None,
            format: None,
            dynamic: Map::new(),
            meta,
        }
    }

    /// Whether every zero point is `2^(bits-1)`; true unless said otherwise.
    pub fn sym(mut self, sym: bool) -> Self {
        self.sym = sym;
        self
    }

    /// Whether columns were quantised in the order of their activations; false unless said otherwise.
    pub fn desc_act(mut self, desc_act: bool) -> Self {
        self.desc_act = desc_act;
        self
    }

    /// Whether the grids of all groups were set before the first column; false unless said otherwise.
    pub fn static_groups(mut self, static_groups: bool) -> Self {
        self.static_groups = static_groups;
        self
    }

    /// Whether layers saw inputs through quantised predecessors; true unless said otherwise.
    pub fn true_sequential(mut self, true_sequential: bool) -> Self {
        self.true_sequential = true_sequential;
        self
    }

    /// Whether the output layer is quantised; false unless said otherwise.
    pub fn lm_head(mut self, lm_head: bool) -> Self {
        self.lm_head = lm_head;
        self
    }

    /// The dampening that was used.
    pub fn damp_percent(mut self, damp_percent: f64) -> Self {
        self.damp_percent = Some(damp_percent);
        self
    }

    /// The layout. Unless said otherwise `gptq` for symmetric checkpoints, which every tool reads, and `gptq_v2` for
    /// asymmetric ones, because `gptq` cannot hold a zero point of 0.
    pub fn checkpoint_format(mut self, format: CheckpointFormat) -> Self {
        self.format = Some(format);
        self
    }

    /// Settings of the layers whose name matches a regular expression from its start; the first rule that matches wins.
    pub fn override_modules(mut self, pattern: &str, bits: Bits, group_size: Option<usize>) -> Self {
        let overrides = json!({"bits": bits.get(), "group_size": group_size_value(group_size)});
        self.dynamic.insert(format!("+:{pattern}"), overrides);
        self
    }

    /// Layers that are not quantised, by a regular expression that matches their name from its start.
    pub fn skip_modules(mut self, pattern: &str) -> Self {
        self.dynamic.insert(format!("-:{pattern}"), json!({}));
        self
    }

    /// Rules for layers, after those that are there. A rule of the same pattern takes the place of the one there.
    pub fn dynamic(mut self, rules: &DynamicRules) -> Self {
        self.dynamic.extend(rules.fields());
        self
    }

    /// A number of the recipe that inference does not need, such as `mse`; it goes under `meta`.
    pub fn recipe_number(mut self, key: &str, value: f64) -> Self {
        self.meta.insert(key.into(), json!(value));
        self
    }

    /// A switch of the recipe that inference does not need, such as `act_group_aware`; it goes under `meta`.
    pub fn recipe_switch(mut self, key: &str, value: bool) -> Self {
        self.meta.insert(key.into(), json!(value));
        self
    }

    /// A text of the recipe, such as the method's name; it goes under `meta`. Never put calibration text here: it would
    /// be published with the weights.
    pub fn recipe_text(mut self, key: &str, value: &str) -> Self {
        self.meta.insert(key.into(), json!(value));
        self
    }

    /// The config.
    ///
    /// # Errors
    /// [`ConfigError::Pattern`](super::ConfigError::Pattern) for a rule that is no regular expression,
    /// [`ConfigError::Value`](super::ConfigError::Value) for a group size of 0.
    pub fn build(self) -> Result<QuantizeConfig, super::ConfigError> {
        let default = if self.sym { CheckpointFormat::Gptq } else { CheckpointFormat::GptqV2 };
        let format = self.format.unwrap_or(default).name();
        // Both names of the format and of the method: older tools know only one of each.
        let object = json!({
            "bits": self.bits.get(),
            "group_size": group_size_value(self.group_size),
            "desc_act": self.desc_act,
            "sym": self.sym,
            "static_groups": self.static_groups,
            "true_sequential": self.true_sequential,
            "lm_head": self.lm_head,
            "quant_method": "gptq",
            "method": "gptq",
            "checkpoint_format": format,
            "format": format,
            "pack_dtype": "int32",
        });
        let Value::Object(mut fields) = object else { unreachable!("invariant: an object literal") };
        if let Some(damp_percent) = self.damp_percent {
            fields.insert("damp_percent".into(), json!(damp_percent));
        }
        if !self.dynamic.is_empty() {
            fields.insert("dynamic".into(), Value::Object(self.dynamic));
        }
        fields.insert("meta".into(), Value::Object(self.meta));
        let config = QuantizeConfig::from_fields(fields)?;
        // One place knows what else a layout needs.
        Ok(config.with_checkpoint_format(config.format.unwrap_or(default)))
    }
}

fn group_size_value(group_size: Option<usize>) -> Value {
    group_size.map_or_else(|| json!(-1), |size| json!(size))
}
