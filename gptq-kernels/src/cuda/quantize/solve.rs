//! The column loop, all rows at once, one lazy block after the other.

use std::time::Instant;

use gptq_core::{GptqConfig, GptqError, LayerReport, Method};

use super::{
    CudaPrepared, CudaQuantized,
    columns::{MOST_WIDTH, ROWS, shared},
    factor::Factor,
    gpu::{Gpu, MOST_BLOCKS, NAME, check_features},
    memory::Memory,
};
use crate::{
    DenseData, DenseWeight, KernelError, MatRef, Unsupported,
    cuda::{Activation, CudaDevice},
    quantize::QuantizeError,
};

/// Side of the tiles of `update`.
const UPDATE: usize = 128;

/// Rows of a block of `fit_grid` and of `search_grid`, and threads of the latter.
const FIT_ROWS: usize = 8;
const SEARCH_ROWS: usize = 2;
const SEARCH_THREADS: u32 = 160;

/// `Rule`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Rule {
    max_code: f32,
    sym: u32,
}

/// `WeightArgs`.
#[repr(C)]
struct WeightArgs {
    source: u64,
    w: u64,
    order: u64,
    non_finite: u64,
    stride: u64,
    rows: u32,
    n: u32,
}

/// `ZeroArgs`.
#[repr(C)]
struct ZeroArgs {
    w: u64,
    positions: u64,
    rows: u32,
    n: u32,
    count: u32,
}

/// `GridArgs`.
#[repr(C)]
struct GridArgs {
    w: u64,
    members: u64,
    groups: u64,
    scales: u64,
    zeros: u64,
    rows: u32,
    n: u32,
    group_count: u32,
    first: u32,
    group_size: u32,
    exponent: f64,
    rule: Rule,
}

/// `ColumnsArgs`.
#[repr(C)]
struct ColumnsArgs {
    w: u64,
    u: u64,
    p: u64,
    scales: u64,
    zeros: u64,
    groups: u64,
    order: u64,
    errors: u64,
    block: u64,
    codes: u64,
    loss: u64,
    rows: u32,
    n: u32,
    group_count: u32,
    start: u32,
    width: u32,
    rule: Rule,
}

/// `UpdateArgs`.
#[repr(C)]
struct UpdateArgs {
    w: u64,
    e: u64,
    u: u64,
    b: u64,
    p: u64,
    rows: u32,
    n: u32,
    width: u32,
    columns: u32,
    aligned: u32,
}

/// Where a weight (out_features, in_features) comes from.
pub(super) enum Source<'a, T: Activation> {
    /// Validated.
    Host(DenseWeight<'a>),
    Device(MatRef<'a, CudaDevice<T>>),
}

impl<T: Activation> Source<'_, T> {
    /// Rows and columns.
    pub(super) fn shape(&self) -> (usize, usize) {
        match self {
            Self::Host(weight) => (weight.out_features, weight.in_features),
            Self::Device(matrix) => (matrix.rows(), matrix.cols()),
        }
    }
}

/// One weight on its way.
struct Solve<'a, T: Activation> {
    gpu: &'a Gpu<T>,
    config: &'a GptqConfig,
    prepared: &'a CudaPrepared,
    factor: &'a Factor,
    rows: usize,
    n: usize,
    groups: usize,
    /// (rows, n), in the order of quantisation.
    w: Memory<f32>,
    scales: Memory<f32>,
    zeros: Memory<u8>,
    codes: Memory<u8>,
    loss: Memory<f64>,
    /// (rows, block size)
    errors: Memory<f32>,
    /// The same, for GPTAQ.
    block: Option<Memory<f32>>,
}

/// Checks that the column loop can run with these settings on this GPU.
pub(super) fn check_config<T: Activation>(gpu: &Gpu<T>, config: &GptqConfig) -> Result<(), KernelError> {
    let width = config.block_size().get();
    let (needed, got) = (shared(width.min(MOST_WIDTH), config.gptaq().is_some()), gpu.device.shared_memory());
    if width > MOST_WIDTH || needed > got {
        let reason = Unsupported::BlockSize { block_size: width };
        return Err(KernelError::Unsupported { kernel: NAME, reason });
    }
    Ok(())
}

/// Quantises a validated weight of as many columns as the Hessian has.
pub(super) fn quantize<T: Activation>(
    gpu: &Gpu<T>,
    config: &GptqConfig,
    prepared: &CudaPrepared,
    (factor, mut report): (&Factor, LayerReport),
    weight: &Source<'_, T>,
) -> Result<CudaQuantized, QuantizeError> {
    let started = Instant::now();
    let (rows, n) = weight.shape();
    check_features(n, rows)?;
    let stream = gpu.stream();
    let groups = config.groups(n);
    let width = config.block_size().get().min(n);
    let solve = Solve {
        gpu,
        config,
        prepared,
        factor,
        rows,
        n,
        groups,
        w: Memory::zeros(stream, rows * n)?,
        scales: Memory::zeros(stream, rows * groups)?,
        zeros: Memory::zeros(stream, rows * groups)?,
        codes: Memory::zeros(stream, rows * n)?,
        loss: Memory::zeros(stream, rows)?,
        errors: Memory::zeros(stream, rows * width)?,
        block: match factor.correction {
            Some(_) => Some(Memory::zeros(stream, rows * width)?),
            None => None,
        },
    };
    let non_finite = solve.load(weight)?;
    if let Some(&index) = non_finite.to_host(stream)?.first()
        && index != u64::MAX
    {
        let (row, column) = (index as usize / n, index as usize % n);
        let position = prepared.position[column];
        let value = solve.w.element(stream, row * n + position)?;
        return Err(GptqError::NonFiniteWeight { row, column, value }.into());
    }
    solve.run(width)?;
    let Solve { scales, zeros, codes, loss, .. } = solve;
    let host_scales = scales.to_host(stream)?;
    if let Some(at) = host_scales.iter().position(|scale| !scale.is_finite()) {
        let (row, group) = (at / groups, at % groups);
        return Err(GptqError::NonFiniteScale { row, group, scale: host_scales[at] }.into());
    }
    let losses = loss.to_host(stream)?;
    if let Some(first_row) = losses.iter().position(|loss| !loss.is_finite()) {
        return Err(GptqError::NonFiniteLoss { first_row, loss: losses[first_row] }.into());
    }
    // The chunks of gptq-core, so that equal errors give an equal sum.
    let loss = losses.chunks(ROWS).map(|chunk| chunk.iter().sum::<f64>() / 2.0).sum();
    report.method = if factor.correction.is_some() { Method::Gptaq } else { Method::Gptq };
    report.loss = Some(loss);
    report.times.solve = started.elapsed();
    Ok(CudaQuantized { rows, codes, scales, zeros, host_scales, shared: prepared.shared.clone(), report })
}

impl<T: Activation> Solve<'_, T> {
    fn rule(&self) -> Rule {
        Rule { max_code: f32::from(self.config.max_code()), sym: self.config.sym().into() }
    }

    /// Brings the weight into float32 and order; the index of its first NaN or infinity.
    fn load(&self, weight: &Source<'_, T>) -> Result<Memory<u64>, KernelError> {
        let (stream, n) = (self.gpu.stream(), self.n);
        let non_finite = Memory::copy_of(stream, &[u64::MAX])?;
        let gather = |entry, source, stride| self.gather(entry, (source, stride), &non_finite);
        match weight {
            Source::Device(matrix) => {
                let entry = Gpu::<T>::typed("gather_weight_f16", "gather_weight_bf16", "gather_weight_f32");
                gather(entry, matrix.data().address(), matrix.row_stride())?;
            }
            // Uploaded as they are.
            Source::Host(DenseWeight { data: DenseData::F32(data), .. }) => {
                gather("gather_weight_f32", Memory::copy_of(stream, data)?.address(), n)?;
            }
            Source::Host(DenseWeight { data: DenseData::F16(data), .. }) => {
                gather("gather_weight_f16", Memory::copy_of(stream, data)?.address(), n)?;
            }
            Source::Host(DenseWeight { data: DenseData::Bf16(data), .. }) => {
                gather("gather_weight_bf16", Memory::copy_of(stream, data)?.address(), n)?;
            }
        }
        Ok(non_finite)
    }

    fn gather(
        &self,
        entry: &'static str,
        (source, stride): (u64, usize),
        non_finite: &Memory<u64>,
    ) -> Result<(), KernelError> {
        let args = WeightArgs {
            source,
            w: self.w.address(),
            order: self.prepared.shared.order.address(),
            non_finite: non_finite.address(),
            stride: stride as u64,
            rows: self.rows as u32,
            n: self.n as u32,
        };
        let grid = (self.n.div_ceil(256), self.rows.min(MOST_BLOCKS));
        // SAFETY: `WeightArgs` of the source; both weights are (rows, n), that of the caller's with its stride, the order is a
        // permutation of n. What is uploaded is freed in the stream's order, behind this.
        unsafe { self.gpu.launch(entry, grid, (256, 0), args) }
    }

    fn run(&self, width: usize) -> Result<(), KernelError> {
        let prepared = self.prepared;
        let group_size = self.config.group_size().map(|size| size.get());
        if group_size.is_none() {
            // From the weight as given, dead columns included: all references fit this grid first.
            self.fit_grids((0, 1), self.n, None)?;
        }
        if let Some(positions) = &prepared.dead_positions {
            let count = prepared.dead_columns.len();
            let args = ZeroArgs {
                w: self.w.address(),
                positions: positions.address(),
                rows: self.rows as u32,
                n: self.n as u32,
                count: count as u32,
            };
            let blocks = (self.rows * count).div_ceil(256).min(MOST_BLOCKS);
            // SAFETY: `ZeroArgs` of the source; w is (rows, n), the positions are `count` indices below n.
            unsafe { self.gpu.launch("zero_columns", (blocks, 1), (256, 0), args) }?;
        }
        let natural = prepared.natural.as_ref();
        if let (Some(size), Some(natural)) = (group_size, natural) {
            self.fit_grids((0, self.groups), size, Some(natural))?;
        }
        for start in (0..self.n).step_by(width) {
            let width = width.min(self.n - start);
            if let (Some(size), None) = (group_size, natural) {
                // From the weight as it stands at the block's start: a quirk of all references, and theirs to keep.
                let first = start.next_multiple_of(size);
                let count = (start + width).saturating_sub(first).div_ceil(size);
                if count > 0 {
                    self.fit_grids((first, count), size, None)?;
                }
            }
            self.block(start, width)?;
        }
        Ok(())
    }

    /// Fits `count` grids, of `size` columns each from `first` on, positions or, through `natural`, original columns.
    fn fit_grids(
        &self,
        (first, count): (usize, usize),
        size: usize,
        natural: Option<&Natural>,
    ) -> Result<(), KernelError> {
        let exponent = self.config.mse().map_or(0.0, f64::from);
        let (entry, rows, threads) = if exponent > 0.0 {
            ("search_grid", SEARCH_ROWS, SEARCH_THREADS)
        } else {
            ("fit_grid", FIT_ROWS, 256)
        };
        // Groups beyond the limit of a launch, which only tiny groups reach, come in several.
        for begin in (0..count).step_by(MOST_BLOCKS) {
            let args = GridArgs {
                w: self.w.address(),
                members: natural.map_or(0, |natural| natural.positions.address()),
                groups: natural
                    .map_or(self.prepared.shared.groups.address(), |natural| natural.groups.address()),
                scales: self.scales.address(),
                zeros: self.zeros.address(),
                rows: self.rows as u32,
                n: self.n as u32,
                group_count: self.groups as u32,
                first: (first + begin * size) as u32,
                group_size: size as u32,
                exponent,
                rule: self.rule(),
            };
            let grid = (self.rows.div_ceil(rows), (count - begin).min(MOST_BLOCKS));
            // SAFETY: `GridArgs` of the source; w is (rows, n), scales and zeros (rows, groups), the indices (n), each
            // group's below `groups`; groups end at n.
            unsafe { self.gpu.launch(entry, grid, (threads, 0), args) }?;
        }
        Ok(())
    }

    /// Quantises the columns of one block and updates those behind it.
    fn block(&self, start: usize, width: usize) -> Result<(), KernelError> {
        let Self { gpu, prepared, factor, rows, n, .. } = *self;
        let address = |memory: &Option<Memory<f32>>| memory.as_ref().map_or(0, Memory::address);
        let args = ColumnsArgs {
            w: self.w.address(),
            u: factor.upper.address(),
            p: address(&factor.correction),
            scales: self.scales.address(),
            zeros: self.zeros.address(),
            groups: prepared.shared.groups.address(),
            order: prepared.shared.order.address(),
            errors: self.errors.address(),
            block: address(&self.block),
            codes: self.codes.address(),
            loss: self.loss.address(),
            rows: rows as u32,
            n: n as u32,
            group_count: self.groups as u32,
            start: start as u32,
            width: width as u32,
            rule: self.rule(),
        };
        let gptaq = factor.correction.is_some();
        let entry = if gptaq { "columns_gptaq" } else { "columns_gptq" };
        let launch = (256, shared(width, gptaq));
        // SAFETY: `ColumnsArgs` of the source; w and codes are (rows, n), U and P (n, n), scales and zeros (rows, groups),
        // errors and block (rows, width) or more, loss (rows), the indices (n).
        unsafe { gpu.launch(entry, (rows.div_ceil(ROWS), 1), launch, args) }?;
        let behind = start + width;
        if behind == n {
            return Ok(());
        }
        let columns = n - behind;
        let float = size_of::<f32>();
        let right = |factor: &Memory<f32>| factor.address() + ((start * n + behind) * float) as u64;
        let args = UpdateArgs {
            w: self.w.address() + (behind * float) as u64,
            e: self.errors.address(),
            u: right(&factor.upper),
            b: address(&self.block),
            p: factor.correction.as_ref().map_or(0, right),
            rows: rows as u32,
            n: n as u32,
            width: width as u32,
            columns: columns as u32,
            aligned: (n.is_multiple_of(4) && behind.is_multiple_of(4)).into(),
        };
        let entry = if gptaq { "update_gptaq" } else { "update_gptq" };
        // SAFETY: `UpdateArgs` of the source: columns from `behind` on of w and of the block's rows of U and P, errors and
        // weights of (rows, width).
        unsafe { gpu.launch(entry, (rows.div_ceil(UPDATE), columns.div_ceil(UPDATE)), (256, 0), args) }
    }
}

/// Where the natural groups of static grids lie: for each original column its position, and its group.
pub(super) struct Natural {
    pub(super) positions: Memory<u32>,
    pub(super) groups: Memory<u32>,
}
