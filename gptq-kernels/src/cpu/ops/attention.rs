//! Causal attention over the paged store.
//!
//! A task is a tile of up to eight rows of one sequence and one key-value head; its "queries" are all query heads of
//! the group in all rows of the tile. It computes the scores of all its queries with the keys page by page, their
//! softmax, and the weighted sum of the values, all in float32. Every score is a sum over features in order, every
//! output a sum over positions in order, so neither tiles, nor batch, nor threads change a bit.

mod micro;
#[cfg(test)]
mod tests;

use std::{cell::RefCell, ops::Range};

use super::{
    isa::{MulAdd, multiversion},
    kv::CpuKvStore,
    math::softmax_numerators,
    step::{CpuStep, PAGE_LEN, Tile},
};
use crate::AttentionShape;

/// Multiply-adds below which splitting the work over threads costs more than it gains.
const PARALLEL_WORK: usize = 1 << 17;

thread_local! {
    /// Queries, scores and outputs of one task: grows to the largest task of the thread and stays.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// All that tasks read.
struct Attention<'a> {
    layer: usize,
    shape: AttentionShape,
    step: &'a CpuStep,
    store: &'a CpuKvStore,
    qkv: &'a [f32],
    stride: usize,
}

/// Writes the attention of all rows to `tiled`, `(rows * heads * head_dim)`, in the order tile, key-value head, row,
/// query head, feature. The arguments have been checked.
pub(super) fn attention(
    layer: usize,
    shape: AttentionShape,
    step: &CpuStep,
    store: &CpuKvStore,
    qkv: &[f32],
    stride: usize,
    tiled: &mut [f32],
) {
    let run = Attention { layer, shape, step, store, qkv, stride };
    let tasks = 0..step.tiles.len() * shape.kv_heads;
    let visible: usize = step.tiles.iter().map(|tile| tile.rows * (tile.position + tile.rows)).sum();
    if visible * shape.out_features() < PARALLEL_WORK {
        run.tasks(tasks, tiled);
    } else {
        run.split(tasks, tiled);
    }
}

/// Copies the output of [`attention`] to `y`, rows of `stride` elements.
pub(super) fn untile(shape: AttentionShape, step: &CpuStep, tiled: &[f32], y: &mut [f32], stride: usize) {
    let width = shape.out_features();
    let part = width / shape.kv_heads;
    for tile in &step.tiles {
        let tiled = &tiled[tile.row * width..][..tile.rows * width];
        for (i, row) in y[tile.row * stride..].chunks_mut(stride).take(tile.rows).enumerate() {
            for (head, row) in row[..width].chunks_exact_mut(part).enumerate() {
                row.copy_from_slice(&tiled[(head * tile.rows + i) * part..][..part]);
            }
        }
    }
}

impl Attention<'_> {
    /// Elements of output that a task writes.
    fn output_len(&self, task: usize) -> usize {
        let tile = &self.step.tiles[task / self.shape.kv_heads];
        tile.rows * self.shape.out_features() / self.shape.kv_heads
    }

    fn split(&self, tasks: Range<usize>, out: &mut [f32]) {
        if tasks.len() <= 1 {
            return self.tasks(tasks, out);
        }
        let middle = tasks.start + tasks.len() / 2;
        let len = (tasks.start..middle).map(|task| self.output_len(task)).sum();
        let (left, right) = out.split_at_mut(len);
        rayon::join(|| self.split(tasks.start..middle, left), || self.split(middle..tasks.end, right));
    }

    fn tasks(&self, tasks: Range<usize>, mut out: &mut [f32]) {
        SCRATCH.with_borrow_mut(|scratch| {
            for task in tasks {
                let (here, rest) = std::mem::take(&mut out).split_at_mut(self.output_len(task));
                out = rest;
                let tile = &self.step.tiles[task / self.shape.kv_heads];
                run_task(self, tile, task % self.shape.kv_heads, scratch, here);
            }
        });
    }

    /// First position that the row at `position` sees.
    fn first_visible(&self, position: usize) -> usize {
        self.shape.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

#[inline(always)]
fn task_body<I: MulAdd>(
    run: &Attention<'_>,
    tile: &Tile,
    kv_head: usize,
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    let dim = run.shape.head_dim;
    let padded = run.store.padded_head_dim();
    let group = run.shape.heads / run.shape.kv_heads;
    let queries = tile.rows * group;
    let first_page = run.first_visible(tile.position) / PAGE_LEN;
    let pages = (tile.position + tile.rows).div_ceil(PAGE_LEN) - first_page;
    let width = pages * PAGE_LEN;
    let origin = first_page * PAGE_LEN;

    let needed = queries * (dim + width + padded) + run.store.read_len();
    if scratch.len() < needed {
        scratch.resize(needed, 0.0);
    }
    let (q, rest) = scratch[..needed].split_at_mut(queries * dim);
    let (scores, rest) = rest.split_at_mut(queries * width);
    let (sums, read) = rest.split_at_mut(queries * padded);

    let scale = 1.0 / (dim as f32).sqrt();
    for (i, q) in q.chunks_exact_mut(dim).enumerate() {
        let (row, head) = (tile.row + i / group, kv_head * group + i % group);
        let source = &run.qkv[row * run.stride + head * dim..][..dim];
        for (q, &x) in q.iter_mut().zip(source) {
            *q = x * scale;
        }
    }

    let table = &run.step.pages[tile.first_page + first_page..][..pages];
    for (i, &page) in table.iter().enumerate() {
        let keys = run.store.keys(run.layer, page as usize, kv_head, read);
        micro::scores::<I>(q, dim, keys, &mut scores[i * PAGE_LEN..], width);
    }

    sums.fill(0.0);
    for (i, scores) in scores.chunks_exact_mut(width).enumerate() {
        let position = tile.position + i / group;
        let first = run.first_visible(position) - origin;
        let end = position + 1 - origin;
        let total = softmax_numerators::<I>(&mut scores[first..end]);
        scores[..first].fill(0.0);
        scores[end..].fill(0.0);
        // The query is not needed any more; its place keeps the denominator.
        q[i * dim] = 1.0 / total;
    }

    // The first row's window begins first and the last row's ends last; outside of them every weight is zero.
    let first = run.first_visible(tile.position) - origin;
    let end = tile.position + tile.rows - origin;
    for (i, &page) in table.iter().enumerate() {
        let keys = first.max(i * PAGE_LEN)..end.min((i + 1) * PAGE_LEN);
        let values = run.store.values(run.layer, page as usize, kv_head, read);
        let values = &values[(keys.start - i * PAGE_LEN) * padded..][..keys.len() * padded];
        micro::weighted_sums::<I>(&scores[keys.start..], width, values, padded, sums);
    }

    for (i, out) in out.chunks_exact_mut(dim).enumerate() {
        let inverse = q[i * dim];
        for (y, &sum) in out.iter_mut().zip(&sums[i * padded..][..dim]) {
            *y = sum * inverse;
        }
    }
}

multiversion! {
    fn run_task = task_body(run: &Attention<'_>, tile: &Tile, kv_head: usize, scratch: &mut Vec<f32>, out: &mut [f32])
}
