//! Host memory that the GPU copies from and to while the host goes on.

use std::{ffi::c_void, ptr::NonNull, sync::Arc};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, result, sys};

use super::{driver::zeros, failure::gpu_error};
use crate::KernelError;

/// Page-locked words, and an event that tells when the last copy that uses them has ended.
pub(super) struct Pinned {
    words: NonNull<u32>,
    len: usize,
    event: sys::CUevent,
    context: Arc<CudaContext>,
}

// SAFETY: owned memory and an event handle, which the driver lets every thread use that has bound the context.
unsafe impl Send for Pinned {}
// SAFETY: as above; all methods that touch the words take `&mut self`.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self, KernelError> {
        let failed = |error| gpu_error("allocating page-locked memory", error);
        context.bind_to_thread().map_err(failed)?;
        // SAFETY: a context is bound; the memory is freed in `drop`.
        let raw = unsafe { result::malloc_host(len.max(1) * 4, 0) }.map_err(failed)?;
        let words = NonNull::new(raw.cast::<u32>());
        let words = words.ok_or(KernelError::OutOfMemory { elements: len })?;
        // SAFETY: `words` is that many words, aligned to a page.
        unsafe { words.write_bytes(0, len.max(1)) };
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(|error| {
            // SAFETY: the memory was allocated above and nothing uses it.
            let _ = unsafe { result::free_host(raw) };
            failed(error)
        })?;
        Ok(Self { words, len, event, context: Arc::clone(context) })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where kernels write to the words; whoever lets them calls [`mark`](Self::mark) behind them.
    pub(super) fn address(&self) -> u64 {
        // Page-locked memory has one address for the host and for the devices, on every system with 64 bits.
        self.words.as_ptr() as u64
    }

    /// Takes what the stream does until now as a use of the words.
    pub(super) fn mark(&mut self, stream: &CudaStream) -> Result<(), KernelError> {
        let failed = |error| gpu_error("recording an event", error);
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the event and the stream are alive.
        unsafe { result::event::record(self.event, stream.cu_stream()) }.map_err(failed)
    }

    /// The words, once no copy uses them any more.
    pub(super) fn words(&mut self) -> Result<&mut [u32], KernelError> {
        let failed = |error| gpu_error("waiting for a copy", error);
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the event is alive; one that was never recorded counts as done.
        unsafe { result::event::synchronize(self.event) }.map_err(failed)?;
        // SAFETY: `new` has initialised the words, and no copy is on its way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.words.as_ptr(), self.len) })
    }

    /// Queues a copy of the first `len` words to `address`.
    pub(super) fn upload(
        &mut self,
        stream: &CudaStream,
        address: u64,
        len: usize,
    ) -> Result<(), KernelError> {
        debug_assert!(len <= self.len);
        let failed = |error| gpu_error("copying to the GPU", error);
        // SAFETY: the words live until the event, which `words` and `drop` wait for; the caller has that much memory at
        // `address`.
        unsafe {
            let words = std::slice::from_raw_parts(self.words.as_ptr(), len);
            result::memcpy_htod_async(address, words, stream.cu_stream()).map_err(failed)?;
        }
        self.mark(stream)
    }

    /// Queues a copy of `len` words at `address` to the first words.
    pub(super) fn download(
        &mut self,
        stream: &CudaStream,
        address: u64,
        len: usize,
    ) -> Result<(), KernelError> {
        debug_assert!(len <= self.len);
        let failed = |error| gpu_error("copying from the GPU", error);
        // SAFETY: as in `upload`; nothing reads the words before the event.
        unsafe {
            let words = std::slice::from_raw_parts_mut(self.words.as_ptr(), len);
            result::memcpy_dtoh_async(words, address, stream.cu_stream()).map_err(failed)?;
        }
        self.mark(stream)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // An error means that the context is lost, and then no copy runs.
            // SAFETY: the handles came from the driver and are used for the last time.
            unsafe {
                let _ = result::event::synchronize(self.event);
                let _ = result::event::destroy(self.event);
                let _ = result::free_host(self.words.as_ptr().cast::<c_void>());
            }
        }
    }
}

/// Words on the device and where they are read back to.
pub(super) struct Readback {
    device: CudaSlice<u32>,
    host: Pinned,
}

impl Readback {
    pub(super) fn new(stream: &Arc<CudaStream>, len: usize) -> Result<Self, KernelError> {
        Ok(Self { device: zeros(stream, len)?, host: Pinned::new(stream.context(), len)? })
    }

    pub(super) fn len(&self) -> usize {
        self.host.len()
    }

    /// Where kernels write.
    pub(super) fn address(&self, stream: &CudaStream) -> u64 {
        self.device.device_ptr(stream).0
    }

    /// Reads the first `len` words; waits for all that the stream does before.
    pub(super) fn read(&mut self, stream: &CudaStream, len: usize) -> Result<&[u32], KernelError> {
        let address = self.address(stream);
        self.host.download(stream, address, len)?;
        Ok(&self.host.words()?[..len])
    }
}
