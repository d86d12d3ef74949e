//! A module of the driver, compiled from PTX without the lock that other work waits for.
//!
//! It is a library of the driver before it is a module: `cuModuleLoadData` compiles PTX under a lock that every other load, every allocation
//! and every copy waits for, `cuLibraryLoadData` does without. With nothing in the driver's cache, on an H200's machine, one kernel of
//! `cuda-gemv-sm90` takes 0.3 s, and its five 1.3 s by the former, on however many threads. (The driver's linker has no such lock either,
//! but compiles for separate compilation: without `setmaxnreg`, so that the kernels for many rows lose a fifth of their speed.)
//! A kernel from the cache takes 2 ms.

use std::{ptr::null_mut, sync::Arc};

use cudarc::driver::{CudaContext, DriverError, sys};

use super::failure::gpu_error;
use crate::{KernelError, Unsupported};

/// A loaded module.
pub(super) struct Module {
    pub(super) context: Arc<CudaContext>,
    pub(super) handle: sys::CUmodule,
    library: Library,
}

// SAFETY: a module handle may be used from any thread that has bound its context, which every use here does.
unsafe impl Send for Module {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Module {}

impl Module {
    /// Compiles PTX, which ends with a NUL, in a context that this thread has bound.
    pub(super) fn new(
        context: &Arc<CudaContext>,
        name: &'static str,
        ptx: &[u8],
    ) -> Result<Self, KernelError> {
        debug_assert!(ptx.ends_with(&[0]));
        let failed = |error: DriverError| match error.0 {
            sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
                KernelError::Unsupported { kernel: name, reason: Unsupported::PtxTooNew { image: name } }
            }
            _ => gpu_error(name, error),
        };
        let _relaxed = Relaxed::new().map_err(failed)?;
        let library = Library::new(ptx).map_err(failed)?;
        let mut handle = null_mut();
        // SAFETY: the library is alive, and so is the place for the result.
        unsafe { sys::cuLibraryGetModule(&mut handle, library.0) }.result().map_err(failed)?;
        Ok(Self { context: Arc::clone(context), handle, library })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // Functions of the module hold an `Arc` of this value. What fails here cannot be acted upon: the context is going
        // away, and the image with it.
        if self.context.bind_to_thread().is_err() {
            self.library.0 = null_mut();
        }
    }
}

/// Compiled code that no context has yet.
struct Library(sys::CUlibrary);

impl Library {
    /// `ptx` ends with a NUL.
    fn new(ptx: &[u8]) -> Result<Self, DriverError> {
        let (code, mut library) = (ptx.as_ptr().cast(), null_mut());
        // SAFETY: the text ends with a NUL, as the driver wants it to, and lives through the call; there are no options.
        unsafe {
            sys::cuLibraryLoadData(&mut library, code, null_mut(), null_mut(), 0, null_mut(), null_mut(), 0)
        }
        .result()?;
        Ok(Self(library))
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: the handle came from `cuLibraryLoadData` and is used no more.
            let _ = unsafe { sys::cuLibraryUnload(self.0) };
        }
    }
}

/// Loading a module is forbidden to a thread that records a graph, and to all threads while any of them does in the global
/// mode; but not to one that has said that it does not mind, which this one has for as long as the value lives.
struct Relaxed(sys::CUstreamCaptureMode);

impl Relaxed {
    fn new() -> Result<Self, DriverError> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a live place for the mode, which gets the one before.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
        Ok(Self(mode))
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}
