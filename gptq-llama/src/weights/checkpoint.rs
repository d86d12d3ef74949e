use gptq_format::{Checkpoint, Dtype, PackedLinear};

use super::{Tensor, TensorData, WeightSource};
use crate::LlamaError;

impl WeightSource for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, LlamaError> {
        let Some(tensor) = self.get(name) else { return Ok(None) };
        let data = match tensor.dtype() {
            Dtype::F32 => TensorData::F32(tensor.f32s()?),
            Dtype::F16 => TensorData::F16(tensor.f16s()?),
            Dtype::BF16 => TensorData::Bf16(tensor.bf16s()?),
            other => {
                return Err(LlamaError::TensorType { tensor: name.to_owned(), dtype: format!("{other:?}") });
            }
        };
        Ok(Some(Tensor { shape: tensor.shape().to_vec(), data }))
    }

    fn packed(&self, module: &str) -> Result<Option<PackedLinear>, LlamaError> {
        if !self.is_quantized(module) {
            return Ok(None);
        }
        Ok(Some(self.linear(module)?))
    }
}
