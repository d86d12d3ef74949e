//! The blocks of `wgmma_many.cuh`, which all compute the same bits.

use half::f16;

use super::plan::Extent;
use crate::cuda::{
    driver::Launch,
    units::{DEPTH, STRIPE},
};

/// Stages of a ring, at most.
const MOST_STAGES: usize = 4;

/// Entry, rows of x that a block does at a time, warpgroups.
const SHAPES: [(&str, usize, usize); 3] =
    [("wgmma_many_256_2", 256, 2), ("wgmma_many_128_3", 128, 3), ("wgmma_many_128_2", 128, 2)];

/// The kernels of all shapes, in the order of [`Call::shape`].
pub(super) fn entries() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|&(entry, ..)| entry)
}

/// The end of a tile takes as long as so many units.
const TILE_END: usize = 4;
/// Bytes of an arrival.
const ARRIVAL: usize = size_of::<u64>();

/// One of the shapes.
struct Blocks {
    tokens: usize,
    stages: usize,
    features: usize,
    threads: usize,
    shared: usize,
    /// Whether two blocks may share a tile.
    shares: bool,
}

/// How a call is done.
pub(super) struct Call {
    pub(super) shape: usize,
    pub(super) tokens: usize,
    pub(super) stages: usize,
    pub(super) launch: Launch,
    /// Tiles of each block before those that blocks share, if they do.
    pub(super) whole: Option<usize>,
}

/// Bytes of a stage, laid out as `wgmma_many` in `wgmma_many.cuh` does: x, then units.
fn stage(tokens: usize, warpgroups: usize, unit: usize) -> usize {
    tokens * DEPTH * 2 + (warpgroups * 64 / STRIPE * unit).next_multiple_of(1024)
}

/// Stages that fit in `shared` bytes.
fn stages(tokens: usize, warpgroups: usize, unit: usize, shared: usize) -> usize {
    (shared.saturating_sub(128) / stage(tokens, warpgroups, unit)).min(MOST_STAGES)
}

/// A power of two that keeps scales, times codes, away from the ends of fp16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Factor {
    /// Of scales, twice in fp16.
    pub(super) scale: u32,
    /// Of sums: the reciprocal.
    pub(super) sum: f32,
}

impl Factor {
    /// `None` if no factor keeps every weight, which is a scale times -16 to 15, a normal number or zero.
    pub(super) fn of(scales: &[f16]) -> Option<Self> {
        let sizes = || scales.iter().map(|scale| scale.to_f32().abs()).filter(|&size| size > 0.0);
        let (least, most) = sizes().fold((f32::INFINITY, 0.0_f32), |(a, b), size| (a.min(size), b.max(size)));
        // Powers of two that are normal numbers of fp16, the largest one that overflows nothing.
        let factors = (-14..=15).rev().map(|exponent| 2.0_f32.powi(exponent));
        let factor = factors.into_iter().find(|factor| most * factor * 16.0 <= f16::MAX.to_f32())?;
        let normal = least * factor >= f16::MIN_POSITIVE.to_f32();
        normal
            .then(|| Self { scale: u32::from(f16::from_f32(factor).to_bits()) * 0x1_0001, sum: 1.0 / factor })
    }
}

/// The blocks for many rows.
pub(super) struct Many {
    shapes: Vec<Blocks>,
    pub(super) factor: Factor,
    multiprocessors: usize,
    extent: Extent,
}

impl Many {
    /// For a GPU with so many multiprocessors and bytes of shared memory.
    pub(super) fn new(extent: Extent, factor: Factor, multiprocessors: usize, shared: usize) -> Self {
        let shapes = SHAPES.map(|(_, tokens, warpgroups)| {
            let stages = stages(tokens, warpgroups, extent.unit, shared);
            Blocks {
                tokens,
                stages,
                features: warpgroups * 64,
                threads: (warpgroups + 1) * 128,
                shared: stages * stage(tokens, warpgroups, extent.unit) + 128,
                shares: tokens == 256,
            }
        });
        Self { shapes: shapes.into(), factor, multiprocessors, extent }
    }

    fn tiles(&self, blocks: &Blocks, rows: usize) -> usize {
        self.extent.unit_rows.div_ceil(blocks.features) * rows.div_ceil(blocks.tokens)
    }

    /// Products of the busiest multiprocessor, per input feature of a unit; and the tiles of each block before those that
    /// blocks share, if that is faster.
    fn cost_of(&self, blocks: &Blocks, rows: usize) -> (usize, Option<usize>) {
        let (tiles, k_units) = (self.tiles(blocks, rows), self.extent.k_units);
        let rounds = tiles.div_ceil(self.multiprocessors);
        let cost = |units| units * blocks.features * blocks.tokens;
        let alone = cost(rounds * (k_units + TILE_END));
        if !blocks.shares || tiles <= self.multiprocessors {
            return (alone, None);
        }
        // Shared are so many that each block has the units of one tile or more, so that no tile is shared by three.
        let units = (tiles * k_units).div_ceil(self.multiprocessors);
        // Measured on the H200: sums that go from block to block, and blocks that are not in step any more, so that each
        // reads x for itself, cost a fifth of a tile; and what gains less than 2 % gains nothing.
        let shared = cost(units + rounds * TILE_END + k_units / 5);
        if shared + shared / 50 < alone {
            (shared, Some(tiles / self.multiprocessors - 1))
        } else {
            (alone, None)
        }
    }

    /// The fastest blocks for these rows.
    fn blocks(&self, rows: usize) -> usize {
        // There is a shape.
        (0..self.shapes.len()).min_by_key(|&shape| self.cost_of(&self.shapes[shape], rows).0).unwrap_or(0)
    }

    /// What [`Tokens::cost`](super::plan::Tokens::cost) is compared with.
    pub(super) fn cost(&self, rows: usize) -> usize {
        self.cost_of(&self.shapes[self.blocks(rows)], rows).0
    }

    /// What is done for these rows.
    pub(super) fn call(&self, rows: usize) -> Call {
        let shape = self.blocks(rows);
        let blocks = &self.shapes[shape];
        let launch = Launch {
            grid: (self.tiles(blocks, rows).min(self.multiprocessors) as u32, 1),
            threads: blocks.threads as u32,
            shared: blocks.shared,
            cluster: 1,
            programmatic: true,
        };
        let whole = self.cost_of(blocks, rows).1;
        Call { shape, tokens: blocks.tokens, stages: blocks.stages, launch, whole }
    }

    /// Bytes of sums that blocks hand over, a multiple of 16, of calls with so many rows or fewer.
    pub(super) fn sums(&self, rows: usize) -> usize {
        let of = |blocks: &Blocks| match blocks.shares && self.tiles(blocks, rows) > self.multiprocessors {
            true => self.multiprocessors * blocks.features * blocks.tokens * size_of::<f32>(),
            false => 0,
        };
        self.shapes.iter().map(of).max().unwrap_or(0)
    }

    /// Bytes behind them, a multiple of 16 too, for the arrivals.
    pub(super) fn arrivals(&self, rows: usize) -> usize {
        if self.sums(rows) == 0 { 0 } else { (self.multiprocessors * ARRIVAL).next_multiple_of(16) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::units::unit_bytes;

    fn many(k: usize, n: usize) -> Many {
        let extent = Extent { unit: unit_bytes(1, false), unit_rows: n, k_units: k.div_ceil(DEPTH) };
        Many::new(extent, Factor { scale: 0, sum: 1.0 }, 132, 227 << 10)
    }

    #[test]
    fn shared_tiles_have_two_blocks_at_most() {
        let mut shared = 0;
        for (k, n) in [(4096, 4096), (4096, 11008), (11008, 4096), (5120, 5120), (8192, 28672), (96, 50000)] {
            let many = many(k, n);
            for rows in (1..40).map(|tiles| tiles * 256 - 7) {
                let call = many.call(rows);
                let Some(whole) = call.whole else { continue };
                let blocks = &many.shapes[call.shape];
                let (tiles, k_units, grid) = (many.tiles(blocks, rows), k.div_ceil(DEPTH), 132);
                assert_eq!(call.launch.grid, (grid as u32, 1));
                // As `Pieces` in `wgmma_many.cuh` divides them.
                let units = (tiles - whole * grid) * k_units;
                assert!(units >= grid * k_units && units < 2 * grid * k_units, "{k} x {n}, {rows}");
                assert!(u32::try_from(units * grid).is_ok());
                assert!(many.sums(rows) > 0 && many.sums(rows + 1000) == many.sums(rows));
                shared += 1;
            }
        }
        assert!(shared > 50, "{shared}");
        assert_eq!(many(4096, 11008).call(1024).whole, Some(1));
        assert_eq!(many(4096, 4096).call(2048).whole, None);
    }

    #[test]
    fn every_shape_has_three_stages_on_a_hopper() {
        for (entry, tokens, warpgroups) in SHAPES {
            for (groups, asym) in [(1, false), (2, true), (4, true)] {
                let stages = stages(tokens, warpgroups, unit_bytes(groups, asym), 227 << 10);
                assert!(stages >= 3, "{entry} with {groups} groups: {stages}");
            }
        }
    }

    #[test]
    fn a_factor_keeps_weights_normal() {
        let halves = |scales: &[f32]| scales.iter().map(|&scale| f16::from_f32(scale)).collect::<Vec<_>>();
        let factor = |scales: &[f32]| Factor::of(&halves(scales)).map(|factor| 1.0 / factor.sum);
        assert_eq!(factor(&[0.01, -0.002, 0.0]), Some(2.0_f32.powi(15)));
        assert_eq!(factor(&[0.5]), Some(2.0_f32.powi(12)));
        assert_eq!(factor(&[65504.0]), Some(2.0_f32.powi(-4)));
        assert_eq!(factor(&[0.0]), Some(2.0_f32.powi(15)));
        // The smallest number of fp16, alone and beside a large one.
        assert_eq!(factor(&[6e-8]), Some(2.0_f32.powi(15)));
        assert_eq!(factor(&[6e-8, 1.0]), Some(2.0_f32.powi(11)));
        assert_eq!(factor(&[6e-8, 8.0]), None);
        for scale in [6e-8, 1e-3, 0.7, 65504.0] {
            let factor = Factor::of(&halves(&[scale])).unwrap();
            let half = f16::from_bits((factor.scale & 0xFFFF) as u16).to_f32();
            assert_eq!((half * factor.sum, factor.scale >> 16), (1.0, factor.scale & 0xFFFF));
            let scale = f16::from_f32(scale).to_f32() * half;
            assert!(f16::from_f32(scale * 16.0).is_finite() && f16::from_f32(scale).is_normal());
        }
    }
}
