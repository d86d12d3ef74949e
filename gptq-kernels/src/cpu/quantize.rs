//! Quantising on the CPU: gptq-core itself.

use gptq_core::{
    Gptq, GptqConfig, GptqError, Hessian, HessianAccumulator, LayerReport, PreparedHessian, QuantizedWeight,
};
use gptq_format::{Bits, CodesRef, PackedLinear};
use ndarray::{ArrayView2, ShapeBuilder};

use super::Cpu;
use crate::{
    DenseData, DenseWeight, KernelError, MatMut, MatRef,
    quantize::{QuantizeError, Quantizer},
};

/// gptq-core behind [`Quantizer`].
#[derive(Debug, Clone)]
pub struct CpuQuantizer {
    gptq: Gptq,
}

impl CpuQuantizer {
    /// A quantiser with these settings.
    pub fn new(config: GptqConfig) -> Self {
        Self { gptq: Gptq::new(config) }
    }
}

/// A matrix of activations as gptq-core takes it.
fn view<'a>(matrix: &MatRef<'a, Cpu>) -> ArrayView2<'a, f32> {
    let shape = (matrix.rows(), matrix.cols()).strides((matrix.row_stride(), 1));
    ArrayView2::from_shape(shape, matrix.data()).expect("invariant: a MatRef fits in its memory")
}

impl Quantizer<Cpu> for CpuQuantizer {
    type Sums = HessianAccumulator;
    type Prepared = PreparedHessian;
    type Quantized = QuantizedWeight;

    fn config(&self) -> &GptqConfig {
        self.gptq.config()
    }

    fn sums(&self, in_features: usize) -> Result<HessianAccumulator, QuantizeError> {
        Ok(match self.config().gptaq() {
            Some(_) => HessianAccumulator::with_reference(in_features),
            None => HessianAccumulator::new(in_features),
        })
    }

    fn add_batch(
        &self,
        sums: &mut HessianAccumulator,
        inputs: MatRef<'_, Cpu>,
        reference: Option<MatRef<'_, Cpu>>,
    ) -> Result<(), QuantizeError> {
        match reference {
            Some(reference) => sums.add_batch_with_reference(view(&inputs), view(&reference))?,
            None => sums.add_batch(view(&inputs))?,
        }
        Ok(())
    }

    fn prepare(&self, sums: HessianAccumulator) -> Result<PreparedHessian, QuantizeError> {
        self.prepare_hessian(sums.finish()?)
    }

    fn prepare_hessian(&self, hessian: Hessian) -> Result<PreparedHessian, QuantizeError> {
        Ok(self.gptq.prepare(hessian)?)
    }

    fn quantize(
        &self,
        prepared: &PreparedHessian,
        weight: &DenseWeight<'_>,
    ) -> Result<QuantizedWeight, QuantizeError> {
        weight.validate()?;
        Ok(with_f32(weight, |weight| prepared.quantize(weight))?)
    }

    fn quantize_resident(
        &self,
        prepared: &PreparedHessian,
        weight: MatRef<'_, Cpu>,
    ) -> Result<QuantizedWeight, QuantizeError> {
        Ok(prepared.quantize(view(&weight))?)
    }

    fn report<'a>(&self, quantized: &'a QuantizedWeight) -> &'a LayerReport {
        &quantized.report
    }

    fn download(&self, quantized: &QuantizedWeight) -> Result<QuantizedWeight, QuantizeError> {
        Ok(quantized.clone())
    }

    fn pack(&self, quantized: &QuantizedWeight, bias: Option<&[f32]>) -> Result<PackedLinear, QuantizeError> {
        let config = self.config();
        let (out_features, in_features) = quantized.codes.dim();
        let (codes, zeros) = (quantized.codes.as_standard_layout(), quantized.zeros.as_standard_layout());
        let scales = quantized.scales.as_standard_layout();
        let flat = "invariant: the layout is standard";
        Ok(PackedLinear::pack(&CodesRef {
            bits: Bits::try_from(config.bits()).expect("invariant: both crates know the same widths"),
            group_size: config.group_size().map_or(in_features, |size| size.get()),
            in_features,
            out_features,
            codes: codes.as_slice().expect(flat),
            zeros: zeros.as_slice().expect(flat),
            scales: scales.as_slice().expect(flat),
            g_idx: &quantized.g_idx,
            bias,
        })?)
    }

    fn dequantize(&self, quantized: &QuantizedWeight, mut y: MatMut<'_, Cpu>) -> Result<(), QuantizeError> {
        let (rows, cols) = quantized.codes.dim();
        if (y.rows(), y.cols()) != (rows, cols) {
            let (got_rows, got_cols) = (y.rows(), y.cols());
            return Err(KernelError::Shape { argument: "y", rows, cols, got_rows, got_cols }.into());
        }
        let stride = y.row_stride();
        for (row, weight) in quantized.dequantize().outer_iter().enumerate() {
            for (y, weight) in y.data()[row * stride..].iter_mut().zip(weight) {
                *y = *weight;
            }
        }
        Ok(())
    }
}

/// Lends a weight in float32 to `work`.
pub(crate) fn with_f32<R>(
    weight: &DenseWeight<'_>,
    work: impl FnOnce(ArrayView2<'_, f32>) -> Result<R, GptqError>,
) -> Result<R, GptqError> {
    let converted: Vec<f32>;
    let data = match weight.data {
        DenseData::F32(data) => data,
        DenseData::F16(data) => {
            converted = data.iter().map(|x| x.to_f32()).collect();
            &converted
        }
        DenseData::Bf16(data) => {
            converted = data.iter().map(|x| x.to_f32()).collect();
            &converted
        }
    };
    let shape = (weight.out_features, weight.in_features);
    work(ArrayView2::from_shape(shape, data).expect("invariant: validated"))
}
