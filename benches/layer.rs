//! Random layers for benches of kernels.

use gptq_format::{Bits, CodesRef, PackedLinear};
use rayon::prelude::*;

/// A number that looks random.
pub(crate) fn hash(mut v: u64) -> u64 {
    v = (v ^ (v >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    v = (v ^ (v >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    v ^ (v >> 33)
}

/// In -1..1.
pub(crate) fn symmetric(v: u64) -> f32 {
    (hash(v) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// What a layer is.
#[derive(Clone, Copy)]
pub(crate) struct Layer {
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) bits: Bits,
    pub(crate) group_size: usize,
    pub(crate) sym: bool,
    pub(crate) act_order: bool,
}

// A bench ends with the first error.
#[allow(clippy::unwrap_used)]
impl Layer {
    pub(crate) fn packed(self) -> PackedLinear {
        let (k, n, group_size) = (self.in_features, self.out_features, self.group_size);
        let groups = k / group_size;
        let most = u64::from(self.bits.max_code());
        let codes: Vec<u8> = (0..k * n).into_par_iter().map(|i| (hash(i as u64) & most) as u8).collect();
        let middle = (most / 2 + 1) as u8;
        let zero = |i: usize| if self.sym { middle } else { (hash(i as u64) >> 8 & most) as u8 };
        let scales: Vec<f32> = (0..groups * n).map(|i| 0.006 + 0.004 * symmetric(i as u64)).collect();
        let mut g_idx: Vec<u32> = (0..k).map(|i| (i / group_size) as u32).collect();
        if self.act_order {
            for i in (1..k).rev() {
                g_idx.swap(i, hash(i as u64) as usize % (i + 1));
            }
        }
        PackedLinear::pack(&CodesRef {
            bits: self.bits,
            group_size,
            in_features: k,
            out_features: n,
            codes: &codes,
            zeros: &(0..groups * n).map(zero).collect::<Vec<_>>(),
            scales: &scales,
            g_idx: &g_idx,
            bias: None,
        })
        .unwrap()
    }
}
