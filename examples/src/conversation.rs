//! A conversation whose turns stay in the cache: each turn costs its own tokens alone.

use std::ops::ControlFlow;

use gptq_kernels::Backend;
use gptq_llama::{Feed, KvCache, Llama, LlamaError, Rng, Sampling, SequenceId, Wanted};

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
        Ok(Self { model, cache, sequence, tokens: Vec::new(), options, rng })
    }

    /// Forgets everything.
    pub fn clear(&mut self) -> Result<(), LlamaError> {
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
        self.tokens.extend_from_slice(turn);
        let start = self.tokens.len();
        loop {
            if self.tokens.len() - start == self.options.max_new_tokens {
                return Ok(Ended::Length);
            }
            if self.tokens.len() > limit {
                return Ok(Ended::Full);
            }
            let token = self.next()?;
            if self.options.stop_tokens.contains(&token) {
                return Ok(Ended::Stop);
            }
            self.tokens.push(token);
            if on_token(&self.tokens[start..])?.is_break() {
                return Ok(Ended::Cancelled);
            }
        }
    }

    /// Feeds what the cache does not have, and draws the token after it.
    fn next(&mut self) -> Result<u32, LlamaError> {
        let sequence = self.sequence;
        // At least one token gives logits, even if the last reply stopped and nothing was said since.
        let fed = self.cache.len(sequence)?.min(self.tokens.len() - 1);
        self.cache.truncate(sequence, fed)?;
        let mut parts = self.tokens[fed..].chunks(STEP).peekable();
        while let Some(tokens) = parts.next() {
            let last = parts.peek().is_none();
            let logits = if last { Wanted::Last } else { Wanted::None };
            let logits = self.model.forward(&mut self.cache, &[Feed { sequence, tokens, logits }])?;
            if !last {
                continue;
            }
            if self.options.sampling.is_argmax() {
                let position = self.tokens.len() - 1;
                return logits.argmax()?[0].ok_or(LlamaError::NonFiniteLogits { position });
            }
            let mut logits = logits.to_array()?.into_raw_vec_and_offset().0;
            return self.options.sampling.draw(&mut logits, &self.tokens, &mut self.rng);
        }
        Err(LlamaError::NoTokens { what: "the conversation" })
    }
}
