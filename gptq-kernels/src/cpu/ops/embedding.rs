use half::{bf16, f16};

use super::step::CpuStep;
use crate::{DenseData, DenseWeight, KernelError};

/// An embedding matrix in the type that the checkpoint stores, `(vocabulary, hidden)`.
pub struct CpuEmbedding {
    data: Stored,
    vocabulary: usize,
    hidden: usize,
}

enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl CpuEmbedding {
    pub(super) fn new(weight: &DenseWeight<'_>) -> Result<Self, KernelError> {
        let (data, len) = match weight.data {
            DenseData::F32(data) => (Stored::F32(data.to_vec()), data.len()),
            DenseData::F16(data) => (Stored::F16(data.to_vec()), data.len()),
            DenseData::Bf16(data) => (Stored::Bf16(data.to_vec()), data.len()),
        };
        let (vocabulary, hidden) = (weight.out_features, weight.in_features);
        if vocabulary.checked_mul(hidden) != Some(len) {
            return Err(KernelError::MatrixBounds {
                rows: vocabulary,
                cols: hidden,
                row_stride: hidden,
                len,
            });
        }
        Ok(Self { data, vocabulary, hidden })
    }

    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    pub(super) fn gather(&self, step: &CpuStep, y: &mut [f32], stride: usize) -> Result<(), KernelError> {
        let limit = self.vocabulary;
        if let Some(&token) = step.tokens.iter().find(|&&token| token as usize >= limit) {
            return Err(KernelError::Argument { what: "token", got: token as usize, limit });
        }
        for (&token, row) in step.tokens.iter().zip(y.chunks_mut(stride)) {
            let range = token as usize * self.hidden..(token as usize + 1) * self.hidden;
            let row = &mut row[..self.hidden];
            match &self.data {
                Stored::F32(data) => row.copy_from_slice(&data[range]),
                Stored::F16(data) => {
                    row.iter_mut().zip(&data[range]).for_each(|(y, x)| *y = x.to_f32());
                }
                Stored::Bf16(data) => {
                    row.iter_mut().zip(&data[range]).for_each(|(y, x)| *y = x.to_f32());
                }
            }
        }
        Ok(())
    }
}
