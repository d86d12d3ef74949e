use super::{kv::PageBytes, step::CHUNK_PAGES};
use crate::KvFormat;

/// Queries of a warp, as in `page.cuh`.
pub(super) const QUERIES: usize = 16;
/// Blocks that may share the chunks of a row at most.
const MOST_BLOCKS: usize = 64;
/// Blocks of a cluster at most.
const MOST_CLUSTER: usize = 8;

/// What the decoding kernel has to do, in each of its rows and heads, and on what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decoding {
    /// Rows times key-value heads times groups of 16 queries.
    pub(super) jobs: usize,
    /// Queries of a job, at most 16.
    pub(super) queries: usize,
    /// Features of a head with its padding.
    pub(super) dim: usize,
    /// What keys and values are kept as.
    pub(super) format: KvFormat,
    /// Chunks of pages of the longest row.
    pub(super) chunks: usize,
    pub(super) multiprocessors: usize,
    /// Shared memory that a block can have, which is what a multiprocessor has.
    pub(super) memory: usize,
    /// Whether blocks can read each other's shared memory.
    pub(super) clusters: bool,
}

/// How the chunks of a row are divided. It changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    /// Blocks that share them.
    pub(super) blocks: usize,
    /// Halves of pages that each warp has on their way.
    pub(super) stages: usize,
    /// Chunks for whose sums a block has room, if the blocks are a cluster that merges in shared memory; 0 if the sums go
    /// through the workspace, or if there is one block.
    pub(super) kept: usize,
    /// Shared memory in bytes.
    pub(super) shared: usize,
}

impl Decoding {
    /// As `decode` of `attention.cu` lays it out.
    fn shared(&self, stages: usize, kept: usize) -> usize {
        let (row, sums) = (self.dim * 2, self.queries * self.dim * 4);
        // Halves of a page have room for keys, and new codes and their scales for both.
        let half_page = PageBytes::new(self.format, self.dim).keys;
        let codes = if self.format == KvFormat::Int8 { 2 * (self.dim + size_of::<f32>()) } else { 0 };
        let rings = CHUNK_PAGES * stages * (half_page + 8);
        let states = QUERIES * 8 * (CHUNK_PAGES + 2 + kept);
        rings + (QUERIES + 2) * row + states + sums * (CHUNK_PAGES + kept.max(1)) + codes
    }

    /// The division that should take least time, `None` if the kernel does not fit.
    pub(super) fn split(&self) -> Option<Split> {
        let fits = |stages, kept| self.shared(stages, kept) <= self.memory;
        let resident = |stages| self.multiprocessors * (self.memory / self.shared(stages, 0)).max(1);
        // More on its way only helps where few blocks are on a multiprocessor.
        let short = self.chunks <= 2 && self.jobs >= 2 * resident(2);
        let stages = if short || !fits(2, 0) { 1 } else { 2 };
        if !fits(stages, 0) {
            return None;
        }
        let resident = resident(stages);
        let clusters = |blocks: usize| {
            let kept = self.chunks.div_ceil(blocks);
            // Clusters do not fill a GPU whose multiprocessors come in groups of other sizes.
            let there = self.clusters && blocks <= MOST_CLUSTER && 4 * self.jobs * blocks <= 3 * resident;
            if there && fits(stages, kept) { kept } else { 0 }
        };
        // In times of a chunk; starting a block is 0.6 of it, and merging as much as measured on an H200.
        let cost = |blocks: usize| {
            let waves = (self.jobs * blocks).div_ceil(resident) as f64;
            let merging = match (blocks, clusters(blocks)) {
                (1, _) => 0.0,
                (_, 0) => 0.5 + 0.1 * self.queries as f64,
                _ => 0.5,
            };
            waves * (self.chunks.div_ceil(blocks) as f64 + 0.6) + merging
        };
        let powers =
            (0..).map(|power| 1 << power).take_while(|&blocks| blocks <= self.chunks.min(MOST_BLOCKS));
        let blocks = powers.min_by(|&a, &b| cost(a).total_cmp(&cost(b)))?;
        let kept = if blocks == 1 { 0 } else { clusters(blocks) };
        Some(Split { blocks, stages, kept, shared: self.shared(stages, kept) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Decoding = Decoding {
        jobs: 32,
        queries: 1,
        dim: 128,
        format: KvFormat::Activations,
        chunks: 1,
        multiprocessors: 132,
        memory: 232_192,
        clusters: true,
    };

    #[test]
    fn what_was_fastest_is_chosen() {
        let split = |jobs, queries, chunks| {
            let split = Decoding { jobs, queries, chunks, ..H200 }.split().unwrap();
            (split.blocks, split.stages, split.kept)
        };
        assert_eq!(split(32, 1, 1), (1, 2, 0));
        assert_eq!(split(32, 1, 2), (2, 2, 1));
        assert_eq!(split(32, 1, 8), (4, 2, 0));
        assert_eq!(split(32, 1, 32), (4, 2, 0));
        assert_eq!(split(512, 1, 2), (1, 1, 0));
        assert_eq!(split(512, 1, 8), (1, 2, 0));
        assert_eq!(split(2048, 1, 8), (1, 2, 0));
        assert_eq!(split(8, 4, 8), (8, 2, 1));
        assert_eq!(split(8, 8, 8), (8, 2, 1));
        assert_eq!(split(128, 4, 8), (1, 2, 0));
    }

    #[test]
    fn everything_fits_or_is_refused() {
        for memory in [48 << 10, 99 << 10, 163 << 10, 227 << 10] {
            for dim in [32, 64, 96, 128, 256] {
                for (jobs, queries, chunks) in [(1, 16, 512), (8, 8, 64), (300, 1, 4), (70_000, 2, 16)] {
                    let format = if chunks == 16 { KvFormat::Int8 } else { KvFormat::Activations };
                    let decoding = Decoding { jobs, queries, dim, format, chunks, memory, ..H200 };
                    match decoding.split() {
                        Some(split) => {
                            assert!(split.shared <= memory && split.blocks <= chunks, "{decoding:?}");
                            assert!(split.kept == 0 || split.blocks * split.kept >= chunks, "{decoding:?}");
                        }
                        None => assert!(decoding.shared(1, 0) > memory, "{decoding:?}"),
                    }
                }
            }
        }
    }
}
