use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::drawn::Drawn;
use crate::{
    Draw, KernelError, StepPlan,
    cuda::{driver::zeros, pinned::Pinned},
};

/// Tokens of one page, as in `decoder.cuh`.
pub(super) const PAGE_LEN: usize = 64;
/// Rows of a tile, as in `decoder.cuh`.
const TILE_ROWS: usize = 64;
/// Pages of a chunk, as in `page.cuh`.
pub(super) const CHUNK_PAGES: usize = 4;
/// Counters that blocks of one row have: more than any model has key-value heads.
pub(super) const TICKETS: usize = 256;

/// Words of a draw's parameters, as in `ops.cu`.
const DRAW_WORDS: usize = 8;
/// Marks a token that is read from among those drawn, at the index in the other bits.
pub(super) const DRAWN: u32 = 1 << 31;

/// Tokens, positions and page tables of one step on a GPU, in one piece of memory:
///
/// ```text
/// draws, if some are not greedy (8 words each) | tiles (4 words each) | positions | page bases | tokens |
/// rows of the outputs | numbers of the drawing, one for each draw | pages
/// ```
///
/// It is filled by one copy from page-locked memory, of which there are two pieces, so that the next step can be
/// prepared while the copy of this one waits for its turn. A kernel that draws from every row of a step of single rows makes of
/// the step the next one: positions and numbers rise by one and the tokens are those drawn. If that is what is asked for then,
/// nothing is copied.
pub struct CudaStep {
    shape: StepShape,
    /// What is in the memory once the step has drawn; empty if it does not become the next step. The numbers in it tell if it
    /// has not drawn.
    ahead: Vec<u32>,
    drawn: Drawn,
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
    pub(super) draws: Draws,
    /// Whether drawing makes of this step the next one: of single rows, every one gives an output, and no draw needs
    /// anything new.
    pub(super) advances: bool,
    /// Where the step is, and what belongs to it.
    address: u64,
    tickets: u64,
    drawn: u64,
    drawn_host: [u64; 2],
}

/// Which tokens are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Draws {
    #[default]
    None,
    /// The likeliest of each output.
    Greedy,
    /// Of each output as its parameters say.
    Sampled,
}

impl CudaStep {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self, KernelError> {
        let (device, tickets) = (zeros(stream, 0)?, zeros(stream, 0)?);
        let host = [Pinned::new(stream.context(), 0)?, Pinned::new(stream.context(), 0)?];
        let tickets_address = 0;
        let shape = StepShape::default();
        Ok(Self {
            shape,
            ahead: Vec::new(),
            drawn: Drawn::new(stream)?,
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
        for token in plan.drawn {
            super::expect_below("output of a drawn token", token.output, self.drawn.len())?;
        }
        let draws = match plan.draws {
            [] => Draws::None,
            draws if draws.iter().all(Draw::is_greedy) => Draws::Greedy,
            _ => Draws::Sampled,
        };
        self.drawn.reserve(plan.draws.len())?;
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
        let tiles_len = tiles.len() / 4;
        let mut words = Vec::new();
        if draws == Draws::Sampled {
            words.extend(plan.draws.iter().flat_map(parameters));
        }
        let tiles_at = words.len();
        words.extend(tiles);
        words.extend(&positions);
        words.extend(&bases);
        let tokens_at = words.len();
        words.extend(plan.tokens);
        for token in plan.drawn {
            words[tokens_at + token.row] = DRAWN | token.output as u32;
        }
        words.extend(plan.outputs);
        words.extend(plan.draws.iter().map(|_| self.drawn.next() as u32));
        words.extend(pages);
        self.reserve(stream, words.len(), rows)?;
        let address = self.device.device_ptr(stream).0;
        if self.ahead != words || self.shape.address != address {
            self.ahead.clear();
            self.turn = 1 - self.turn;
            let host = &mut self.host[self.turn];
            if host.len() < words.len() {
                *host = Pinned::new(stream.context(), words.len().next_power_of_two())?;
            }
            host.words()?[..words.len()].copy_from_slice(&words);
            host.upload(stream, address, words.len())?;
        }

        let single = plan.sequences.iter().all(|sequence| sequence.rows.len() == 1);
        self.end = end;
        let given = plan.tokens.iter().zip(&words[tokens_at..]).filter(|(token, word)| token == word);
        self.largest_token = given.map(|(&token, _)| token as usize).max().unwrap_or(0);
        self.pages = largest_page.map_or(0, |page| page as usize + 1);
        self.shape = StepShape {
            rows,
            outputs: plan.outputs.len(),
            tiles: tiles_len,
            single,
            chunks: end.div_ceil(PAGE_LEN * CHUNK_PAGES).next_power_of_two(),
            draws,
            advances: single && draws == Draws::Greedy && plan.outputs.iter().copied().eq(0..rows as u32),
            address,
            tickets: self.tickets_address,
            drawn: self.drawn.tokens(),
            drawn_host: self.drawn.host(),
        };
        self.ahead.clear();
        if self.shape.advances {
            let [positions_at, numbers_at] = [tokens_at - 2 * rows, tokens_at + 2 * rows];
            for row in 0..rows {
                for at in [tiles_at + 4 * row + 2, positions_at + row, numbers_at + row] {
                    words[at] = words[at].wrapping_add(1);
                }
                words[tokens_at + row] = DRAWN | row as u32;
            }
            self.ahead = words;
        }
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

    pub(super) fn drawn(&self) -> &Drawn {
        &self.drawn
    }

    pub(super) fn drawn_mut(&mut self) -> &mut Drawn {
        &mut self.drawn
    }

    /// Draws of the plan.
    pub(super) fn draw_count(&self) -> usize {
        if self.shape.draws == Draws::None { 0 } else { self.shape.outputs }
    }

    pub(super) fn draws(&self) -> u64 {
        self.shape.address
    }

    fn word(&self, index: usize) -> u64 {
        let draws = if self.shape.draws == Draws::Sampled { DRAW_WORDS * self.shape.outputs } else { 0 };
        self.shape.address + ((draws + index) * 4) as u64
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

    pub(super) fn numbers(&self) -> u64 {
        self.word(4 * self.shape.tiles + 3 * self.shape.rows + self.shape.outputs)
    }

    pub(super) fn pages(&self) -> u64 {
        self.word(4 * self.shape.tiles + 3 * self.shape.rows + self.shape.outputs + self.draw_count())
    }

    pub(super) fn tickets(&self) -> u64 {
        self.tickets_address
    }
}

/// A draw as `ops.cu` has it.
fn parameters(draw: &Draw) -> [u32; DRAW_WORDS] {
    let split = |word: u64| [word as u32, (word >> 32) as u32];
    // A rate of 0 stands for the likeliest token.
    let rate = if draw.is_greedy() { 0.0 } else { draw.rate() };
    let ([p0, p1], [l0, l1], [r0, r1]) =
        (split(f64::from(draw.top_p).to_bits()), split(draw.least()), split(draw.random));
    [rate.to_bits(), draw.top_k, p0, p1, l0, l1, r0, r1]
}
