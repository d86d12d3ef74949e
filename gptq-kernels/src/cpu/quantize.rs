//! Quantising on the CPU: gptq-core itself.

use gptq_core::{
    Gptq, GptqConfig, GptqError, Hessian, HessianAccumulator, LayerReport, PreparedHessian, QuantizedWeight,
};
use gptq_format::{Bits, CodesRef, PackedLinear};
use ndarray::{Array2, ArrayView2, Axis, ShapeBuilder};
use rayon::prelude::*;

use super::Cpu;
use crate::{
    DenseData, DenseType, DenseWeight, KernelError, MatMut, MatRef,
    quantize::{DeviceMemory, QuantizeBackend, QuantizeError, Quantizer},
};

/// Rows of a weight error that one task takes.
const CHUNK: usize = 16;

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
    type Moments = Hessian;
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

    fn finish(&self, sums: HessianAccumulator) -> Result<Hessian, QuantizeError> {
        Ok(sums.finish()?)
    }

    fn moments(&self, hessian: Hessian) -> Result<Hessian, QuantizeError> {
        Ok(hessian)
    }

    fn diagonal(&self, hessian: &Hessian) -> Vec<f64> {
        hessian.matrix().diag().to_vec()
    }

    fn output_error(&self, hessian: &Hessian, error: ArrayView2<'_, f32>) -> Result<f64, QuantizeError> {
        let chunks: Vec<_> = error.axis_chunks_iter(Axis(0), CHUNK).collect();
        let chunks = chunks.into_par_iter().map(|chunk| hessian.output_error(chunk));
        let errors: Vec<f64> = chunks.collect::<Result<_, _>>()?;
        Ok(errors.iter().sum())
    }

    fn prepare_moments(&self, hessian: &Hessian) -> Result<PreparedHessian, QuantizeError> {
        Ok(self.gptq.prepare_shared(hessian)?)
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

    fn scales(&self, quantized: &QuantizedWeight) -> Array2<f32> {
        quantized.scales.clone()
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

    /// Sums and a copy in the order of quantisation, its factor, and the weight with its codes.
    fn working_bytes(&self, in_features: usize, out_features: usize) -> usize {
        let square = in_features.saturating_mul(in_features);
        let weight = in_features.saturating_mul(out_features);
        square.saturating_mul(3 * size_of::<f64>()).saturating_add(weight.saturating_mul(9))
    }
}

impl QuantizeBackend for Cpu {
    type Quantizer = CpuQuantizer;
    type HostBytes = Vec<u8>;

    const ELEMENT: DenseType = DenseType::F32;

    fn quantizers(&self, configs: &[GptqConfig]) -> Result<Vec<CpuQuantizer>, QuantizeError> {
        Ok(configs.iter().cloned().map(CpuQuantizer::new).collect())
    }

    fn arithmetic(&self) -> String {
        "float32".to_owned()
    }

    fn memory(&self) -> Result<Option<DeviceMemory>, KernelError> {
        Ok(None)
    }

    fn host_bytes(&self, len: usize) -> Vec<u8> {
        vec![0; len]
    }

    fn save(&self, src: &[f32], dst: &mut [u8]) -> Result<(), KernelError> {
        check_bytes(src.len(), dst.len())?;
        dst.copy_from_slice(bytemuck::cast_slice(src));
        Ok(())
    }

    fn restore(&self, src: &[u8], dst: &mut [f32]) -> Result<(), KernelError> {
        check_bytes(dst.len(), src.len())?;
        bytemuck::cast_slice_mut(dst).copy_from_slice(src);
        Ok(())
    }
}

/// Fails unless so many floats have so many bytes.
fn check_bytes(floats: usize, bytes: usize) -> Result<(), KernelError> {
    let needed = floats * size_of::<f32>();
    if needed == bytes { Ok(()) } else { Err(KernelError::CopyLength { src: needed, dst: bytes }) }
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
