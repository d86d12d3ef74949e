use gptq_format::PackedLinear;
use rayon::prelude::*;

use super::{
    repack::{feature_at, places, stored},
    units::{NONE, Order},
};
use crate::Epilogue;

/// Output features of a unit.
pub(super) const FEATURES: usize = 128;
/// Output features of the widest tile of `cuda/marlin.cu`.
const WIDEST_TILE: usize = 256;
/// Input features of a unit.
pub(super) const DEPTH: usize = 128;

/// A weight of up to 8 bits, stored in 4 or 8 and repacked for `cuda/marlin.cu`.
///
/// A unit is 128 output features x 128 input features:
///
/// ```text
/// codes                for every 32 output features, then every 64 input features: two rows of fragments as below
/// scales, per group    fp16; for every 32 output features: feature 8 j + r at 4 r + j
/// zeros, per group     one byte each, in the same order, if the layer is asymmetric
/// ```
///
/// A fragment is 16 output features x 64 input features at 4 bits, x 32 at 8 bits: 16 bytes for each of 32 lanes, the
/// left operand of 4 or 2 steps of the tensor core as `cuda/codes.cuh` describes it.
#[derive(Debug)]
pub(super) struct Tiles {
    /// `(unit_rows, k_units)` units of [`unit_bytes`] bytes.
    pub(super) bytes: Vec<u8>,
    /// Bits that a code takes.
    pub(super) bits: usize,
    /// Scale groups in a unit: 1, 2 or 4.
    pub(super) groups: usize,
    /// Whether zeros are stored; otherwise all are `2^(bits-1)`.
    pub(super) asym: bool,
    /// Units along the output features.
    pub(super) unit_rows: usize,
    /// Units along the input features.
    pub(super) k_units: usize,
    /// Column of `x` for every input feature of the units; `None` if it is the identity.
    pub(super) gather: Option<Vec<u16>>,
    /// In the order of the tiles, padded.
    pub(super) bias: Option<Vec<half::f16>>,
}

/// Bytes of a unit with that many groups.
pub(super) const fn unit_bytes(bits: usize, groups: usize, asym: bool) -> usize {
    FEATURES * DEPTH * bits / 8 + groups * FEATURES * if asym { 3 } else { 2 }
}

/// Place in a unit's codes: word, and lowest bit.
fn code_place(bits: usize, feature: usize, column: usize) -> (usize, usize) {
    let (warp, fragment, row) = (feature / 32 * 2 + column / 64, feature / 16 % 2, feature % 16);
    let (step, pair) = (column / 16 % 4, column % 16 / 2);
    // The lane, and which of its eight codes of the step.
    let (lane, register, upper) = (row % 8 * 4 + pair % 4, row / 8 + pair / 4 * 2, column % 2);
    let (words, per_word) = (bits / 4, 16 / bits);
    let word = step * words + register / per_word;
    let block = (warp * 2 + fragment) * words + word / 4;
    ((block * 32 + lane) * 4 + word % 4, bits * (register % per_word) + 16 * upper)
}

impl Tiles {
    /// Repacks a layer of at most [`MOST_FEATURES`](super::units::MOST_FEATURES) input features.
    pub(super) fn pack(weight: &PackedLinear, epilogue: Epilogue) -> Self {
        let (bits, asym) = stored(weight);
        let (inputs, outputs) = (weight.in_features(), weight.out_features());
        let order = Order::best(weight.g_idx(), asym);
        let (k_units, groups) = (order.columns.len() / DEPTH, DEPTH / order.run);
        let unit_rows = places(outputs, epilogue).div_ceil(FEATURES);
        let (codes, zeros, scales) = (weight.unpack_codes(), weight.unpack_zeros(), weight.scales());
        let unit = unit_bytes(bits, groups, asym);
        let feature = |packed| feature_at(packed, outputs, epilogue);
        let places: Vec<_> = (0..FEATURES * DEPTH).map(|i| code_place(bits, i / DEPTH, i % DEPTH)).collect();
        let mut bytes = vec![0; unit_rows * k_units * unit];
        bytes.par_chunks_mut(unit).enumerate().for_each(|(at, bytes)| {
            let (unit_row, u) = (at / k_units, at % k_units);
            let (words, rest) = bytes.split_at_mut(FEATURES * DEPTH * bits / 8);
            let (scale_bytes, zero_bytes) = rest.split_at_mut(groups * FEATURES * 2);
            let columns = &order.columns[u * DEPTH..][..DEPTH];
            for row in 0..FEATURES {
                let Some(feature) = feature(unit_row * FEATURES + row) else { continue };
                let codes = &codes[feature * inputs..][..inputs];
                for (&column, &(word, bit)) in columns.iter().zip(&places[row * DEPTH..]) {
                    if column != NONE {
                        // Bits never straddle bytes.
                        words[word * 4 + bit / 8] |= codes[column as usize] << (bit % 8);
                    }
                }
                for local in 0..groups {
                    let group = order.groups[u * groups + local] as usize * outputs + feature;
                    let place = (local * 4 + row / 32) * 32 + row % 8 * 4 + row % 32 / 8;
                    scale_bytes[place * 2..][..2].copy_from_slice(&scales[group].to_le_bytes());
                    if asym {
                        zero_bytes[place] = zeros[group];
                    }
                }
            }
        });
        let bias = weight.bias().map(|bias| {
            (0..(unit_rows * FEATURES).next_multiple_of(WIDEST_TILE))
                .map(|packed| feature(packed).map_or(half::f16::ZERO, |f| bias[f]))
                .collect()
        });
        Self { bytes, bits, groups, asym, unit_rows, k_units, gather: order.gather(inputs), bias }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_format::{Bits, CodesRef};

    #[test]
    fn every_code_of_a_unit_has_one_place() {
        for bits in [4, 8] {
            let mut used = vec![0u32; FEATURES * DEPTH * bits / 32];
            for feature in 0..FEATURES {
                for column in 0..DEPTH {
                    let (word, bit) = code_place(bits, feature, column);
                    let mask = ((1u32 << bits) - 1) << bit;
                    assert_eq!(used[word] & mask, 0, "{bits} {feature} {column}");
                    used[word] |= mask;
                }
            }
            assert!(used.iter().all(|&word| word == u32::MAX));
        }
    }

    /// A layer whose codes, zeros and scales tell where they come from.
    fn layer(bits: Bits, group_size: usize, inputs: usize, outputs: usize) -> PackedLinear {
        let groups = inputs.div_ceil(group_size);
        let most = usize::from(bits.max_code()) + 1;
        let codes: Vec<u8> = (0..inputs * outputs).map(|i| (i * 7 % most) as u8).collect();
        let zeros: Vec<u8> = (0..groups * outputs).map(|i| (i * 5 % most) as u8).collect();
        let scales: Vec<f32> = (0..groups * outputs).map(|i| 1.0 + i as f32 / 1024.0).collect();
        let g_idx: Vec<u32> = (0..inputs).map(|i| (i / group_size) as u32).collect();
        PackedLinear::pack(&CodesRef {
            bits,
            group_size,
            in_features: inputs,
            out_features: outputs,
            codes: &codes,
            zeros: &zeros,
            scales: &scales,
            g_idx: &g_idx,
            bias: None,
        })
        .unwrap()
    }

    #[test]
    fn units_hold_the_layer() {
        for bits in [Bits::B4, Bits::B8, Bits::B3] {
            let (inputs, outputs) = (130, 150);
            let packed = layer(bits, 32, inputs, outputs);
            let tiles = Tiles::pack(&packed, Epilogue::Store);
            let stored = if bits == Bits::B8 { 8 } else { 4 };
            assert_eq!((tiles.bits, tiles.groups, tiles.asym, &tiles.gather), (stored, 4, true, &None));
            assert_eq!((tiles.unit_rows, tiles.k_units), (2, 2));
            let unit = unit_bytes(stored, 4, true);
            assert_eq!(tiles.bytes.len(), 4 * unit);
            let (codes, zeros) = (packed.unpack_codes(), packed.unpack_zeros());
            // Feature 149, input feature 129: second row of units, second unit; feature 21 of it, column 1, first group.
            let last = &tiles.bytes[3 * unit..];
            let (word, bit) = code_place(stored, 21, 1);
            let code = last[word * 4 + bit / 8] >> (bit % 8) & ((1u16 << stored) - 1) as u8;
            assert_eq!(code, codes[149 * inputs + 129]);
            let (place, scales) = (21 % 8 * 4 + 21 / 8, FEATURES * DEPTH * stored / 8);
            assert_eq!(last[scales + place * 2..][..2], packed.scales()[4 * outputs + 149].to_le_bytes());
            assert_eq!(last[scales + 4 * FEATURES * 2 + place], zeros[4 * outputs + 149]);
        }
    }

    #[test]
    fn a_symmetric_layer_stores_no_zeros_if_they_are_the_middle() {
        let packed = layer(Bits::B4, 128, 256, 128);
        assert_eq!(Tiles::pack(&packed, Epilogue::Store).groups, 1);
        for (bits, asym) in [(Bits::B2, true), (Bits::B4, false), (Bits::B5, true), (Bits::B8, false)] {
            let codes = vec![1; 256 * 8];
            let packed = PackedLinear::pack(&CodesRef {
                bits,
                group_size: 128,
                in_features: 256,
                out_features: 8,
                codes: &codes,
                zeros: &[1 << (bits.get() - 1); 16],
                scales: &[1.0; 16],
                g_idx: &(0..256).map(|i| i / 128).collect::<Vec<_>>(),
                bias: None,
            })
            .unwrap();
            assert_eq!(Tiles::pack(&packed, Epilogue::Store).asym, asym, "{bits:?}");
        }
    }
}
