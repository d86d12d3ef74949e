use gptq_format::{Bits, PackedLinear};

use crate::{
    DenseType, DenseWeight, Device, ErrorBound, KernelError, MatMut, MatRef, Unsupported, Workspace,
};

/// What a linear layer is, as far as the choice of a kernel depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LinearSpec {
    /// Input features, K.
    pub in_features: usize,
    /// Output features, N.
    pub out_features: usize,
    /// How the weight is stored.
    pub weight: WeightFormat,
    /// Whether a bias is added.
    pub bias: bool,
}

/// How a linear layer stores its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// One float a weight.
    Dense(DenseType),
    /// GPTQ codes, scales and zeros.
    Gptq {
        /// Width of a code.
        bits: Bits,
        /// Nominal group size; `in_features` for one group.
        group_size: usize,
        /// Every zero point is `2^(bits-1)`.
        sym: bool,
        /// `g_idx` is not `i / group_size`.
        act_order: bool,
    },
}

impl LinearSpec {
    /// The spec of a packed layer.
    pub fn of(weight: &PackedLinear) -> Self {
        Self {
            in_features: weight.in_features(),
            out_features: weight.out_features(),
            weight: WeightFormat::Gptq {
                bits: weight.bits(),
                group_size: weight.group_size(),
                sym: weight.is_symmetric(),
                act_order: weight.is_act_order(),
            },
            bias: weight.bias().is_some(),
        }
    }

    /// The spec of a dense layer.
    pub fn of_dense(weight: &DenseWeight<'_>) -> Self {
        Self {
            in_features: weight.in_features,
            out_features: weight.out_features,
            weight: WeightFormat::Dense(weight.data.dtype()),
            bias: weight.bias.is_some(),
        }
    }
}

/// A way to multiply by the weights of linear layers on a device. A value exists only where it may run: constructors probe the
/// machine and return an [`Unsupported`].
pub trait LinearKernel<D: Device>: Send + Sync {
    /// Stable name, `device-isa-arithmetic`: `cpu-avx512-f32`.
    fn name(&self) -> &'static str;

    /// Whether [`prepare`](Self::prepare), or for dense weights [`prepare_dense`](Self::prepare_dense), accepts such a
    /// layer.
    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported>;

    /// Repacks the weight into a layout of this kernel's own, which only the returned value can read.
    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<D>>, KernelError>;

    /// Copies a dense weight into a layout of this kernel's own, in the type it has.
    ///
    /// Most kernels do packed weights only; that is what the default says.
    fn prepare_dense(&self, weight: &DenseWeight<'_>) -> Result<Box<dyn Linear<D>>, KernelError> {
        let _ = weight;
        Err(KernelError::Unsupported { kernel: self.name(), reason: Unsupported::WeightFormat })
    }

    /// How far a result may be from the exact product, derived from this kernel's arithmetic. The
    /// [conformance battery](crate::conformance) holds the kernel to it.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound;
}

/// A linear layer that is ready to run: `y = x W^T + bias`, quantised or dense.
///
/// Row invariance: row `r` of `y` depends on row `r` of `x` alone, to the bit. The number of rows in a call, the
/// position of a row and the number of threads change nothing.
pub trait Linear<D: Device>: Send + Sync {
    /// What the layer is.
    fn spec(&self) -> &LinearSpec;

    /// Name of the kernel that runs it.
    fn kernel(&self) -> &'static str;

    /// Bytes of weight, scales and zeros that one forward pass has to read.
    fn weight_bytes(&self) -> usize;

    /// Elements of scratch that [`forward`](Self::forward) needs for `rows` rows.
    fn workspace_len(&self, rows: usize) -> usize;

    /// `y (rows, out_features) = x (rows, in_features) W^T + bias`. Allocates nothing and, on a GPU, does not wait.
    ///
    /// Errors: [`KernelError::Shape`] if `x` or `y` does not fit the layer, [`KernelError::Workspace`] if the scratch
    /// is too small. Nothing has been written then.
    fn forward(
        &self,
        x: MatRef<'_, D>,
        y: MatMut<'_, D>,
        workspace: &mut Workspace<D>,
    ) -> Result<(), KernelError>;
}
