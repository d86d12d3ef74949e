use half::{bf16, f16};

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
