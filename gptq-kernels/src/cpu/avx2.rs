#![allow(
    unused_unsafe,
    reason = "intrinsics are safe where the whole program is compiled for their instructions"
)]

use std::{arch::x86_64::*, array::from_fn};

use super::{
    direct::{self, DirectArgs},
    format::Format,
    layout::Line,
    panel::{self, PanelArgs, UnpackArgs},
    simd::Simd,
};
use crate::Unsupported;

/// AVX2 with FMA: sixteen lanes in two registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx2 {
    /// Errors: [`Unsupported::CpuFeature`].
    pub(super) fn new() -> Result<Self, Unsupported> {
        if !is_x86_feature_detected!("avx2") {
            Err(Unsupported::CpuFeature { feature: "avx2" })
        } else if !is_x86_feature_detected!("fma") {
            Err(Unsupported::CpuFeature { feature: "fma" })
        } else {
            Ok(Self(()))
        }
    }
}

/// Intrinsics of AVX2 and FMA.
macro_rules! avx2 {
    ($intrinsics:expr) => {
        // SAFETY: the intrinsics need AVX2 and FMA, and a value of `Avx2` exists only where `new` has found both. The few
        // that take pointers get a half, 32 bytes, of a reference to 64 bytes, and need no alignment.
        unsafe { $intrinsics }
    };
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    type U = [__m256i; 2];
    type Table = (__m256i, __m256);

    const NAME: &'static str = "cpu-avx2-f32";
    const ROUNDINGS: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        [avx2!(_mm256_set1_ps(value)); 2]
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [__m256; 2] {
        from_fn(|i| avx2!(_mm256_loadu_ps(from.as_ptr().add(8 * i))))
    }
    #[inline(always)]
    fn store(self, value: [__m256; 2], to: &mut [f32; 16]) {
        for (i, value) in value.into_iter().enumerate() {
            avx2!(_mm256_storeu_ps(to.as_mut_ptr().add(8 * i), value));
        }
    }
    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        from_fn(|i| avx2!(_mm256_fmadd_ps(a[i], b[i], c[i])))
    }
    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        from_fn(|i| avx2!(_mm256_mul_ps(a[i], b[i])))
    }
    #[inline(always)]
    fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        from_fn(|i| avx2!(_mm256_sub_ps(a[i], b[i])))
    }
    #[inline(always)]
    fn load_words(self, from: &Line) -> [__m256i; 2] {
        from_fn(|i| avx2!(_mm256_loadu_si256(from.0.as_ptr().add(8 * i).cast())))
    }
    #[inline(always)]
    fn prefetch(self, line: *const Line) {
        avx2!(_mm_prefetch::<_MM_HINT_T0>(line.cast()));
    }
    #[inline(always)]
    fn splat_word(self, value: u32) -> [__m256i; 2] {
        [avx2!(_mm256_set1_epi32(value as i32)); 2]
    }
    #[inline(always)]
    fn shift_right(self, words: [__m256i; 2], by: u32) -> [__m256i; 2] {
        words.map(|words| avx2!(_mm256_srlv_epi32(words, _mm256_set1_epi32(by as i32))))
    }
    #[inline(always)]
    fn shift_left(self, words: [__m256i; 2], by: u32) -> [__m256i; 2] {
        words.map(|words| avx2!(_mm256_sllv_epi32(words, _mm256_set1_epi32(by as i32))))
    }
    #[inline(always)]
    fn and(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        from_fn(|i| avx2!(_mm256_and_si256(a[i], b[i])))
    }
    #[inline(always)]
    fn or(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        from_fn(|i| avx2!(_mm256_or_si256(a[i], b[i])))
    }
    #[inline(always)]
    fn greater(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        from_fn(|i| avx2!(_mm256_cmpgt_epi32(a[i], b[i])))
    }
    #[inline(always)]
    fn to_float(self, words: [__m256i; 2]) -> [__m256; 2] {
        words.map(|words| avx2!(_mm256_cvtepi32_ps(words)))
    }
    #[inline(always)]
    fn bits_to_float(self, words: [__m256i; 2]) -> [__m256; 2] {
        words.map(|words| avx2!(_mm256_castsi256_ps(words)))
    }
    #[inline(always)]
    fn float_to_bits(self, values: [__m256; 2]) -> [__m256i; 2] {
        values.map(|values| avx2!(_mm256_castps_si256(values)))
    }
    #[inline(always)]
    fn table(self, bits: u32, offset: u32) -> (__m256i, __m256) {
        avx2!((_mm256_set1_epi32((1 << bits) - 1), _mm256_set1_ps(offset as f32)))
    }
    #[inline(always)]
    fn look_up(self, words: [__m256i; 2], (mask, offset): (__m256i, __m256)) -> [__m256; 2] {
        // A table has eight entries here; masking and converting is cheaper than joining two.
        words.map(|words| avx2!(_mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(words, mask)), offset)))
    }

    #[inline(always)]
    fn direct<W: Format, const ROWS: usize>(self, args: DirectArgs<'_, ROWS>) {
        #[target_feature(enable = "avx2,fma")]
        fn compiled<W: Format, const ROWS: usize>(s: Avx2, args: DirectArgs<'_, ROWS>) {
            if ROWS == 1 {
                direct::run::<Avx2, W, ROWS, 2>(s, args);
            } else {
                direct::run::<Avx2, W, ROWS, 1>(s, args);
            }
        }
        avx2!(compiled::<W, ROWS>(self, args));
    }
    #[inline(always)]
    fn unpack<W: Format>(self, args: UnpackArgs<'_>) {
        #[target_feature(enable = "avx2,fma")]
        fn compiled<W: Format>(s: Avx2, args: UnpackArgs<'_>) {
            panel::unpack::<Avx2, W>(s, args);
        }
        avx2!(compiled::<W>(self, args));
    }
    #[inline(always)]
    fn panel<const ROWS: usize>(self, args: PanelArgs<'_, ROWS>) {
        #[target_feature(enable = "avx2,fma")]
        fn compiled<const ROWS: usize>(s: Avx2, args: PanelArgs<'_, ROWS>) {
            // 6 x 2 sums, 2 weights and 1 activation: 15 of 16 registers.
            panel::run::<Avx2, ROWS, 1>(s, args);
        }
        avx2!(compiled::<ROWS>(self, args));
    }
}
