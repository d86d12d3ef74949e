//! How the kernel of the column loop, `quantize_columns.cuh`, divides its work.

/// The widest lazy block.
pub(super) const MOST_WIDTH: usize = 256;

/// Rows of a block, columns of a step, and how far such a step's rows are apart; as in `quantize_columns.cuh`.
pub(super) const ROWS: usize = 32;
const STEPS: usize = 32;
const PADDED: usize = 33;

/// Shared memory of the column loop for lazy blocks of `width` columns.
pub(super) fn shared(width: usize, gptaq: bool) -> usize {
    let factors = if gptaq { 2 } else { 1 };
    let rows = factors * STEPS * (width.next_multiple_of(4) + 4);
    let floats = rows + ROWS * (width | 1) + (2 + factors) * STEPS * PADDED;
    floats * size_of::<f32>() + STEPS * PADDED
}
