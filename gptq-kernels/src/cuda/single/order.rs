use crate::{
    Device, KernelError, MatMut,
    backend::inverse_order,
    cuda::{CudaBuffer, CudaDevice, CudaRef},
    matrix::expect_shape,
};

/// An order of columns, on the host: what it is needed for passes through there.
pub struct SingleOrder {
    /// The column of every place.
    order: Vec<u32>,
    /// The place of every column.
    places: Vec<u32>,
}

impl SingleOrder {
    pub(super) fn new(order: &[u32]) -> Result<Self, KernelError> {
        Ok(Self { order: order.to_vec(), places: inverse_order(order)? })
    }

    /// An error unless it is one of `cols` columns.
    fn check(&self, cols: usize) -> Result<(), KernelError> {
        expect_shape("order", (1, self.order.len()), (1, cols))
    }

    /// What was in this order, in the natural one.
    pub(super) fn undone(
        &self,
        device: &CudaDevice<f32>,
        row: CudaRef<'_, f32>,
        cols: usize,
    ) -> Result<CudaBuffer<f32>, KernelError> {
        self.check(cols)?;
        let mut ordered = vec![0.0; CudaDevice::<f32>::len(&row)];
        expect_shape("weight", (1, ordered.len()), (1, cols))?;
        device.download(row, &mut ordered)?;
        let natural: Vec<f32> = self.places.iter().map(|&place| ordered[place as usize]).collect();
        let mut buffer = device.alloc(cols)?;
        device.upload(&natural, CudaDevice::<f32>::slice_mut(&mut buffer, 0..cols))?;
        Ok(buffer)
    }

    pub(super) fn reorder(
        &self,
        device: &CudaDevice<f32>,
        mut y: MatMut<'_, CudaDevice<f32>>,
    ) -> Result<(), KernelError> {
        let (rows, cols, stride) = (y.rows(), y.cols(), y.row_stride());
        self.check(cols)?;
        let mut values = vec![0.0; CudaDevice::<f32>::len(&y.as_ref().data())];
        device.download(y.as_ref().data(), &mut values)?;
        let mut row = vec![0.0; cols];
        for r in 0..rows {
            let at = r * stride..r * stride + cols;
            row.copy_from_slice(&values[at.clone()]);
            for (value, &column) in values[at].iter_mut().zip(&self.order) {
                *value = row[column as usize];
            }
        }
        device.upload(&values, y.reborrow().into_data())
    }
}
