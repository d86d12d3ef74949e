//! Copies of matrices on the device.

use cudarc::driver::{CudaStream, result, sys};

use super::failure::gpu_error;
use crate::KernelError;

/// A matrix in memory: address, and distance of rows in bytes.
#[derive(Clone, Copy)]
pub(super) struct Pitched {
    pub(super) address: u64,
    pub(super) pitch: usize,
}

/// Queues a copy of `rows` rows of `row_bytes` bytes on the device.
///
/// # Safety
///
/// Both matrices must be memory of the stream's context of that size until the stream has run the copy, and must not
/// overlap.
pub(super) unsafe fn copy_rows(
    stream: &CudaStream,
    from: Pitched,
    to: Pitched,
    row_bytes: usize,
    rows: usize,
) -> Result<(), KernelError> {
    if rows == 0 || row_bytes == 0 {
        return Ok(());
    }
    let failed = |error| gpu_error("copying on the GPU", error);
    stream.context().bind_to_thread().map_err(failed)?;
    if from.pitch == row_bytes && to.pitch == row_bytes {
        // SAFETY: the caller vouches for both.
        return unsafe {
            result::memcpy_dtod_async(to.address, from.address, row_bytes * rows, stream.cu_stream())
        }
        .map_err(failed);
    }
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: std::ptr::null(),
        srcDevice: from.address,
        srcArray: std::ptr::null_mut(),
        // One row may have a pitch of its own length or less.
        srcPitch: from.pitch.max(row_bytes),
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: to.address,
        dstArray: std::ptr::null_mut(),
        dstPitch: to.pitch.max(row_bytes),
        WidthInBytes: row_bytes,
        Height: rows,
    };
    // SAFETY: `copy` lives through the call; the caller vouches for the memory.
    unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream.cu_stream()) }.result().map_err(failed)
}
