//! One layer: sizes, then the bytes of its words, or of its codes.
//!
//! | byte | |
//! |---|---|
//! | 0 | low three bits: width; then flags: bias, natural `g_idx`, codes instead of words, lengths one too long |
//! | 1, 2, 3 | inputs, outputs, group size; 0 is 256 |
//! | 4 .. | qweight, qzeros, scales, g_idx (one byte an entry), bias; or codes, zeros and the same; what is missing is 0 |

use gptq_format::{Bits, CheckpointFormat, CodesRef, PackError, PackedLinear, PackedParts, QuantizeConfig};
use half::f16;

use crate::checkpoint::{FORMATS, read_back, write};
use crate::memory::bounded;

const BIAS: u8 = 8;
const NATURAL: u8 = 16;
const CODES: u8 = 32;
const TOO_LONG: u8 = 64;

/// Reads bytes, and zeros behind the last.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn size(&mut self) -> usize {
        match self.next() {
            0 => 256,
            size => size.into(),
        }
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next()).collect()
    }

    fn words(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| u32::from_le_bytes(std::array::from_fn(|_| self.next()))).collect()
    }

    fn halves(&mut self, count: usize) -> Vec<f16> {
        (0..count).map(|_| f16::from_le_bytes([self.next(), self.next()])).collect()
    }
}

/// A layer as an input, for the seeds; `None` if it is too large.
pub fn encode(linear: &PackedLinear, as_codes: bool) -> Option<Vec<u8>> {
    let size = |size: usize| if size == 256 { Some(0) } else { u8::try_from(size).ok() };
    let mut flags = Bits::ALL.iter().position(|bits| *bits == linear.bits())? as u8;
    flags |= if linear.bias().is_some() { BIAS } else { 0 };
    flags |= if linear.is_act_order() { 0 } else { NATURAL };
    flags |= if as_codes { CODES } else { 0 };
    let mut bytes =
        vec![flags, size(linear.in_features())?, size(linear.out_features())?, size(linear.group_size())?];
    if as_codes {
        bytes.extend(linear.unpack_codes());
        bytes.extend(transpose(&linear.unpack_zeros(), linear.groups()));
    } else {
        bytes.extend(linear.qweight().iter().chain(linear.qzeros()).flat_map(|word| word.to_le_bytes()));
    }
    let scales = linear.scales().iter().copied();
    let scales = if as_codes { transpose(linear.scales(), linear.groups()) } else { scales.collect() };
    bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    if linear.is_act_order() {
        bytes.extend(linear.g_idx().iter().map(|&group| group as u8));
    }
    bytes.extend(linear.bias().unwrap_or_default().iter().flat_map(|x| x.to_le_bytes()));
    Some(bytes)
}

/// `(rows, columns)` to `(columns, rows)`.
fn transpose<T: Copy>(values: &[T], rows: usize) -> Vec<T> {
    let columns = values.len() / rows;
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// Any words or codes are a layer or a typed error. A layer is what its codes say, by every way of asking; packing what was
/// unpacked gives the same words; and a layout on disk gives back the same layer, or refuses it.
pub fn unpack_linear(data: &[u8]) {
    let format = FORMATS[data.len() % FORMATS.len()];
    let mut data = Bytes(data);
    let flags = data.next();
    let Some(&bits) = Bits::ALL.get(usize::from(flags & 7)) else { return };
    let (in_features, out_features, group_size) = (data.size(), data.size(), data.size());
    let groups = in_features.div_ceil(group_size);
    let extra = usize::from(flags & TOO_LONG != 0);
    let has_bias = flags & BIAS != 0;
    let linear = if flags & CODES != 0 {
        let codes = data.bytes(in_features * out_features + extra);
        let zeros = data.bytes(groups * out_features);
        let scales: Vec<f32> = data.halves(groups * out_features).iter().map(|x| x.to_f32()).collect();
        let g_idx = group_index(&mut data, flags, in_features, group_size);
        let bias: Vec<f32> = data.halves(out_features).iter().map(|x| x.to_f32()).collect();
        let (codes, bias) = (&codes[..], has_bias.then_some(&bias[..]));
        let layer = CodesRef {
            bits,
            group_size,
            in_features,
            out_features,
            codes,
            zeros: &zeros,
            scales: &scales,
            g_idx: &g_idx,
            bias,
        };
        let packed = PackedLinear::pack(&layer);
        let fits = |values: &[u8]| values.iter().all(|&value| value <= bits.max_code());
        let valid = extra == 0
            && fits(codes)
            && fits(&zeros)
            && scales.iter().chain(bias.unwrap_or_default()).all(|x| x.is_finite())
            && g_idx.iter().all(|&group| (group as usize) < groups);
        assert_eq!(packed.is_ok(), valid, "{:?}", packed.err());
        let Ok(linear) = packed else { return };
        assert_eq!(linear.unpack_codes(), codes);
        assert_eq!(transpose(&linear.unpack_zeros(), groups), zeros);
        linear
    } else {
        let parts = PackedParts {
            bits,
            group_size,
            in_features,
            out_features,
            qweight: data.words(bits.words(in_features) * out_features + extra),
            qzeros: data.words(groups * bits.words(out_features)),
            scales: data.halves(groups * out_features),
            g_idx: group_index(&mut data, flags, in_features, group_size),
            bias: has_bias.then(|| data.halves(out_features)),
        };
        match PackedLinear::from_parts(parts.clone()) {
            Err(error) => {
                assert!(extra == 0 || matches!(error, PackError::Length { field: "qweight", .. }), "{error}");
                return;
            }
            Ok(linear) => {
                assert_eq!(linear.qweight(), parts.qweight);
                assert_eq!(linear.qzeros(), parts.qzeros);
                linear
            }
        }
    };
    check(&linear);
    layout(&linear, format);
}

fn group_index(data: &mut Bytes<'_>, flags: u8, in_features: usize, group_size: usize) -> Vec<u32> {
    let read = flags & NATURAL == 0;
    (0..in_features).map(|i| if read { data.next().into() } else { (i / group_size) as u32 }).collect()
}

/// Everything that a layer says about itself agrees.
pub(crate) fn check(linear: &PackedLinear) {
    let (inputs, outputs, groups) = (linear.in_features(), linear.out_features(), linear.groups());
    let limit = (1 << 16) + 16 * inputs * outputs + 16 * groups * outputs + 64 * inputs;
    let (codes, zeros, weight) =
        bounded(limit, || (linear.unpack_codes(), linear.unpack_zeros(), linear.dequantize()));
    assert_eq!(
        (codes.len(), zeros.len(), weight.len()),
        (inputs * outputs, groups * outputs, inputs * outputs)
    );
    for (at, &weight) in weight.iter().enumerate() {
        let (output, input) = (at / inputs, at % inputs);
        let grid = linear.g_idx()[input] as usize * outputs + output;
        let difference = f32::from(codes[at]) - f32::from(zeros[grid]);
        assert_eq!(weight.to_bits(), (linear.scales()[grid].to_f32() * difference).to_bits());
        assert!(weight.is_finite());
    }
    let middle = 1 << (linear.bits().get() - 1);
    assert_eq!(linear.is_symmetric(), zeros.iter().all(|&zero| zero == middle));
    let natural = linear.g_idx().iter().enumerate().all(|(i, &g)| g as usize == i / linear.group_size());
    assert_eq!(linear.is_act_order(), !natural);

    let floats = |halves: &[f16]| -> Vec<f32> { halves.iter().map(|x| x.to_f32()).collect() };
    let bias = linear.bias().map(floats);
    let again = PackedLinear::pack(&CodesRef {
        bits: linear.bits(),
        group_size: linear.group_size(),
        in_features: inputs,
        out_features: outputs,
        codes: &codes,
        zeros: &transpose(&zeros, groups),
        scales: &floats(&transpose(linear.scales(), groups)),
        g_idx: linear.g_idx(),
        bias: bias.as_deref(),
    });
    assert!(again.is_ok_and(|again| again == *linear), "packing what was unpacked");
}

/// A layout on disk gives the layer back, or refuses it. One for each input: files take longer than all the rest.
fn layout(linear: &PackedLinear, format: CheckpointFormat) {
    let group_size = Some(linear.group_size()).filter(|&size| size < linear.in_features());
    let config = QuantizeConfig::builder(linear.bits(), group_size)
        .sym(linear.is_symmetric())
        .desc_act(linear.is_act_order())
        .build()
        .expect("valid");
    let Some(dir) = write("layout", &config.with_checkpoint_format(format), &[("x", linear)], &[]) else {
        return;
    };
    let checkpoint = read_back(&dir, format);
    assert_eq!(checkpoint.linears().collect::<Vec<_>>(), ["x"]);
    let read = checkpoint.linear("x").expect("what was written is read");
    assert!(read == *linear, "another layer from {}", format.name());
}
