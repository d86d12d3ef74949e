use std::marker::PhantomData;

use rayon::current_num_threads;

use crate::{MatMut, MatRef, cpu::Cpu};

/// The rows of a matrix, to read. Unlike [`MatRef`] it is covariant, so that it may point to the caller's memory or to
/// scratch.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> Rows<'a> {
    /// The rows of `matrix`.
    pub(super) fn new(matrix: MatRef<'a, Cpu>) -> Self {
        let (rows, cols, row_stride) = (matrix.rows(), matrix.cols(), matrix.row_stride());
        Self { data: matrix.data(), rows, cols, row_stride }
    }

    /// Copies the columns `order` of these rows to `to`, of as many elements as this matrix.
    pub(super) fn gather<'b>(self, order: &[u32], to: &'b mut [f32]) -> Rows<'b> {
        for (row, to) in to.chunks_exact_mut(self.cols).enumerate() {
            let from = self.row(row);
            for (to, &i) in to.iter_mut().zip(order) {
                *to = from[i as usize];
            }
        }
        Rows { data: to, row_stride: self.cols, ..self }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Row `row`. Panics if there is no such row.
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        &self.data[row * self.row_stride..][..self.cols]
    }
}

/// Some columns of a matrix, to write. Like a slice it can be split, so that threads write to different columns of the
/// same rows.
pub(super) struct Columns<'a> {
    /// Element `(0, 0)`.
    start: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: `Columns` is an exclusive borrow of floats, like `&mut [f32]`, which is `Send`: no two values share an element,
// because `new` borrows the whole matrix and `split_at` consumes what it divides.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// All columns of a matrix.
    pub(super) fn new(matrix: MatMut<'a, Cpu>) -> Self {
        let (rows, cols, row_stride) = (matrix.rows(), matrix.cols(), matrix.row_stride());
        Self { start: matrix.into_data().as_mut_ptr(), rows, cols, row_stride, borrow: PhantomData }
    }

    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// The columns before and from `col` on. Panics if there are fewer.
    pub(super) fn split_at(self, col: usize) -> (Self, Self) {
        assert!(col <= self.cols, "split at column {col} of {}", self.cols);
        // `wrapping_add`, since with no rows there may be no memory at all; the pointer is only used for rows that exist.
        let right = Self { start: self.start.wrapping_add(col), cols: self.cols - col, ..Self { ..self } };
        (Self { cols: col, ..self }, right)
    }

    /// These columns of row `row`. Panics if there is no such row.
    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `MatMut` has checked that `row * row_stride .. + cols` of the whole matrix lies in its memory, and that
        // rows do not overlap; `start` and `cols` are a sub-range of the columns of that matrix, borrowed by this value
        // alone for 'a (see `Send`), and `&mut self` makes the loan of the row exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.row_stride), self.cols) }
    }
}

/// Calls `work(block, columns)` for every run of `width` columns, on the threads of the current rayon pool. Blocks are
/// dealt in contiguous ranges of at least `least` blocks, a few ranges a thread, so that a thread that is late leaves
/// some of its share to others. Which thread does a block changes nothing about its result.
pub(super) fn for_each_range(
    columns: Columns<'_>,
    width: usize,
    least: usize,
    work: &(impl Fn(usize, Columns<'_>) + Sync),
) {
    let blocks = columns.cols().div_ceil(width);
    let threads = current_num_threads();
    let ranges = if threads == 1 { 1 } else { 4 * threads };
    split(columns, width, 0, blocks.div_ceil(ranges).max(least).max(1), work);
}

fn split(
    columns: Columns<'_>,
    width: usize,
    first: usize,
    grain: usize,
    work: &(impl Fn(usize, Columns<'_>) + Sync),
) {
    let blocks = columns.cols().div_ceil(width);
    if blocks <= grain {
        work(first, columns);
        return;
    }
    let half = blocks / 2;
    let (left, right) = columns.split_at(half * width);
    rayon::join(|| split(left, width, first, grain, work), || split(right, width, first + half, grain, work));
}
