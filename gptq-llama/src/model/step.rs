use gptq_kernels::{Backend, Draw, DrawnToken};

use super::Llama;
use crate::{Feed, KvCache, LlamaError, SequenceId, Wanted};

/// What one sequence does in a step that draws a token for each.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// What it is fed.
    pub next: Next<'a>,
    /// How the token behind that is drawn.
    pub draw: Draw,
}

/// New tokens of a sequence.
#[derive(Clone, Copy, Debug)]
pub enum Next<'a> {
    /// These, at least one.
    Tokens(&'a [u32]),
    /// The one that the last step has drawn for it, which the host need not know yet.
    Drawn,
}

/// Tokens that are being drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drawing(u64);

impl<D: Backend> Llama<D> {
    /// Begins a step: runs what the sequences are fed through the model as [`forward`](Self::forward) does, and draws a token for
    /// each of them on the device. [`drawn`](Self::drawn) waits for the tokens.
    ///
    /// On a device that queues its work the next step may be begun before the tokens of this one are known, with
    /// [`Next::Drawn`]; what it does too much when one of them ends a text, [`KvCache::truncate`] or
    /// [`KvCache::remove`] forgets. A token whose logits were not finite makes no error there, but logits that are not.
    ///
    /// Errors: those of [`forward`](Self::forward), and [`LlamaError::NothingDrawn`].
    pub fn step(&self, cache: &mut KvCache<D>, turns: &[Turn<'_>]) -> Result<Drawing, LlamaError> {
        let (mut feeds, mut drawn) = (Vec::with_capacity(turns.len()), Vec::new());
        let mut row = 0;
        for turn in turns {
            let tokens = match turn.next {
                Next::Tokens(tokens) => tokens,
                Next::Drawn => {
                    drawn.push(DrawnToken { row, output: cache.drawn_output(turn.sequence)? });
                    &[0]
                }
            };
            row += tokens.len();
            feeds.push(Feed { sequence: turn.sequence, tokens, logits: Wanted::Last });
        }
        let draws: Vec<Draw> = turns.iter().map(|turn| turn.draw).collect();
        self.pass(cache, &feeds, &drawn, &draws)?;
        let number = self.device.send_drawn(&mut cache.step)?;
        cache.commit(&feeds);
        cache.set_drawn(turns.iter().map(|turn| turn.sequence));
        Ok(Drawing(number))
    }

    /// The tokens of a step of this cache, in the order of its turns; `None` where logits were not finite. Of steps that
    /// have drawn, those of the last two are known.
    ///
    /// Errors: [`LlamaError::Kernel`] if the step is older.
    pub fn drawn(&self, cache: &mut KvCache<D>, drawing: Drawing) -> Result<Vec<Option<u32>>, LlamaError> {
        Ok(self.device.drawn(&mut cache.step, drawing.0)?)
    }
}
