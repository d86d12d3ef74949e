use std::ops::Range;

use half::f16;

use crate::Bits;
use crate::bitstream::{pack_columns, pack_stream, padding_mask, unpack_columns, unpack_stream};

mod order;
#[cfg(test)]
mod tests;

/// One quantised linear layer in the canonical layout of this crate family.
///
/// `W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])`, with `G` groups, `I = in_features`,
/// `O = out_features`, `b = bits`, all matrices row-major:
///
/// | field | shape | content |
/// |---|---|---|
/// | `qweight` | `(ceil(I*b/32), O)` | codes, packed along the input dimension, little-endian continuous |
/// | `qzeros` | `(G, ceil(O*b/32))` | true zero points (the `gptq_v2` convention), packed along the output dimension |
/// | `scales` | `(G, O)` | half precision |
/// | `g_idx` | `(I)` | group of each input feature, every entry `< G` |
/// | `bias` | `(O)` | optional |
///
/// Other layouts on disk (v1 zeros, planar, Marlin) are converted when they are read and when they are written. A value
/// of this type has been validated: sizes agree, padding bits are zero, scales are finite, `g_idx` is in range.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedLinear {
    bits: Bits,
    group_size: usize,
    in_features: usize,
    out_features: usize,
    qweight: Vec<u32>,
    qzeros: Vec<u32>,
    scales: Vec<f16>,
    g_idx: Vec<u32>,
    bias: Option<Vec<f16>>,
}

/// The raw fields of a [`PackedLinear`], for [`PackedLinear::from_parts`].
#[derive(Clone, Debug)]
pub struct PackedParts {
    /// Width of one code.
    pub bits: Bits,
    /// Nominal group size; `in_features` for one group.
    pub group_size: usize,
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
    /// `(ceil(in_features * bits / 32), out_features)`
    pub qweight: Vec<u32>,
    /// `(groups, ceil(out_features * bits / 32))`, true zero points
    pub qzeros: Vec<u32>,
    /// `(groups, out_features)`
    pub scales: Vec<f16>,
    /// `(in_features)`
    pub g_idx: Vec<u32>,
    /// `(out_features)`
    pub bias: Option<Vec<f16>>,
}

/// Unpacked codes with their grid, in the layout that a quantiser produces: row-major, one row per output feature.
#[derive(Clone, Copy, Debug)]
pub struct CodesRef<'a> {
    /// Width of one code.
    pub bits: Bits,
    /// Nominal group size; `in_features` for one group.
    pub group_size: usize,
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
    /// `(out_features, in_features)`
    pub codes: &'a [u8],
    /// `(out_features, groups)`
    pub zeros: &'a [u8],
    /// `(out_features, groups)`; rounded to half precision by packing
    pub scales: &'a [f32],
    /// `(in_features)`
    pub g_idx: &'a [u32],
    /// `(out_features)`
    pub bias: Option<&'a [f32]>,
}

/// Why codes or packed words do not make a [`PackedLinear`].
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum PackError {
    /// A field does not have the number of elements that the shape asks for.
    #[error("{field} has {got} elements, the shape needs {expected}")]
    Length {
        /// Which field.
        field: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// `in_features`, `out_features` or `group_size` is zero, or their product overflows.
    #[error(
        "no linear layer has in_features {in_features}, out_features {out_features}, group_size {group_size}"
    )]
    Shape {
        /// Input features.
        in_features: usize,
        /// Output features.
        out_features: usize,
        /// Nominal group size.
        group_size: usize,
    },
    /// A code or zero point does not fit in `bits`.
    #[error("{field}[{index}] = {value} does not fit in {bits} bits")]
    Range {
        /// Which field.
        field: &'static str,
        /// Flat index.
        index: usize,
        /// The value.
        value: u32,
        /// The width.
        bits: u32,
    },
    /// Bits behind the last code or zero point are set: the words were packed for another shape or width.
    #[error("{field}[{index}] = {word:#010x} has bits set behind its last value")]
    Padding {
        /// Which field.
        field: &'static str,
        /// Flat index of the word.
        index: usize,
        /// The word.
        word: u32,
    },
    /// `g_idx` names a group that does not exist.
    #[error("g_idx[{index}] = {group}, but there are {groups} groups")]
    GroupIndex {
        /// Input feature.
        index: usize,
        /// The entry.
        group: u32,
        /// Number of groups.
        groups: usize,
    },
    /// A scale or bias is NaN, infinite, or becomes infinite in half precision.
    #[error("{field}[{index}] = {value} is not finite in half precision")]
    NonFinite {
        /// Which field.
        field: &'static str,
        /// Flat index.
        index: usize,
        /// The value.
        value: f32,
    },
    /// An order names a feature that does not exist, or one twice.
    #[error("order[{index}] = {feature} is not one of {features} features, or is there twice")]
    Order {
        /// Place in the order.
        index: usize,
        /// The entry.
        feature: u32,
        /// Number of features.
        features: usize,
    },
}

impl PackedLinear {
    /// Packs unpacked codes.
    ///
    /// A `group_size` above `in_features` is stored as `in_features`.
    ///
    /// # Errors
    /// [`PackError::Shape`] and [`PackError::Length`] if the sizes do not agree, [`PackError::Range`] if a code or zero
    /// point does not fit, [`PackError::GroupIndex`], and [`PackError::NonFinite`] if a scale or bias has no finite half
    /// precision value.
    pub fn pack(codes: &CodesRef<'_>) -> Result<Self, PackError> {
        let &CodesRef { bits, in_features, out_features, .. } = codes;
        let groups = check_shape(in_features, out_features, codes.group_size)?;
        check_length("codes", in_features * out_features, codes.codes.len())?;
        check_length("zeros", out_features * groups, codes.zeros.len())?;
        check_length("scales", out_features * groups, codes.scales.len())?;
        check_g_idx(codes.g_idx, in_features, groups)?;
        check_range("zeros", bits, codes.zeros)?;

        let zero_words = bits.words(out_features);
        let mut qzeros = vec![0; groups * zero_words];
        let mut scales = vec![f16::ZERO; groups * out_features];
        let mut zeros_of_group = vec![0; out_features];
        for group in 0..groups {
            let row = &mut scales[group * out_features..][..out_features];
            for out in 0..out_features {
                let at = out * groups + group;
                row[out] = half("scales", at, codes.scales[at])?;
                zeros_of_group[out] = codes.zeros[at];
            }
            pack_stream(bits, &zeros_of_group, &mut qzeros[group * zero_words..][..zero_words]);
        }
        let bias = match codes.bias {
            None => None,
            Some(bias) => {
                check_length("bias", out_features, bias.len())?;
                Some(bias.iter().enumerate().map(|(i, &x)| half("bias", i, x)).collect::<Result<_, _>>()?)
            }
        };
        // Packing looks at every code anyway; only if one does not fit it is looked for.
        let Some(qweight) = pack_columns(bits, codes.codes, in_features, out_features) else {
            return Err(check_range("codes", bits, codes.codes).expect_err("invariant: a code does not fit"));
        };
        Ok(Self {
            bits,
            group_size: codes.group_size.min(in_features),
            in_features,
            out_features,
            qweight,
            qzeros,
            scales,
            g_idx: codes.g_idx.to_vec(),
            bias,
        })
    }

    /// Validates packed words.
    ///
    /// The number of groups is `ceil(in_features / group_size)`; a `group_size` above `in_features` is stored as
    /// `in_features`.
    ///
    /// # Errors
    /// [`PackError::Shape`] and [`PackError::Length`] if the sizes do not agree, [`PackError::Padding`],
    /// [`PackError::GroupIndex`], and [`PackError::NonFinite`] for a NaN or infinite scale or bias.
    pub fn from_parts(parts: PackedParts) -> Result<Self, PackError> {
        let PackedParts { bits, group_size, in_features, out_features, qweight, qzeros, scales, g_idx, bias } =
            parts;
        let groups = check_shape(in_features, out_features, group_size)?;
        let zero_words = bits.words(out_features);
        check_length("qweight", bits.words(in_features) * out_features, qweight.len())?;
        check_length("qzeros", groups * zero_words, qzeros.len())?;
        check_length("scales", groups * out_features, scales.len())?;
        check_g_idx(&g_idx, in_features, groups)?;

        let last_row = qweight.len() - out_features;
        check_padding("qweight", padding_mask(bits, in_features), last_row, 1, &qweight)?;
        check_padding("qzeros", padding_mask(bits, out_features), zero_words - 1, zero_words, &qzeros)?;
        check_finite("scales", &scales)?;
        if let Some(bias) = &bias {
            check_length("bias", out_features, bias.len())?;
            check_finite("bias", bias)?;
        }
        let group_size = group_size.min(in_features);
        Ok(Self { bits, group_size, in_features, out_features, qweight, qzeros, scales, g_idx, bias })
    }

    /// Width of one code.
    pub fn bits(&self) -> Bits {
        self.bits
    }
    /// Nominal group size; `in_features` for one group. Groups follow `g_idx`, which need not be `i / group_size`.
    pub fn group_size(&self) -> usize {
        self.group_size
    }
    /// Number of groups `G`.
    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features
    }
    /// Input features `I`.
    pub fn in_features(&self) -> usize {
        self.in_features
    }
    /// Output features `O`.
    pub fn out_features(&self) -> usize {
        self.out_features
    }
    /// Packed codes, `(ceil(I*b/32), O)`.
    pub fn qweight(&self) -> &[u32] {
        &self.qweight
    }
    /// Packed true zero points, `(G, ceil(O*b/32))`.
    pub fn qzeros(&self) -> &[u32] {
        &self.qzeros
    }
    /// Scales, `(G, O)`.
    pub fn scales(&self) -> &[f16] {
        &self.scales
    }
    /// Group of each input feature, `(I)`.
    pub fn g_idx(&self) -> &[u32] {
        &self.g_idx
    }
    /// Bias, `(O)`.
    pub fn bias(&self) -> Option<&[f16]> {
        self.bias.as_deref()
    }

    /// Whether some feature is in another group than `i / group_size`, as `desc_act` without static groups makes it.
    pub fn is_act_order(&self) -> bool {
        self.g_idx.iter().enumerate().any(|(i, &g)| g as usize != i / self.group_size)
    }

    /// Whether every zero point is `2^(bits-1)`.
    pub fn is_symmetric(&self) -> bool {
        let middle = 1 << (self.bits.get() - 1);
        let mut row = vec![0; self.bits.words(self.out_features)];
        pack_stream(self.bits, &vec![middle; self.out_features], &mut row);
        self.qzeros.chunks_exact(row.len()).all(|zeros| zeros == row)
    }

    /// Codes, `(O, I)` row-major.
    pub fn unpack_codes(&self) -> Vec<u8> {
        let mut codes = vec![0; self.in_features * self.out_features];
        self.unpack_rows(0..self.out_features, &mut codes);
        codes
    }

    /// Zero points, `(G, O)` row-major.
    pub fn unpack_zeros(&self) -> Vec<u8> {
        let mut zeros = vec![0; self.groups() * self.out_features];
        let rows = self.qzeros.chunks_exact(self.bits.words(self.out_features));
        for (words, row) in rows.zip(zeros.chunks_exact_mut(self.out_features)) {
            unpack_stream(self.bits, words, row);
        }
        zeros
    }

    /// Float32 weight, `(O, I)` row-major: `f32(scale) * (code - zero)`.
    ///
    /// Exact: a half-precision scale has 11 significant bits and the difference at most 9, a float32 has 24.
    pub fn dequantize(&self) -> Vec<f32> {
        let zeros = self.unpack_zeros();
        let runs = runs(&self.g_idx);
        let mut weight = vec![0.0; self.in_features * self.out_features];
        // Some rows at a time, so that the codes stay in the cache between unpacking and use.
        const ROWS: usize = 64;
        let mut codes = vec![0; self.in_features * ROWS.min(self.out_features)];
        for (tile, weight) in weight.chunks_mut(ROWS * self.in_features).enumerate() {
            let first = tile * ROWS;
            let rows = weight.len() / self.in_features;
            self.unpack_rows(first..first + rows, &mut codes);
            let rows = codes.chunks_exact(self.in_features).zip(weight.chunks_exact_mut(self.in_features));
            for (out, (codes, weight)) in (first..).zip(rows) {
                for (group, run) in &runs {
                    let at = group * self.out_features + out;
                    let (scale, zero) = (self.scales[at].to_f32(), f32::from(zeros[at]));
                    for (weight, &code) in weight[run.clone()].iter_mut().zip(&codes[run.clone()]) {
                        *weight = scale * (f32::from(code) - zero);
                    }
                }
            }
        }
        weight
    }

    /// Codes of some output features, row after row.
    fn unpack_rows(&self, rows: Range<usize>, codes: &mut [u8]) {
        unpack_columns(self.bits, &self.qweight, self.in_features, self.out_features, rows, codes);
    }
}

/// Consecutive features of one group: one run per group in natural order, up to one per feature in act-order.
fn runs(g_idx: &[u32]) -> Vec<(usize, Range<usize>)> {
    let mut at = 0;
    let run = |features: &[u32]| {
        at += features.len();
        (features[0] as usize, at - features.len()..at)
    };
    g_idx.chunk_by(|a, b| a == b).map(run).collect()
}

/// The number of groups, if the layer can exist and none of its sizes in bits overflows.
fn check_shape(in_features: usize, out_features: usize, group_size: usize) -> Result<usize, PackError> {
    let bits = in_features.checked_next_multiple_of(32).zip(out_features.checked_next_multiple_of(32));
    let fits = bits.and_then(|(i, o)| i.checked_mul(o)?.checked_mul(8)).is_some();
    if !fits || in_features == 0 || out_features == 0 || group_size == 0 {
        return Err(PackError::Shape { in_features, out_features, group_size });
    }
    Ok(in_features.div_ceil(group_size))
}

fn check_length(field: &'static str, expected: usize, got: usize) -> Result<(), PackError> {
    if got == expected { Ok(()) } else { Err(PackError::Length { field, expected, got }) }
}

fn check_g_idx(g_idx: &[u32], in_features: usize, groups: usize) -> Result<(), PackError> {
    check_length("g_idx", in_features, g_idx.len())?;
    match g_idx.iter().position(|&group| group as usize >= groups) {
        None => Ok(()),
        Some(index) => Err(PackError::GroupIndex { index, group: g_idx[index], groups }),
    }
}

fn check_range(field: &'static str, bits: Bits, values: &[u8]) -> Result<(), PackError> {
    let max = bits.max_code();
    match values.iter().position(|&value| value > max) {
        None => Ok(()),
        Some(index) => Err(PackError::Range { field, index, value: values[index].into(), bits: bits.get() }),
    }
}

/// Checks the words `first, first + step, ...`.
fn check_padding(
    field: &'static str,
    mask: u32,
    first: usize,
    step: usize,
    words: &[u32],
) -> Result<(), PackError> {
    match (first..words.len()).step_by(step).find(|&index| words[index] & mask != 0) {
        None => Ok(()),
        Some(index) => Err(PackError::Padding { field, index, word: words[index] }),
    }
}

fn check_finite(field: &'static str, values: &[f16]) -> Result<(), PackError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(PackError::NonFinite { field, index, value: values[index].to_f32() }),
    }
}

fn half(field: &'static str, index: usize, value: f32) -> Result<f16, PackError> {
    let rounded = f16::from_f32(value);
    if rounded.is_finite() { Ok(rounded) } else { Err(PackError::NonFinite { field, index, value }) }
}
