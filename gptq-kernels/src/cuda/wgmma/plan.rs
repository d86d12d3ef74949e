//! Which blocks do how many rows, and how many slices of the input features are summed.

use crate::{
    KernelError,
    cuda::{
        CudaDevice, Element,
        driver::{Function, Launch},
        units::{DEPTH, STRIPE, Units, unit_bytes},
    },
};

/// Of a layer's units: bytes of one, output features with padding, units along the input features.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) unit: usize,
    pub(super) unit_rows: usize,
    pub(super) k_units: usize,
}

impl Extent {
    pub(super) fn of(units: &Units) -> Self {
        let unit = unit_bytes(units.groups, units.asym);
        Self { unit, unit_rows: units.rows, k_units: units.k_units }
    }
}

/// Blocks of a cluster, at most: what every GPU with clusters can place.
pub(super) const MOST_SLICES: usize = 8;

/// One shape of blocks of `wgmma_sm90.cu`.
#[derive(Debug)]
struct Shape {
    entry: &'static str,
    /// Rows of x that a block does at a time.
    tokens: usize,
    warpgroups: usize,
    /// Times 64 output features of a warpgroup.
    halves: usize,
    threads: u32,
    /// Stages of the ring, fewer where they do not fit.
    stages: usize,
    /// Slices of the input features, at most.
    most_slices: usize,
    /// Units that a slice must have where there are more blocks than multiprocessors.
    least_units: usize,
    /// Whether the sums of slices take the place of the ring.
    reuse: bool,
}

const fn shape(
    entry: &'static str,
    tokens: usize,
    (warpgroups, halves): (usize, usize),
    threads: u32,
    stages: usize,
    most_slices: usize,
    least_units: usize,
) -> Shape {
    Shape {
        entry,
        tokens,
        warpgroups,
        halves,
        threads,
        stages,
        most_slices,
        least_units,
        reuse: tokens == 128,
    }
}

/// Narrow and wide blocks for every number of tokens. Measured on the H200: wide ones pay where narrow ones would fill it
/// by far.
const SHAPES: [[Shape; 2]; 4] = [
    [shape("wgmma_16_2x1", 16, (2, 1), 288, 4, 8, 4), shape("wgmma_16_2x2", 16, (2, 2), 288, 4, 4, 2)],
    [shape("wgmma_32_2x1", 32, (2, 1), 288, 4, 6, 2), shape("wgmma_32_2x1", 32, (2, 1), 288, 4, 6, 2)],
    [shape("wgmma_64_3x1", 64, (3, 1), 416, 4, 5, 2), shape("wgmma_64_2x2", 64, (2, 2), 384, 4, 8, 2)],
    [shape("wgmma_128_2x1", 128, (2, 1), 384, 4, 3, 2), shape("wgmma_128_2x1", 128, (2, 1), 384, 4, 3, 2)],
];
/// The narrow blocks for 16 tokens of layers with many input features: a third block a multiprocessor is then worth less than
/// a deeper ring, for which a block must have something to do.
const DEEP: Shape = shape("wgmma_16_2x1", 16, (2, 1), 288, 6, 7, 12);
/// Units along the input features from which on.
const MANY_UNITS: usize = 48;

/// The kernels of all shapes.
pub(super) fn entries() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().flat_map(|[narrow, wide]| {
        [Some(narrow.entry), (wide.entry != narrow.entry).then_some(wide.entry)].into_iter().flatten()
    })
}

/// The largest numbers of rows that are done with fewer than 128 tokens at a time.
pub(super) const FEW_ROWS: [usize; 3] = [16, 32, 64];

impl Shape {
    fn features(&self) -> usize {
        self.warpgroups * self.halves * 64
    }

    /// Bytes of a stage: x, then units.
    fn stage(&self, unit: usize) -> usize {
        self.tokens * DEPTH * 2 + (self.features() / STRIPE * unit).next_multiple_of(1024)
    }

    /// Bytes of shared memory, laid out as `wgmma_linear` in `wgmma_sm90.cu` does.
    fn shared_memory(&self, unit: usize, stages: usize) -> usize {
        let ring = stages * self.stage(unit) + 128;
        let sums = self.features() * self.tokens * 4 + (MOST_SLICES - 1) * 512;
        if self.reuse { ring.max(sums) } else { ring + sums }
    }
}

/// A shape that is ready to be launched.
pub(super) struct Blocks {
    pub(super) function: Function,
    pub(super) stages: usize,
    features: usize,
    threads: u32,
    shared: usize,
    most_slices: usize,
    least_units: usize,
    multiprocessors: usize,
    /// Clusters of 1, 2, ... blocks that the GPU can run at once.
    clusters: Vec<usize>,
}

impl Blocks {
    fn new<T: Element>(
        device: &CudaDevice<T>,
        image: &str,
        unit: usize,
        shape: &Shape,
    ) -> Result<Self, KernelError> {
        let function = device.images().function(image, shape.entry, device.shared_memory())?;
        let fits = |&stages: &usize| shape.shared_memory(unit, stages) <= device.shared_memory();
        let stages = (2..=shape.stages).rev().find(fits).unwrap_or(2);
        let mut blocks = Self {
            function,
            stages,
            features: shape.features(),
            threads: shape.threads,
            shared: shape.shared_memory(unit, stages),
            most_slices: shape.most_slices,
            least_units: shape.least_units,
            multiprocessors: device.multiprocessors() as usize,
            clusters: Vec::with_capacity(MOST_SLICES),
        };
        for slices in 1..=MOST_SLICES {
            let clusters = blocks.function.resident_clusters(blocks.launch(slices, slices))?;
            blocks.clusters.push(clusters);
        }
        Ok(blocks)
    }

    fn launch(&self, blocks: usize, slices: usize) -> Launch {
        Launch {
            grid: (blocks as u32, 1),
            threads: self.threads,
            shared: self.shared,
            cluster: slices as u32,
            programmatic: true,
        }
    }

    fn tiles(&self, rows: usize, token_tiles: usize) -> usize {
        rows.div_ceil(self.features) * token_tiles
    }

    /// Clusters that run at once.
    fn resident(&self, slices: usize) -> usize {
        self.clusters[slices - 1].max(1)
    }

    /// The most slices for which all clusters run at once, each with two units or more; 1 if there are more tiles than blocks.
    fn slices(&self, tiles: usize, k_units: usize) -> usize {
        let fits = |&slices: &usize| {
            let alone = tiles * slices <= self.multiprocessors;
            let least = if alone { 2 } else { self.least_units };
            tiles <= self.clusters[slices - 1] && k_units >= least * slices
        };
        (1..=self.most_slices).rev().find(fits).unwrap_or(1)
    }

    /// Output features that the busiest multiprocessor does for one token tile.
    fn load(&self, tiles: usize) -> usize {
        tiles.div_ceil(self.resident(1)) * self.features
    }
}

/// The blocks for one number of tokens at a time.
pub(super) struct Tokens {
    pub(super) tokens: usize,
    narrow: Blocks,
    wide: Blocks,
    unit_rows: usize,
    k_units: usize,
}

impl Tokens {
    /// Those for 16, 32, 64 and 128 tokens.
    pub(super) fn all<T: Element>(
        device: &CudaDevice<T>,
        image: &str,
        extent: Extent,
    ) -> Result<Vec<Self>, KernelError> {
        let Extent { unit, unit_rows, k_units } = extent;
        let mut all = Vec::with_capacity(SHAPES.len());
        for [narrow, wide] in &SHAPES {
            let deep = narrow.tokens == DEEP.tokens && k_units >= MANY_UNITS;
            let narrow = if deep { &DEEP } else { narrow };
            all.push(Self {
                tokens: narrow.tokens,
                narrow: Blocks::new(device, image, unit, narrow)?,
                wide: Blocks::new(device, image, unit, wide)?,
                unit_rows,
                k_units,
            });
        }
        Ok(all)
    }

    /// The better blocks for that many token tiles.
    fn blocks(&self, token_tiles: usize) -> &Blocks {
        let tiles = |blocks: &Blocks| blocks.tiles(self.unit_rows, token_tiles);
        let (narrow, wide) = (tiles(&self.narrow), tiles(&self.wide));
        // Few rows take the time of reading the weight, for which two large blocks are better than four small ones.
        if self.tokens <= 32 {
            return if narrow <= self.narrow.resident(1) / 4 { &self.narrow } else { &self.wide };
        }
        let room = narrow <= self.narrow.resident(1) / 2;
        if room || self.narrow.load(narrow) < self.wide.load(wide) { &self.narrow } else { &self.wide }
    }

    /// Slices of the input features: with the token tiles, what decides the order of additions.
    pub(super) fn slices(&self, token_tiles: usize) -> usize {
        let blocks = self.blocks(token_tiles);
        blocks.slices(blocks.tiles(self.unit_rows, token_tiles), self.k_units)
    }

    /// What [`Many`](super::many::Many) calls the time of these rows.
    pub(super) fn cost(&self, token_tiles: usize, slices: usize) -> usize {
        let blocks = self.blocks(token_tiles);
        let rounds = (blocks.tiles(self.unit_rows, token_tiles) * slices).div_ceil(blocks.resident(1));
        // Their tensor core waits at the end of every group.
        rounds * (blocks.features * self.tokens * self.k_units.div_ceil(slices) * 6 / 5)
    }

    /// The launch for that many token tiles and slices.
    pub(super) fn launch(&self, token_tiles: usize, slices: usize) -> (&Blocks, Launch) {
        let blocks = self.blocks(token_tiles);
        let tiles = blocks.tiles(self.unit_rows, token_tiles);
        // Without clusters, blocks walk over tiles.
        let clusters = if slices == 1 { tiles.min(blocks.resident(1)) } else { tiles };
        (blocks, blocks.launch(clusters * slices, slices))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_fits_a_hopper_with_all_its_stages() {
        let most = 227 << 10;
        for shape in SHAPES.iter().flatten().chain([&DEEP]) {
            for (groups, asym) in [(1, false), (2, true), (4, true)] {
                let shared = shape.shared_memory(unit_bytes(groups, asym), shape.stages);
                assert!(shared <= most, "{} with {groups} groups: {shared}", shape.entry);
            }
        }
        assert!(
            SHAPES
                .iter()
                .zip([&FEW_ROWS[..], &[128]].concat())
                .all(|([narrow, wide], tokens)| { narrow.tokens == tokens && wide.tokens == tokens })
        );
    }
}
