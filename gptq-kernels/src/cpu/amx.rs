//! Matrix tiles: AMX with bfloat16 products and float32 sums, at the accuracy of float32.

mod decode;
mod tile;
mod weights;

use gptq_format::PackedLinear;
use rayon::prelude::*;

use super::{
    Cpu,
    columns::{Columns, Rows, for_each_range},
    float::{bias_of, each_block, most_segments, write},
    layout::{BLOCK, Line, Packed, SEGMENT, Segment, TILES},
    panel::PanelRow,
};
use crate::{
    DenseType, DenseWeight, ErrorBound, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef,
    Unsupported, WeightFormat, Workspace,
};
use tile::{Amx, PARTS, PairRow, STEP, Sums, TILE_ROWS, Tiles};
use weights::{Panel, Weights, panel};

const NAME: &str = "cpu-amx-bf16x3";

/// Rows that share one decoding of the weights.
const BLOCK_ROWS: usize = 128;
/// Blocks of outputs that share one reading of the activations into the first-level cache.
const GROUP: usize = 4;

/// Products of bfloat16 tiles, three for each activation.
///
/// An activation is cut into three bfloat16 parts of 8 significant bits each, whose sum it is exactly, all of one sign;
/// `code - zero` is exact in bfloat16. So every product is exact, and what rounds is the sum alone, as in a float32
/// kernel. One tile multiplication (`TDPBF16PS`) adds, for one output, 16 products each to two float32 sums that start
/// at 0, then the two to one another, then the result to the tile, each with one rounding. A segment of 128 features
/// takes four steps of three parts, so that a product passes through at most `16 + 1 + 12` roundings before the
/// scale, where a chain of float32 operations has 128. As in the float32 kernels, `y = scale * sum + y` ends a segment.
///
/// Tile multiplication takes subnormal numbers for zero. A part of an activation that is subnormal, and a partial
/// sum that is, are lost: less than `2^-126` each, for each of three parts, which `absolute` allows eightfold.
///
/// The arithmetic of a row is the same in every tile, so results do not depend on the number of rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct AmxKernel(Amx);

impl AmxKernel {
    pub(super) const NAME: &str = NAME;

    /// Errors: [`Unsupported::CpuFeature`].
    pub(super) fn new() -> Result<Self, Unsupported> {
        Amx::new().map(Self)
    }
}

impl LinearKernel<Cpu> for AmxKernel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        spec.only_multiplies()?;
        match spec.weight {
            WeightFormat::Gptq { .. } | WeightFormat::Dense(DenseType::Bf16) => Ok(()),
            WeightFormat::Dense(DenseType::F16 | DenseType::F32) => Err(Unsupported::WeightFormat),
        }
    }

    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        let bias = weight.bias().map(|bias| bias.iter().map(|b| b.to_f32()).collect());
        Ok(Box::new(AmxLinear::new(self.0, LinearSpec::of(weight), Packed::new(weight)?, bias)))
    }

    fn prepare_dense(&self, weight: &DenseWeight<'_>) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        weight.validate()?;
        let spec = LinearSpec::of_dense(weight);
        self.supports(&spec).map_err(|reason| KernelError::Unsupported { kernel: NAME, reason })?;
        let bias = weight.bias.map(<[f32]>::to_vec);
        Ok(Box::new(AmxLinear::new(self.0, spec, Packed::dense(weight)?, bias)))
    }

    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        let products = STEP / 2 + 1 + PARTS * (SEGMENT / STEP);
        let bound = ErrorBound::float32(products + most_segments(spec));
        ErrorBound { absolute: 8.0 * bound.absolute, ..bound }
    }
}

struct AmxLinear {
    amx: Amx,
    spec: LinearSpec,
    packed: Packed,
    /// Steps of all segments.
    steps: usize,
    bias: Option<Vec<f32>>,
}

/// Activations of a call, cut into parts: for each tile of rows, step and part, one line a row.
#[derive(Clone, Copy)]
struct Activations<'a> {
    lines: &'a [[u32; 16]],
    rows: usize,
    /// Lines of a tile of rows.
    tile_lines: usize,
}

fn steps(segment: &Segment) -> usize {
    segment.len.div_ceil(STEP)
}

impl AmxLinear {
    fn new(amx: Amx, spec: LinearSpec, packed: Packed, bias: Option<Vec<f32>>) -> Self {
        let steps = packed.segments.iter().map(steps).sum();
        Self { amx, spec, packed, steps, bias }
    }

    /// Rows of a tile in a call of `rows` rows.
    fn tile_rows(rows: usize) -> usize {
        rows.min(TILE_ROWS)
    }

    /// Cuts all activations into parts.
    fn split<'a>(&self, x: Rows<'_>, lines: &'a mut [[u32; 16]]) -> Activations<'a> {
        let tile_rows = Self::tile_rows(x.rows());
        let tile_lines = self.steps * PARTS * tile_rows;
        let lines = &mut lines[..x.rows().div_ceil(TILE_ROWS) * tile_lines];
        let tile = |(tile, lines): (usize, &mut [[u32; 16]])| {
            for row in 0..tile_rows {
                self.split_row(x, tile * TILE_ROWS + row, row, tile_rows, lines);
            }
        };
        if x.rows() <= TILE_ROWS {
            lines.chunks_exact_mut(tile_lines).enumerate().for_each(tile);
        } else {
            lines.par_chunks_exact_mut(tile_lines).enumerate().for_each(tile);
        }
        Activations { lines, rows: x.rows(), tile_lines }
    }

    /// Cuts row `from` of `x`, or zeros if there is no such row, into row `row` of a tile of `tile_rows` rows.
    fn split_row(&self, x: Rows<'_>, from: usize, row: usize, tile_rows: usize, lines: &mut [[u32; 16]]) {
        let x = if from < x.rows() { Some(x.row(from)) } else { None };
        let order = self.packed.order.as_deref();
        let mut steps = lines.chunks_exact_mut(PARTS * tile_rows);
        for segment in &self.packed.segments {
            for start in (0..segment.len).step_by(STEP) {
                let at = segment.start + start..segment.start + (start + STEP).min(segment.len);
                let mut features = [0.0; STEP];
                match (x, order) {
                    (None, _) => {}
                    (Some(x), None) => features[..at.len()].copy_from_slice(&x[at]),
                    (Some(x), Some(order)) => {
                        for (feature, &i) in features.iter_mut().zip(&order[at]) {
                            *feature = x[i as usize];
                        }
                    }
                }
                let Some(step) = steps.next() else { return };
                let (first, rest) = step.split_at_mut(tile_rows);
                let (second, third) = rest.split_at_mut(tile_rows);
                decode::split(self.amx, &features, [&mut first[row], &mut second[row], &mut third[row]]);
            }
        }
    }

    /// One block of outputs for at most 16 rows. Decoding and multiplication alternate step by step, so that vector and
    /// tile unit work at the same time.
    fn few_rows(
        &self,
        block: usize,
        x: Activations<'_>,
        y: &mut Columns<'_>,
        scratch: &mut Few,
        tiles: &Tiles,
    ) {
        let sums = &mut scratch.sums[..x.rows];
        sums.fill(bias_of(self.bias.as_deref(), block));
        let mut rest = self.packed.block(block);
        let mut lines = x.lines.chunks_exact(PARTS * x.rows);
        for segment in &self.packed.segments {
            let mut weights = self.weights(segment, &mut rest);
            tiles.clear();
            weights.decode(1, &mut scratch.panel);
            for (step, a) in lines.by_ref().take(steps(segment)).enumerate() {
                weights.decode(step + 2, &mut scratch.panel);
                tiles.step(a, &weights.get(&scratch.panel)[step * TILE_ROWS..], &[]);
            }
            tiles.store(&mut scratch.products);
            let scales = weights.scales();
            for (t, products) in scratch.products.iter().enumerate() {
                decode::accumulate(self.amx, &scales[t], products, t, sums);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            write(y.row(row), sums);
        }
    }

    /// Up to [`GROUP`] blocks of outputs, from `first` on, for more rows. The weights of a segment of one block, once
    /// decoded, stay in the first-level cache while the activations of the segment pass by; those stay in the second-level
    /// cache for the other blocks.
    fn many_rows(
        &self,
        first: usize,
        x: Activations<'_>,
        y: &mut Columns<'_>,
        scratch: &mut Many,
        tiles: &Tiles,
    ) {
        let blocks = y.cols().div_ceil(BLOCK);
        for start in (0..x.rows).step_by(BLOCK_ROWS) {
            let rows = BLOCK_ROWS.min(x.rows - start);
            let mut rest: [&[Line]; GROUP] = [&[]; GROUP];
            for (i, rest) in rest[..blocks].iter_mut().enumerate() {
                *rest = self.packed.block(first + i);
                scratch.sums[i][..rows].fill(bias_of(self.bias.as_deref(), first + i));
            }
            let mut step = 0;
            for segment in &self.packed.segments {
                let steps = steps(segment);
                let a = |tile: usize| x.tile(start / TILE_ROWS + tile, step, steps);
                for (rest, sums) in rest[..blocks].iter_mut().zip(&mut scratch.sums) {
                    let mut weights = self.weights(segment, rest);
                    weights.decode(steps, &mut scratch.panel);
                    let (b, scales) = (weights.get(&scratch.panel), weights.scales());
                    for (tile, sums) in sums[..rows].chunks_mut(TILE_ROWS).enumerate() {
                        self.tile(tiles, a(tile), b, a(tile + 1), &mut scratch.products);
                        for (t, products) in scratch.products.iter().enumerate() {
                            decode::accumulate(self.amx, &scales[t], products, t, sums);
                        }
                    }
                }
                step += steps;
            }
            for row in 0..rows {
                let y = y.row(start + row).chunks_mut(BLOCK);
                y.zip(&scratch.sums).for_each(|(y, sums)| write(y, &sums[row]));
            }
        }
    }

    /// One segment of one block for 16 rows, with activations `a`; `next` are those of the next 16 rows.
    fn tile(
        &self,
        tiles: &Tiles,
        a: &[[u32; 16]],
        b: &[PairRow],
        next: &[[u32; 16]],
        products: &mut [Sums; 4],
    ) {
        const LINES: usize = PARTS * TILE_ROWS;
        tiles.clear();
        let mut following = a.chunks_exact(LINES).skip(1).chain(next.chunks_exact(LINES));
        for (a, b) in a.chunks_exact(LINES).zip(b.chunks_exact(TILE_ROWS)) {
            tiles.step(a, b, following.next().unwrap_or_default());
        }
        tiles.store(products);
    }

    /// The weights of a segment, taken from the front of `lines`.
    fn weights<'a>(&self, segment: &Segment, lines: &mut &'a [Line]) -> Weights<'a> {
        let encoding = self.packed.encoding;
        let (head, tail) = lines.split_at(encoding.header());
        let (words, tail) = tail.split_at(segment.len.div_ceil(encoding.per_word()) * TILES);
        *lines = tail;
        Weights::new(self.amx, encoding, head, words.as_chunks().0)
    }
}

impl<'a> Activations<'a> {
    /// `steps` steps of row tile `tile` of 16 rows, from step `step` on; nothing if there is no such tile.
    fn tile(&self, tile: usize, step: usize, steps: usize) -> &'a [[u32; 16]] {
        let lines = PARTS * TILE_ROWS;
        let tile = self.lines.get(tile * self.tile_lines..(tile + 1) * self.tile_lines);
        tile.map_or(&[], |tile| &tile[step * lines..(step + steps) * lines])
    }
}

const PRODUCTS: [Sums; 4] = [[[0.0; 16]; TILE_ROWS]; 4];

/// What a task with few rows needs, on its stack.
struct Few {
    panel: Panel,
    products: [Sums; 4],
    sums: [PanelRow; TILE_ROWS],
}

/// What a task with many rows needs, on its stack: 152 KiB.
struct Many {
    panel: Panel,
    products: [Sums; 4],
    sums: [[PanelRow; BLOCK_ROWS]; GROUP],
}

impl Linear<Cpu> for AmxLinear {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    fn weight_bytes(&self) -> usize {
        self.packed.bytes()
    }

    fn workspace_len(&self, rows: usize) -> usize {
        // One line more than needed, to start at a multiple of 64 bytes.
        let lines = rows.div_ceil(TILE_ROWS) * self.steps * PARTS * Self::tile_rows(rows);
        if rows == 0 { 0 } else { (lines + 1) * 16 }
    }

    fn forward(
        &self,
        x: MatRef<'_, Cpu>,
        y: MatMut<'_, Cpu>,
        workspace: &mut Workspace<Cpu>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
        let scratch = workspace.take(self.workspace_len(x.rows()))?;
        if x.rows() == 0 {
            return Ok(());
        }
        let skip = scratch.as_ptr().align_offset(64).min(15);
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut scratch[skip..]);
        let x = self.split(Rows::new(x), words.as_chunks_mut::<16>().0);
        if x.rows <= TILE_ROWS {
            for_each_range(Columns::new(y), BLOCK, 1, &|first, columns| {
                let mut scratch =
                    Few { panel: panel(), products: PRODUCTS, sums: [[[0.0; 16]; TILES]; TILE_ROWS] };
                let tiles = self.amx.configure(x.rows);
                each_block(first, columns, BLOCK, |block, mut columns| {
                    self.few_rows(block, x, &mut columns, &mut scratch, &tiles);
                });
            });
        } else {
            for_each_range(Columns::new(y), BLOCK, 1, &|first, columns| {
                let mut scratch = Many {
                    panel: panel(),
                    products: PRODUCTS,
                    sums: [[[[0.0; 16]; TILES]; BLOCK_ROWS]; GROUP],
                };
                let tiles = self.amx.configure(TILE_ROWS);
                each_block(first, columns, GROUP * BLOCK, |block, mut columns| {
                    self.many_rows(block, x, &mut columns, &mut scratch, &tiles);
                });
            });
        }
        Ok(())
    }
}
