//! cuBLAS, for products of many rows.

use std::{
    ffi::{c_int, c_void},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use cudarc::{
    cublas::{
        result::{self, CublasError},
        sys::{self, cublasComputeType_t, cublasGemmAlgo_t, cublasMath_t, cublasOperation_t, cudaDataType},
    },
    driver::{CudaContext, sys::CUstream},
};

use super::failure::gpu_error;
use crate::{KernelError, Unsupported};

/// Whether the library can be loaded. cudarc panics where a library is missing, so nothing else may be called before.
pub(super) fn probe() -> Result<(), Unsupported> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loads the library and closes it again. Its initialisers are those that any program linked to it runs.
    if *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        Ok(())
    } else {
        Err(Unsupported::Library { library: "cublas" })
    }
}

fn blas_error(during: &'static str, error: CublasError) -> KernelError {
    KernelError::Gpu { during, message: format!("{:?}", error.0) }
}

/// The cuBLAS handle of a context. It is set to the caller's stream and the caller's scratch for each product, so that it
/// serves all streams, and products on several streams at once do not share memory.
///
/// It lives as long as the process: cuBLAS waits for the whole device when it destroys a handle, which is an error
/// whenever any stream of the context, another thread's too, is being recorded, and breaks that recording.
pub(super) struct Blas {
    context: Arc<CudaContext>,
    handle: Mutex<Handle>,
}

struct Handle(sys::cublasHandle_t);

// SAFETY: a handle may be used from any thread, one at a time, which the mutex around it sees to.
unsafe impl Send for Handle {}

/// A device address, type and distance of rows in elements.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) address: u64,
    pub(super) dtype: cudaDataType,
    pub(super) stride: usize,
}

/// Scratch of a product.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    pub(super) address: u64,
    pub(super) bytes: usize,
}

impl Blas {
    /// The first call for a context takes 0.3 s and some memory of the device. [`probe`] must have succeeded.
    pub(super) fn of(context: &Arc<CudaContext>) -> Result<Arc<Self>, KernelError> {
        static ALL: Mutex<Vec<Arc<Blas>>> = Mutex::new(Vec::new());
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(blas) = all.iter().find(|blas| blas.context == *context) {
            return Ok(Arc::clone(blas));
        }
        let blas = Arc::new(Self::new(context)?);
        all.push(Arc::clone(&blas));
        Ok(blas)
    }

    fn new(context: &Arc<CudaContext>) -> Result<Self, KernelError> {
        context.bind_to_thread().map_err(|error| gpu_error("cuCtxSetCurrent", error))?;
        let handle = result::create_handle().map_err(|error| blas_error("cublasCreate", error))?;
        let blas = Self { context: Arc::clone(context), handle: Mutex::new(Handle(handle)) };
        // Otherwise partial sums may be rounded to the type of the result.
        let math = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle has just been made.
        unsafe { sys::cublasSetMathMode(handle, math) }
            .result()
            .map_err(|error| blas_error("cublasSetMathMode", error))?;
        Ok(blas)
    }

    /// `y (rows, n) = alpha x (rows, k) w (n, k)^T + beta y`, row-major, summed in float32, queued on `stream`.
    ///
    /// # Safety
    ///
    /// The operands must be memory of this context of those sizes, valid until the stream has run the product, and so must
    /// the scratch, aligned to 256 bytes, which nothing else may use meanwhile; `stream` must be of this context.
    pub(super) unsafe fn multiply(
        &self,
        stream: CUstream,
        scratch: Scratch,
        (rows, n, k): (c_int, c_int, c_int),
        (x, w, y): (Operand, Operand, Operand),
        (alpha, beta): (f32, f32),
    ) -> Result<(), KernelError> {
        let stride = |what, operand: Operand| {
            c_int::try_from(operand.stride).map_err(|_| KernelError::Argument {
                what,
                got: operand.stride,
                limit: c_int::MAX as usize,
            })
        };
        let (ldx, ldw, ldy) =
            (stride("row stride of x", x)?, stride("row stride of w", w)?, stride("row stride of y", y)?);
        // cuBLAS counts columns first: to it the operands are their transposes, and y^T = w x^T.
        // SAFETY: alpha and beta are read during the call; the caller vouches for the rest.
        unsafe {
            self.call("cublasGemmEx", stream, scratch, |handle| {
                sys::cublasGemmEx(
                    handle,
                    cublasOperation_t::CUBLAS_OP_T,
                    cublasOperation_t::CUBLAS_OP_N,
                    n,
                    rows,
                    k,
                    std::ptr::from_ref(&alpha).cast(),
                    w.address as *const c_void,
                    w.dtype,
                    ldw,
                    x.address as *const c_void,
                    x.dtype,
                    ldx,
                    std::ptr::from_ref(&beta).cast(),
                    y.address as *mut c_void,
                    y.dtype,
                    ldy,
                    cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            })
        }
    }

    /// Calls a function of the library with the handle set to `stream` and `scratch`.
    ///
    /// # Safety
    ///
    /// `call` must be sound with a live handle of this context; its operands must stay valid until the stream has run it,
    /// and so must the scratch, aligned to 256 bytes, which nothing else may use meanwhile; `stream` must be of this
    /// context.
    pub(super) unsafe fn call(
        &self,
        during: &'static str,
        stream: CUstream,
        scratch: Scratch,
        call: impl FnOnce(sys::cublasHandle_t) -> sys::cublasStatus_t,
    ) -> Result<(), KernelError> {
        self.context.bind_to_thread().map_err(|error| gpu_error("cuCtxSetCurrent", error))?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handle is alive and this thread alone has it. Setting the stream first is what cuBLAS asks for: it
        // resets the workspace.
        unsafe {
            result::set_stream(handle.0, stream.cast())
                .map_err(|error| blas_error("cublasSetStream", error))?;
            sys::cublasSetWorkspace_v2(handle.0, scratch.address as *mut c_void, scratch.bytes)
                .result()
                .map_err(|error| blas_error("cublasSetWorkspace", error))?;
        }
        call(handle.0).result().map_err(|error| blas_error(during, error))
    }
}
