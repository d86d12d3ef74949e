#![allow(
    unused_unsafe,
    reason = "intrinsics are safe where the whole program is compiled for their instructions"
)]

use std::{arch::aarch64::*, array::from_fn};

use super::{
    direct::{self, DirectArgs},
    format::Format,
    layout::Line,
    panel::{self, PanelArgs, UnpackArgs},
    simd::Simd,
};
use crate::Unsupported;

/// NEON: sixteen lanes in four registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Neon(());

impl Neon {
    /// Errors: [`Unsupported::CpuFeature`].
    pub(super) fn new() -> Result<Self, Unsupported> {
        if std::arch::is_aarch64_feature_detected!("neon") {
            Ok(Self(()))
        } else {
            Err(Unsupported::CpuFeature { feature: "neon" })
        }
    }
}

/// Intrinsics of NEON.
macro_rules! neon {
    ($intrinsics:expr) => {
        // SAFETY: the intrinsics need NEON, and a value of `Neon` exists only where `new` has found it. The few that take
        // pointers get a quarter, 16 bytes, of a reference to 64 bytes, and need no alignment beyond an element's.
        unsafe { $intrinsics }
    };
}

impl Simd for Neon {
    type F = [float32x4_t; 4];
    type U = [uint32x4_t; 4];
    type Table = (uint32x4_t, float32x4_t);

    const NAME: &'static str = "cpu-neon-f32";
    const ROUNDINGS: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> [float32x4_t; 4] {
        [neon!(vdupq_n_f32(value)); 4]
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [float32x4_t; 4] {
        from_fn(|i| neon!(vld1q_f32(from.as_ptr().add(4 * i))))
    }
    #[inline(always)]
    fn store(self, value: [float32x4_t; 4], to: &mut [f32; 16]) {
        for (i, value) in value.into_iter().enumerate() {
            neon!(vst1q_f32(to.as_mut_ptr().add(4 * i), value));
        }
    }
    #[inline(always)]
    fn mul_add(self, a: [float32x4_t; 4], b: [float32x4_t; 4], c: [float32x4_t; 4]) -> [float32x4_t; 4] {
        from_fn(|i| neon!(vfmaq_f32(c[i], a[i], b[i])))
    }
    #[inline(always)]
    fn mul(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        from_fn(|i| neon!(vmulq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn sub(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        from_fn(|i| neon!(vsubq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn load_words(self, from: &Line) -> [uint32x4_t; 4] {
        from_fn(|i| neon!(vld1q_u32(from.0.as_ptr().add(4 * i))))
    }
    #[inline(always)]
    fn prefetch(self, _: *const Line) {}
    #[inline(always)]
    fn splat_word(self, value: u32) -> [uint32x4_t; 4] {
        [neon!(vdupq_n_u32(value)); 4]
    }
    #[inline(always)]
    fn shift_right(self, words: [uint32x4_t; 4], by: u32) -> [uint32x4_t; 4] {
        // NEON shifts right by shifting left by a negative count.
        words.map(|words| neon!(vshlq_u32(words, vdupq_n_s32(-(by as i32)))))
    }
    #[inline(always)]
    fn shift_left(self, words: [uint32x4_t; 4], by: u32) -> [uint32x4_t; 4] {
        words.map(|words| neon!(vshlq_u32(words, vdupq_n_s32(by as i32))))
    }
    #[inline(always)]
    fn and(self, a: [uint32x4_t; 4], b: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        from_fn(|i| neon!(vandq_u32(a[i], b[i])))
    }
    #[inline(always)]
    fn or(self, a: [uint32x4_t; 4], b: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        from_fn(|i| neon!(vorrq_u32(a[i], b[i])))
    }
    #[inline(always)]
    fn greater(self, a: [uint32x4_t; 4], b: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        from_fn(|i| neon!(vcgtq_s32(vreinterpretq_s32_u32(a[i]), vreinterpretq_s32_u32(b[i]))))
    }
    #[inline(always)]
    fn to_float(self, words: [uint32x4_t; 4]) -> [float32x4_t; 4] {
        words.map(|words| neon!(vcvtq_f32_u32(words)))
    }
    #[inline(always)]
    fn bits_to_float(self, words: [uint32x4_t; 4]) -> [float32x4_t; 4] {
        words.map(|words| neon!(vreinterpretq_f32_u32(words)))
    }
    #[inline(always)]
    fn float_to_bits(self, values: [float32x4_t; 4]) -> [uint32x4_t; 4] {
        values.map(|values| neon!(vreinterpretq_u32_f32(values)))
    }
    #[inline(always)]
    fn table(self, bits: u32, offset: u32) -> (uint32x4_t, float32x4_t) {
        neon!((vdupq_n_u32((1 << bits) - 1), vdupq_n_f32(offset as f32)))
    }
    #[inline(always)]
    fn look_up(self, words: [uint32x4_t; 4], (mask, offset): (uint32x4_t, float32x4_t)) -> [float32x4_t; 4] {
        words.map(|words| neon!(vsubq_f32(vcvtq_f32_u32(vandq_u32(words, mask)), offset)))
    }

    #[inline(always)]
    fn direct<W: Format, const ROWS: usize>(self, args: DirectArgs<'_, ROWS>) {
        #[target_feature(enable = "neon")]
        fn compiled<W: Format, const ROWS: usize>(s: Neon, args: DirectArgs<'_, ROWS>) {
            if ROWS == 1 {
                direct::run::<Neon, W, ROWS, 2>(s, args);
            } else {
                direct::run::<Neon, W, ROWS, 1>(s, args);
            }
        }
        neon!(compiled::<W, ROWS>(self, args));
    }
    #[inline(always)]
    fn unpack<W: Format>(self, args: UnpackArgs<'_>) {
        #[target_feature(enable = "neon")]
        fn compiled<W: Format>(s: Neon, args: UnpackArgs<'_>) {
            panel::unpack::<Neon, W>(s, args);
        }
        neon!(compiled::<W>(self, args));
    }
    #[inline(always)]
    fn panel<const ROWS: usize>(self, args: PanelArgs<'_, ROWS>) {
        #[target_feature(enable = "neon")]
        fn compiled<const ROWS: usize>(s: Neon, args: PanelArgs<'_, ROWS>) {
            // 6 x 4 sums, 4 weights and 1 activation: 29 of 32 registers.
            panel::run::<Neon, ROWS, 1>(s, args);
        }
        neon!(compiled::<ROWS>(self, args));
    }
}
