//! The GPU as a device with activations in float32: every operation of a decoder, as exact as on the CPU. The kernels are
//! `cuda/single.cu`.
//!
//! It is made for quantising and for measuring, where what activations lose by rounding is more than what is to be seen.
//! Products run on tensor cores all the same ([`linear`]); attention does not, and tokens are drawn by the host.
//!
//! | file | holds |
//! |---|---|
//! | `linear` | `cuda-split-f32`: products of float32 as three products of halves |
//! | `elements` | embedding, norms and what goes element by element |
//! | `attention` | rotation, pages of keys and values, attention |
//! | `step` | tokens, positions and page tables |

mod attention;
mod elements;
pub(super) mod linear;
mod order;
mod step;

use std::sync::OnceLock;

pub use attention::SingleKvStore;
pub use elements::SingleEmbedding;
pub use order::SingleOrder;
pub use step::SingleStep;

use super::{
    CudaDevice, CudaRef, CudaRope,
    driver::{Function, Launch},
    images::get_or_load,
};
use crate::{
    AttentionShape, Backend, DenseWeight, Device, KernelError, KvShape, LinearKernel, MatMut, MatRef,
    StepPlan, Workspace,
    cpu::ops::first_largest,
    matrix::{expect_below, expect_shape},
};

/// Name of the image.
pub(super) const IMAGE: &str = "single";

/// Blocks along y of a grid.
const MOST_BLOCKS: usize = 65_535;

/// The kernels of one device, loaded when first used.
#[derive(Default)]
pub(super) struct Operations {
    rows: OnceLock<RowKernels>,
    attention: [OnceLock<Function>; attention::DIMS.len()],
}

struct RowKernels {
    embed: Function,
    rms_norm: Function,
    add: Function,
    silu_mul: Function,
    gather: Function,
    rope_append: Function,
}

impl CudaDevice<f32> {
    fn rows(&self) -> Result<&RowKernels, KernelError> {
        get_or_load(&self.single().rows, || {
            self.needs((8, 0))
                .map_err(|reason| KernelError::Unsupported { kernel: "decoder operations", reason })?;
            let load = |entry| self.images().function(IMAGE, entry, 0);
            Ok(RowKernels {
                embed: load("embed")?,
                rms_norm: load("rms_norm")?,
                add: load("add")?,
                silu_mul: load("silu_mul")?,
                gather: load("gather")?,
                rope_append: load("rope_append")?,
            })
        })
    }
}

/// A launch of blocks of one dimension or two, which fails if there are too many.
fn launch((x, y): (usize, usize), threads: u32, shared: usize) -> Result<Launch, KernelError> {
    let extent = |blocks: usize, limit: usize| match u32::try_from(blocks) {
        Ok(count) if blocks <= limit => Ok(count),
        _ => Err(KernelError::Argument { what: "blocks of a launch", got: blocks, limit: limit + 1 }),
    };
    let grid = (extent(x, i32::MAX as usize)?, extent(y, MOST_BLOCKS)?);
    Ok(Launch { grid, threads, shared, cluster: 1, programmatic: false })
}

impl Backend for CudaDevice<f32> {
    type Embedding = SingleEmbedding;
    type Rope = CudaRope;
    type KvStore = SingleKvStore;
    type Step = SingleStep;
    type Recordings = ();
    type Order = SingleOrder;

    const PAGE_LEN: usize = step::PAGE_LEN;

    fn kernels(&self) -> Vec<Box<dyn LinearKernel<Self>>> {
        match linear::Split::new(self) {
            Ok(kernel) => vec![Box::new(kernel)],
            Err(reason) => {
                tracing::debug!(kernel = linear::NAME, %reason, "not available on this GPU");
                Vec::new()
            }
        }
    }

    fn embedding(&self, weight: &DenseWeight<'_>) -> Result<SingleEmbedding, KernelError> {
        SingleEmbedding::new(self, weight)
    }

    fn rope(&self, cos: &[f32], sin: &[f32], head_dim: usize) -> Result<CudaRope, KernelError> {
        CudaRope::new(self.stream(), cos, sin, head_dim)
    }

    fn kv_store(&self, shape: KvShape) -> Result<SingleKvStore, KernelError> {
        SingleKvStore::new(self.stream(), shape)
    }

    fn kv_page_bytes(&self, shape: KvShape) -> usize {
        attention::page_bytes(shape)
    }

    fn grow_kv(&self, store: &mut SingleKvStore, pages: usize) -> Result<(), KernelError> {
        store.grow(self.stream(), pages)
    }

    fn new_step(&self) -> Result<SingleStep, KernelError> {
        SingleStep::new(self.stream())
    }

    fn set_step(&self, step: &mut SingleStep, plan: &StepPlan<'_>) -> Result<(), KernelError> {
        step.fill(self.stream(), plan)
    }

    fn embed(
        &self,
        table: &SingleEmbedding,
        step: &SingleStep,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        elements::embed(self, table, step, y)
    }

    fn order(&self, order: &[u32]) -> Result<SingleOrder, KernelError> {
        SingleOrder::new(order)
    }

    /// On the host; waits. No kernel of this device asks for an order.
    fn reorder(&self, order: &SingleOrder, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        order.reorder(self, y)
    }

    fn rms_norm(
        &self,
        x: MatRef<'_, Self>,
        weight: CudaRef<'_, f32>,
        eps: f32,
        order: Option<&SingleOrder>,
        mut y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        let x = (x.data().address(), x.row_stride(), x.rows(), x.cols());
        let Some(order) = order else { return elements::norm(self, x, None, (weight, eps), y) };
        let natural = order.undone(self, weight, x.3)?;
        elements::norm(self, x, None, (CudaDevice::slice(&natural, 0..x.3), eps), y.reborrow())?;
        order.reorder(self, y)
    }

    fn add_rms_norm(
        &self,
        residual: MatMut<'_, Self>,
        delta: MatRef<'_, Self>,
        weight: CudaRef<'_, f32>,
        eps: f32,
        order: Option<&SingleOrder>,
        mut y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        let (stride, rows, cols) = (residual.row_stride(), residual.rows(), residual.cols());
        let x = (residual.into_data().address(), stride, rows, cols);
        let Some(order) = order else { return elements::norm(self, x, Some(delta), (weight, eps), y) };
        let natural = order.undone(self, weight, cols)?;
        let weight = CudaDevice::slice(&natural, 0..cols);
        elements::norm(self, x, Some(delta), (weight, eps), y.reborrow())?;
        order.reorder(self, y)
    }

    fn add(&self, x: MatRef<'_, Self>, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        elements::add(self, x, y)
    }

    fn rope_append(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &SingleStep,
        rope: &CudaRope,
        qkv: MatMut<'_, Self>,
        store: &mut SingleKvStore,
    ) -> Result<(), KernelError> {
        attention::rope_append(self, layer, shape, step, rope, qkv, store)
    }

    fn attention_workspace_len(&self, _: &SingleStep, _: AttentionShape) -> usize {
        0
    }

    fn attention(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &SingleStep,
        store: &SingleKvStore,
        qkv: MatRef<'_, Self>,
        y: MatMut<'_, Self>,
        _: &mut Workspace<Self>,
    ) -> Result<(), KernelError> {
        attention::attention(self, layer, shape, step, store, qkv, y)
    }

    fn silu_mul(&self, x: MatRef<'_, Self>, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        elements::silu_mul(self, x, y)
    }

    fn gather_outputs(
        &self,
        step: &SingleStep,
        x: MatRef<'_, Self>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        elements::gather_outputs(self, step, x, y)
    }

    /// On the host; waits.
    fn draw(&self, step: &SingleStep, logits: MatRef<'_, Self>) -> Result<(), KernelError> {
        step.draw(logits.cols(), &self.host_rows(logits)?, logits.rows())
    }

    fn send_drawn(&self, step: &mut SingleStep) -> Result<u64, KernelError> {
        Ok(step.send())
    }

    fn drawn(&self, step: &mut SingleStep, number: u64) -> Result<Vec<Option<u32>>, KernelError> {
        step.sent(number)
    }

    fn argmax(&self, x: MatRef<'_, Self>, out: &mut [Option<u32>]) -> Result<(), KernelError> {
        let (rows, cols) = (x.rows(), x.cols());
        expect_shape("out", (out.len(), cols), (rows, cols))?;
        let logits = self.host_rows(x)?;
        for (r, out) in out.iter_mut().enumerate() {
            *out = first_largest(&logits[r * cols..][..cols]);
        }
        Ok(())
    }
}

impl CudaDevice<f32> {
    /// The rows of a matrix on the host, one behind the other.
    fn host_rows(&self, x: MatRef<'_, Self>) -> Result<Vec<f32>, KernelError> {
        let (rows, cols, stride) = (x.rows(), x.cols(), x.row_stride());
        let data = x.data();
        let mut values = vec![0.0; <Self as Device>::len(&data)];
        self.download(data, &mut values)?;
        if stride == cols || rows <= 1 {
            values.truncate(rows * cols);
            return Ok(values);
        }
        Ok((0..rows).flat_map(|r| values[r * stride..][..cols].iter().copied()).collect())
    }
}
