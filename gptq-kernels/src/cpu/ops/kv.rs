use rayon::prelude::*;

use super::{
    bytes,
    step::{CpuStep, PAGE_LEN, PageWrite},
};
use crate::{AttentionShape, KernelError, KvFormat, KvShape, matrix::expect_below};

/// Lanes that a row of values is padded to.
pub(super) const LANES: usize = 16;

/// Keys and values of every layer in pages.
///
/// A page of keys of one head is stored transposed, `(head_dim, PAGE_LEN)`, so that scores of neighbouring keys lie
/// side by side in a vector register; a page of values is `(PAGE_LEN, padded head_dim)`. Both are summed in the order
/// of the head's features and of the positions, which makes each score and output independent of the vector width and
/// of what else is computed. Bytes lie as floats do, with a scale for each token and head beside them, and become floats page by
/// page when they are read.
pub struct CpuKvStore {
    shape: KvShape,
    keys: Vec<Pages>,
    values: Vec<Pages>,
}

/// Keys or values of one layer: floats, or codes and scales `(pages, heads, PAGE_LEN)`. What the format does not have is empty.
#[derive(Clone, Default)]
struct Pages {
    floats: Vec<f32>,
    codes: Vec<i8>,
    scales: Vec<f32>,
}

/// A page of all heads.
struct PageMut<'a> {
    floats: &'a mut [f32],
    codes: &'a mut [i8],
    scales: &'a mut [f32],
}

/// Elements of a page of all heads.
#[derive(Clone, Copy)]
struct PageLen {
    floats: usize,
    codes: usize,
    scales: usize,
}

impl PageLen {
    fn new(shape: KvShape, features: usize) -> Self {
        let tokens = shape.kv_heads * PAGE_LEN;
        match shape.format {
            KvFormat::Activations => Self { floats: tokens * features, codes: 0, scales: 0 },
            KvFormat::Int8 => Self { floats: 0, codes: tokens * features, scales: tokens },
        }
    }

    fn bytes(self) -> usize {
        (self.floats + self.scales) * size_of::<f32>() + self.codes
    }
}

/// Bytes that a page of every layer takes.
pub(super) fn page_bytes(shape: KvShape) -> usize {
    let values = shape.head_dim.next_multiple_of(LANES);
    let page = PageLen::new(shape, shape.head_dim).bytes() + PageLen::new(shape, values).bytes();
    shape.layers.saturating_mul(page)
}

fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> Result<(), KernelError> {
    let more = len.saturating_sub(buffer.len());
    buffer.try_reserve_exact(more).map_err(|_| KernelError::OutOfMemory { elements: len })?;
    buffer.resize(buffer.len() + more, T::default());
    Ok(())
}

/// The pages of `len` elements that are written. Writes are sorted by page and no page occurs twice, so that one walk hands out
/// disjoint parts.
fn written<'a, T>(
    mut pages: &'a mut [T],
    len: usize,
    writes: &[PageWrite],
) -> impl Iterator<Item = &'a mut [T]> {
    let mut next = 0;
    writes.iter().map(move |write| {
        let (page, rest) = std::mem::take(&mut pages)[(write.page - next) * len..].split_at_mut(len);
        (pages, next) = (rest, write.page + 1);
        page
    })
}

impl Pages {
    fn grow(&mut self, pages: usize, page: PageLen) -> Result<(), KernelError> {
        grow(&mut self.floats, pages * page.floats)?;
        grow(&mut self.codes, pages * page.codes)?;
        grow(&mut self.scales, pages * page.scales)
    }

    fn written<'a>(&'a mut self, page: PageLen, writes: &[PageWrite]) -> impl Iterator<Item = PageMut<'a>> {
        let floats = written(&mut self.floats, page.floats, writes);
        let codes = written(&mut self.codes, page.codes, writes);
        let scales = written(&mut self.scales, page.scales, writes);
        floats.zip(codes).zip(scales).map(|((floats, codes), scales)| PageMut { floats, codes, scales })
    }
}

impl PageMut<'_> {
    /// Stores feature `d` of what is `features` at `place(d)` of head `head`, whose page has `len` elements.
    fn store(
        &mut self,
        format: KvFormat,
        (head, slot): (usize, usize),
        len: usize,
        features: &[f32],
        place: impl Fn(usize) -> usize,
    ) {
        match format {
            KvFormat::Activations => {
                let page = &mut self.floats[head * len..][..len];
                features.iter().enumerate().for_each(|(d, &x)| page[place(d)] = x);
            }
            KvFormat::Int8 => {
                let page = &mut self.codes[head * len..][..len];
                let (scale, inverse) = bytes::grid(features);
                features.iter().enumerate().for_each(|(d, &x)| page[place(d)] = bytes::code(x, inverse));
                self.scales[head * PAGE_LEN + slot] = scale;
            }
        }
    }
}

impl CpuKvStore {
    pub(super) fn new(shape: KvShape) -> Result<Self, KernelError> {
        let layers = vec![Pages::default(); shape.layers];
        let mut store = Self { shape: KvShape { pages: 0, ..shape }, keys: layers.clone(), values: layers };
        store.grow(shape.pages)?;
        Ok(store)
    }

    pub(super) fn grow(&mut self, pages: usize) -> Result<(), KernelError> {
        if pages <= self.shape.pages {
            return Ok(());
        }
        let (key_page, value_page) = (self.key_page(), self.value_page());
        self.keys.iter_mut().try_for_each(|layer| layer.grow(pages, key_page))?;
        self.values.iter_mut().try_for_each(|layer| layer.grow(pages, value_page))?;
        self.shape.pages = pages;
        Ok(())
    }

    pub(super) fn padded_head_dim(&self) -> usize {
        self.shape.head_dim.next_multiple_of(LANES)
    }

    fn key_page(&self) -> PageLen {
        PageLen::new(self.shape, self.shape.head_dim)
    }

    fn value_page(&self) -> PageLen {
        PageLen::new(self.shape, self.padded_head_dim())
    }

    /// Elements of `read` that [`keys`](Self::keys) and [`values`](Self::values) need.
    pub(super) fn read_len(&self) -> usize {
        match self.shape.format {
            KvFormat::Activations => 0,
            KvFormat::Int8 => self.padded_head_dim() * PAGE_LEN,
        }
    }

    /// `(head_dim, PAGE_LEN)`, in `read` if they are not kept as floats.
    pub(super) fn keys<'a>(
        &'a self,
        layer: usize,
        page: usize,
        head: usize,
        read: &'a mut [f32],
    ) -> &'a [f32] {
        let (len, at) = (self.shape.head_dim * PAGE_LEN, page * self.shape.kv_heads + head);
        let layer = &self.keys[layer];
        if self.shape.format == KvFormat::Activations {
            return &layer.floats[at * len..][..len];
        }
        let (read, scales) = (&mut read[..len], &layer.scales[at * PAGE_LEN..][..PAGE_LEN]);
        let codes = layer.codes[at * len..][..len].chunks_exact(PAGE_LEN);
        for (read, codes) in read.chunks_exact_mut(PAGE_LEN).zip(codes) {
            for ((read, &code), &scale) in read.iter_mut().zip(codes).zip(scales) {
                *read = f32::from(code) * scale;
            }
        }
        read
    }

    /// `(PAGE_LEN, padded head_dim)`, in `read` if they are not kept as floats.
    pub(super) fn values<'a>(
        &'a self,
        layer: usize,
        page: usize,
        head: usize,
        read: &'a mut [f32],
    ) -> &'a [f32] {
        let padded = self.padded_head_dim();
        let (len, at) = (padded * PAGE_LEN, page * self.shape.kv_heads + head);
        let layer = &self.values[layer];
        if self.shape.format == KvFormat::Activations {
            return &layer.floats[at * len..][..len];
        }
        let (read, scales) = (&mut read[..len], &layer.scales[at * PAGE_LEN..][..PAGE_LEN]);
        let codes = layer.codes[at * len..][..len].chunks_exact(padded);
        for ((read, codes), &scale) in read.chunks_exact_mut(padded).zip(codes).zip(scales) {
            for (read, &code) in read.iter_mut().zip(codes) {
                *read = f32::from(code) * scale;
            }
        }
        read
    }

    pub(super) fn check(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &CpuStep,
    ) -> Result<(), KernelError> {
        self.shape.expect(layer, shape)?;
        step.pages.iter().try_for_each(|&page| expect_below("page", page as usize, self.shape.pages))
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
        let (format, dim, padded) = (self.shape.format, shape.head_dim, self.padded_head_dim());
        let key_offset = shape.heads * dim;
        let value_offset = key_offset + shape.kv_heads * dim;
        let copy = |(write, (mut keys, mut values)): (&PageWrite, (PageMut<'_>, PageMut<'_>))| {
            for head in 0..shape.kv_heads {
                for i in 0..write.rows {
                    let row = &qkv[(write.row + i) * stride..];
                    let slot = write.slot + i;
                    let key = &row[key_offset + head * dim..][..dim];
                    keys.store(format, (head, slot), dim * PAGE_LEN, key, |d| d * PAGE_LEN + slot);
                    let value = &row[value_offset + head * dim..][..dim];
                    values.store(format, (head, slot), padded * PAGE_LEN, value, |d| slot * padded + d);
                }
            }
        };
        let keys = self.keys[layer].written(key_page, &step.writes);
        let pages = keys.zip(self.values[layer].written(value_page, &step.writes));
        let jobs = step.writes.iter().zip(pages);
        if step.rows() < PAGE_LEN {
            jobs.for_each(copy);
        } else {
            jobs.collect::<Vec<_>>().into_par_iter().for_each(copy);
        }
    }
}
