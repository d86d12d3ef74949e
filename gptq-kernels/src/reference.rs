//! The float64 reference that every kernel is measured against.
//!
//! Weights come from the definition, `W[o, i] = scale[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])`. A half precision
//! scale has 11 significant bits and `code - zero` at most 8, so each weight is exact in float32; a product with a float32
//! activation has 43 bits and is exact in float64, and only the sum over `in_features` rounds, with an error below
//! `in_features * 2^-53` of `sum |x w|`: about `2^-29` of what float32 kernels may do.

use gptq_format::PackedLinear;

use crate::{
    DenseWeight, Epilogue, ErrorBound, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef,
    Unsupported, Workspace, cpu::device::Cpu,
};

/// A weight in float32, where it is exact, with its bias.
#[derive(Clone, Debug)]
pub struct Reference {
    spec: LinearSpec,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// Weight and eps of the norm that the kernel puts `x` through.
    norm: Option<(Vec<f32>, f32)>,
}

/// One output element by [`Reference`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exact {
    /// `sum_i x_i w_i + b`
    pub y: f64,
    /// `sum_i |x_i w_i| + |b|`
    pub magnitude: f64,
    /// `sum_i (1 + |x_i|) |w_i|`
    pub weight_sum: f64,
}

impl Reference {
    /// Dequantises a packed layer.
    pub fn new(weight: &PackedLinear) -> Self {
        Self {
            spec: LinearSpec::of(weight),
            weight: weight.dequantize(),
            bias: weight.bias().map(|bias| bias.iter().map(|b| b.to_f32()).collect()),
            norm: None,
        }
    }

    /// Converts a dense layer.
    ///
    /// Errors: [`KernelError::WeightLength`].
    pub fn dense(weight: &DenseWeight<'_>) -> Result<Self, KernelError> {
        weight.validate()?;
        Ok(Self {
            spec: LinearSpec::of_dense(weight),
            weight: (0..weight.data.len()).filter_map(|i| weight.data.get(i)).collect(),
            bias: weight.bias.map(<[f32]>::to_vec),
            norm: None,
        })
    }

    /// Output `o` for one row of activations, `x` of length `in_features`, in float32 or float64. Panics if `x` is shorter or
    /// `o` is not below `out_features`.
    pub fn element<X: Copy + Into<f64>>(&self, x: &[X], o: usize) -> Exact {
        self.sum(x[..self.spec.in_features].iter().map(|&x| x.into()), o)
    }

    fn sum(&self, x: impl Iterator<Item = f64>, o: usize) -> Exact {
        let k = self.spec.in_features;
        let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[o]));
        let mut exact = Exact { y: bias, magnitude: bias.abs(), weight_sum: 0.0 };
        for (&w, x) in self.weight[o * k..(o + 1) * k].iter().zip(x) {
            let w = f64::from(w);
            exact.y += x * w;
            exact.magnitude += (x * w).abs();
            exact.weight_sum += (1.0 + x.abs()) * w.abs();
        }
        exact
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight` in float64.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    normalised(x, weight, eps).collect()
}

fn normalised(x: &[f32], weight: &[f32], eps: f32) -> impl Iterator<Item = f64> {
    let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
    let root = (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(move |(&x, &w)| f64::from(x) / root * f64::from(w))
}

/// The reference as a kernel, `cpu-reference-f64`: slow, single-threaded, for comparisons by name.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceKernel;

const NAME: &str = "cpu-reference-f64";

impl LinearKernel<Cpu> for ReferenceKernel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, _: &LinearSpec) -> Result<(), Unsupported> {
        Ok(())
    }

    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        Ok(Box::new(Reference::new(weight)))
    }

    fn prepare_fused(
        &self,
        weight: &PackedLinear,
        fusion: &Fusion<'_>,
    ) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        let Reference { spec, weight, bias, .. } = Reference::new(weight);
        let norm = match fusion.norm {
            Some(norm) => {
                norm.validate(spec.in_features, spec.out_features)?;
                Some((norm.weight.to_vec(), norm.eps))
            }
            None => None,
        };
        Ok(Box::new(Reference { spec: spec.fused(fusion), weight, bias, norm }))
    }

    fn prepare_dense(&self, weight: &DenseWeight<'_>) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        Ok(Box::new(Reference::dense(weight)?))
    }

    /// One rounding, of the float64 sum to float32; the sum's own error is far below the second unit allowed here.
    fn error_bound(&self, _: &LinearSpec) -> ErrorBound {
        ErrorBound::float32(2)
    }
}

impl Linear<Cpu> for Reference {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    fn weight_bytes(&self) -> usize {
        self.weight.len() * size_of::<f32>()
    }

    fn workspace_len(&self, _: usize) -> usize {
        0
    }

    fn forward(
        &self,
        x: MatRef<'_, Cpu>,
        mut y: MatMut<'_, Cpu>,
        _: &mut Workspace<Cpu>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
        let (x_stride, y_stride) = (x.row_stride(), y.row_stride());
        let y = y.data();
        for row in 0..x.rows() {
            let x = &x.data()[row * x_stride..][..self.spec.in_features];
            let product = |o| match &self.norm {
                Some((weight, eps)) => self.sum(normalised(x, weight, *eps), o).y,
                None => self.element(x, o).y,
            };
            let width = self.spec.y_features();
            for (o, y) in y[row * y_stride..][..width].iter_mut().enumerate() {
                let p = product(o);
                *y = match self.spec.epilogue {
                    Epilogue::Store => p,
                    Epilogue::Add => f64::from(*y) + p,
                    Epilogue::SiluMul => p / (1.0 + (-p).exp()) * product(o + width),
                } as f32;
            }
        }
        Ok(())
    }
}
