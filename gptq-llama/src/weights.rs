//! Where a model's weights come from.

mod checkpoint;
mod fingerprint;
mod memory;

pub use fingerprint::Fingerprint;
pub use memory::MemoryWeights;

use std::borrow::Cow;

use gptq_format::PackedLinear;
use gptq_kernels::{DenseData, DenseWeight};
use half::{bf16, f16};

use crate::LlamaError;

/// Weights by name: a checkpoint, or anything else that can answer.
///
/// Layers are read on several threads at once.
pub trait WeightSource: Sync {
    /// The floats called `name`, `None` if there are none.
    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, LlamaError>;

    /// The quantised layer called `module` (the name without `.qweight`), `None` if it is not quantised.
    fn packed(&self, module: &str) -> Result<Option<PackedLinear>, LlamaError>;

    /// Adds what tells the floats called `name` from others, so that a run is not continued with another model. A source
    /// that computes its floats can add what it computes them from.
    fn fingerprint(&self, name: &str, fingerprint: &mut Fingerprint) -> Result<(), LlamaError> {
        fingerprint.tensor(name, self.tensor(name)?.as_ref());
        Ok(())
    }
}

/// Floats of a checkpoint, row-major.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The numbers.
    pub data: TensorData<'a>,
}

/// Floats in the type of the checkpoint, borrowed where its bytes are aligned.
#[derive(Clone, Debug)]
pub enum TensorData<'a> {
    /// IEEE single.
    F32(Cow<'a, [f32]>),
    /// IEEE half.
    F16(Cow<'a, [f16]>),
    /// bfloat16.
    Bf16(Cow<'a, [bf16]>),
}

impl TensorData<'_> {
    /// The same numbers, borrowed.
    fn reborrow(&self) -> TensorData<'_> {
        match self {
            Self::F32(data) => TensorData::F32(Cow::Borrowed(data)),
            Self::F16(data) => TensorData::F16(Cow::Borrowed(data)),
            Self::Bf16(data) => TensorData::Bf16(Cow::Borrowed(data)),
        }
    }
}

impl Tensor<'_> {
    /// All numbers in float32, exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            TensorData::F32(data) => data.to_vec(),
            TensorData::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
            TensorData::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// The tensor as the weight of a layer; its shape has been checked.
    pub(crate) fn as_dense<'a>(&'a self, bias: Option<&'a [f32]>) -> DenseWeight<'a> {
        DenseWeight {
            in_features: self.shape[1],
            out_features: self.shape[0],
            data: match &self.data {
                TensorData::F32(data) => DenseData::F32(data),
                TensorData::F16(data) => DenseData::F16(data),
                TensorData::Bf16(data) => DenseData::Bf16(data),
            },
            bias,
        }
    }
}

/// Name and shape of one linear layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LinearName {
    pub(crate) module: String,
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    /// Whether the architecture has a bias here.
    pub(crate) bias: bool,
}

/// The weight of one linear layer.
pub(crate) enum LinearWeight<'a> {
    Dense { tensor: Tensor<'a>, bias: Option<Vec<f32>> },
    Packed(PackedLinear),
}

impl LinearWeight<'_> {
    pub(crate) fn packed(&self) -> Option<&PackedLinear> {
        match self {
            Self::Packed(packed) => Some(packed),
            Self::Dense { .. } => None,
        }
    }

    /// The same with its outputs in another order, if it is packed.
    pub(crate) fn with_output_order(self, name: &LinearName, order: &[u32]) -> Result<Self, LlamaError> {
        match self {
            Self::Packed(packed) => {
                let in_layer = |source| LlamaError::Pack { tensor: name.module.clone(), source };
                Ok(Self::Packed(packed.with_output_order(order).map_err(in_layer)?))
            }
            dense @ Self::Dense { .. } => Ok(dense),
        }
    }
}

/// Reads a tensor that must be there, in this shape.
pub(crate) fn read_tensor<'a>(
    source: &'a dyn WeightSource,
    name: &str,
    shape: &[usize],
) -> Result<Tensor<'a>, LlamaError> {
    let missing = || LlamaError::MissingTensor { tensor: name.to_owned() };
    let tensor = source.tensor(name)?.ok_or_else(missing)?;
    if tensor.shape != shape {
        return Err(LlamaError::TensorShape {
            tensor: name.to_owned(),
            expected: shape.to_vec(),
            got: tensor.shape,
        });
    }
    Ok(tensor)
}

/// Reads a layer, quantised or not. A bias is read where the architecture has one, and wherever else one is stored.
pub(crate) fn read_linear<'a>(
    source: &'a dyn WeightSource,
    name: &LinearName,
) -> Result<LinearWeight<'a>, LlamaError> {
    let LinearName { module, in_features, out_features, bias } = name;
    let bias_name = format!("{module}.bias");
    if let Some(packed) = source.packed(module)? {
        let got = vec![packed.out_features(), packed.in_features()];
        if got != [*out_features, *in_features] {
            let expected = vec![*out_features, *in_features];
            return Err(LlamaError::TensorShape { tensor: module.clone(), expected, got });
        }
        if *bias && packed.bias().is_none() {
            return Err(LlamaError::MissingTensor { tensor: bias_name });
        }
        return Ok(LinearWeight::Packed(packed));
    }
    let tensor = read_tensor(source, &format!("{module}.weight"), &[*out_features, *in_features])?;
    let bias = if *bias || source.tensor(&bias_name)?.is_some() {
        Some(read_tensor(source, &bias_name, &[*out_features])?.to_f32())
    } else {
        None
    };
    Ok(LinearWeight::Dense { tensor, bias })
}
