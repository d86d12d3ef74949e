use half::f16;
use proptest::prelude::*;

use super::*;

/// Owned codes of a small layer.
#[derive(Clone, Debug)]
struct Layer {
    bits: Bits,
    group_size: usize,
    in_features: usize,
    out_features: usize,
    codes: Vec<u8>,
    zeros: Vec<u8>,
    scales: Vec<f32>,
    g_idx: Vec<u32>,
    bias: Option<Vec<f32>>,
}

impl Layer {
    fn codes_ref(&self) -> CodesRef<'_> {
        CodesRef {
            bits: self.bits,
            group_size: self.group_size,
            in_features: self.in_features,
            out_features: self.out_features,
            codes: &self.codes,
            zeros: &self.zeros,
            scales: &self.scales,
            g_idx: &self.g_idx,
            bias: self.bias.as_deref(),
        }
    }

    fn pack(&self) -> Result<PackedLinear, PackError> {
        PackedLinear::pack(&self.codes_ref())
    }
}

/// A 4-bit layer of 5 inputs and 3 outputs in groups of 2: every dimension is ragged.
fn small() -> Layer {
    Layer {
        bits: Bits::B4,
        group_size: 2,
        in_features: 5,
        out_features: 3,
        codes: (0..15).collect(),
        zeros: vec![8; 9],
        scales: (1..=9).map(|k| k as f32 / 8.0).collect(),
        g_idx: vec![0, 0, 1, 1, 2],
        bias: Some(vec![1.0, -2.0, 0.5]),
    }
}

fn parts(packed: &PackedLinear) -> PackedParts {
    PackedParts {
        bits: packed.bits,
        group_size: packed.group_size,
        in_features: packed.in_features,
        out_features: packed.out_features,
        qweight: packed.qweight.clone(),
        qzeros: packed.qzeros.clone(),
        scales: packed.scales.clone(),
        g_idx: packed.g_idx.clone(),
        bias: packed.bias.clone(),
    }
}

fn layers() -> impl Strategy<Value = Layer> {
    let shape = (0..Bits::ALL.len(), 1..80usize, 1..80usize, 1..90usize, any::<bool>());
    shape.prop_flat_map(|(bits, in_features, out_features, group_size, has_bias)| {
        let bits = Bits::ALL[bits];
        let groups = in_features.div_ceil(group_size);
        let code = 0..=bits.max_code();
        // Half-precision numbers, so that packing rounds nothing away; bit 10 clear keeps NaN and infinity out.
        let half = any::<u16>().prop_map(|b| f16::from_bits(b & 0xfbff).to_f32());
        let bias = prop::collection::vec(half.clone(), if has_bias { out_features } else { 0 });
        (
            prop::collection::vec(code.clone(), in_features * out_features),
            prop::collection::vec(code, groups * out_features),
            prop::collection::vec(half, groups * out_features),
            prop::collection::vec(0..groups as u32, in_features),
            bias,
        )
            .prop_map(move |(codes, zeros, scales, g_idx, bias)| Layer {
                bits,
                group_size,
                in_features,
                out_features,
                codes,
                zeros,
                scales,
                g_idx,
                bias: has_bias.then_some(bias),
            })
    })
}

/// `0..len` in an order that looks random.
fn shuffled(len: usize, seed: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    order.sort_by_key(|&i| (u64::from(i) ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    order
}

fn inverse(order: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; order.len()];
    (0..).zip(order).for_each(|(i, &feature)| inverse[feature as usize] = i);
    inverse
}

proptest! {
    #[test]
    fn unpacking_gives_what_was_packed(layer in layers()) {
        let packed = layer.pack().expect("valid codes");
        let groups = packed.groups();
        prop_assert_eq!(groups, layer.in_features.div_ceil(layer.group_size));
        prop_assert_eq!(packed.unpack_codes(), &layer.codes[..]);
        let zeros = packed.unpack_zeros();
        for out in 0..layer.out_features {
            for group in 0..groups {
                let (at, transposed) = (out * groups + group, group * layer.out_features + out);
                prop_assert_eq!(zeros[transposed], layer.zeros[at]);
                prop_assert_eq!(packed.scales()[transposed].to_f32(), layer.scales[at]);
            }
        }
        let middle = 1u8 << (layer.bits.get() - 1);
        prop_assert_eq!(packed.is_symmetric(), layer.zeros.iter().all(|&zero| zero == middle));
    }

    #[test]
    fn packed_words_pass_their_own_validation(layer in layers()) {
        let packed = layer.pack().expect("valid codes");
        prop_assert_eq!(&PackedLinear::from_parts(parts(&packed)).expect("packed by us"), &packed);
    }

    #[test]
    fn features_in_another_order_are_the_same_features(layer in layers(), seed in any::<u64>()) {
        let packed = layer.pack().expect("valid codes");
        let (inputs, outputs) = (shuffled(layer.in_features, seed), shuffled(layer.out_features, !seed));
        let moved = packed.with_input_order(&inputs).and_then(|moved| moved.with_output_order(&outputs));
        let moved = moved.expect("permutations");
        let (was, is) = (packed.dequantize(), moved.dequantize());
        for (o, &out) in outputs.iter().enumerate() {
            for (i, &feature) in inputs.iter().enumerate() {
                let at = out as usize * layer.in_features + feature as usize;
                prop_assert_eq!(is[o * layer.in_features + i], was[at]);
            }
            prop_assert_eq!(moved.bias().map(|bias| bias[o]), packed.bias().map(|bias| bias[out as usize]));
        }
        // Padding bits are zero, and nothing is lost on the way back.
        prop_assert_eq!(&PackedLinear::from_parts(parts(&moved)).expect("moved by us"), &moved);
        let back = moved.with_input_order(&inverse(&inputs)).and_then(|back| back.with_output_order(&inverse(&outputs)));
        prop_assert_eq!(&back.expect("permutations"), &packed);
    }

    #[test]
    fn groups_that_are_full_have_an_order(layer in layers(), seed in any::<u64>()) {
        let mut layer = layer;
        let of = shuffled(layer.in_features, seed);
        for (i, &feature) in of.iter().enumerate() {
            layer.g_idx[feature as usize] = (i / layer.group_size) as u32;
        }
        let packed = layer.pack().expect("valid codes");
        let order = packed.group_order();
        prop_assert_eq!(order.is_some(), packed.is_act_order());
        if let Some(order) = order {
            prop_assert!(!packed.with_input_order(&order).expect("a permutation").is_act_order());
            for pair in order.windows(2) {
                let group = |i: usize| packed.g_idx()[pair[i] as usize];
                prop_assert!(group(0) < group(1) || group(0) == group(1) && pair[0] < pair[1]);
            }
        }
    }

    #[test]
    fn dequantize_is_the_formula(layer in layers()) {
        let packed = layer.pack().expect("valid codes");
        let groups = packed.groups();
        let weight = packed.dequantize();
        for out in 0..layer.out_features {
            for i in 0..layer.in_features {
                let at = out * groups + layer.g_idx[i] as usize;
                let difference = i32::from(layer.codes[out * layer.in_features + i]) - i32::from(layer.zeros[at]);
                // Exact in float64, and the product has at most 20 significant bits: no rounding in float32.
                let exact = f64::from(layer.scales[at]) * f64::from(difference);
                prop_assert_eq!(f64::from(weight[out * layer.in_features + i]), exact);
            }
        }
    }
}

#[test]
fn symmetric_layer_is_known() {
    let mut layer = small();
    assert!(layer.pack().expect("valid").is_symmetric());
    layer.zeros[8] = 7;
    assert!(!layer.pack().expect("valid").is_symmetric());
}

#[test]
fn group_size_above_in_features_is_one_group() {
    let layer =
        Layer { group_size: 1024, zeros: vec![8; 3], scales: vec![1.0; 3], g_idx: vec![0; 5], ..small() };
    let packed = layer.pack().expect("valid");
    assert_eq!((packed.groups(), packed.group_size()), (1, 5));
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    for (in_features, out_features, group_size) in
        [(0, 3, 2), (5, 0, 2), (5, 3, 0), (usize::MAX, 3, 2), (1 << 40, 1 << 40, 2)]
    {
        let error =
            Layer { in_features, out_features, group_size, ..small() }.pack().expect_err("impossible");
        assert_eq!(error, PackError::Shape { in_features, out_features, group_size });
        let packed = small().pack().expect("valid");
        let error =
            PackedLinear::from_parts(PackedParts { in_features, out_features, group_size, ..parts(&packed) });
        assert_eq!(
            error.expect_err("impossible"),
            PackError::Shape { in_features, out_features, group_size }
        );
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let length = |field, expected, got| PackError::Length { field, expected, got };
    let refuse = |layer: Layer| layer.pack().expect_err("wrong length");
    assert_eq!(refuse(Layer { codes: vec![0; 14], ..small() }), length("codes", 15, 14));
    assert_eq!(refuse(Layer { zeros: vec![0; 8], ..small() }), length("zeros", 9, 8));
    assert_eq!(refuse(Layer { scales: vec![0.0; 8], ..small() }), length("scales", 9, 8));
    assert_eq!(refuse(Layer { g_idx: vec![0; 6], ..small() }), length("g_idx", 5, 6));
    assert_eq!(refuse(Layer { bias: Some(vec![0.0; 2]), ..small() }), length("bias", 3, 2));

    let good = parts(&small().pack().expect("valid"));
    let refuse = |parts| PackedLinear::from_parts(parts).expect_err("wrong length");
    assert_eq!(refuse(PackedParts { qweight: vec![0; 4], ..good.clone() }), length("qweight", 3, 4));
    assert_eq!(refuse(PackedParts { qzeros: vec![0; 2], ..good.clone() }), length("qzeros", 3, 2));
    assert_eq!(refuse(PackedParts { scales: vec![], ..good.clone() }), length("scales", 9, 0));
    assert_eq!(refuse(PackedParts { g_idx: vec![], ..good.clone() }), length("g_idx", 5, 0));
    assert_eq!(refuse(PackedParts { bias: Some(vec![]), ..good }), length("bias", 3, 0));
}

#[test]
fn values_out_of_range_are_named() {
    let mut layer = small();
    layer.codes[7] = 16;
    let range = |field, index, value| PackError::Range { field, index, value, bits: 4 };
    assert_eq!(layer.pack().expect_err("code"), range("codes", 7, 16));
    let mut layer = small();
    layer.zeros[2] = 255;
    assert_eq!(layer.pack().expect_err("zero"), range("zeros", 2, 255));
    let mut layer = small();
    layer.g_idx[4] = 3;
    assert_eq!(layer.pack().expect_err("group"), PackError::GroupIndex { index: 4, group: 3, groups: 3 });
}

#[test]
fn values_beyond_half_precision_are_named() {
    for value in [f32::INFINITY, -f32::INFINITY, 65520.0, -1e30] {
        let mut layer = small();
        layer.scales[3] = value;
        assert_eq!(
            layer.pack().expect_err("scale"),
            PackError::NonFinite { field: "scales", index: 3, value }
        );
        let layer = Layer { bias: Some(vec![0.0, value, 0.0]), ..small() };
        assert_eq!(layer.pack().expect_err("bias"), PackError::NonFinite { field: "bias", index: 1, value });
    }
    let mut layer = small();
    layer.scales[3] = f32::NAN;
    assert!(matches!(layer.pack(), Err(PackError::NonFinite { field: "scales", index: 3, .. })));
    let mut parts = parts(&small().pack().expect("valid"));
    parts.scales[1] = f16::INFINITY;
    let error = PackedLinear::from_parts(parts).expect_err("infinite");
    assert_eq!(error, PackError::NonFinite { field: "scales", index: 1, value: f32::INFINITY });
}

#[test]
fn padding_bits_must_be_zero() {
    let good = parts(&small().pack().expect("valid"));
    let mut bad = good.clone();
    bad.qweight[2] |= 1 << 20;
    let word = bad.qweight[2];
    let error = PackedLinear::from_parts(bad).expect_err("padding");
    assert_eq!(error, PackError::Padding { field: "qweight", index: 2, word });
    let mut bad = good;
    bad.qzeros[1] |= 1 << 12;
    let word = bad.qzeros[1];
    let error = PackedLinear::from_parts(bad).expect_err("padding");
    assert_eq!(error, PackError::Padding { field: "qzeros", index: 1, word });
}

#[test]
fn act_order_is_known_by_its_g_idx() {
    assert!(!small().pack().expect("valid").is_act_order());
    let layer = Layer { g_idx: vec![2, 0, 1, 1, 0], ..small() };
    assert!(layer.pack().expect("valid").is_act_order());
}

#[test]
fn groups_of_other_sizes_have_no_order() {
    // Group 1 is the short one, and group 2 is full.
    let layer = Layer { g_idx: vec![2, 0, 1, 0, 2], ..small() };
    assert_eq!(layer.pack().expect("valid").group_order(), None);
    let layer = Layer { g_idx: vec![0, 0, 0, 1, 2], ..small() };
    assert_eq!(layer.pack().expect("valid").group_order(), None);
    let layer = Layer { g_idx: vec![2, 0, 1, 1, 0], ..small() };
    assert_eq!(layer.pack().expect("valid").group_order(), Some(vec![1, 4, 2, 3, 0]));
    assert_eq!(small().pack().expect("valid").group_order(), None);
}

#[test]
fn orders_are_permutations() {
    let packed = small().pack().expect("valid");
    let length = |expected, got| PackError::Length { field: "order", expected, got };
    assert_eq!(packed.with_input_order(&[0, 1, 2]), Err(length(5, 3)));
    assert_eq!(packed.with_output_order(&[0, 1, 2, 3]), Err(length(3, 4)));
    let order = |index, feature, features| PackError::Order { index, feature, features };
    assert_eq!(packed.with_input_order(&[0, 1, 2, 5, 3]), Err(order(3, 5, 5)));
    assert_eq!(packed.with_output_order(&[0, 2, 2]), Err(order(2, 2, 3)));
}
