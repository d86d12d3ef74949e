//! The operations of a decoder on a GPU. The kernels are `cuda/ops.cu` and `cuda/attention.cu`.
//!
//! # Equal bits
//!
//! Every operation computes a row from that row, and attention a query from its own sequence, in an order that depends on
//! columns and positions alone: in any batch, however the prompt is cut into steps, and for one token or many, the bits are
//! the same. That holds between the two attention kernels too, because both do a page of 64 keys with the same
//! instructions and merge pages in the order of their positions.
//!
//! # Recording
//!
//! A step in which every sequence has one row is recorded in a CUDA graph when its shape comes for the second time, and
//! replayed from then on. The shape is the number of rows and of outputs and the number of chunks of 256 positions,
//! rounded up to a power of two, and whether tokens are drawn. Everything else is read from device memory.
//!
//! # Drawing
//!
//! Tokens are drawn by the last kernel of a step, which also writes them to page-locked memory of the host; in a greedy step of
//! single rows it turns the step's positions into those of the next one. The host then begins the next step before it
//! knows the tokens, and waits for an event between the two. The law of the draws is [`crate::Draw`]'s, to the bit.

mod attention;
mod drawn;
mod element;
mod functions;
mod kv;
mod order;
mod recording;
mod split;
mod step;
mod tables;

pub use kv::CudaKvStore;
pub use order::CudaOrder;
pub use recording::CudaRecordings;
pub use step::CudaStep;
pub use tables::{CudaEmbedding, CudaRope};

pub(super) use functions::Operations;

use super::{CudaDevice, CudaRef, Element};
use crate::{
    AttentionShape, Backend, DenseWeight, KernelError, KvShape, Linear, LinearKernel, MatMut, MatRef,
    StepPlan, Workspace,
    matrix::{expect_below, expect_shape},
};

impl<T: Element> Backend for CudaDevice<T> {
    type Embedding = CudaEmbedding;
    type Rope = CudaRope;
    type KvStore = CudaKvStore<T>;
    type Step = CudaStep;
    type Recordings = CudaRecordings;
    type Order = CudaOrder;

    const PAGE_LEN: usize = step::PAGE_LEN;
    const QUEUES: bool = true;

    fn replay<E: From<KernelError> + Send>(
        &self,
        recordings: &mut CudaRecordings,
        owner: u64,
        step: &CudaStep,
        work: impl FnOnce() -> Result<(), E> + Send,
    ) -> Result<(), E> {
        recordings.replay(self.stream(), owner, step, work)
    }

    fn kernels(&self) -> Vec<Box<dyn LinearKernel<Self>>> {
        super::kernels(self)
    }

    fn embedding(&self, weight: &DenseWeight<'_>) -> Result<CudaEmbedding, KernelError> {
        CudaEmbedding::new(self, weight)
    }

    fn rope(&self, cos: &[f32], sin: &[f32], head_dim: usize) -> Result<CudaRope, KernelError> {
        CudaRope::new(self.stream(), cos, sin, head_dim)
    }

    fn kv_store(&self, shape: KvShape) -> Result<CudaKvStore<T>, KernelError> {
        CudaKvStore::new(self.stream(), shape)
    }

    fn kv_page_bytes(&self, shape: KvShape) -> usize {
        kv::page_bytes(shape)
    }

    fn grow_kv(&self, store: &mut CudaKvStore<T>, pages: usize) -> Result<(), KernelError> {
        store.grow(self.stream(), pages)
    }

    fn new_step(&self) -> Result<CudaStep, KernelError> {
        CudaStep::new(self.stream())
    }

    fn set_step(&self, step: &mut CudaStep, plan: &StepPlan<'_>) -> Result<(), KernelError> {
        step.fill(self.stream(), plan)
    }

    fn embed(&self, table: &CudaEmbedding, step: &CudaStep, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        element::embed(self, table, step, y)
    }

    fn order(&self, order: &[u32]) -> Result<CudaOrder, KernelError> {
        CudaOrder::new(self, order)
    }

    fn reorder(&self, order: &CudaOrder, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        order::reorder(self, order, y)
    }

    fn rms_norm(
        &self,
        x: MatRef<'_, Self>,
        weight: CudaRef<'_, T>,
        eps: f32,
        order: Option<&CudaOrder>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        element::rms_norm(self, None, x, weight, eps, order, y)
    }

    fn rms_norm_for(
        &self,
        next: Option<&dyn Linear<Self>>,
        x: MatRef<'_, Self>,
        weight: CudaRef<'_, T>,
        eps: f32,
        order: Option<&CudaOrder>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        element::rms_norm(self, next.and_then(Linear::read_first), x, weight, eps, order, y)
    }

    fn add_rms_norm(
        &self,
        residual: MatMut<'_, Self>,
        delta: MatRef<'_, Self>,
        weight: CudaRef<'_, T>,
        eps: f32,
        order: Option<&CudaOrder>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        element::add_rms_norm(self, residual, delta, weight, eps, order, y)
    }

    fn add(&self, x: MatRef<'_, Self>, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        element::add(self, x, y)
    }

    fn rope_append(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &CudaStep,
        rope: &CudaRope,
        qkv: MatMut<'_, Self>,
        store: &mut CudaKvStore<T>,
    ) -> Result<(), KernelError> {
        attention::rope_append(self, layer, shape, step, rope, qkv, store)
    }

    fn attention_workspace_len(&self, step: &CudaStep, shape: AttentionShape) -> usize {
        attention::workspace_len(self, step, shape)
    }

    fn attention(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &CudaStep,
        store: &CudaKvStore<T>,
        qkv: MatRef<'_, Self>,
        y: MatMut<'_, Self>,
        _: &mut Workspace<Self>,
    ) -> Result<(), KernelError> {
        attention::prefill(self, layer, shape, step, store, qkv, y)
    }

    fn attend(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &CudaStep,
        rope: &CudaRope,
        mut qkv: MatMut<'_, Self>,
        store: &mut CudaKvStore<T>,
        order: Option<&CudaOrder>,
        mut y: MatMut<'_, Self>,
        workspace: &mut Workspace<Self>,
    ) -> Result<(), KernelError> {
        // Places of the kernel for single rows are 16-bit numbers.
        let has_places = order.is_none() || shape.out_features() <= 1 << 16;
        if has_places && attention::decodes(self, step, shape, store) {
            return attention::decode(
                self,
                layer,
                shape,
                step,
                rope,
                store,
                qkv.as_ref(),
                order,
                y,
                workspace,
            );
        }
        attention::rope_append(self, layer, shape, step, rope, qkv.reborrow(), store)?;
        attention::prefill(self, layer, shape, step, store, qkv.as_ref(), y.reborrow())?;
        // Lanes have pairs of columns, which one by one would go to as many sectors.
        match order {
            Some(order) => self.reorder(order, y),
            None => Ok(()),
        }
    }

    fn silu_mul(&self, x: MatRef<'_, Self>, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        element::silu_mul(self, x, y)
    }

    fn gather_outputs(
        &self,
        step: &CudaStep,
        x: MatRef<'_, Self>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        element::gather_outputs(self, step, x, y)
    }

    fn draw(&self, step: &CudaStep, logits: MatRef<'_, Self>) -> Result<(), KernelError> {
        element::draw(self, step, logits)
    }

    fn send_drawn(&self, step: &mut CudaStep) -> Result<u64, KernelError> {
        let count = step.draw_count();
        step.drawn_mut().send(count)
    }

    fn drawn(&self, step: &mut CudaStep, number: u64) -> Result<Vec<Option<u32>>, KernelError> {
        step.drawn_mut().sent(number)
    }

    fn argmax(&self, x: MatRef<'_, Self>, out: &mut [Option<u32>]) -> Result<(), KernelError> {
        element::argmax(self, x, out)
    }
}
