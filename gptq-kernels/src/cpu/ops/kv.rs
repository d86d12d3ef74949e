use rayon::prelude::*;

use super::step::{CpuStep, PAGE_LEN, PageWrite};
use crate::{AttentionShape, KernelError, KvShape};

/// Lanes that a row of values is padded to.
pub(super) const LANES: usize = 16;

/// Keys and values of every layer in pages.
///
/// A page of keys of one head is stored transposed, `(head_dim, PAGE_LEN)`, so that scores of neighbouring keys lie
/// side by side in a vector register; a page of values is `(PAGE_LEN, padded head_dim)`. Both are summed in the order
/// of the head's features and of the positions, which makes each score and output independent of the vector width and
/// of what else is computed.
pub struct CpuKvStore {
    shape: KvShape,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl CpuKvStore {
    pub(super) fn new(shape: KvShape) -> Result<Self, KernelError> {
        let mut store = Self { shape: KvShape { pages: 0, ..shape }, keys: Vec::new(), values: Vec::new() };
        store.keys.resize(shape.layers, Vec::new());
        store.values.resize(shape.layers, Vec::new());
        store.grow(shape.pages)?;
        Ok(store)
    }

    pub(super) fn grow(&mut self, pages: usize) -> Result<(), KernelError> {
        if pages <= self.shape.pages {
            return Ok(());
        }
        let (key_len, value_len) = (self.key_page() * pages, self.value_page() * pages);
        for (buffers, len) in [(&mut self.keys, key_len), (&mut self.values, value_len)] {
            for buffer in buffers {
                buffer
                    .try_reserve_exact(len - buffer.len())
                    .map_err(|_| KernelError::OutOfMemory { elements: len })?;
                buffer.resize(len, 0.0);
            }
        }
        self.shape.pages = pages;
        Ok(())
    }

    pub(super) fn padded_head_dim(&self) -> usize {
        self.shape.head_dim.next_multiple_of(LANES)
    }

    /// Elements of a page of keys, all heads.
    fn key_page(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim * PAGE_LEN
    }

    /// Elements of a page of values, all heads.
    fn value_page(&self) -> usize {
        self.shape.kv_heads * self.padded_head_dim() * PAGE_LEN
    }

    /// `(head_dim, PAGE_LEN)`
    pub(super) fn keys(&self, layer: usize, page: usize, head: usize) -> &[f32] {
        let len = self.shape.head_dim * PAGE_LEN;
        &self.keys[layer][page * self.key_page() + head * len..][..len]
    }

    /// `(PAGE_LEN, padded head_dim)`
    pub(super) fn values(&self, layer: usize, page: usize, head: usize) -> &[f32] {
        let len = self.padded_head_dim() * PAGE_LEN;
        &self.values[layer][page * self.value_page() + head * len..][..len]
    }

    pub(super) fn check(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &CpuStep,
    ) -> Result<(), KernelError> {
        let pages = self.shape.pages;
        let argument = |what, got, limit| Err(KernelError::Argument { what, got, limit });
        if layer >= self.shape.layers {
            return argument("layer", layer, self.shape.layers);
        }
        if shape.kv_heads != self.shape.kv_heads {
            return argument("kv_heads", shape.kv_heads, self.shape.kv_heads + 1);
        }
        if shape.head_dim != self.shape.head_dim {
            return argument("head_dim", shape.head_dim, self.shape.head_dim + 1);
        }
        if let Some(&page) = step.pages.iter().find(|&&page| page as usize >= pages) {
            return argument("page", page as usize, pages);
        }
        Ok(())
    }

    /// Writes the keys and values of `qkv` (rows of `stride` elements) to their pages. The arguments have been checked.
    pub(super) fn append(
        &mut self,
        layer: usize,
        shape: AttentionShape,
        step: &CpuStep,
        qkv: &[f32],
        stride: usize,
    ) {
        let (key_page, value_page) = (self.key_page(), self.value_page());
        let padded = self.padded_head_dim();
        let key_offset = shape.heads * shape.head_dim;
        let value_offset = key_offset + shape.kv_heads * shape.head_dim;
        let copy = |write: &PageWrite, keys: &mut [f32], values: &mut [f32]| {
            for head in 0..shape.kv_heads {
                let keys = &mut keys[head * shape.head_dim * PAGE_LEN..];
                let values = &mut values[head * padded * PAGE_LEN..];
                for i in 0..write.rows {
                    let row = &qkv[(write.row + i) * stride..];
                    let slot = write.slot + i;
                    let key = &row[key_offset + head * shape.head_dim..][..shape.head_dim];
                    for (d, &k) in key.iter().enumerate() {
                        keys[d * PAGE_LEN + slot] = k;
                    }
                    let value = &row[value_offset + head * shape.head_dim..][..shape.head_dim];
                    values[slot * padded..][..shape.head_dim].copy_from_slice(value);
                }
            }
        };
        let (keys, values) = (&mut self.keys[layer], &mut self.values[layer]);
        if step.rows() < PAGE_LEN {
            for write in &step.writes {
                copy(
                    write,
                    &mut keys[write.page * key_page..][..key_page],
                    &mut values[write.page * value_page..][..value_page],
                );
            }
            return;
        }
        // Writes are sorted by page and no page occurs twice, so one walk hands out disjoint parts.
        let mut jobs = Vec::with_capacity(step.writes.len());
        let (mut keys, mut values, mut next) = (keys.as_mut_slice(), values.as_mut_slice(), 0);
        for write in &step.writes {
            let skip = write.page - next;
            let (key, key_rest) = keys[skip * key_page..].split_at_mut(key_page);
            let (value, value_rest) = values[skip * value_page..].split_at_mut(value_page);
            jobs.push((write, key, value));
            (keys, values, next) = (key_rest, value_rest, write.page + 1);
        }
        jobs.into_par_iter().for_each(|(write, key, value)| copy(write, key, value));
    }
}
