use std::{arch::x86_64::*, array::from_fn};

use half::bf16;

use super::tile::{Amx, PairRow, Sums};
use crate::cpu::{
    avx512::Avx512,
    format::half_to_float,
    layout::{Line, TILES, Width},
    panel::PanelRow,
    simd::Simd,
};

/// How far ahead of its use a line is asked for, as in [`direct`](crate::cpu::direct).
const AHEAD: usize = 64;

/// Decodes words of a segment to bfloat16, in which `code - zero` is exact: at most 8 significant bits.
///
/// `head` is the segment's header; `panel` has room for all pairs of the words.
#[inline(always)]
pub(super) fn codes(
    amx: Amx,
    width: Width,
    zeros: bool,
    head: &[Line],
    words: &[[Line; TILES]],
    panel: &mut [PairRow],
) {
    let s = amx.vectors();
    // SAFETY: `Amx` exists only where AVX-512F and AVX-512BW do.
    unsafe {
        match (width, zeros) {
            (Width::Two, false) => narrow::<2, false>(s, head, words, panel),
            (Width::Two, true) => narrow::<2, true>(s, head, words, panel),
            (Width::Three, false) => narrow::<3, false>(s, head, words, panel),
            (Width::Three, true) => narrow::<3, true>(s, head, words, panel),
            (Width::Four, false) => narrow::<4, false>(s, head, words, panel),
            (Width::Four, true) => narrow::<4, true>(s, head, words, panel),
            (Width::Byte, _) => bytes(s, zeros, head, words, panel),
        }
    }
}

/// Up to 4 bits: each half-word is shifted until the code is lowest, and looked up. `vpermw` uses the low five bits of an
/// index. Without zero points the table repeats, so that bits above the code do not matter; with them the index is
/// `code - zero` in two's complement.
#[target_feature(enable = "avx512f,avx512bw")]
fn narrow<const BITS: u32, const ZEROS: bool>(
    s: Avx512,
    head: &[Line],
    words: &[[Line; TILES]],
    panel: &mut [PairRow],
) {
    let entry = |i: i32| match ZEROS {
        true => (i + 16) % 32 - 16,
        false => i % (1 << BITS) - (1 << (BITS - 1)),
    };
    let entry = |i: usize| u32::from(bf16::from_f32(entry(i as i32) as f32).to_bits());
    let table = s.load_words(&Line(from_fn(|i| entry(2 * i) | entry(2 * i + 1) << 16)));
    let mask = _mm512_set1_epi16((1 << BITS) - 1);
    let zeros: [__m512i; TILES] = from_fn(|t| if ZEROS { zero_points(s, head, t) } else { s.splat_word(0) });
    let pairs = 16 / BITS as usize;
    for (row, out) in words.iter().zip(panel.chunks_exact_mut(pairs)) {
        for t in 0..TILES {
            s.prefetch(row.as_ptr().wrapping_add(AHEAD + t));
            let word = s.load_words(&row[t]);
            for (pair, out) in out.iter_mut().enumerate() {
                let mut index = _mm512_srlv_epi16(word, _mm512_set1_epi16((BITS as usize * pair) as i16));
                if ZEROS {
                    index = _mm512_sub_epi16(_mm512_and_si512(index, mask), zeros[t]);
                }
                store(_mm512_permutexvar_epi16(index, table), &mut out[t]);
            }
        }
    }
}

/// 8 bits: through float32, whose upper half is the bfloat16.
#[target_feature(enable = "avx512f,avx512bw")]
fn bytes(s: Avx512, zeros: bool, head: &[Line], words: &[[Line; TILES]], panel: &mut [PairRow]) {
    let low = s.splat_word(0xff);
    let upper = s.splat_word(0xffff_0000);
    let zeros: [__m512; TILES] =
        from_fn(|t| if zeros { s.to_float(s.and(zero_points(s, head, t), low)) } else { s.splat(128.0) });
    for (row, out) in words.iter().zip(panel.chunks_exact_mut(2)) {
        for t in 0..TILES {
            s.prefetch(row.as_ptr().wrapping_add(AHEAD + t));
            let word = s.load_words(&row[t]);
            for (pair, out) in out.iter_mut().enumerate() {
                let [even, odd] = [8 * pair as u32, 8 * pair as u32 + 16].map(|shift| {
                    let code = s.and(s.shift_right(word, shift), low);
                    s.float_to_bits(s.sub(s.to_float(code), zeros[t]))
                });
                store(s.or(s.shift_right(even, 16), s.and(odd, upper)), &mut out[t]);
            }
        }
    }
}

/// The zero points of tile `tile`, in both halves of each word.
#[inline(always)]
fn zero_points(s: Avx512, head: &[Line], tile: usize) -> __m512i {
    let zero = s.and(s.shift_right(s.load_words(&head[2]), 8 * tile as u32), s.splat_word(0xff));
    s.or(zero, s.shift_left(zero, 16))
}

#[inline(always)]
fn store(words: __m512i, to: &mut Line) {
    // SAFETY: called with AVX-512F enabled only; `Line` has 64 bytes, and is aligned to as many.
    unsafe { _mm512_store_si512((&raw mut to.0).cast(), words) };
}

/// The scales of a block, from the header of a segment.
pub(super) fn scales(amx: Amx, head: &[Line]) -> PanelRow {
    #[target_feature(enable = "avx512f")]
    fn compiled(s: Avx512, head: &[Line]) -> PanelRow {
        let mut scales = [[0.0; 16]; TILES];
        for (tile, out) in scales.iter_mut().enumerate() {
            s.store(half_to_float(s, s.load_words(&head[tile / 2]), tile % 2), out);
        }
        scales
    }
    // SAFETY: `Amx` exists only where AVX-512F does.
    unsafe { compiled(amx.vectors(), head) }
}

/// `sums = scale * products + sums` for the rows of one tile of products.
pub(super) fn accumulate(amx: Amx, scale: &[f32; 16], products: &Sums, tile: usize, sums: &mut [PanelRow]) {
    #[target_feature(enable = "avx512f")]
    fn compiled(s: Avx512, scale: &[f32; 16], products: &Sums, tile: usize, sums: &mut [PanelRow]) {
        let scale = s.load(scale);
        for (product, sums) in products.iter().zip(sums) {
            let sum = &mut sums[tile];
            s.store(s.mul_add(scale, s.load(product), s.load(sum)), sum);
        }
    }
    // SAFETY: `Amx` exists only where AVX-512F does.
    unsafe { compiled(amx.vectors(), scale, products, tile, sums) }
}

/// Splits 32 activations into three bfloat16 parts whose sum they are, exactly: each part is what is left, cut off after
/// 8 significant bits. Word `n` of a line holds features `2 n` and `2 n + 1`.
pub(super) fn split(amx: Amx, x: &[f32; 32], parts: [&mut [u32; 16]; 3]) {
    #[target_feature(enable = "avx512f")]
    fn compiled(s: Avx512, x: &[f32; 32], parts: [&mut [u32; 16]; 3]) {
        let upper = s.splat_word(0xffff_0000);
        let (halves, _) = x.as_chunks::<16>();
        let (low, high) = (s.load(&halves[0]), s.load(&halves[1]));
        let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        let odd = s.or(even, s.splat_word(1));
        let mut even = _mm512_permutex2var_ps(low, even, high);
        let mut odd = _mm512_permutex2var_ps(low, odd, high);
        for part in parts {
            let (e, o) = (s.and(s.float_to_bits(even), upper), s.and(s.float_to_bits(odd), upper));
            s.store(s.bits_to_float(s.or(s.shift_right(e, 16), o)), bytemuck::cast_mut(part));
            even = s.sub(even, s.bits_to_float(e));
            odd = s.sub(odd, s.bits_to_float(o));
        }
    }
    // SAFETY: `Amx` exists only where AVX-512F does.
    unsafe { compiled(amx.vectors(), x, parts) }
}
