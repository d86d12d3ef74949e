use super::{
    CudaKvStore, CudaOrder, CudaRope, CudaStep, expect_below, expect_shape,
    kv::padded_dim,
    split::{Decoding, QUERIES, Split},
    step::{CHUNK_PAGES, PAGE_LEN, TICKETS},
};
use crate::{
    AttentionShape, Device, KernelError, KvFormat, MatMut, MatRef, Workspace,
    cuda::{CudaDevice, Element, driver::Launch},
};

/// Threads of all kernels here but `rope_append`, as in `attention.cu`.
const THREADS: u32 = 128;
const ROPE_THREADS: u32 = 256;
/// Positions of a chunk, as in `page.cuh`.
const CHUNK: usize = CHUNK_PAGES * PAGE_LEN;
/// Blocks along y of a grid.
const MOST_BLOCKS: usize = 65_535;

/// `RopeArgs` of `decoder.cuh`.
#[repr(C)]
struct RopeArgs {
    qkv: u64,
    store: u64,
    positions: u64,
    page_bases: u64,
    pages: u64,
    tiles: u64,
    cos: u64,
    sin: u64,
    stride: u64,
    rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    padded: u32,
}

/// `AttentionArgs` of `attention.cu`.
#[repr(C)]
struct AttentionArgs {
    qkv: u64,
    y: u64,
    store: u64,
    positions: u64,
    page_bases: u64,
    pages: u64,
    tiles: u64,
    cos: u64,
    sin: u64,
    places: u64,
    partials: u64,
    tickets: u64,
    stride: u64,
    y_stride: u64,
    rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    chunks: u32,
    kept: u32,
    stages: u32,
    vectors: u32,
    scale: f32,
}

/// Query heads that share a key-value head.
fn group(shape: AttentionShape) -> Result<usize, KernelError> {
    expect_below("heads", shape.heads, MOST_BLOCKS)?;
    match shape.heads.checked_rem(shape.kv_heads) {
        Some(0) if shape.heads > 0 => Ok(shape.heads / shape.kv_heads),
        _ => Err(KernelError::Argument { what: "kv_heads", got: shape.kv_heads, limit: shape.heads + 1 }),
    }
}

/// Blocks of the decoding kernel for one row and share of the chunks.
fn parts(shape: AttentionShape) -> usize {
    shape.kv_heads * (shape.heads / shape.kv_heads.max(1)).div_ceil(QUERIES)
}

/// Chunks of 256 positions that a row can see.
fn chunks(step: &CudaStep, shape: AttentionShape) -> usize {
    let window = shape.window.map_or(usize::MAX, |window| window.div_ceil(CHUNK) + 1);
    step.shape().chunks.min(window)
}

/// How chunks are divided, if the decoding kernel can do the step.
fn decoding<T: Element>(
    device: &CudaDevice<T>,
    step: &CudaStep,
    shape: AttentionShape,
    format: KvFormat,
) -> Option<Split> {
    let jobs = step.rows() * parts(shape);
    if !step.shape().single || jobs > MOST_BLOCKS || parts(shape) > TICKETS {
        return None;
    }
    let dim = padded_dim(shape.head_dim).filter(|&dim| device.decodes(dim, format))?;
    let decoding = Decoding {
        jobs,
        queries: QUERIES.min(shape.heads / shape.kv_heads.max(1)),
        dim,
        format,
        chunks: chunks(step, shape),
        multiprocessors: device.multiprocessors() as usize,
        memory: device.block_memory(),
        clusters: device.hopper(),
    };
    decoding.split()
}

pub(super) fn decodes<T: Element>(
    device: &CudaDevice<T>,
    step: &CudaStep,
    shape: AttentionShape,
    store: &CudaKvStore<T>,
) -> bool {
    decoding(device, step, shape, store.format()).is_some()
}

/// Partial sums and states of all chunks, where blocks share them that do not read each other's memory: what is enough for
/// any format of keys and values.
pub(super) fn workspace_len<T: Element>(
    device: &CudaDevice<T>,
    step: &CudaStep,
    shape: AttentionShape,
) -> usize {
    let shared = [KvFormat::Activations, KvFormat::Int8].into_iter().any(|format| {
        matches!(decoding(device, step, shape, format), Some(Split { blocks: 2.., kept: 0, .. }))
    });
    match padded_dim(shape.head_dim) {
        Some(dim) if shared => {
            step.rows() * shape.heads * chunks(step, shape) * (dim + 2) * size_of::<f32>() / size_of::<T>()
        }
        _ => 0,
    }
}

/// What all three operations check.
fn check<T: Element>(
    layer: usize,
    shape: AttentionShape,
    step: &CudaStep,
    store: &CudaKvStore<T>,
    (rows, cols): (usize, usize),
) -> Result<usize, KernelError> {
    expect_shape("qkv", (rows, cols), (step.rows(), shape.qkv_features()))?;
    store.check(layer, shape, step.pages_end())?;
    group(shape)
}

#[allow(clippy::too_many_arguments)]
pub(super) fn rope_append<T: Element>(
    device: &CudaDevice<T>,
    layer: usize,
    shape: AttentionShape,
    step: &CudaStep,
    rope: &CudaRope,
    qkv: MatMut<'_, CudaDevice<T>>,
    store: &mut CudaKvStore<T>,
) -> Result<(), KernelError> {
    check(layer, shape, step, store, (qkv.rows(), qkv.cols()))?;
    rope.check(shape.head_dim, step.end())?;
    if step.rows() == 0 {
        return Ok(());
    }
    let limit = 257;
    let too_large = KernelError::Argument { what: "head_dim", got: shape.head_dim, limit };
    let padded = padded_dim(shape.head_dim).ok_or(too_large)?;
    // Images for bytes are those of older GPUs here, and wait for nothing.
    let in_bytes = store.format() == KvFormat::Int8;
    let (name, function) = match store.format() {
        KvFormat::Activations => ("rope_append", Some(&device.row_kernels()?.rope_append)),
        KvFormat::Int8 => {
            let kernels = device.attention_kernels(shape.head_dim, KvFormat::Int8)?;
            ("append_bytes", kernels.append_bytes.as_ref())
        }
    };
    let missing = KernelError::Gpu { during: "storing keys and values", message: format!("no {name}") };
    let function = function.ok_or(missing)?;
    let stride = qkv.row_stride();
    let qkv = qkv.into_data();
    let mut args = RopeArgs {
        qkv: qkv.address(),
        store: store.addresses(layer),
        positions: step.positions(),
        page_bases: step.page_bases(),
        pages: step.pages(),
        tiles: step.tiles(),
        cos: rope.cos(),
        sin: rope.sin(),
        stride: stride as u64,
        rows: step.rows() as u32,
        heads: shape.heads as u32,
        kv_heads: shape.kv_heads as u32,
        head_dim: shape.head_dim as u32,
        padded: padded as u32,
    };
    let blocks = step.rows() + step.shape().tiles * shape.kv_heads;
    expect_below("rows", blocks, i32::MAX as usize)?;
    let launch = device.shape((blocks as u32, 1), ROPE_THREADS, 0);
    let launch = Launch { programmatic: launch.programmatic && !in_bytes, ..launch };
    // SAFETY: `RopeArgs` field by field; `check` has compared qkv and the store with the step, whose pages and positions
    // are inside of the store and the tables; all are borrowed.
    unsafe { function.launch(name, launch, qkv.stream(), &mut args) }
}

#[allow(clippy::too_many_arguments)]
fn args<T: Element>(
    layer: usize,
    shape: AttentionShape,
    step: &CudaStep,
    store: &CudaKvStore<T>,
    qkv: &MatRef<'_, CudaDevice<T>>,
    y: u64,
    y_stride: usize,
) -> AttentionArgs {
    AttentionArgs {
        qkv: qkv.data().address(),
        y,
        store: store.addresses(layer),
        positions: step.positions(),
        page_bases: step.page_bases(),
        pages: step.pages(),
        tiles: step.tiles(),
        cos: 0,
        sin: 0,
        places: 0,
        partials: 0,
        tickets: step.tickets(),
        stride: qkv.row_stride() as u64,
        y_stride: y_stride as u64,
        rows: step.rows() as u32,
        heads: shape.heads as u32,
        kv_heads: shape.kv_heads as u32,
        head_dim: shape.head_dim as u32,
        // No sequence is as long as the largest window.
        window: shape.window.map_or(0, |window| window.min(i32::MAX as usize) as u32),
        chunks: 0,
        kept: 0,
        stages: 0,
        vectors: 0,
        scale: std::f32::consts::LOG2_E / (shape.head_dim as f32).sqrt(),
    }
}

pub(super) fn prefill<T: Element>(
    device: &CudaDevice<T>,
    layer: usize,
    shape: AttentionShape,
    step: &CudaStep,
    store: &CudaKvStore<T>,
    qkv: MatRef<'_, CudaDevice<T>>,
    y: MatMut<'_, CudaDevice<T>>,
) -> Result<(), KernelError> {
    let group = check(layer, shape, step, store, (qkv.rows(), qkv.cols()))?;
    expect_shape("y", (y.rows(), y.cols()), (step.rows(), shape.out_features()))?;
    if step.rows() == 0 {
        return Ok(());
    }
    let kernels = device.attention_kernels(shape.head_dim, store.format())?;
    let y_stride = y.row_stride();
    let y = y.into_data();
    let mut args = args(layer, shape, step, store, &qkv, y.address(), y_stride);
    args.stages = kernels.stages;
    let aligned = qkv.data().address().is_multiple_of(16) && y.address().is_multiple_of(4);
    let strides = qkv.row_stride().is_multiple_of(8) && y_stride.is_multiple_of(2);
    args.vectors = u32::from(aligned && strides && shape.head_dim.is_multiple_of(8));
    let grid = (step.shape().tiles as u32, (shape.kv_heads * group) as u32);
    let launch = device.shape(grid, THREADS, kernels.prefill_shared);
    let launch = Launch { programmatic: launch.programmatic && store.format() != KvFormat::Int8, ..launch };
    // SAFETY: `AttentionArgs` field by field; `check` has compared qkv and the store with the step, whose pages are inside
    // of the store; y was compared; all are borrowed. This kernel does not use the fields that are zero.
    unsafe { kernels.prefill.launch("attention_prefill", launch, y.stream(), &mut args) }
}

#[allow(clippy::too_many_arguments)]
pub(super) fn decode<T: Element>(
    device: &CudaDevice<T>,
    layer: usize,
    shape: AttentionShape,
    step: &CudaStep,
    rope: &CudaRope,
    store: &mut CudaKvStore<T>,
    qkv: MatRef<'_, CudaDevice<T>>,
    order: Option<&CudaOrder>,
    y: MatMut<'_, CudaDevice<T>>,
    workspace: &mut Workspace<CudaDevice<T>>,
) -> Result<(), KernelError> {
    check(layer, shape, step, store, (qkv.rows(), qkv.cols()))?;
    rope.check(shape.head_dim, step.end())?;
    expect_shape("y", (y.rows(), y.cols()), (step.rows(), shape.out_features()))?;
    if step.rows() == 0 {
        return Ok(());
    }
    if let Some(order) = order {
        order.check(shape.out_features())?;
    }
    let unfit = KernelError::Argument { what: "rows", got: step.rows(), limit: MOST_BLOCKS + 1 };
    let kernels = device.attention_kernels(shape.head_dim, store.format())?;
    let split = decoding(device, step, shape, store.format());
    let (kernel, split) = kernels.decode.as_ref().zip(split).ok_or(unfit)?;
    let partials = workspace.take(workspace_len(device, step, shape))?;
    let y_stride = y.row_stride();
    let y = y.into_data();
    let mut args = args(layer, shape, step, store, &qkv, y.address(), y_stride);
    (args.cos, args.sin, args.chunks) = (rope.cos(), rope.sin(), chunks(step, shape) as u32);
    args.places = order.map_or(0, CudaOrder::places);
    (args.kept, args.stages) = (split.kept as u32, split.stages as u32);
    args.partials = if CudaDevice::<T>::len_mut(&partials) > 0 { partials.address() } else { 0 };
    let grid = (split.blocks as u32, (step.rows() * parts(shape)) as u32);
    let cluster = if split.kept > 0 { grid.0 } else { 1 };
    let launch = Launch { cluster, ..device.shape(grid, THREADS, split.shared) };
    // SAFETY: as in `prefill`; besides, `rope` has all positions, the partial sums have room for every chunk and the step's
    // tickets for every row; the places are columns of y; shared memory is as `Split` says. Keys and values of earlier steps and the step are read ahead of the wait: no kernel of this
    // step writes them, and its first waits for everything before.
    unsafe { kernel.launch("attention_decode", launch, y.stream(), &mut args) }
}
