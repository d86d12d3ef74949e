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
//! | from 33 rows on: 8 warps, 32 features x 64 rows each, so that codes are expanded for twice as many rows; codes expanded step by step, scales applied once in 128 input features | 239 to 252; 0 | – / – / 16.7 / 35.7 / – (232 for 2048 rows) | 2.9 instructions for one of the tensor core instead of 5.5, so 24 for 256 rows. The profiler saw 43 % of the tensor core's time used and 37 % of the issue slots: all warps read shared memory at the same time, after the barrier, and then all wait for the tensor core |
//! | what is read from shared memory is read half of the rows before its use, from the next unit too | 220 to 238; 0 | 8.9 / 10.7 / 16.4 / 31.8 / 97 | 26 for 256 rows |
//! | tried: 8 warps for 17 to 32 rows; 128 features x 128 rows a block | 172; 231 | 15.9 instead of 13.6 for 32 rows; 33.0 for 256 | as fast, and 30: not used |
//! | tried: `mbarrier`s for the slots of the ring, so that warps run apart by up to a unit | 228; 237 | – / – / 16.2 / 32.0 / 193 for 2048 | -10 % from 256 rows on, found 0 to 3 %: not used |
//! | act-ordered rows are put in order through shared memory, a block a row | 32 | 12.1 / 18.0 / 35.0 / 104 for 16 / 64 / 256 / 1024 act-ordered rows, of 15.7 / 18.9 / 43.9 / 146 | half of what order costs: found 1.5 us for 16 rows, 7 for 1024 |
//!
//! 2048 rows take 196, 350 TFLOP/s; `mma.sync` alone, in a loop with nothing else, does 530 to 590 on this GPU, which is
//! what this kernel could reach there; `wgmma` reaches more. What keeps it from that is not found.

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
    marlin_plan::{MOST_PARTS_OF_A_TILE, Plan},
    marlin_tiles::{DEPTH, Tiles, unit_bytes},
    plain::output_bound,
    units::{MOST_FEATURES, check_grouping},
};
use crate::{
    Epilogue, ErrorBound, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Unsupported,
    WeightFormat, Workspace,
};

pub(super) const NAME: &str = "cuda-marlin";

/// As in `marlin.cu`.
const ARRANGING: usize = 512;
/// Rows that are brought into the order of the units at a time.
const ARRANGED_ROWS: usize = 1024;
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
    x_vectors: u32,
    staged: u32,
}

struct MarlinLinear<T> {
    spec: LinearSpec,
    plan: Plan,
    arrange: Function,
    /// Shared memory for a row of x; 0 if there is not so much.
    arrange_shared: usize,
    units: Resident,
    gather: Option<Resident>,
    bias: Resident,
    unit_rows: usize,
    k_units: usize,
    groups: usize,
    element: PhantomData<T>,
}

impl<T> MarlinLinear<T> {
    /// Rows of x in the order of the units that are there at a time.
    fn arranged_rows(&self, rows: usize) -> usize {
        if self.plan.variant(rows).gathers() { 0 } else { rows.min(ARRANGED_ROWS) }
    }

    fn width(&self) -> usize {
        self.k_units * DEPTH
    }
}

impl<T: Element> LinearKernel<CudaDevice<T>> for Marlin<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> Option<String> {
        super::image::version(&["marlin"])
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        let WeightFormat::Gptq { group_size, .. } = spec.weight else {
            return Err(Unsupported::WeightFormat);
        };
        spec.only_loads()?;
        // Columns are 16-bit numbers.
        check_grouping(spec, group_size, MOST_FEATURES)
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
        let tiles = Tiles::pack(weight, fusion.epilogue);
        let bits = tiles.bits;
        let image = format!(
            "marlin-{}-{bits}-{}-{}",
            T::NAME,
            if tiles.groups > 2 { "g32" } else { "g64" },
            if tiles.asym { "asym" } else { "sym" }
        );
        let unit = unit_bytes(bits, tiles.groups, tiles.asym);
        let shape = (tiles.unit_rows, tiles.k_units);
        let Some(plan) = Plan::new(&self.device, &image, unit, shape)? else {
            return Err(spec.shape_unsupported_by(NAME));
        };
        let stream = self.device.stream();
        let most_shared = self.device.shared_memory();
        let row_bytes = (spec.in_features * size_of::<T>()).next_multiple_of(16);
        Ok(Box::new(MarlinLinear {
            arrange: self.device.images().function(&image, "arrange", most_shared)?,
            arrange_shared: if row_bytes <= most_shared { row_bytes } else { 0 },
            units: Resident::new(stream, &tiles.bytes)?,
            gather: tiles.gather.as_ref().map(|gather| Resident::new(stream, gather)).transpose()?,
            bias: Resident::new::<f16>(stream, tiles.bias.as_deref().unwrap_or_default())?,
            unit_rows: tiles.unit_rows,
            k_units: tiles.k_units,
            groups: tiles.groups,
            plan,
            spec,
            element: PhantomData::<T>,
        }))
    }

    /// `code - zero` and its product with an activation are exact. The tensor core adds 16 products to an accumulator by
    /// aligning all 17 terms to the largest and cutting them off, at least 24 bits below its leading one (Fasi, Higham,
    /// Mikaitis, Pranesh, *Numerical behavior of NVIDIA tensor cores*, 2021): at most 17 errors of `2^-23`, two units
    /// each, in each of at most 8 such steps. Then come the fused multiply-adds with the scales, at most four for each
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
            8 * 17 * 2 + 4 * units + 1 + units.min(MOST_PARTS_OF_A_TILE + 1) + 2,
        ))
    }
}

/// What no other launch of this process has: bits that are no result of arithmetic, a number, and a byte to count in.
pub(super) fn ticket() -> u64 {
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
        self.plan.row_class(rows)
    }

    fn weight_bytes(&self) -> usize {
        self.units.bytes() + self.bias.bytes() + self.gather.as_ref().map_or(0, Resident::bytes)
    }

    fn workspace_len(&self, rows: usize) -> usize {
        self.plan.scratch(rows) / 2 + self.arranged_rows(rows) * self.width()
    }

    fn forward(
        &self,
        x: MatRef<'_, CudaDevice<T>>,
        y: MatMut<'_, CudaDevice<T>>,
        workspace: &mut Workspace<CudaDevice<T>>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
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
        let (variant, division) = (self.plan.variant(rows), self.plan.division(rows));
        let x_vectors = aligned(x.address(), x_stride);
        let elsewhere = self.gather.is_some() || !x_vectors || !self.spec.in_features.is_multiple_of(8);
        let (gathered, arranged) = (elsewhere && variant.gathers(), elsewhere && !variant.gathers());
        let blocks_at_once = if arranged { ARRANGED_ROWS / variant.rows } else { division.token_blocks };
        let arrivals = variant.arrivals(division.token_blocks);
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
                    x_vectors: u32::from(x_vectors),
                    staged: u32::from(self.arrange_shared > 0),
                };
                let launch = Launch {
                    grid: (count as u32, 1),
                    threads: ARRANGING as u32,
                    shared: self.arrange_shared,
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
                threads: variant.threads,
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
