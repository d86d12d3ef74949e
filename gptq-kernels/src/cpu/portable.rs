use std::array::from_fn;

use super::{
    direct::{self, DirectArgs},
    format::Format,
    layout::Line,
    panel::{self, PanelArgs, UnpackArgs},
    simd::Simd,
};

/// Plain arrays, which the compiler turns into whatever vectors the target has for certain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Portable;

impl Simd for Portable {
    type F = [f32; 16];
    type U = [u32; 16];
    type Table = (u32, f32);

    const NAME: &'static str = "cpu-portable-f32";
    // A fused multiply-add is a library call where the target has none.
    const ROUNDINGS: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 16] {
        [value; 16]
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> [f32; 16] {
        *from
    }
    #[inline(always)]
    fn store(self, value: [f32; 16], to: &mut [f32; 16]) {
        *to = value;
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn load_words(self, from: &Line) -> [u32; 16] {
        from.0
    }
    #[inline(always)]
    fn prefetch(self, _: *const Line) {}
    #[inline(always)]
    fn splat_word(self, value: u32) -> [u32; 16] {
        [value; 16]
    }
    #[inline(always)]
    fn shift_right(self, words: [u32; 16], by: u32) -> [u32; 16] {
        words.map(|word| word >> by)
    }
    #[inline(always)]
    fn shift_left(self, words: [u32; 16], by: u32) -> [u32; 16] {
        words.map(|word| word << by)
    }
    #[inline(always)]
    fn and(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    fn or(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn greater(self, a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        from_fn(|i| if a[i] as i32 > b[i] as i32 { u32::MAX } else { 0 })
    }
    #[inline(always)]
    fn to_float(self, words: [u32; 16]) -> [f32; 16] {
        // Signed, because that is one instruction everywhere.
        words.map(|word| word as i32 as f32)
    }
    #[inline(always)]
    fn bits_to_float(self, words: [u32; 16]) -> [f32; 16] {
        words.map(f32::from_bits)
    }
    #[inline(always)]
    fn float_to_bits(self, values: [f32; 16]) -> [u32; 16] {
        values.map(f32::to_bits)
    }
    #[inline(always)]
    fn table(self, bits: u32, offset: u32) -> (u32, f32) {
        ((1 << bits) - 1, offset as f32)
    }
    #[inline(always)]
    fn look_up(self, words: [u32; 16], (mask, offset): (u32, f32)) -> [f32; 16] {
        words.map(|word| (word & mask) as i32 as f32 - offset)
    }

    fn direct<W: Format, const ROWS: usize>(self, args: DirectArgs<'_, ROWS>) {
        direct::run::<Self, W, ROWS, 1>(self, args);
    }
    fn unpack<W: Format>(self, args: UnpackArgs<'_>) {
        panel::unpack::<Self, W>(self, args);
    }
    fn panel<const ROWS: usize>(self, args: PanelArgs<'_, ROWS>) {
        panel::run::<Self, ROWS, 1>(self, args);
    }
}
