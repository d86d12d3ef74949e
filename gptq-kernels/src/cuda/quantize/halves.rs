//! Activations in float32 as halves that tensor cores multiply; as in `cuda-split-f32`.

use super::{
    gpu::{Extent, Gpu, Operand, SPLIT},
    memory::Memory,
};
use crate::{
    KernelError,
    cuda::{
        Activation,
        single::linear::{LOW, SCALE, SplitArgs, span},
    },
};

/// Tokens of one product.
pub(super) const CHUNK: usize = 2048;

/// Features up to which activations in float32 are multiplied as they are: what halves would gain is little, and Hessians of
/// small models are then as exact as the CPU's.
pub(super) const MOST_SINGLE: usize = 2048;

/// Columns `first..first + rows` of one factor, and so many of the other.
#[derive(Clone, Copy)]
pub(super) struct Slab {
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// A chunk of tokens in halves, CHUNK rows each: high parts, low parts, and high parts again.
pub(super) struct Halves<'a>(pub(super) &'a Memory<u16>);

impl Halves<'_> {
    /// Elements for rows of `stride`.
    pub(super) const fn len(stride: usize) -> usize {
        3 * CHUNK * stride
    }

    fn part(&self, index: usize, stride: usize) -> u64 {
        self.0.address() + (index * CHUNK * stride * size_of::<u16>()) as u64
    }

    /// Splits `tokens` rows of n float32, the rows behind them being zeros.
    pub(super) fn fill<T: Activation>(
        &self,
        gpu: &Gpu<T>,
        x: Operand,
        (tokens, n, stride): (usize, usize, usize),
    ) -> Result<(), KernelError> {
        let args = SplitArgs {
            from: x.address,
            high: self.part(0, stride),
            low: self.part(1, stride),
            again: self.part(2, stride),
            from_stride: x.stride as u64,
            stride: stride as u64,
            scale: SCALE,
            rows: tokens as u32,
            cols: n as u32,
            height: CHUNK as u32,
            width: stride as u32,
        };
        // SAFETY: `SplitArgs` of the source; x has `tokens` rows of n elements, the halves three parts of CHUNK rows of
        // `stride`.
        unsafe { gpu.launch(SPLIT, args.grid(), (256, 0), args) }
    }

    /// `sums[first.., ..columns] = beta sums + a^T b` for columns `first..first + rows` of a, which is this, both with rows of
    /// `stride` halves; the sums are (n, n).
    pub(super) fn multiply<T: Activation>(
        &self,
        gpu: &Gpu<T>,
        b: &Self,
        (n, stride): (usize, usize),
        slab: Slab,
        (beta, sums): (f32, &Memory<f32>),
    ) -> Result<(), KernelError> {
        let Slab { first, rows, columns } = slab;
        let sums = Operand::new(sums.address() + (first * n * size_of::<f32>()) as u64, n);
        let row = stride * size_of::<u16>();
        let left =
            |address: u64| Operand::new(address + (first * size_of::<u16>()) as u64, stride).transposed();
        let scale = 1.0 / (SCALE * SCALE);
        let extent = |k| Extent { m: rows, n: columns, k };
        // SAFETY: rows `first..first + rows` of the sums are (rows, columns) or more; parts have CHUNK rows of `stride` halves
        // and lie one behind the other.
        unsafe {
            let (low, high) = (left(self.part(1, stride)), Operand::new(b.part(0, stride), stride));
            gpu.multiply_halves(extent(2 * CHUNK), (scale / LOW, low, high), (beta, sums))?;
            let span = span(n);
            for token in (0..CHUNK).step_by(span) {
                let at = |half: u64| half + (token * row) as u64;
                let factors =
                    (scale, left(at(self.part(0, stride))), Operand::new(at(b.part(0, stride)), stride));
                gpu.multiply_halves(extent(span), factors, (1.0, sums))?;
            }
        }
        Ok(())
    }
}
