//! Embedding, norms and what goes element by element.

use rayon::prelude::*;

use super::{SingleStep, expect_below, launch};
use crate::{
    DenseData, DenseWeight, Device, KernelError, MatMut, MatRef,
    cuda::{
        CudaDevice, CudaRef,
        driver::{Function, Resident},
    },
    matrix::expect_shape,
};

type Read<'a> = MatRef<'a, CudaDevice<f32>>;
type Write<'a> = MatMut<'a, CudaDevice<f32>>;

/// Threads of all kernels here, as in `single.cu`.
const THREADS: usize = 256;

/// An embedding matrix in float32, `(vocabulary, hidden)`.
pub struct SingleEmbedding {
    table: Resident,
    vocabulary: usize,
    hidden: usize,
}

impl SingleEmbedding {
    pub(super) fn new(device: &CudaDevice<f32>, weight: &DenseWeight<'_>) -> Result<Self, KernelError> {
        weight.validate()?;
        let (vocabulary, hidden) = (weight.out_features, weight.in_features);
        expect_below("vocabulary", vocabulary, u32::MAX as usize)?;
        expect_below("hidden", hidden, u32::MAX as usize)?;
        let widened = |elements: Vec<f32>| Resident::new(device.stream(), &elements);
        let table = match weight.data {
            DenseData::F32(data) => Resident::new(device.stream(), data),
            DenseData::F16(data) => widened(data.par_iter().map(|x| x.to_f32()).collect()),
            DenseData::Bf16(data) => widened(data.par_iter().map(|x| x.to_f32()).collect()),
        }?;
        Ok(Self { table, vocabulary, hidden })
    }
}

/// `EmbedArgs` of `single.cu`.
#[repr(C)]
struct EmbedArgs {
    table: u64,
    tokens: u64,
    y: u64,
    y_stride: u64,
    vocabulary: u32,
    cols: u32,
}

pub(super) fn embed(
    device: &CudaDevice<f32>,
    table: &SingleEmbedding,
    step: &SingleStep,
    y: Write<'_>,
) -> Result<(), KernelError> {
    let rows = step.rows();
    expect_shape("y", (y.rows(), y.cols()), (rows, table.hidden))?;
    expect_below("token", step.largest_token(), table.vocabulary)?;
    if rows == 0 {
        return Ok(());
    }
    let y_stride = y.row_stride() as u64;
    let y = y.into_data();
    let mut args = EmbedArgs {
        table: table.table.address(),
        tokens: step.tokens(),
        y: y.address(),
        y_stride,
        vocabulary: table.vocabulary as u32,
        cols: table.hidden as u32,
    };
    // SAFETY: `EmbedArgs` field by field; the table and the step are of the sizes given and live as long as the stream uses
    // them, y was checked. The kernel checks tokens again.
    unsafe {
        device.rows()?.embed.launch("embed", launch((rows, 1), THREADS as u32, 0)?, y.stream(), &mut args)
    }
}

/// `NormArgs` of `single.cu`.
#[repr(C)]
struct NormArgs {
    x: u64,
    delta: u64,
    weight: u64,
    y: u64,
    x_stride: u64,
    delta_stride: u64,
    y_stride: u64,
    cols: u32,
    eps: f32,
}

/// Of `x`: address, stride, rows, columns.
pub(super) fn norm(
    device: &CudaDevice<f32>,
    (x, x_stride, rows, cols): (u64, usize, usize, usize),
    delta: Option<Read<'_>>,
    (weight, eps): (CudaRef<'_, f32>, f32),
    y: Write<'_>,
) -> Result<(), KernelError> {
    expect_shape("weight", (1, CudaDevice::<f32>::len(&weight)), (1, cols))?;
    expect_shape("y", (y.rows(), y.cols()), (rows, cols))?;
    if let Some(delta) = &delta {
        expect_shape("residual", (rows, cols), (delta.rows(), delta.cols()))?;
    }
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let y_stride = y.row_stride() as u64;
    let y = y.into_data();
    let mut args = NormArgs {
        x,
        delta: delta.as_ref().map_or(0, |delta| delta.data().address()),
        weight: weight.address(),
        y: y.address(),
        x_stride: x_stride as u64,
        delta_stride: delta.as_ref().map_or(0, |delta| delta.row_stride() as u64),
        y_stride,
        cols: cols as u32,
        eps,
    };
    // SAFETY: `NormArgs` field by field; shapes were compared, and the callers borrow what the addresses are of.
    unsafe {
        device.rows()?.rms_norm.launch(
            "rms_norm",
            launch((rows, 1), THREADS as u32, 0)?,
            y.stream(),
            &mut args,
        )
    }
}

/// `ElementArgs` of `single.cu`.
#[repr(C)]
pub(super) struct ElementArgs {
    pub(super) x: u64,
    pub(super) rows: u64,
    pub(super) y: u64,
    pub(super) x_stride: u64,
    pub(super) y_stride: u64,
    pub(super) cols: u32,
}

/// Runs a kernel over y; `x` is the address and the stride of what it reads besides, `indices` the rows of it, if it picks
/// some.
///
/// # Safety
///
/// What the addresses are of must be memory of the device of the size that the kernel's source says, valid until the stream has
/// run it.
pub(super) unsafe fn elementwise(
    (name, function): (&'static str, &Function),
    (x, x_stride): (u64, usize),
    indices: u64,
    y: Write<'_>,
) -> Result<(), KernelError> {
    let (rows, cols, y_stride) = (y.rows(), y.cols(), y.row_stride());
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let y = y.into_data();
    let mut args = ElementArgs {
        x,
        rows: indices,
        y: y.address(),
        x_stride: x_stride as u64,
        y_stride: y_stride as u64,
        cols: cols as u32,
    };
    let grid = launch((rows, cols.div_ceil(THREADS)), THREADS as u32, 0)?;
    // SAFETY: `ElementArgs` field by field; y is borrowed, and the caller vouches for the rest.
    unsafe { function.launch(name, grid, y.stream(), &mut args) }
}

pub(super) fn add(device: &CudaDevice<f32>, x: Read<'_>, y: Write<'_>) -> Result<(), KernelError> {
    expect_shape("y", (y.rows(), y.cols()), (x.rows(), x.cols()))?;
    // SAFETY: x is borrowed and has the shape of y.
    unsafe { elementwise(("add", &device.rows()?.add), (x.data().address(), x.row_stride()), 0, y) }
}

pub(super) fn silu_mul(device: &CudaDevice<f32>, x: Read<'_>, y: Write<'_>) -> Result<(), KernelError> {
    expect_shape("x", (x.rows(), x.cols()), (y.rows(), 2 * y.cols()))?;
    let kernel = ("silu_mul", &device.rows()?.silu_mul);
    // SAFETY: x is borrowed and has twice the columns of y.
    unsafe { elementwise(kernel, (x.data().address(), x.row_stride()), 0, y) }
}

pub(super) fn gather_outputs(
    device: &CudaDevice<f32>,
    step: &SingleStep,
    x: Read<'_>,
    y: Write<'_>,
) -> Result<(), KernelError> {
    expect_shape("x", (x.rows(), x.cols()), (step.rows(), y.cols()))?;
    expect_shape("y", (y.rows(), y.cols()), (step.outputs(), x.cols()))?;
    let kernel = ("gather", &device.rows()?.gather);
    // SAFETY: x is borrowed; the step's output rows are rows of it.
    unsafe { elementwise(kernel, (x.data().address(), x.row_stride()), step.output_rows(), y) }
}
