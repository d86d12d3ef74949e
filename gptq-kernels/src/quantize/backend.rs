use gptq_core::GptqConfig;

use super::{QuantizeError, Quantizer};
use crate::{Backend, DenseType, KernelError};

/// A device that can quantise a whole model: run its decoder, take second moments of what passes through it, and solve.
pub trait QuantizeBackend: Backend {
    /// Its quantiser.
    type Quantizer: Quantizer<Self>;

    /// Bytes in the host's memory.
    type HostBytes: AsRef<[u8]> + AsMut<[u8]> + Send;

    /// Type of the device's activations.
    const ELEMENT: DenseType;

    /// Quantisers with these settings, in their order. They share what is costly to make.
    ///
    /// # Errors
    /// What the device cannot do.
    fn quantizers(&self, configs: &[GptqConfig]) -> Result<Vec<Self::Quantizer>, QuantizeError>;

    /// What decides about the bits of results besides the kernels: results of devices of which this is different differ.
    fn arithmetic(&self) -> String;

    /// The memory of a device that has its own; `None` where activations are in the host's memory.
    ///
    /// # Errors
    /// What the device says.
    fn memory(&self) -> Result<Option<DeviceMemory>, KernelError>;

    /// Bytes in the host's memory from and to which the device copies fastest.
    fn host_bytes(&self, len: usize) -> Self::HostBytes;

    /// Copies activations to the host, bit by bit; returns when they are there.
    ///
    /// # Errors
    /// [`KernelError::CopyLength`] unless `dst` has as many bytes; what the device says.
    fn save(&self, src: Self::Slice<'_>, dst: &mut [u8]) -> Result<(), KernelError>;

    /// Copies back what [`save`](Self::save) has copied.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    fn restore(&self, src: &[u8], dst: Self::SliceMut<'_>) -> Result<(), KernelError>;
}

/// Memory of a device, in bytes, of all that runs on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What is left.
    pub free: u64,
    /// What there is.
    pub total: u64,
}
