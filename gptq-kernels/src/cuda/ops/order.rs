use super::{element, expect_shape};
use crate::{
    KernelError, MatMut,
    backend::inverse_order,
    cuda::{CudaDevice, Element, driver::Resident},
};

/// An order of columns on the device.
pub struct CudaOrder {
    /// The column of every place.
    order: Resident,
    /// The place of every column.
    places: Resident,
    len: usize,
}

impl CudaOrder {
    pub(super) fn new<T: Element>(device: &CudaDevice<T>, order: &[u32]) -> Result<Self, KernelError> {
        // A row passes through shared memory.
        super::expect_below("columns of an order", order.len(), device.block_memory() / size_of::<T>())?;
        let places = inverse_order(order)?;
        let stream = device.stream();
        // Threads read eight at a time.
        let mut padded = order.to_vec();
        padded.resize(order.len().next_multiple_of(8), 0);
        Ok(Self {
            order: Resident::new(stream, &padded)?,
            places: Resident::new(stream, &places)?,
            len: order.len(),
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.order.address()
    }

    pub(super) fn places(&self) -> u64 {
        self.places.address()
    }

    /// An error unless it is one of `cols` columns.
    pub(super) fn check(&self, cols: usize) -> Result<(), KernelError> {
        expect_shape("order", (1, self.len), (1, cols))
    }

    /// Bytes of shared memory for a row.
    pub(super) fn row_bytes<T>(&self) -> usize {
        self.len.next_multiple_of(8) * size_of::<T>()
    }
}

/// `ReorderArgs` of `ops.cu`.
#[repr(C)]
struct ReorderArgs {
    order: u64,
    y: u64,
    y_stride: u64,
    cols: u32,
    vectors: u32,
}

pub(super) fn reorder<T: Element>(
    device: &CudaDevice<T>,
    order: &CudaOrder,
    y: MatMut<'_, CudaDevice<T>>,
) -> Result<(), KernelError> {
    let (rows, cols) = (y.rows(), y.cols());
    order.check(cols)?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let y_stride = element::stride(rows, y.row_stride());
    let y = y.into_data();
    let mut args = ReorderArgs {
        order: order.address(),
        y: y.address(),
        y_stride: y_stride as u64,
        cols: cols as u32,
        vectors: element::vectors(&[y.address()], &[y_stride]),
    };
    let launch = device.shape((element::rows_grid(rows)?, 1), element::NORM_THREADS, order.row_bytes::<T>());
    // SAFETY: `ReorderArgs` field by field; the order has as many columns as y, each of them one of y's, and shared memory
    // holds a row. The order is read ahead of the wait: no kernel writes it.
    unsafe { device.row_kernels()?.reorder.launch("reorder", launch, y.stream(), &mut args) }
}
