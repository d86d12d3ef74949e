//! The layout of Marlin checkpoints: tiles in the order in which a tensor core's fragments want them.
//!
//! `B` `(I/16, 2 O)` holds 4-bit codes (zero point 8) in tiles of 16 inputs by 16 outputs. Four tiles side by side, 64
//! outputs, make a run of 1024 codes, which lane `l = 0..32` of a warp loads as four words, one for each tile: outputs
//! `l/4` and `l/4 + 8`, and for each of them inputs `2(l%4)`, `2(l%4) + 1`, `2(l%4) + 8`, `2(l%4) + 9`. In a word these
//! eight are interleaved so that two of them can be extracted by one mask. `s` `(G, O)` is permuted likewise.

use half::f16;

use crate::{Bits, CodesRef, PackError, PackedLinear};

/// Inputs and outputs of a tile.
const TILE: usize = 16;
/// Outputs of a run.
const RUN_OUTPUTS: usize = 64;
/// Where in a word the eight codes of a lane lie: nibble `n` holds the code `INTERLEAVE[n]`.
const INTERLEAVE: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// What a layer must be to have this layout, in words for an error.
pub(crate) const NEEDS: &str = "4 bits, symmetric zero points, no act-order, one group or groups of 128, inputs in \
                                multiples of 128 and outputs in multiples of 256";

/// Whether these sizes have the layout.
pub(crate) fn shape_fits(in_features: usize, out_features: usize, groups: usize) -> bool {
    let grouped = groups == 1 || groups * 128 == in_features;
    in_features > 0
        && out_features > 0
        && in_features.is_multiple_of(128)
        && out_features.is_multiple_of(256)
        && grouped
}

/// Whether a layer has the layout.
pub(crate) fn fits(linear: &PackedLinear) -> bool {
    linear.bits() == Bits::B4
        && linear.is_symmetric()
        && !linear.is_act_order()
        && shape_fits(linear.in_features(), linear.out_features(), linear.groups())
}

/// Calls `visit` with the place of every code: word, shift in the word, input, output.
fn for_each_code(in_features: usize, out_features: usize, mut visit: impl FnMut(usize, usize, usize, usize)) {
    for input_tile in 0..in_features / TILE {
        for run in 0..out_features / RUN_OUTPUTS {
            for lane in 0..32 {
                for tile in 0..4 {
                    let word = input_tile * 2 * out_features + run * 128 + lane * 4 + tile;
                    for (nibble, code) in INTERLEAVE.into_iter().enumerate() {
                        let (block, row) = (code / 4, code % 4);
                        let input = input_tile * TILE + 2 * (lane % 4) + [0, 1, 8, 9][row];
                        let output = run * RUN_OUTPUTS + tile * TILE + lane / 4 + 8 * block;
                        visit(word, 4 * nibble, input, output);
                    }
                }
            }
        }
    }
}

/// The place in a natural row of scales that each place in a stored row takes its value from, repeating.
fn scale_order(groups: usize) -> Vec<usize> {
    if groups > 1 {
        (0..8).flat_map(|i| (0..8).map(move |j| i + 8 * j)).collect()
    } else {
        (0..4).flat_map(|i| [0, 1, 8, 9, 16, 17, 24, 25].map(|j| 2 * i + j)).collect()
    }
}

/// `B` and `s` of a layer that [`fits`].
pub(crate) fn encode(linear: &PackedLinear) -> (Vec<u32>, Vec<f16>) {
    let (in_features, out_features) = (linear.in_features(), linear.out_features());
    let codes = linear.unpack_codes();
    let mut words = vec![0; in_features / 8 * out_features];
    for_each_code(in_features, out_features, |word, shift, input, output| {
        words[word] |= u32::from(codes[output * in_features + input]) << shift;
    });
    let order = scale_order(linear.groups());
    let rows = linear.scales().chunks_exact(order.len());
    (words, rows.flat_map(|natural| order.iter().map(|&from| natural[from])).collect())
}

/// The layer of `B` and `s`, whose lengths and shape the caller has checked with [`shape_fits`].
pub(crate) fn decode(
    words: &[u32],
    stored: &[f16],
    in_features: usize,
    out_features: usize,
    bias: Option<&[f32]>,
) -> Result<PackedLinear, PackError> {
    let groups = stored.len() / out_features;
    let mut codes = vec![0; in_features * out_features];
    for_each_code(in_features, out_features, |word, shift, input, output| {
        codes[output * in_features + input] = (words[word] >> shift & 15) as u8;
    });
    let order = scale_order(groups);
    let mut scales = vec![0.0; stored.len()];
    for (at, scale) in stored.iter().enumerate() {
        let natural = at / order.len() * order.len() + order[at % order.len()];
        let (group, output) = (natural / out_features, natural % out_features);
        scales[output * groups + group] = scale.to_f32();
    }
    let group_size = in_features / groups;
    let g_idx: Vec<u32> = (0..in_features).map(|i| (i / group_size) as u32).collect();
    PackedLinear::pack(&CodesRef {
        bits: Bits::B4,
        group_size,
        in_features,
        out_features,
        codes: &codes,
        zeros: &vec![8; stored.len()],
        scales: &scales,
        g_idx: &g_idx,
        bias,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(in_features: usize, out_features: usize, group_size: usize) -> PackedLinear {
        let mut state = 1u32;
        let codes: Vec<u8> = (0..in_features * out_features)
            .map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 28) as u8
            })
            .collect();
        let groups = in_features / group_size;
        let g_idx: Vec<u32> = (0..in_features).map(|i| (i / group_size) as u32).collect();
        let scales: Vec<f32> = (0..groups * out_features).map(|k| k as f32 / 4.0).collect();
        PackedLinear::pack(&CodesRef {
            bits: Bits::B4,
            group_size,
            in_features,
            out_features,
            codes: &codes,
            zeros: &vec![8; groups * out_features],
            scales: &scales,
            g_idx: &g_idx,
            bias: None,
        })
        .expect("valid")
    }

    /// The published recipe step by step: reshape, permute runs of 1024, interleave, pack.
    fn by_the_recipe(linear: &PackedLinear) -> Vec<u32> {
        let (inputs, outputs) = (linear.in_features(), linear.out_features());
        let codes = linear.unpack_codes();
        let mut tiled = Vec::new();
        for input_tile in 0..inputs / 16 {
            for output_tile in 0..outputs / 16 {
                for row in 0..16 {
                    for column in 0..16 {
                        tiled.push(codes[(output_tile * 16 + column) * inputs + input_tile * 16 + row]);
                    }
                }
            }
        }
        let mut permutation = Vec::new();
        for i in 0..32 {
            let mut lane = Vec::new();
            for block in 0..2 {
                for row in [2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1] {
                    lane.push(16 * row + i / 4 + 8 * block);
                }
            }
            for j in 0..4 {
                permutation.extend(lane.iter().map(|p| p + 256 * j));
            }
        }
        let interleaved: Vec<usize> =
            permutation.chunks(8).flat_map(|eight| [0, 2, 4, 6, 1, 3, 5, 7].map(|k| eight[k])).collect();
        let permuted: Vec<u8> =
            tiled.chunks(1024).flat_map(|run| interleaved.iter().map(|&p| run[p])).collect();
        permuted
            .chunks(8)
            .map(|eight| eight.iter().rev().fold(0, |word, &code| word << 4 | u32::from(code)))
            .collect()
    }

    #[test]
    fn codes_lie_where_the_recipe_puts_them() {
        let linear = layer(256, 256, 128);
        assert_eq!(encode(&linear).0, by_the_recipe(&linear));
    }

    #[test]
    fn scales_are_permuted_within_64_or_32() {
        let (_, grouped) = encode(&layer(256, 256, 128));
        let start: Vec<f32> = grouped[..10].iter().map(|scale| scale.to_f32() * 4.0).collect();
        // `layer` numbers scales by output, then group: output o of group 0 has the number 2 o.
        assert_eq!(start, [0, 8, 16, 24, 32, 40, 48, 56, 1, 9].map(|o| 2.0 * o as f32));
        let (_, single) = encode(&layer(256, 256, 256));
        let start: Vec<f32> = single[..10].iter().map(|scale| scale.to_f32() * 4.0).collect();
        assert_eq!(start, [0, 1, 8, 9, 16, 17, 24, 25, 2, 3].map(|o| o as f32));
    }

    #[test]
    fn decoding_gives_what_was_encoded() {
        for (inputs, outputs, group_size) in [(128, 256, 128), (256, 512, 128), (384, 256, 384)] {
            let linear = layer(inputs, outputs, group_size);
            assert!(fits(&linear));
            let (words, scales) = encode(&linear);
            assert_eq!(decode(&words, &scales, inputs, outputs, None).expect("valid"), linear);
        }
        assert!(!fits(&layer(128, 128, 128)));
        assert!(!fits(&layer(256, 256, 64)));
    }
}
