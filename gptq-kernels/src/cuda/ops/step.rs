use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use crate::{
    KernelError, StepPlan,
    cuda::{driver::zeros, pinned::Pinned},
};

/// Tokens of one page, as in `decoder.cuh`.
pub(super) const PAGE_LEN: usize = 64;
/// Rows of a tile, as in `decoder.cuh`.
const TILE_ROWS: usize = 64;
/// Pages of a chunk, as in `page.cuh`.
const CHUNK_PAGES: usize = 4;
/// Counters that blocks of one row have: more than any model has key-value heads.
pub(super) const TICKETS: usize = 256;

/// Tokens, positions and page tables of one step on a GPU, in one piece of memory:
///
/// ```text
/// tiles (4 words each) | positions | page bases | tokens | rows of the outputs | pages
/// ```
///
/// It is filled by one copy from page-locked memory, of which there are two pieces, so that the next step can be
/// prepared while the copy of this one waits for its turn.
pub struct CudaStep {
    shape: StepShape,
    /// One past the last position of any sequence.
    end: usize,
    largest_token: usize,
    /// One past the last page.
    pages: usize,
    device: CudaSlice<u32>,
    host: [Pinned; 2],
    turn: usize,
    tickets: CudaSlice<u32>,
    tickets_address: u64,
}

/// All of a step that the operations depend on, but for what they read on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct StepShape {
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) tiles: usize,
    /// Whether every sequence has one row.
    pub(super) single: bool,
    /// Chunks of pages of the longest sequence, rounded up to a power of two.
    pub(super) chunks: usize,
    /// Where the step is.
    address: u64,
    tickets: u64,
}

impl CudaStep {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self, KernelError> {
        let (device, tickets) = (zeros(stream, 0)?, zeros(stream, 0)?);
        let host = [Pinned::new(stream.context(), 0)?, Pinned::new(stream.context(), 0)?];
        let tickets_address = 0;
        let shape = StepShape::default();
        Ok(Self {
            shape,
            end: 0,
            largest_token: 0,
            pages: 0,
            device,
            host,
            turn: 0,
            tickets,
            tickets_address,
        })
    }

    pub(super) fn fill(&mut self, stream: &Arc<CudaStream>, plan: &StepPlan<'_>) -> Result<(), KernelError> {
        plan.validate(PAGE_LEN)?;
        let rows = plan.tokens.len();
        let (mut tiles, mut positions, mut bases) = (Vec::new(), Vec::with_capacity(rows), Vec::new());
        let (mut page_base, mut end) = (0, 0);
        for sequence in plan.sequences {
            let count = sequence.rows.len();
            super::expect_below("position", sequence.past + count, i32::MAX as usize)?;
            for start in (0..count).step_by(TILE_ROWS) {
                let (row, rows) = (sequence.rows.start + start, TILE_ROWS.min(count - start));
                tiles.extend([row, rows, sequence.past + start, page_base].map(|word| word as u32));
            }
            positions.extend((sequence.past..sequence.past + count).map(|position| position as u32));
            bases.resize(bases.len() + count, page_base as u32);
            page_base += sequence.pages.len();
            end = end.max(sequence.past + count);
        }
        let pages = plan.sequences.iter().flat_map(|sequence| sequence.pages).copied();
        let largest_page = pages.clone().max();
        let len = tiles.len() + 3 * rows + plan.outputs.len() + page_base;
        self.reserve(stream, len, rows)?;

        self.turn = 1 - self.turn;
        let host = &mut self.host[self.turn];
        if host.len() < len {
            *host = Pinned::new(stream.context(), len.next_power_of_two())?;
        }
        let words = tiles.iter().chain(&positions).chain(&bases).chain(plan.tokens).chain(plan.outputs);
        for (to, word) in host.words()?.iter_mut().zip(words.copied().chain(pages)) {
            *to = word;
        }
        let address = self.device.device_ptr(stream).0;
        host.upload(stream, address, len)?;

        self.end = end;
        self.largest_token = plan.tokens.iter().max().map_or(0, |&token| token as usize);
        self.pages = largest_page.map_or(0, |page| page as usize + 1);
        self.shape = StepShape {
            rows,
            outputs: plan.outputs.len(),
            tiles: tiles.len() / 4,
            single: plan.sequences.iter().all(|sequence| sequence.rows.len() == 1),
            chunks: end.div_ceil(PAGE_LEN * CHUNK_PAGES).next_power_of_two(),
            address,
            tickets: self.tickets_address,
        };
        Ok(())
    }

    fn reserve(&mut self, stream: &Arc<CudaStream>, len: usize, rows: usize) -> Result<(), KernelError> {
        if self.device.len() < len {
            self.device = zeros(stream, len.next_power_of_two())?;
        }
        // Only steps of single rows use tickets; more rows than that would be no such step.
        let tickets = rows.min(65_535) * TICKETS;
        if self.tickets.len() < tickets {
            self.tickets = zeros(stream, tickets.next_power_of_two())?;
            self.tickets_address = self.tickets.device_ptr(stream).0;
        }
        Ok(())
    }

    pub(super) fn shape(&self) -> StepShape {
        self.shape
    }

    pub(super) fn rows(&self) -> usize {
        self.shape.rows
    }

    pub(super) fn outputs(&self) -> usize {
        self.shape.outputs
    }

    pub(super) fn end(&self) -> usize {
        self.end
    }

    pub(super) fn largest_token(&self) -> usize {
        self.largest_token
    }

    /// One past the last page.
    pub(super) fn pages_end(&self) -> usize {
        self.pages
    }

    fn word(&self, index: usize) -> u64 {
        self.shape.address + (index * 4) as u64
    }

    pub(super) fn tiles(&self) -> u64 {
        self.word(0)
    }

    pub(super) fn positions(&self) -> u64 {
        self.word(4 * self.shape.tiles)
    }

    pub(super) fn page_bases(&self) -> u64 {
        self.word(4 * self.shape.tiles + self.shape.rows)
    }

    pub(super) fn tokens(&self) -> u64 {
        self.word(4 * self.shape.tiles + 2 * self.shape.rows)
    }

    pub(super) fn output_rows(&self) -> u64 {
        self.word(4 * self.shape.tiles + 3 * self.shape.rows)
    }

    pub(super) fn pages(&self) -> u64 {
        self.word(4 * self.shape.tiles + 3 * self.shape.rows + self.shape.outputs)
    }

    pub(super) fn tickets(&self) -> u64 {
        self.tickets_address
    }
}
