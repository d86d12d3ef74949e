//! Buffers, and buffers as matrices.

use gptq_kernels::{Backend, KernelError, MatMut, MatRef};

/// The first `rows` rows of a contiguous buffer.
pub(crate) fn mat<D: Backend>(
    buffer: &D::Buffer,
    rows: usize,
    cols: usize,
) -> Result<MatRef<'_, D>, KernelError> {
    MatRef::new(D::slice(buffer, 0..rows * cols), rows, cols)
}

/// The first `rows` rows of a contiguous buffer, to write.
pub(crate) fn mat_mut<D: Backend>(
    buffer: &mut D::Buffer,
    rows: usize,
    cols: usize,
) -> Result<MatMut<'_, D>, KernelError> {
    MatMut::new(D::slice_mut(buffer, 0..rows * cols), rows, cols)
}

/// A whole buffer.
pub(crate) fn all<D: Backend>(buffer: &D::Buffer) -> D::Slice<'_> {
    D::slice(buffer, 0..D::buffer_len(buffer))
}

/// A buffer of `data`.
pub(crate) fn upload<D: Backend>(device: &D, data: &[f32]) -> Result<D::Buffer, KernelError> {
    let mut buffer = device.alloc(data.len())?;
    device.upload(data, D::slice_mut(&mut buffer, 0..data.len()))?;
    Ok(buffer)
}
