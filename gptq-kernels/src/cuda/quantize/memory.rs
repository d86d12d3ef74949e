//! Memory of a quantisation, and copies to and from it.

use std::sync::Arc;

use cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, HostSlice, ValidAsZeroBits, sys,
};

use crate::{KernelError, cuda::failure::gpu_error};

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
