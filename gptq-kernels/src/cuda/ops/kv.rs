use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::{expect_below, functions::padded_dim, step::PAGE_LEN};
use crate::{
    AttentionShape, KernelError, KvShape,
    cuda::{
        Element,
        driver::{gpu_error, zeros},
    },
};

/// Keys and values of every layer in pages.
///
/// A page of keys of one head is `(PAGE_LEN, dim)`, one of values `(dim, PAGE_LEN)`, with `dim` the padded `head_dim`: what
/// one lane of a tensor core product needs of either is 16 consecutive bytes. Kernels find a layer's memory through a
/// table on the device, so that recorded steps stay valid when the store grows.
pub struct CudaKvStore<T> {
    shape: KvShape,
    dim: usize,
    keys: Vec<CudaSlice<T>>,
    values: Vec<CudaSlice<T>>,
    /// Addresses of keys and values, for each layer.
    table: CudaSlice<u64>,
    table_address: u64,
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
        let mut store = Self { shape: shape_now, dim, keys, values, table, table_address };
        store.grow(stream, shape.pages)?;
        Ok(store)
    }

    pub(super) fn grow(&mut self, stream: &Arc<CudaStream>, pages: usize) -> Result<(), KernelError> {
        if pages <= self.shape.pages {
            return Ok(());
        }
        // Kernels count pages times heads in 32 bits.
        expect_below("pages", pages, u32::MAX as usize / self.shape.kv_heads.max(1))?;
        let len = pages * self.shape.kv_heads * PAGE_LEN * self.dim;
        let old_len = self.shape.pages * self.shape.kv_heads * PAGE_LEN * self.dim;
        let failed = |error| gpu_error("growing the key-value store", error);
        let mut grown = Ok(());
        for slice in self.keys.iter_mut().chain(&mut self.values) {
            if slice.len() >= len {
                continue; // what an attempt that failed could not give back
            }
            grown = zeros::<T>(stream, len).and_then(|mut larger| {
                if old_len > 0 {
                    let (from, mut to) = (slice.slice(..old_len), larger.slice_mut(..old_len));
                    stream.memcpy_dtod(&from, &mut to).map_err(failed)?;
                }
                *slice = larger;
                Ok(())
            });
            if grown.is_err() {
                break;
            }
        }
        if grown.is_err() {
            // What has grown already would be missing where less might fit.
            for slice in self.keys.iter_mut().chain(&mut self.values) {
                if slice.len() <= old_len.max(1) {
                    continue;
                }
                let Ok(mut smaller) = zeros::<T>(stream, old_len) else { break };
                if old_len > 0 {
                    let (from, mut to) = (slice.slice(..old_len), smaller.slice_mut(..old_len));
                    stream.memcpy_dtod(&from, &mut to).map_err(failed)?;
                }
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
        expect_below("layer", layer, self.shape.layers)?;
        let equal = |what, got: usize, want: usize| {
            if got == want { Ok(()) } else { Err(KernelError::Argument { what, got, limit: want + 1 }) }
        };
        equal("kv_heads", shape.kv_heads, self.shape.kv_heads)?;
        equal("head_dim", shape.head_dim, self.shape.head_dim)?;
        match pages.checked_sub(1) {
            Some(last) => expect_below("page", last, self.shape.pages),
            None => Ok(()),
        }
    }

    /// Where the addresses of a layer's keys and values are.
    pub(super) fn addresses(&self, layer: usize) -> u64 {
        self.table_address + (layer * 16) as u64
    }
}
