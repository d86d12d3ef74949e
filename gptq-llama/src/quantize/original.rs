use std::num::NonZeroUsize;

use gptq_core::{GptqConfig, QuantizedWeight};
use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::{DenseData, DenseWeight};
use ndarray::Array2;

use crate::{
    LlamaError, WeightSource,
    weights::{LinearName, LinearWeight, Tensor, read_linear},
};

/// A layer before it is quantised.
pub(super) struct Original<'a> {
    name: LinearName,
    weight: Tensor<'a>,
    bias: Option<Vec<f32>>,
}

impl<'a> Original<'a> {
    pub(super) fn read(source: &'a dyn WeightSource, name: LinearName) -> Result<Self, LlamaError> {
        let LinearWeight::Dense { tensor: weight, bias } = read_linear(source, &name)? else {
            return Err(LlamaError::AlreadyQuantized { tensor: name.module });
        };
        Ok(Self { name, weight, bias })
    }

    /// `(out_features, in_features)`
    pub(super) fn weight(&self) -> Array2<f32> {
        Array2::from_shape_vec((self.name.out_features, self.name.in_features), self.weight.to_f32())
            .expect("invariant: read_linear has checked the shape")
    }

    pub(super) fn failed(&self, source: gptq_core::GptqError) -> LlamaError {
        LlamaError::Quantize { module: self.name.module.clone(), source }
    }

    pub(super) fn pack(
        &self,
        result: &QuantizedWeight,
        gptq: &GptqConfig,
    ) -> Result<PackedLinear, LlamaError> {
        let bits = Bits::try_from(gptq.bits()).expect("invariant: both crates know the same widths");
        let codes = result.codes.as_standard_layout();
        let zeros = result.zeros.as_standard_layout();
        let scales = result.scales.as_standard_layout();
        let flat = "invariant: the layout is standard";
        PackedLinear::pack(&CodesRef {
            bits,
            group_size: gptq.group_size().map_or(self.name.in_features, NonZeroUsize::get),
            in_features: self.name.in_features,
            out_features: self.name.out_features,
            codes: codes.as_slice().expect(flat),
            zeros: zeros.as_slice().expect(flat),
            scales: scales.as_slice().expect(flat),
            g_idx: &result.g_idx,
            bias: self.bias.as_deref(),
        })
        .map_err(|source| LlamaError::Pack { tensor: self.name.module.clone(), source })
    }

    /// The weight as it is stored.
    pub(super) fn dense(&self) -> DenseWeight<'_> {
        self.weight.as_dense(None)
    }

    pub(super) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    pub(super) fn name(&self) -> &LinearName {
        &self.name
    }

    /// Some rows of the weight, `(rows.len(), in_features)`.
    pub(super) fn rows(&self, rows: &[usize]) -> Array2<f32> {
        let columns = self.name.in_features;
        let floats = |row: usize| -> Vec<f32> {
            let range = row * columns..(row + 1) * columns;
            match self.dense().data {
                DenseData::F32(data) => data[range].to_vec(),
                DenseData::F16(data) => data[range].iter().map(|x| x.to_f32()).collect(),
                DenseData::Bf16(data) => data[range].iter().map(|x| x.to_f32()).collect(),
            }
        };
        Array2::from_shape_vec((rows.len(), columns), rows.iter().flat_map(|&row| floats(row)).collect())
            .expect("invariant: rows have as many elements as there are columns")
    }
}
