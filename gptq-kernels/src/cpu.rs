//! The CPU as a device, and its kernels.

mod columns;
mod direct;
mod float;
mod format;
mod layout;
mod panel;
mod portable;
mod simd;

pub mod ops;

use std::ops::Range;

use crate::{Device, KernelError, LinearKernel, LinearSpec, MatMut, MatRef, reference::ReferenceKernel};
use float::FloatKernel;
use portable::Portable;

/// The kernels that this machine can run, fastest first, and last the float64 reference.
///
/// A kernel whose instructions the CPU lacks is not in the list; a `tracing` event of level debug says so.
pub fn kernels() -> Vec<Box<dyn LinearKernel<Cpu>>> {
    vec![Box::new(FloatKernel(Portable)), Box::new(ReferenceKernel)]
}

/// Checks `x` and `y` against the layer.
pub(crate) fn check_operands(
    spec: &LinearSpec,
    x: &MatRef<'_, Cpu>,
    y: &MatMut<'_, Cpu>,
) -> Result<(), KernelError> {
    let shape = |argument, rows, cols, got_rows, got_cols| {
        Err(KernelError::Shape { argument, rows, cols, got_rows, got_cols })
    };
    if x.cols() != spec.in_features {
        return shape("x", x.rows(), spec.in_features, x.rows(), x.cols());
    }
    if y.cols() != spec.out_features || y.rows() != x.rows() {
        return shape("y", x.rows(), spec.out_features, y.rows(), y.cols());
    }
    Ok(())
}

/// The CPU: float32 activations in host memory, work spread over the current rayon thread pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Slice<'a> = &'a [f32];
    type SliceMut<'a> = &'a mut [f32];

    fn alloc(&self, len: usize) -> Result<Vec<f32>, KernelError> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| KernelError::OutOfMemory { elements: len })?;
        buffer.resize(len, 0.0);
        Ok(buffer)
    }

    fn upload(&self, src: &[f32], dst: &mut [f32]) -> Result<(), KernelError> {
        self.download(src, dst)
    }

    fn download(&self, src: &[f32], dst: &mut [f32]) -> Result<(), KernelError> {
        if src.len() != dst.len() {
            return Err(KernelError::CopyLength { src: src.len(), dst: dst.len() });
        }
        dst.copy_from_slice(src);
        Ok(())
    }

    fn synchronize(&self) -> Result<(), KernelError> {
        Ok(())
    }

    fn slice(buffer: &Vec<f32>, range: Range<usize>) -> &[f32] {
        &buffer[range]
    }

    fn slice_mut(buffer: &mut Vec<f32>, range: Range<usize>) -> &mut [f32] {
        &mut buffer[range]
    }

    fn reborrow<'a>(slice: &'a mut &mut [f32]) -> &'a mut [f32] {
        slice
    }

    fn len(slice: &&[f32]) -> usize {
        slice.len()
    }

    fn len_mut(slice: &&mut [f32]) -> usize {
        slice.len()
    }

    fn buffer_len(buffer: &Vec<f32>) -> usize {
        buffer.len()
    }
}
