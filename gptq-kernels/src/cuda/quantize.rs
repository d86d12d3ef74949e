//! Quantising on a GPU: Hessian, factorisation, column loop and packing, from activations that are there already.
//!
//! | file | holds |
//! |---|---|
//! | `gpu` | the kernels of `cuda/quantize.cu`, and cuBLAS with row-major matrices |
//! | `hessian`, `halves` | sums of activations |
//! | `factor` | damping and factorisation |
//! | `columns`, `solve` | the column loop |
//! | `result` | codes, packed words, weights again |
//! | `backend`, `host` | what a whole model needs besides |
//!
//! Everything is queued on the device's stream; [`Quantizer::prepare`], [`Quantizer::quantize`] and
//! [`Quantizer::pack`] wait for their results.

mod backend;
mod columns;
mod factor;
mod gpu;
mod halves;
mod hessian;
mod host;
mod memory;
mod result;
mod solve;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use gptq_core::{
    ColumnOrder, DampReport, GptqConfig, GptqError, Hessian, LayerReport, Method, NotPositiveDefinite,
    OnFailure, PhaseTimes, QuantizedWeight, rtn,
};
use gptq_format::PackedLinear;
use ndarray::{Array2, ArrayView2, ShapeBuilder};

use super::{Activation, CudaDevice};
use crate::{
    DenseWeight, Device, MatMut, MatRef,
    cpu::with_f32,
    quantize::{QuantizeError, Quantizer},
};
use factor::{Factor, Matrix};
use gpu::{Gpu, check_features};
use memory::Memory;
use solve::{Natural, Source};

pub use hessian::{CudaMoments, CudaSums};
pub use host::CudaHostBytes;
pub use result::CudaQuantized;

/// GPTQ on a GPU of compute capability 8.0 or later, with cuBLAS, for activations of any type.
///
/// Codes are those of gptq-core within its gates: the column loop has the same operations in the same order, the factor is
/// computed in float64 too and differs by its last bits, and Hessians differ by the order of their sums.
pub struct CudaQuantizer<T: Activation> {
    config: GptqConfig,
    gpu: Arc<Gpu<T>>,
}

/// A factorised Hessian on a GPU, and the settings it was prepared under.
pub struct CudaPrepared {
    shared: Arc<Shared>,
    natural: Option<Natural>,
    /// `position[original column]` in the order of quantisation.
    position: Vec<usize>,
    dead_columns: Vec<usize>,
    dead_positions: Option<Memory<u32>>,
    factor: Result<(Factor, DampReport), NotPositiveDefinite>,
    samples: u64,
    times: PhaseTimes,
}

/// Orders and groups, which results outlive their Hessian with.
struct Shared {
    g_idx: Vec<u32>,
    /// By original column.
    device_g_idx: Memory<u32>,
    /// By position: original column, and group.
    order: Memory<u32>,
    groups: Memory<u32>,
}

impl<T: Activation> CudaQuantizer<T> {
    /// A quantiser on the device's stream. Takes about 0.3 s, for cuBLAS.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`](crate::KernelError::Unsupported) if the GPU is too old, cuBLAS cannot be loaded, or
    /// lazy blocks are wider than 256 columns or than its shared memory holds.
    pub fn new(device: &CudaDevice<T>, config: GptqConfig) -> Result<Self, QuantizeError> {
        let gpu = Arc::new(Gpu::new(device)?);
        solve::check_config(&gpu, &config)?;
        Ok(Self { config, gpu })
    }

    /// One with other settings that shares the device, its kernels and cuBLAS.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`](crate::KernelError::Unsupported) for lazy blocks that are too wide.
    pub fn with_config(&self, config: GptqConfig) -> Result<Self, QuantizeError> {
        solve::check_config(&self.gpu, &config)?;
        Ok(Self { config, gpu: Arc::clone(&self.gpu) })
    }

    /// The finished Hessian on the host, for those who want to look at it or to keep it.
    ///
    /// # Errors
    /// [`GptqError::NoSamples`], [`GptqError::NonFiniteHessian`]; what the device says.
    pub fn hessian(&self, sums: CudaSums<T>) -> Result<Hessian, QuantizeError> {
        let CudaMoments { matrix, cross, diagonal, samples } = sums.finish(&self.gpu)?;
        let n = diagonal.len();
        let download = |matrix: &Memory<f64>| -> Result<_, QuantizeError> {
            let elements = matrix.to_host(self.gpu.stream())?;
            Ok(ndarray::Array2::from_shape_vec((n, n), elements).expect("invariant: made with this shape"))
        };
        let hessian = Hessian::from_matrix(download(&matrix)?, samples)?;
        Ok(match cross {
            Some(cross) => hessian.with_cross(download(&cross)?)?,
            None => hessian,
        })
    }

    fn factorize_moments(&self, moments: &CudaMoments) -> Result<CudaPrepared, QuantizeError> {
        let started = Instant::now();
        let Self { config, gpu } = self;
        let stream = gpu.stream();
        let CudaMoments { matrix, cross, diagonal, samples } = moments;
        if config.gptaq().is_some() && cross.is_none() {
            return Err(GptqError::MissingReference.into());
        }
        let mut diagonal = diagonal.clone();
        let mut dead_columns = Vec::new();
        for (column, d) in diagonal.iter_mut().enumerate() {
            if *d == 0.0 {
                *d = 1.0;
                dead_columns.push(column);
            }
        }
        let order = ColumnOrder::new(config, &diagonal);
        let indices = |values: &[usize]| {
            let values: Vec<u32> = values.iter().map(|&value| value as u32).collect();
            Memory::copy_of(stream, &values)
        };
        let mut position = vec![0; diagonal.len()];
        for (p, &column) in order.column.iter().enumerate() {
            position[column] = p;
        }
        let dead_positions: Vec<usize> = dead_columns.iter().map(|&column| position[column]).collect();
        let g_idx = order.g_idx();
        let natural = match config.group_size() {
            Some(_) if config.static_groups() => {
                Some(Natural { positions: indices(&position)?, groups: Memory::copy_of(stream, &g_idx)? })
            }
            _ => None,
        };
        let shared = Arc::new(Shared {
            device_g_idx: Memory::copy_of(stream, &g_idx)?,
            g_idx,
            order: indices(&order.column)?,
            groups: indices(&order.group)?,
        });
        let dead_positions = if dead_positions.is_empty() { None } else { Some(indices(&dead_positions)?) };
        let ordered = Instant::now();
        let waiting =
            Matrix { hessian: matrix, cross: cross.as_ref(), order: &shared.order, diagonal: &diagonal };
        let outcome = waiting.factorize(gpu, config)?;
        let factorize = ordered.elapsed();
        let factor = match outcome {
            Ok(factor) => Ok(factor),
            Err(failure) => match config.on_failure() {
                OnFailure::Error => {
                    let (last_damp, source) = (failure.last_damp, failure.source);
                    return Err(GptqError::NotPositiveDefinite { last_damp, source }.into());
                }
                OnFailure::Rtn => {
                    let (last_damp, source) = (failure.last_damp, failure.source);
                    tracing::warn!(last_damp, %source, "no damping helps: falling back to round to nearest");
                    Err(source)
                }
            },
        };
        let prepare = started.elapsed().saturating_sub(factorize);
        let times = PhaseTimes { prepare, factorize, solve: Duration::ZERO };
        Ok(CudaPrepared {
            shared,
            natural,
            position,
            dead_columns,
            dead_positions,
            factor,
            samples: *samples,
            times,
        })
    }

    fn quantize_source(
        &self,
        prepared: &CudaPrepared,
        weight: &Source<'_, T>,
    ) -> Result<CudaQuantized, QuantizeError> {
        let (expected, (_, found)) = (prepared.shared.g_idx.len(), weight.shape());
        if expected != found {
            return Err(GptqError::Features { what: "weight", expected, found }.into());
        }
        match &prepared.factor {
            Err(reason) => self.fall_back(*reason, prepared, weight),
            Ok((factor, damp)) => {
                let report = LayerReport {
                    method: Method::Gptq,
                    loss: None,
                    damp: Some(*damp),
                    dead_columns: prepared.dead_columns.clone(),
                    samples: prepared.samples,
                    times: prepared.times,
                };
                solve::quantize(&self.gpu, &self.config, prepared, (factor, report), weight)
            }
        }
    }

    /// Rounds to nearest on the host: a rare case, not worth a kernel.
    fn fall_back(
        &self,
        reason: NotPositiveDefinite,
        prepared: &CudaPrepared,
        weight: &Source<'_, T>,
    ) -> Result<CudaQuantized, QuantizeError> {
        let (rows, columns) = weight.shape();
        let rounded = match weight {
            Source::Host(weight) => with_f32(weight, |weight| rtn(weight, &self.config))?,
            Source::Device(matrix) => {
                // As far as the last row's end: rows may be further apart than they are long.
                let stride = matrix.row_stride();
                let mut values = vec![0.0; CudaDevice::<T>::len(&matrix.data())];
                self.gpu.device.download(matrix.data(), &mut values)?;
                let shape = (rows, columns).strides((stride, 1));
                let view = ArrayView2::from_shape(shape, &values).expect("invariant: a MatRef fits");
                rtn(view, &self.config)?
            }
        };
        let QuantizedWeight { codes, scales, zeros, g_idx, mut report } = rounded;
        report.method = Method::RtnFallback(reason);
        report.samples = prepared.samples;
        report.times = PhaseTimes { solve: report.times.solve, ..prepared.times };
        let stream = self.gpu.stream();
        let (codes, scales) = (codes.into_raw_vec_and_offset().0, scales.into_raw_vec_and_offset().0);
        let shared = Shared {
            device_g_idx: Memory::copy_of(stream, &g_idx)?,
            g_idx,
            order: Memory::zeros(stream, 0)?,
            groups: Memory::zeros(stream, 0)?,
        };
        Ok(CudaQuantized {
            rows,
            codes: Memory::copy_of(stream, &codes)?,
            scales: Memory::copy_of(stream, &scales)?,
            zeros: Memory::copy_of(stream, &zeros.into_raw_vec_and_offset().0)?,
            host_scales: scales,
            shared: Arc::new(shared),
            report,
        })
    }
}

impl<T: Activation> Quantizer<CudaDevice<T>> for CudaQuantizer<T> {
    type Sums = CudaSums<T>;
    type Moments = CudaMoments;
    type Prepared = CudaPrepared;
    type Quantized = CudaQuantized;

    fn config(&self) -> &GptqConfig {
        &self.config
    }

    fn sums(&self, in_features: usize) -> Result<CudaSums<T>, QuantizeError> {
        check_features(in_features, 1)?;
        Ok(CudaSums::new(&self.gpu, in_features, self.config.gptaq().is_some())?)
    }

    fn add_batch(
        &self,
        sums: &mut CudaSums<T>,
        inputs: MatRef<'_, CudaDevice<T>>,
        reference: Option<MatRef<'_, CudaDevice<T>>>,
    ) -> Result<(), QuantizeError> {
        sums.add(&self.gpu, inputs, reference)
    }

    fn finish(&self, sums: CudaSums<T>) -> Result<CudaMoments, QuantizeError> {
        sums.finish(&self.gpu)
    }

    fn moments(&self, hessian: Hessian) -> Result<CudaMoments, QuantizeError> {
        check_features(hessian.in_features(), 1)?;
        let upload = |matrix: ArrayView2<'_, f64>| {
            let matrix = matrix.as_standard_layout();
            let elements = matrix.as_slice().expect("invariant: the layout is standard");
            Memory::copy_of(self.gpu.stream(), elements)
        };
        let cross = match self.config.gptaq() {
            Some(_) => hessian.cross().map(upload).transpose()?,
            None => None,
        };
        Ok(CudaMoments {
            matrix: upload(hessian.matrix())?,
            cross,
            diagonal: hessian.matrix().diag().to_vec(),
            samples: hessian.samples(),
        })
    }

    fn diagonal(&self, moments: &CudaMoments) -> Vec<f64> {
        moments.diagonal.clone()
    }

    fn output_error(&self, moments: &CudaMoments, error: ArrayView2<'_, f32>) -> Result<f64, QuantizeError> {
        moments.output_error(&self.gpu, error)
    }

    fn prepare_moments(&self, moments: &CudaMoments) -> Result<CudaPrepared, QuantizeError> {
        self.factorize_moments(moments)
    }

    fn quantize(
        &self,
        prepared: &CudaPrepared,
        weight: &DenseWeight<'_>,
    ) -> Result<CudaQuantized, QuantizeError> {
        weight.validate()?;
        self.quantize_source(prepared, &Source::Host(*weight))
    }

    fn quantize_resident(
        &self,
        prepared: &CudaPrepared,
        weight: MatRef<'_, CudaDevice<T>>,
    ) -> Result<CudaQuantized, QuantizeError> {
        let (rows, columns) = (weight.rows(), weight.cols());
        if rows == 0 || columns == 0 {
            return Err(GptqError::EmptyWeight { rows, columns }.into());
        }
        self.quantize_source(prepared, &Source::Device(weight))
    }

    fn report<'a>(&self, quantized: &'a CudaQuantized) -> &'a LayerReport {
        &quantized.report
    }

    fn scales(&self, quantized: &CudaQuantized) -> Array2<f32> {
        quantized.scales()
    }

    fn download(&self, quantized: &CudaQuantized) -> Result<QuantizedWeight, QuantizeError> {
        quantized.download(&self.gpu)
    }

    fn pack(&self, quantized: &CudaQuantized, bias: Option<&[f32]>) -> Result<PackedLinear, QuantizeError> {
        quantized.pack(&self.gpu, &self.config, bias)
    }

    fn dequantize(
        &self,
        quantized: &CudaQuantized,
        y: MatMut<'_, CudaDevice<T>>,
    ) -> Result<(), QuantizeError> {
        Ok(quantized.dequantize(&self.gpu, y)?)
    }

    /// A square element has 12 bytes while sums are added; then 8 of the moments and 14 of the factorisation. GPTAQ has 12
    /// and 8 more of moments, and 28 more of its correction. A weight has 4 bytes in float32, and at most 4 as it is
    /// uploaded, or one each as code, error, packed and again 2 as activations are.
    fn working_bytes(&self, in_features: usize, out_features: usize) -> usize {
        let square = in_features.saturating_mul(in_features);
        let weight = in_features.saturating_mul(out_features);
        let factors = if self.config.gptaq().is_some() { 22 + 8 + 28 } else { 22 };
        square.saturating_mul(factors).saturating_add(weight.saturating_mul(10)).saturating_add(64 << 20)
    }
}
