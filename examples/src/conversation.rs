//! A conversation whose turns stay in the cache: each turn costs its own tokens alone.

use std::ops::ControlFlow;

use gptq_kernels::Backend;
use gptq_llama::{Drawing, Feed, KvCache, Llama, LlamaError, Next, Rng, Sampling, SequenceId, Turn, Wanted};

/// Tokens fed in one step.
const STEP: usize = 512;

/// How replies come about.
#[derive(Clone, Debug)]
pub struct ReplyOptions {
    /// Tokens of a reply at most.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Tokens that end a reply.
    pub stop_tokens: Vec<u32>,
    /// Seed of the draws.
    pub seed: u64,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The model ended it.
    Stop,
    /// It has as many tokens as a reply may have.
    Length,
    /// The caller broke it off.
    Cancelled,
    /// The cache is full: the conversation is over.
    Full,
}

/// One sequence that both sides add to.
pub struct Conversation<'m, D: Backend> {
    model: &'m Llama<D>,
    cache: KvCache<D>,
    sequence: SequenceId,
    /// Everything said so far. The cache has all of it but, after a reply, its last token.
    tokens: Vec<u32>,
    options: ReplyOptions,
    rng: Rng,
    /// The step that has been begun before its token was known, and the generator as it was before.
    ahead: Option<(Drawing, Rng)>,
}

impl<'m, D: Backend> Conversation<'m, D> {
    /// An empty conversation of up to `context` tokens.
    ///
    /// Errors: [`LlamaError::Sampling`], and what the device says if it has no memory.
    pub fn new(model: &'m Llama<D>, context: usize, options: ReplyOptions) -> Result<Self, LlamaError> {
        options.sampling.validate()?;
        let mut cache = model.cache(context)?;
        let sequence = cache.add();
        let rng = Rng::new(options.seed);
        Ok(Self { model, cache, sequence, tokens: Vec::new(), options, rng, ahead: None })
    }

    /// Forgets everything.
    pub fn clear(&mut self) -> Result<(), LlamaError> {
        if let Some((_, rng)) = self.ahead.take() {
            self.rng = rng;
        }
        self.tokens.clear();
        self.cache.truncate(self.sequence, 0)
    }

    /// Tokens said so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Adds `turn` and lets the model reply: `on_token` gets the reply so far after each token, until it says `Break`.
    /// What has been said, a broken off reply too, stays part of the conversation.
    ///
    /// Errors: [`LlamaError::ContextLength`] if the turn does not fit: nothing has changed then.
    pub fn reply<E: From<LlamaError>>(
        &mut self,
        turn: &[u32],
        mut on_token: impl FnMut(&[u32]) -> Result<ControlFlow<()>, E>,
    ) -> Result<Ended, E> {
        let (limit, needed) = (self.cache.max_tokens(), self.tokens.len() + turn.len());
        if needed > limit {
            return Err(LlamaError::ContextLength { needed, limit }.into());
        }
        if needed == 0 {
            return Err(LlamaError::NoTokens { what: "the first turn" }.into());
        }
        // What was begun behind a reply that had ended by then is forgotten, and its random bits are not used up.
        if let Some((_, rng)) = self.ahead.take() {
            self.rng = rng;
        }
        self.tokens.extend_from_slice(turn);
        let start = self.tokens.len();
        loop {
            if self.tokens.len() - start == self.options.max_new_tokens {
                return Ok(Ended::Length);
            }
            if self.tokens.len() > limit {
                return Ok(Ended::Full);
            }
            let more = self.tokens.len() - start + 1 < self.options.max_new_tokens;
            let token = if self.options.sampling.needs_history() {
                self.draw_here()?
            } else {
                self.draw_there(more)?
            };
            if self.options.stop_tokens.contains(&token) {
                return Ok(Ended::Stop);
            }
            self.tokens.push(token);
            if on_token(&self.tokens[start..])?.is_break() {
                return Ok(Ended::Cancelled);
            }
        }
    }

    /// Feeds what the cache does not have but for the last step of it, which begins at the position that is given.
    fn feed(&mut self) -> Result<usize, LlamaError> {
        let sequence = self.sequence;
        // At least one token gives logits, even if the last reply stopped and nothing was said since.
        let mut fed = self.cache.len(sequence)?.min(self.tokens.len() - 1);
        self.cache.truncate(sequence, fed)?;
        while self.tokens.len() - fed > STEP {
            let tokens = &self.tokens[fed..fed + STEP];
            self.model.forward(&mut self.cache, &[Feed { sequence, tokens, logits: Wanted::None }])?;
            fed += STEP;
        }
        Ok(fed)
    }

    /// Draws the next token on the host.
    fn draw_here(&mut self) -> Result<u32, LlamaError> {
        let fed = self.feed()?;
        let feed = Feed { sequence: self.sequence, tokens: &self.tokens[fed..], logits: Wanted::Last };
        let logits = self.model.forward(&mut self.cache, &[feed])?.to_array()?;
        self.options.sampling.draw(&mut logits.into_raw_vec_and_offset().0, &self.tokens, &mut self.rng)
    }

    /// Draws the next token on the device, and begins the one behind it if there may be `more`.
    fn draw_there(&mut self, more: bool) -> Result<u32, LlamaError> {
        let drawing = match self.ahead.take() {
            Some((drawing, _)) => drawing,
            None => {
                let fed = self.feed()?;
                let draw = self.options.sampling.of(self.rng.next_u64());
                let turn = Turn { sequence: self.sequence, next: Next::Tokens(&self.tokens[fed..]), draw };
                self.model.step(&mut self.cache, &[turn])?
            }
        };
        if D::QUEUES && more && self.tokens.len() < self.cache.max_tokens() {
            let before = self.rng.clone();
            let draw = self.options.sampling.of(self.rng.next_u64());
            let turn = Turn { sequence: self.sequence, next: Next::Drawn, draw };
            self.ahead = Some((self.model.step(&mut self.cache, &[turn])?, before));
        }
        let token = self.model.drawn(&mut self.cache, drawing)?[0];
        token.ok_or(LlamaError::NonFiniteLogits { position: self.tokens.len() - 1 })
    }
}
