//! Memory of the host that the GPU copies from and to at the full speed of its bus.

use std::{ffi::c_void, ptr::NonNull, sync::Arc};

use cudarc::driver::{CudaContext, result};

/// Bytes that are page-locked, as far as the system lets them be.
pub struct CudaHostBytes(Bytes);

enum Bytes {
    Locked { start: NonNull<u8>, len: usize, context: Arc<CudaContext> },
    Pageable(Vec<u8>),
}

// SAFETY: owned memory, which the driver lets every thread free that has bound the context.
unsafe impl Send for CudaHostBytes {}
// SAFETY: as above; a shared reference only reads.
unsafe impl Sync for CudaHostBytes {}

impl CudaHostBytes {
    /// Zeros. Where memory cannot be page-locked, ordinary memory serves, at a third of the speed or less.
    pub(super) fn new(context: &Arc<CudaContext>, len: usize) -> Self {
        let locked = || {
            context.bind_to_thread().ok()?;
            // SAFETY: a context is bound; the memory is freed in `drop`.
            let raw = unsafe { result::malloc_host(len, 0) }.ok()?;
            let start = NonNull::new(raw.cast::<u8>())?;
            // SAFETY: `start` is that many bytes.
            unsafe { start.write_bytes(0, len) };
            Some(Bytes::Locked { start, len, context: Arc::clone(context) })
        };
        if len == 0 {
            return Self(Bytes::Pageable(Vec::new()));
        }
        Self(locked().unwrap_or_else(|| {
            tracing::debug!(len, "memory cannot be page-locked");
            Bytes::Pageable(vec![0; len])
        }))
    }
}

impl AsRef<[u8]> for CudaHostBytes {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            // SAFETY: `new` has initialised so many bytes, and all copies to them are waited for.
            Bytes::Locked { start, len, .. } => unsafe { std::slice::from_raw_parts(start.as_ptr(), *len) },
            Bytes::Pageable(bytes) => bytes,
        }
    }
}

impl AsMut<[u8]> for CudaHostBytes {
    fn as_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            // SAFETY: as above.
            Bytes::Locked { start, len, .. } => unsafe {
                std::slice::from_raw_parts_mut(start.as_ptr(), *len)
            },
            Bytes::Pageable(bytes) => bytes,
        }
    }
}

impl Drop for CudaHostBytes {
    fn drop(&mut self) {
        if let Bytes::Locked { start, context, .. } = &self.0
            && context.bind_to_thread().is_ok()
        {
            // An error means that the context is lost, and the memory with it.
            // SAFETY: the memory came from the driver and is used for the last time.
            let _ = unsafe { result::free_host(start.as_ptr().cast::<c_void>()) };
        }
    }
}
