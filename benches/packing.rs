//! Packing and unpacking one layer of Llama-2-7B's MLP, 4096 outputs of 11008 inputs in groups of 128, on one core.
//! Throughput counts the unpacked codes, one byte each.
#![allow(missing_docs, reason = "criterion's macro makes a function without documentation")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gptq_format::{Bits, CodesRef, PackedLinear};

const OUT_FEATURES: usize = 4096;
const IN_FEATURES: usize = 11008;
const GROUP_SIZE: usize = 128;
const GROUPS: usize = IN_FEATURES / GROUP_SIZE;

fn packing(criterion: &mut Criterion) {
    let g_idx: Vec<u32> = (0..IN_FEATURES).map(|i| (i / GROUP_SIZE) as u32).collect();
    let scales = vec![0.01; OUT_FEATURES * GROUPS];
    for bits in Bits::ALL {
        let codes = random_codes(bits);
        let zeros = vec![1 << (bits.get() - 1); OUT_FEATURES * GROUPS];
        let codes = CodesRef {
            bits,
            group_size: GROUP_SIZE,
            in_features: IN_FEATURES,
            out_features: OUT_FEATURES,
            codes: &codes,
            zeros: &zeros,
            scales: &scales,
            g_idx: &g_idx,
            bias: None,
        };
        let packed = PackedLinear::pack(&codes).expect("valid codes");
        assert_eq!(packed.unpack_codes(), codes.codes);

        let mut group = criterion.benchmark_group(format!("4096x11008/{}-bit", bits.get()));
        group.sample_size(10).throughput(Throughput::Bytes(codes.codes.len() as u64));
        group.bench_function("pack", |b| b.iter(|| PackedLinear::pack(black_box(&codes))));
        group.bench_function("unpack_codes", |b| b.iter(|| black_box(&packed).unpack_codes()));
        group.bench_function("dequantize", |b| b.iter(|| black_box(&packed).dequantize()));
        group.finish();
    }
}

/// Codes without a pattern, the same in every run.
fn random_codes(bits: Bits) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8 & bits.max_code()
    };
    (0..OUT_FEATURES * IN_FEATURES).map(next).collect()
}

criterion_group!(benches, packing);
criterion_main!(benches);
