//! An upper triangular factor in float32, laid out for the column loop.

use ndarray::ArrayView2;
use rayon::prelude::*;

use crate::panel::COLS;

/// The rows `start..start + width` of an upper triangular matrix, one lazy block.
#[derive(Debug, Clone)]
pub(crate) struct UpperBlock {
    /// First row.
    pub(crate) start: usize,
    /// Number of rows.
    pub(crate) width: usize,
    /// (width, width), row-major: columns `start..start + width`.
    diagonal: Vec<f32>,
    /// The columns right of it, in panels of [`COLS`], each `width` rows long.
    right: Vec<[f32; COLS]>,
}

impl UpperBlock {
    /// Row `row` of the diagonal part, from its diagonal element on.
    #[inline(always)]
    pub(crate) fn diagonal_row(&self, row: usize) -> &[f32] {
        &self.diagonal[row * self.width + row..(row + 1) * self.width]
    }

    /// Panels of the columns right of the block.
    pub(crate) fn right_panels(&self) -> impl Iterator<Item = &[[f32; COLS]]> {
        self.right.chunks_exact(self.width)
    }

    fn new(matrix: ArrayView2<'_, f64>, start: usize, width: usize) -> Self {
        let columns = matrix.ncols();
        let end = start + width;
        let mut diagonal = Vec::with_capacity(width * width);
        for row in start..end {
            diagonal.extend((start..end).map(|column| matrix[[row, column]] as f32));
        }
        let mut right = Vec::with_capacity(width * (columns - end).div_ceil(COLS));
        for first in (end..columns).step_by(COLS) {
            let used = COLS.min(columns - first);
            for row in start..end {
                let mut step = [0.0; COLS];
                for (j, x) in step[..used].iter_mut().enumerate() {
                    *x = matrix[[row, first + j]] as f32;
                }
                right.push(step);
            }
        }
        Self { start, width, diagonal, right }
    }
}

/// Splits an upper triangular matrix into lazy blocks of `block_size` rows.
pub(crate) fn pack_upper(matrix: ArrayView2<'_, f64>, block_size: usize) -> Vec<UpperBlock> {
    let columns = matrix.ncols();
    (0..columns.div_ceil(block_size))
        .into_par_iter()
        .map(|block| {
            let start = block * block_size;
            UpperBlock::new(matrix, start, block_size.min(columns - start))
        })
        .collect()
}
