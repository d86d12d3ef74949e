use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::{IMAGE, SingleStep, expect_below, get_or_load, launch, step::PAGE_LEN};
use crate::{
    AttentionShape, KernelError, KvFormat, KvShape, MatMut, MatRef,
    cuda::{
        CudaDevice, CudaRope,
        driver::{Function, zeros},
        failure::gpu_error,
    },
    matrix::expect_shape,
};

/// Features of a head that attention kernels are made for; other heads are padded with zeros to the next.
pub(super) const DIMS: [usize; 3] = [64, 128, 256];
const ENTRIES: [&str; 3] = ["attention_64", "attention_128", "attention_256"];
/// Threads of the attention kernels and of `rope_append`, as in the sources.
const THREADS: u32 = 128;
const ROPE_THREADS: u32 = 256;

/// Keys and values of every layer in float32, in pages: both `(pages, kv_heads, PAGE_LEN, head_dim)`.
pub struct SingleKvStore {
    shape: KvShape,
    /// Keys and values of each layer.
    layers: Vec<[CudaSlice<f32>; 2]>,
}

/// Bytes that a page of keys and values of every layer takes.
pub(super) fn page_bytes(shape: KvShape) -> usize {
    2 * shape.layers * shape.kv_heads * PAGE_LEN * shape.head_dim * size_of::<f32>()
}

impl SingleKvStore {
    pub(super) fn new(stream: &Arc<CudaStream>, shape: KvShape) -> Result<Self, KernelError> {
        if shape.format != KvFormat::Activations {
            let message = "with activations in float32, keys and values are kept in float32".into();
            return Err(KernelError::Gpu { during: "making a key-value store", message });
        }
        expect_below("head_dim", shape.head_dim, DIMS[DIMS.len() - 1] + 1)?;
        let empty = |_| Ok([zeros(stream, 0)?, zeros(stream, 0)?]);
        let layers = (0..shape.layers).map(empty).collect::<Result<_, KernelError>>()?;
        let mut store = Self { shape: KvShape { pages: 0, ..shape }, layers };
        store.grow(stream, shape.pages)?;
        Ok(store)
    }

    /// A store that cannot grow keeps what has grown: it is larger than it says, and as good.
    pub(super) fn grow(&mut self, stream: &Arc<CudaStream>, pages: usize) -> Result<(), KernelError> {
        let KvShape { kv_heads, head_dim, pages: old, .. } = self.shape;
        if pages <= old {
            return Ok(());
        }
        let page = kv_heads * PAGE_LEN * head_dim;
        for slice in self.layers.iter_mut().flatten() {
            if slice.len() >= pages * page {
                continue;
            }
            let mut larger = zeros(stream, pages * page)?;
            if old > 0 {
                let (from, mut to) = (slice.slice(..old * page), larger.slice_mut(..old * page));
                let copied = stream.memcpy_dtod(&from, &mut to);
                copied.map_err(|error| gpu_error("growing the key-value store", error))?;
            }
            *slice = larger;
        }
        self.shape.pages = pages;
        Ok(())
    }

    fn addresses(&self, stream: &Arc<CudaStream>, layer: usize) -> [u64; 2] {
        self.layers[layer].each_ref().map(|slice| slice.device_ptr(stream).0)
    }

    /// Fails unless the store has this layer, heads of this shape and the pages of the step, and qkv fits it.
    fn check(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &SingleStep,
        qkv: (usize, usize),
    ) -> Result<(), KernelError> {
        expect_shape("qkv", qkv, (step.rows(), shape.qkv_features()))?;
        self.shape.expect(layer, shape)?;
        if shape.kv_heads == 0 || shape.heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
            let (got, limit) = (shape.kv_heads, shape.heads + 1);
            return Err(KernelError::Argument { what: "kv_heads", got, limit });
        }
        self.shape.expect_pages(step.pages_end())
    }
}

/// `RopeArgs` of `single.cu`.
#[repr(C)]
struct RopeArgs {
    qkv: u64,
    keys: u64,
    values: u64,
    positions: u64,
    page_bases: u64,
    pages: u64,
    cos: u64,
    sin: u64,
    stride: u64,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
}

/// `AttentionArgs` of `single_attention.cuh`.
#[repr(C)]
struct AttentionArgs {
    qkv: u64,
    keys: u64,
    values: u64,
    y: u64,
    tiles: u64,
    pages: u64,
    stride: u64,
    y_stride: u64,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    vectors: u32,
    scale: f32,
}

pub(super) fn rope_append(
    device: &CudaDevice<f32>,
    layer: usize,
    shape: AttentionShape,
    step: &SingleStep,
    rope: &CudaRope,
    qkv: MatMut<'_, CudaDevice<f32>>,
    store: &mut SingleKvStore,
) -> Result<(), KernelError> {
    store.check(layer, shape, step, (qkv.rows(), qkv.cols()))?;
    rope.check(shape.head_dim, step.end())?;
    if step.rows() == 0 {
        return Ok(());
    }
    let stride = qkv.row_stride() as u64;
    let qkv = qkv.into_data();
    let [keys, values] = store.addresses(device.stream(), layer);
    let mut args = RopeArgs {
        qkv: qkv.address(),
        keys,
        values,
        positions: step.positions(),
        page_bases: step.page_bases(),
        pages: step.pages(),
        cos: rope.cos(),
        sin: rope.sin(),
        stride,
        heads: shape.heads as u32,
        kv_heads: shape.kv_heads as u32,
        head_dim: shape.head_dim as u32,
    };
    let grid = launch((step.rows(), 1), ROPE_THREADS, 0)?;
    // SAFETY: `RopeArgs` field by field; `check` has compared qkv and the store with the step, whose pages and positions
    // are inside of the store and the tables; all are borrowed.
    unsafe { device.rows()?.rope_append.launch("rope_append", grid, qkv.stream(), &mut args) }
}

/// Shared memory of the attention kernel for padded heads of `dim`, as `single_attention.cuh` lays it out.
fn shared(dim: usize) -> usize {
    (2 * 64 * (dim + 4) + 64 * (PAGE_LEN + 4)) * size_of::<f32>()
}

/// The kernel for heads of that size, and the shared memory of a block.
fn kernel(device: &CudaDevice<f32>, head_dim: usize) -> Result<(&Function, usize), KernelError> {
    let index = DIMS.into_iter().position(|dim| head_dim <= dim);
    let most = DIMS[DIMS.len() - 1];
    let too_large = KernelError::Argument { what: "head_dim", got: head_dim, limit: most + 1 };
    let index = index.ok_or(too_large)?;
    let shared = shared(DIMS[index]);
    if shared > device.shared_memory() {
        // GPUs with little shared memory have no room for the largest heads.
        return Err(KernelError::Argument { what: "head_dim", got: head_dim, limit: DIMS[index - 1] + 1 });
    }
    let cell = &device.single().attention[index];
    let function = get_or_load(cell, || device.images().function(IMAGE, ENTRIES[index], shared))?;
    Ok((function, shared))
}

pub(super) fn attention(
    device: &CudaDevice<f32>,
    layer: usize,
    shape: AttentionShape,
    step: &SingleStep,
    store: &SingleKvStore,
    qkv: MatRef<'_, CudaDevice<f32>>,
    y: MatMut<'_, CudaDevice<f32>>,
) -> Result<(), KernelError> {
    store.check(layer, shape, step, (qkv.rows(), qkv.cols()))?;
    expect_shape("y", (y.rows(), y.cols()), (step.rows(), shape.out_features()))?;
    if step.rows() == 0 {
        return Ok(());
    }
    let (function, shared) = kernel(device, shape.head_dim)?;
    let y_stride = y.row_stride() as u64;
    let y = y.into_data();
    let [keys, values] = store.addresses(device.stream(), layer);
    let mut args = AttentionArgs {
        qkv: qkv.data().address(),
        keys,
        values,
        y: y.address(),
        tiles: step.tiles(),
        pages: step.pages(),
        stride: qkv.row_stride() as u64,
        y_stride,
        heads: shape.heads as u32,
        kv_heads: shape.kv_heads as u32,
        head_dim: shape.head_dim as u32,
        // No sequence is as long as the largest window.
        window: shape.window.map_or(0, |window| window.min(i32::MAX as usize) as u32),
        vectors: u32::from(
            qkv.data().address().is_multiple_of(16)
                && qkv.row_stride().is_multiple_of(4)
                && shape.head_dim.is_multiple_of(4),
        ),
        scale: 1.0 / (shape.head_dim as f32).sqrt(),
    };
    let grid = launch((step.tile_count(), shape.heads), THREADS, shared)?;
    // SAFETY: `AttentionArgs` field by field; `check` has compared qkv and the store with the step, whose pages are inside
    // of the store; y was compared; all are borrowed.
    unsafe { function.launch("attention", grid, y.stream(), &mut args) }
}
