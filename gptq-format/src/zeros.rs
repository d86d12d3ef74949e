use std::fmt;

use crate::bitstream::{pack_stream, padding_mask, unpack_stream};
use crate::{Bits, CheckpointFormat, QuantizeConfig};

/// How zero points are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ZeroConvention {
    /// Stored minus one, each field by itself.
    V1,
    /// Stored minus one, subtracted from whole words: what borrows from a zero point of 0 runs into the next field, and
    /// adding one to the whole word takes it back. GPTQModel writes 2, 4 and 8 bits like this.
    V1WholeWord,
    /// Stored as they are.
    V2,
}

/// What decided a [`ZeroConvention`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ZeroBasis {
    /// The caller.
    Override,
    /// The layout has only this convention, or no zero points at all.
    Layout,
    /// Practically all stored values are those that one convention has for a symmetric grid.
    SymmetricWords,
    /// The mean of the stored values, in an asymmetric checkpoint whose config claims no format.
    Mean,
    /// The config's `checkpoint_format`.
    Label,
    /// Nothing speaks for anything else than the oldest convention.
    Default,
}

/// The zero convention of a checkpoint and how it was decided.
///
/// The config's label is not trusted: there are checkpoints whose zero points contradict it, and reading those by the
/// label shifts every weight by one step.
#[derive(Clone, Debug, PartialEq)]
pub struct ZeroEvidence {
    /// The decision.
    pub convention: ZeroConvention,
    /// What decided.
    pub basis: ZeroBasis,
    /// The config's claim.
    pub label: Option<CheckpointFormat>,
    /// Zero points that were looked at.
    pub sampled: usize,
    /// How many of them are `2^(bits-1) - 1`, the symmetric zero point in version 1.
    pub v1_middle: usize,
    /// How many of them are `2^(bits-1)`, the symmetric zero point in version 2.
    pub v2_middle: usize,
    /// Mean of `stored - 2^(bits-1)` in units of one step: near -1.5 in version 1 and -0.5 in version 2 if weights are
    /// as often positive as negative, because the middle of an asymmetric grid is `(2^bits - 1) / 2`.
    pub mean_offset: f64,
    /// Whether the config claims the other convention.
    pub contradicts_label: bool,
}

/// The share of stored values that must be a symmetric middle before they decide. Asymmetric grids spread over the values
/// next to both middles: of 2 bits, the narrowest, either has at most some six of ten groups.
const SYMMETRIC_SHARE: f64 = 0.95;
/// Fewer values than this say nothing about an asymmetric grid.
const MIN_SAMPLE: usize = 512;
/// How far the mean may lie from what a convention predicts. Halfway between the predictions would be 0.5.
const MEAN_TOLERANCE: f64 = 0.25;

/// Counts over stored zero points.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ZeroSample {
    count: usize,
    v1_middle: usize,
    v2_middle: usize,
    sum_offset: i64,
    /// Offsets are in steps; with 8 bits the middle is known only to several steps, so those values do not vote.
    mean_count: usize,
}

impl ZeroSample {
    /// Adds one row of stored zero points.
    pub(crate) fn add(&mut self, bits: Bits, row: &[u32], out_features: usize) {
        let mut fields = vec![0; out_features];
        unpack_stream(bits, row, &mut fields);
        let middle = 1u8 << (bits.get() - 1);
        self.count += out_features;
        self.v1_middle += fields.iter().filter(|&&field| field == middle - 1).count();
        self.v2_middle += fields.iter().filter(|&&field| field == middle).count();
        if bits != Bits::B8 {
            self.mean_count += out_features;
            self.sum_offset += fields.iter().map(|&field| i64::from(field) - i64::from(middle)).sum::<i64>();
        }
    }

    pub(crate) fn decide(&self, config: &QuantizeConfig, wanted: Option<ZeroConvention>) -> ZeroEvidence {
        let label = config.checkpoint_format();
        let share = |count: usize| count as f64 / self.count.max(1) as f64;
        let mean_offset = self.sum_offset as f64 / self.mean_count.max(1) as f64;
        let near = |predicted: f64| {
            self.mean_count >= MIN_SAMPLE && (mean_offset - predicted).abs() < MEAN_TOLERANCE
        };
        let enough = self.count > 0 && (config.sym() || self.count >= MIN_SAMPLE);
        let has_layout = matches!(label, Some(CheckpointFormat::Planar | CheckpointFormat::Marlin));
        let (is_v1, basis) = if has_layout {
            (false, ZeroBasis::Layout)
        } else if enough && share(self.v1_middle) >= SYMMETRIC_SHARE {
            (true, ZeroBasis::SymmetricWords)
        } else if enough && share(self.v2_middle) >= SYMMETRIC_SHARE {
            (false, ZeroBasis::SymmetricWords)
        } else if near(-1.5) {
            (true, ZeroBasis::Mean)
        } else if near(-0.5) {
            (false, ZeroBasis::Mean)
        } else if let Some(label) = label {
            (label == CheckpointFormat::Gptq, ZeroBasis::Label)
        } else {
            (true, ZeroBasis::Default)
        };
        let whole_word = config.quantizers().iter().any(|name| name.starts_with("gptqmodel"));
        let found = match (is_v1, whole_word) {
            (false, _) => ZeroConvention::V2,
            (true, false) => ZeroConvention::V1,
            (true, true) => ZeroConvention::V1WholeWord,
        };
        let convention = wanted.unwrap_or(found);
        let labelled_v1 = match label {
            Some(CheckpointFormat::Gptq) => Some(true),
            Some(CheckpointFormat::GptqV2) => Some(false),
            _ => None,
        };
        ZeroEvidence {
            convention,
            basis: if wanted.is_some() { ZeroBasis::Override } else { basis },
            label,
            sampled: self.count,
            v1_middle: self.v1_middle,
            v2_middle: self.v2_middle,
            mean_offset,
            contradicts_label: labelled_v1.is_some_and(|v1| v1 == (convention == ZeroConvention::V2)),
        }
    }
}

/// The `1` of every field of a word.
const fn ones(bits: Bits) -> u32 {
    u32::MAX / bits.max_code() as u32
}

/// Stored zero points `(groups, words(out_features))` to true ones; clears the padding, which some writers fill.
pub(crate) fn decode_zeros(bits: Bits, out_features: usize, words: &mut [u32], convention: ZeroConvention) {
    match convention {
        ZeroConvention::V2 => {}
        // Where fields lie across two words, whole words cannot be borrowed from.
        ZeroConvention::V1WholeWord if 32u32.is_multiple_of(bits.get()) => {
            words.iter_mut().for_each(|word| *word = word.wrapping_add(ones(bits)));
        }
        ZeroConvention::V1 | ZeroConvention::V1WholeWord => {
            let mut fields = vec![0; out_features];
            for row in words.chunks_exact_mut(bits.words(out_features)) {
                unpack_stream(bits, row, &mut fields);
                fields.iter_mut().for_each(|field| *field = field.wrapping_add(1) & bits.max_code());
                pack_stream(bits, &fields, row);
            }
        }
    }
    let padding = padding_mask(bits, out_features);
    for row in words.chunks_exact_mut(bits.words(out_features)) {
        if let Some(last) = row.last_mut() {
            *last &= !padding;
        }
    }
}

/// True zero points, `(groups, words(out_features))`, to those of version 1. `Err` has the group and output feature of a
/// zero point of 0, which version 1 cannot hold.
pub(crate) fn encode_v1(bits: Bits, out_features: usize, words: &mut [u32]) -> Result<(), (usize, usize)> {
    let mut fields = vec![0; out_features];
    for (group, row) in words.chunks_exact_mut(bits.words(out_features)).enumerate() {
        unpack_stream(bits, row, &mut fields);
        if let Some(out) = fields.iter().position(|&field| field == 0) {
            return Err((group, out));
        }
        fields.iter_mut().for_each(|field| *field -= 1);
        pack_stream(bits, &fields, row);
    }
    Ok(())
}

impl fmt::Display for ZeroConvention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1 (stored minus one)",
            Self::V1WholeWord => "v1 (stored minus one, borrowed from whole words)",
            Self::V2 => "v2 (stored as they are)",
        })
    }
}

impl fmt::Display for ZeroEvidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.convention)?;
        let Self { sampled, v1_middle, v2_middle, mean_offset, .. } = self;
        match self.basis {
            ZeroBasis::Override => write!(f, "as asked for"),
            ZeroBasis::Layout => write!(f, "the layout has no other"),
            ZeroBasis::SymmetricWords if v1_middle >= v2_middle => {
                write!(f, "{v1_middle} of {sampled} stored values are the symmetric middle minus one")
            }
            ZeroBasis::SymmetricWords => {
                write!(f, "{v2_middle} of {sampled} stored values are the symmetric middle")
            }
            ZeroBasis::Mean => write!(
                f,
                "{sampled} stored values lie {mean_offset:.2} steps from the middle on average (-1.5 means v1, -0.5 v2)"
            ),
            ZeroBasis::Label => write!(f, "by the config's label"),
            ZeroBasis::Default => write!(f, "no label and no evidence, so the oldest convention"),
        }?;
        match self.label {
            Some(label) if self.contradicts_label => {
                write!(f, "; contradicts checkpoint_format {}", label.name())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
