//! How to quantise: [`GptqConfig`] and its builder.

use std::num::NonZeroUsize;

use crate::error::ConfigError;

/// What to do with a layer whose Hessian no damping can make positive definite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// Return [`GptqError::NotPositiveDefinite`](crate::GptqError::NotPositiveDefinite).
    #[default]
    Error,
    /// Round to nearest instead, and say so in the report and by a `tracing` warning.
    Rtn,
}

/// Settings of the quantiser, valid by construction.
///
/// ```
/// use gptq_core::GptqConfig;
///
/// let config = GptqConfig::builder().bits(3).group_size(Some(64)).desc_act(true).build()?;
/// assert_eq!(config.max_code(), 7);
/// assert!(GptqConfig::builder().bits(5).build().is_err());
/// # Ok::<(), gptq_core::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct GptqConfig {
    bits: u32,
    group_size: Option<NonZeroUsize>,
    sym: bool,
    desc_act: bool,
    static_groups: bool,
    act_group_aware: bool,
    mse: Option<f32>,
    damp_percent: f64,
    damp_auto_increment: f64,
    block_size: NonZeroUsize,
    gptaq: Option<f32>,
    on_failure: OnFailure,
}

impl Default for GptqConfig {
    /// What most published checkpoints use: 4 bits, groups of 128, symmetric, columns in natural order, no grid search,
    /// damping 0.01.
    fn default() -> Self {
        Self {
            bits: 4,
            group_size: NonZeroUsize::new(128),
            sym: true,
            desc_act: false,
            static_groups: false,
            act_group_aware: false,
            mse: None,
            damp_percent: 0.01,
            damp_auto_increment: 0.01,
            block_size: NonZeroUsize::new(128).expect("invariant: 128 is not zero"),
            gptaq: None,
            on_failure: OnFailure::Error,
        }
    }
}

impl GptqConfig {
    /// Starts from the default settings.
    pub fn builder() -> GptqConfigBuilder {
        let config = Self::default();
        GptqConfigBuilder {
            group_size: config.group_size.map(NonZeroUsize::get),
            block_size: config.block_size.get(),
            config,
        }
    }

    /// Width of a code: 2, 3, 4 or 8.
    #[must_use]
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// The largest code, `Q = 2^bits - 1`.
    #[must_use]
    pub fn max_code(&self) -> u8 {
        u8::try_from((1u32 << self.bits) - 1).expect("invariant: bits is at most 8")
    }

    /// Columns that share a scale and a zero; `None` is one group per row.
    #[must_use]
    pub fn group_size(&self) -> Option<NonZeroUsize> {
        self.group_size
    }

    /// The number of groups that a row of `in_features` columns has, a ragged last one included.
    #[must_use]
    pub fn groups(&self, in_features: usize) -> usize {
        self.group_size.map_or(1, |group_size| in_features.div_ceil(group_size.get()))
    }

    /// Whether the zero is fixed at the middle of the grid.
    #[must_use]
    pub fn sym(&self) -> bool {
        self.sym
    }

    /// Whether columns are quantised in the order of their activation energy, groups following that order.
    #[must_use]
    pub fn desc_act(&self) -> bool {
        self.desc_act
    }

    /// Whether all grids are set before the first column is quantised.
    #[must_use]
    pub fn static_groups(&self) -> bool {
        self.static_groups
    }

    /// Whether columns are ordered inside their groups, and groups among themselves (GAR, arXiv:2505.14638).
    #[must_use]
    pub fn act_group_aware(&self) -> bool {
        self.act_group_aware
    }

    /// Exponent of the grid search's error norm, if grids are searched.
    #[must_use]
    pub fn mse(&self) -> Option<f32> {
        self.mse
    }

    /// Share of the Hessian's mean diagonal added to its diagonal.
    #[must_use]
    pub fn damp_percent(&self) -> f64 {
        self.damp_percent
    }

    /// Step by which the damping is raised while the Hessian is not positive definite; 0 never raises it.
    #[must_use]
    pub fn damp_auto_increment(&self) -> f64 {
        self.damp_auto_increment
    }

    /// Columns between two lazy updates of the rest of the weight.
    #[must_use]
    pub fn block_size(&self) -> NonZeroUsize {
        self.block_size
    }

    /// Strength of GPTAQ's correction (arXiv:2504.02692), if it is on.
    #[must_use]
    pub fn gptaq(&self) -> Option<f32> {
        self.gptaq
    }

    /// What happens to a layer that cannot be factorised.
    #[must_use]
    pub fn on_failure(&self) -> OnFailure {
        self.on_failure
    }
}

/// Collects settings; [`build`](Self::build) checks them.
#[derive(Debug, Clone)]
#[must_use]
pub struct GptqConfigBuilder {
    config: GptqConfig,
    group_size: Option<usize>,
    block_size: usize,
}

impl GptqConfigBuilder {
    /// Width of a code: 2, 3, 4 or 8. Default 4.
    pub fn bits(mut self, bits: u32) -> Self {
        self.config.bits = bits;
        self
    }

    /// Columns per group, a multiple of 8; `None` is one group per row, its grid from the weight as given. Default 128.
    pub fn group_size(mut self, group_size: Option<usize>) -> Self {
        self.group_size = group_size;
        self
    }

    /// Symmetric grids. Default true.
    pub fn sym(mut self, sym: bool) -> Self {
        self.config.sym = sym;
        self
    }

    /// Quantise columns in descending order of the Hessian's diagonal. Default false.
    pub fn desc_act(mut self, desc_act: bool) -> Self {
        self.config.desc_act = desc_act;
        self
    }

    /// Set all grids from the weight as given, by natural groups, before quantising. Default false.
    pub fn static_groups(mut self, static_groups: bool) -> Self {
        self.config.static_groups = static_groups;
        self
    }

    /// Order columns inside groups and groups among themselves, keeping `g_idx` trivial. Default false.
    pub fn act_group_aware(mut self, act_group_aware: bool) -> Self {
        self.config.act_group_aware = act_group_aware;
        self
    }

    /// Search each grid for the smallest `sum |q - w|^exponent`; `None` takes the full range. Default `None`.
    pub fn mse(mut self, exponent: Option<f32>) -> Self {
        self.config.mse = exponent;
        self
    }

    /// Share of the mean diagonal added to the diagonal, in `[0, 1)`. Default 0.01.
    pub fn damp_percent(mut self, damp_percent: f64) -> Self {
        self.config.damp_percent = damp_percent;
        self
    }

    /// Step by which a damping that does not suffice is raised, in `[0, 1)`; 0 fails at once. Default 0.01.
    pub fn damp_auto_increment(mut self, damp_auto_increment: f64) -> Self {
        self.config.damp_auto_increment = damp_auto_increment;
        self
    }

    /// Columns between two lazy updates. Groups smaller than a block take their grid from the weight as it stood at the
    /// block's start, as all reference implementations do, so this is more than a matter of speed. Default 128.
    pub fn block_size(mut self, block_size: usize) -> Self {
        self.block_size = block_size;
        self
    }

    /// Asymmetric calibration by GPTAQ with this strength (0.25 is usual); needs reference inputs. Default `None`.
    pub fn gptaq(mut self, alpha: Option<f32>) -> Self {
        self.config.gptaq = alpha;
        self
    }

    /// What to do if no damping helps. Default [`OnFailure::Error`].
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.config.on_failure = on_failure;
        self
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// The first setting that cannot be.
    pub fn build(self) -> Result<GptqConfig, ConfigError> {
        let Self { mut config, group_size, block_size } = self;
        if !matches!(config.bits, 2 | 3 | 4 | 8) {
            return Err(ConfigError::Bits { bits: config.bits });
        }
        config.group_size = match group_size {
            None => None,
            Some(columns) => match NonZeroUsize::new(columns) {
                Some(valid) if columns % 8 == 0 => Some(valid),
                _ => return Err(ConfigError::GroupSize { group_size: columns }),
            },
        };
        config.block_size = NonZeroUsize::new(block_size).ok_or(ConfigError::BlockSize)?;
        if !(0.0..1.0).contains(&config.damp_percent) {
            return Err(ConfigError::DampPercent { damp_percent: config.damp_percent });
        }
        if !(0.0..1.0).contains(&config.damp_auto_increment) {
            return Err(ConfigError::DampAutoIncrement { damp_auto_increment: config.damp_auto_increment });
        }
        if let Some(mse) = config.mse
            && !(mse.is_finite() && mse > 0.0)
        {
            return Err(ConfigError::Mse { mse });
        }
        if let Some(alpha) = config.gptaq
            && !(alpha.is_finite() && alpha >= 0.0)
        {
            return Err(ConfigError::GptaqAlpha { alpha });
        }
        if config.desc_act && config.act_group_aware {
            return Err(ConfigError::TwoOrders);
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_what_the_builder_builds() {
        assert_eq!(GptqConfig::builder().build(), Ok(GptqConfig::default()));
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let b = GptqConfig::builder;
        assert_eq!(b().bits(0).build(), Err(ConfigError::Bits { bits: 0 }));
        assert_eq!(b().bits(33).build(), Err(ConfigError::Bits { bits: 33 }));
        assert_eq!(b().group_size(Some(0)).build(), Err(ConfigError::GroupSize { group_size: 0 }));
        assert_eq!(b().group_size(Some(12)).build(), Err(ConfigError::GroupSize { group_size: 12 }));
        assert_eq!(b().block_size(0).build(), Err(ConfigError::BlockSize));
        assert_eq!(b().damp_percent(1.0).build(), Err(ConfigError::DampPercent { damp_percent: 1.0 }));
        assert_eq!(b().damp_percent(-0.1).build(), Err(ConfigError::DampPercent { damp_percent: -0.1 }));
        assert!(matches!(b().damp_percent(f64::NAN).build(), Err(ConfigError::DampPercent { .. })));
        assert!(matches!(b().damp_auto_increment(-1.0).build(), Err(ConfigError::DampAutoIncrement { .. })));
        assert_eq!(b().mse(Some(0.0)).build(), Err(ConfigError::Mse { mse: 0.0 }));
        assert!(matches!(b().gptaq(Some(f32::INFINITY)).build(), Err(ConfigError::GptaqAlpha { .. })));
        assert_eq!(b().desc_act(true).act_group_aware(true).build(), Err(ConfigError::TwoOrders));
    }
}
