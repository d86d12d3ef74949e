use std::sync::{Arc, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use crate::{
    KernelError, StepPlan,
    cpu::ops::CpuStep,
    cuda::{driver::zeros, failure::gpu_error},
    matrix::expect_shape,
};

/// Tokens of one page and rows of a tile, as in `single_attention.cuh`.
pub(super) const PAGE_LEN: usize = 64;
const TILE_ROWS: usize = 64;

/// Tokens, positions and page tables of one step on a GPU with activations in float32:
///
/// ```text
/// tiles (4 words each) | positions | page bases | tokens | rows of the outputs | pages
/// ```
///
/// What is drawn is drawn by the host, and known to it when the next step is filled.
pub struct SingleStep {
    host: CpuStep,
    device: CudaSlice<u32>,
    address: u64,
    tiles: usize,
    /// One past the last position of any sequence, and one past the last page.
    end: usize,
    pages_end: usize,
}

impl SingleStep {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self, KernelError> {
        let device = zeros(stream, 0)?;
        let address = device.device_ptr(stream).0;
        Ok(Self { host: CpuStep::default(), device, address, tiles: 0, end: 0, pages_end: 0 })
    }

    pub(super) fn fill(&mut self, stream: &Arc<CudaStream>, plan: &StepPlan<'_>) -> Result<(), KernelError> {
        self.host.fill(plan)?;
        let rows = plan.tokens.len();
        let (mut words, mut bases, mut page_base) = (Vec::new(), Vec::with_capacity(rows), 0);
        for sequence in plan.sequences {
            let count = sequence.rows.len();
            expect_below(sequence.past + count)?;
            for start in (0..count).step_by(TILE_ROWS) {
                let (row, rows) = (sequence.rows.start + start, TILE_ROWS.min(count - start));
                words.extend([row, rows, sequence.past + start, page_base].map(|word| word as u32));
            }
            bases.resize(bases.len() + count, page_base as u32);
            page_base += sequence.pages.len();
        }
        self.tiles = words.len() / 4;
        self.end = self.host.positions.iter().max().map_or(0, |&last| last as usize + 1);
        self.pages_end = self.host.pages.iter().max().map_or(0, |&last| last as usize + 1);
        words.extend(&self.host.positions);
        words.extend(&bases);
        words.extend(&self.host.tokens);
        words.extend(&self.host.outputs);
        words.extend(&self.host.pages);
        if self.device.len() < words.len() {
            self.device = zeros(stream, words.len().next_power_of_two())?;
            self.address = self.device.device_ptr(stream).0;
        }
        if words.is_empty() {
            return Ok(());
        }
        let failed = |error| gpu_error("copying a step to the GPU", error);
        // From pageable memory: the driver has taken its copy when this returns.
        stream.memcpy_htod(&words, &mut self.device.slice_mut(..words.len())).map_err(failed)
    }

    pub(super) fn draw(&self, vocabulary: usize, logits: &[f32], rows: usize) -> Result<(), KernelError> {
        let draws = &self.host.draws;
        expect_shape("logits", (rows, vocabulary), (draws.len(), vocabulary))?;
        let mut drawn = self.host.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = logits.chunks_exact(vocabulary.max(1));
        *drawn = draws.iter().zip(rows).map(|(draw, row)| draw.token(row)).collect();
        Ok(())
    }

    pub(super) fn send(&mut self) -> u64 {
        self.host.send()
    }

    pub(super) fn sent(&self, number: u64) -> Result<Vec<Option<u32>>, KernelError> {
        self.host.sent(number)
    }

    pub(super) fn rows(&self) -> usize {
        self.host.rows()
    }

    pub(super) fn outputs(&self) -> usize {
        self.host.outputs.len()
    }

    pub(super) fn tile_count(&self) -> usize {
        self.tiles
    }

    pub(super) fn end(&self) -> usize {
        self.end
    }

    pub(super) fn pages_end(&self) -> usize {
        self.pages_end
    }

    /// The largest token that is one.
    pub(super) fn largest_token(&self) -> usize {
        // A draw that failed gives no token, and a row of NaN.
        self.host.tokens.iter().filter(|&&token| token != u32::MAX).max().map_or(0, |&token| token as usize)
    }

    fn word(&self, index: usize) -> u64 {
        self.address + (index * 4) as u64
    }

    pub(super) fn tiles(&self) -> u64 {
        self.word(0)
    }

    pub(super) fn positions(&self) -> u64 {
        self.word(4 * self.tiles)
    }

    pub(super) fn page_bases(&self) -> u64 {
        self.word(4 * self.tiles + self.rows())
    }

    pub(super) fn tokens(&self) -> u64 {
        self.word(4 * self.tiles + 2 * self.rows())
    }

    pub(super) fn output_rows(&self) -> u64 {
        self.word(4 * self.tiles + 3 * self.rows())
    }

    pub(super) fn pages(&self) -> u64 {
        self.word(4 * self.tiles + 3 * self.rows() + self.outputs())
    }
}

/// Kernels count positions in 32 bits.
fn expect_below(positions: usize) -> Result<(), KernelError> {
    super::expect_below("position", positions, i32::MAX as usize)
}
