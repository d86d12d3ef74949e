use gptq_core::GptqConfig;
use gptq_format::DynamicRules;

/// How a model is quantised.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct QuantizeOptions {
    /// Settings of the quantiser for every layer that no rule of [`dynamic`](Self::dynamic) matches.
    pub gptq: GptqConfig,
    /// Within a decoder layer, quantise q, k and v first, then o behind their quantised versions, then gate and up, then
    /// down. Otherwise all seven see the inputs of the unquantised layer.
    pub true_sequential: bool,
    /// Bytes of activations that are kept in memory: the residual stream of all rows and one more activation, for GPTAQ
    /// twice. What does not fit [`QuantizeJob`](crate::QuantizeJob) keeps in a file in its output folder.
    /// [`quantize`](crate::quantize()) has no folder: it keeps the residual stream in memory and computes MLP activations
    /// twice if they do not fit.
    pub activation_bytes: usize,
    /// Bytes of activations in the memory of a device that has its own; `None` for what is free beside the work on a layer.
    /// What does not fit is kept in the host's memory, as far as [`activation_bytes`](Self::activation_bytes) reaches.
    pub device_activation_bytes: Option<usize>,
    /// Settings of single layers by name, such as `model.layers.0.mlp.down_proj` and `lm_head`; the first rule that
    /// matches decides. A rule overrides `bits`, `group_size`, `sym`, `desc_act`, `static_groups`, `act_group_aware`,
    /// `mse`, `damp_percent`, `damp_auto_increment` and `gptaq` (its strength), or says that a layer stays as it is.
    pub dynamic: DynamicRules,
    /// Quantise the output layer too, on the outputs of the final norm.
    pub lm_head: bool,
}

impl Default for QuantizeOptions {
    /// Symmetric 4-bit groups of 128, true_sequential, 4 GiB of activations, all layers alike and without the output
    /// layer.
    fn default() -> Self {
        Self {
            gptq: GptqConfig::default(),
            true_sequential: true,
            activation_bytes: 4 << 30,
            device_activation_bytes: None,
            dynamic: DynamicRules::default(),
            lm_head: false,
        }
    }
}

impl QuantizeOptions {
    /// The default for these settings of the quantiser.
    pub fn new(gptq: GptqConfig) -> Self {
        Self { gptq, ..Self::default() }
    }

    /// The recipe with the lowest perplexity: asymmetric, `desc_act`, grids searched under the 2.4-norm, GPTAQ with
    /// strength 0.5.
    ///
    /// It was chosen among about twenty combinations of order, symmetry, grid search, damping and GPTAQ's strength by the
    /// perplexity of the bundled model on the last quarter of its calibration rows, quantised with the other three
    /// quarters. Its price: two passes of calibration instead of one, activations gathered at inference, and
    /// zero points in the `gptq_v2` convention, which old readers do not know.
    ///
    /// Errors: `bits` or `group_size` that cannot be.
    pub fn best(bits: u32, group_size: Option<usize>) -> Result<Self, gptq_core::ConfigError> {
        let builder = GptqConfig::builder().bits(bits).group_size(group_size);
        let builder = builder.sym(false).desc_act(true).mse(Some(2.4)).gptaq(Some(0.5));
        Ok(Self::new(builder.build()?))
    }

    /// Sets [`activation_bytes`](Self::activation_bytes).
    #[must_use]
    pub fn with_activation_bytes(mut self, bytes: usize) -> Self {
        self.activation_bytes = bytes;
        self
    }

    /// Sets [`device_activation_bytes`](Self::device_activation_bytes).
    #[must_use]
    pub fn with_device_activation_bytes(mut self, bytes: Option<usize>) -> Self {
        self.device_activation_bytes = bytes;
        self
    }

    /// Sets [`dynamic`](Self::dynamic).
    #[must_use]
    pub fn with_dynamic(mut self, rules: DynamicRules) -> Self {
        self.dynamic = rules;
        self
    }

    /// Sets [`lm_head`](Self::lm_head).
    #[must_use]
    pub fn with_lm_head(mut self, lm_head: bool) -> Self {
        self.lm_head = lm_head;
        self
    }
}
