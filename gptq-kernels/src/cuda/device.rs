use std::{marker::PhantomData, ops::Range, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
    DriverError, ValidAsZeroBits, result, sys,
};
use half::{bf16, f16};

use super::{
    driver::zeros,
    failure::{gpu_error, message},
    images::Images,
    ops::Operations,
    single,
};
use crate::{DenseType, Device, KernelError, Unsupported};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// The type of activations: [`struct@f16`], [`bf16`] or `f32`.
///
/// Half precision is what the kernels for inference take ([`Element`]). With `f32` a device computes as exactly as the CPU:
/// for quantising, and for measuring what quantising has done.
pub trait Activation:
    DeviceRepr + ValidAsZeroBits + Copy + Send + Sync + Unpin + sealed::Sealed + 'static
{
    /// The name that kernels are called by.
    #[doc(hidden)]
    const NAME: &'static str;
    /// The same, of a weight.
    #[doc(hidden)]
    const TYPE: DenseType;
    /// Unit roundoff.
    #[doc(hidden)]
    const UNIT: f64;
    /// Half the distance of the smallest subnormal numbers.
    #[doc(hidden)]
    const SUBNORMAL: f64;
    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;
    /// Exact.
    fn to_f32(self) -> f32;
}

/// Activations in half precision: [`struct@f16`] or [`bf16`].
pub trait Element: Activation {}

impl Element for f16 {}
impl Element for bf16 {}

impl Activation for f32 {
    const NAME: &'static str = "f32";
    const TYPE: DenseType = DenseType::F32;
    const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
    const SUBNORMAL: f64 = f32::MIN_POSITIVE as f64;
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Activation for f16 {
    const NAME: &'static str = "f16";
    const TYPE: DenseType = DenseType::F16;
    const UNIT: f64 = 1.0 / 2048.0;
    const SUBNORMAL: f64 = 1.0 / (1u64 << 25) as f64;
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Activation for bf16 {
    const NAME: &'static str = "bf16";
    const TYPE: DenseType = DenseType::Bf16;
    const UNIT: f64 = 1.0 / 256.0;
    const SUBNORMAL: f64 = f32::MIN_POSITIVE as f64;
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// A GPU with a stream, for activations of type `T`. Clones share the loaded kernels.
#[derive(Clone)]
pub struct CudaDevice<T: Activation> {
    stream: Arc<CudaStream>,
    images: Arc<Images>,
    operations: Arc<Operations>,
    single: Arc<single::Operations>,
    capability: (u32, u32),
    multiprocessors: u32,
    shared_memory: usize,
    element: PhantomData<T>,
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> Unsupported {
    move |error| Unsupported::Driver { call, message: message(error) }
}

impl<T: Activation> CudaDevice<T> {
    /// Device `ordinal` with a stream of its own.
    ///
    /// Errors: [`Unsupported::NoDriver`], [`Unsupported::NoDevice`], [`Unsupported::Driver`].
    pub fn new(ordinal: usize) -> Result<Self, Unsupported> {
        // SAFETY: looks for a library and closes it again; libcuda has no initialisers that matter.
        if !unsafe { sys::is_culib_present() } {
            return Err(Unsupported::NoDriver);
        }
        result::init().map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => Unsupported::NoDevice { ordinal, devices: 0 },
            _ => failed("cuInit")(error),
        })?;
        let devices = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
        let devices = usize::try_from(devices).unwrap_or(0);
        if ordinal >= devices {
            return Err(Unsupported::NoDevice { ordinal, devices });
        }
        let context = CudaContext::new(ordinal).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: slices of this device are used on the stream they belong to; callers with more streams order them
        // themselves, as the module's documentation says.
        unsafe { context.disable_event_tracking() };
        Self::on(context.new_stream().map_err(failed("cuStreamCreate"))?)
    }

    /// The device that the caller's stream is of.
    ///
    /// Errors: [`Unsupported::Driver`].
    pub fn on(stream: Arc<CudaStream>) -> Result<Self, Unsupported> {
        let context = Arc::clone(stream.context());
        let attribute = |attribute| {
            context
                .attribute(attribute)
                .map(|value| value.unsigned_abs())
                .map_err(failed("cuDeviceGetAttribute"))
        };
        use sys::CUdevice_attribute as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Self {
            images: Arc::new(Images::new(context)),
            operations: Arc::default(),
            single: Arc::default(),
            stream,
            capability,
            multiprocessors,
            shared_memory: shared as usize,
            element: PhantomData,
        })
    }

    /// The same device, with another stream of its context.
    ///
    /// Panics if `stream` is of another context.
    pub fn with_stream(&self, stream: Arc<CudaStream>) -> Self {
        assert!(stream.context() == self.stream.context(), "a stream of another context");
        Self { stream, ..self.clone() }
    }

    /// The same device, as if its compute capability were no more than `capability`: kernels that need more are not there,
    /// and others run the images that older GPUs get. For tests on a GPU that is newer than what has to be tested.
    #[must_use]
    pub fn limited_to(&self, capability: (u32, u32)) -> Self {
        // Its operations are other images.
        Self { capability: self.capability.min(capability), operations: Arc::default(), ..self.clone() }
    }

    /// The stream that [`alloc`](Device::alloc), [`upload`](Device::upload), [`download`](Device::download) and
    /// [`synchronize`](Device::synchronize) use, and with it the kernels that write to buffers of this device.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Major and minor compute capability.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.capability
    }

    pub(super) fn needs(&self, needed: (u32, u32)) -> Result<(), Unsupported> {
        if self.capability < needed {
            return Err(Unsupported::ComputeCapability { needed, got: self.capability });
        }
        Ok(())
    }

    pub(super) fn images(&self) -> &Arc<Images> {
        &self.images
    }

    pub(super) fn operations(&self) -> &Operations {
        &self.operations
    }

    /// Those of float32.
    pub(super) fn single(&self) -> &single::Operations {
        &self.single
    }

    pub(super) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Shared memory that a block can have, in bytes.
    pub(super) fn shared_memory(&self) -> usize {
        self.shared_memory
    }
}

/// Activations on a GPU.
pub struct CudaBuffer<T> {
    // The driver allocates no empty memory, so that there is always one element.
    slice: CudaSlice<T>,
    len: usize,
}

/// Activations to read; made of a slice of cudarc's by `from`.
///
/// Where cudarc tracks events, making one waits for writes on other streams and records a read, as any use in cudarc does.
#[derive(Clone, Copy, Debug)]
pub struct CudaRef<'a, T> {
    address: u64,
    len: usize,
    stream: sys::CUstream,
    life: PhantomData<&'a [T]>,
}

/// Activations to write; made of a slice of cudarc's by `from`. Kernels run on the stream that the slice belongs to.
#[derive(Debug)]
pub struct CudaMut<'a, T> {
    address: u64,
    len: usize,
    stream: sys::CUstream,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: an address, a length and a stream handle are valid on every thread; nothing is dereferenced on the host.
unsafe impl<T: Sync> Send for CudaRef<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for CudaRef<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for CudaMut<'_, T> {}

impl<'a, T> CudaRef<'a, T> {
    fn of<S: DevicePtr<T>>(slice: &S) -> Self {
        let stream = slice.stream();
        let (address, _record) = slice.device_ptr(stream);
        Self { address, len: slice.len(), stream: stream.cu_stream(), life: PhantomData }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// The stream that the memory belongs to.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }
}

impl<'a, T> CudaMut<'a, T> {
    fn of<S: DevicePtrMut<T>>(slice: &mut S) -> Self {
        let stream = Arc::clone(slice.stream());
        let len = slice.len();
        let (address, _record) = slice.device_ptr_mut(&stream);
        Self { address, len, stream: stream.cu_stream(), life: PhantomData }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// The same memory, for kernels on another stream.
    pub(super) fn on(self, stream: sys::CUstream) -> Self {
        Self { stream, ..self }
    }

    /// The stream that the memory belongs to.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }
}

impl<'a, T> From<&'a CudaSlice<T>> for CudaRef<'a, T> {
    fn from(slice: &'a CudaSlice<T>) -> Self {
        Self::of(slice)
    }
}

impl<'a, T> From<CudaView<'a, T>> for CudaRef<'a, T> {
    fn from(view: CudaView<'a, T>) -> Self {
        Self::of(&view)
    }
}

impl<'a, T> From<&'a mut CudaSlice<T>> for CudaMut<'a, T> {
    fn from(slice: &'a mut CudaSlice<T>) -> Self {
        Self::of(slice)
    }
}

impl<'a, T> From<CudaViewMut<'a, T>> for CudaMut<'a, T> {
    fn from(mut view: CudaViewMut<'a, T>) -> Self {
        Self::of(&mut view)
    }
}

impl<T: Activation> Device for CudaDevice<T> {
    type Buffer = CudaBuffer<T>;
    type Slice<'a> = CudaRef<'a, T>;
    type SliceMut<'a> = CudaMut<'a, T>;

    /// The GPU's name and its number of multiprocessors.
    fn model(&self) -> String {
        let name = self.stream.context().name().unwrap_or_else(|_| "an NVIDIA GPU".to_owned());
        format!("{name}, {} multiprocessors", self.multiprocessors)
    }

    fn free_memory(&self) -> Option<usize> {
        // What has been freed on a stream is free when the stream has come to it.
        self.stream.synchronize().ok()?;
        self.stream.context().mem_get_info().ok().map(|(free, _)| free)
    }

    fn alloc(&self, len: usize) -> Result<CudaBuffer<T>, KernelError> {
        let slice = zeros(&self.stream, len)?;
        Ok(CudaBuffer { slice, len })
    }

    fn upload(&self, src: &[f32], dst: CudaMut<'_, T>) -> Result<(), KernelError> {
        if src.len() != dst.len {
            return Err(KernelError::CopyLength { src: src.len(), dst: dst.len });
        }
        if src.is_empty() {
            return Ok(());
        }
        let elements: Vec<T> = src.iter().map(|&value| T::from_f32(value)).collect();
        let failed = |error| gpu_error("copying to the GPU", error);
        self.stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: `dst` has as many elements as `elements`, and the wait keeps both alive until the copy has ended.
        unsafe { result::memcpy_htod_async(dst.address, &elements, self.stream.cu_stream()) }
            .map_err(failed)?;
        self.stream.synchronize().map_err(failed)
    }

    fn download(&self, src: CudaRef<'_, T>, dst: &mut [f32]) -> Result<(), KernelError> {
        if src.len != dst.len() {
            return Err(KernelError::CopyLength { src: src.len, dst: dst.len() });
        }
        if dst.is_empty() {
            return Ok(());
        }
        let mut elements = vec![T::from_f32(0.0); dst.len()];
        let failed = |error| gpu_error("copying from the GPU", error);
        self.stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: as in `upload`.
        unsafe { result::memcpy_dtoh_async(&mut elements, src.address, self.stream.cu_stream()) }
            .map_err(failed)?;
        self.stream.synchronize().map_err(failed)?;
        for (dst, element) in dst.iter_mut().zip(elements) {
            *dst = element.to_f32();
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<(), KernelError> {
        self.stream.synchronize().map_err(|error| gpu_error("waiting for the GPU", error))
    }

    /// `work` is recorded as a CUDA graph, and its replays are timed.
    fn seconds(
        &self,
        work: &mut dyn FnMut() -> Result<(), KernelError>,
        count: usize,
    ) -> Result<Vec<f64>, KernelError> {
        super::stopwatch::seconds(&self.stream, work, count)
    }

    fn slice(buffer: &CudaBuffer<T>, range: Range<usize>) -> CudaRef<'_, T> {
        assert!(range.end <= buffer.len, "{range:?} of {} elements", buffer.len);
        buffer.slice.slice(range).into()
    }

    fn slice_mut(buffer: &mut CudaBuffer<T>, range: Range<usize>) -> CudaMut<'_, T> {
        assert!(range.end <= buffer.len, "{range:?} of {} elements", buffer.len);
        buffer.slice.slice_mut(range).into()
    }

    fn reborrow<'a>(slice: &'a mut CudaMut<'_, T>) -> CudaMut<'a, T> {
        CudaMut { life: PhantomData, ..*slice }
    }

    fn as_slice<'a>(slice: &'a CudaMut<'_, T>) -> CudaRef<'a, T> {
        CudaRef { address: slice.address, len: slice.len, stream: slice.stream, life: PhantomData }
    }

    fn len(slice: &CudaRef<'_, T>) -> usize {
        slice.len
    }

    fn len_mut(slice: &CudaMut<'_, T>) -> usize {
        slice.len
    }

    fn buffer_len(buffer: &CudaBuffer<T>) -> usize {
        buffer.len
    }
}
