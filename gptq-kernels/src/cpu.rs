//! The CPU as a device, and its kernels.
//!
//! | file | holds |
//! |---|---|
//! | `device` | host memory as the memory of a device |
//! | `layout` | the packed layout that all kernels read |
//! | `format` | what a word of each width means |
//! | `simd` | sixteen lanes: the trait that `avx512`, `avx2`, `neon` and `portable` implement |
//! | `direct` | few rows: decode in registers, multiply at once |
//! | `panel` | many rows: decode a segment, multiply it with all of them |
//! | `float` | the float32 kernels made of these, with their arithmetic and its error |
//! | `amx` | the tile kernel, with its arithmetic and its error |
//! | `quantize` | gptq-core as this device's quantiser |
//! | `columns` | output columns as something that threads may share out |

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod columns;
pub(crate) mod device;
mod direct;
mod float;
mod format;
mod layout;
#[cfg(target_arch = "aarch64")]
mod neon;
mod panel;
mod portable;
#[cfg(feature = "quantize")]
mod quantize;
mod simd;

pub mod ops;

pub use device::Cpu;
#[cfg(feature = "quantize")]
pub use quantize::CpuQuantizer;
#[cfg(all(feature = "quantize", feature = "cuda"))]
pub(crate) use quantize::with_f32;

use crate::{LinearKernel, Unsupported, reference::ReferenceKernel};
#[cfg(target_arch = "x86_64")]
use amx::AmxKernel;
#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use float::FloatKernel;
#[cfg(target_arch = "aarch64")]
use neon::Neon;
use portable::Portable;
use simd::Simd;

/// The kernels that this machine can run, fastest first at one row, as decoding has it, and last the float64 reference.
///
/// One kernel has to serve all numbers of rows, since results must not depend on them. `cpu-avx512-f32` is in front
/// because it reads weights fastest; `cpu-amx-bf16x3` is 3 to 4 times as fast from 16 rows on and a tenth to a quarter slower
/// at one, so ask for it by name where long prompts, batches or perplexities matter more.
///
/// A kernel whose instructions the CPU lacks is not in the list; a `tracing` event of level debug says so, and
/// [`unavailable`] tells why.
pub fn kernels() -> Vec<Box<dyn LinearKernel<Cpu>>> {
    let (kernels, missing) = probe();
    for (kernel, reason) in missing {
        tracing::debug!(kernel, %reason, "not available on this machine");
    }
    kernels
}

/// The kernels of this architecture that this machine cannot run, and why.
pub fn unavailable() -> Vec<(&'static str, Unsupported)> {
    probe().1
}

type Kernels = Vec<Box<dyn LinearKernel<Cpu>>>;

fn probe() -> (Kernels, Vec<(&'static str, Unsupported)>) {
    let mut kernels: Kernels = Vec::new();
    let mut missing = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        add(Avx512::new(), &mut kernels, &mut missing);
        match AmxKernel::new() {
            Ok(kernel) => kernels.push(Box::new(kernel)),
            Err(reason) => missing.push((AmxKernel::NAME, reason)),
        }
        add(Avx2::new(), &mut kernels, &mut missing);
    }
    #[cfg(target_arch = "aarch64")]
    add(Neon::new(), &mut kernels, &mut missing);
    add(Ok(Portable), &mut kernels, &mut missing);
    kernels.push(Box::new(ReferenceKernel));
    (kernels, missing)
}

fn add<S: Simd>(
    probed: Result<S, Unsupported>,
    kernels: &mut Kernels,
    missing: &mut Vec<(&'static str, Unsupported)>,
) {
    match probed {
        Ok(s) => kernels.push(Box::new(FloatKernel(s))),
        Err(reason) => missing.push((S::NAME, reason)),
    }
}
