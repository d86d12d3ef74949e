//! Rotary position embeddings: frequencies and tables.

use super::{ConfigError, json::Object};

/// How positions become angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// What was done to the series to stretch the context.
    pub scaling: RopeScaling,
}

/// Ways to stretch the context.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor` (position interpolation).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between them.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Positions of the first training.
        original_max_positions: usize,
    },
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).
    pub(super) fn from_json(json: &Object<'_>) -> Result<Self, ConfigError> {
        let parameters = json.object("rope_parameters")?;
        let scaling = match &parameters {
            Some(_) => None,
            None => json.object("rope_scaling")?,
        };
        let theta_of = |object: &Object<'_>| match object.number("rope_theta")? {
            Some(theta) if theta < 1.0 => Err(object.value("rope_theta", "must be at least 1")),
            theta => Ok(theta),
        };
        let theta = match &parameters {
            Some(parameters) => theta_of(parameters)?,
            None => None,
        };
        let theta = match theta {
            Some(theta) => theta,
            None => theta_of(json)?.unwrap_or(10_000.0),
        };
        for object in parameters.iter().chain([json]) {
            if object.number_or("partial_rotary_factor", 1.0)? != 1.0 {
                return Err(object.value("partial_rotary_factor", "only 1 is supported"));
            }
        }
        let scaling = match parameters.as_ref().or(scaling.as_ref()) {
            Some(object) => RopeScaling::from_json(object, json)?,
            None => RopeScaling::Default,
        };
        Ok(Self { theta, scaling })
    }

    /// Cosines and sines, both `(positions, head_dim / 2)`.
    ///
    /// Angles are computed in float32 from frequencies in float32, as the models' training code does: at position `p`
    /// that rounding moves an angle by up to `p * 2^-24`, and models have learnt with it.
    pub fn table(&self, head_dim: usize, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let frequencies = self.frequencies(head_dim);
        let mut cos = Vec::with_capacity(positions * frequencies.len());
        let mut sin = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            for &frequency in &frequencies {
                let (s, c) = f64::from(position as f32 * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        (cos, sin)
    }

    /// Radians a position for each pair of features.
    fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| {
                let plain = 1.0 / self.theta.powf((2 * i) as f64 / head_dim as f64);
                self.scaling.apply(plain) as f32
            })
            .collect()
    }
}

impl RopeScaling {
    fn from_json(object: &Object<'_>, root: &Object<'_>) -> Result<Self, ConfigError> {
        let rope_type = match object.string("rope_type")? {
            Some(name) => name,
            None => object.string("type")?.unwrap_or("default"),
        };
        let at_least = |key: &str, least: f64| match object.number(key)? {
            None => Err(object.missing(key)),
            Some(number) if number >= least => Ok(number),
            Some(_) => Err(object.value(key, &format!("must be at least {least}"))),
        };
        match rope_type {
            "default" => Ok(Self::Default),
            "linear" => Ok(Self::Linear { factor: at_least("factor", 1.0)? }),
            "llama3" => {
                let low = at_least("low_freq_factor", f64::MIN_POSITIVE)?;
                let high = at_least("high_freq_factor", f64::MIN_POSITIVE)?;
                if high <= low {
                    return Err(object.value("high_freq_factor", "must exceed low_freq_factor"));
                }
                let original = match object.optional_positive("original_max_position_embeddings")? {
                    Some(positions) => positions,
                    None => root.positive("max_position_embeddings")?,
                };
                Ok(Self::Llama3 {
                    factor: at_least("factor", 1.0)?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_positions: original,
                })
            }
            other => Err(ConfigError::RopeType { rope_type: other.to_owned() }),
        }
    }

    fn apply(&self, frequency: f64) -> f64 {
        match *self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                // Wavelengths that fit into the original context; the ramp runs between the two factors.
                let turns = original_max_positions as f64 * frequency / std::f64::consts::TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let kept = kept.clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
        }
    }
}
