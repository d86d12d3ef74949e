use std::{marker::PhantomData, sync::Arc};

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::{expect_below, step::PAGE_LEN};
use crate::{
    AttentionShape, KernelError, KvFormat, KvShape,
    cuda::{Element, driver::zeros, failure::gpu_error},
};

/// Features of a head that attention kernels are made for; other heads are padded with zeros to the next.
pub(super) const DIMS: [usize; 5] = [32, 64, 96, 128, 256];

/// `head_dim` with its padding, `None` if no kernel has it.
pub(super) fn padded_dim(head_dim: usize) -> Option<usize> {
    DIMS.into_iter().find(|&dim| head_dim <= dim)
}

/// Bytes of a page of one head.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageBytes {
    pub(super) keys: usize,
    pub(super) values: usize,
}

impl PageBytes {
    /// As `page.cuh` and `bytes.cuh` have them, `dim` the padded `head_dim`.
    pub(super) fn new(format: KvFormat, dim: usize) -> Self {
        match format {
            KvFormat::Activations => Self { keys: PAGE_LEN * dim * 2, values: PAGE_LEN * dim * 2 },
            // Scales of keys and of values are behind the keys.
            KvFormat::Int8 => {
                Self { keys: PAGE_LEN * dim + 2 * PAGE_LEN * size_of::<f32>(), values: PAGE_LEN * dim }
            }
        }
    }
}

/// Bytes that a page of every layer takes.
pub(super) fn page_bytes(shape: KvShape) -> usize {
    // A head that is too large has no store.
    let page = PageBytes::new(shape.format, padded_dim(shape.head_dim).unwrap_or(shape.head_dim));
    shape.layers.saturating_mul(shape.kv_heads).saturating_mul(page.keys + page.values)
}

/// Keys and values of every layer in pages.
///
/// A page of keys of one head is `(PAGE_LEN, dim)`, one of values `(dim, PAGE_LEN)`, with `dim` the padded `head_dim`: what
/// one lane of a tensor core product needs of either is 16 consecutive bytes. Kernels find a layer's memory through a
/// table on the device, so that recorded steps stay valid when the store grows.
pub struct CudaKvStore<T> {
    shape: KvShape,
    page: PageBytes,
    keys: Vec<CudaSlice<u8>>,
    values: Vec<CudaSlice<u8>>,
    /// Addresses of keys and values, for each layer.
    table: CudaSlice<u64>,
    table_address: u64,
    activations: PhantomData<T>,
}

impl<T: Element> CudaKvStore<T> {
    pub(super) fn new(stream: &Arc<CudaStream>, shape: KvShape) -> Result<Self, KernelError> {
        let too_large = KernelError::Argument { what: "head_dim", got: shape.head_dim, limit: 257 };
        let dim = padded_dim(shape.head_dim).ok_or(too_large)?;
        let empty = || (0..shape.layers).map(|_| zeros(stream, 0)).collect::<Result<Vec<_>, _>>();
        let table = zeros::<u64>(stream, 2 * shape.layers)?;
        let table_address = table.device_ptr(stream).0;
        let (keys, values) = (empty()?, empty()?);
        let shape_now = KvShape { pages: 0, ..shape };
        let page = PageBytes::new(shape.format, dim);
        let activations = PhantomData;
        let mut store = Self { shape: shape_now, page, keys, values, table, table_address, activations };
        store.grow(stream, shape.pages)?;
        Ok(store)
    }

    pub(super) fn grow(&mut self, stream: &Arc<CudaStream>, pages: usize) -> Result<(), KernelError> {
        if pages <= self.shape.pages {
            return Ok(());
        }
        // Kernels count pages times heads in 32 bits.
        expect_below("pages", pages, u32::MAX as usize / self.shape.kv_heads.max(1))?;
        let of_all = |pages: usize, page: usize| (pages * self.shape.kv_heads).saturating_mul(page);
        let PageBytes { keys, values } = self.page;
        let (old_pages, mut grown) = (self.shape.pages, Ok(()));
        let failed = |error| gpu_error("growing the key-value store", error);
        // A slice of `bytes` with what `slice` has in its first `old` bytes.
        let moved = |slice: &CudaSlice<u8>, bytes: usize, old: usize| -> Result<_, KernelError> {
            let mut other = zeros::<u8>(stream, bytes)?;
            if old > 0 {
                let (from, mut to) = (slice.slice(..old), other.slice_mut(..old));
                stream.memcpy_dtod(&from, &mut to).map_err(failed)?;
            }
            Ok(other)
        };
        let slices = self.keys.iter_mut().map(|slice| (slice, keys));
        let slices = slices.chain(self.values.iter_mut().map(|slice| (slice, values)));
        for (slice, page) in slices {
            let (len, old_len) = (of_all(pages, page), of_all(old_pages, page));
            if slice.len() >= len {
                continue; // what an attempt that failed could not give back
            }
            grown = moved(slice, len, old_len).map(|larger| *slice = larger);
            if grown.is_err() {
                break;
            }
        }
        if grown.is_err() {
            // What has grown already would be missing where less might fit.
            let slices = self.keys.iter_mut().map(|slice| (slice, keys));
            for (slice, page) in slices.chain(self.values.iter_mut().map(|slice| (slice, values))) {
                let old_len = of_all(old_pages, page);
                if slice.len() <= old_len.max(1) {
                    continue;
                }
                let Ok(smaller) = moved(slice, old_len, old_len) else { break };
                *slice = smaller;
            }
        }
        let addresses = self.keys.iter().zip(&self.values);
        let addresses: Vec<u64> =
            addresses.flat_map(|(k, v)| [k.device_ptr(stream).0, v.device_ptr(stream).0]).collect();
        stream.memcpy_htod(&addresses, &mut self.table).map_err(failed)?;
        stream.synchronize().map_err(failed)?;
        grown?;
        self.shape.pages = pages;
        Ok(())
    }

    /// Fails unless the store has this layer, heads of this shape, and all pages below `pages`.
    pub(super) fn check(&self, layer: usize, shape: AttentionShape, pages: usize) -> Result<(), KernelError> {
        self.shape.expect(layer, shape)?;
        self.shape.expect_pages(pages)
    }

    pub(super) fn format(&self) -> KvFormat {
        self.shape.format
    }

    /// Where the addresses of a layer's keys and values are.
    pub(super) fn addresses(&self, layer: usize) -> u64 {
        self.table_address + (layer * 16) as u64
    }
}
