use half::f16;

use crate::Bits;

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
}

impl PackedLinear {
    /// Packs unpacked codes.
    pub fn pack(codes: &CodesRef<'_>) -> Result<Self, PackError> {
        let _ = codes;
        todo!("format helper")
    }

    /// Validates packed words.
    pub fn from_parts(parts: PackedParts) -> Result<Self, PackError> {
        let _ = parts;
        todo!("format helper")
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
        todo!("format helper")
    }

    /// Codes, `(O, I)` row-major.
    pub fn unpack_codes(&self) -> Vec<u8> {
        todo!("format helper")
    }

    /// Zero points, `(G, O)` row-major.
    pub fn unpack_zeros(&self) -> Vec<u8> {
        todo!("format helper")
    }

    /// Float32 weight, `(O, I)` row-major: `f32(scale) * (code - zero)`, rounded once.
    pub fn dequantize(&self) -> Vec<f32> {
        todo!("format helper")
    }
}
