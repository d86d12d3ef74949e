use crate::{Device, KernelError};

/// A row-major matrix of activations on a device, to read: element `(r, c)` is `data[r * row_stride + c]`.
pub struct MatRef<'a, D: Device> {
    data: D::Slice<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// A row-major matrix of activations on a device, to write: element `(r, c)` is `data[r * row_stride + c]`.
pub struct MatMut<'a, D: Device> {
    data: D::SliceMut<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

fn check(rows: usize, cols: usize, row_stride: usize, len: usize) -> Result<(), KernelError> {
    let needed = match rows {
        0 => Some(0),
        _ => (rows - 1).checked_mul(row_stride).and_then(|start| start.checked_add(cols)),
    };
    match needed {
        Some(needed) if needed <= len && (row_stride >= cols || rows <= 1) => Ok(()),
        _ => Err(KernelError::MatrixBounds { rows, cols, row_stride, len }),
    }
}

/// Fails unless `got` is below `limit`.
pub(crate) fn expect_below(what: &'static str, got: usize, limit: usize) -> Result<(), KernelError> {
    if got < limit { Ok(()) } else { Err(KernelError::Argument { what, got, limit }) }
}

/// Fails unless a matrix is `rows x cols`.
pub(crate) fn expect_shape(
    argument: &'static str,
    (got_rows, got_cols): (usize, usize),
    (rows, cols): (usize, usize),
) -> Result<(), KernelError> {
    if (got_rows, got_cols) == (rows, cols) {
        return Ok(());
    }
    Err(KernelError::Shape { argument, rows, cols, got_rows, got_cols })
}

impl<'a, D: Device> MatRef<'a, D> {
    /// A contiguous matrix, `row_stride = cols`.
    pub fn new(data: D::Slice<'a>, rows: usize, cols: usize) -> Result<Self, KernelError> {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A matrix whose rows are `row_stride` elements apart.
    pub fn with_stride(
        data: D::Slice<'a>,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self, KernelError> {
        check(rows, cols, row_stride, D::len(&data))?;
        Ok(Self { data, rows, cols, row_stride })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Distance between the starts of two rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }
    /// All elements, from `(0, 0)` on.
    pub fn data(&self) -> D::Slice<'a> {
        self.data
    }
}

impl<D: Device> Clone for MatRef<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for MatRef<'_, D> {}

impl<'a, D: Device> MatMut<'a, D> {
    /// A contiguous matrix, `row_stride = cols`.
    pub fn new(data: D::SliceMut<'a>, rows: usize, cols: usize) -> Result<Self, KernelError> {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A matrix whose rows are `row_stride` elements apart.
    pub fn with_stride(
        data: D::SliceMut<'a>,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self, KernelError> {
        check(rows, cols, row_stride, D::len_mut(&data))?;
        Ok(Self { data, rows, cols, row_stride })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Distance between the starts of two rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }
    /// All elements, from `(0, 0)` on.
    pub fn data(&mut self) -> D::SliceMut<'_> {
        D::reborrow(&mut self.data)
    }
    /// All elements, from `(0, 0)` on, for as long as the matrix was borrowed.
    pub fn into_data(self) -> D::SliceMut<'a> {
        self.data
    }
    /// The matrix to read, for as long as it is not written.
    pub fn as_ref(&self) -> MatRef<'_, D> {
        let (rows, cols, row_stride) = (self.rows, self.cols, self.row_stride);
        MatRef { data: D::as_slice(&self.data), rows, cols, row_stride }
    }
    /// A shorter-lived loan of this matrix.
    pub fn reborrow(&mut self) -> MatMut<'_, D> {
        MatMut {
            data: D::reborrow(&mut self.data),
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
        }
    }
}
