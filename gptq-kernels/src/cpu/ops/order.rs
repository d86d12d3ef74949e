use std::cell::RefCell;

use crate::{KernelError, backend::inverse_order, matrix::expect_shape};

thread_local! {
    /// A row that changes its order: grows to the longest row of the thread and stays.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// An order of columns.
pub struct CpuOrder(Vec<u32>);

impl CpuOrder {
    pub(super) fn new(order: &[u32]) -> Result<Self, KernelError> {
        inverse_order(order)?;
        Ok(Self(order.to_vec()))
    }

    /// An error unless it is one of `cols` columns.
    pub(super) fn check(&self, cols: usize) -> Result<(), KernelError> {
        expect_shape("order", (1, self.0.len()), (1, cols))
    }

    /// The elements of a row that has as many columns.
    pub(super) fn of<'a>(&'a self, row: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        self.0.iter().map(|&column| row[column as usize])
    }

    pub(super) fn reorder(&self, row: &mut [f32]) {
        ROW.with_borrow_mut(|old| {
            old.clear();
            old.extend_from_slice(row);
            row.iter_mut().zip(self.of(old)).for_each(|(new, old)| *new = old);
        });
    }
}
