//! What is looked up: embeddings, and the angles of rotary position embeddings.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::{
    DenseData, DenseWeight, KernelError,
    cuda::{Activation as _, CudaDevice, Element, driver::Resident},
};

/// An embedding matrix in the element type of the device, `(vocabulary, hidden)`.
pub struct CudaEmbedding {
    table: Resident,
    vocabulary: usize,
    hidden: usize,
}

impl CudaEmbedding {
    pub(super) fn new<T: Element>(
        device: &CudaDevice<T>,
        weight: &DenseWeight<'_>,
    ) -> Result<Self, KernelError> {
        weight.validate()?;
        let (vocabulary, hidden) = (weight.out_features, weight.in_features);
        super::expect_below("vocabulary", vocabulary, u32::MAX as usize)?;
        super::expect_below("hidden", hidden, u32::MAX as usize)?;
        let stream = device.stream();
        let rounded = |elements: Vec<T>| Resident::new(stream, &elements);
        let table = match weight.data {
            DenseData::F32(data) => rounded(data.par_iter().map(|&x| T::from_f32(x)).collect()),
            DenseData::F16(data) if T::NAME == f16::NAME => Resident::new(stream, data),
            DenseData::F16(data) => rounded(data.par_iter().map(|&x| T::from_f32(x.to_f32())).collect()),
            DenseData::Bf16(data) if T::NAME == bf16::NAME => Resident::new(stream, data),
            DenseData::Bf16(data) => rounded(data.par_iter().map(|&x| T::from_f32(x.to_f32())).collect()),
        }?;
        Ok(Self { table, vocabulary, hidden })
    }

    pub(super) fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    pub(super) fn address(&self) -> u64 {
        self.table.address()
    }
}

/// Cosines and sines in float32, `(positions, head_dim / 2)` each.
pub struct CudaRope {
    cos: Resident,
    sin: Resident,
    head_dim: usize,
    positions: usize,
}

impl CudaRope {
    pub(in crate::cuda) fn new(
        stream: &Arc<CudaStream>,
        cos: &[f32],
        sin: &[f32],
        head_dim: usize,
    ) -> Result<Self, KernelError> {
        let half = head_dim / 2;
        if cos.len() != sin.len() || half == 0 || !cos.len().is_multiple_of(half) {
            return Err(KernelError::CopyLength { src: sin.len(), dst: cos.len() });
        }
        let (positions, head_dim) = (cos.len() / half, 2 * half);
        Ok(Self { cos: Resident::new(stream, cos)?, sin: Resident::new(stream, sin)?, head_dim, positions })
    }

    /// Fails unless the table is for heads of this size and has the positions before `end`.
    pub(in crate::cuda) fn check(&self, head_dim: usize, end: usize) -> Result<(), KernelError> {
        if head_dim != self.head_dim {
            return Err(KernelError::Argument { what: "head_dim", got: head_dim, limit: self.head_dim + 1 });
        }
        match end.checked_sub(1) {
            Some(last) => super::expect_below("position", last, self.positions),
            None => Ok(()),
        }
    }

    pub(in crate::cuda) fn cos(&self) -> u64 {
        self.cos.address()
    }

    pub(in crate::cuda) fn sin(&self) -> u64 {
        self.sin.address()
    }
}
