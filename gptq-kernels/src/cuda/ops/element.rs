//! Embedding, norms and what goes element by element.

use std::sync::PoisonError;

use super::{
    CudaEmbedding, CudaOrder, CudaStep,
    drawn::NONE,
    expect_shape,
    step::{DRAWN, Draws},
};
use crate::{
    Device, KernelError, MatMut, MatRef, Span,
    cuda::{
        CudaDevice, CudaRef, Element,
        driver::{Function, Launch},
        pinned::Readback,
    },
};

type Read<'a, T> = MatRef<'a, CudaDevice<T>>;
type Write<'a, T> = MatMut<'a, CudaDevice<T>>;

/// Threads of the row kernels, as in `ops.cu`.
pub(super) const NORM_THREADS: u32 = 512;
const ELEMENT_THREADS: u32 = 256;
const DRAW_THREADS: u32 = 1024;

/// Threads of a block and blocks of the team that samples a row, as in `draw.cuh`.
fn team<T: Element>(device: &CudaDevice<T>) -> (u32, u32) {
    if device.hopper() { (512, 8) } else { (1024, 1) }
}

/// Whether all of these addresses, and strides in elements, allow vectors of 16 bytes.
pub(super) fn vectors(addresses: &[u64], strides: &[usize]) -> u32 {
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    u32::from(aligned && strides.iter().all(|stride| stride.is_multiple_of(8)))
}

/// The stride of a matrix; that of a single row is of no use and may be anything.
pub(super) fn stride(rows: usize, stride: usize) -> usize {
    if rows > 1 { stride } else { 0 }
}

/// Blocks along x: one for each row.
pub(super) fn rows_grid(rows: usize) -> Result<u32, KernelError> {
    let limit = i32::MAX as usize;
    super::expect_below("rows", rows, limit)?;
    Ok(rows as u32)
}

/// `EmbedArgs` of `ops.cu`.
#[repr(C)]
struct EmbedArgs {
    table: u64,
    tokens: u64,
    drawn: u64,
    y: u64,
    y_stride: u64,
    vocabulary: u32,
    cols: u32,
    vectors: u32,
}

pub(super) fn embed<T: Element>(
    device: &CudaDevice<T>,
    table: &CudaEmbedding,
    step: &CudaStep,
    y: Write<'_, T>,
) -> Result<(), KernelError> {
    let (rows, cols) = (step.rows(), table.hidden());
    expect_shape("y", (y.rows(), y.cols()), (rows, cols))?;
    super::expect_below("token", step.largest_token(), table.vocabulary().min(DRAWN as usize))?;
    if rows == 0 {
        return Ok(());
    }
    let y_stride = stride(rows, y.row_stride());
    let y = y.into_data();
    let mut args = EmbedArgs {
        table: table.address(),
        tokens: step.tokens(),
        drawn: step.drawn().tokens(),
        y: y.address(),
        y_stride: y_stride as u64,
        vocabulary: table.vocabulary() as u32,
        cols: cols as u32,
        vectors: vectors(&[y.address(), table.address()], &[y_stride, cols]),
    };
    // Not before what came before has ended: later kernels of a step read the step ahead of their wait, and rely on that.
    let launch = Launch { programmatic: false, ..device.shape((rows_grid(rows)?, 1), NORM_THREADS, 0) };
    // SAFETY: `EmbedArgs` field by field; the table and the step are of the sizes given and live as long as the stream uses
    // them, y was checked. The kernel checks tokens again.
    unsafe { device.row_kernels()?.embed.launch("embed", launch, y.stream(), &mut args) }
}

/// `NormArgs` of `ops.cu`.
#[repr(C)]
struct NormArgs {
    x: u64,
    delta: u64,
    weight: u64,
    order: u64,
    y: u64,
    ahead: u64,
    x_stride: u64,
    delta_stride: u64,
    y_stride: u64,
    cols: u32,
    vectors: u32,
    rows: u32,
    ahead_bytes: u32,
    eps: f32,
}

/// What a block fetches for the layer behind a norm, and up to how many rows it is worth it: those that a layer's kernel for few
/// rows does.
const BLOCK_AHEAD: usize = 32 << 10;
const FEW_ROWS: usize = 8;

#[allow(clippy::too_many_arguments)]
fn norm<T: Element>(
    device: &CudaDevice<T>,
    (name, function): (&'static str, &Function),
    x: (u64, usize),
    delta: (u64, usize),
    weight: CudaRef<'_, T>,
    eps: f32,
    order: Option<&CudaOrder>,
    next: Option<Span<'_>>,
    y: Write<'_, T>,
) -> Result<(), KernelError> {
    let (rows, cols) = (y.rows(), y.cols());
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let y_stride = stride(rows, y.row_stride());
    let y = y.into_data();
    let (x_stride, delta_stride) = (stride(rows, x.1), stride(rows, delta.1));
    // Multiprocessors that have no row.
    let idle = (device.multiprocessors() as usize).saturating_sub(rows);
    let ahead = next.filter(|_| rows <= FEW_ROWS && device.hopper());
    let ahead_bytes = ahead.map_or(0, |span| span.bytes.min(idle * BLOCK_AHEAD));
    let mut args = NormArgs {
        x: x.0,
        delta: delta.0,
        weight: weight.address(),
        order: order.map_or(0, CudaOrder::address),
        y: y.address(),
        ahead: ahead.map_or(0, |span| span.address),
        x_stride: x_stride as u64,
        delta_stride: delta_stride as u64,
        y_stride: y_stride as u64,
        cols: cols as u32,
        vectors: vectors(&[x.0, delta.0, weight.address(), y.address()], &[x_stride, delta_stride, y_stride]),
        rows: rows as u32,
        ahead_bytes: ahead_bytes as u32,
        eps,
    };
    let shared = order.map_or(0, CudaOrder::row_bytes::<T>);
    let grid = rows_grid(rows + ahead_bytes.div_ceil(BLOCK_AHEAD))?;
    let launch = device.shape((grid, 1), NORM_THREADS, shared);
    // SAFETY: `NormArgs` field by field; the callers have compared all shapes, and borrow what the addresses are of; an order
    // has only columns of x, and then shared memory holds a row. Weight, order and what is ahead are read ahead of the wait: no kernel
    // writes them. What is ahead belongs to a layer that runs behind this kernel on the same stream, whenever it runs.
    unsafe { function.launch(name, launch, y.stream(), &mut args) }
}

pub(super) fn rms_norm<T: Element>(
    device: &CudaDevice<T>,
    next: Option<Span<'_>>,
    x: Read<'_, T>,
    weight: CudaRef<'_, T>,
    eps: f32,
    order: Option<&CudaOrder>,
    y: Write<'_, T>,
) -> Result<(), KernelError> {
    expect_shape("weight", (1, CudaDevice::<T>::len(&weight)), (1, x.cols()))?;
    expect_shape("y", (y.rows(), y.cols()), (x.rows(), x.cols()))?;
    let kernels = device.row_kernels()?;
    let function = match order {
        Some(order) => {
            order.check(x.cols())?;
            ("rms_norm_ordered", &kernels.rms_norm_ordered)
        }
        None => ("rms_norm", &kernels.rms_norm),
    };
    norm(device, function, (x.data().address(), x.row_stride()), (0, 0), weight, eps, order, next, y)
}

pub(super) fn add_rms_norm<T: Element>(
    device: &CudaDevice<T>,
    residual: Write<'_, T>,
    delta: Read<'_, T>,
    weight: CudaRef<'_, T>,
    eps: f32,
    order: Option<&CudaOrder>,
    y: Write<'_, T>,
) -> Result<(), KernelError> {
    let shape = (delta.rows(), delta.cols());
    expect_shape("weight", (1, CudaDevice::<T>::len(&weight)), (1, shape.1))?;
    expect_shape("residual", (residual.rows(), residual.cols()), shape)?;
    expect_shape("y", (y.rows(), y.cols()), shape)?;
    let kernels = device.row_kernels()?;
    let function = match order {
        Some(order) => {
            order.check(shape.1)?;
            ("add_rms_norm_ordered", &kernels.add_rms_norm_ordered)
        }
        None => ("add_rms_norm", &kernels.add_rms_norm),
    };
    let x_stride = residual.row_stride();
    let x = residual.into_data();
    let delta = (delta.data().address(), delta.row_stride());
    norm(device, function, (x.address(), x_stride), delta, weight, eps, order, None, y)
}

/// `ElementArgs` of `ops.cu`.
#[repr(C)]
struct ElementArgs {
    x: u64,
    y: u64,
    x_stride: u64,
    y_stride: u64,
    cols: u32,
    vectors: u32,
}

fn elementwise<T: Element>(
    device: &CudaDevice<T>,
    (name, function): (&'static str, &Function),
    x: Read<'_, T>,
    y: Write<'_, T>,
) -> Result<(), KernelError> {
    let (rows, cols) = (y.rows(), y.cols());
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let (x_stride, y_stride) = (stride(rows, x.row_stride()), stride(rows, y.row_stride()));
    let (x, y) = (x.data(), y.into_data());
    let mut args = ElementArgs {
        x: x.address(),
        y: y.address(),
        x_stride: x_stride as u64,
        y_stride: y_stride as u64,
        cols: cols as u32,
        vectors: vectors(&[x.address(), y.address()], &[x_stride, y_stride]),
    };
    let chunks = cols.div_ceil(8 * ELEMENT_THREADS as usize) as u32;
    let launch = device.shape((rows_grid(rows)?, chunks), ELEMENT_THREADS, 0);
    // SAFETY: `ElementArgs` field by field; the callers have compared the shapes.
    unsafe { function.launch(name, launch, y.stream(), &mut args) }
}

pub(super) fn add<T: Element>(
    device: &CudaDevice<T>,
    x: Read<'_, T>,
    y: Write<'_, T>,
) -> Result<(), KernelError> {
    expect_shape("y", (y.rows(), y.cols()), (x.rows(), x.cols()))?;
    elementwise(device, ("add", &device.row_kernels()?.add), x, y)
}

pub(super) fn silu_mul<T: Element>(
    device: &CudaDevice<T>,
    x: Read<'_, T>,
    y: Write<'_, T>,
) -> Result<(), KernelError> {
    expect_shape("x", (x.rows(), x.cols()), (y.rows(), 2 * y.cols()))?;
    elementwise(device, ("silu_mul", &device.row_kernels()?.silu_mul), x, y)
}

/// `GatherArgs` of `ops.cu`.
#[repr(C)]
struct GatherArgs {
    x: u64,
    rows: u64,
    y: u64,
    x_stride: u64,
    y_stride: u64,
    cols: u32,
}

pub(super) fn gather_outputs<T: Element>(
    device: &CudaDevice<T>,
    step: &CudaStep,
    x: Read<'_, T>,
    y: Write<'_, T>,
) -> Result<(), KernelError> {
    expect_shape("x", (x.rows(), x.cols()), (step.rows(), y.cols()))?;
    expect_shape("y", (y.rows(), y.cols()), (step.outputs(), x.cols()))?;
    let (rows, cols) = (y.rows(), y.cols());
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let y_stride = stride(rows, y.row_stride());
    let y = y.into_data();
    let mut args = GatherArgs {
        x: x.data().address(),
        rows: step.output_rows(),
        y: y.address(),
        x_stride: stride(x.rows(), x.row_stride()) as u64,
        y_stride: y_stride as u64,
        cols: cols as u32,
    };
    let launch = device.shape((rows_grid(rows)?, 1), NORM_THREADS, 0);
    // SAFETY: `GatherArgs` field by field; shapes were compared, and the step's output rows are rows of x.
    unsafe { device.row_kernels()?.gather.launch("gather", launch, y.stream(), &mut args) }
}

/// `DrawArgs` of `ops.cu`.
#[repr(C)]
#[derive(Default)]
struct DrawArgs {
    x: u64,
    out: u64,
    draws: u64,
    host: [u64; 2],
    numbers: u64,
    positions: u64,
    tiles: u64,
    tokens: u64,
    x_stride: u64,
    cols: u32,
    vectors: u32,
    advances: u32,
}

fn draw_args<T: Element>(x: &Read<'_, T>, out: u64) -> DrawArgs {
    let x_stride = stride(x.rows(), x.row_stride());
    DrawArgs {
        x: x.data().address(),
        out,
        x_stride: x_stride as u64,
        cols: x.cols() as u32,
        vectors: vectors(&[x.data().address()], &[x_stride]),
        ..DrawArgs::default()
    }
}

pub(super) fn argmax<T: Element>(
    device: &CudaDevice<T>,
    x: Read<'_, T>,
    out: &mut [Option<u32>],
) -> Result<(), KernelError> {
    let (rows, cols) = (x.rows(), x.cols());
    expect_shape("out", (out.len(), cols), (rows, cols))?;
    if rows == 0 {
        return Ok(());
    }
    let stream = device.stream();
    let mut readback = device.operations().readback.lock().unwrap_or_else(PoisonError::into_inner);
    let readback = match &mut *readback {
        Some(readback) if readback.len() >= rows => readback,
        other => other.insert(Readback::new(stream, rows.next_power_of_two())?),
    };
    let mut args = draw_args(&x, readback.address(stream));
    let launch = device.shape((rows_grid(rows)?, 1), DRAW_THREADS, 0);
    // SAFETY: `DrawArgs` field by field; the readback has room for every row, and what is null is not used.
    unsafe { device.row_kernels()?.draw_greedy.launch("argmax", launch, stream.cu_stream(), &mut args) }?;
    let found = readback.read(stream, rows)?;
    for (out, &index) in out.iter_mut().zip(found) {
        *out = (index != NONE).then_some(index);
    }
    Ok(())
}

pub(super) fn draw<T: Element>(
    device: &CudaDevice<T>,
    step: &CudaStep,
    x: Read<'_, T>,
) -> Result<(), KernelError> {
    let (rows, cols) = (step.draw_count(), x.cols());
    expect_shape("logits", (x.rows(), cols), (rows, cols))?;
    // Tokens are marked by their highest bit, and sums of weights of 2^40 are taken in 64.
    super::expect_below("vocabulary", cols, 1 << 23)?;
    if rows == 0 {
        return Ok(());
    }
    let shape = step.shape();
    let mut args = DrawArgs {
        draws: step.draws(),
        host: step.drawn().host(),
        numbers: step.numbers(),
        positions: step.positions(),
        tiles: step.tiles(),
        tokens: step.tokens(),
        advances: u32::from(shape.advances),
        ..draw_args(&x, step.drawn().tokens())
    };
    let kernels = device.row_kernels()?;
    let (name, function, (threads, blocks)) = match shape.draws {
        Draws::Sampled => ("draw_sampled", &kernels.draw_sampled, team(device)),
        _ => ("draw_greedy", &kernels.draw_greedy, (DRAW_THREADS, 1)),
    };
    let launch = device.shape((rows_grid(rows * blocks as usize)?, 1), threads, 0);
    let launch = Launch { cluster: blocks, ..launch };
    // SAFETY: `DrawArgs` field by field; the step has parameters, numbers and, if it advances, positions, tiles and tokens of
    // every row, and its drawn tokens have room for every row on the device and on the host.
    unsafe { function.launch(name, launch, device.stream().cu_stream(), &mut args) }
}
