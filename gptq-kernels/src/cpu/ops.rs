//! The operations of a decoder on the CPU.

mod attention;
mod bytes;
mod embedding;
mod isa;
mod kv;
mod math;
mod order;
mod rope;
mod step;

pub use embedding::CpuEmbedding;
pub use kv::CpuKvStore;
pub use order::CpuOrder;
pub use rope::CpuRope;
pub use step::CpuStep;

use std::sync::PoisonError;

use rayon::prelude::*;

use super::Cpu;
use crate::{
    AttentionShape, Backend, DenseWeight, KernelError, KvShape, LinearKernel, MatMut, MatRef, StepPlan,
    Workspace, matrix::expect_shape,
};

/// Elements below which a row operation stays on the calling thread: waking another costs some microseconds.
const PARALLEL_ELEMENTS: usize = 1 << 16;

/// Runs `f(row, columns of y)` for each row, in parallel if there is enough to do.
fn for_each_row(mut y: MatMut<'_, Cpu>, f: impl Fn(usize, &mut [f32]) + Sync) {
    let (rows, cols, stride) = (y.rows(), y.cols(), y.row_stride().max(1));
    let run = |(r, row): (usize, &mut [f32])| f(r, &mut row[..cols]);
    if rows * cols < PARALLEL_ELEMENTS {
        y.data().chunks_mut(stride).take(rows).enumerate().for_each(run);
    } else {
        y.data().par_chunks_mut(stride).take(rows).with_min_len(4).enumerate().for_each(run);
    }
}

/// Row `r` of `x`.
fn row<'a>(x: &MatRef<'a, Cpu>, r: usize) -> &'a [f32] {
    &x.data()[r * x.row_stride()..][..x.cols()]
}

/// `y = x / rms(x) * weight`, with `x` in the order of `y`, if it has one.
fn normalise(x: &[f32], weight: &[f32], eps: f32, order: Option<&CpuOrder>, y: &mut [f32]) {
    let Some(order) = order else { return math::rms_norm(x, weight, eps, y) };
    let scale = math::rms_scale(x, eps);
    for ((y, x), w) in y.iter_mut().zip(order.of(x)).zip(weight) {
        *y = (x * scale) * w;
    }
}

impl Backend for Cpu {
    type Embedding = CpuEmbedding;
    type Rope = CpuRope;
    type KvStore = CpuKvStore;
    type Step = CpuStep;
    type Recordings = ();
    type Order = CpuOrder;

    const PAGE_LEN: usize = step::PAGE_LEN;

    /// On a thread of the pool, an operation starts without another thread having to be woken first.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        rayon::scope(|_| work())
    }

    fn kernels(&self) -> Vec<Box<dyn LinearKernel<Self>>> {
        super::kernels()
    }

    fn embedding(&self, weight: &DenseWeight<'_>) -> Result<CpuEmbedding, KernelError> {
        CpuEmbedding::new(weight)
    }

    fn rope(&self, cos: &[f32], sin: &[f32], head_dim: usize) -> Result<CpuRope, KernelError> {
        CpuRope::new(cos, sin, head_dim)
    }

    fn kv_store(&self, shape: KvShape) -> Result<CpuKvStore, KernelError> {
        CpuKvStore::new(shape)
    }

    fn kv_page_bytes(&self, shape: KvShape) -> usize {
        kv::page_bytes(shape)
    }

    fn grow_kv(&self, store: &mut CpuKvStore, pages: usize) -> Result<(), KernelError> {
        store.grow(pages)
    }

    fn new_step(&self) -> Result<CpuStep, KernelError> {
        Ok(CpuStep::default())
    }

    fn set_step(&self, step: &mut CpuStep, plan: &StepPlan<'_>) -> Result<(), KernelError> {
        step.fill(plan)
    }

    fn embed(
        &self,
        table: &CpuEmbedding,
        step: &CpuStep,
        mut y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        expect_shape("y", (y.rows(), y.cols()), (step.rows(), table.hidden()))?;
        let stride = y.row_stride();
        table.gather(step, y.data(), stride)
    }

    fn order(&self, order: &[u32]) -> Result<CpuOrder, KernelError> {
        CpuOrder::new(order)
    }

    fn reorder(&self, order: &CpuOrder, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        order.check(y.cols())?;
        for_each_row(y, |_, y| order.reorder(y));
        Ok(())
    }

    fn rms_norm(
        &self,
        x: MatRef<'_, Self>,
        weight: &[f32],
        eps: f32,
        order: Option<&CpuOrder>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        expect_shape("weight", (1, weight.len()), (1, x.cols()))?;
        expect_shape("y", (y.rows(), y.cols()), (x.rows(), x.cols()))?;
        order.map_or(Ok(()), |order| order.check(x.cols()))?;
        for_each_row(y, |r, y| normalise(row(&x, r), weight, eps, order, y));
        Ok(())
    }

    fn add_rms_norm(
        &self,
        mut residual: MatMut<'_, Self>,
        delta: MatRef<'_, Self>,
        weight: &[f32],
        eps: f32,
        order: Option<&CpuOrder>,
        mut y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        let shape = (delta.rows(), delta.cols());
        order.map_or(Ok(()), |order| order.check(shape.1))?;
        expect_shape("weight", (1, weight.len()), (1, shape.1))?;
        expect_shape("residual", (residual.rows(), residual.cols()), shape)?;
        expect_shape("y", (y.rows(), y.cols()), shape)?;
        let (rows, cols) = shape;
        let (x_stride, y_stride) = (residual.row_stride().max(1), y.row_stride().max(1));
        let run = |(r, (x, y)): (usize, (&mut [f32], &mut [f32]))| match order {
            Some(_) => {
                math::add(row(&delta, r), &mut x[..cols]);
                normalise(&x[..cols], weight, eps, order, &mut y[..cols]);
            }
            None => math::add_rms_norm(&mut x[..cols], row(&delta, r), weight, eps, &mut y[..cols]),
        };
        let (x, y) = (residual.data(), y.data());
        if rows * cols < PARALLEL_ELEMENTS {
            x.chunks_mut(x_stride).zip(y.chunks_mut(y_stride)).take(rows).enumerate().for_each(run);
        } else {
            let x = x.par_chunks_mut(x_stride);
            let y = y.par_chunks_mut(y_stride);
            x.zip(y).take(rows).with_min_len(4).enumerate().for_each(run);
        }
        Ok(())
    }

    fn add(&self, x: MatRef<'_, Self>, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        expect_shape("y", (y.rows(), y.cols()), (x.rows(), x.cols()))?;
        for_each_row(y, |r, y| math::add(row(&x, r), y));
        Ok(())
    }

    fn rope_append(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &CpuStep,
        rope: &CpuRope,
        mut qkv: MatMut<'_, Self>,
        store: &mut CpuKvStore,
    ) -> Result<(), KernelError> {
        expect_shape("qkv", (qkv.rows(), qkv.cols()), (step.rows(), shape.qkv_features()))?;
        rope.check(shape, step)?;
        store.check(layer, shape, step)?;
        let stride = qkv.row_stride();
        rope.rotate(shape, step, qkv.data(), stride);
        store.append(layer, shape, step, qkv.data(), stride);
        Ok(())
    }

    fn attention_workspace_len(&self, step: &CpuStep, shape: AttentionShape) -> usize {
        step.rows() * shape.out_features()
    }

    fn attention(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &CpuStep,
        store: &CpuKvStore,
        qkv: MatRef<'_, Self>,
        mut y: MatMut<'_, Self>,
        workspace: &mut Workspace<Self>,
    ) -> Result<(), KernelError> {
        let rows = step.rows();
        expect_shape("qkv", (qkv.rows(), qkv.cols()), (rows, shape.qkv_features()))?;
        expect_shape("y", (y.rows(), y.cols()), (rows, shape.out_features()))?;
        store.check(layer, shape, step)?;
        let tiled = workspace.take(self.attention_workspace_len(step, shape))?;
        attention::attention(layer, shape, step, store, qkv.data(), qkv.row_stride(), tiled);
        let stride = y.row_stride();
        attention::untile(shape, step, tiled, y.data(), stride);
        Ok(())
    }

    fn silu_mul(&self, x: MatRef<'_, Self>, y: MatMut<'_, Self>) -> Result<(), KernelError> {
        let width = y.cols();
        expect_shape("x", (x.rows(), x.cols()), (y.rows(), 2 * width))?;
        for_each_row(y, |r, y| {
            let (gate, up) = row(&x, r).split_at(width);
            math::silu_mul(gate, up, y);
        });
        Ok(())
    }

    fn gather_outputs(
        &self,
        step: &CpuStep,
        x: MatRef<'_, Self>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        expect_shape("x", (x.rows(), x.cols()), (step.rows(), y.cols()))?;
        expect_shape("y", (y.rows(), y.cols()), (step.outputs.len(), x.cols()))?;
        for_each_row(y, |i, y| y.copy_from_slice(row(&x, step.outputs[i] as usize)));
        Ok(())
    }

    fn draw(&self, step: &CpuStep, logits: MatRef<'_, Self>) -> Result<(), KernelError> {
        expect_shape("logits", (logits.rows(), logits.cols()), (step.draws.len(), logits.cols()))?;
        let mut drawn = step.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        *drawn = step.draws.iter().enumerate().map(|(r, draw)| draw.token(row(&logits, r))).collect();
        Ok(())
    }

    fn send_drawn(&self, step: &mut CpuStep) -> Result<u64, KernelError> {
        Ok(step.send())
    }

    fn drawn(&self, step: &mut CpuStep, number: u64) -> Result<Vec<Option<u32>>, KernelError> {
        step.sent(number)
    }

    fn argmax(&self, x: MatRef<'_, Self>, out: &mut [Option<u32>]) -> Result<(), KernelError> {
        expect_shape("out", (out.len(), x.cols()), (x.rows(), x.cols()))?;
        for (r, out) in out.iter_mut().enumerate() {
            *out = first_largest(row(&x, r));
        }
        Ok(())
    }
}

/// Index of the largest element, the first of equals; `None` where there is a NaN.
pub(crate) fn first_largest(row: &[f32]) -> Option<u32> {
    let mut best = None;
    for (i, &v) in row.iter().enumerate() {
        match best {
            _ if v.is_nan() => return None,
            Some((_, max)) if v <= max => {}
            _ => best = Some((i as u32, v)),
        }
    }
    best.map(|(i, _)| i)
}
