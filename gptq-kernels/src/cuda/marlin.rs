//! `cuda-marlin`: layers of up to 8 bits and any number of rows, on tensor cores. The kernel is `cuda/marlin.cu`.
//!
//! Codes of 2 and 3 bits are stored in 4, codes of 5 to 7 in 8: as fast as these, and as large on the GPU.
//!
//! # How it came to be
//!
//! Microseconds on an H200 (images for compute capability 8.0) for 4096 x 4096, fp16, groups of 128, symmetric, and 1 / 16 /
//! 64 / 256 / 1024 rows, in a CUDA graph over rotated weights. What bytes and arithmetic cost at 4.3 TB/s and 790 TFLOP/s is
//! 2.1 / 2.1 / 2.7 / 11 / 43.
//!
//! | version | registers, bytes spilled | time | expected, and what happened |
//! |---|---|---|---|
//! | 8 warps a block, 64 features x 64 rows each, two halves of a unit; counters by compare-and-swap; one or two blocks a multiprocessor | 110 (8 rows), 123, 208 (32 rows), 255; 88 | 14.4 / 16.7 / 22.1 / 42.1 / 132; one block: 11.1 / 12.6 | 8 / 9 / 20 / 25 / 75; twice as many blocks are twice as many parts of a tile to wait for |
//! | 16 warps, 32 features x 32 rows each; counters by one atomic maximum and addition; shares by 32-bit arithmetic; tiles of 128 features for 33 to 64 rows | 103, 94, 128, 128; 56 | 8.9 / 10.2 / 17.1 / 41.7 / 142 | 8.5 / 10 / 13 / 28 / 95; few rows as expected, many are not limited by latency of the tensor core alone |
//! | addresses of copies derived once a tile | 104, 97, 123, 128; 24 | 9.1 / 10.2 / 16.5 / 40.5 / 137 | -10 % from 256 rows on, found 3 % |
//! | tried: one tile of eight rows at a time; all four at a time, scale applied every 32 input features; 3 or 6 stages; 256-byte prefetch | 128 | 40.1 / 43.7 / 40.3 and 41.3 / 40.4 for 256 rows | nothing gained: kept two, 64 features, 4, none |
//! | tried: codes expanded step by step between products | 128; 16 | 9.0 / – / 16.9 / 40.1 / 135 | -20 % from 256 rows on, found 1 %; kept apart, which is simpler |
//! | act-order up to 8 rows gathered by the kernel, a unit ahead | 105 | 10.8 for one act-ordered row, 12.0 for eight | within 10 % of 9.1; found 18 % and 35 %. For 16 rows it was 15.7, where writing x down in order first adds about 2 us to 10.2: not used |
//!
//! What limits 256 rows and more is not found. Wrong kernels, to see what parts cost at 1024 rows, took 138 without expansion of
//! codes, 132 with half of the loads of x from shared memory, 126 without copies, and 112 without application of scales, of
//! 135: no part alone is the reason. The profiler saw 55 % of the issue slots used, and 8 instructions for each of the tensor
//! core, of which the plan has 5.5.

use std::{
    marker::PhantomData,
    ops::RangeInclusive,
    sync::atomic::{AtomicU64, Ordering},
};

use gptq_format::PackedLinear;
use half::f16;

use super::{
    CudaDevice, Element,
    driver::{Function, Launch, Resident},
    marlin_tiles::{DEPTH, FEATURES, Tiles, unit_bytes},
    plain::output_bound,
    units::{MOST_FEATURES, check_grouping},
};
use crate::{
    Epilogue, ErrorBound, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Unsupported,
    WeightFormat, Workspace, cpu::check_operands,
};

pub(super) const NAME: &str = "cuda-marlin";

/// As in `marlin.cu`.
const ARRANGING: usize = 256;
/// Shared memory behind the ring: a corner for each of 16 warps, and a flag.
const CORNERS: usize = 16 * 8 * 144 + 16;
const THREADS: usize = 512;
/// The variants of the kernel: features of a tile, rows of a tile, warps that share a unit's input features, and the most
/// rows of a call that takes it.
const VARIANTS: [(usize, usize, usize, usize); 5] =
    [(256, 8, 2, 8), (256, 16, 2, 16), (256, 32, 2, 32), (128, 64, 2, 64), (256, 64, 1, usize::MAX)];
/// Units in the ring of a block, if there is so much shared memory. Fewer or more make no difference on an H200.
const STAGES: usize = 4;
/// Rows that are brought into the order of the units at a time.
const ARRANGED_ROWS: usize = 1024;
/// A counter of arrivals has room for 255.
const MOST_PARTS_OF_A_TILE: usize = 64;

pub(super) struct Marlin<T: Element> {
    device: CudaDevice<T>,
}

impl<T: Element> Marlin<T> {
    pub(super) fn new(device: &CudaDevice<T>) -> Result<Self, Unsupported> {
        device.needs((8, 0))?;
        Ok(Self { device: device.clone() })
    }
}

/// `MarlinArgs` of `marlin.cu`.
#[repr(C)]
struct Args {
    units: u64,
    x: u64,
    y: u64,
    bias: u64,
    partials: u64,
    arrivals: u64,
    ticket: u64,
    x_stride: u64,
    y_stride: u64,
    rows: u32,
    n: u32,
    k: u32,
    unit_rows: u32,
    tiles: u32,
    k_units: u32,
    parts: u32,
    share: u32,
    larger: u32,
    token_blocks: u32,
    partial_places: u32,
    groups: u32,
    stages: u32,
    epilogue: u32,
    y_vectors: u32,
    gathered: u32,
    gather: u64,
}

/// `ArrangeArgs` of `marlin.cu`.
#[repr(C)]
struct ArrangeArgs {
    x: u64,
    out: u64,
    gather: u64,
    x_stride: u64,
    k: u32,
    width: u32,
}

/// A kernel for tiles of some size, and how it is launched.
struct Variant {
    function: Function,
    /// Features and rows of a tile.
    features: usize,
    rows: usize,
    /// Warps that share a unit's input features.
    warps_k: usize,
    /// The most rows of a call that takes it.
    most: usize,
    /// Tiles along the features.
    tiles: usize,
    stages: usize,
    shared: usize,
    /// Blocks that the GPU can have at once.
    resident: usize,
}

struct MarlinLinear<T> {
    spec: LinearSpec,
    variants: Vec<Variant>,
    arrange: Function,
    units: Resident,
    gather: Option<Resident>,
    bias: Resident,
    unit_rows: usize,
    k_units: usize,
    groups: usize,
    element: PhantomData<T>,
}

impl Variant {
    /// Whether it gathers the columns of x by itself, a unit ahead. For more rows that takes longer than to write x down in
    /// order first.
    fn gathers(&self) -> bool {
        self.rows <= 8 && self.stages >= 3
    }
}

/// How the rows and units of a call are shared out.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Division {
    token_blocks: usize,
    /// Blocks for the rows of a token block.
    parts: usize,
}

/// Shares `tiles * k_units` units and `token_blocks` blocks of rows out among `resident` blocks.
fn divide(tiles: usize, k_units: usize, resident: usize, token_blocks: usize) -> Division {
    // Every tile a block: nothing has to be added, but the last round is not full.
    let whole = Division { token_blocks, parts: tiles };
    if tiles * token_blocks >= 8 * resident {
        return whole;
    }
    let most = (tiles * k_units).min(tiles * MOST_PARTS_OF_A_TILE);
    let split = Division { token_blocks, parts: (resident / token_blocks).clamp(1, most) };
    let rounds =
        |d: Division| (d.parts * token_blocks).div_ceil(resident) * (tiles * k_units).div_ceil(d.parts);
    if rounds(whole) <= rounds(split) { whole } else { split }
}

impl<T> MarlinLinear<T> {
    fn variant(&self, rows: usize) -> &Variant {
        // `prepare` has made at least one variant.
        self.variants.iter().find(|v| rows <= v.most).unwrap_or(&self.variants[self.variants.len() - 1])
    }

    fn division(&self, rows: usize) -> Division {
        let variant = self.variant(rows);
        divide(variant.tiles, self.k_units, variant.resident, rows.div_ceil(variant.rows))
    }

    /// What the sums of a row depend on: how the input features are divided among warps and blocks.
    fn order(&self, rows: usize) -> (usize, usize, usize) {
        let variant = self.variant(rows);
        (variant.features, variant.warps_k, self.division(rows).parts)
    }

    /// The numbers of rows that take the same variant and as many token blocks.
    fn block(&self, rows: usize) -> RangeInclusive<usize> {
        let variant = self.variant(rows);
        let smaller = self.variants.iter().map(|v| v.most).filter(|&most| most < rows).max().unwrap_or(0);
        let start = (rows - 1) / variant.rows * variant.rows;
        start.max(smaller) + 1..=(start + variant.rows).min(variant.most)
    }

    /// Bytes of the counters of arrivals.
    fn arrivals(variant: &Variant, token_blocks: usize) -> usize {
        (token_blocks * variant.tiles * 8).next_multiple_of(256)
    }

    /// Rows of x in the order of the units that are there at a time.
    fn arranged_rows(&self, rows: usize) -> usize {
        if self.variant(rows).gathers() { 0 } else { rows.min(ARRANGED_ROWS) }
    }

    fn width(&self) -> usize {
        self.k_units * DEPTH
    }
}

impl<T: Element> Marlin<T> {
    fn variants(&self, image: &str, unit: usize, unit_rows: usize) -> Result<Vec<Variant>, KernelError> {
        let most_shared = self.device.shared_memory();
        let mut variants = Vec::new();
        for (features, rows, warps_k, most) in VARIANTS {
            let entry = format!("marlin_{features}x{rows}");
            let function = self.device.images().function(image, &entry, most_shared)?;
            let shared = |stages| stages * (features / FEATURES * unit + rows * DEPTH * 2) + CORNERS;
            let fits = |&stages: &usize| shared(stages) <= most_shared;
            let Some(stages) = (2..=STAGES).rev().find(fits) else { continue };
            let blocks = function.resident_blocks(THREADS as u32, shared(stages))?;
            if blocks > 0 {
                let resident = blocks * self.device.multiprocessors() as usize;
                let tiles = unit_rows.div_ceil(features / FEATURES);
                let shared = shared(stages);
                variants.push(Variant {
                    function,
                    features,
                    rows,
                    warps_k,
                    most,
                    tiles,
                    stages,
                    shared,
                    resident,
                });
            }
        }
        if let Some(last) = variants.last_mut() {
            last.most = usize::MAX;
        }
        Ok(variants)
    }
}

impl<T: Element> LinearKernel<CudaDevice<T>> for Marlin<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        let WeightFormat::Gptq { group_size, .. } = spec.weight else {
            return Err(Unsupported::WeightFormat);
        };
        // Columns are 16-bit numbers.
        check_grouping(spec, group_size, MOST_FEATURES)
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
        let tiles = Tiles::pack(weight, epilogue);
        let bits = tiles.bits;
        let image = format!(
            "marlin-{}-{bits}-{}-{}",
            T::NAME,
            if tiles.groups > 2 { "g32" } else { "g64" },
            if tiles.asym { "asym" } else { "sym" }
        );
        let variants = self.variants(&image, unit_bytes(bits, tiles.groups, tiles.asym), tiles.unit_rows)?;
        if variants.is_empty() {
            let (in_features, out_features) = (spec.in_features, spec.out_features);
            return Err(unsupported(Unsupported::Shape { in_features, out_features }));
        }
        let stream = self.device.stream();
        Ok(Box::new(MarlinLinear {
            arrange: self.device.images().function(&image, "arrange", 0)?,
            units: Resident::new(stream, &tiles.bytes)?,
            gather: tiles.gather.as_ref().map(|gather| Resident::new(stream, gather)).transpose()?,
            bias: Resident::new::<f16>(stream, tiles.bias.as_deref().unwrap_or_default())?,
            unit_rows: tiles.unit_rows,
            k_units: tiles.k_units,
            groups: tiles.groups,
            variants,
            spec,
            element: PhantomData::<T>,
        }))
    }

    /// `code - zero` and its product with an activation are exact. The tensor core adds 16 products to an accumulator by
    /// aligning all 17 terms to the largest and cutting them off, at least 24 bits below its leading one (Fasi, Higham,
    /// Mikaitis, Pranesh, *Numerical behavior of NVIDIA tensor cores*, 2021): at most 17 errors of `2^-23`, two units
    /// each, in each of at most 4 such steps. Then come the fused multiply-adds with the scales, at most two for each
    /// unit; the other half of the unit; the parts of the tile, at most as many as units; the bias and what the epilogue
    /// adds.
    ///
    /// In a group, sums are of `x (code - zero)`, and the scale is the group's own, so the errors are relative to
    /// `sum |x w|` as they are.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        // Groups of any size, as `g_idx` may have them, are padded to multiples of 32.
        let groups = match spec.weight {
            WeightFormat::Gptq { group_size, .. } => spec.in_features.div_ceil(group_size),
            WeightFormat::Dense(_) => 0,
        };
        let units = (spec.in_features + groups * 31).div_ceil(DEPTH);
        output_bound::<T>(ErrorBound::float32(
            4 * 17 * 2 + 2 * units + 1 + units.min(MOST_PARTS_OF_A_TILE + 1) + 2,
        ))
    }
}

/// What no other launch of this process has: bits that are no result of arithmetic, a number, and a byte to count in.
fn ticket() -> u64 {
    static LAUNCHES: AtomicU64 = AtomicU64::new(0);
    0xFF_FFA5 << 40 | (LAUNCHES.fetch_add(1, Ordering::Relaxed) & 0xFFFF_FFFF) << 8
}

impl<T: Element> Linear<CudaDevice<T>> for MarlinLinear<T> {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    fn row_class(&self, rows: usize) -> RangeInclusive<usize> {
        // From there on tiles are not divided.
        let last = self.variant(usize::MAX);
        let undivided = (8 * last.resident).div_ceil(last.tiles) * last.rows;
        let rows = rows.clamp(1, undivided);
        let (same, (mut start, mut end)) = (self.order(rows), self.block(rows).into_inner());
        while end < undivided && self.order(end + 1) == same {
            end = *self.block(end + 1).end();
        }
        while start > 1 && self.order(start - 1) == same {
            start = *self.block(start - 1).start();
        }
        let end = if end >= undivided { usize::MAX } else { end };
        if start == 1 { 0..=end } else { start..=end }
    }

    fn weight_bytes(&self) -> usize {
        self.units.bytes() + self.bias.bytes() + self.gather.as_ref().map_or(0, Resident::bytes)
    }

    fn workspace_len(&self, rows: usize) -> usize {
        // The most that so many rows or fewer need.
        let sums = self.variants.iter().filter(|variant| {
            let smaller = self.variants.iter().map(|v| v.most).filter(|&most| most < variant.most).max();
            smaller.is_none_or(|smaller| smaller < rows)
        });
        let bytes = sums.map(|variant| {
            let blocks = rows.min(variant.most).div_ceil(variant.rows);
            // Of all token blocks together.
            let places = (2 * variant.resident).min(variant.resident + blocks * variant.tiles);
            Self::arrivals(variant, blocks) + places * variant.features * variant.rows * size_of::<f32>()
        });
        bytes.max().unwrap_or(0) / 2 + self.arranged_rows(rows) * self.width()
    }

    fn forward(
        &self,
        x: MatRef<'_, CudaDevice<T>>,
        y: MatMut<'_, CudaDevice<T>>,
        workspace: &mut Workspace<CudaDevice<T>>,
    ) -> Result<(), KernelError> {
        check_operands(&self.spec, &x, &y)?;
        let (rows, x_stride, y_stride) = (x.rows(), x.row_stride(), y.row_stride());
        let len = self.workspace_len(rows);
        let scratch = workspace.take(len)?.address();
        if rows == 0 {
            return Ok(());
        }
        let (x, y) = (x.data(), y.into_data());
        let aligned = |address: u64, stride: usize| {
            address.is_multiple_of(16) && (rows == 1 || stride.is_multiple_of(8))
        };
        let (variant, division) = (self.variant(rows), self.division(rows));
        let elsewhere = self.gather.is_some() || !aligned(x.address(), x_stride);
        let (gathered, arranged) = (elsewhere && variant.gathers(), elsewhere && !variant.gathers());
        let blocks_at_once = if arranged { ARRANGED_ROWS / variant.rows } else { division.token_blocks };
        let arrivals = Self::arrivals(variant, division.token_blocks);
        let parts = division.parts;
        let staged = scratch + (len * 2 - self.arranged_rows(rows) * self.width() * 2) as u64;
        let gather = self.gather.as_ref().map_or(0, Resident::address);
        let mut start = 0;
        while start < rows {
            let count = (rows - start).min(blocks_at_once * variant.rows);
            let from = x.address() + (start * x_stride * 2) as u64;
            if arranged {
                let mut args = ArrangeArgs {
                    x: from,
                    out: staged,
                    gather,
                    x_stride: x_stride as u64,
                    k: self.spec.in_features as u32,
                    width: self.width() as u32,
                };
                let launch = Launch {
                    grid: (self.width().div_ceil(ARRANGING * 8) as u32, count as u32),
                    threads: ARRANGING as u32,
                    shared: 0,
                    cluster: 1,
                    programmatic: false,
                };
                // SAFETY: `Args` is `ArrangeArgs`. `check_operands` has compared x with the layer, `gather` has `width`
                // columns of it, and the workspace has room for `count` rows behind the sums. The stream is that of y.
                unsafe { self.arrange.launch(NAME, launch, y.stream(), &mut args) }?;
            }
            let token_blocks = count.div_ceil(variant.rows);
            let mut args = Args {
                units: self.units.address(),
                x: if arranged { staged } else { from },
                y: y.address() + (start * y_stride * 2) as u64,
                bias: self.bias.address(),
                partials: scratch + arrivals as u64,
                arrivals: scratch,
                ticket: ticket(),
                x_stride: if arranged { self.width() } else { x_stride } as u64,
                y_stride: y_stride as u64,
                rows: count as u32,
                n: self.spec.y_features() as u32,
                k: if arranged { self.width() } else { self.spec.in_features } as u32,
                unit_rows: self.unit_rows as u32,
                tiles: variant.tiles as u32,
                k_units: self.k_units as u32,
                parts: parts as u32,
                share: (variant.tiles * self.k_units / parts) as u32,
                larger: (variant.tiles * self.k_units % parts) as u32,
                token_blocks: token_blocks as u32,
                partial_places: if variant.tiles <= parts { parts + variant.tiles } else { 2 * parts } as u32,
                groups: self.groups as u32,
                stages: variant.stages as u32,
                epilogue: match self.spec.epilogue {
                    Epilogue::Store => 0,
                    Epilogue::Add => 1,
                    Epilogue::SiluMul => 2,
                },
                y_vectors: u32::from(aligned(y.address(), y_stride)),
                gathered: u32::from(gathered),
                gather,
            };
            let launch = Launch {
                grid: ((parts * token_blocks) as u32, 1),
                threads: THREADS as u32,
                shared: variant.shared,
                cluster: 1,
                programmatic: false,
            };
            // SAFETY: `Args` is `MarlinArgs`. units and bias are the layer's own memory, of the sizes that `Tiles` gives
            // them; `check_operands` has compared x and y, of these rows, with the layer; counters and sums lie in the
            // workspace, which has room for them by `workspace_len`; all of them outlive the stream's work, because the
            // caller may not free what a stream uses and `Resident` waits. The stream is that of y.
            unsafe { variant.function.launch(NAME, launch, y.stream(), &mut args) }?;
            start += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisions_fill_the_gpu_or_leave_tiles_whole() {
        for tiles in [1, 2, 16, 43, 112, 1000] {
            for k_units in [1, 3, 32, 86, 256] {
                for token_blocks in [1, 2, 3, 7, 16, 100, 3000] {
                    let Division { parts, .. } = divide(tiles, k_units, 132, token_blocks);
                    let what = format!("{tiles} {k_units} {token_blocks}: {parts}");
                    assert!(parts >= 1 && parts <= tiles * k_units, "{what}");
                    // Counters of arrivals and places for sums have been given room for no more.
                    assert!(parts <= tiles * MOST_PARTS_OF_A_TILE, "{what}");
                    assert!(parts == tiles || parts == 1 || parts * token_blocks <= 132, "{what}");
                    if tiles * token_blocks >= 8 * 132 {
                        assert_eq!(parts, tiles, "{what}");
                    }
                }
            }
        }
        assert_eq!(divide(16, 32, 132, 1).parts, 132);
        assert_eq!(divide(132, 32, 132, 1).parts, 132);
        assert_eq!(divide(1, 2, 132, 1).parts, 2);
    }

    #[test]
    fn tickets_differ_and_leave_room_to_count() {
        let (a, b) = (ticket(), ticket());
        assert!(a != b && a & 0xFF == 0 && b & 0xFF == 0);
        // Larger than the bits of two floats of any width, but for NaNs that have their sign and highest bits set.
        for floats in [[f32::NAN, -f32::NAN], [f32::NEG_INFINITY, f32::MIN]] {
            let [low, high] = floats.map(|float| u64::from(float.to_bits()));
            assert!(a > high << 32 | low);
        }
    }
}
