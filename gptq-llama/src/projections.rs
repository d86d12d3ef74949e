use gptq_format::{PackedLinear, PackedParts};
use gptq_kernels::{
    Backend, DenseType, Epilogue, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef,
    Prologue, Selector, WeightFormat, Workspace,
};

use crate::{
    LlamaError,
    weights::{LinearName, LinearWeight},
};

/// Layers that read the same input and write side by side into one matrix: q, k and v, or gate and up.
///
/// Packed layers with the same grid of groups become one layer at load, so that their input is read and prepared once
/// and one launch does the work. Act-order does not prevent it: layers that share an input share its Hessian, and with
/// it the order.
pub(crate) struct Projections<D: Backend> {
    parts: Vec<Part<D>>,
    features: usize,
}

struct Part<D: Backend> {
    offset: usize,
    linear: Box<dyn Linear<D>>,
}

/// How exact the arithmetic of linear layers has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Whatever the preferred kernel does, within the error bound that it states.
    #[default]
    Fast,
    /// Kernels whose error is that of float32 activations and sums, for measurements of the weights alone: their
    /// bound relative to `sum |x w|` is below `2^-12`, so that rounding activations to half precision does not pass.
    Float32,
}

/// What [`Precision::Float32`] asks for: half of half precision's unit roundoff.
const FLOAT32_ERROR: f64 = 1.0 / 4096.0;

/// How layers become runnable.
pub(crate) struct Preparation<'a, D: Backend> {
    pub(crate) kernels: &'a [Box<dyn LinearKernel<D>>],
    /// Kernel of quantised layers, `None` for the preferred one.
    pub(crate) kernel: Option<&'a str>,
    pub(crate) precision: Precision,
    /// Whether layers may take their input in an order of their own: then whoever writes it asks them for that order.
    pub(crate) in_order: bool,
    /// How the preferred one is found: costs and what the layers will have to do.
    pub(crate) selector: Selector<'a>,
}

impl<D: Backend> Preparation<'_, D> {
    pub(crate) fn linear(
        &self,
        name: &LinearName,
        weight: &LinearWeight<'_>,
    ) -> Result<Box<dyn Linear<D>>, LlamaError> {
        self.fused(name, weight, Fusion::default())
    }

    /// A layer that does as much of `fusion` as the kernel that is best for it does: the layer's spec says how much. The
    /// choice of the kernel does not depend on it.
    pub(crate) fn fused(
        &self,
        name: &LinearName,
        weight: &LinearWeight<'_>,
        fusion: Fusion<'_>,
    ) -> Result<Box<dyn Linear<D>>, LlamaError> {
        let in_layer = |source| LlamaError::Layer { tensor: name.module.clone(), source };
        match weight {
            LinearWeight::Packed(packed) => {
                let spec = match self.in_order {
                    true => LinearSpec::of_in_order(packed),
                    false => LinearSpec::of(packed),
                };
                let kernel = self.select(name, &spec, self.kernel)?;
                let (part, refused) = kernel.fusible(&spec, fusion);
                if let Some(reason) = refused {
                    let (layer, kernel, prologue) = (&name.module, kernel.name(), fusion.prologue());
                    tracing::debug!(layer, kernel, ?prologue, epilogue = ?fusion.epilogue, %reason, "not fused");
                }
                match self.in_order {
                    true => kernel.prepare_in_order(packed, &part),
                    false => kernel.prepare_fused(packed, &part),
                }
                .map_err(in_layer)
            }
            LinearWeight::Dense { tensor, bias } => {
                let dense = tensor.as_dense(bias.as_deref());
                let kernel = self.select(name, &LinearSpec::of_dense(&dense), None)?;
                kernel.prepare_dense(&dense).map_err(in_layer)
            }
        }
    }

    /// A dense layer of a weight (out_features, in_features) of type `dtype` that is on the device already.
    pub(crate) fn resident(
        &self,
        name: &LinearName,
        dtype: DenseType,
        weight: MatRef<'_, D>,
        bias: Option<&[f32]>,
    ) -> Result<Box<dyn Linear<D>>, LlamaError> {
        let spec = LinearSpec {
            in_features: weight.cols(),
            out_features: weight.rows(),
            weight: WeightFormat::Dense(dtype),
            bias: bias.is_some(),
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        };
        let kernel = self.select(name, &spec, None)?;
        let in_layer = |source| LlamaError::Layer { tensor: name.module.clone(), source };
        kernel.prepare_resident(weight, bias).map_err(in_layer)
    }

    /// A kernel asked for by name is taken whatever its precision.
    fn select(
        &self,
        layer: &LinearName,
        spec: &LinearSpec,
        name: Option<&str>,
    ) -> Result<&dyn LinearKernel<D>, LlamaError> {
        let name = match (name, self.precision) {
            (None, Precision::Float32) => {
                let precise = self.kernels.iter().find(|kernel| {
                    kernel.supports(spec).is_ok() && kernel.error_bound(spec).relative < FLOAT32_ERROR
                });
                let none = || LlamaError::NoFloat32Kernel { tensor: layer.module.clone() };
                Some(precise.ok_or_else(none)?.name())
            }
            (name, _) => name,
        };
        // What the choice says about itself belongs to this layer.
        let span = tracing::debug_span!("layer", name = %layer.module);
        let _guard = span.enter();
        let (kernel, _) = self
            .selector
            .clone()
            .named(name)
            .select(self.kernels, spec)
            .map_err(|source| LlamaError::Layer { tensor: layer.module.clone(), source })?;
        Ok(kernel)
    }

    /// Layers in the order of their columns, which do as much of `fusion` as their kernel does if they become one layer.
    pub(crate) fn fused_projections(
        &self,
        layers: Vec<(LinearName, LinearWeight<'_>)>,
        fusion: Fusion<'_>,
    ) -> Result<Projections<D>, LlamaError> {
        match joined(&layers) {
            Some((name, packed)) => {
                // Repacking takes memory, too.
                drop(layers);
                self.one(&name, packed, fusion)
            }
            None => self.side_by_side(&layers),
        }
    }

    fn one(
        &self,
        name: &LinearName,
        packed: PackedLinear,
        fusion: Fusion<'_>,
    ) -> Result<Projections<D>, LlamaError> {
        let linear = self.fused(name, &LinearWeight::Packed(packed), fusion)?;
        let features = linear.spec().y_features();
        Ok(Projections { parts: vec![Part { offset: 0, linear }], features })
    }

    fn side_by_side(&self, layers: &[(LinearName, LinearWeight<'_>)]) -> Result<Projections<D>, LlamaError> {
        let features = layers.iter().map(|(name, _)| name.out_features).sum();
        let parts = self.each(layers)?;
        if parts.iter().all(|part| part.linear.input_order() == parts[0].linear.input_order()) {
            return Ok(Projections { parts, features });
        }
        // The input is written once, in one order.
        drop(parts);
        Ok(Projections { parts: self.as_it_is().each(layers)?, features })
    }

    /// The same, for layers that take their input as it is.
    pub(crate) fn as_it_is(&self) -> Self {
        Self { in_order: false, selector: self.selector.clone(), ..*self }
    }

    fn each(&self, layers: &[(LinearName, LinearWeight<'_>)]) -> Result<Vec<Part<D>>, LlamaError> {
        let mut offset = 0;
        layers
            .iter()
            .map(|(name, weight)| {
                let part = Part { offset, linear: self.linear(name, weight)? };
                offset += name.out_features;
                Ok(part)
            })
            .collect()
    }
}

/// One layer that does what all do, if there can be one.
fn joined(layers: &[(LinearName, LinearWeight<'_>)]) -> Option<(LinearName, PackedLinear)> {
    let packed = concatenate(layers)?;
    let names: Vec<&str> = layers.iter().map(|(name, _)| name.module.as_str()).collect();
    Some((LinearName { module: names.join(" + "), ..layers[0].0.clone() }, packed))
}

/// One packed layer with the outputs of all, if their codes have the same width and their inputs the same groups.
fn concatenate(layers: &[(LinearName, LinearWeight<'_>)]) -> Option<PackedLinear> {
    let packed: Vec<&PackedLinear> =
        layers.iter().map(|(_, weight)| weight.packed()).collect::<Option<_>>()?;
    let first = *packed.first()?;
    // Zero points of several layers fit side by side only if each layer's fill whole words.
    let same = |p: &&PackedLinear| {
        p.bits() == first.bits()
            && p.group_size() == first.group_size()
            && p.groups() == first.groups()
            && p.g_idx() == first.g_idx()
            && p.bias().is_some() == first.bias().is_some()
            && (p.out_features() * p.bits().get() as usize).is_multiple_of(32)
    };
    if !packed.iter().all(same) {
        return None;
    }
    let groups = first.groups();
    let words = first.bits().words(first.in_features());
    let bias =
        first.bias().map(|_| packed.iter().flat_map(|p| p.bias().unwrap_or_default()).copied().collect());
    // Parts of valid layers make a valid layer; a refusal would only mean that they run one by one.
    PackedLinear::from_parts(PackedParts {
        bits: first.bits(),
        group_size: first.group_size(),
        in_features: first.in_features(),
        out_features: packed.iter().map(|p| p.out_features()).sum(),
        qweight: side_by_side(words, packed.iter().map(|p| p.qweight())),
        qzeros: side_by_side(groups, packed.iter().map(|p| p.qzeros())),
        scales: side_by_side(groups, packed.iter().map(|p| p.scales())),
        g_idx: first.g_idx().to_vec(),
        bias,
    })
    .ok()
}

/// Row-major matrices of `rows` rows, joined row by row.
fn side_by_side<'a, T: Copy + 'a>(rows: usize, parts: impl Iterator<Item = &'a [T]> + Clone) -> Vec<T> {
    let mut joined = Vec::with_capacity(parts.clone().map(<[T]>::len).sum());
    for row in 0..rows {
        for part in parts.clone() {
            let cols = part.len() / rows;
            joined.extend_from_slice(&part[row * cols..][..cols]);
        }
    }
    joined
}

impl<D: Backend> Projections<D> {
    /// Layers in the order of their columns, each by itself.
    pub(crate) fn of(linears: Vec<Box<dyn Linear<D>>>) -> Self {
        let mut features = 0;
        let part = |linear: Box<dyn Linear<D>>| {
            let offset = features;
            features += linear.spec().out_features;
            Part { offset, linear }
        };
        let parts = linears.into_iter().map(part).collect();
        Self { parts, features }
    }

    /// The order in which all of them take the columns of their input.
    pub(crate) fn input_order(&self) -> Option<&[u32]> {
        self.parts.first().and_then(|part| part.linear.input_order())
    }

    /// Columns of the output.
    pub(crate) fn features(&self) -> usize {
        self.features
    }

    /// Elements of scratch that [`forward`](Self::forward) needs for `rows` rows.
    pub(crate) fn workspace_len(&self, rows: usize) -> usize {
        self.linears().map(|linear| linear.workspace_len(rows)).max().unwrap_or(0)
    }

    /// Whether the output is that of an epilogue.
    pub(crate) fn is_fused(&self) -> bool {
        self.linears().any(|linear| linear.spec().epilogue != Epilogue::Store)
    }

    pub(crate) fn linears(&self) -> impl Iterator<Item = &dyn Linear<D>> {
        self.parts.iter().map(|part| part.linear.as_ref())
    }

    /// `y (rows, features)`, contiguous.
    pub(crate) fn forward(
        &self,
        x: MatRef<'_, D>,
        y: &mut D::Buffer,
        workspace: &mut Workspace<D>,
    ) -> Result<(), KernelError> {
        let rows = x.rows();
        for part in &self.parts {
            let cols = part.linear.spec().y_features();
            let y = D::slice_mut(y, part.offset.min(rows * self.features)..rows * self.features);
            part.linear.forward(x, MatMut::with_stride(y, rows, cols, self.features)?, workspace)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use gptq_format::{Bits, CodesRef};

    use super::*;

    fn layer(out_features: usize, seed: u32, act_order: bool) -> (LinearName, LinearWeight<'static>) {
        let (in_features, group_size) = (64, 32);
        let draw = |i: usize| ((i as u32 + seed).wrapping_mul(2_654_435_761) >> 28) as u8;
        let codes: Vec<u8> = (0..in_features * out_features).map(draw).collect();
        let zeros: Vec<u8> = (0..2 * out_features).map(|i| draw(i + 9).max(1)).collect();
        let scales: Vec<f32> = (0..2 * out_features).map(|i| 0.5 + f32::from(draw(i))).collect();
        let g_idx: Vec<u32> =
            (0..in_features as u32).map(|i| if act_order { i % 2 } else { i / 32 }).collect();
        let packed = PackedLinear::pack(&CodesRef {
            bits: Bits::B4,
            group_size,
            in_features,
            out_features,
            codes: &codes,
            zeros: &zeros,
            scales: &scales,
            g_idx: &g_idx,
            bias: None,
        })
        .unwrap();
        let name = LinearName { module: format!("m{seed}"), in_features, out_features, bias: false };
        (name, LinearWeight::Packed(packed))
    }

    fn dequantized(layer: &(LinearName, LinearWeight<'_>)) -> Vec<f32> {
        match &layer.1 {
            LinearWeight::Packed(packed) => packed.dequantize(),
            LinearWeight::Dense { .. } => unreachable!(),
        }
    }

    #[test]
    fn concatenation_keeps_every_row() {
        for act_order in [false, true] {
            let layers = [layer(16, 1, act_order), layer(8, 2, act_order), layer(24, 3, act_order)];
            let fused = concatenate(&layers).unwrap();
            let want: Vec<f32> = layers.iter().flat_map(dequantized).collect();
            assert_eq!(fused.dequantize(), want);
        }
    }

    #[test]
    fn different_groups_stay_apart() {
        assert!(concatenate(&[layer(16, 1, false), layer(16, 2, true)]).is_none());
        // 12 zero points of 4 bits do not fill words.
        assert!(concatenate(&[layer(16, 1, false), layer(12, 2, false)]).is_none());
    }
}
