//! Second moments of activations that are on the device already.

use gptq_core::GptqError;
use ndarray::ArrayView2;

use super::{
    gpu::{Extent, Gpu, Operand},
    halves::{CHUNK, Halves, MOST_SINGLE, Slab},
    memory::Memory,
};
use crate::{
    DenseType, KernelError, MatRef,
    cuda::{
        Activation, CudaDevice,
        copies::{Pitched, copy_rows},
    },
    quantize::QuantizeError,
};

/// Products that are summed in float32.
const SPAN: usize = 8;

/// Rows of the Hessian that one product computes, as far as the diagonal.
const SLAB: usize = 2048;

/// Side of the tiles of `add_span` and `finish_sum`.
const TILE: usize = 32;

/// Sums of `x x^T`, and of `(x~ - x) x^T` for GPTAQ.
///
/// Products of halves are exact in float32. Tensor cores sum those of 2048 tokens, eight such sums are added in float32, and
/// the result is added in float64. Tokens are cut into these chunks by their number alone: what does not fill one waits
/// for more, so batches do not matter.
///
/// Activations in float32 of up to 2048 features are multiplied as such, without tensor cores; more are split into halves, as `cuda-split-f32` does it: `x = x1 + x2 / 2^11` and
/// `x x^T = x1 x1^T + (x2 x1^T + x1 x2^T) / 2^11`, the first of some hundred tokens at a time. Their diagonal, by which columns are ordered
/// and where all that tensor cores cut off has the same sign, is summed in float64 besides.
pub struct CudaSums<T: Activation> {
    pub(super) in_features: usize,
    /// Distance of rows of what waits, a multiple of 16 bytes.
    stride: usize,
    moment: Moment,
    cross: Option<Cross<T>>,
    pending: Memory<T>,
    pending_rows: usize,
    /// Halves of a chunk of activations in float32.
    halves: Option<Memory<u16>>,
    /// Sums of their squares, (n).
    squares: Option<Memory<f64>>,
    tokens: u64,
}

/// One matrix of sums, (n, n).
struct Moment {
    sum: Memory<f64>,
    part: Memory<f32>,
    /// Chunks in `part`.
    chunks: usize,
    empty: bool,
}

struct Cross<T> {
    moment: Moment,
    /// `x~ - x` of what waits: the sum of two halves, or all of it where activations have float32.
    high: Memory<T>,
    low: Memory<T>,
    /// Halves of the latter, as of the activations.
    halves: Option<Memory<u16>>,
}

/// Second moments on a GPU, (n, n) in float64, rounded to float32 as the references hold them.
pub struct CudaMoments {
    pub(super) matrix: Memory<f64>,
    pub(super) cross: Option<Memory<f64>>,
    pub(super) diagonal: Vec<f64>,
    pub(super) samples: u64,
}

impl CudaMoments {
    /// [`Hessian::output_error`](gptq_core::Hessian::output_error): the product with H here, its scalar product with the
    /// error on the host, in one order.
    pub(super) fn output_error<T: Activation>(
        &self,
        gpu: &Gpu<T>,
        error: ArrayView2<'_, f32>,
    ) -> Result<f64, QuantizeError> {
        let (stream, n) = (gpu.stream(), self.diagonal.len());
        let (rows, found) = error.dim();
        if found != n {
            return Err(GptqError::Features { what: "weight error", expected: n, found }.into());
        }
        let error: Vec<f64> = error.iter().map(|&e| f64::from(e)).collect();
        let uploaded = Memory::copy_of(stream, &error)?;
        let product = Memory::<f64>::zeros(stream, rows * n)?;
        let operand = |memory: &Memory<f64>| Operand::new(memory.address(), n);
        // SAFETY: error and product are (rows, n), H is (n, n); all are freed in the stream's order.
        unsafe {
            let factors = (1.0, operand(&uploaded), operand(&self.matrix));
            gpu.multiply_double(Extent { m: rows, n, k: n }, factors, operand(&product))
        }?;
        let product = product.to_host(stream)?;
        Ok(product.iter().zip(&error).map(|(p, e)| p * e).sum::<f64>() / 2.0)
    }
}

/// `AddSpanArgs`.
#[repr(C)]
struct AddSpanArgs {
    sum: u64,
    part: u64,
    n: u32,
    lower: u32,
    first: u32,
}

/// `FinishArgs`.
#[repr(C)]
struct FinishArgs {
    sum: u64,
    diagonal: u64,
    non_finite: u64,
    scale: f64,
    n: u32,
    lower: u32,
}

/// `DifferenceArgs`.
#[repr(C)]
struct DifferenceArgs {
    x: u64,
    reference: u64,
    high: u64,
    low: u64,
    x_stride: u64,
    reference_stride: u64,
    stride: u64,
    rows: u32,
    n: u32,
}

/// `SquaresArgs`.
#[repr(C)]
struct SquaresArgs {
    x: u64,
    sums: u64,
    stride: u64,
    rows: u32,
    n: u32,
}

/// `DiagonalArgs`.
#[repr(C)]
struct DiagonalArgs {
    sum: u64,
    diagonal: u64,
    n: u32,
}

/// `DifferenceF32Args`.
#[repr(C)]
struct DifferenceF32Args {
    x: u64,
    reference: u64,
    out: u64,
    x_stride: u64,
    reference_stride: u64,
    stride: u64,
    rows: u32,
    n: u32,
}

impl Moment {
    fn new<T: Activation>(gpu: &Gpu<T>, n: usize) -> Result<Self, KernelError> {
        Ok(Self {
            sum: Memory::zeros(gpu.stream(), n * n)?,
            part: Memory::zeros(gpu.stream(), n * n)?,
            chunks: 0,
            empty: true,
        })
    }

    /// Adds the float32 sums to the float64 ones.
    fn flush<T: Activation>(&mut self, gpu: &Gpu<T>, n: usize, lower: bool) -> Result<(), KernelError> {
        if self.chunks == 0 {
            return Ok(());
        }
        let tiles = n.div_ceil(TILE);
        let args = AddSpanArgs {
            sum: self.sum.address(),
            part: self.part.address(),
            n: n as u32,
            lower: lower.into(),
            first: self.empty.into(),
        };
        // SAFETY: `AddSpanArgs` of the source; both matrices are (n, n) and freed in the stream's order.
        unsafe { gpu.launch("add_span", (tiles, tiles), (256, 0), args) }?;
        (self.chunks, self.empty) = (0, false);
        Ok(())
    }

    /// Scales and rounds the sums, the diagonal being `exact` if that is known; the diagonal.
    fn finish<T: Activation>(
        mut self,
        gpu: &Gpu<T>,
        (n, scale, lower): (usize, f64, bool),
        exact: Option<&Memory<f64>>,
    ) -> Result<(Memory<f64>, Vec<f64>), QuantizeError> {
        self.flush(gpu, n, lower)?;
        if let Some(exact) = exact {
            let args = DiagonalArgs { sum: self.sum.address(), diagonal: exact.address(), n: n as u32 };
            // SAFETY: `DiagonalArgs` of the source; the sum is (n, n), the diagonal (n).
            unsafe { gpu.launch("set_diagonal", (n.div_ceil(256), 1), (256, 0), args) }?;
        }
        let stream = gpu.stream();
        let diagonal = Memory::<f64>::zeros(stream, n)?;
        let non_finite = Memory::copy_of(stream, &[u64::MAX])?;
        let args = FinishArgs {
            sum: self.sum.address(),
            diagonal: diagonal.address(),
            non_finite: non_finite.address(),
            scale,
            n: n as u32,
            lower: lower.into(),
        };
        let tiles = n.div_ceil(TILE);
        // SAFETY: `FinishArgs` of the source; the sum is (n, n), the diagonal (n), the index one element, all freed in the
        // stream's order.
        unsafe { gpu.launch("finish_sum", (tiles, tiles), (256, 0), args) }?;
        if let Some(&index) = non_finite.to_host(stream)?.first()
            && index != u64::MAX
        {
            let (row, column) = (index as usize / n, index as usize % n);
            return Err(GptqError::NonFiniteHessian { row, column, value: f64::NAN }.into());
        }
        let diagonal = diagonal.to_host(stream)?;
        Ok((self.sum, diagonal))
    }
}

impl<T: Activation> CudaSums<T> {
    pub(super) fn new(gpu: &Gpu<T>, in_features: usize, with_reference: bool) -> Result<Self, KernelError> {
        let stream = gpu.stream();
        let stride = in_features.next_multiple_of(8);
        let pending = || Memory::zeros(stream, CHUNK * stride);
        let single = T::TYPE == DenseType::F32;
        let halves = || match single && in_features > MOST_SINGLE {
            true => Memory::zeros(stream, Halves::len(stride)).map(Some),
            false => Ok(None),
        };
        let cross = if with_reference {
            let low = if single { Memory::zeros(stream, 0) } else { pending() };
            let moment = Moment::new(gpu, in_features)?;
            Some(Cross { moment, high: pending()?, low: low?, halves: halves()? })
        } else {
            None
        };
        Ok(Self {
            in_features,
            stride,
            moment: Moment::new(gpu, in_features)?,
            cross,
            pending: pending()?,
            pending_rows: 0,
            halves: halves()?,
            squares: if single { Some(Memory::zeros(stream, in_features)?) } else { None },
            tokens: 0,
        })
    }

    /// The number of tokens so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    pub(super) fn add(
        &mut self,
        gpu: &Gpu<T>,
        inputs: MatRef<'_, CudaDevice<T>>,
        reference: Option<MatRef<'_, CudaDevice<T>>>,
    ) -> Result<(), QuantizeError> {
        let features = |what, matrix: &MatRef<'_, CudaDevice<T>>| {
            let (expected, found) = (self.in_features, matrix.cols());
            if found == expected { Ok(()) } else { Err(GptqError::Features { what, expected, found }) }
        };
        features("inputs", &inputs)?;
        match (&self.cross, &reference) {
            (Some(_), Some(reference)) => features("reference inputs", reference)?,
            (None, None) => {}
            (Some(_), None) => return Err(GptqError::MissingReference.into()),
            (None, Some(_)) => return Err(GptqError::UnexpectedReference.into()),
        }
        if let Some(found) = reference.map(|reference| reference.rows())
            && found != inputs.rows()
        {
            return Err(GptqError::ReferenceTokens { expected: inputs.rows(), found }.into());
        }
        let mut row = 0;
        while row < inputs.rows() {
            let at = |matrix: &MatRef<'_, CudaDevice<T>>| {
                matrix.data().address() + (row * matrix.row_stride() * size_of::<T>()) as u64
            };
            let address = at(&inputs);
            // Straight from where they are, if they fill a chunk and tensor cores can read them there.
            let aligned = address.is_multiple_of(16) && inputs.row_stride().is_multiple_of(8);
            if self.pending_rows == 0 && inputs.rows() - row >= CHUNK && aligned && self.cross.is_none() {
                self.multiply(gpu, Operand::new(address, inputs.row_stride()), CHUNK)?;
                row += CHUNK;
                continue;
            }
            let count = (CHUNK - self.pending_rows).min(inputs.rows() - row);
            let offset = (self.pending_rows * self.stride * size_of::<T>()) as u64;
            let element = size_of::<T>();
            let from = Pitched { address, pitch: inputs.row_stride() * element };
            let to = Pitched { address: self.pending.address() + offset, pitch: self.stride * element };
            // SAFETY: the caller's matrix holds `count` rows from `row` on, and `pending` CHUNK rows in all.
            unsafe { copy_rows(gpu.stream(), from, to, self.in_features * element, count) }?;
            if let (Some(cross), Some(reference)) = (&self.cross, &reference) {
                self.difference(gpu, cross, (address, &inputs), (at(reference), reference), count)?;
            }
            self.pending_rows += count;
            row += count;
            if self.pending_rows == CHUNK {
                self.multiply_pending(gpu)?;
            }
        }
        self.tokens += inputs.rows() as u64;
        Ok(())
    }

    /// Adds `reference - x` of `count` rows to what waits.
    fn difference(
        &self,
        gpu: &Gpu<T>,
        cross: &Cross<T>,
        (x, inputs): (u64, &MatRef<'_, CudaDevice<T>>),
        (reference, references): (u64, &MatRef<'_, CudaDevice<T>>),
        count: usize,
    ) -> Result<(), KernelError> {
        let offset = (self.pending_rows * self.stride * size_of::<T>()) as u64;
        let (x_stride, reference_stride) = (inputs.row_stride() as u64, references.row_stride() as u64);
        let (stride, rows, n) = (self.stride as u64, count as u32, self.in_features as u32);
        let (grid, high) = ((self.in_features.div_ceil(256), count), cross.high.address() + offset);
        if T::TYPE == DenseType::F32 {
            let args =
                DifferenceF32Args { x, reference, out: high, x_stride, reference_stride, stride, rows, n };
            // SAFETY: `DifferenceF32Args` of the source; the callers' matrices hold `count` rows, and what waits CHUNK rows in
            // all.
            return unsafe { gpu.launch("difference_f32", grid, (256, 0), args) };
        }
        let low = cross.low.address() + offset;
        let args = DifferenceArgs { x, reference, high, low, x_stride, reference_stride, stride, rows, n };
        let entry = Gpu::<T>::typed("difference_f16", "difference_bf16", "difference_f32");
        // SAFETY: `DifferenceArgs` of the source; sizes as above.
        unsafe { gpu.launch(entry, grid, (256, 0), args) }
    }

    /// Products that are summed in float32: small ones of float32 are added in float64 at once.
    fn most_chunks(&self) -> usize {
        if self.squares.is_some() && self.halves.is_none() { 1 } else { SPAN }
    }

    fn multiply_pending(&mut self, gpu: &Gpu<T>) -> Result<(), KernelError> {
        let (tokens, n, most) = (self.pending_rows, self.in_features, self.most_chunks());
        let x = Operand::new(self.pending.address(), self.stride);
        self.multiply(gpu, x, tokens)?;
        if let Some(cross) = &mut self.cross {
            let moment = &mut cross.moment;
            let beta = if moment.chunks == 0 { 0.0 } else { 1.0 };
            if let (Some(inputs), Some(halves)) = (&self.halves, &cross.halves) {
                // `multiply` has split the inputs.
                let (inputs, halves, stride) = (Halves(inputs), Halves(halves), self.stride);
                halves.fill(gpu, Operand::new(cross.high.address(), stride), (tokens, n, stride))?;
                let whole = Slab { first: 0, rows: n, columns: n };
                halves.multiply(gpu, &inputs, (n, stride), whole, (beta, &moment.part))?;
            }
            let products = match (&cross.halves, T::TYPE) {
                (Some(_), _) => &[][..],
                (None, DenseType::F32) => &[&cross.high][..],
                (None, _) => &[&cross.high, &cross.low][..],
            };
            for (half, memory) in products.iter().enumerate() {
                let beta = if moment.chunks == 0 && half == 0 { 0.0 } else { 1.0 };
                let difference = Operand::new(memory.address(), self.stride).transposed();
                let sums = Operand::new(moment.part.address(), n);
                // SAFETY: `tokens` rows of `stride` elements twice, and (n, n) sums.
                unsafe {
                    gpu.multiply_activations(
                        Extent { m: n, n, k: tokens },
                        (1.0, difference, x),
                        (beta, sums),
                    )
                }?;
            }
            moment.chunks += 1;
            if moment.chunks == most {
                moment.flush(gpu, n, false)?;
            }
        }
        self.pending_rows = 0;
        Ok(())
    }

    /// Adds `x^T x` of up to CHUNK tokens, on the lower triangle.
    fn multiply(&mut self, gpu: &Gpu<T>, x: Operand, tokens: usize) -> Result<(), KernelError> {
        let n = self.in_features;
        let beta = if self.moment.chunks == 0 { 0.0 } else { 1.0 };
        let halves = self.halves.as_ref().map(Halves);
        if let Some(halves) = &halves {
            halves.fill(gpu, x, (tokens, n, self.stride))?;
        }
        if let Some(squares) = &self.squares {
            let args = SquaresArgs {
                x: x.address,
                sums: squares.address(),
                stride: x.stride as u64,
                rows: tokens as u32,
                n: n as u32,
            };
            // SAFETY: `SquaresArgs` of the source; x has `tokens` rows of n float32, there are n sums.
            unsafe { gpu.launch("add_squares", (n.div_ceil(32), 1), (256, 0), args) }?;
        }
        for first in (0..n).step_by(SLAB) {
            let rows = SLAB.min(n - first);
            if let Some(halves) = &halves {
                let slab = Slab { first, rows, columns: first + rows };
                halves.multiply(gpu, halves, (n, self.stride), slab, (beta, &self.moment.part))?;
                continue;
            }
            let slab = Operand { address: x.address + (first * size_of::<T>()) as u64, ..x };
            let sums = Operand::new(self.moment.part.address() + (first * n * size_of::<f32>()) as u64, n);
            let extent = Extent { m: rows, n: first + rows, k: tokens };
            // SAFETY: `tokens` rows of n elements; rows `first..first + rows` of the sums, as far as their diagonal.
            unsafe { gpu.multiply_activations(extent, (1.0, slab.transposed(), x), (beta, sums)) }?;
        }
        self.moment.chunks += 1;
        if self.moment.chunks == self.most_chunks() {
            self.moment.flush(gpu, n, true)?;
        }
        Ok(())
    }

    pub(super) fn finish(mut self, gpu: &Gpu<T>) -> Result<CudaMoments, QuantizeError> {
        if self.tokens == 0 || self.in_features == 0 {
            return Err(GptqError::NoSamples.into());
        }
        if self.pending_rows > 0 {
            self.multiply_pending(gpu)?;
        }
        let (n, scale) = (self.in_features, 2.0 / self.tokens as f64);
        drop((self.pending, self.halves));
        let (matrix, diagonal) = self.moment.finish(gpu, (n, scale, true), self.squares.as_ref())?;
        let cross = match self.cross {
            Some(cross) => Some(cross.moment.finish(gpu, (n, scale, false), None)?.0),
            None => None,
        };
        Ok(CudaMoments { matrix, cross, diagonal, samples: self.tokens })
    }
}
