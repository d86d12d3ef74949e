//! The blocks of `wgmma_many.cuh`, which all compute the same bits.

use gptq_format::PackedLinear;
use half::f16;

use crate::{
    KernelError,
    cuda::{
        CudaDevice, Element,
        driver::{Function, Launch},
        units::{DEPTH, STRIPE, Units, unit_bytes},
    },
};

/// Stages of a ring, at most.
const MOST_STAGES: usize = 4;

/// Entry, rows of x that a block does at a time, warpgroups.
const SHAPES: [(&str, usize, usize); 3] =
    [("wgmma_many_256_2", 256, 2), ("wgmma_many_128_3", 128, 3), ("wgmma_many_128_2", 128, 2)];

/// One of the shapes, ready to be launched.
pub(super) struct Blocks {
    pub(super) function: Function,
    pub(super) tokens: usize,
    pub(super) stages: usize,
    features: usize,
    threads: usize,
    shared: usize,
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
    fn of(scales: &[f16]) -> Option<Self> {
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
    unit_rows: usize,
    k_units: usize,
}

impl Many {
    /// `None` if the scales of the layer do not allow it.
    pub(super) fn new<T: Element>(
        device: &CudaDevice<T>,
        image: &str,
        units: &Units,
        weight: &PackedLinear,
    ) -> Result<Option<Self>, KernelError> {
        // bfloat16 reaches as far as float32.
        let factor = match T::NAME {
            "bf16" => Factor { scale: 0, sum: 1.0 },
            _ => match Factor::of(weight.scales()) {
                Some(factor) => factor,
                None => return Ok(None),
            },
        };
        let unit = unit_bytes(units.groups, units.asym);
        let mut shapes = Vec::with_capacity(SHAPES.len());
        for (entry, tokens, warpgroups) in SHAPES {
            let stages = stages(tokens, warpgroups, unit, device.shared_memory());
            shapes.push(Blocks {
                function: device.images().function(image, entry, device.shared_memory())?,
                tokens,
                stages,
                features: warpgroups * 64,
                threads: (warpgroups + 1) * 128,
                shared: stages * stage(tokens, warpgroups, unit) + 128,
            });
        }
        Ok(Some(Self {
            shapes,
            factor,
            multiprocessors: device.multiprocessors() as usize,
            unit_rows: units.rows,
            k_units: units.k_units,
        }))
    }

    fn tiles(&self, blocks: &Blocks, rows: usize) -> usize {
        self.unit_rows.div_ceil(blocks.features) * rows.div_ceil(blocks.tokens)
    }

    /// Products of the busiest multiprocessor, per input feature of a unit, as if the end of a tile took those of four units.
    fn cost_of(&self, blocks: &Blocks, rows: usize) -> usize {
        let rounds = self.tiles(blocks, rows).div_ceil(self.multiprocessors);
        rounds * blocks.features * blocks.tokens * (self.k_units + 4)
    }

    /// The fastest blocks for these rows.
    fn blocks(&self, rows: usize) -> &Blocks {
        let (first, rest) = (&self.shapes[0], &self.shapes[1..]);
        rest.iter().fold(first, |best, blocks| {
            if self.cost_of(blocks, rows) < self.cost_of(best, rows) { blocks } else { best }
        })
    }

    /// What [`Tokens::cost`](super::plan::Tokens::cost) is compared with.
    pub(super) fn cost(&self, rows: usize) -> usize {
        self.cost_of(self.blocks(rows), rows)
    }

    /// The launch for these rows.
    pub(super) fn launch(&self, rows: usize) -> (&Blocks, Launch) {
        let blocks = self.blocks(rows);
        let launch = Launch {
            grid: (self.tiles(blocks, rows).min(self.multiprocessors) as u32, 1),
            threads: blocks.threads as u32,
            shared: blocks.shared,
            cluster: 1,
            programmatic: true,
        };
        (blocks, launch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
