use rayon::prelude::*;

use super::step::CpuStep;
use crate::{AttentionShape, KernelError};

/// Cosines and sines, `(positions, head_dim / 2)` each.
pub struct CpuRope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl CpuRope {
    pub(super) fn new(cos: &[f32], sin: &[f32], head_dim: usize) -> Result<Self, KernelError> {
        let half = head_dim / 2;
        if cos.len() != sin.len() || half == 0 || !cos.len().is_multiple_of(half) {
            return Err(KernelError::CopyLength { src: sin.len(), dst: cos.len() });
        }
        Ok(Self { cos: cos.to_vec(), sin: sin.to_vec(), half })
    }

    pub(super) fn check(&self, shape: AttentionShape, step: &CpuStep) -> Result<(), KernelError> {
        let argument = |what, got, limit| Err(KernelError::Argument { what, got, limit });
        if shape.head_dim != 2 * self.half {
            return argument("head_dim", shape.head_dim, 2 * self.half + 1);
        }
        let positions = self.cos.len() / self.half;
        match step.positions.iter().max() {
            Some(&last) if last as usize >= positions => argument("position", last as usize, positions),
            _ => Ok(()),
        }
    }

    /// Rotates queries and keys of each row of `qkv` in place. The arguments have been checked.
    pub(super) fn rotate(&self, shape: AttentionShape, step: &CpuStep, qkv: &mut [f32], stride: usize) {
        let rotated = (shape.heads + shape.kv_heads) * shape.head_dim;
        let rotate = |(row, &position): (&mut [f32], &u32)| {
            let start = position as usize * self.half;
            let (cos, sin) = (&self.cos[start..][..self.half], &self.sin[start..][..self.half]);
            for head in row[..rotated].chunks_exact_mut(shape.head_dim) {
                let (first, second) = head.split_at_mut(self.half);
                for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        };
        if step.rows() * rotated < super::PARALLEL_ELEMENTS {
            qkv.chunks_mut(stride).zip(&step.positions).for_each(rotate);
        } else {
            qkv.par_chunks_mut(stride).zip(&step.positions).for_each(rotate);
        }
    }
}
