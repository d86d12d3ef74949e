use cudarc::driver::{CudaContext, result, sys};
use gptq_core::GptqConfig;

use super::{CudaHostBytes, CudaQuantizer};
use crate::{
    DenseType, Device, KernelError,
    cuda::{Activation, CudaDevice, CudaMut, CudaRef, Element, failure::gpu_error},
    quantize::{DeviceMemory, QuantizeBackend, QuantizeError},
};

/// Lets the device's memory pool keep what is freed. Otherwise every wait gives it back to the system, and the next allocation
/// of a gigabyte costs milliseconds again.
fn keep_freed_memory(context: &CudaContext) -> Result<(), KernelError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let failed = |error| gpu_error("setting up the memory pool", error);
    context.bind_to_thread().map_err(failed)?;
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is that of a live context; pool and threshold outlive the calls, and a threshold is 64 bits.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result().map_err(failed)?;
        sys::cuMemPoolSetAttribute(pool, attribute, std::ptr::from_mut(&mut threshold).cast())
            .result()
            .map_err(failed)
    }
}

/// What is the same whatever the type of activations.
macro_rules! operations {
    ($element:ty) => {
        type Quantizer = CudaQuantizer<$element>;
        type HostBytes = CudaHostBytes;

        const ELEMENT: DenseType = <$element as Activation>::TYPE;

        /// From here on the process keeps the device memory that it has had.
        fn quantizers(&self, configs: &[GptqConfig]) -> Result<Vec<CudaQuantizer<$element>>, QuantizeError> {
            keep_freed_memory(self.stream().context())?;
            let Some((first, others)) = configs.split_first() else { return Ok(Vec::new()) };
            let first = CudaQuantizer::new(self, first.clone())?;
            let others: Vec<_> =
                others.iter().map(|config| first.with_config(config.clone())).collect::<Result<_, _>>()?;
            Ok(std::iter::once(first).chain(others).collect())
        }

        fn arithmetic(&self) -> String {
            format!("{} on {}", <$element as Activation>::NAME, self.model())
        }

        fn memory(&self) -> Result<Option<DeviceMemory>, KernelError> {
            let info = self.stream().context().mem_get_info();
            let (free, total) =
                info.map_err(|error| gpu_error("asking for the memory that is left", error))?;
            Ok(Some(DeviceMemory { free: free as u64, total: total as u64 }))
        }

        fn host_bytes(&self, len: usize) -> CudaHostBytes {
            CudaHostBytes::new(self.stream().context(), len)
        }

        fn save(&self, src: CudaRef<'_, $element>, dst: &mut [u8]) -> Result<(), KernelError> {
            check_bytes::<$element>(Self::len(&src), dst.len())?;
            let failed = |error| gpu_error("copying from the GPU", error);
            self.stream().context().bind_to_thread().map_err(failed)?;
            if dst.is_empty() {
                return Ok(());
            }
            // SAFETY: `src` has as many bytes as `dst`, and the wait keeps both alive until the copy has ended.
            unsafe { result::memcpy_dtoh_async(dst, src.address(), self.stream().cu_stream()) }
                .map_err(failed)?;
            self.synchronize()
        }

        fn restore(&self, src: &[u8], dst: CudaMut<'_, $element>) -> Result<(), KernelError> {
            check_bytes::<$element>(Self::len_mut(&dst), src.len())?;
            let failed = |error| gpu_error("copying to the GPU", error);
            self.stream().context().bind_to_thread().map_err(failed)?;
            if src.is_empty() {
                return Ok(());
            }
            // SAFETY: as in `save`.
            unsafe { result::memcpy_htod_async(dst.address(), src, self.stream().cu_stream()) }
                .map_err(failed)?;
            self.synchronize()
        }
    };
}

impl<T: Element> QuantizeBackend for CudaDevice<T> {
    operations!(T);
}

impl QuantizeBackend for CudaDevice<f32> {
    operations!(f32);
}

/// Fails unless so many elements have so many bytes.
fn check_bytes<T>(elements: usize, bytes: usize) -> Result<(), KernelError> {
    let needed = elements * size_of::<T>();
    if needed == bytes { Ok(()) } else { Err(KernelError::CopyLength { src: needed, dst: bytes }) }
}
