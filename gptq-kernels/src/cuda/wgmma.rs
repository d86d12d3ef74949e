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
//!
//! # How it came to be
//!
//! Microseconds on an H200, fp16, groups of 128, in a CUDA graph over rotated weights, for 4096 x 4096 / 4096 x 11008 /
//! 11008 x 4096 / 8192 x 28672; prototypes around `wgmma_sm90.cu`, compiled by nvcc 13.0, with the best of several shapes and
//! slices. cuBLAS fp16 in the same run, at 64 and 256 rows: 11.6 / 24 / 29 / 115 and 16.3 to 18.3 / 34 / 39 / 180.
//!
//! | version | 16 rows | 64 rows | 256 rows | expected, and what happened |
//! |---|---|---|---|---|
//! | before: an operand A from registers without overlap, all of x staged first | 8.5 / 15.0 / 19.9 / 66.4 | 27.6 / 43.4 / - / - | - | |
//! | a ring of x (tensor map, 128-byte swizzle) and units, one warp that copies, batches of four steps expanded while four are multiplied, slices in a cluster | 6.4 / 10.6 / 11.3 / 38.3 | 9.2 / 17.0 / 17.4 / 56.6 | 16.2 / 47.2 / 34.4 / 190 | 6 / 9 / 9 / 36, 10 / 15 / 15 / 55; as hoped on small layers |
//! | an order of codes that both kernels read (see `unit.cuh`); natural order alone cost the GEMV 12 % at 8 rows | 6.5 / 11.1 / 12.6 / 41.8 | 9.1 / 15.5 / 17.1 / 61.6 | 17.4 / 36.5 / 37.1 / 205 | nothing lost; clocks were lower, cuBLAS lost 5 % too |
//! | rehearsal as in the GEMV | 6.8 / 11.3 / 12.9 / 41.0 | 9.7 / 16.4 / 17.8 / 59.0 | 19.0 / 45.6 / 38.2 / 206 | -1; found +0.4 to +3: blocks that fill a multiprocessor rehearse on the critical path. Removed |
//! | two warpgroups take turns at the tensor core through named barriers | - | 9.4 / 17.8 / 17.9 / 63.9 | 17.5 / 50.2 / 37.3 / 224 | -15 %; nothing. Removed |
//! | three warpgroups, batches of two steps so that 160 registers do | - | - | - / 36.5 / - / - | 4096 x 11008 fits one wave: 33; found 36.5 |
//! | blocks walk over tiles | - | - | - / - / - / 201 | -10 % with many rows; 1 % to 7 % |
//! | results finished four pieces at a time, in a loop | 6.6 / 10.6 / 11.9 / 36.6 | 9.9 / 15.6 / 17.6 / 60.0 | 17.0 / 38.5 / 36.6 / 201 | 100 KB of PTX less; -1 at 256 rows of 4096 x 4096 |
//! | shipped, PTX of NVRTC 12.0, from Rust: the tensor map in one structure with the other arguments | 9.8 / 12.8 / 14.5 / 41.7 | 11.6 / 18.0 / 19.9 / 66.8 | 20.3 / 42.7 / 41.6 / 240 | the prototype's times; missed them |
//! | the map as a parameter of its own | 7.6 / 10.6 / 11.8 / 35.8 | 9.9 / 15.6 / 17.3 / 57.6 | 16.9 / 38.7 / 36.1 / 191 | the prototype's times; found, but for 16 rows of 4096 x 4096 |
//!
//! | no order of memory in the first arrival at the cluster's barrier, which is a fence of the whole GPU otherwise; slices for no more than one block a multiprocessor on small layers | 6.5 / 10.6 / 11.4 / 36.2 | 9.7 / 15.4 / 17.2 / 58.5 | - | -0.3; found 0.0 to 0.3, and 1.1 on 4096 x 4096 from the slices |
//! | every lane arrives when a stage has been read, which racecheck understands | 6.4 / 10.6 / 11.3 / 36.7 | 9.9 / 15.8 / 17.5 / 58.8 | - | costs up to 2 % |
//! | two units asked for before the kernel before this one has finished, not the whole ring, as the GEMV does it | 6.1 / 10.6 / 10.8 / 35.7 | 9.5 / 15.5 / 17.1 / 58.4 | 16.5 / - / 35.6 / - | -0.5 as for the GEMV; found 0.1 to 0.6. One and three: 0.1 to 0.3 more for 16 rows |
//! | 16 rows: three narrow blocks a multiprocessor in 72 registers, in up to 8 slices, for up to 48 units of input features | **5.9 / 9.6 / 10.6 / 35.6** | | | more warps to hide latency: -3 %; found -4 % and, instead of wide blocks, -9 % on 4096 x 11008 |
//! | 16 rows: four warpgroups in a block, a tile in 8 slices | 6.5 / 11.1 / 11.6 / - | | | half of the traffic of x, no block too many: -10 %; slower everywhere. Removed |
//! | bf16: the upper code of a pair moved by a multiplication in fp16 instead of a shift (`Expander` in `wgmma.cuh`) | - / -0.1 / -0.25 / -1.6 for bf16 | - | - | as fast as fp16; found a third of the difference, nothing on 4096 x 4096. A shift by the upper half of a product (`mul.hi`) cost 7 to 25 % |
//! | what a zero point becomes kept from one batch to the next of its group | | | | asym -2 %; +1 to 4 %: registers. Removed |
//! | bf16: the upper code of a pair as the very small number that it is, as in the GEMV (`unit.cuh`) | 6.0 / 9.7 / 10.7 / 35.1 for bf16 | 9.4 / 15.2 / 16.8 / 57.5 for bf16 | 16.6 / 35.2 / 35.3 / 152 for bf16 | 17 of 154 instructions less, as many as fp16 has: +1 % instead of 6 to 8; found -3 to +1 %, and +4 % where a scale is two factors (256 rows of 4096 x 11008) |
//! | asym: a zero by a permutation of bytes and an addition instead of two products, kept for its group, in words of two bytes where a load of its own address would cost a register; units of 2176 bytes instead of 2144, whose every other one began between two multiples of 64 | 6.0 / 9.7 / 10.7 / 36.2 for asym; 6.2 / 10.1 / 10.9 / 37.2 before | 9.5 / 15.4 / 17.1 / 62.7 for asym | 17.2 / 33.7 / 37.1 / 158 for asym | 138 instructions instead of 146, 135 without zeros: +2 % instead of 4 to 6; found 0 to 2 |
//! | the same, with the codes of the GEMV in fp16 too; zeros not kept with 64 tokens | as before | 9.5 / 15.6 / 17.3 / 60.3 to 61.3 for asym | 16.6 / 33.7 / 35.8 / 157 for asym | what bf16 found: 16.7 instead of 17.3 for 256 rows of 4096 x 4096; found 16.6. Zeros kept cost 64 rows of 8192 x 28672 4 %, for the order that the compiler chooses |
//!
//! Many rows, 1024 and 2048, in one run with cuBLAS (46 / 124 / 119 / 628 and 90 / 253 / 236 / 1247), each replay after 4 ms of rest:
//!
//! | version | 256 rows | 1024 rows | 2048 rows | expected, and what happened |
//! |---|---|---|---|---|
//! | the above | 16.9 / 39.2 / 36.3 / 195 | 51 / 153 / 131 / 727 | 100 / 278 / 268 / 1640 | |
//! | exact products, sums kept in units of the current group's scale: one set of registers, 256 tokens; results written in whole lines through shared memory | - / 41.4 / - / 200 | 46 / 145 / 131 / 744 | 94 / 313 / 247 / 1537 | cuBLAS's speed; found 0.83 to 1.0 of it. At the end of a group both warpgroups wait for the tensor core at once, and 128 products a thread cost power |
//! | the same, x sent to two blocks at once | | 46 / 163 / 140 / 754 | | -10 % if L2 were the limit; found -2 % to +7 %: it is not |
//! | scaled weights instead, nothing to wait for at the end of a group | 22.1 / **33.9** / 56 / **167** | **46.1** / **134** / **120** / **604** | **90.4** / **265** / **234** / **1231** | cuBLAS's speed; found 0.93 to 1.11 of it, 0.95 or more but for 1024 rows of 4096 x 11008, whose 344 tiles are 2.6 for each multiprocessor |
//! | x sent to two blocks at once, with that | - / 34.6 / - / 169 | 47.5 / 135 / 122 / 602 | 90.8 / 264 / 234 / 1209 | -2 % at most; not taken: a second kind of barrier, across blocks, for that |
//! | tiles shared by two blocks | - / - / - / **159** | - / **126** / - / - | - / **242** / - / - | 344 tiles on 132 multiprocessors would take 2.6 rounds instead of 3: 119; found 126, 1.03 and 0.97 of cuBLAS's speed with 2048 and 1024 rows. Sums cost 8 us on their way from block to block: what is stored has to arrive before it is announced, and asked for before it is loaded |
//! | the same, a warp of its own announces sums and waits for them | - / - / - / 158 | - / 125 / - / - | - / 241 / - / - | -2 us; found 0 to 2. Shipped: 122, 238 and 158 from Rust |
//! | the same, shared tiles before whole ones | - / - / - / 163 | - / 130 / - / 612 | - / 248 / - / 1350 | blocks in step read the same x at the same time; out of step all along they lose 3 to 8 % |
//! | the same, x sent to two blocks at once | - / - / - / 158 | - / 128 / - / 603 | - / 242 / - / 1193 | if it were the reading of x: -5 %; it is not. Not taken |
//! | 192 tokens | | 65 / 135 / 168 / 696 | 99 / 268 / 259 / 1281 | fewer tiles too many for 4096 x 11008; nothing |
//! | four warpgroups and 128 tokens | | | | half of the traffic of two; 112 registers do not hold it, and the compiler makes `wgmma` wait |
//!
//! The three shapes that ship cost 46 to 60 KB of PTX an image, 20 KB compressed. Groups of 32 with zero points take 91.7 us for 2048
//! rows of 4096 x 4096 (cuBLAS 90.5), groups of 64 91.4, groups of 128 with zero points 91.5; bfloat16 89.4 (cuBLAS 87.7).
//!
//! A `wgmma` whose operand A is in registers takes 32 / 64 / 96 / 128 cycles with 64 / 128 / 192 / 256 tokens, measured alone: as
//! much as from shared memory. (Earlier slopes said 17 cycles more; that was power and waiting.) From about 1000 rows on the clock
//! falls with the power, for cuBLAS too: instructions then cost energy before they cost time, and times depend on how long the GPU has
//! been busy. Ratios are of runs that take turns.
//!
//! racecheck reported hazards between the reads of a stage and the copy that refills it, when one lane of a warp arrived on the
//! `mbarrier` after `__syncwarp`. A ring of two stages with nothing else in it shows the same: reported when one lane arrives, with
//! `__syncwarp` or without; nothing when every lane arrives, or with `bar.arrive` instead. The order through `__syncwarp` and then
//! a release is one of PTX's causality, so the report was false; every lane arrives now, so that the tool can be used.
//!
//! Registers: 72 and 81 (16 tokens; 90 for bf16), 89 (32), 121 (64), 128 for three warpgroups and 168 for two before the hand-over, 160 and
//! 240 after it; no spills. The tensor map is a parameter of its own because its address is taken: when it lay in one structure
//! with the other arguments, NVRTC 12.0 read all of them by generic loads, one for every unit, and the kernel was slower by 11 to
//! 50 %.

mod many;
mod plan;

use std::{ops::RangeInclusive, sync::OnceLock};

use cudarc::driver::sys;
use gptq_format::PackedLinear;

use super::{
    CudaBuffer, CudaDevice, Element,
    driver::{Function, Launch, gpu_error},
    gemv::{self, Gemv, GemvLinear, prologue_bound},
    marlin::ticket,
    plain::output_bound,
    units::{DEPTH, Units},
};
use crate::{
    Backend, Device, Epilogue, ErrorBound, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut,
    MatRef, Span, Unsupported, WeightFormat, Workspace, cpu::check_operands,
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
        // For bfloat16 the product with the lesser part of a scale is rounded too.
        let weight = T::UNIT * (1.0 + 2.0 * T::UNIT);
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
        if let Some(rest) = self.rest.get() {
            return Ok(rest);
        }
        let load = |entry| self.device.images().function(&self.image, entry, self.device.shared_memory());
        let tokens = Tokens::all(&self.device, &self.image, self.extent)?;
        let rest = Rest {
            many: many::entries().map(load).collect::<Result<_, _>>()?,
            classes: classes(&tokens, self.many.as_ref()),
            order: load(ORDER)?,
            tokens,
        };
        // Another thread may have been first; its value is as good.
        Ok(self.rest.get_or_init(|| rest))
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
        check_operands(self.spec(), &x, &y)?;
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
