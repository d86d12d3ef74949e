//! `cuda-gemv-sm90`: 4-bit layers and few rows, on Hopper and later. The kernel is `cuda/gemv_sm90.cu`.
//!
//! Eight rows are done in one pass over the weight; more rows take more passes, each with the same arithmetic for a row.
//!
//! # How it came to be
//!
//! Microseconds on an H200 for one row and 4096 x 4096 / 4096 x 11008 / 11008 x 4096 / 8192 x 28672, fp16, groups of 128,
//! in a CUDA graph over rotated weights. What bytes alone cost is 2.1 / 5.6 / 5.6 / 29.
//!
//! | version | time | expected, and what happened |
//! |---|---|---|
//! | blocks of 128 features by a slice of a cluster of up to 8, reduced through remote shared memory behind a cluster barrier | 6.2 / 9.3 / 10.5 / 35.2 | 4 / 7.5 / 7.5 / 31; the chain wait, x, product, reduction takes 5 us, whatever the bytes |
//! | `cp.async` for x; 16 warps a block | 5.3 / 9.3 / 9.8 / 34.5 | the loads of x were a chain; most of what 16 rows lost |
//! | fixed 16 parts; sums handed over by `mbarrier`, without a cluster where one block has all parts; blocks walk over stripes | 5.7 / 10.7 / 8.8 / 37.7 | -1 us; releases and acquires at cluster scope cost what the barrier did |
//! | block-scope barriers where there is no cluster; a rehearsal round to warm the instruction cache | 5.1 / 9.3 / 9.4 / 32.7 | -1 us on 4096 x 4096 |
//! | nothing derived anew per unit: addresses uniform, ring depth a constant | 4.9 / 8.1 / 8.6 / 30.3 | a third of the instructions were address arithmetic |
//! | one block barrier a round instead of two `mbarrier`s; sums in one buffer, which lets 8 rows of 8192 fit | 4.7 / 7.8 / 8.5 / 30.8 | 8192 x 28672 with 8 rows 42 -> 33 |
//! | the same with a cluster's barrier for clusters, which are then needed only where x does not fit | 4.8 / 7.8 / 8.4 / 31.1 | nothing lost, and racecheck understands it |
//! | act-order: columns fetched ahead of the wait, whole rows of x brought to shared memory and picked there | 6.0 / 8.7 / 10.2 / 32.0 act-ordered | was 9.0 / 12.0 / 18.4 / 38.5 with scattered reads of global memory; wanted within 5 % of the layer without, is within 4 to 29 % |
//! | epilogues by a flag, what is added to fetched ahead of the product | 4.7 / 8.1 / 8.7 / 31.4 | nothing lost and nothing found: within the spread |
//! | one thread elected for a bulk copy, which spares the compiler a loop over the lanes; places in a unit kept in registers | 4.6 / 7.8 / 9.1 / 31.2 | 258 to 225 instructions a unit; the arithmetic alone was found to take 4.0 / 7.3 / 6.6 / 25.4, reading alone 2.9 / 6.3 / 6.2 / 28.5, neither 1.5 / 2.5 / 2.0 / 6.1, so that -0.5 on all was expected |
//! | every warp stages its own part of x, without the block's barrier | 4.9 / 7.5 / 8.1 / 31.0 | -0.1 on all; 4096 x 4096 is slower and faster by turns with the registers that the compiler has |
//! | one block a multiprocessor, with 72 to 95 registers instead of 64; no rehearsal; ring of 4 units for 8192 x 28672 | 4.1 / 7.2 / 7.5 / 29.6; act-ordered 5.0 / 8.1 / 9.2 / 31.1 | that two blocks, the second prefetching for the next kernel, cost more than they gain was found by chance with the ring of 4; the rehearsal was then without effect |
//!
//! | act-order: the block brings x to its places by stores free of conflicts, the order inside a group being chosen for that; for several rows 16 bytes a column, transposed by `stmatrix` and back by `ldmatrix` | 4.9 / 7.8 / 8.6 / 30.5 act-ordered; eight rows of 4096 x 4096 6.0 | within 5 %; see below. Was 8.6 for eight rows, 65 % more than in order |
//! | one unit a warp ahead of the wait, the others behind the loads of x | 3.6 / 6.9 / 7.1 / 29.3; act-ordered 4.2 / - / 8.2 / - | -0.3: that a barrier of the block behind the loads of x cost 0.5 told that some warps came late, and bulk copies are issued one after the other by all warps; found -0.5 |
//! | x as it is: kernels without the ways to normalise or reorder it, 72 registers instead of 118 | 3.6 / 7.1 / 7.1 / 30.4; the version above in these runs 3.6 / 6.9 / 7.1 / 30.2 | room for a block of attention beside one that waits for it, -1 in a model: found nothing, and 0.2 lost on 4096 x 11008, since the compiler orders the loop otherwise; the driver compiles them in 0.1 s instead of 1.2 |
//! | codes in the upper half of a byte as very small numbers instead of shifted ones | bf16 3.5 / 7.0 / 7.1 / 30.0, was 3.8 / 7.4 / 7.2 / 30.5; fp16 as before | 32 of 257 instructions of bf16; now both types have the same |
//! | a slot of the ring is refilled when its unit is in registers, and a round finished one round later, without a barrier; rings of 2 for all | 3.5 / 7.0 / 7.15 / 29.5; eight rows 4.5 / 7.9 / - / -, were 4.6 / 8.3 | a round takes 1.7 in a block that is alone on the GPU, weights in L2: expected 1.3; found 1.6, which shows where bytes are not the limit: eight rows, and 8192 x 28672 |
//! | asym: zeros by a permutation of bytes; units of 2176 bytes instead of 2144, so that they begin at multiples of 64 | asym 3.6 / 7.2 / 7.1 / 30.1, was 3.6 / 7.2 / 7.5 / 31.7 | found by chance: groups of 64, whose units have 2176 bytes, were faster on 8192 x 28672 than asymmetric ones of 2144 |
//! | eight rows of 8192 features in a block: what only norms need left out, and one slot for sums where two do not fit | as before; eight rows of 8192 x 28672 32.1, asym 33.3, were 41.1 and 41.6 | 32, as before there were two slots |
//!
//! Not taken: codes as subnormal halves, without a subtraction, the zero point as a multiple of the sum of x over a group
//! that the tensor core adds up (64 of 225 instructions less, expected -0.5; found +0.3 on 4096 x 4096 and -0.2 on
//! 4096 x 11008, since integer instructions, at half rate, are the limit, and those are the same; and its error is relative to
//! `sum |x|` rather than to `sum |x w|`). Starting the next kernel late, when the last unit has been asked for (expected -1;
//! found -0.6 on 11008 x 4096 and +3 elsewhere). No weight ahead of the wait: +0.5 to +0.9. One warp that starts the
//! copies of all: -0.1 on 4096 x 4096, nothing elsewhere. Eight copies of x for different blocks, were its lines fought
//! for in L2: nothing. A kernel that brings x into the order of an act-ordered layer: a kernel that does nothing but wait
//! adds 0.5 in a chain, one that also reads x, adds parts and stores 1.5.
//!
//! What the whole block does with x, instead of each warp with its own part, costs about 0.4 for the barrier: no warp can
//! multiply before the last has its x. That is most of what act-order still costs, and of what a norm in the prologue
//! costs beside its own arithmetic: 1.0 for one row of 4096 features, about what its own kernel costs in a chain, whose wait the
//! next layer's first weights fill. So a decoder gains nothing by the prologue (`benches/RESULTS-llama-cuda.md`).
//!
//! What limits it: neither bytes nor instructions alone, but the way from a layer's last block to the next layer's first product. With the weights in
//! L2 the layers take 3.4 / 6.5 / 6.0 / 29.2, that is 0.1 to 1.2 us less, and a block that has the GPU for itself takes 2.8, 6.2 and 11.4 for one,
//! three and six rounds of 4096 input features: 1.7 a round, which is what all blocks together take of L2, and 0.4 less than the memory needs. In
//! that time the schedulers issue 0.6 instructions a cycle, 222 for 128 weights a thread, of which 100 are integer ones, at half rate (ncu: integer
//! pipe 51 %, tensor core 7 %). Half of the instructions gain nothing all the same (digits, below). So to fetch weights into L2 ahead gains little.
//! Microseconds of all four layers, norms and attention of 32 layers of 7B in one graph, where these took 1225 to 1249 without:
//!
//! | weights fetched into L2 ahead | expected | found |
//! |---|---|---|
//! | of the layer itself, ahead of the wait, 1 / 3 / 8 units a warp | -30 | +10 / +49 / +127: they are in front of x and of nearer units |
//! | by o, while it waits for attention, 4 to 24 MB of gate and up | -60 | +8 |
//! | of the next layer, piece by piece with every unit, 4 to 45 MB | -50 | +50 to +200 |
//! | of the next layer, 4 MB when a warp's last unit is done | -20 | -15 |
//! | by blocks beside that of a norm, 2 to 4 MB of the layer behind it | -60 | -20 to -35: taken, see `ops.cu` |
//! | by blocks beside those of attention, 2 to 8 MB | -60 | -20 more |
//!
//! Not taken either: units in registers straight from memory (4.1 / 7.5 / 7.7 / 30.9: the compiler's order of loads and uses is not a
//! ring's); two units at a time, for twice the independent instructions (4.1 / 7.5 / 7.4 / 29.5); rings of 3 and 4 (+0.5); two blocks a
//! multiprocessor with 56 to 62 registers (4.5 / 7.4 / 10.2 / 29.9, and 1.7 ms for the 32 layers); two units ahead of the wait where
//! attention or a norm leaves time for it (nothing).
//!
//! Nor x as digits: x in fp16 is 41 bits of fixed point, six signed digits of 8 bits, which are six of the eight columns that `mma.m16n8k32.s32.u8.s8`
//! has for one row. Codes are then its operand by one mask for each four, `w & 0x0F0F0F0F` for the features r and `w & 0xF0F0F0F0`, sixteen times the
//! code, for r + 8, in the order in which they lie; sums in a group are exact, and it passes the battery. 117 instructions instead of 225 for 128
//! weights a thread, 56 registers instead of 71, and some 80 to make digits of 128 elements of x, once a warp. Expected 6.7 for q, k and v of 7B and 11.5 for
//! gate and up; found 7.6 and 12.9, where this takes 7.6 and 13.0, and 4.3 / 6.9 / 8.5 / 30.3 for the four shapes. With those 56 registers a second
//! block waits beside each, which costs as much again (5.0 / 7.1 / 8.4 / 30.3, and 598 tokens/s of 7B instead of 770) unless memory is asked for that it
//! does not need.
//!
//! Nor layers one after the other in one kernel that stays on the GPU: `benches/RESULTS-llama-cuda.md`.

use std::marker::PhantomData;

use gptq_format::{Bits, PackedLinear};

use super::{
    CudaDevice, Element,
    driver::{Function, Launch, Resident},
    plain::output_bound,
    units::{DEPTH, MOST_FEATURES, NONE, Places, STRIPE, Units, check_grouping, unit_bytes},
};
use crate::{
    Epilogue, ErrorBound, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Prologue,
    RmsNorm, Span, Unsupported, WeightFormat, Workspace,
};

pub(super) const NAME: &str = "cuda-gemv-sm90";

/// Parts of a sum, as in `gemv_sm90.cu`.
pub(super) const PARTS: usize = 16;
/// Warps of a block that normalises, as in `norm.cuh`.
const NORM_WARPS: usize = 16;
/// Rows of one pass.
pub(super) const ROWS: usize = 8;

/// Units of `2^-24` that a group's sum on the tensor core may be wrong by: see [`Gemv::error_bound`].
pub(super) const GROUP_ROUNDINGS: usize = 8 * 17 * 2;

pub(super) struct Gemv<T: Element> {
    device: CudaDevice<T>,
}

impl<T: Element> Gemv<T> {
    pub(super) fn new(device: &CudaDevice<T>) -> Result<Self, Unsupported> {
        device.needs((9, 0))?;
        Ok(Self { device: device.clone() })
    }
}

/// One shape of blocks, all of which compute the same bits.
struct Variant {
    /// The end of the kernel's name.
    shape: &'static str,
    /// Stripes that a block has in flight.
    stripes: usize,
    /// Parts that a block takes; `PARTS / parts` blocks are a cluster.
    parts: usize,
    /// Units in the ring of a warp.
    depth: usize,
    /// Rounds whose sums there is room for, 1 or 2: with two, no warp of a block that has all parts waits for another at the end of a
    /// round.
    slots: usize,
}

/// How x lies in shared memory: see `gemv_stage.cuh`.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    Rows,
    Columns,
}

const WHOLE: Variant = Variant { shape: "1x16_2", stripes: 1, parts: 16, depth: 2, slots: 2 };
const PAIRED: Variant = Variant { shape: "2x8_2", stripes: 2, parts: 8, depth: 2, slots: 1 };
/// From the fastest on.
const VARIANTS: [Variant; 3] = [WHOLE, Variant { slots: 1, ..WHOLE }, PAIRED];

impl Variant {
    fn warps(&self) -> usize {
        self.stripes * self.parts
    }

    fn slices(&self) -> usize {
        PARTS / self.parts
    }

    /// Bytes of shared memory, laid out as `gemv` in `gemv_sm90.cu` does.
    fn shared_memory(
        &self,
        layout: Layout,
        by_block: bool,
        unit: usize,
        k_units: usize,
        rows: usize,
    ) -> usize {
        let barriers = (self.warps() * self.depth * 8).next_multiple_of(128);
        let rings = (self.warps() * self.depth * unit).next_multiple_of(128);
        let x_units = if self.slices() == 1 { k_units } else { k_units.div_ceil(self.slices()) + 1 };
        let x = match layout {
            Layout::Rows => rows * (x_units * DEPTH * 2 + 64),
            Layout::Columns => x_units * DEPTH * 16 + self.warps() * 128,
        };
        // With the barriers of two slots.
        let sums = self.slots * PARTS * rows * (self.stripes * STRIPE / self.slices()) * 4 + 32;
        let norm_sums = if by_block { rows * NORM_WARPS * 4 } else { 0 };
        barriers + rings + x + sums + norm_sums
    }
}

/// `GemvArgs` of `gemv_stage.cuh`.
#[repr(C)]
struct Args {
    units: u64,
    x: u64,
    y: u64,
    bias: u64,
    places: u64,
    norm: u64,
    rows: u32,
    n: u32,
    k: u32,
    x_stride: u32,
    y_stride: u32,
    k_units: u32,
    x_vectors: u32,
    padded: u32,
    columns: u32,
    epilogue: u32,
    slots: u32,
    eps: f32,
}

/// How a pass of some rows is launched.
struct Plan {
    function: Function,
    rows: usize,
    layout: Layout,
    slots: u32,
    shape: Launch,
}

pub(super) struct GemvLinear<T> {
    spec: LinearSpec,
    /// For 1, 2, 3 and more rows, as many as fit.
    plans: Vec<Plan>,
    /// The same for rows that do not begin at multiples of 16 bytes; empty if that makes no difference.
    unaligned: Vec<Plan>,
    pub(super) units: Resident,
    /// Column of x for every place of the units; empty for the identity.
    pub(super) gather: Resident,
    /// The inverse in the layouts of rows and of columns.
    row_places: Resident,
    column_places: Resident,
    padded: bool,
    pub(super) bias: Resident,
    /// Weight of the norm; empty if there is none.
    norm: Resident,
    eps: f32,
    pub(super) k_units: usize,
    /// Output features, with the padding between gate and up.
    pub(super) unit_rows: usize,
    element: PhantomData<T>,
}

impl<T: Element> Gemv<T> {
    fn plan(
        &self,
        image: &str,
        units: &Units,
        spec: &LinearSpec,
        rows: usize,
        layout: Layout,
    ) -> Result<Option<Plan>, KernelError> {
        let stripes = units.rows.div_ceil(STRIPE);
        let unit = unit_bytes(units.groups, units.asym);
        let clusters = |variant: &Variant| {
            let most = self.device.multiprocessors() as usize / variant.slices();
            stripes.div_ceil(variant.stripes).min(most.max(1))
        };
        // What brings x to a block is most of the code, and is in images of its own.
        let by_block = units.gather.is_some() || spec.prologue != Prologue::Load;
        let (family, kernel) = match layout {
            Layout::Rows if !by_block => ("gemv", "gemv"),
            Layout::Rows => ("gemv-block", "block"),
            Layout::Columns => ("gemv-block", "columns"),
        };
        for variant in VARIANTS {
            let clusters = clusters(&variant);
            let shared = variant.shared_memory(layout, by_block, unit, units.k_units, rows);
            // A block that has a slice of x sees whole rows only where it brings them into another order.
            let normalises =
                spec.prologue == Prologue::Load || variant.slices() == 1 || units.gather.is_some();
            if shared > self.device.shared_memory() || !normalises {
                continue;
            }
            let (image, entry) = (format!("{family}-{image}"), format!("{kernel}_{}", variant.shape));
            let function = self.device.images().function(&image, &entry, self.device.shared_memory())?;
            let shape = Launch {
                grid: ((clusters * variant.slices()) as u32, 1),
                threads: (variant.warps() * 32) as u32,
                shared,
                cluster: variant.slices() as u32,
                programmatic: true,
            };
            return Ok(Some(Plan { function, rows, layout, slots: variant.slots as u32, shape }));
        }
        Ok(None)
    }

    /// The layer that `units` were packed from; `None` if a row of x does not fit.
    pub(super) fn linear(
        &self,
        units: &Units,
        spec: LinearSpec,
        norm: Option<RmsNorm<'_>>,
    ) -> Result<Option<GemvLinear<T>>, KernelError> {
        let zero = if units.asym { "asym" } else { "sym" };
        let image = format!("{}-g{}-{zero}", T::NAME, DEPTH / units.groups);
        let places = match &units.gather {
            Some(gather) => match Places::new(gather, spec.in_features) {
                Some(places) => Some(places),
                None => return Ok(None),
            },
            None => None,
        };
        let (mut plans, mut unaligned) = (Vec::with_capacity(ROWS), Vec::new());
        for rows in 1..=ROWS {
            let in_rows = self.plan(&image, units, &spec, rows, Layout::Rows)?;
            let in_columns = match &places {
                Some(_) if rows > 1 && spec.in_features.is_multiple_of(8) => {
                    self.plan(&image, units, &spec, rows, Layout::Columns)?
                }
                _ => None,
            };
            match (in_columns, in_rows) {
                (Some(plan), in_rows) => {
                    plans.push(plan);
                    unaligned.extend(in_rows);
                }
                (None, Some(plan)) => plans.push(plan),
                (None, None) => break,
            }
        }
        // One row is in the layout of rows.
        let unaligned = match plans.is_empty() {
            true => return Ok(None),
            false if unaligned.is_empty() => Vec::new(),
            false => {
                let first = self.plan(&image, units, &spec, 1, Layout::Rows)?;
                first.into_iter().chain(unaligned).collect()
            }
        };
        let of_layout = |layout: fn(&Places) -> &[u16]| places.as_ref().map(layout).unwrap_or_default();
        let stream = self.device.stream();
        // A whole number of vectors.
        let norm_weight: Vec<T> = norm.map_or_else(Vec::new, |norm| {
            let padding = norm.weight.len().next_multiple_of(8) - norm.weight.len();
            norm.weight.iter().copied().chain(std::iter::repeat_n(0.0, padding)).map(T::from_f32).collect()
        });
        Ok(Some(GemvLinear {
            norm: Resident::new(stream, &norm_weight)?,
            eps: norm.map_or(0.0, |norm| norm.eps),
            units: Resident::new(stream, &units.bytes)?,
            gather: Resident::new(stream, units.gather.as_deref().unwrap_or_default())?,
            row_places: Resident::new(stream, of_layout(|places| &places.rows))?,
            column_places: Resident::new(stream, of_layout(|places| &places.columns))?,
            padded: units.gather.as_ref().is_some_and(|gather| gather.contains(&NONE)),
            bias: Resident::new(stream, &units.bias)?,
            k_units: units.k_units,
            unit_rows: units.rows,
            plans,
            unaligned,
            spec,
            element: PhantomData::<T>,
        }))
    }
}

impl<T: Element> LinearKernel<CudaDevice<T>> for Gemv<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> Option<String> {
        super::image::version(&["gemv", "gemv-block"])
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        let WeightFormat::Gptq { bits, group_size, .. } = spec.weight else {
            return Err(Unsupported::WeightFormat);
        };
        if spec.epilogue == Epilogue::SiluMul && !spec.out_features.is_multiple_of(2) {
            return Err(Unsupported::Epilogue { epilogue: spec.epilogue });
        }
        if bits != Bits::B4 {
            return Err(Unsupported::Bits { bits: bits.get() });
        }
        // One row of x, with the padding of its groups, has to fit in the shared memory of a block.
        check_grouping(spec, group_size, MOST_FEATURES / 2 + 1)
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
        if let Some(norm) = &fusion.norm {
            norm.validate(spec.in_features, spec.out_features)?;
        }
        let units = Units::pack(weight, fusion.epilogue);
        match self.linear(&units, spec.clone(), fusion.norm)? {
            Some(linear) => Ok(Box::new(linear)),
            None => Err(spec.shape_unsupported_by(NAME)),
        }
    }

    /// `code - zero` and its product with an activation are exact. The tensor core adds 16 products to an accumulator by
    /// aligning all 17 terms to the largest and cutting them off, at least 24 bits below its leading one (Fasi, Higham,
    /// Mikaitis, Pranesh, *Numerical behavior of NVIDIA tensor cores*, 2021): at most 17 errors of `2^-23`, two units
    /// each. A group is at most 8 such steps. Then come the fused multiply-adds with the scales, one for each group that
    /// a part has, the 16 parts, the bias and what [`Epilogue::Add`] adds to.
    ///
    /// In a group, sums are of `x (code - zero)`, and the scale is the group's own, so the errors are relative to
    /// `sum |x w|` as they are.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        let shortest_group = 32;
        let groups_of_a_part = (2 * spec.in_features.div_ceil(PARTS)).div_ceil(shortest_group) + 4;
        let bound = ErrorBound::float32(GROUP_ROUNDINGS + groups_of_a_part + PARTS + 2);
        output_bound::<T>(prologue_bound::<T>(bound, spec))
    }
}

/// Adds the errors of a normalised row. A square passes the roundings of its thread, the lanes and the warps, half of which
/// reach the root; then come a quotient, a sum, a root, a quotient and two products, and the rounding to the element type.
pub(super) fn prologue_bound<T: Element>(bound: ErrorBound, spec: &LinearSpec) -> ErrorBound {
    match spec.prologue {
        Prologue::Load => bound,
        Prologue::RmsNorm => {
            let roundings = 8 * spec.in_features.div_ceil(8 * 32 * NORM_WARPS) + 5 + NORM_WARPS + 6;
            let norm = ErrorBound::float32(roundings).with_output_error(T::UNIT, 0.0);
            let mut bound = bound.with_activation_error(norm.relative + norm.output);
            bound.absolute += T::SUBNORMAL;
            bound
        }
    }
}

impl<T: Element> Linear<CudaDevice<T>> for GemvLinear<T> {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    fn weight_bytes(&self) -> usize {
        [&self.units, &self.row_places, &self.bias, &self.norm].map(Resident::bytes).iter().sum()
    }

    fn read_first(&self) -> Option<Span<'_>> {
        let (address, bytes) = (self.units.address(), self.units.bytes());
        Some(Span { address, bytes, layer: PhantomData })
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
        let size = size_of::<T>();
        let x_vectors = x.address().is_multiple_of(16) && (x_stride * size).is_multiple_of(16);
        // The stride between rows that there are not is of no use and may be anything.
        let stride = |stride: usize| u32::try_from(stride).unwrap_or(0);
        let mut start = 0;
        while start < rows {
            // `prepare` has made at least one plan.
            let plans = if x_vectors || self.unaligned.is_empty() { &self.plans } else { &self.unaligned };
            let plan = &plans[(rows - start).min(plans.len()) - 1];
            let mut args = Args {
                units: self.units.address(),
                x: x.address() + (start * x_stride * size) as u64,
                y: y.address() + (start * y_stride * size) as u64,
                bias: self.bias.address(),
                places: match plan.layout {
                    Layout::Rows => self.row_places.address(),
                    Layout::Columns => self.column_places.address(),
                },
                norm: self.norm.address(),
                rows: plan.rows as u32,
                n: self.unit_rows as u32,
                k: self.spec.in_features as u32,
                x_stride: stride(x_stride),
                y_stride: stride(y_stride),
                k_units: self.k_units as u32,
                x_vectors: u32::from(x_vectors),
                padded: u32::from(self.padded),
                columns: self.spec.y_features() as u32,
                epilogue: match self.spec.epilogue {
                    Epilogue::Store => 0,
                    Epilogue::Add => 1,
                    Epilogue::SiluMul => 2,
                },
                slots: plan.slots,
                eps: self.eps,
            };
            // SAFETY: `Args` is `GemvArgs`. units, places, bias and norm are the layer's own memory, of the sizes that `Units`
            // gives them; `check_operands` has compared x and y, of these rows, with the layer; all of them outlive the
            // stream's work, because the caller may not free what a stream uses and `Resident` waits. Weights are read
            // before the kernel waits for earlier ones: no kernel ever writes them. The stream is that of y.
            unsafe { plan.function.launch(NAME, plan.shape, y.stream(), &mut args) }?;
            start += plan.rows;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_rows_of_8192_features_fit_a_block() {
        let bytes = |by_block, asym, slots| {
            let variant = Variant { slots, ..WHOLE };
            variant.shared_memory(Layout::Rows, by_block, unit_bytes(1, asym), 64, ROWS)
        };
        // What a block of Hopper may have.
        let most = 227 << 10;
        assert!(bytes(false, false, 2) <= most, "{}", bytes(false, false, 2));
        for (by_block, asym) in [(false, true), (true, false), (true, true)] {
            assert!(bytes(by_block, asym, 2) > most, "{by_block} {asym}: {}", bytes(by_block, asym, 2));
            assert!(bytes(by_block, asym, 1) <= most, "{by_block} {asym}: {}", bytes(by_block, asym, 1));
        }
    }
}
