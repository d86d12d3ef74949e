//! `cuda-wgmma-sm90`: 4-bit layers and any number of rows, on Hopper. The kernel is `cuda/wgmma_sm90.cu`.
//!
//! Up to 8 rows are [`cuda-gemv-sm90`](super::gemv)'s, which reads the same copy of the weight; more rows go through `wgmma`
//! with 16, 32, 64 or 128 tokens at a time, slices of the input features and exact products (`cuda/wgmma_sm90.cu`); many rows
//! (65 or more for 11008 outputs, 257 or more for 4096: as soon as tiles alone fill the GPU) with 128 or 256 tokens, without
//! slices, and with weights rounded to halves as if the layer were dequantised (`cuda/wgmma_many.cuh`; where tiles do not
//! divide by the multiprocessors, one block does the first input features of a tile and leaves its sums to another, which goes on
//! from them: the bits stay those of one block): an error of up to
//! `2^-11 |x w|` in each product of fp16, `2^-8` of bfloat16, beside outputs that are rounded by as much.
//! [`Linear::row_class`] says where that begins. A layer whose scales are too far apart for one power of two to keep its weights
//! normal numbers of fp16 has exact products for any number of rows.
#![doc = include_str!("wgmma/ladder.md")]

mod many;
mod plan;

use std::{ops::RangeInclusive, sync::OnceLock};

use cudarc::driver::sys;
use gptq_format::PackedLinear;

use super::{
    CudaBuffer, CudaDevice, Element,
    driver::{Function, Launch},
    failure::gpu_error,
    gemv::{self, Gemv, GemvLinear, prologue_bound},
    images::get_or_load,
    marlin::ticket,
    plain::output_bound,
    units::{DEPTH, Units},
};
use crate::{
    Backend, Device, Epilogue, ErrorBound, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut,
    MatRef, Span, Unsupported, WeightFormat, Workspace,
};
use many::{Factor, Many};
use plan::{Extent, FEW_ROWS, MOST_SLICES, Tokens};

pub(super) const NAME: &str = "cuda-wgmma-sm90";

/// The kernel that brings x into order.
const ORDER: &str = "order";
/// Input features of a box of x: 128 bytes, as the swizzle wants.
const BOX: u32 = 64;
/// Rows of x that are put in order at a time, if only because they are not aligned.
const ALIGNED_ROWS: usize = 128;
/// Blocks that share a row which is put in order: so many that some threads fill the GPU, and that what each thread picks
/// first, whose columns it knows before x is there, is most of it.
const fn order_blocks(rows: usize) -> u32 {
    match rows {
        0..=128 => 4,
        129..=512 => 2,
        _ => 1,
    }
}

pub(super) struct Wgmma<T: Element> {
    device: CudaDevice<T>,
    gemv: Gemv<T>,
}

impl<T: Element> Wgmma<T> {
    pub(super) fn new(device: &CudaDevice<T>) -> Result<Self, Unsupported> {
        // `wgmma` is part of no later architecture.
        let (needed, got) = ((9, 0), device.compute_capability());
        if got != needed {
            return Err(Unsupported::ComputeCapability { needed, got });
        }
        Ok(Self { device: device.clone(), gemv: Gemv::new(device)? })
    }
}

/// `WgmmaArgs` of `wgmma_sm90.cu`.
#[repr(C)]
struct Args {
    units: u64,
    y: u64,
    bias: u64,
    partials: u64,
    arrivals: u64,
    ticket: u64,
    rows: u32,
    n: u32,
    k_units: u32,
    y_stride: u32,
    columns: u32,
    epilogue: u32,
    token_tiles: u32,
    stages: u32,
    y_pairs: u32,
    y_vectors: u32,
    scale_factor: u32,
    sum_factor: f32,
    whole: u32,
}

/// `OrderArgs` of `wgmma_sm90.cu`.
#[repr(C)]
struct OrderArgs {
    x: u64,
    ordered: u64,
    gather: u64,
    k: u32,
    width: u32,
    x_stride: u32,
    x_vectors: u32,
}

/// Rows of x on the device: address, columns and distance of rows in elements.
#[derive(Clone, Copy)]
struct Rows {
    address: u64,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl Rows {
    fn vectors<T>(&self) -> bool {
        self.address.is_multiple_of(16) && (self.stride * size_of::<T>()).is_multiple_of(16)
    }

    /// A tensor map with boxes of `tokens` rows. The rows must be [`vectors`](Self::vectors).
    fn map<T: Element>(&self, tokens: usize) -> Result<sys::CUtensorMap, KernelError> {
        let mut map = std::mem::MaybeUninit::uninit();
        let dtype = if T::NAME == "bf16" {
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        } else {
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        };
        let (extent, stride) =
            ([self.columns as u64, self.rows as u64], [(self.stride * size_of::<T>()) as u64]);
        let (extent_of_box, element_strides) = ([BOX, tokens as u32], [1, 1]);
        // SAFETY: the driver writes the map, and reads two extents, one stride, two of a box and of elements.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                dtype,
                2,
                self.address as *mut _,
                extent.as_ptr(),
                stride.as_ptr(),
                extent_of_box.as_ptr(),
                element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|error| gpu_error("cuTensorMapEncodeTiled", error))?;
        // SAFETY: the call has succeeded, so the map has been written.
        Ok(unsafe { map.assume_init() })
    }
}

/// Numbers of rows that are computed with the same arithmetic.
struct Class {
    /// The largest of them.
    most: usize,
    /// Whether weights are rounded to halves, so that [`Many`] does them; otherwise products are exact.
    many: bool,
    /// Index of the tokens at a time, and the slices, if they are not many.
    tokens: usize,
    slices: usize,
}

/// The norm of more rows than the GEMV does, which normalises by itself: to the same bits.
struct Norm<T: Element> {
    device: CudaDevice<T>,
    weight: CudaBuffer<T>,
    eps: f32,
}

/// What more than eight rows need: made when it is first asked for, because its kernels are compiled in the background.
struct Rest {
    /// For 16, 32, 64 and 128 tokens at a time.
    tokens: Vec<Tokens>,
    /// For many rows, in the order of [`many::entries`].
    many: Vec<Function>,
    /// In rising order; the last one has no end.
    classes: Vec<Class>,
    order: Function,
}

struct WgmmaLinear<T: Element> {
    device: CudaDevice<T>,
    image: String,
    extent: Extent,
    /// The weight, and how few rows are done.
    gemv: GemvLinear<T>,
    norm: Option<Norm<T>>,
    many: Option<Many>,
    rest: OnceLock<Rest>,
}

impl<T: Element> LinearKernel<CudaDevice<T>> for Wgmma<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> Option<String> {
        super::image::version(&["wgmma", "gemv", "gemv-block"])
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        self.gemv.supports(spec)
    }

    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        self.prepare_fused(weight, &Fusion::default())
    }

    fn prepare_fused(
        &self,
        weight: &PackedLinear,
        fusion: &Fusion<'_>,
    ) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        let spec = LinearSpec::supported(self, weight, fusion)?;
        let norm = match fusion.norm {
            Some(norm) => {
                norm.validate(spec.in_features, spec.out_features)?;
                let mut weight = self.device.alloc(norm.weight.len())?;
                self.device.upload(norm.weight, CudaDevice::slice_mut(&mut weight, 0..norm.weight.len()))?;
                Some(Norm { device: self.device.clone(), weight, eps: norm.eps })
            }
            None => None,
        };
        let units = Units::pack(weight, fusion.epilogue);
        let zero = if units.asym { "asym" } else { "sym" };
        let image = format!("wgmma-{}-g{}-{zero}", T::NAME, DEPTH / units.groups);
        let entries = plan::entries().chain(many::entries()).chain([ORDER]);
        self.device.images().compile(&image, entries);
        let gemv = self.gemv.linear(&units, spec.clone(), fusion.norm)?;
        let gemv = gemv.ok_or_else(|| spec.shape_unsupported_by(NAME))?;
        // bfloat16 reaches as far as float32.
        let factor = match T::NAME {
            "bf16" => Some(Factor { scale: 0, sum: 1.0 }),
            _ => Factor::of(weight.scales()),
        };
        let (extent, device) = (Extent::of(&units), self.device.clone());
        let multiprocessors = device.multiprocessors() as usize;
        let many = factor.map(|factor| Many::new(extent, factor, multiprocessors, device.shared_memory()));
        Ok(Box::new(WgmmaLinear { device, image, extent, gemv, norm, many, rest: OnceLock::new() }))
    }

    /// Few rows are as for `cuda-gemv-sm90`, whose up to 8 rows are: a group's sum on the tensor core, then the fused
    /// multiply-adds with the scales, of which one slice may have all, the parts or slices, the bias and what
    /// [`Epilogue::Add`] adds to. Units have at most twice as many groups as full groups of 32 would be, and four.
    ///
    /// Of many rows, weights are rounded to halves once, and sums go through the tensor core from end to end: 17 errors of two
    /// units, as for [`cuda-gemv-sm90`](super::gemv), in each step of 16 input features, of which every group may have one that
    /// is not full.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        let groups = 2 * spec.in_features.div_ceil(32) + 4;
        let few = gemv::GROUP_ROUNDINGS + groups + gemv::PARTS.max(MOST_SLICES) + 2;
        let group_size = match spec.weight {
            WeightFormat::Gptq { group_size, .. } => group_size,
            _ => spec.in_features,
        };
        let steps = spec.in_features.div_ceil(16) + spec.in_features.div_ceil(group_size.max(1));
        let many = 17 * 2 * steps + 3;
        // For bfloat16 the product with the lesser part of a scale, less than 2 units of it, is rounded too.
        let weight = T::UNIT * (1.0 + 3.0 * T::UNIT);
        let bound = ErrorBound::float32(few.max(many)).with_activation_error(weight);
        output_bound::<T>(prologue_bound::<T>(bound, spec))
    }
}

/// More token tiles leave fewer slices to fill the GPU with; from some number on, `many` is faster.
fn classes(tokens: &[Tokens], many: Option<&Many>) -> Vec<Class> {
    let mut classes = Vec::new();
    for (index, &most) in FEW_ROWS.iter().enumerate() {
        classes.push(Class { most, many: false, tokens: index, slices: tokens[index].slices(1) });
    }
    let (index, last) = (FEW_ROWS.len(), &tokens[FEW_ROWS.len()]);
    let (mut token_tiles, mut slices) = (1, last.slices(1));
    let class = |most, slices| Class { most, many: false, tokens: index, slices };
    let is_faster = |token_tiles, slices| {
        many.is_some_and(|many| many.cost(token_tiles * last.tokens) <= last.cost(token_tiles, slices))
    };
    while slices > 1 && !is_faster(token_tiles, slices) {
        let next = last.slices(token_tiles + 1).min(slices);
        if next < slices {
            classes.push(class(token_tiles * last.tokens, slices));
        }
        (token_tiles, slices) = (token_tiles + 1, next);
    }
    let most_few = (token_tiles - 1) * last.tokens;
    if many.is_some() && classes.last().is_some_and(|class| class.most < most_few) {
        classes.push(class(most_few, slices));
    }
    classes.push(Class { many: many.is_some(), ..class(usize::MAX, slices) });
    classes
}

impl Rest {
    fn class(&self, rows: usize) -> &Class {
        // The last class has no end.
        &self.classes[self.classes.iter().take_while(|class| class.most < rows).count()]
    }
}

impl<T: Element> WgmmaLinear<T> {
    /// Waits for what compiles the kernels.
    fn rest(&self) -> Result<&Rest, KernelError> {
        get_or_load(&self.rest, || {
            let load = |entry| self.device.images().function(&self.image, entry, self.device.shared_memory());
            let tokens = Tokens::all(&self.device, &self.image, self.extent)?;
            Ok(Rest {
                many: many::entries().map(load).collect::<Result<_, _>>()?,
                classes: classes(&tokens, self.many.as_ref()),
                order: load(ORDER)?,
                tokens,
            })
        })
    }

    /// Columns of x in the order of the units.
    fn width(&self) -> usize {
        self.gemv.k_units * DEPTH
    }

    /// Elements of scratch for normalised rows, each of which begins at a multiple of 16 bytes.
    fn normed_len(&self, rows: usize) -> usize {
        if self.norm.is_some() { rows * self.spec().in_features.next_multiple_of(8) } else { 0 }
    }

    /// Rows of x that are put in order at a time.
    fn ordered_rows(&self, rows: usize) -> usize {
        if self.gemv.gather.bytes() > 0 { rows } else { rows.min(ALIGNED_ROWS) }
    }

    /// Bytes of sums and arrivals of [`Many`].
    fn shared_bytes(&self, rows: usize) -> usize {
        self.many.as_ref().map_or(0, |many| many.sums(rows) + many.arrivals(rows))
    }

    /// Copies x to `to` in the order of the units.
    fn put_in_order(
        &self,
        rest: &Rest,
        x: Rows,
        to: u64,
        stream: sys::CUstream,
    ) -> Result<Rows, KernelError> {
        let mut args = OrderArgs {
            x: x.address,
            ordered: to,
            gather: self.gemv.gather.address(),
            k: x.columns as u32,
            width: self.width() as u32,
            x_stride: u32::try_from(x.stride).unwrap_or(0),
            x_vectors: u32::from(x.vectors::<T>()),
        };
        let launch = Launch {
            grid: (x.rows as u32, order_blocks(x.rows)),
            threads: 256,
            shared: (x.columns * size_of::<T>()).next_multiple_of(16),
            cluster: 1,
            programmatic: true,
        };
        // SAFETY: `OrderArgs` is that of the source. `to` has `width` elements for each of the rows, which the caller has
        // taken from the workspace; gather has as many; x is the caller's, checked. All outlive the stream's work.
        unsafe { rest.order.launch(NAME, launch, stream, &mut args) }?;
        Ok(Rows { address: to, rows: x.rows, columns: self.width(), stride: self.width() })
    }

    /// The product of `x.rows` rows, which are part of a call of `class`. At `shared` is room for
    /// [`shared_bytes`](Self::shared_bytes) of so many rows.
    fn multiply(
        &self,
        rest: &Rest,
        class: &Class,
        x: Rows,
        y: Rows,
        shared: u64,
        stream: sys::CUstream,
    ) -> Result<(), KernelError> {
        let spec = self.gemv.spec();
        let exact = Factor { scale: 0, sum: 1.0 };
        let mut shares = None;
        let (function, launch, tokens, stages, factor) = match self.many.as_ref().filter(|_| class.many) {
            Some(many) => {
                let call = many.call(x.rows);
                shares = call.whole.map(|whole| (whole, shared + many.sums(x.rows) as u64));
                (&rest.many[call.shape], call.launch, call.tokens, call.stages, many.factor)
            }
            None => {
                let tokens = &rest.tokens[class.tokens];
                let (blocks, launch) = tokens.launch(x.rows.div_ceil(tokens.tokens), class.slices);
                (&blocks.function, launch, tokens.tokens, blocks.stages, exact)
            }
        };
        let aligned = |elements: usize| {
            y.address.is_multiple_of(2 * elements as u64) && y.stride.is_multiple_of(elements)
        };
        let mut map = x.map::<T>(tokens)?;
        let mut args = Args {
            units: self.gemv.units.address(),
            y: y.address,
            bias: self.gemv.bias.address(),
            partials: if shares.is_some() { shared } else { 0 },
            arrivals: shares.map_or(0, |(_, arrivals)| arrivals),
            ticket: if shares.is_some() { ticket() } else { 0 },
            rows: x.rows as u32,
            n: self.gemv.unit_rows as u32,
            k_units: self.gemv.k_units as u32,
            y_stride: u32::try_from(y.stride).unwrap_or(0),
            columns: spec.y_features() as u32,
            epilogue: match spec.epilogue {
                Epilogue::Store => 0,
                Epilogue::Add => 1,
                Epilogue::SiluMul => 2,
            },
            token_tiles: x.rows.div_ceil(tokens) as u32,
            stages: stages as u32,
            y_pairs: u32::from(aligned(2)),
            y_vectors: u32::from(aligned(8)),
            scale_factor: factor.scale,
            sum_factor: factor.sum,
            whole: shares.map_or(0, |(whole, _)| whole as u32),
        };
        let mut parameters = [std::ptr::from_mut(&mut map).cast(), std::ptr::from_mut(&mut args).cast()];
        // SAFETY: the parameters are a tensor map and `WgmmaArgs`, which `Args` is. units and bias are the layer's own memory,
        // of the sizes that `Units` gives them; the map is of x, whose rows and columns `forward` has checked, or of the
        // workspace; y has been checked too. All of them outlive the stream's work, because the caller may not free what a
        // stream uses and `Resident` waits. Weights are read before the kernel waits for earlier ones: no kernel ever writes
        // them. The stream is that of y.
        unsafe { function.launch_with(NAME, launch, stream, &mut parameters) }
    }
}

impl<T: Element> Linear<CudaDevice<T>> for WgmmaLinear<T> {
    fn spec(&self) -> &LinearSpec {
        self.gemv.spec()
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    fn row_class(&self, rows: usize) -> RangeInclusive<usize> {
        if rows <= gemv::ROWS {
            return 0..=gemv::ROWS;
        }
        // Without its kernels, no number of rows can be computed.
        let Ok(rest) = self.rest() else { return rows..=rows };
        let below = rest.classes.iter().map(|class| class.most).take_while(|&most| most < rows).last();
        below.unwrap_or(gemv::ROWS) + 1..=rest.class(rows).most
    }

    fn weight_bytes(&self) -> usize {
        self.gemv.weight_bytes()
    }

    fn read_first(&self) -> Option<Span<'_>> {
        self.gemv.read_first()
    }

    fn workspace_len(&self, rows: usize) -> usize {
        if rows <= gemv::ROWS {
            self.gemv.workspace_len(rows)
        } else {
            let shared = self.shared_bytes(rows) / size_of::<T>();
            shared + self.normed_len(rows) + self.ordered_rows(rows) * self.width()
        }
    }

    fn forward(
        &self,
        x: MatRef<'_, CudaDevice<T>>,
        y: MatMut<'_, CudaDevice<T>>,
        workspace: &mut Workspace<CudaDevice<T>>,
    ) -> Result<(), KernelError> {
        if x.rows() <= gemv::ROWS {
            return self.gemv.forward(x, y, workspace);
        }
        self.spec().check_operands(&x, &y)?;
        let rest = self.rest()?;
        let class = rest.class(x.rows());
        let mut scratch = workspace.take(self.workspace_len(x.rows()))?;
        // Normalised rows, sums, rows in order: each a multiple of 16 bytes.
        let shared = scratch.address() + (self.normed_len(x.rows()) * size_of::<T>()) as u64;
        let ordered = shared + self.shared_bytes(x.rows()) as u64;
        let columns = x.cols();
        let mut all = Rows { address: x.data().address(), rows: x.rows(), columns, stride: x.row_stride() };
        let (y_columns, y_stride) = (y.cols(), y.row_stride());
        let y = y.into_data();
        if let Some(norm) = &self.norm {
            all.stride = columns.next_multiple_of(8);
            all.address = scratch.address();
            // The scratch may belong to another stream than y, on which all the rest runs.
            let into = CudaDevice::reborrow(&mut scratch).on(y.stream());
            let normed = MatMut::with_stride(into, all.rows, columns, all.stride)?;
            let weight = CudaDevice::slice(&norm.weight, 0..columns);
            norm.device.rms_norm(x, weight, norm.eps, None, normed)?;
        }
        let into = Rows { address: y.address(), rows: all.rows, columns: y_columns, stride: y_stride };
        if self.gemv.gather.bytes() == 0 && all.vectors::<T>() {
            return self.multiply(rest, class, all, into, shared, y.stream());
        }
        let step = self.ordered_rows(all.rows);
        for start in (0..all.rows).step_by(step) {
            let part = |of: Rows| Rows {
                address: of.address + (start * of.stride * size_of::<T>()) as u64,
                rows: step.min(all.rows - start),
                ..of
            };
            let ordered = self.put_in_order(rest, part(all), ordered, y.stream())?;
            self.multiply(rest, class, ordered, part(into), shared, y.stream())?;
        }
        Ok(())
    }
}
