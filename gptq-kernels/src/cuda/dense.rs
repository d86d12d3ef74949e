//! `cuda-cublas` and `cuda-dense`: float weights. The kernel of both is `cuda/dense.cu`.
//!
//! Up to eight rows are one pass over the weight with a kernel of ours, which computes a row in the same way however many
//! there are. `cuda-dense` takes more passes for more rows, so it has one row class and needs no library; `cuda-cublas` calls
//! cuBLAS then, which chooses its algorithm by the number of rows, so that every such number is a class by itself.
//!
//! Nothing is ever rounded to another type: weights of the activations' type go to tensor cores, others are multiplied one
//! by one as they are, by `cuda-dense` alone.
//!
//! # How it came to be
//!
//! Microseconds on an H200 for one row and 4096 x 4096 / 4096 x 11008 / 11008 x 4096 / 8192 x 28672 / 4096 x 32000, fp16, in a CUDA
//! graph over rotated weights. What bytes alone cost at 4.3 TB/s is 7.8 / 21.0 / 21.0 / 109 / 61; cuBLAS takes 12.8 / 24.8 / 27.0 / 108
//! to 118 / 64 to 67.
//!
//! | version | time | expected, and what happened |
//! |---|---|---|
//! | a block for 16 features; a lane loads 16 bytes of each of two rows to registers, 128 bytes of a row a warp | 11.3 / 26.5 / 25.8 / 124 / 74 | 61 for the last; 74 registers, 3 blocks an SM, and their last wave is short |
//! | ranges of features for 2 blocks an SM, a ring of 6 stages of `cp.async` that goes on from one 16 features to the next; a lane copies what it uses | 12.3 / 27.2 / 27.5 / 133 / 76 | 9 / 22 / 22 / 112 / 63; slower, though nothing waits: memory does not like 128 bytes of each of 16 rows |
//! | the same, beginning while the kernel before ends | 10.2 / 23.8 / 24.9 / 128 / 73 | -2 us each; yes, where there are few rounds |
//! | a warp copies 512 bytes of one row at a time, 1 KB of a row in a stage, a barrier of the block for each stage | 9.8 / 22.5 / 23.7 / 111 / 63 | 9 / 22 / 22 / 112 / 63 |
//!
//! 72 registers, no spills. Eight rows cost 10.7 / 25.0 / 26.4 / 122 / 67, because x is read through the first-level cache, of
//! which the ring leaves little.

use std::{borrow::Cow, marker::PhantomData, ops::RangeInclusive, sync::Arc};

use cudarc::cublas::sys::cudaDataType;
use half::{bf16, f16};

use super::{
    Activation as _, CudaDevice, Element,
    blas::{self, Blas, Operand, Scratch},
    copies::{Pitched, copy_rows},
    driver::{Function, Launch, Resident},
    plain::output_bound,
};
use crate::{
    DenseData, DenseWeight, ErrorBound, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef,
    Unsupported, WeightFormat, Workspace,
};

pub(super) const NAME: &str = "cuda-dense";
pub(super) const CUBLAS_NAME: &str = "cuda-cublas";

/// Warps of a block, rows of one pass, and what rows of the weight are padded to; as in `dense.cu`.
const WARPS: usize = 8;
const ROWS: usize = 8;
const STEP: usize = 64;
/// Bytes of a stage in shared memory, and their number in images for Hopper and in others.
const STAGE: usize = 16 * (WARPS * STEP * 2 + 64);
const STAGES_HOPPER: usize = 6;
const STAGES: usize = 4;
/// Blocks that share a multiprocessor.
const BLOCKS: usize = 2;

/// A grid has at most that many blocks along y.
const MOST_BLOCKS: usize = 65535;

/// Bytes of scratch that cuBLAS is given: what NVIDIA recommends for Hopper and later, and for others.
const SCRATCH_HOPPER: usize = 32 << 20;
const SCRATCH: usize = 4 << 20;

pub(super) struct Dense<T: Element> {
    device: CudaDevice<T>,
    name: &'static str,
}

impl<T: Element> Dense<T> {
    /// Without cuBLAS.
    pub(super) fn new(device: &CudaDevice<T>) -> Result<Self, Unsupported> {
        device.needs((8, 0))?;
        Ok(Self { device: device.clone(), name: NAME })
    }

    pub(super) fn with_cublas(device: &CudaDevice<T>) -> Result<Self, Unsupported> {
        blas::probe()?;
        Ok(Self { name: CUBLAS_NAME, ..Self::new(device)? })
    }

    /// A layer of a weight on the device, of type `dtype`, rows `k` padded to a multiple of [`STEP`].
    fn layer(
        &self,
        spec: LinearSpec,
        dtype: &'static str,
        weight: Resident,
        bias: Option<&[f32]>,
    ) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        let (stream, images) = (self.device.stream(), self.device.images());
        let hopper = self.device.compute_capability() >= (9, 0);
        let tensor = dtype == T::NAME;
        let image =
            if hopper && tensor { format!("dense90-{dtype}") } else { format!("dense-{}-{dtype}", T::NAME) };
        let stages = if hopper { STAGES_HOPPER } else { STAGES };
        let shared = if tensor { stages * STAGE } else { 0 };
        let blocks = spec.out_features.min(self.device.multiprocessors() as usize * BLOCKS);
        let scratch = if hopper { SCRATCH_HOPPER } else { SCRATCH };
        Ok(Box::new(DenseLinear {
            multiply: images.function(&image, "dense", shared)?,
            // Only images for Hopper wait by themselves.
            shape: Launch { shared, programmatic: hopper && tensor, ..grid((1, blocks), WARPS * 32) },
            add_bias: images.function(&image, "add_bias", 0)?,
            weight,
            bias: Resident::new::<f32>(stream, bias.unwrap_or_default())?,
            k_stride: spec.in_features.next_multiple_of(STEP),
            blas: self.blas()?.map(|blas| (blas, scratch)),
            name: self.name,
            spec,
            element: PhantomData::<T>,
        }))
    }

    /// Not before a layer is prepared: programs without dense layers need not wait for the handle.
    fn blas(&self) -> Result<Option<Arc<Blas>>, KernelError> {
        if self.name == NAME { Ok(None) } else { Blas::of(self.device.stream().context()).map(Some) }
    }
}

/// `DenseArgs` of `dense.cu`.
#[repr(C)]
struct Args {
    weight: u64,
    bias: u64,
    x: u64,
    y: u64,
    x_stride: u64,
    y_stride: u64,
    rows: u32,
    n: u32,
    k: u32,
    k_stride: u32,
    x_vectors: u32,
}

/// `BiasArgs` of `dense.cu`.
#[repr(C)]
struct BiasArgs {
    sums: u64,
    bias: u64,
    y: u64,
    y_stride: u64,
    rows: u32,
    n: u32,
}

struct DenseLinear<T> {
    spec: LinearSpec,
    name: &'static str,
    multiply: Function,
    /// Of [`multiply`](Self::multiply) for one pass.
    shape: Launch,
    add_bias: Function,
    weight: Resident,
    bias: Resident,
    /// Distance of rows of the weight, in elements.
    k_stride: usize,
    /// What multiplies more than [`ROWS`] rows, with bytes of scratch.
    blas: Option<(Arc<Blas>, usize)>,
    element: PhantomData<T>,
}

impl<T: Element> LinearKernel<CudaDevice<T>> for Dense<T> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn version(&self) -> Option<String> {
        super::image::version(&["dense", "dense90"])
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        let WeightFormat::Dense(dtype) = spec.weight else { return Err(Unsupported::WeightFormat) };
        spec.only_multiplies()?;
        if self.name == CUBLAS_NAME && dtype != T::TYPE {
            return Err(Unsupported::WeightFormat);
        }
        // 32-bit sizes in the kernel and in cuBLAS.
        if spec.in_features >= 1 << 24 || spec.out_features >= 1 << 24 {
            let (in_features, out_features) = (spec.in_features, spec.out_features);
            return Err(Unsupported::Shape { in_features, out_features });
        }
        Ok(())
    }

    fn prepare(&self, _: &gptq_format::PackedLinear) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        Err(KernelError::Unsupported { kernel: self.name, reason: Unsupported::WeightFormat })
    }

    fn prepare_dense(&self, weight: &DenseWeight<'_>) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        weight.validate()?;
        let spec = LinearSpec::of_dense(weight);
        self.supports(&spec).map_err(|reason| KernelError::Unsupported { kernel: self.name, reason })?;
        let (stream, k) = (self.device.stream(), spec.in_features);
        let k_stride = k.next_multiple_of(STEP);
        let (dtype, resident) = match weight.data {
            DenseData::F32(data) => ("f32", Resident::new(stream, &padded(data, k, k_stride))?),
            DenseData::F16(data) => (f16::NAME, Resident::new(stream, &padded(data, k, k_stride))?),
            DenseData::Bf16(data) => (bf16::NAME, Resident::new(stream, &padded(data, k, k_stride))?),
        };
        self.layer(spec, dtype, resident, weight.bias)
    }

    fn prepare_resident(
        &self,
        weight: MatRef<'_, CudaDevice<T>>,
        bias: Option<&[f32]>,
    ) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        let spec = LinearSpec::of_resident(self, weight, T::TYPE, bias)?;
        let (n, k) = (spec.out_features, spec.in_features);
        let (k_stride, size) = (k.next_multiple_of(STEP), size_of::<T>());
        let resident = Resident::zeros::<T>(self.device.stream(), n * k_stride)?;
        let from = Pitched { address: weight.data().address(), pitch: weight.row_stride() * size };
        let to = Pitched { address: resident.address(), pitch: k_stride * size };
        // SAFETY: a `MatRef` is n rows of memory of the device, on whose stream it is used; the copy has n rows of `k_stride`
        // elements, which are not less than k.
        unsafe { copy_rows(self.device.stream(), from, to, k * size, n) }?;
        self.layer(spec, T::NAME, resident, bias)
    }

    /// A product of a weight of the activations' type passes the additions of its tensor core: 16 products and an
    /// accumulator are aligned to the largest and cut off, at least 24 bits below its leading one, at most 17 errors of
    /// `2^-23`, two units each (see `cuda-gemv-sm90`). A warp has `ceil(k / 64 / 8)` steps, with two of those to each of
    /// two sums; then come the two sums, the eight warps and the bias. A product of other weights passes
    /// the fused multiply-adds of a lane, five additions of lanes and the bias.
    ///
    /// cuBLAS does not say in which order it adds. Every product is exact and no partial sum is rounded to less than
    /// float32, so whatever the order a product passes at most one addition for each of the others, with the
    /// tensor core's error.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        let k = spec.in_features;
        let tensor_core = 17 * 2;
        let roundings = if spec.weight != WeightFormat::Dense(T::TYPE) {
            k.div_ceil(32) + 5 + 1
        } else if self.name == NAME {
            k.div_ceil(STEP * WARPS) * 2 * tensor_core + 1 + WARPS + 1
        } else {
            k.div_ceil(16) * tensor_core + 1
        };
        output_bound::<T>(ErrorBound::float32(roundings))
    }
}

/// Rows of `k` elements, with zeros behind each up to `stride`.
fn padded<E: Copy + Default>(data: &[E], k: usize, stride: usize) -> Cow<'_, [E]> {
    if k == stride {
        return Cow::Borrowed(data);
    }
    let mut rows = vec![E::default(); data.len() / k * stride];
    for (row, data) in rows.chunks_mut(stride).zip(data.chunks(k)) {
        row[..k].copy_from_slice(data);
    }
    Cow::Owned(rows)
}

impl<T: Element> DenseLinear<T> {
    /// As many passes as it takes, on the stream of `y`.
    fn passes(&self, x: &MatRef<'_, CudaDevice<T>>, y: MatMut<'_, CudaDevice<T>>) -> Result<(), KernelError> {
        let (rows, x_stride, y_stride) = (x.rows(), x.row_stride(), y.row_stride());
        let (x, y, size) = (x.data(), y.into_data(), size_of::<T>());
        let x_vectors = x.address().is_multiple_of(16) && (rows == 1 || (x_stride * size).is_multiple_of(16));
        if rows == 0 {
            return Ok(());
        }
        // What the kernel counts in 32 bits.
        if rows > i32::MAX as usize {
            return Err(too_many("rows of x", rows));
        }
        let mut args = Args {
            weight: self.weight.address(),
            bias: self.bias.address(),
            x: x.address(),
            y: y.address(),
            x_stride: x_stride as u64,
            y_stride: y_stride as u64,
            rows: rows as u32,
            n: self.spec.out_features as u32,
            k: self.spec.in_features as u32,
            k_stride: self.k_stride as u32,
            x_vectors: u32::from(x_vectors),
        };
        let launch = Launch { grid: (rows.div_ceil(ROWS) as u32, self.shape.grid.1), ..self.shape };
        // SAFETY: `Args` is `DenseArgs`. Weight and bias are the layer's own memory, with rows of `k_stride` elements;
        // `check_operands` has compared x and y with the layer; all of them outlive the stream's work, because the caller
        // may not free what a stream uses and `Resident` waits. Weights are read before the kernel waits for earlier ones:
        // no kernel ever writes them. The stream is that of y.
        unsafe { self.multiply.launch(self.name, launch, y.stream(), &mut args) }
    }

    /// By cuBLAS: into `y`, or with a bias in float32 into scratch, from where the sums with the bias go to `y`.
    fn many(
        &self,
        blas: &Blas,
        scratch_bytes: usize,
        x: &MatRef<'_, CudaDevice<T>>,
        y: MatMut<'_, CudaDevice<T>>,
        workspace: &mut Workspace<CudaDevice<T>>,
    ) -> Result<(), KernelError> {
        let (rows, x_stride, y_stride) = (x.rows(), x.row_stride(), y.row_stride());
        let count = i32::try_from(rows).map_err(|_| too_many("rows of x", rows))?;
        let workspace = workspace.take(self.workspace_len(rows))?;
        let scratch = Scratch { address: workspace.address(), bytes: scratch_bytes };
        let sums = workspace.address() + scratch_bytes as u64;
        let (x, y, n) = (x.data(), y.into_data(), self.spec.out_features);
        let half = if T::NAME == f16::NAME { cudaDataType::CUDA_R_16F } else { cudaDataType::CUDA_R_16BF };
        let to = match self.spec.bias {
            false => Operand { address: y.address(), dtype: half, stride: y_stride },
            true => Operand { address: sums, dtype: cudaDataType::CUDA_R_32F, stride: n },
        };
        let from = Operand { address: x.address(), dtype: half, stride: x_stride };
        let weight = Operand { address: self.weight.address(), dtype: half, stride: self.k_stride };
        let shape = (count, n as i32, self.spec.in_features as i32);
        // SAFETY: `check_operands` has compared x and y with the layer, whose own memory the weight is; the sums, n float32
        // a row, and the bytes before them are in the workspace, which is aligned as the driver aligns allocations, to 256
        // bytes, and which the caller lends for the stream's work. The stream is that of y.
        unsafe { blas.multiply(y.stream(), scratch, shape, (from, weight, to), (1.0, 0.0)) }?;
        if self.spec.bias {
            let mut args = BiasArgs {
                sums,
                bias: self.bias.address(),
                y: y.address(),
                y_stride: y_stride as u64,
                rows: rows as u32,
                n: n as u32,
            };
            let launch = grid((n.div_ceil(256), rows.min(MOST_BLOCKS)), 256);
            // SAFETY: `Args` is `BiasArgs`; memory and stream are as above.
            unsafe { self.add_bias.launch(self.name, launch, y.stream(), &mut args) }?;
        }
        Ok(())
    }
}

fn too_many(what: &'static str, got: usize) -> KernelError {
    KernelError::Argument { what, got, limit: i32::MAX as usize }
}

fn grid((x, y): (usize, usize), threads: usize) -> Launch {
    Launch { grid: (x as u32, y as u32), threads: threads as u32, shared: 0, cluster: 1, programmatic: false }
}

impl<T: Element> Linear<CudaDevice<T>> for DenseLinear<T> {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        self.name
    }

    fn row_class(&self, rows: usize) -> RangeInclusive<usize> {
        match self.blas {
            None => 0..=usize::MAX,
            Some(_) if rows <= ROWS => 0..=ROWS,
            Some(_) => rows..=rows,
        }
    }

    fn weight_bytes(&self) -> usize {
        self.weight.bytes() + self.bias.bytes()
    }

    fn workspace_len(&self, rows: usize) -> usize {
        match self.blas {
            Some((_, scratch)) if rows > ROWS => {
                let sums = if self.spec.bias { rows * self.spec.out_features * 4 } else { 0 };
                (scratch + sums) / size_of::<T>()
            }
            _ => 0,
        }
    }

    fn forward(
        &self,
        x: MatRef<'_, CudaDevice<T>>,
        y: MatMut<'_, CudaDevice<T>>,
        workspace: &mut Workspace<CudaDevice<T>>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
        match &self.blas {
            Some((blas, scratch)) if x.rows() > ROWS => self.many(blas, *scratch, &x, y, workspace),
            _ => self.passes(&x, y),
        }
    }
}
