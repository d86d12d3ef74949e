use half::{bf16, f16};

use crate::KernelError;

/// An unquantised linear layer's weight, as a checkpoint stores it.
#[derive(Clone, Copy, Debug)]
pub struct DenseWeight<'a> {
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
    /// `(out_features, in_features)` row-major.
    pub data: DenseData<'a>,
    /// `(out_features)`
    pub bias: Option<&'a [f32]>,
}

/// Floats of one of the types that checkpoints use.
#[derive(Clone, Copy, Debug)]
pub enum DenseData<'a> {
    /// IEEE single.
    F32(&'a [f32]),
    /// IEEE half.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// The type of a dense weight's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenseType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl DenseData<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DenseType {
        match self {
            Self::F32(_) => DenseType::F32,
            Self::F16(_) => DenseType::F16,
            Self::Bf16(_) => DenseType::Bf16,
        }
    }

    /// Element `index` as float32, which holds every value of all three types.
    pub fn get(&self, index: usize) -> Option<f32> {
        match self {
            Self::F32(data) => data.get(index).copied(),
            Self::F16(data) => data.get(index).map(|value| value.to_f32()),
            Self::Bf16(data) => data.get(index).map(|value| value.to_f32()),
        }
    }
}

impl DenseWeight<'_> {
    /// Checks that weight and bias have as many elements as the shape says.
    ///
    /// Errors: [`KernelError::WeightLength`].
    pub fn validate(&self) -> Result<(), KernelError> {
        let elements = self.in_features.checked_mul(self.out_features);
        if elements != Some(self.data.len()) || self.data.is_empty() {
            return Err(KernelError::WeightLength {
                field: "weight",
                in_features: self.in_features,
                out_features: self.out_features,
                got: self.data.len(),
            });
        }
        match self.bias {
            Some(bias) if bias.len() != self.out_features => Err(KernelError::WeightLength {
                field: "bias",
                in_features: self.in_features,
                out_features: self.out_features,
                got: bias.len(),
            }),
            _ => Ok(()),
        }
    }
}
