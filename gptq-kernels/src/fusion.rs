use crate::KernelError;

/// What a linear layer does with `x` before it multiplies: the [`RmsNorm`] of a [`Fusion`], as far as a
/// [`LinearSpec`](crate::LinearSpec) tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Prologue {
    /// Nothing.
    #[default]
    Load,
    /// Normalises each row.
    RmsNorm,
}

/// What a linear layer does with `p = x W^T + bias` before it stores it. Nothing is rounded to the device's element type
/// in between, so that a fused layer is more exact than the operations it stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// `y = p`
    #[default]
    Store,
    /// `y += p`: the residual of a decoder.
    Add,
    /// `y[i] = silu(p[i]) * p[i + out_features / 2]` with `silu(g) = g / (1 + exp(-g))`: gate and up of a decoder, one
    /// above the other in `W`. `out_features` is even, and `y` has half as many columns.
    SiluMul,
}

/// `x[r] / sqrt(mean(x[r]^2) + eps) * weight`: the norm before the linear layers of a decoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm<'a> {
    /// One for each input feature; rounded to the device's element type, as [`Device::upload`](crate::Device::upload) does.
    pub weight: &'a [f32],
    /// What keeps the root away from zero.
    pub eps: f32,
}

impl RmsNorm<'_> {
    /// An error unless there is a weight for each of `in_features`.
    pub fn validate(&self, in_features: usize, out_features: usize) -> Result<(), KernelError> {
        let got = self.weight.len();
        if got != in_features {
            return Err(KernelError::WeightLength { field: "norm", in_features, out_features, got });
        }
        Ok(())
    }
}

/// What a linear layer does besides multiplying.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fusion<'a> {
    /// What `x` goes through first. The result is rounded to the device's element type before it is multiplied, and has the
    /// bits that [`Backend::rms_norm`](crate::Backend::rms_norm) gives.
    pub norm: Option<RmsNorm<'a>>,
    /// What becomes of the product.
    pub epilogue: Epilogue,
}

impl From<Epilogue> for Fusion<'_> {
    fn from(epilogue: Epilogue) -> Self {
        Self { norm: None, epilogue }
    }
}

impl Fusion<'_> {
    /// The kind of prologue.
    pub fn prologue(&self) -> Prologue {
        if self.norm.is_some() { Prologue::RmsNorm } else { Prologue::Load }
    }

    /// This, then less and less of it, and nothing at last.
    pub fn parts(self) -> [Self; 4] {
        let Self { norm, epilogue } = self;
        [self, epilogue.into(), Self { norm, ..Self::default() }, Self::default()]
    }
}
