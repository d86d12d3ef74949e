use super::{
    direct::DirectArgs,
    format::Format,
    layout::Line,
    panel::{PanelArgs, UnpackArgs},
};

/// Sixteen float32 lanes and the loops built on them, for one instruction set.
///
/// A value exists only where the CPU has the instructions, so its methods are safe to call. The lane operations are
/// always inlined; the three loops are functions compiled for the instruction set, so that everything inlined into
/// them is too.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    /// 16 float32.
    type F: Copy;
    /// 16 words.
    type U: Copy;
    /// What turns a code into a float.
    type Table: Copy;

    /// Name of the kernel.
    const NAME: &'static str;
    /// How many roundings a multiplication and an addition make: 1 where they are fused.
    const ROUNDINGS: usize;

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &[f32; 16]) -> Self::F;
    fn store(self, value: Self::F, to: &mut [f32; 16]);
    /// `a * b + c`
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;

    fn load_words(self, from: &Line) -> Self::U;
    /// Asks for a line that will be needed soon; any address will do.
    fn prefetch(self, line: *const Line);
    fn splat_word(self, value: u32) -> Self::U;
    fn shift_right(self, words: Self::U, by: u32) -> Self::U;
    fn shift_left(self, words: Self::U, by: u32) -> Self::U;
    fn and(self, a: Self::U, b: Self::U) -> Self::U;
    fn or(self, a: Self::U, b: Self::U) -> Self::U;
    /// All ones where `a > b` as signed numbers, else 0.
    fn greater(self, a: Self::U, b: Self::U) -> Self::U;
    /// Words below 2^24 to floats.
    fn to_float(self, words: Self::U) -> Self::F;
    fn bits_to_float(self, words: Self::U) -> Self::F;
    fn float_to_bits(self, values: Self::F) -> Self::U;

    /// The table for codes of `bits` < 8 bits that stand for `code - offset`.
    fn table(self, bits: u32, offset: u32) -> Self::Table;
    /// Entry `word mod 2^bits` of the table; the other bits of the word may be anything.
    fn look_up(self, words: Self::U, table: Self::Table) -> Self::F;

    /// [`direct::run`](super::direct::run) for this instruction set.
    fn direct<W: Format, const ROWS: usize>(self, args: DirectArgs<'_, ROWS>);
    /// [`panel::unpack`](super::panel::unpack) for this instruction set.
    fn unpack<W: Format>(self, args: UnpackArgs<'_>);
    /// [`panel::run`](super::panel::run) for this instruction set.
    fn panel<const ROWS: usize>(self, args: PanelArgs<'_, ROWS>);
}
