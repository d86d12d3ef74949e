//! `cuda-wgmma-sm90`: 4-bit layers and any number of rows, on Hopper. The kernel is `cuda/wgmma_sm90.cu`.
//!
//! Up to 8 rows are [`cuda-gemv-sm90`](super::gemv)'s, which reads the same copy of the weight; more rows go through `wgmma`
//! with 16, 32, 64 or 128 tokens at a time.
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
//! What limits many rows: a `wgmma` with operand A in registers takes about 17 cycles more than its N / 2, from the slopes over
//! in_features at N = 64 and 128, so 128 tokens reach 77 % of the tensor core; 256 would need 256 registers for exact scales. At
//! 2048 rows the clock falls from 1.98 to about 1.5 GHz, as it does for cuBLAS.
//!
//! Registers: 71 (16 tokens), 87 (32), 127 (64), 168 before the hand-over and up to 240 after it (128); no spills. The tensor map
//! is a parameter of its own because its address is taken: when it lay in one structure with the other arguments, NVRTC 12.0
//! read all of them by generic loads, one for every unit, and the kernel was slower by 11 to 50 %.

mod plan;

use std::ops::RangeInclusive;

use cudarc::driver::sys;
use gptq_format::PackedLinear;

use super::{
    CudaDevice, Element,
    driver::{Function, Launch, gpu_error},
    gemv::{self, Gemv, GemvLinear},
    plain::output_bound,
    units::{DEPTH, Units},
};
use crate::{
    Epilogue, ErrorBound, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Unsupported,
    WeightFormat, Workspace, cpu::check_operands,
};
use plan::{FEW_ROWS, MOST_SLICES, Tokens};

pub(super) const NAME: &str = "cuda-wgmma-sm90";

/// Input features of a box of x: 128 bytes, as the swizzle wants.
const BOX: u32 = 64;
/// Rows of x that are put in order at a time, if only because they are not aligned.
const ALIGNED_ROWS: usize = 128;
/// Blocks that share a row which is put in order.
const ORDER_BLOCKS: u32 = 4;

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
    rows: u32,
    n: u32,
    k_units: u32,
    y_stride: u32,
    columns: u32,
    epilogue: u32,
    token_tiles: u32,
    stages: u32,
    y_pairs: u32,
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
    /// Index of the tokens at a time.
    tokens: usize,
    slices: usize,
}

struct WgmmaLinear<T: Element> {
    /// The weight, and how few rows are done.
    gemv: GemvLinear<T>,
    /// For 16, 32, 64 and 128 tokens at a time.
    tokens: Vec<Tokens>,
    /// In rising order; the last one has no end.
    classes: Vec<Class>,
    order: Function,
}

impl<T: Element> LinearKernel<CudaDevice<T>> for Wgmma<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> Option<String> {
        super::image::version(&["wgmma", "gemv"])
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        self.gemv.supports(spec)?;
        // The images for shorter groups would take more room than all the others together.
        match spec.weight {
            WeightFormat::Gptq { group_size, .. } if group_size < DEPTH.min(spec.in_features) => {
                Err(Unsupported::GroupSize { group_size })
            }
            _ => Ok(()),
        }
    }

    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        self.prepare_fused(weight, Epilogue::Store)
    }

    fn prepare_fused(
        &self,
        weight: &PackedLinear,
        epilogue: Epilogue,
    ) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        let spec = LinearSpec::of(weight).with_epilogue(epilogue);
        let unsupported = |reason| KernelError::Unsupported { kernel: NAME, reason };
        self.supports(&spec).map_err(unsupported)?;
        let units = Units::pack_by_group(weight, epilogue);
        let zero = if units.asym { "asym" } else { "sym" };
        let image = format!("wgmma-{}-g{}-{zero}", T::NAME, DEPTH / units.groups);
        let tokens = Tokens::all(&self.device, &image, &units)?;
        let order = self.device.images().function(&image, "order", self.device.shared_memory())?;
        let gemv = self.gemv.linear(&units, spec)?.ok_or_else(|| {
            let LinearSpec { in_features, out_features, .. } = LinearSpec::of(weight);
            unsupported(Unsupported::Shape { in_features, out_features })
        })?;
        Ok(Box::new(WgmmaLinear { classes: classes(&tokens), gemv, tokens, order }))
    }

    /// As for `cuda-gemv-sm90`, whose up to 8 rows are: a group's sum on the tensor core, then the fused multiply-adds with
    /// the scales, of which one slice may have all, the parts or slices, the bias and what [`Epilogue::Add`] adds to. Units
    /// have at most twice as many groups as full groups of 32 would be, and four.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        let groups = 2 * spec.in_features.div_ceil(32) + 4;
        output_bound::<T>(ErrorBound::float32(
            gemv::GROUP_ROUNDINGS + groups + gemv::PARTS.max(MOST_SLICES) + 2,
        ))
    }
}

/// More token tiles leave fewer slices to fill the GPU with, until one is left.
fn classes(tokens: &[Tokens]) -> Vec<Class> {
    let mut classes = Vec::new();
    for (index, &most) in FEW_ROWS.iter().enumerate() {
        classes.push(Class { most, tokens: index, slices: tokens[index].slices(1) });
    }
    let (index, many) = (FEW_ROWS.len(), &tokens[FEW_ROWS.len()]);
    let (mut token_tiles, mut slices) = (1, many.slices(1));
    while slices > 1 {
        let next = many.slices(token_tiles + 1).min(slices);
        if next < slices {
            classes.push(Class { most: token_tiles * many.tokens, tokens: index, slices });
        }
        (token_tiles, slices) = (token_tiles + 1, next);
    }
    classes.push(Class { most: usize::MAX, tokens: index, slices });
    classes
}

impl<T: Element> WgmmaLinear<T> {
    fn class(&self, rows: usize) -> &Class {
        // The last class has no end.
        &self.classes[self.classes.iter().take_while(|class| class.most < rows).count()]
    }

    /// Columns of x in the order of the units.
    fn width(&self) -> usize {
        self.gemv.k_units * DEPTH
    }

    /// Rows of x that are put in order at a time.
    fn ordered_rows(&self, rows: usize) -> usize {
        if self.gemv.gather.bytes() > 0 { rows } else { rows.min(ALIGNED_ROWS) }
    }

    /// Copies x to `to` in the order of the units.
    fn put_in_order(&self, x: Rows, to: u64, stream: sys::CUstream) -> Result<Rows, KernelError> {
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
            grid: (x.rows as u32, ORDER_BLOCKS),
            threads: 256,
            shared: (x.columns * size_of::<T>()).next_multiple_of(16),
            cluster: 1,
            programmatic: true,
        };
        // SAFETY: `OrderArgs` is that of the source. `to` has `width` elements for each of the rows, which the caller has
        // taken from the workspace; gather has as many; x is the caller's, checked. All outlive the stream's work.
        unsafe { self.order.launch(NAME, launch, stream, &mut args) }?;
        Ok(Rows { address: to, rows: x.rows, columns: self.width(), stride: self.width() })
    }

    /// The product of `x.rows` rows, which are part of a call of `class`.
    fn multiply(&self, class: &Class, x: Rows, y: Rows, stream: sys::CUstream) -> Result<(), KernelError> {
        let (tokens, spec) = (&self.tokens[class.tokens], self.gemv.spec());
        let token_tiles = x.rows.div_ceil(tokens.tokens);
        let (blocks, launch) = tokens.launch(token_tiles, class.slices);
        let pairs = y.address.is_multiple_of(4) && y.stride.is_multiple_of(2);
        let mut map = x.map::<T>(tokens.tokens)?;
        let mut args = Args {
            units: self.gemv.units.address(),
            y: y.address,
            bias: self.gemv.bias.address(),
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
            token_tiles: token_tiles as u32,
            stages: blocks.stages as u32,
            y_pairs: u32::from(pairs),
        };
        let mut parameters = [std::ptr::from_mut(&mut map).cast(), std::ptr::from_mut(&mut args).cast()];
        // SAFETY: the parameters are a tensor map and `WgmmaArgs`, which `Args` is. units and bias are the layer's own memory,
        // of the sizes that `Units` gives them; the map is of x, whose rows and columns `forward` has checked, or of the
        // workspace; y has been checked too. All of them outlive the stream's work, because the caller may not free what a
        // stream uses and `Resident` waits. Weights are read before the kernel waits for earlier ones: no kernel ever writes
        // them. The stream is that of y.
        unsafe { blocks.function.launch_with(NAME, launch, stream, &mut parameters) }
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
        let below = self.classes.iter().map(|class| class.most).take_while(|&most| most < rows).last();
        below.unwrap_or(gemv::ROWS) + 1..=self.class(rows).most
    }

    fn weight_bytes(&self) -> usize {
        self.gemv.weight_bytes()
    }

    fn workspace_len(&self, rows: usize) -> usize {
        if rows <= gemv::ROWS {
            self.gemv.workspace_len(rows)
        } else {
            self.ordered_rows(rows) * self.width()
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
        let class = self.class(x.rows());
        let scratch = workspace.take(self.workspace_len(x.rows()))?.address();
        let columns = x.cols();
        let all = Rows { address: x.data().address(), rows: x.rows(), columns, stride: x.row_stride() };
        let (y_columns, y_stride) = (y.cols(), y.row_stride());
        let y = y.into_data();
        let into = Rows { address: y.address(), rows: all.rows, columns: y_columns, stride: y_stride };
        if self.gemv.gather.bytes() == 0 && all.vectors::<T>() {
            return self.multiply(class, all, into, y.stream());
        }
        let step = self.ordered_rows(all.rows);
        for start in (0..all.rows).step_by(step) {
            let part = |of: Rows| Rows {
                address: of.address + (start * of.stride * size_of::<T>()) as u64,
                rows: step.min(all.rows - start),
                ..of
            };
            let ordered = self.put_in_order(part(all), scratch, y.stream())?;
            self.multiply(class, ordered, part(into), y.stream())?;
        }
        Ok(())
    }
}
