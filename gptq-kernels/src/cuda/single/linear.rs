//! `cuda-split-f32`: products of float32 on tensor cores.
//!
//! A number is the sum of two halves, `x = x1 + x2 / 2^11` with 22 significant bits (`single_split.cuh`), and
//!
//! ```text
//! x w = x1 w1 + (x2 w1 + x1 w2) / 2^11        and x2 w2 / 2^22, which is left out
//! ```
//!
//! is three products of halves, each exact, summed in float32. Tensor cores cut sums off instead of rounding them, which adds up
//! to a bias in long sums: `x1 w1` is summed over [`span`] features at a time, and these sums are added with rounding.
//! The other two, 2^-11 as large, are one product over all features.
//!
//! Relative errors in the 2-norm on an H200 against float64, of normally distributed numbers / of their magnitudes (where it is
//! the bias), 4096 features:
//!
//! | products | error |
//! |---|---|
//! | cuBLAS in float32, 50 TFLOP/s | 4.1e-7 / 1.3e-7 |
//! | this, at once | 4.9e-6 / 2.5e-5 |
//! | this, 512 features at a time | 6.5e-7 / 2.7e-6 |
//! | three products of bf16 | 6.3e-6 / 1.4e-5 |
//! | three products of TF32 | 9.6e-6 / 3.0e-5 |
//! | one product of halves, 700 TFLOP/s | 2.9e-4 / 2.6e-5 |

use std::{ops::RangeInclusive, sync::Arc};

use cudarc::cublas::sys::cudaDataType;
use gptq_format::PackedLinear;

use super::{IMAGE, MOST_BLOCKS, elements::elementwise, launch};
use crate::{
    DenseData, DenseType, DenseWeight, ErrorBound, Fusion, KernelError, Linear, LinearKernel, LinearSpec,
    MatMut, MatRef, Unsupported, Workspace,
    cuda::{
        CudaDevice,
        blas::{self, Blas, Operand, Scratch},
        driver::{Function, Resident},
    },
};

pub(in crate::cuda) const NAME: &str = "cuda-split-f32";

/// Terms of `x1 w1` that tensor cores sum at once, where `k` features are multiplied, or Hessians of `k` features are summed over
/// tokens. Each sum costs a pass over the result: half of the time that products of large layers take, if they were as short as
/// those of small ones.
pub(in crate::cuda) const fn span(k: usize) -> usize {
    if k <= 2048 { 256 } else { 1024 }
}
/// What low parts are multiplied by, as in `single_split.cuh`.
pub(in crate::cuda) const LOW: f32 = 2048.0;
/// What activations are multiplied by, so that there is room for large ones: up to a million. Those below 2^-10 are held to
/// 2^-32, which is less than 22 bits of them, and more than a product of halves keeps.
pub(in crate::cuda) const SCALE: f32 = 1.0 / 16.0;

/// Bytes of scratch for cuBLAS: what NVIDIA recommends for Hopper.
const SCRATCH: usize = 32 << 20;

/// `SplitArgs`.
#[repr(C)]
pub(in crate::cuda) struct SplitArgs {
    pub(in crate::cuda) from: u64,
    pub(in crate::cuda) high: u64,
    pub(in crate::cuda) low: u64,
    pub(in crate::cuda) again: u64,
    pub(in crate::cuda) from_stride: u64,
    pub(in crate::cuda) stride: u64,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) rows: u32,
    pub(in crate::cuda) cols: u32,
    pub(in crate::cuda) height: u32,
    pub(in crate::cuda) width: u32,
}

impl SplitArgs {
    /// Blocks of a launch of 256 threads.
    pub(in crate::cuda) fn grid(&self) -> (usize, usize) {
        (self.width.div_ceil(1024) as usize, (self.height as usize).min(MOST_BLOCKS))
    }
}

pub(super) struct Split {
    device: CudaDevice<f32>,
}

struct SplitLinear {
    spec: LinearSpec,
    blas: Arc<Blas>,
    split: Function,
    add_bias: Function,
    /// Rows of `w1`, then `w2`, `width` halves each.
    weight: Resident,
    bias: Resident,
    width: usize,
}

impl Split {
    pub(super) fn new(device: &CudaDevice<f32>) -> Result<Self, Unsupported> {
        device.needs((8, 0))?;
        blas::probe()?;
        Ok(Self { device: device.clone() })
    }

    /// A layer of a weight on the device of type `dtype`, rows `stride` elements apart.
    fn layer(
        &self,
        spec: LinearSpec,
        dtype: DenseType,
        (weight, stride): (u64, usize),
        bias: Option<&[f32]>,
    ) -> Result<Box<dyn Linear<CudaDevice<f32>>>, KernelError> {
        let (stream, images) = (self.device.stream(), self.device.images());
        let (n, k) = (spec.out_features, spec.in_features);
        let width = k.next_multiple_of(8);
        let halves = Resident::zeros::<u16>(stream, n * 2 * width)?;
        let mut args = SplitArgs {
            from: weight,
            high: halves.address(),
            low: halves.address() + (width * 2) as u64,
            again: 0,
            from_stride: stride as u64,
            stride: 2 * width as u64,
            scale: 1.0,
            rows: n as u32,
            cols: k as u32,
            height: n as u32,
            width: width as u32,
        };
        let entry = match dtype {
            DenseType::F32 => "split_f32",
            DenseType::F16 => "split_f16",
            DenseType::Bf16 => "split_bf16",
        };
        let split = images.function(IMAGE, entry, 0)?;
        // SAFETY: `SplitArgs` field by field: the caller's weight is n rows of k elements `stride` apart, and the halves are
        // n rows of two times `width`.
        unsafe { split.launch(entry, launch(args.grid(), 256, 0)?, stream.cu_stream(), &mut args) }?;
        Ok(Box::new(SplitLinear {
            blas: Blas::of(stream.context())?,
            split: images.function(IMAGE, "split_f32", 0)?,
            add_bias: images.function(IMAGE, "add_bias", 0)?,
            weight: halves,
            bias: Resident::new::<f32>(stream, bias.unwrap_or_default())?,
            width,
            spec,
        }))
    }
}

impl LinearKernel<CudaDevice<f32>> for Split {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> Option<String> {
        crate::cuda::image::version(&["single"])
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        spec.only_multiplies()?;
        // 32-bit sizes in cuBLAS.
        if spec.in_features >= 1 << 24 || spec.out_features >= 1 << 24 {
            let (in_features, out_features) = (spec.in_features, spec.out_features);
            return Err(Unsupported::Shape { in_features, out_features });
        }
        Ok(())
    }

    /// Of the weight that the codes stand for.
    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<CudaDevice<f32>>>, KernelError> {
        let spec = LinearSpec::of(weight);
        self.supports(&spec).map_err(|reason| KernelError::Unsupported { kernel: NAME, reason })?;
        let floats = Resident::new(self.device.stream(), &weight.dequantize())?;
        let bias: Option<Vec<f32>> =
            weight.bias().map(|bias| bias.iter().map(|value| value.to_f32()).collect());
        let k = spec.in_features;
        self.layer(spec, DenseType::F32, (floats.address(), k), bias.as_deref())
    }

    /// Takes `x` as it is: the order of the groups is gone with the codes.
    fn prepare_in_order(
        &self,
        weight: &PackedLinear,
        fusion: &Fusion<'_>,
    ) -> Result<Box<dyn Linear<CudaDevice<f32>>>, KernelError> {
        self.prepare_fused(weight, fusion)
    }

    fn prepare_dense(
        &self,
        weight: &DenseWeight<'_>,
    ) -> Result<Box<dyn Linear<CudaDevice<f32>>>, KernelError> {
        weight.validate()?;
        let spec = LinearSpec::of_dense(weight);
        self.supports(&spec).map_err(|reason| KernelError::Unsupported { kernel: NAME, reason })?;
        let stream = self.device.stream();
        let resident = match weight.data {
            DenseData::F32(data) => Resident::new(stream, data),
            DenseData::F16(data) => Resident::new(stream, data),
            DenseData::Bf16(data) => Resident::new(stream, data),
        }?;
        let k = spec.in_features;
        self.layer(spec, weight.data.dtype(), (resident.address(), k), weight.bias)
    }

    fn prepare_resident(
        &self,
        weight: MatRef<'_, CudaDevice<f32>>,
        bias: Option<&[f32]>,
    ) -> Result<Box<dyn Linear<CudaDevice<f32>>>, KernelError> {
        let spec = LinearSpec::of_resident(self, weight, DenseType::F32, bias)?;
        self.layer(spec, DenseType::F32, (weight.data().address(), weight.row_stride()), bias)
    }

    /// A factor is held to `2^-22` of itself, its high part and the rounded low part: for two factors and the product that is left
    /// out, three times four units of `2^-24`. A product of high parts passes the additions of its tensor core in one
    /// span (16 products at a time, 17 errors of two units each, see `cuda-cublas`), then one addition for each span and the
    /// bias; those of low parts pass all additions, but are `2^-11` as large.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        let k = spec.in_features;
        let tensor_core = |features: usize| features.div_ceil(16) * 34;
        let (span, low) = (span(k), (2 * tensor_core(2 * k)).div_ceil(2048));
        let roundings = 12 + tensor_core(span.min(k)) + k.div_ceil(span) + 1 + low;
        // Low parts are rounded to multiples of 2^-35 at the least, of activations to 2^-35 / SCALE.
        let lost = 1.0 / (1u64 << 32) as f64;
        let bound = ErrorBound::float32(roundings);
        ErrorBound { absolute: bound.absolute + lost, ..bound }
    }
}

impl Linear<CudaDevice<f32>> for SplitLinear {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    /// cuBLAS chooses its algorithm by the number of rows.
    fn row_class(&self, rows: usize) -> RangeInclusive<usize> {
        rows..=rows
    }

    fn weight_bytes(&self) -> usize {
        self.weight.bytes() + self.bias.bytes()
    }

    fn workspace_len(&self, rows: usize) -> usize {
        SCRATCH / size_of::<f32>() + rows * self.width
    }

    fn forward(
        &self,
        x: MatRef<'_, CudaDevice<f32>>,
        mut y: MatMut<'_, CudaDevice<f32>>,
        workspace: &mut Workspace<CudaDevice<f32>>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
        let (rows, n, k, width) = (x.rows(), self.spec.out_features, self.spec.in_features, self.width);
        if rows == 0 {
            return Ok(());
        }
        let too_many = KernelError::Argument { what: "rows of x", got: rows, limit: i32::MAX as usize };
        let count = i32::try_from(rows).map_err(|_| too_many)?;
        let memory = workspace.take(self.workspace_len(rows))?;
        let scratch = Scratch { address: memory.address(), bytes: SCRATCH };
        // Rows of x2, then x1.
        let low = memory.address() + SCRATCH as u64;
        let high = low + (width * 2) as u64;
        let mut args = SplitArgs {
            from: x.data().address(),
            high,
            low,
            again: 0,
            from_stride: x.row_stride() as u64,
            stride: 2 * width as u64,
            scale: SCALE,
            rows: rows as u32,
            cols: k as u32,
            height: rows as u32,
            width: width as u32,
        };
        let half = |address| Operand { address, dtype: cudaDataType::CUDA_R_16F, stride: 2 * width };
        let (out, stream) = {
            let stride = y.row_stride();
            let y = y.reborrow().into_data();
            (Operand { address: y.address(), dtype: cudaDataType::CUDA_R_32F, stride }, y.stream())
        };
        // SAFETY: `SplitArgs` field by field: `check_operands` has compared x and y with the layer, whose own memory the weight
        // is; behind the scratch the workspace has `rows` rows of two times `width` halves. It is aligned as the driver aligns
        // allocations, to 256 bytes, and the caller lends it for the stream's work. The stream is that of y.
        unsafe {
            self.split.launch("split_f32", launch(args.grid(), 256, 0)?, stream, &mut args)?;
            let weight = self.weight.address();
            let shape = (count, n as i32, 2 * width as i32);
            let factor = 1.0 / (SCALE * LOW);
            self.blas.multiply(stream, scratch, shape, (half(low), half(weight), out), (factor, 0.0))?;
            let span = span(k);
            for first in (0..width).step_by(span) {
                let shape = (count, n as i32, span.min(width - first) as i32);
                let at = |address: u64| half(address + (first * 2) as u64);
                self.blas.multiply(
                    stream,
                    scratch,
                    shape,
                    (at(high), at(weight), out),
                    (1.0 / SCALE, 1.0),
                )?;
            }
            if self.spec.bias {
                elementwise(("add_bias", &self.add_bias), (self.bias.address(), 0), 0, y)?;
            }
        }
        Ok(())
    }
}
