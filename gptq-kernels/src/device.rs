use std::{ops::Range, time::Instant};

use crate::KernelError;

/// Where activations live and kernels run.
///
/// The element type of a buffer is the device's own: float32 on the CPU, fp16 or bf16 on a GPU. Lengths and offsets
/// count elements.
pub trait Device: Send + Sync + 'static {
    /// Owned activations.
    type Buffer: Send + Sync;
    /// Borrowed activations, to read.
    type Slice<'a>: Copy + Send + Sync;
    /// Borrowed activations, to write.
    type SliceMut<'a>: Send;

    /// What costs of kernels depend on, and so the machines that a [`CostTable`](crate::CostTable) is good for.
    fn model(&self) -> String {
        "unknown".to_owned()
    }

    /// Bytes of memory that buffers and weights can still have; `None` where the system does not tell, or takes memory of
    /// other programs back first.
    fn free_memory(&self) -> Option<usize> {
        None
    }

    /// A buffer of `len` zeros.
    fn alloc(&self, len: usize) -> Result<Self::Buffer, KernelError>;
    /// Copies `src` to the device, rounding to its element type.
    fn upload(&self, src: &[f32], dst: Self::SliceMut<'_>) -> Result<(), KernelError>;
    /// Copies `src` to the host; returns when it is there.
    fn download(&self, src: Self::Slice<'_>, dst: &mut [f32]) -> Result<(), KernelError>;
    /// Waits for all work queued so far.
    fn synchronize(&self) -> Result<(), KernelError>;

    /// Seconds that `work`, some operations, takes each of `count` times. It is done at least twice more: what is loaded
    /// late is no part of the times.
    fn seconds(
        &self,
        work: &mut dyn FnMut() -> Result<(), KernelError>,
        count: usize,
    ) -> Result<Vec<f64>, KernelError> {
        work()?;
        work()?;
        self.synchronize()?;
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            work()?;
            self.synchronize()?;
            times.push(start.elapsed().as_secs_f64());
        }
        Ok(times)
    }

    /// A part of a buffer. Panics if `range` is out of bounds, like slice indexing.
    fn slice(buffer: &Self::Buffer, range: Range<usize>) -> Self::Slice<'_>;
    /// A part of a buffer, to write. Panics if `range` is out of bounds, like slice indexing.
    fn slice_mut(buffer: &mut Self::Buffer, range: Range<usize>) -> Self::SliceMut<'_>;
    /// A shorter-lived loan of `slice`.
    fn reborrow<'a>(slice: &'a mut Self::SliceMut<'_>) -> Self::SliceMut<'a>;
    /// The same memory, to read.
    fn as_slice<'a>(slice: &'a Self::SliceMut<'_>) -> Self::Slice<'a>;
    /// Number of elements.
    fn len(slice: &Self::Slice<'_>) -> usize;
    /// Number of elements.
    fn len_mut(slice: &Self::SliceMut<'_>) -> usize;
    /// Number of elements.
    fn buffer_len(buffer: &Self::Buffer) -> usize;
}

/// Scratch memory that a caller lends to kernels, so that `forward` allocates nothing and may run on several threads
/// or streams at once, each with its own workspace.
pub struct Workspace<D: Device> {
    buffer: D::Buffer,
}

impl<D: Device> Workspace<D> {
    /// Scratch of `len` elements: the largest [`Linear::workspace_len`](crate::Linear::workspace_len) it has to serve.
    pub fn new(device: &D, len: usize) -> Result<Self, KernelError> {
        Ok(Self { buffer: device.alloc(len)? })
    }

    /// Grows to at least `len` elements; keeps nothing of the old content.
    pub fn reserve(&mut self, device: &D, len: usize) -> Result<(), KernelError> {
        if self.len() < len {
            self.buffer = device.alloc(len)?;
        }
        Ok(())
    }

    /// Size in elements.
    pub fn len(&self) -> usize {
        D::buffer_len(&self.buffer)
    }

    /// Whether there is no scratch at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `len` elements, or [`KernelError::Workspace`] if there are fewer.
    pub fn take(&mut self, len: usize) -> Result<D::SliceMut<'_>, KernelError> {
        let got = self.len();
        if got < len {
            return Err(KernelError::Workspace { needed: len, got });
        }
        Ok(D::slice_mut(&mut self.buffer, 0..len))
    }
}
