//! The CPU as a device.

use std::ops::Range;

use crate::{Device, KernelError};

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
