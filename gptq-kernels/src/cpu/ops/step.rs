use std::sync::{Mutex, PoisonError};

use crate::{Draw, KernelError, StepPlan};

/// Rows of one tile of attention. Eight query rows share each pass over a page of keys, even without grouped heads.
pub(super) const TILE_ROWS: usize = 8;

/// Tokens of one page. One page of keys of one head, transposed, is read with 64 keys side by side.
pub(super) const PAGE_LEN: usize = 64;

/// Tokens, positions and page tables of one step on the CPU.
#[derive(Debug, Default)]
pub struct CpuStep {
    pub(crate) tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub(crate) positions: Vec<u32>,
    pub(crate) outputs: Vec<u32>,
    /// Consecutive rows of one sequence, at most [`TILE_ROWS`], in order of rows.
    pub(super) tiles: Vec<Tile>,
    /// Pages of all sequences.
    pub(crate) pages: Vec<u32>,
    /// What is written where, sorted by page.
    pub(super) writes: Vec<PageWrite>,
    pub(crate) draws: Vec<Draw>,
    /// What was drawn last.
    pub(crate) drawn: Mutex<Vec<Option<u32>>>,
    /// What was sent, and under which numbers: the last two.
    sent: [(u64, Vec<Option<u32>>); 2],
    /// Steps that have drawn and sent.
    count: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub(super) row: usize,
    pub(super) rows: usize,
    /// Position of the first row.
    pub(super) position: usize,
    /// Where the sequence's pages begin in [`CpuStep::pages`].
    pub(super) first_page: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct PageWrite {
    pub(super) page: usize,
    /// First slot of the page to write.
    pub(super) slot: usize,
    pub(super) row: usize,
    pub(super) rows: usize,
}

impl CpuStep {
    pub(crate) fn rows(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn fill(&mut self, plan: &StepPlan<'_>) -> Result<(), KernelError> {
        plan.validate(PAGE_LEN)?;
        let drawn = self.drawn.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(missing) = plan.drawn.iter().find(|token| token.output >= drawn.len()) {
            let (got, limit) = (missing.output, drawn.len());
            return Err(KernelError::Argument { what: "output of a drawn token", got, limit });
        }
        self.tokens.clear();
        self.tokens.extend_from_slice(plan.tokens);
        for token in plan.drawn {
            // None is in no vocabulary.
            self.tokens[token.row] = drawn[token.output].unwrap_or(u32::MAX);
        }
        self.draws.clear();
        self.draws.extend_from_slice(plan.draws);
        self.positions.clear();
        self.tiles.clear();
        self.pages.clear();
        self.writes.clear();
        for sequence in plan.sequences {
            let row = self.positions.len();
            let end = sequence.rows.end;
            let len = sequence.past + (end - row);
            let first_page = self.pages.len();
            self.pages.extend_from_slice(sequence.pages);
            self.positions.extend((sequence.past..len).map(|position| position as u32));
            self.tiles.extend((row..end).step_by(TILE_ROWS).map(|start| Tile {
                row: start,
                rows: TILE_ROWS.min(end - start),
                position: sequence.past + (start - row),
                first_page,
            }));
            let mut position = sequence.past;
            while position < len {
                let slot = position % PAGE_LEN;
                let count = (PAGE_LEN - slot).min(len - position);
                self.writes.push(PageWrite {
                    page: sequence.pages[position / PAGE_LEN] as usize,
                    slot,
                    row: row + (position - sequence.past),
                    rows: count,
                });
                position += count;
            }
        }
        self.writes.sort_unstable_by_key(|write| write.page);
        self.outputs.clear();
        self.outputs.extend_from_slice(plan.outputs);
        Ok(())
    }

    pub(crate) fn send(&mut self) -> u64 {
        let drawn = self.drawn.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.count += 1;
        self.sent[(self.count % 2) as usize] = (self.count, drawn.clone());
        self.count
    }

    pub(crate) fn sent(&self, number: u64) -> Result<Vec<Option<u32>>, KernelError> {
        match &self.sent[(number % 2) as usize] {
            (of, tokens) if *of == number => Ok(tokens.clone()),
            _ => Err(KernelError::Argument {
                what: "drawing",
                got: number as usize,
                limit: self.count as usize + 1,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SequencePlan;

    fn fill(plan: &StepPlan<'_>) -> Result<CpuStep, KernelError> {
        let mut step = CpuStep::default();
        step.fill(plan).map(|()| step)
    }

    #[test]
    fn positions_and_writes_cross_a_page() {
        let tokens = [7; 12];
        let sequences = [
            SequencePlan { rows: 0..10, past: 60, pages: &[5, 2] },
            SequencePlan { rows: 10..12, past: 0, pages: &[0] },
        ];
        let step = fill(&StepPlan {
            tokens: &tokens,
            sequences: &sequences,
            outputs: &[9, 11],
            ..StepPlan::default()
        })
        .unwrap();
        assert_eq!(step.positions, [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 0, 1]);
        let writes: Vec<_> = step.writes.iter().map(|w| (w.page, w.slot, w.row, w.rows)).collect();
        assert_eq!(writes, [(0, 0, 10, 2), (2, 0, 4, 6), (5, 60, 0, 4)]);
        let tiles: Vec<_> = step.tiles.iter().map(|t| (t.row, t.rows, t.position)).collect();
        assert_eq!(tiles, [(0, 8, 60), (8, 2, 68), (10, 2, 0)]);
    }

    #[test]
    fn bad_plans_are_refused() {
        let tokens = [1, 2, 3];
        let ok = SequencePlan { rows: 0..3, past: 0, pages: &[0] };
        let bad: [(&[SequencePlan<'_>], &[u32]); 5] = [
            (std::slice::from_ref(&ok), &[3]),
            (&[SequencePlan { rows: 0..2, ..ok.clone() }], &[]),
            (&[SequencePlan { rows: 1..3, ..ok.clone() }], &[]),
            (&[SequencePlan { past: 62, ..ok.clone() }], &[]),
            (&[SequencePlan { rows: 0..1, ..ok.clone() }, SequencePlan { rows: 1..3, ..ok.clone() }], &[]),
        ];
        for (sequences, outputs) in bad {
            let plan = StepPlan { tokens: &tokens, sequences, outputs, ..StepPlan::default() };
            assert!(matches!(fill(&plan), Err(KernelError::Argument { .. })), "{plan:?}");
        }
    }
}
