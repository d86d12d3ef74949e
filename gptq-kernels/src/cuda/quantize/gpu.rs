//! What all phases share: the device, the kernels of `cuda/quantize.cu`, and cuBLAS with row-major matrices.

use std::{collections::HashMap, ffi::c_int, ffi::c_void, sync::Arc};

use cudarc::{
    cublas::sys::{
        self, cublasComputeType_t, cublasFillMode_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType,
    },
    driver::CudaStream,
};

use super::{columns, memory::Memory};
use crate::{
    DenseType, KernelError, Unsupported,
    cuda::{
        Activation, CudaDevice,
        blas::{self, Blas, Scratch},
        driver::{Function, Launch},
        single,
    },
};

/// Name of the image, and of all this in errors.
pub(super) const NAME: &str = "quantize";

/// The kernel that splits float32 into halves.
pub(super) const SPLIT: &str = "split_f32";

/// Bytes of scratch for cuBLAS: what NVIDIA recommends for Hopper.
const SCRATCH: usize = 32 << 20;

/// Rows of blocks of a launch; kernels loop over the rest.
pub(super) const MOST_BLOCKS: usize = 65535;

pub(super) struct Gpu<T: Activation> {
    pub(super) device: CudaDevice<T>,
    blas: Arc<Blas>,
    scratch: Memory<u8>,
    functions: HashMap<&'static str, Function>,
}

/// A row-major matrix in an operation: address, distance of rows in elements, and whether its transpose is meant.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) address: u64,
    pub(super) stride: usize,
    pub(super) transposed: bool,
}

impl Operand {
    pub(super) fn new(address: u64, stride: usize) -> Self {
        Self { address, stride, transposed: false }
    }

    pub(super) fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn operation(self) -> cublasOperation_t {
        if self.transposed { cublasOperation_t::CUBLAS_OP_T } else { cublasOperation_t::CUBLAS_OP_N }
    }
}

/// Rows, columns and length of the sums of a product.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

fn int(value: usize) -> Result<c_int, KernelError> {
    c_int::try_from(value).map_err(|_| KernelError::Argument {
        what: "extent of a matrix",
        got: value,
        limit: c_int::MAX as usize,
    })
}

impl<T: Activation> Gpu<T> {
    pub(super) fn new(device: &CudaDevice<T>) -> Result<Self, KernelError> {
        let unsupported = |reason| KernelError::Unsupported { kernel: NAME, reason };
        device.needs((8, 0)).map_err(unsupported)?;
        blas::probe().map_err(unsupported)?;
        let stream = device.stream();
        let mut functions = HashMap::new();
        for (entry, shared) in [
            ("add_span", 0),
            ("finish_sum", 0),
            ("add_squares", 0),
            ("set_diagonal", 0),
            (Self::typed("difference_f16", "difference_bf16", "difference_f32"), 0),
            ("gather_matrix", 0),
            ("factor_leaf", 0),
            ("reverse_matrix", 0),
            ("scale_triangle", 0),
            ("fit_grid", 0),
            ("search_grid", 0),
            ("gather_weight_f32", 0),
            ("gather_weight_f16", 0),
            ("gather_weight_bf16", 0),
            ("zero_columns", 0),
            ("columns_gptq", columns::shared(columns::MOST_WIDTH, false).min(device.shared_memory())),
            ("columns_gptaq", columns::shared(columns::MOST_WIDTH, true).min(device.shared_memory())),
            ("update_gptq", 0),
            ("update_gptaq", 0),
            (Self::typed("dequantize_f16", "dequantize_bf16", "dequantize_f32"), 0),
            ("pack_codes", 0),
            ("pack_grids", 0),
        ] {
            functions.insert(entry, device.images().function(NAME, entry, shared)?);
        }
        if T::TYPE == DenseType::F32 {
            functions.insert(SPLIT, device.images().function(single::IMAGE, SPLIT, 0)?);
        }
        Ok(Self {
            device: device.clone(),
            blas: Blas::of(stream.context())?,
            scratch: Memory::zeros(stream, SCRATCH)?,
            functions,
        })
    }

    /// One of these names, by the type of activations.
    pub(super) fn typed(
        for_f16: &'static str,
        for_bf16: &'static str,
        for_f32: &'static str,
    ) -> &'static str {
        match T::TYPE {
            DenseType::F16 => for_f16,
            DenseType::Bf16 => for_bf16,
            DenseType::F32 => for_f32,
        }
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        self.device.stream()
    }

    /// Queues a kernel.
    ///
    /// # Safety
    ///
    /// As [`Function::launch`], for the kernel of that name.
    pub(super) unsafe fn launch<A>(
        &self,
        entry: &'static str,
        grid: (usize, usize),
        (threads, shared): (u32, usize),
        mut args: A,
    ) -> Result<(), KernelError> {
        let function = self.functions.get(entry).ok_or(KernelError::Gpu {
            during: entry,
            message: "not loaded for this type of activations".into(),
        })?;
        let extent = |blocks: usize, limit: usize| match u32::try_from(blocks) {
            Ok(count) if blocks <= limit => Ok(count),
            _ => Err(KernelError::Argument { what: "blocks of a launch", got: blocks, limit: limit + 1 }),
        };
        let launch = Launch {
            grid: (extent(grid.0, i32::MAX as usize)?, extent(grid.1, MOST_BLOCKS)?),
            threads,
            shared,
            cluster: 1,
            programmatic: false,
        };
        // SAFETY: the caller's.
        unsafe { function.launch(entry, launch, self.stream().cu_stream(), &mut args) }
    }

    fn scratch(&self) -> Scratch {
        Scratch { address: self.scratch.address(), bytes: SCRATCH }
    }

    /// `c (m, n) = alpha a (m, k) b (k, n) + beta c` of activations, summed in float32. To cuBLAS, which counts columns first, the
    /// matrices are their transposes, and `c^T = b^T a^T`.
    ///
    /// # Safety
    ///
    /// The matrices must be device memory of these sizes, valid until the stream has run the product.
    pub(super) unsafe fn multiply_activations(
        &self,
        extent: Extent,
        factors: (f32, Operand, Operand),
        sums: (f32, Operand),
    ) -> Result<(), KernelError> {
        let dtype = match T::TYPE {
            DenseType::F16 => cudaDataType::CUDA_R_16F,
            DenseType::Bf16 => cudaDataType::CUDA_R_16BF,
            DenseType::F32 => cudaDataType::CUDA_R_32F,
        };
        // SAFETY: the caller's.
        unsafe { self.multiply_floats(dtype, extent, factors, sums) }
    }

    /// The same of the halves that activations in float32 are split into.
    ///
    /// # Safety
    ///
    /// As [`multiply_activations`](Self::multiply_activations).
    pub(super) unsafe fn multiply_halves(
        &self,
        extent: Extent,
        factors: (f32, Operand, Operand),
        sums: (f32, Operand),
    ) -> Result<(), KernelError> {
        // SAFETY: the caller's.
        unsafe { self.multiply_floats(cudaDataType::CUDA_R_16F, extent, factors, sums) }
    }

    unsafe fn multiply_floats(
        &self,
        dtype: cudaDataType,
        extent: Extent,
        (alpha, a, b): (f32, Operand, Operand),
        (beta, c): (f32, Operand),
    ) -> Result<(), KernelError> {
        let (m, n, k) = (int(extent.m)?, int(extent.n)?, int(extent.k)?);
        let (lda, ldb, ldc) = (int(a.stride)?, int(b.stride)?, int(c.stride)?);
        // SAFETY: alpha and beta are read during the call; the caller vouches for the matrices. All products of this value
        // are queued on one stream, so they use the scratch one after the other.
        unsafe {
            self.blas.call("cublasGemmEx", self.stream().cu_stream(), self.scratch(), |handle| {
                sys::cublasGemmEx(
                    handle,
                    b.operation(),
                    a.operation(),
                    n,
                    m,
                    k,
                    std::ptr::from_ref(&alpha).cast(),
                    b.address as *const c_void,
                    dtype,
                    ldb,
                    a.address as *const c_void,
                    dtype,
                    lda,
                    std::ptr::from_ref(&beta).cast(),
                    c.address as *mut c_void,
                    cudaDataType::CUDA_R_32F,
                    ldc,
                    cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            })
        }
    }

    /// `c (m, n) = alpha a (m, k) b (k, n)` in float64.
    ///
    /// # Safety
    ///
    /// As [`multiply_activations`](Self::multiply_activations).
    pub(super) unsafe fn multiply_double(
        &self,
        extent: Extent,
        (alpha, a, b): (f64, Operand, Operand),
        c: Operand,
    ) -> Result<(), KernelError> {
        let (m, n, k) = (int(extent.m)?, int(extent.n)?, int(extent.k)?);
        let (lda, ldb, ldc) = (int(a.stride)?, int(b.stride)?, int(c.stride)?);
        let beta = 0.0;
        // SAFETY: as in `multiply_activations`.
        unsafe {
            self.blas.call("cublasDgemm", self.stream().cu_stream(), self.scratch(), |handle| {
                sys::cublasDgemm_v2(
                    handle,
                    b.operation(),
                    a.operation(),
                    n,
                    m,
                    k,
                    &alpha,
                    b.address as *const f64,
                    ldb,
                    a.address as *const f64,
                    lda,
                    &beta,
                    c.address as *mut f64,
                    ldc,
                )
            })
        }
    }

    /// `c -= a a^T` on the lower triangle of c (n, n), a (n, k), in float64.
    ///
    /// # Safety
    ///
    /// As [`multiply_activations`](Self::multiply_activations).
    pub(super) unsafe fn subtract_square(
        &self,
        (n, k): (usize, usize),
        a: Operand,
        c: Operand,
    ) -> Result<(), KernelError> {
        let (n, k, lda, ldc) = (int(n)?, int(k)?, int(a.stride)?, int(c.stride)?);
        let (alpha, beta) = (-1.0, 1.0);
        // SAFETY: as in `multiply_activations`. To cuBLAS a is (k, n), c^T -= (a^T)^T a^T, and its lower triangle is an upper one.
        unsafe {
            self.blas.call("cublasDsyrk", self.stream().cu_stream(), self.scratch(), |handle| {
                sys::cublasDsyrk_v2(
                    handle,
                    cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                    cublasOperation_t::CUBLAS_OP_T,
                    n,
                    k,
                    &alpha,
                    a.address as *const f64,
                    lda,
                    &beta,
                    c.address as *mut f64,
                    ldc,
                )
            })
        }
    }
}

/// Features that the kernels' launches and 32-bit indices allow.
pub(super) fn check_features(in_features: usize, out_features: usize) -> Result<(), KernelError> {
    if in_features > MOST_BLOCKS || out_features >= 1 << 24 {
        let reason = Unsupported::Shape { in_features, out_features };
        return Err(KernelError::Unsupported { kernel: NAME, reason });
    }
    Ok(())
}
