use std::ops::RangeInclusive;

use super::{
    CudaDevice, Element,
    driver::Function,
    marlin_tiles::{DEPTH, FEATURES},
};
use crate::KernelError;

/// The variants of the kernel: features of a tile, rows of a tile, warps, how many of them share a unit's input features,
/// and the most rows of a call that takes it.
const VARIANTS: [(usize, usize, usize, usize, usize); 5] = [
    (256, 8, 16, 2, 8),
    (256, 16, 16, 2, 16),
    (256, 32, 16, 2, 32),
    (128, 64, 8, 2, 64),
    (256, 64, 8, 1, usize::MAX),
];
/// Units for each block of the GPU, two to a tile, from which on wider tiles are as fast for few rows of them: the parts of a
/// tile that have to be added are then few beside the units.
const MANY_UNITS: usize = 8;
/// Units in the ring of a block, if there is so much shared memory. Fewer or more make no difference on an H200.
const STAGES: usize = 4;
/// A counter of arrivals has room for 255.
pub(super) const MOST_PARTS_OF_A_TILE: usize = 64;

/// A kernel for tiles of some size, and how it is launched.
pub(super) struct Variant {
    pub(super) function: Function,
    pub(super) threads: u32,
    /// Features and rows of a tile.
    features: usize,
    pub(super) rows: usize,
    /// Warps that share a unit's input features.
    warps_k: usize,
    /// The most rows of a call that takes it.
    most: usize,
    /// Tiles along the features.
    pub(super) tiles: usize,
    pub(super) stages: usize,
    pub(super) shared: usize,
    /// Blocks that the GPU can have at once.
    resident: usize,
}

impl Variant {
    /// Whether it gathers the columns of x by itself, a unit ahead. For more rows that takes longer than to write x down in
    /// order first.
    pub(super) fn gathers(&self) -> bool {
        self.rows <= 8 && self.stages >= 3
    }

    /// Bytes of the counters of arrivals.
    pub(super) fn arrivals(&self, token_blocks: usize) -> usize {
        (token_blocks * self.tiles * 8).next_multiple_of(256)
    }
}

/// Which variant does a call, and how its work is shared out.
pub(super) struct Plan {
    variants: Vec<Variant>,
    k_units: usize,
}

/// How the rows and units of a call are shared out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Division {
    pub(super) token_blocks: usize,
    /// Blocks for the rows of a token block.
    pub(super) parts: usize,
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

impl Plan {
    /// The variants of `image` for a weight of `unit_rows` x `k_units` units of `unit` bytes; `None` if the GPU can run none,
    /// because it has too little shared memory.
    pub(super) fn new<T: Element>(
        device: &CudaDevice<T>,
        image: &str,
        unit: usize,
        (unit_rows, k_units): (usize, usize),
    ) -> Result<Option<Self>, KernelError> {
        let most_shared = device.shared_memory();
        let mut variants = Vec::new();
        for (features, rows, warps, warps_k, most) in VARIANTS {
            let entry = format!("marlin_{features}x{rows}");
            let function = device.images().function(image, &entry, most_shared)?;
            // The ring, a corner for each warp, a flag.
            let stage = features / FEATURES * unit + rows * DEPTH * 2;
            let shared = |stages| stages * stage + warps * 8 * 144 + 16;
            let fits = |&stages: &usize| shared(stages) <= most_shared;
            let Some(stages) = (2..=STAGES).rev().find(fits) else { continue };
            let threads = 32 * warps as u32;
            let blocks = function.resident_blocks(threads, shared(stages))?;
            if blocks > 0 {
                let resident = blocks * device.multiprocessors() as usize;
                let tiles = unit_rows.div_ceil(features / FEATURES);
                let shared = shared(stages);
                variants.push(Variant {
                    function,
                    threads,
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
        // The widest tiles take the place of those with as many rows, if there are many.
        if let [.., narrow, wide] = &variants[..]
            && narrow.rows == wide.rows
            && wide.tiles * k_units >= MANY_UNITS * wide.resident
        {
            variants.remove(variants.len() - 2);
        }
        if let Some(last) = variants.last_mut() {
            last.most = usize::MAX;
        }
        Ok((!variants.is_empty()).then_some(Self { variants, k_units }))
    }

    /// The variant for a call.
    pub(super) fn variant(&self, rows: usize) -> &Variant {
        // `new` has made at least one variant.
        self.variants.iter().find(|v| rows <= v.most).unwrap_or(&self.variants[self.variants.len() - 1])
    }

    /// How a call is shared out.
    pub(super) fn division(&self, rows: usize) -> Division {
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

    /// [`Linear::row_class`](crate::Linear::row_class).
    pub(super) fn row_class(&self, rows: usize) -> RangeInclusive<usize> {
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

    /// Bytes of counters and sums that `rows` rows need.
    pub(super) fn scratch(&self, rows: usize) -> usize {
        // The most that so many rows or fewer need.
        let sums = self.variants.iter().filter(|variant| {
            let smaller = self.variants.iter().map(|v| v.most).filter(|&most| most < variant.most).max();
            smaller.is_none_or(|smaller| smaller < rows)
        });
        let bytes = sums.map(|variant| {
            let blocks = rows.min(variant.most).div_ceil(variant.rows);
            // Of all token blocks together.
            let places = (2 * variant.resident).min(variant.resident + blocks * variant.tiles);
            variant.arrivals(blocks) + places * variant.features * variant.rows * size_of::<f32>()
        });
        bytes.max().unwrap_or(0)
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
}
