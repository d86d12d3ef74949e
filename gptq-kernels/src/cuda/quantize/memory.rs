//! Memory of a quantisation, and copies to and from it.

use std::sync::Arc;

use cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, HostSlice, ValidAsZeroBits, result, sys,
};

use crate::{KernelError, cuda::driver::gpu_error};

/// Elements on the device, freed in the order of the stream.
pub(super) struct Memory<E> {
    slice: CudaSlice<E>,
    address: u64,
    len: usize,
}

fn failed(stream: &CudaStream, bytes: usize) -> impl Fn(DriverError) -> KernelError + '_ {
    move |error| match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            let (free, total) = stream.context().mem_get_info().unwrap_or_default();
            KernelError::OutOfGpuMemory { bytes, free, total }
        }
        _ => gpu_error("memory for quantising", error),
    }
}

impl<E: DeviceRepr + ValidAsZeroBits> Memory<E> {
    fn of(slice: CudaSlice<E>, len: usize, stream: &Arc<CudaStream>) -> Self {
        let address = slice.device_ptr(stream).0;
        Self { slice, address, len }
    }

    /// Zeros.
    pub(super) fn zeros(stream: &Arc<CudaStream>, len: usize) -> Result<Self, KernelError> {
        let bytes = len.saturating_mul(size_of::<E>());
        // The driver allocates no empty memory.
        let slice = stream.alloc_zeros(len.max(1)).map_err(failed(stream, bytes))?;
        Ok(Self::of(slice, len, stream))
    }

    /// A copy of `data`.
    pub(super) fn copy_of(stream: &Arc<CudaStream>, data: &[E]) -> Result<Self, KernelError>
    where
        [E]: HostSlice<E>,
    {
        let mut memory = Self::zeros(stream, data.len())?;
        if !data.is_empty() {
            stream.memcpy_htod(data, &mut memory.slice).map_err(failed(stream, size_of_val(data)))?;
        }
        Ok(memory)
    }

    /// The elements on the host; waits for them.
    pub(super) fn to_host(&self, stream: &Arc<CudaStream>) -> Result<Vec<E>, KernelError> {
        let bytes = self.len * size_of::<E>();
        let mut host = stream.clone_dtoh(&self.slice).map_err(failed(stream, bytes))?;
        stream.synchronize().map_err(failed(stream, bytes))?;
        host.truncate(self.len);
        Ok(host)
    }

    /// One element on the host; waits for it. Panics if there is none such.
    pub(super) fn element(&self, stream: &Arc<CudaStream>, index: usize) -> Result<E, KernelError>
    where
        E: Copy,
    {
        let failed = failed(stream, size_of::<E>());
        let host = stream.clone_dtoh(&self.slice.slice(index..index + 1)).map_err(&failed)?;
        stream.synchronize().map_err(&failed)?;
        Ok(host[0])
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

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
