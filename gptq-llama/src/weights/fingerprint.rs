use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::{Tensor, TensorData};

/// Elements that are hashed at a time, and of every [`STRIDE`] elements of a long tensor.
const BLOCK: usize = 2048;
const STRIDE: usize = 128 * 1024;
/// A tensor up to this length is hashed as a whole.
const WHOLE: usize = 512 * 1024;

/// Tells models apart, without reading all of a large one.
///
/// SHA-256 of names, shapes, types and values. Of a tensor of more than half a million elements 2048 of every 131072 are
/// hashed: 2 % of the model are read. Training moves all weights, so that another model is told with certainty in practice;
/// a single weight changed by hand may not be.
pub struct Fingerprint(Sha256);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Self(Sha256::new())
    }

    /// Adds bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// Adds a tensor, or that there is none of this name.
    pub fn tensor(&mut self, name: &str, tensor: Option<&Tensor<'_>>) {
        self.add(name.as_bytes());
        let Some(tensor) = tensor else { return self.add(b"absent") };
        tensor.shape.iter().for_each(|&size| self.add(&(size as u64).to_le_bytes()));
        match &tensor.data {
            TensorData::F32(data) => self.values(b"f32", data, f32::to_le_bytes),
            TensorData::F16(data) => self.values(b"f16", data, f16::to_le_bytes),
            TensorData::Bf16(data) => self.values(b"bf16", data, bf16::to_le_bytes),
        }
    }

    fn values<T: Copy, const N: usize>(&mut self, dtype: &[u8], data: &[T], bytes: fn(T) -> [u8; N]) {
        self.add(dtype);
        let stride = if data.len() <= WHOLE { BLOCK } else { STRIDE };
        for start in (0..data.len()).step_by(stride) {
            let block = &data[start..data.len().min(start + BLOCK)];
            let block: Vec<u8> = block.iter().flat_map(|&x| bytes(x)).collect();
            self.0.update(&block);
        }
    }

    pub(crate) fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn of(name: &str, shape: &[usize], data: &[f32]) -> String {
        let mut fingerprint = Fingerprint::new();
        let tensor = Tensor { shape: shape.to_vec(), data: TensorData::F32(Cow::Borrowed(data)) };
        fingerprint.tensor(name, Some(&tensor));
        fingerprint.finish()
    }

    #[test]
    fn names_shapes_and_values_count() {
        let data = vec![1.0; 6];
        let first = of("a", &[2, 3], &data);
        assert_eq!(first, of("a", &[2, 3], &data));
        assert_ne!(first, of("b", &[2, 3], &data));
        assert_ne!(first, of("a", &[3, 2], &data));
        assert_ne!(first, of("a", &[2, 3], &[1.0, 1.0, 1.0, 1.0, 1.0, 2.0]));
    }

    #[test]
    fn long_tensors_are_sampled() {
        let mut data = vec![1.0; WHOLE + 1];
        let first = of("a", &[data.len()], &data);
        data[3 * STRIDE + BLOCK - 1] = 2.0;
        let second = of("a", &[data.len()], &data);
        data[3 * STRIDE + BLOCK] = 2.0;
        assert_ne!(first, second);
        assert_eq!(second, of("a", &[data.len()], &data));
    }
}
