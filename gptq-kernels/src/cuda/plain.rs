//! `cuda-plain`: every packed layer of 2, 3, 4 or 8 bits, as directly as it can be written. The kernel is `cuda/plain.cu`.

use std::marker::PhantomData;

use gptq_format::PackedLinear;
use half::f16;

use super::{
    CudaDevice, Element,
    driver::{Function, Launch, Resident},
};
use crate::{
    ErrorBound, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Unsupported, WeightFormat,
    Workspace,
};

pub(super) const NAME: &str = "cuda-plain";

/// Output features, slices of the input features, and rows of a block; as in `plain.cu`.
const LANES: usize = 32;
const SLICES: usize = 8;
const ROWS: usize = 4;

pub(super) struct Plain<T: Element> {
    device: CudaDevice<T>,
}

impl<T: Element> Plain<T> {
    pub(super) fn new(device: &CudaDevice<T>) -> Result<Self, Unsupported> {
        device.needs((8, 0))?;
        Ok(Self { device: device.clone() })
    }
}

/// `PlainArgs` of `plain.cu`.
#[repr(C)]
struct Args {
    qweight: u64,
    qzeros: u64,
    scales: u64,
    g_idx: u64,
    bias: u64,
    x: u64,
    y: u64,
    x_stride: u64,
    y_stride: u64,
    rows: u32,
    n: u32,
    k: u32,
    zero_words: u32,
}

struct PlainLinear<T> {
    spec: LinearSpec,
    function: Function,
    qweight: Resident,
    qzeros: Resident,
    scales: Resident,
    g_idx: Resident,
    bias: Resident,
    zero_words: u32,
    element: PhantomData<T>,
}

impl<T: Element> LinearKernel<CudaDevice<T>> for Plain<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> Option<String> {
        super::image::version(&["plain"])
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        let WeightFormat::Gptq { bits, .. } = spec.weight else { return Err(Unsupported::WeightFormat) };
        if bits.is_planar_only() {
            return Err(Unsupported::Bits { bits: bits.get() });
        }
        spec.only_multiplies()?;
        // 32-bit sizes and bit positions in the kernel.
        if spec.in_features >= 1 << 24 || spec.out_features >= 1 << 24 {
            let (in_features, out_features) = (spec.in_features, spec.out_features);
            return Err(Unsupported::Shape { in_features, out_features });
        }
        Ok(())
    }

    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        let spec = LinearSpec::of(weight);
        self.supports(&spec).map_err(|reason| KernelError::Unsupported { kernel: NAME, reason })?;
        let stream = self.device.stream();
        let image = format!("plain-{}-{}", T::NAME, weight.bits().get());
        Ok(Box::new(PlainLinear {
            function: self.device.images().function(&image, "plain", 0)?,
            qweight: Resident::new(stream, weight.qweight())?,
            qzeros: Resident::new(stream, weight.qzeros())?,
            scales: Resident::new(stream, weight.scales())?,
            g_idx: Resident::new(stream, weight.g_idx())?,
            bias: Resident::new::<f16>(stream, weight.bias().unwrap_or_default())?,
            zero_words: weight.bits().words(weight.out_features()) as u32,
            spec,
            element: PhantomData::<T>,
        }))
    }

    /// A product passes one rounding in its fused multiply-add and one in every later one of its slice, at most
    /// `ceil(k / 8 / 32) * 32` in all, then one for each slice; the bias passes those of the slices.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        let steps = spec.in_features.div_ceil(SLICES * 32) * 32;
        output_bound::<T>(ErrorBound::float32(steps + SLICES))
    }
}

/// Adds the rounding to the element type, subnormal numbers included.
pub(super) fn output_bound<T: Element>(bound: ErrorBound) -> ErrorBound {
    bound.with_output_error(T::UNIT, T::SUBNORMAL)
}

impl<T: Element> Linear<CudaDevice<T>> for PlainLinear<T> {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    fn weight_bytes(&self) -> usize {
        [&self.qweight, &self.qzeros, &self.scales, &self.g_idx, &self.bias].map(Resident::bytes).iter().sum()
    }

    fn workspace_len(&self, _: usize) -> usize {
        0
    }

    fn forward(
        &self,
        x: MatRef<'_, CudaDevice<T>>,
        y: MatMut<'_, CudaDevice<T>>,
        _: &mut Workspace<CudaDevice<T>>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
        let (rows, x_stride, y_stride) = (x.rows(), x.row_stride(), y.row_stride());
        let (x, y) = (x.data(), y.into_data());
        // A grid has at most 65535 blocks along y.
        for start in (0..rows).step_by(65535 * ROWS) {
            let count = (rows - start).min(65535 * ROWS);
            let mut args = Args {
                qweight: self.qweight.address(),
                qzeros: self.qzeros.address(),
                scales: self.scales.address(),
                g_idx: self.g_idx.address(),
                bias: self.bias.address(),
                x: x.address() + (start * x_stride * size_of::<T>()) as u64,
                y: y.address() + (start * y_stride * size_of::<T>()) as u64,
                x_stride: x_stride as u64,
                y_stride: y_stride as u64,
                rows: count as u32,
                n: self.spec.out_features as u32,
                k: self.spec.in_features as u32,
                zero_words: self.zero_words,
            };
            let launch = Launch {
                grid: (self.spec.out_features.div_ceil(LANES) as u32, count.div_ceil(ROWS) as u32),
                threads: (LANES * SLICES) as u32,
                shared: 0,
                cluster: 1,
                programmatic: false,
            };
            // SAFETY: `Args` is `PlainArgs`. The first five pointers are to the layer's own memory, of the sizes of a
            // validated `PackedLinear`; `check_operands` has compared x and y, of `count` rows from `start` on, with the
            // layer; all of them outlive the stream's work, because the caller may not free what a stream uses and
            // `Resident` waits. The stream is that of y.
            unsafe { self.function.launch(NAME, launch, y.stream(), &mut args) }?;
        }
        Ok(())
    }
}
