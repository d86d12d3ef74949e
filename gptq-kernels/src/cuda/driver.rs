//! What the driver API needs around it: functions, launches, and memory of a prepared layer.

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, ValidAsZeroBits, sys};

use super::{
    failure::{gpu_error, launching},
    module::Module,
};
use crate::KernelError;

/// Memory of `len` zeros; the driver allocates no empty memory, so that there is always one element.
pub(super) fn zeros<E: DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    len: usize,
) -> Result<CudaSlice<E>, KernelError> {
    let out_of_memory = |bytes| {
        let (free, total) = stream.context().mem_get_info().unwrap_or_default();
        KernelError::OutOfGpuMemory { bytes, free, total }
    };
    // cudarc multiplies without a check.
    let bytes = len.checked_mul(size_of::<E>()).ok_or_else(|| out_of_memory(usize::MAX))?;
    stream.alloc_zeros(len.max(1)).map_err(|error| match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => out_of_memory(bytes),
        _ => gpu_error("allocating a buffer", error),
    })
}

/// A kernel of a loaded image.
pub(super) struct Function {
    pub(super) handle: sys::CUfunction,
    pub(super) module: Arc<Module>,
}

// SAFETY: as for `Module`, which it keeps alive.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Extent of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub(super) grid: (u32, u32),
    pub(super) threads: u32,
    /// Dynamic shared memory in bytes.
    pub(super) shared: usize,
    /// Blocks in a cluster along x; 1 for none.
    pub(super) cluster: u32,
    /// Whether the kernel waits for the one before it by itself and may start before that has finished.
    pub(super) programmatic: bool,
}

impl Launch {
    fn set_cluster(&self, attribute: &mut sys::CUlaunchAttribute) {
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim =
            sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: self.cluster, y: 1, z: 1 };
    }

    /// What the driver takes; it points to `attributes`.
    fn config(
        &self,
        stream: sys::CUstream,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.grid.0,
            gridDimY: self.grid.1,
            gridDimZ: 1,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared as u32,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }
}

impl Function {
    /// Blocks of that shape that a multiprocessor can have at once; 0 if it has not room for one.
    pub(super) fn resident_blocks(&self, threads: u32, shared: usize) -> Result<usize, KernelError> {
        self.module.context.bind_to_thread().map_err(|error| gpu_error("cuCtxSetCurrent", error))?;
        let mut blocks = 0;
        // SAFETY: the function is alive and `blocks` outlives the call.
        unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, self.handle, threads as i32, shared)
        }
        .result()
        .map_err(|error| gpu_error("cuOccupancyMaxActiveBlocksPerMultiprocessor", error))?;
        Ok(blocks.unsigned_abs() as usize)
    }

    /// Clusters of such a launch that the GPU can run at once.
    pub(super) fn resident_clusters(&self, launch: Launch) -> Result<usize, KernelError> {
        let failed = |error| gpu_error("asking for the clusters that fit", error);
        self.module.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the attribute is plain data for which all zeros are valid.
        let mut attributes: [sys::CUlaunchAttribute; 1] = unsafe { std::mem::zeroed() };
        launch.set_cluster(&mut attributes[0]);
        let config = launch.config(std::ptr::null_mut(), &mut attributes);
        let mut clusters = 0;
        // SAFETY: the function is alive, and the pointers are to live values of this frame.
        unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, self.handle, &config) }
            .result()
            .map_err(failed)?;
        Ok(usize::try_from(clusters).unwrap_or(0))
    }

    /// Queues the kernel, whose only parameter is `args`.
    ///
    /// # Safety
    ///
    /// `A` must be the kernel's parameter, field by field; its pointers must be to device memory of this context with as
    /// many elements as the kernel's source says, valid until the stream has run it; `stream` must be of this context.
    pub(super) unsafe fn launch<A>(
        &self,
        name: &'static str,
        launch: Launch,
        stream: sys::CUstream,
        args: &mut A,
    ) -> Result<(), KernelError> {
        // SAFETY: as for the caller.
        unsafe { self.launch_with(name, launch, stream, &mut [std::ptr::from_mut(args).cast()]) }
    }

    /// Queues the kernel, whose parameters are what `parameters` point to.
    ///
    /// # Safety
    ///
    /// As for [`launch`](Self::launch), for every parameter.
    pub(super) unsafe fn launch_with(
        &self,
        name: &'static str,
        launch: Launch,
        stream: sys::CUstream,
        parameters: &mut [*mut c_void],
    ) -> Result<(), KernelError> {
        self.module.context.bind_to_thread().map_err(|error| gpu_error(name, error))?;
        launching(name);
        // SAFETY: the attribute is plain data for which all zeros are valid.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if launch.cluster > 1 {
            launch.set_cluster(&mut attributes[count]);
            count += 1;
        }
        if launch.programmatic {
            attributes[count].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        let config = launch.config(stream, &mut attributes[..count]);
        // SAFETY: the function is alive, `config` and `parameters` live through the call, which copies them, and the
        // caller vouches for what they point to and for `stream`.
        unsafe { sys::cuLaunchKernelEx(&config, self.handle, parameters.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|error| gpu_error(name, error))
    }
}

/// Memory of a prepared layer: written once, read by its kernel.
///
/// It is freed in the order of the stream that it was made on. Waiting for the whole context instead would be an error
/// whenever any stream of it, another thread's too, is being recorded, and would break that recording.
pub(super) struct Resident {
    address: u64,
    bytes: usize,
    _slice: Option<Box<dyn std::any::Any + Send + Sync>>,
}

impl Resident {
    /// Copies `data` to the device and waits for it.
    pub(super) fn new<E: DeviceRepr + Copy + Send + Sync + 'static>(
        stream: &Arc<CudaStream>,
        data: &[E],
    ) -> Result<Self, KernelError> {
        let bytes = size_of_val(data);
        if data.is_empty() {
            return Ok(Self { address: 0, bytes, _slice: None });
        }
        let failed = |error: DriverError| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = stream.context().mem_get_info().unwrap_or_default();
                KernelError::OutOfGpuMemory { bytes, free, total }
            }
            _ => gpu_error("copying a layer to the GPU", error),
        };
        let slice: CudaSlice<E> = stream.clone_htod(data).map_err(failed)?;
        stream.synchronize().map_err(failed)?;
        let address = slice.device_ptr(stream).0;
        Ok(Self { address, bytes, _slice: Some(Box::new(slice)) })
    }

    /// Memory of zeros, and its address, for work on `stream` to fill.
    pub(super) fn zeros<E: DeviceRepr + ValidAsZeroBits + Send + Sync + 'static>(
        stream: &Arc<CudaStream>,
        len: usize,
    ) -> Result<Self, KernelError> {
        let slice = zeros::<E>(stream, len)?;
        let (address, bytes) = (slice.device_ptr(stream).0, len * size_of::<E>());
        Ok(Self { address, bytes, _slice: Some(Box::new(slice)) })
    }

    /// Address on the device; 0 if there are no elements.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Size.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use cudarc::driver::result;
    use half::f16;

    use super::*;
    use crate::{Device, Unsupported, cuda::CudaDevice};

    const TRAP: &str =
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry fails() { trap; ret; }\n\0";
    /// Set in the process that a failing kernel makes useless.
    const CHILD: &str = "GPTQ_TEST_A_KERNEL_FAILS";

    /// The first GPU, or `None` with a printed reason.
    #[allow(clippy::print_stdout)]
    fn gpu() -> Option<CudaDevice<f16>> {
        CudaDevice::new(0).map_err(|reason| println!("skipped: {reason}")).ok()
    }

    #[test]
    fn ptx_from_the_future_is_refused() {
        let Some(device) = gpu() else { return };
        let context = device.stream().context();
        context.bind_to_thread().unwrap();
        let future = TRAP.replace("8.0", "99.0");
        assert!(matches!(
            Module::new(context, "future", future.as_bytes()),
            Err(KernelError::Unsupported { reason: Unsupported::PtxTooNew { image: "future" }, .. })
        ));
        let broken = TRAP.replace("trap", "tarp");
        assert!(matches!(Module::new(context, "broken", broken.as_bytes()), Err(KernelError::Gpu { .. })));
        // Nothing of it lasts.
        assert!(Module::new(context, "fine", TRAP.as_bytes()).is_ok());
        device.synchronize().unwrap();
    }

    #[test]
    fn a_kernel_that_fails_is_named() {
        if std::env::var_os(CHILD).is_some() {
            return fail();
        }
        if gpu().is_none() {
            return;
        }
        let this = std::env::current_exe().unwrap();
        let child = std::process::Command::new(this)
            .args(["--exact", "cuda::driver::tests::a_kernel_that_fails_is_named"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    }

    fn fail() {
        let device = gpu().unwrap();
        let context = device.stream().context();
        context.bind_to_thread().unwrap();
        let module = Arc::new(Module::new(context, "trap", TRAP.as_bytes()).unwrap());
        let entry = CString::new("fails").unwrap();
        // SAFETY: the module is loaded and its context bound.
        let handle = unsafe { result::module::get_function(module.handle, entry) }.unwrap();
        let function = Function { handle, module };
        let launch = Launch { grid: (1, 1), threads: 32, shared: 0, cluster: 1, programmatic: false };
        // SAFETY: the kernel has no parameter; one that it does not have is not read.
        unsafe { function.launch("fails", launch, device.stream().cu_stream(), &mut 0u64) }.unwrap();
        for _ in 0..2 {
            match device.synchronize() {
                Err(KernelError::Gpu { during: "waiting for the GPU", message }) => {
                    assert!(message.ends_with("; the last kernel launched is fails"), "{message}");
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(device.alloc(1000).is_err());
    }
}
