use super::simd::Simd;

/// How weights sit in 32-bit words, [`PER_WORD`](Self::PER_WORD) of them along the input dimension.
///
/// A word is two half-words, and weight `2 i + h` of a word is field `i` of half-word `h`. So a word holds pairs of
/// neighbours in K side by side, as bf16 dot-product instructions want them, and one layout serves them and float32.
pub(super) trait Format: Copy + Send + Sync + 'static {
    /// Weights per word.
    const PER_WORD: usize;
    /// Whether segments have scales.
    const SCALED: bool;
    /// Whether segments have zero points.
    const ZEROS: bool;

    /// What [`weights`](Self::weights) needs for one tile of a segment.
    type Grid<S: Simd>: Copy;

    /// `zeros`: the zero points of the tile, if [`ZEROS`](Self::ZEROS).
    fn grid<S: Simd>(s: S, zeros: S::F) -> Self::Grid<S>;

    /// Weight `slot` of 16 words, `code - zero` for codes. Exact.
    fn weights<S: Simd>(s: S, words: S::U, slot: usize, grid: Self::Grid<S>) -> S::F;
}

/// The bit at which weight `slot` of a word starts.
pub(super) const fn shift(bits: u32, slot: usize) -> u32 {
    16 * (slot as u32 % 2) + bits * (slot as u32 / 2)
}

/// Codes of fewer than 8 bits: a table entry each.
#[derive(Clone, Copy)]
pub(super) struct Narrow<const BITS: u32, const ZEROS: bool>;

impl<const BITS: u32, const ZEROS: bool> Format for Narrow<BITS, ZEROS> {
    const PER_WORD: usize = 2 * (16 / BITS as usize);
    const SCALED: bool = true;
    const ZEROS: bool = ZEROS;
    type Grid<S: Simd> = (S::Table, S::F);

    #[inline(always)]
    fn grid<S: Simd>(s: S, zeros: S::F) -> (S::Table, S::F) {
        // Symmetric layers have one zero point, which the table subtracts for nothing.
        (s.table(BITS, if ZEROS { 0 } else { 1 << (BITS - 1) }), zeros)
    }

    #[inline(always)]
    fn weights<S: Simd>(s: S, words: S::U, slot: usize, (table, zeros): (S::Table, S::F)) -> S::F {
        let value = s.look_up(s.shift_right(words, shift(BITS, slot)), table);
        if ZEROS { s.sub(value, zeros) } else { value }
    }
}

/// Codes of 8 bits.
#[derive(Clone, Copy)]
pub(super) struct Bytes<const ZEROS: bool>;

impl<const ZEROS: bool> Format for Bytes<ZEROS> {
    const PER_WORD: usize = 4;
    const SCALED: bool = true;
    const ZEROS: bool = ZEROS;
    type Grid<S: Simd> = S::F;

    #[inline(always)]
    fn grid<S: Simd>(s: S, zeros: S::F) -> S::F {
        if ZEROS { zeros } else { s.splat(128.0) }
    }

    #[inline(always)]
    fn weights<S: Simd>(s: S, words: S::U, slot: usize, zeros: S::F) -> S::F {
        let code = s.and(s.shift_right(words, shift(8, slot)), s.splat_word(0xff));
        s.sub(s.to_float(code), zeros)
    }
}

/// bfloat16: the upper half of a float32.
#[derive(Clone, Copy)]
pub(super) struct Bf16;

impl Format for Bf16 {
    const PER_WORD: usize = 2;
    const SCALED: bool = false;
    const ZEROS: bool = false;
    type Grid<S: Simd> = ();

    #[inline(always)]
    fn grid<S: Simd>(_: S, _: S::F) {}

    #[inline(always)]
    fn weights<S: Simd>(s: S, words: S::U, slot: usize, (): ()) -> S::F {
        s.bits_to_float(if slot == 0 {
            s.shift_left(words, 16)
        } else {
            s.and(words, s.splat_word(0xffff_0000))
        })
    }
}

/// IEEE half precision.
#[derive(Clone, Copy)]
pub(super) struct F16;

impl Format for F16 {
    const PER_WORD: usize = 2;
    const SCALED: bool = false;
    const ZEROS: bool = false;
    type Grid<S: Simd> = ();

    #[inline(always)]
    fn grid<S: Simd>(_: S, _: S::F) {}

    #[inline(always)]
    fn weights<S: Simd>(s: S, words: S::U, slot: usize, (): ()) -> S::F {
        half_to_float(s, words, slot)
    }
}

/// IEEE single precision.
#[derive(Clone, Copy)]
pub(super) struct F32;

impl Format for F32 {
    const PER_WORD: usize = 1;
    const SCALED: bool = false;
    const ZEROS: bool = false;
    type Grid<S: Simd> = ();

    #[inline(always)]
    fn grid<S: Simd>(_: S, _: S::F) {}

    #[inline(always)]
    fn weights<S: Simd>(s: S, words: S::U, _: usize, (): ()) -> S::F {
        s.bits_to_float(words)
    }
}

/// Half-word `slot` of each word, half precision, as float32. Exact, subnormal numbers, infinities and NaN included.
#[inline(always)]
pub(super) fn half_to_float<S: Simd>(s: S, words: S::U, slot: usize) -> S::F {
    // Exponent and significand move to where float32 has them; a multiplication by 2^(127-15) then corrects the bias and
    // normalises subnormals. Infinities and NaN need all exponent bits instead.
    let half = if slot == 0 { words } else { s.shift_right(words, 16) };
    let magnitude = s.and(half, s.splat_word(0x7fff));
    let sign = s.shift_left(s.and(half, s.splat_word(0x8000)), 16);
    let finite = s.mul(s.bits_to_float(s.shift_left(magnitude, 13)), s.splat(f32::from_bits(0x7780_0000)));
    let special = s.and(s.greater(magnitude, s.splat_word(0x7bff)), s.splat_word(0x7f80_0000));
    s.bits_to_float(s.or(s.or(s.float_to_bits(finite), special), sign))
}
