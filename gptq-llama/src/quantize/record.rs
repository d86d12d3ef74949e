//! A finished layer as the journal keeps it: codes, and scales in float32.
//!
//! The checkpoint has scales in half precision only, but the layers behind were quantised for inputs that passed through
//! scales in float32. With those kept, the inputs can be computed again, to the bit.

use gptq_core::{LayerReport, QuantizedWeight};
use gptq_format::{Bits, PackedLinear, PackedParts};
use half::f16;
use ndarray::Array2;
use serde::{Deserialize, Serialize};

use super::LayerSummary;

/// A quantised layer.
pub(super) struct Finished {
    pub(super) packed: PackedLinear,
    /// As the solver has them, `(out_features, groups)`; the packed ones are rounded to half precision.
    pub(super) scales: Array2<f32>,
    pub(super) summary: LayerSummary,
}

/// The sizes, before the numbers.
#[derive(Serialize, Deserialize)]
struct Head {
    bits: u32,
    group_size: usize,
    in_features: usize,
    out_features: usize,
    groups: usize,
    bias: bool,
}

/// A layer and its scales `(out_features, groups)` as bytes.
pub(super) fn encode(packed: &PackedLinear, scales: &Array2<f32>) -> Vec<u8> {
    let head = Head {
        bits: packed.bits().get(),
        group_size: packed.group_size(),
        in_features: packed.in_features(),
        out_features: packed.out_features(),
        groups: packed.groups(),
        bias: packed.bias().is_some(),
    };
    let head = serde_json::json!(head).to_string();
    let parts = [packed.qweight(), packed.qzeros(), packed.g_idx()];
    let words: usize = parts.iter().map(|words| words.len()).sum::<usize>() + scales.len();
    let mut bytes = Vec::with_capacity(head.len() + 4 * words + 2 * packed.out_features() + 8);
    bytes.extend((head.len() as u64).to_le_bytes());
    bytes.extend(head.as_bytes());
    for words in parts {
        if cfg!(target_endian = "little") {
            bytes.extend_from_slice(bytemuck::cast_slice(words));
        } else {
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
    }
    bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    bytes.extend(packed.bias().unwrap_or_default().iter().flat_map(|x| x.to_le_bytes()));
    bytes
}

/// What [`encode`] has written; `None` if it has not written this.
pub(super) fn decode(bytes: &[u8]) -> Option<(PackedLinear, Array2<f32>)> {
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    let (head, mut rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    let head: Head = serde_json::from_slice(head).ok()?;
    let Head { group_size, in_features, out_features, groups, .. } = head;
    let bits = Bits::try_from(head.bits).ok()?;
    let mut words = |count: usize| {
        let (words, others) = rest.split_at_checked(count.checked_mul(4)?)?;
        rest = others;
        Some(
            words.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<u32>>(),
        )
    };
    let qweight = words(bits.words(in_features).checked_mul(out_features)?)?;
    let qzeros = words(groups.checked_mul(bits.words(out_features))?)?;
    let g_idx = words(in_features)?;
    let scales = words(groups.checked_mul(out_features)?)?;
    let scales: Vec<f32> = scales.into_iter().map(f32::from_bits).collect();
    let bias = rest.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
    let by_group = (0..groups * out_features).map(|k| scales[k % out_features * groups + k / out_features]);
    let packed = PackedLinear::from_parts(PackedParts {
        bits,
        group_size,
        in_features,
        out_features,
        qweight,
        qzeros,
        scales: by_group.map(f16::from_f32).collect(),
        g_idx,
        bias: head.bias.then_some(bias),
    });
    Some((packed.ok()?, Array2::from_shape_vec((out_features, groups), scales).ok()?))
}

/// The weight that the forward pass goes on with, `(out_features, in_features)`: what the solver's result gives.
pub(super) fn dequantize(
    packed: &PackedLinear,
    scales: Array2<f32>,
    report: &LayerReport,
) -> Option<Array2<f32>> {
    let (outputs, inputs) = (packed.out_features(), packed.in_features());
    let zeros = Array2::from_shape_vec((packed.groups(), outputs), packed.unpack_zeros()).ok()?;
    let weight = QuantizedWeight {
        codes: Array2::from_shape_vec((outputs, inputs), packed.unpack_codes()).ok()?,
        scales,
        zeros: zeros.reversed_axes(),
        g_idx: packed.g_idx().to_vec(),
        report: report.clone(),
    };
    Some(weight.dequantize())
}

#[cfg(test)]
mod tests {
    use gptq_core::{GptqConfig, rtn};
    use gptq_format::CodesRef;

    use super::*;

    #[test]
    fn a_layer_comes_back_to_the_bit() {
        for (bits, bias, group_size) in [(4, true, Some(16)), (3, false, None), (8, false, Some(32))] {
            let weight = Array2::from_shape_fn((7, 40), |(o, i)| ((o * 31 + i * 17) % 23) as f32 / 7.0 - 1.0);
            let config = GptqConfig::builder().bits(bits).group_size(group_size).sym(false).build().unwrap();
            let result = rtn(weight.view(), &config).unwrap();
            let bias_values: Vec<f32> = (0..7).map(|i| i as f32 / 4.0).collect();
            let packed = PackedLinear::pack(&CodesRef {
                bits: Bits::try_from(bits).unwrap(),
                group_size: group_size.unwrap_or(40),
                in_features: 40,
                out_features: 7,
                codes: result.codes.as_slice().unwrap(),
                zeros: result.zeros.as_slice().unwrap(),
                scales: result.scales.as_slice().unwrap(),
                g_idx: &result.g_idx,
                bias: bias.then_some(&bias_values),
            })
            .unwrap();
            let bytes = encode(&packed, &result.scales);
            let (read, scales) = decode(&bytes).unwrap();
            assert_eq!((&read, &scales), (&packed, &result.scales));
            assert_eq!(dequantize(&read, scales, &result.report).unwrap(), result.dequantize());
            for cut in [0, 5, 20, bytes.len() / 2] {
                assert!(decode(&bytes[..cut]).is_none());
            }
        }
    }
}
