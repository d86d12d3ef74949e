//! Codes on the device, and what is made of them there.

use std::sync::Arc;

use gptq_core::{GptqConfig, LayerReport, QuantizedWeight};
use gptq_format::{Bits, PackedLinear, PackedParts};
use half::f16;
use ndarray::Array2;

use super::{
    Shared,
    gpu::{Gpu, MOST_BLOCKS},
    memory::Memory,
};
use crate::{
    KernelError, MatMut,
    cuda::{Activation, CudaDevice},
    quantize::{QuantizeError, half_bias},
};

/// Codes, scales and zeros of one weight on a GPU.
pub struct CudaQuantized {
    pub(super) rows: usize,
    /// (rows, n), columns in their original order.
    pub(super) codes: Memory<u8>,
    /// (rows, groups)
    pub(super) scales: Memory<f32>,
    /// (rows, groups)
    pub(super) zeros: Memory<u8>,
    pub(super) host_scales: Vec<f32>,
    pub(super) shared: Arc<Shared>,
    pub(super) report: LayerReport,
}

/// `DequantizeArgs`.
#[repr(C)]
struct DequantizeArgs {
    codes: u64,
    scales: u64,
    zeros: u64,
    g_idx: u64,
    out: u64,
    stride: u64,
    rows: u32,
    n: u32,
    group_count: u32,
}

/// `PackArgs`.
#[repr(C)]
struct PackArgs {
    codes: u64,
    scales: u64,
    zeros: u64,
    qweight: u64,
    qzeros: u64,
    half_scales: u64,
    rows: u32,
    n: u32,
    group_count: u32,
    zero_words: u32,
    bits: u32,
}

impl CudaQuantized {
    fn n(&self) -> usize {
        self.shared.g_idx.len()
    }

    /// (rows, groups)
    pub(super) fn scales(&self) -> Array2<f32> {
        let groups = self.host_scales.len() / self.rows;
        Array2::from_shape_vec((self.rows, groups), self.host_scales.clone())
            .expect("invariant: allocated with this many elements")
    }

    pub(super) fn download<T: Activation>(&self, gpu: &Gpu<T>) -> Result<QuantizedWeight, QuantizeError> {
        let (rows, n) = (self.rows, self.n());
        let groups = self.host_scales.len() / rows;
        let shaped = "invariant: allocated with this many elements";
        let stream = gpu.stream();
        Ok(QuantizedWeight {
            codes: Array2::from_shape_vec((rows, n), self.codes.to_host(stream)?).expect(shaped),
            scales: self.scales(),
            zeros: Array2::from_shape_vec((rows, groups), self.zeros.to_host(stream)?).expect(shaped),
            g_idx: self.shared.g_idx.clone(),
            report: self.report.clone(),
        })
    }

    pub(super) fn dequantize<T: Activation>(
        &self,
        gpu: &Gpu<T>,
        y: MatMut<'_, CudaDevice<T>>,
    ) -> Result<(), KernelError> {
        let (rows, n) = (self.rows, self.n());
        if (y.rows(), y.cols()) != (rows, n) {
            let (got_rows, got_cols) = (y.rows(), y.cols());
            return Err(KernelError::Shape { argument: "y", rows, cols: n, got_rows, got_cols });
        }
        let stride = y.row_stride() as u64;
        let args = DequantizeArgs {
            codes: self.codes.address(),
            scales: self.scales.address(),
            zeros: self.zeros.address(),
            g_idx: self.shared.device_g_idx.address(),
            out: y.into_data().address(),
            stride,
            rows: rows as u32,
            n: n as u32,
            group_count: (self.host_scales.len() / rows) as u32,
        };
        let entry = Gpu::<T>::typed("dequantize_f16", "dequantize_bf16", "dequantize_f32");
        // SAFETY: `DequantizeArgs` of the source; codes and y are (rows, n), scales and zeros (rows, groups), g_idx (n).
        unsafe { gpu.launch(entry, (n.div_ceil(256), rows.min(MOST_BLOCKS)), (256, 0), args) }
    }

    pub(super) fn pack<T: Activation>(
        &self,
        gpu: &Gpu<T>,
        config: &GptqConfig,
        bias: Option<&[f32]>,
    ) -> Result<PackedLinear, QuantizeError> {
        let (rows, n, stream) = (self.rows, self.n(), gpu.stream());
        let groups = self.host_scales.len() / rows;
        let bits = Bits::try_from(config.bits()).expect("invariant: both crates know the same widths");
        let zero_words = bits.words(rows);
        let qweight = Memory::<u32>::zeros(stream, bits.words(n) * rows)?;
        let qzeros = Memory::<u32>::zeros(stream, groups * zero_words)?;
        let half_scales = Memory::<f16>::zeros(stream, groups * rows)?;
        let args = || PackArgs {
            codes: self.codes.address(),
            scales: self.scales.address(),
            zeros: self.zeros.address(),
            qweight: qweight.address(),
            qzeros: qzeros.address(),
            half_scales: half_scales.address(),
            rows: rows as u32,
            n: n as u32,
            group_count: groups as u32,
            zero_words: zero_words as u32,
            bits: config.bits(),
        };
        // SAFETY: `PackArgs` of the source; sizes are those in its comments.
        unsafe {
            gpu.launch("pack_codes", (rows.div_ceil(256), n.div_ceil(32)), (256, 0), args())?;
            gpu.launch("pack_grids", (rows.div_ceil(256), groups), (256, 0), args())?;
        }
        Ok(PackedLinear::from_parts(PackedParts {
            bits,
            group_size: config.group_size().map_or(n, |size| size.get()),
            in_features: n,
            out_features: rows,
            qweight: qweight.to_host(stream)?,
            qzeros: qzeros.to_host(stream)?,
            scales: half_scales.to_host(stream)?,
            g_idx: self.shared.g_idx.clone(),
            bias: bias.map(half_bias).transpose()?,
        })?)
    }
}
