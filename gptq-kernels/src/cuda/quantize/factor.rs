//! From H to U with `H^-1 = U^T U`, in float64.
//!
//! As in gptq-core, H is taken in reversed order, where `H = L L^T` gives `U = J L^-1 J`. L and its inverse come together:
//! with H in four blocks, `L21 = H21 L11^-T`, `L22` is that of `H22 - L21 L21^T`, and the block of the inverse below the
//! diagonal is `-L22^-1 L21 L11^-1`. So everything but the leaves of this recursion is matrix products, of which half of n
//! rows carry most operations: `7/6 n^3` in all, where `2/3 n^3` would do if triangles were used as such.
//!
//! Multiplying by the inverse of a diagonal block, instead of solving with it, costs accuracy in proportion to the block's
//! condition. That is far from mattering in float64 for a factor that is rounded to float32; but how much damping the
//! most singular of matrices need may differ from gptq-core's answer.

use gptq_core::{DampReport, DampingFailure, GptqConfig, NotPositiveDefinite, factorize_damped};

use super::{
    gpu::{Extent, Gpu, Operand},
    memory::Memory,
};
use crate::{
    KernelError,
    cuda::{
        Activation,
        copies::{Pitched, copy_rows},
    },
};

/// Side of a block that one thread block factorises; as in `quantize_factor.cuh`.
const LEAF: usize = 64;

/// `GatherArgs`.
#[repr(C)]
struct GatherArgs {
    source: u64,
    diagonal: u64,
    order: u64,
    out: u64,
    n: u32,
    reversed: u32,
    lower: u32,
}

/// `LeafArgs`.
#[repr(C)]
struct LeafArgs {
    a: u64,
    status: u64,
    stride: u64,
    n: u32,
    first: u32,
}

/// `ReverseArgs`.
#[repr(C)]
struct ReverseArgs {
    a: u64,
    single: u64,
    full: u64,
    n: u32,
}

/// `TriangleArgs`.
#[repr(C)]
struct TriangleArgs {
    a: u64,
    single: u64,
    alpha: f64,
    n: u32,
}

/// U, and P if GPTAQ has one, both (n, n) in float32.
pub(super) struct Factor {
    pub(super) upper: Memory<f32>,
    pub(super) correction: Option<Memory<f32>>,
}

/// A matrix in the order of quantisation, waiting for its damping.
pub(super) struct Matrix<'a> {
    /// (n, n), original order.
    pub(super) hessian: &'a Memory<f64>,
    /// (n, n), if GPTAQ wants it.
    pub(super) cross: Option<&'a Memory<f64>>,
    /// (n)
    pub(super) order: &'a Memory<u32>,
    /// On the host, dead columns set to 1.
    pub(super) diagonal: &'a [f64],
}

impl Matrix<'_> {
    /// Factorises with as much damping as it takes.
    pub(super) fn factorize<T: Activation>(
        &self,
        gpu: &Gpu<T>,
        config: &GptqConfig,
    ) -> Result<Result<(Factor, DampReport), DampingFailure>, KernelError> {
        let (stream, n) = (gpu.stream(), self.diagonal.len());
        let damped = Memory::<f64>::zeros(stream, n * n)?;
        let half = half(n);
        let scratch = Memory::<f64>::zeros(stream, half * (n - half))?;
        let outcome = factorize_damped(config, self.diagonal, |diagonal| -> Result<_, KernelError> {
            let diagonal = Memory::copy_of(stream, diagonal)?;
            self.gather(gpu, self.hessian, Some(&diagonal), (true, true), &damped)?;
            let status = Memory::copy_of(stream, &[u64::MAX; 2])?;
            let recursion =
                Recursion { gpu, stride: n, scratch: scratch.address(), status: status.address() };
            recursion.invert_factor(damped.address(), n, 0)?;
            Ok(match status.to_host(stream)?[..] {
                [u64::MAX, _] => Ok(()),
                [index, pivot] => {
                    Err(NotPositiveDefinite { index: n - 1 - index as usize, pivot: f64::from_bits(pivot) })
                }
                _ => Ok(()),
            })
        })?;
        let ((), report) = match outcome {
            Ok(success) => success,
            Err(failure) => return Ok(Err(failure)),
        };
        drop(scratch);
        let upper = Memory::<f32>::zeros(stream, n * n)?;
        let cross = self.cross.zip(config.gptaq());
        let full = match cross {
            Some(_) => Some(Memory::<f64>::zeros(stream, n * n)?),
            None => None,
        };
        let args = ReverseArgs {
            a: damped.address(),
            single: upper.address(),
            full: full.as_ref().map_or(0, Memory::address),
            n: n as u32,
        };
        // SAFETY: `ReverseArgs` of the source; all matrices are (n, n).
        unsafe { gpu.launch("reverse_matrix", (n.div_ceil(256), n), (256, 0), args) }?;
        let correction = match (cross, full) {
            (Some((cross, alpha)), Some(full)) => {
                Some(self.correction(gpu, cross, f64::from(alpha), &full, &damped)?)
            }
            _ => None,
        };
        Ok(Ok((Factor { upper, correction }, report)))
    }

    fn gather<T: Activation>(
        &self,
        gpu: &Gpu<T>,
        source: &Memory<f64>,
        diagonal: Option<&Memory<f64>>,
        (reversed, lower): (bool, bool),
        out: &Memory<f64>,
    ) -> Result<(), KernelError> {
        let n = self.diagonal.len();
        let args = GatherArgs {
            source: source.address(),
            diagonal: diagonal.map_or(0, Memory::address),
            order: self.order.address(),
            out: out.address(),
            n: n as u32,
            reversed: reversed.into(),
            lower: lower.into(),
        };
        // SAFETY: `GatherArgs` of the source; both matrices are (n, n), the others (n), the order a permutation.
        unsafe { gpu.launch("gather_matrix", (n.div_ceil(256), n), (256, 0), args) }
    }

    /// GPTAQ's `P = alpha * triu(D U^T, 1) * U`; `spare` is (n, n) and overwritten.
    fn correction<T: Activation>(
        &self,
        gpu: &Gpu<T>,
        cross: &Memory<f64>,
        alpha: f64,
        upper: &Memory<f64>,
        spare: &Memory<f64>,
    ) -> Result<Memory<f32>, KernelError> {
        let (stream, n) = (gpu.stream(), self.diagonal.len());
        let product = Memory::<f64>::zeros(stream, n * n)?;
        let single = Memory::<f32>::zeros(stream, n * n)?;
        let extent = Extent { m: n, n, k: n };
        let operand = |memory: &Memory<f64>| Operand::new(memory.address(), n);
        let triangle =
            |a: &Memory<f64>, single: u64| TriangleArgs { a: a.address(), single, alpha, n: n as u32 };
        let grid = (n.div_ceil(256), n);
        self.gather(gpu, cross, None, (false, false), spare)?;
        // SAFETY: all matrices are (n, n); `TriangleArgs` of the source.
        unsafe {
            let factors = (1.0, operand(spare), operand(upper).transposed());
            gpu.multiply_double(extent, factors, operand(&product))?;
            gpu.launch("scale_triangle", grid, (256, 0), triangle(&product, 0))?;
            gpu.multiply_double(extent, (1.0, operand(&product), operand(upper)), operand(spare))?;
            gpu.launch("scale_triangle", grid, (256, 0), triangle(spare, single.address()))?;
        }
        Ok(single)
    }
}

/// How many of n rows the first block has: a multiple of the leaf's side, about half.
fn half(n: usize) -> usize {
    if n <= LEAF { n } else { (n / 2).next_multiple_of(LEAF) }
}

struct Recursion<'a, T: Activation> {
    gpu: &'a Gpu<T>,
    stride: usize,
    scratch: u64,
    status: u64,
}

impl<T: Activation> Recursion<'_, T> {
    /// Replaces the lower triangle of `A = L L^T`, n rows from index `first` on, by that of `L^-1`.
    fn invert_factor(&self, a: u64, n: usize, first: usize) -> Result<(), KernelError> {
        let Self { gpu, stride, scratch, status } = *self;
        if n <= LEAF {
            let args = LeafArgs { a, status, stride: stride as u64, n: n as u32, first: first as u32 };
            // SAFETY: `LeafArgs` of the source; the block lies in the matrix, the status has two elements.
            return unsafe { gpu.launch("factor_leaf", (1, 1), (256, 0), args) };
        }
        let k = half(n);
        let m = n - k;
        let element = size_of::<f64>();
        let below = a + (k * stride * element) as u64;
        let last = below + (k * element) as u64;
        let [a11, a21, a22] = [a, below, last].map(|address| Operand::new(address, stride));
        let spare = Operand::new(scratch, k);
        self.invert_factor(a, k, first)?;
        // SAFETY: the blocks lie in the matrix and do not overlap; the scratch has room for those of the first level, and
        // thus of all.
        unsafe {
            gpu.multiply_double(Extent { m, n: k, k }, (1.0, a21, a11.transposed()), spare)?;
            gpu.subtract_square((m, k), spare, a22)?;
            let from = Pitched { address: scratch, pitch: k * element };
            let to = Pitched { address: below, pitch: stride * element };
            copy_rows(gpu.stream(), from, to, k * element, m)?;
        }
        self.invert_factor(last, m, first + k)?;
        // SAFETY: as above.
        unsafe {
            gpu.multiply_double(Extent { m, n: k, k: m }, (1.0, a22, a21), spare)?;
            gpu.multiply_double(Extent { m, n: k, k }, (-1.0, spare, a11), a21)
        }
    }
}
