#![allow(
    unused_unsafe,
    reason = "intrinsics are safe where the whole program is compiled for their instructions"
)]

use std::arch::x86_64::*;

use super::{
    direct::{self, DirectArgs},
    format::Format,
    layout::Line,
    panel::{self, PanelArgs, UnpackArgs},
    simd::Simd,
};
use crate::Unsupported;

/// AVX-512: sixteen lanes in one register.
///
/// `vpermps` uses the low four bits of an index and ignores the others, so a code of up to four bits becomes a float by
/// a shift and a table look-up, without a mask: with the multiplication three instructions for 16 symmetric weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

impl Avx512 {
    /// Errors: [`Unsupported::CpuFeature`].
    pub(super) fn new() -> Result<Self, Unsupported> {
        if is_x86_feature_detected!("avx512f") {
            Ok(Self(()))
        } else {
            Err(Unsupported::CpuFeature { feature: "avx512f" })
        }
    }
}

/// Intrinsics of AVX-512F.
macro_rules! avx512 {
    ($intrinsics:expr) => {
        // SAFETY: the intrinsics need AVX-512F, and a value of `Avx512` exists only where `new` has found it. The few that
        // take pointers get references to 64 bytes, and need no alignment.
        unsafe { $intrinsics }
    };
}

impl Simd for Avx512 {
    type F = __m512;
    type U = __m512i;
    type Table = __m512;

    const NAME: &'static str = "cpu-avx512-f32";
    const ROUNDINGS: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        avx512!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> __m512 {
        avx512!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn store(self, value: __m512, to: &mut [f32; 16]) {
        avx512!(_mm512_storeu_ps(to.as_mut_ptr(), value));
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        avx512!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn load_words(self, from: &Line) -> __m512i {
        avx512!(_mm512_loadu_si512(from.0.as_ptr().cast()))
    }
    #[inline(always)]
    fn prefetch(self, line: *const Line) {
        avx512!(_mm_prefetch::<_MM_HINT_T0>(line.cast()));
    }
    #[inline(always)]
    fn splat_word(self, value: u32) -> __m512i {
        avx512!(_mm512_set1_epi32(value as i32))
    }
    #[inline(always)]
    fn shift_right(self, words: __m512i, by: u32) -> __m512i {
        avx512!(_mm512_srlv_epi32(words, _mm512_set1_epi32(by as i32)))
    }
    #[inline(always)]
    fn shift_left(self, words: __m512i, by: u32) -> __m512i {
        avx512!(_mm512_sllv_epi32(words, _mm512_set1_epi32(by as i32)))
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        avx512!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        avx512!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn greater(self, a: __m512i, b: __m512i) -> __m512i {
        avx512!(_mm512_maskz_set1_epi32(_mm512_cmpgt_epi32_mask(a, b), -1))
    }
    #[inline(always)]
    fn to_float(self, words: __m512i) -> __m512 {
        avx512!(_mm512_cvtepi32_ps(words))
    }
    #[inline(always)]
    fn bits_to_float(self, words: __m512i) -> __m512 {
        avx512!(_mm512_castsi512_ps(words))
    }
    #[inline(always)]
    fn float_to_bits(self, values: __m512) -> __m512i {
        avx512!(_mm512_castps_si512(values))
    }
    #[inline(always)]
    fn table(self, bits: u32, offset: u32) -> __m512 {
        // Entries repeat, so that the bits of an index above `bits` do not matter.
        let mask = (1 << bits) - 1;
        let entries: [f32; 16] = std::array::from_fn(|i| (i & mask) as f32 - offset as f32);
        self.load(&entries)
    }
    #[inline(always)]
    fn look_up(self, words: __m512i, table: __m512) -> __m512 {
        avx512!(_mm512_permutexvar_ps(words, table))
    }

    #[inline(always)]
    fn direct<W: Format, const ROWS: usize>(self, args: DirectArgs<'_, ROWS>) {
        #[target_feature(enable = "avx512f")]
        fn compiled<W: Format, const ROWS: usize>(s: Avx512, args: DirectArgs<'_, ROWS>) {
            direct::run::<Avx512, W, ROWS, 4>(s, args);
        }
        avx512!(compiled::<W, ROWS>(self, args));
    }
    #[inline(always)]
    fn unpack<W: Format>(self, args: UnpackArgs<'_>) {
        #[target_feature(enable = "avx512f")]
        fn compiled<W: Format>(s: Avx512, args: UnpackArgs<'_>) {
            panel::unpack::<Avx512, W>(s, args);
        }
        avx512!(compiled::<W>(self, args));
    }
    #[inline(always)]
    fn panel<const ROWS: usize>(self, args: PanelArgs<'_, ROWS>) {
        #[target_feature(enable = "avx512f")]
        fn compiled<const ROWS: usize>(s: Avx512, args: PanelArgs<'_, ROWS>) {
            // 6 x 4 sums, 4 weights and 1 activation: 29 of 32 registers.
            panel::run::<Avx512, ROWS, 4>(s, args);
        }
        avx512!(compiled::<ROWS>(self, args));
    }
}
