//! The CPU as a device, and its kernels.
//!
//! | file | holds |
//! |---|---|
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

#[cfg(feature = "quantize")]
pub use quantize::CpuQuantizer;
#[cfg(all(feature = "quantize", feature = "cuda"))]
pub(crate) use quantize::with_f32;

use std::ops::Range;

use crate::{
    Device, KernelError, LinearKernel, LinearSpec, MatMut, MatRef, Unsupported, reference::ReferenceKernel,
};
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

/// Checks `x` and `y` against the layer: the first thing that `forward` of a CPU kernel does.
///
/// Errors: [`KernelError::Shape`].
pub fn check_operands<D: Device>(
    spec: &LinearSpec,
    x: &MatRef<'_, D>,
    y: &MatMut<'_, D>,
) -> Result<(), KernelError> {
    let shape = |argument, rows, cols, got_rows, got_cols| {
        Err(KernelError::Shape { argument, rows, cols, got_rows, got_cols })
    };
    if x.cols() != spec.in_features {
        return shape("x", x.rows(), spec.in_features, x.rows(), x.cols());
    }
    if y.cols() != spec.y_features() || y.rows() != x.rows() {
        return shape("y", x.rows(), spec.y_features(), y.rows(), y.cols());
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn processor() -> String {
    use std::arch::x86_64::__cpuid;
    // The brand string is three answers of four registers of four bytes.
    const LEAVES: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
    // Newer compilers call it safe.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has this instruction.
    let leaf = |leaf| unsafe { __cpuid(leaf) };
    if leaf(0x8000_0000).eax < LEAVES[2] {
        return "x86-64".to_owned();
    }
    let registers = LEAVES.map(leaf).map(|answer| [answer.eax, answer.ebx, answer.ecx, answer.edx]);
    let bytes: Vec<u8> = registers.iter().flatten().flat_map(|register| register.to_le_bytes()).collect();
    let text = String::from_utf8_lossy(&bytes);
    text.trim_matches('\0').split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> String {
    std::env::consts::ARCH.to_owned()
}

/// The CPU: float32 activations in host memory, work spread over the current rayon thread pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Slice<'a> = &'a [f32];
    type SliceMut<'a> = &'a mut [f32];

    /// The processor's name for itself, and the number of threads.
    fn model(&self) -> String {
        format!("{}, {} threads", processor(), rayon::current_num_threads())
    }

    fn alloc(&self, len: usize) -> Result<Vec<f32>, KernelError> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| KernelError::OutOfMemory { elements: len })?;
        buffer.resize(len, 0.0);
        Ok(buffer)
    }

    fn upload(&self, src: &[f32], dst: &mut [f32]) -> Result<(), KernelError> {
        self.download(src, dst)
    }

    fn download(&self, src: &[f32], dst: &mut [f32]) -> Result<(), KernelError> {
        if src.len() != dst.len() {
            return Err(KernelError::CopyLength { src: src.len(), dst: dst.len() });
        }
        dst.copy_from_slice(src);
        Ok(())
    }

    fn synchronize(&self) -> Result<(), KernelError> {
        Ok(())
    }

    fn slice(buffer: &Vec<f32>, range: Range<usize>) -> &[f32] {
        &buffer[range]
    }

    fn slice_mut(buffer: &mut Vec<f32>, range: Range<usize>) -> &mut [f32] {
        &mut buffer[range]
    }

    fn reborrow<'a>(slice: &'a mut &mut [f32]) -> &'a mut [f32] {
        slice
    }

    fn as_slice<'a>(slice: &'a &mut [f32]) -> &'a [f32] {
        slice
    }

    fn len(slice: &&[f32]) -> usize {
        slice.len()
    }

    fn len_mut(slice: &&mut [f32]) -> usize {
        slice.len()
    }

    fn buffer_len(buffer: &Vec<f32>) -> usize {
        buffer.len()
    }
}
