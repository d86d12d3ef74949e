use super::{
    decode,
    tile::{Amx, PairRow, STEP, TILE_ROWS},
};
use crate::cpu::{
    layout::{Encoding, Line, SEGMENT, TILES},
    panel::PanelRow,
};

/// Pairs of one segment. Whole words are decoded, and a word has up to 8 pairs.
pub(super) type Panel = [PairRow; SEGMENT / 2 + 8];

pub(super) fn panel() -> Panel {
    [[Line([0; 16]); TILES]; SEGMENT / 2 + 8]
}

/// Weights of a segment of one block, which become pairs of bfloat16, 16 rows a step.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    amx: Amx,
    encoding: Encoding,
    head: &'a [Line],
    words: &'a [[Line; TILES]],
    /// Words that have been decoded.
    decoded: usize,
}

impl<'a> Weights<'a> {
    pub(super) fn new(amx: Amx, encoding: Encoding, head: &'a [Line], words: &'a [[Line; TILES]]) -> Self {
        Self { amx, encoding, head, words, decoded: 0 }
    }

    /// Whether the words are bfloat16 pairs as they stand. The last step wants a whole tile, and what lies behind a ragged
    /// one belongs to others.
    fn ready(&self) -> bool {
        matches!(self.encoding, Encoding::Dense(_)) && self.words.len().is_multiple_of(TILE_ROWS)
    }

    /// Decodes what the first `steps` steps need and has not been decoded.
    #[inline(always)]
    pub(super) fn decode(&mut self, steps: usize, panel: &mut Panel) {
        let per_word = self.encoding.per_word();
        let until = (steps * STEP).div_ceil(per_word).min(self.words.len());
        if self.ready() || until <= self.decoded {
            return;
        }
        let words = &self.words[self.decoded..until];
        let panel = &mut panel[self.decoded * per_word / 2..];
        match self.encoding {
            Encoding::Codes { width, zeros } => {
                decode::codes(self.amx, width, zeros, self.head, words, panel)
            }
            Encoding::Dense(_) => {
                panel[..words.len()].copy_from_slice(words);
                panel[words.len()..].fill([Line([0; 16]); TILES]);
            }
        }
        self.decoded = until;
    }

    /// The pairs: of `panel`, into which this value has been decoded, if they had to be.
    pub(super) fn get<'b>(&self, panel: &'b Panel) -> &'b [PairRow]
    where
        'a: 'b,
    {
        if self.ready() { self.words } else { panel }
    }

    /// The scales of the block, ones for dense weights.
    pub(super) fn scales(&self) -> PanelRow {
        match self.encoding {
            Encoding::Codes { .. } => decode::scales(self.amx, self.head),
            Encoding::Dense(_) => [[1.0; 16]; TILES],
        }
    }
}
