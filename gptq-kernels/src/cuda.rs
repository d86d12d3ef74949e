//! NVIDIA GPUs as a device, and their kernels.
//!
//! Nothing here needs a CUDA toolkit, at build time or at run time: the driver is loaded when a [`CudaDevice`] is made, and
//! on a machine without one that gives [`Unsupported::NoDriver`].
//!
//! | kernel | compute capability | layers |
//! |---|---|---|
//! | `cuda-wgmma-sm90` | 9.0 exactly | 4-bit, group size at least 32 or one group; any number of rows, up to 8 through the next |
//! | `cuda-gemv-sm90` | 9.0 | the same layers; fastest up to 8 rows |
//! | `cuda-marlin` | 8.0 | up to 8 bits, group size at least 32 or one group; any number of rows, on tensor cores |
//! | `cuda-exllama` | 8.0 | the same layers, without tensor cores; fast up to 4 rows |
//! | `cuda-plain` | 8.0 | every packed layer of 2, 3, 4 or 8 bits |
//! | `cuda-cublas` | 8.0, and the library cuBLAS | float weights of the activations' type |
//! | `cuda-dense` | 8.0 | float weights of every type; fast up to 8 rows of the activations' type |
//!
//! A device with activations in float32, `CudaDevice<f32>`, has one kernel, `cuda-split-f32`, for float weights and for the
//! weights that packed layers stand for. It computes as exactly as the CPU, for quantising and for measurements.
//!
//! # Streams and graphs
//!
//! Work is queued on the stream that the output belongs to; a caller that uses several streams orders them itself. The memory
//! of a layer is freed in the order of the stream that it was prepared on: other streams have to be done with it by then. A
//! forward pass allocates nothing, waits for nothing and changes no state, so it can be recorded in a CUDA graph and run
//! from several threads. cudarc records events on slices once a context has a second stream, which breaks the recording
//! of graphs: [`CudaDevice::new`] switches that off for its context; a caller with a context of its own does so with
//! [`CudaContext::disable_event_tracking`](cudarc::driver::CudaContext::disable_event_tracking).
//!
//! The driver compiles a kernel when the first layer that needs it is prepared, in 0.3 s, or takes it from its cache. What
//! `cuda-wgmma-sm90` needs for more than eight rows is compiled in the background meanwhile: only the first pass with so many rows
//! waits for that, if it has to, and the last clone of a device when it is dropped.
//!
//! ```no_run
//! use gptq_kernels::{Device, cuda};
//! use half::f16;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = cuda::CudaDevice::<f16>::new(0)?;
//! for kernel in cuda::kernels(&device) {
//!     println!("{}", kernel.name());
//! }
//! # Ok(())
//! # }
//! ```

mod blas;
mod copies;
mod dense;
mod device;
mod driver;
mod exllama;
mod failure;
mod gemv;
mod image;
mod images;
mod marlin;
mod marlin_plan;
mod marlin_tiles;
mod module;
mod ops;
mod pinned;
mod plain;
#[cfg(feature = "quantize")]
mod quantize;
mod registers;
mod repack;
mod single;
mod spread;
mod stopwatch;
mod units;
mod wgmma;

pub use device::{Activation, CudaBuffer, CudaDevice, CudaMut, CudaRef, Element};
pub use ops::{CudaEmbedding, CudaKvStore, CudaOrder, CudaRecordings, CudaRope, CudaStep};
#[cfg(feature = "quantize")]
pub use quantize::{CudaHostBytes, CudaMoments, CudaPrepared, CudaQuantized, CudaQuantizer, CudaSums};
pub use single::{SingleEmbedding, SingleKvStore, SingleOrder, SingleStep};

use crate::{LinearKernel, Unsupported};
use dense::Dense;
use exllama::Exllama;
use gemv::Gemv;
use marlin::Marlin;
use plain::Plain;
use wgmma::Wgmma;

/// The kernels that this GPU can run, fastest first.
///
/// A kernel whose instructions the GPU lacks is not in the list; a `tracing` event of level debug says so, and
/// [`unavailable`] tells why.
pub fn kernels<T: Element>(device: &CudaDevice<T>) -> Vec<Box<dyn LinearKernel<CudaDevice<T>>>> {
    let (kernels, missing) = probe(device);
    for (kernel, reason) in missing {
        tracing::debug!(kernel, %reason, "not available on this GPU");
    }
    kernels
}

/// The kernels that this GPU cannot run, and why.
pub fn unavailable<T: Element>(device: &CudaDevice<T>) -> Vec<(&'static str, Unsupported)> {
    probe(device).1
}

type Kernels<T> = Vec<Box<dyn LinearKernel<CudaDevice<T>>>>;

fn probe<T: Element>(device: &CudaDevice<T>) -> (Kernels<T>, Vec<(&'static str, Unsupported)>) {
    let (mut kernels, mut missing): (Kernels<T>, _) = (Vec::new(), Vec::new());
    // Up to eight rows are the GEMV's either way.
    match Wgmma::new(device) {
        Ok(kernel) => kernels.push(Box::new(kernel)),
        Err(reason) => missing.push((wgmma::NAME, reason)),
    }
    match Gemv::new(device) {
        Ok(kernel) => kernels.push(Box::new(kernel)),
        Err(reason) => missing.push((gemv::NAME, reason)),
    }
    match Marlin::new(device) {
        Ok(kernel) => kernels.push(Box::new(kernel)),
        Err(reason) => missing.push((marlin::NAME, reason)),
    }
    match Exllama::new(device) {
        Ok(kernel) => kernels.push(Box::new(kernel)),
        Err(reason) => missing.push((exllama::NAME, reason)),
    }
    match Plain::new(device) {
        Ok(kernel) => kernels.push(Box::new(kernel)),
        Err(reason) => missing.push((plain::NAME, reason)),
    }
    match Dense::with_cublas(device) {
        Ok(kernel) => kernels.push(Box::new(kernel)),
        Err(reason) => missing.push((dense::CUBLAS_NAME, reason)),
    }
    match Dense::new(device) {
        Ok(kernel) => kernels.push(Box::new(kernel)),
        Err(reason) => missing.push((dense::NAME, reason)),
    }
    (kernels, missing)
}
