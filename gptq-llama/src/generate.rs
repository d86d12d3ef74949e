use std::ops::ControlFlow;

use gptq_kernels::Backend;

use crate::{Drawing, Feed, KvCache, Llama, LlamaError, Next, Rng, Sampling, SequenceId, Turn, Wanted};

/// Tokens of a prompt fed in one step.
pub(crate) const PREFILL: usize = 512;

/// What to generate and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Tokens that end the text; they are not part of it.
    pub stop_tokens: Vec<u32>,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for GenerateOptions {
    /// 128 tokens, greedy, no stop tokens, seed 0.
    fn default() -> Self {
        Self { max_new_tokens: 128, sampling: Sampling::default(), stop_tokens: Vec::new(), seed: 0 }
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// `max_new_tokens` were generated.
    Length,
    /// This stop token was drawn.
    Stop(u32),
    /// The model has been trained for no longer sequences.
    Context,
}

/// Generates one token after the other: an iterator that computes each when it is asked for. On a device that queues its
/// work the next one is begun before this one is known.
///
/// After an error the iterator ends.
pub struct Generator<'m, D: Backend> {
    model: &'m Llama<D>,
    cache: KvCache<D>,
    sequence: SequenceId,
    options: GenerateOptions,
    rng: Rng,
    /// Prompt and text.
    history: Vec<u32>,
    prompt_len: usize,
    /// Tokens of the history that are in the cache, or on their way.
    fed: usize,
    /// The step that has been begun ahead.
    ahead: Option<Drawing>,
    finish: Option<Finish>,
    failed: bool,
}

impl<'m, D: Backend> Generator<'m, D> {
    /// Starts after `prompt`. Nothing is computed yet.
    ///
    /// Errors: [`LlamaError::NoTokens`] for an empty prompt, [`LlamaError::Token`], [`LlamaError::Sampling`],
    /// [`LlamaError::ContextLength`] if the prompt is longer than what the model was trained for.
    pub fn new(model: &'m Llama<D>, prompt: &[u32], options: GenerateOptions) -> Result<Self, LlamaError> {
        options.sampling.validate()?;
        let config = model.config();
        let (vocab_size, limit) = (config.vocab_size, config.max_positions);
        if prompt.is_empty() {
            return Err(LlamaError::NoTokens { what: "the prompt" });
        }
        if let Some(index) = prompt.iter().position(|&token| token as usize >= vocab_size) {
            return Err(LlamaError::Token { token: prompt[index], index, vocab_size });
        }
        if prompt.len() > limit {
            return Err(LlamaError::ContextLength { needed: prompt.len(), limit });
        }
        let mut cache = model.cache(prompt.len().saturating_add(options.max_new_tokens).min(limit))?;
        let sequence = cache.add();
        let rng = Rng::new(options.seed);
        Ok(Self {
            model,
            cache,
            sequence,
            options,
            rng,
            history: prompt.to_vec(),
            prompt_len: prompt.len(),
            fed: 0,
            ahead: None,
            finish: None,
            failed: false,
        })
    }

    /// Runs the prompt through the model now, instead of with the first token.
    pub fn prefill(&mut self) -> Result<(), LlamaError> {
        while self.history.len().saturating_sub(self.fed) > 1 {
            let end = (self.fed + PREFILL).min(self.history.len() - 1);
            let tokens = &self.history[self.fed..end];
            let feed = Feed { sequence: self.sequence, tokens, logits: Wanted::None };
            self.model.forward(&mut self.cache, &[feed])?;
            self.fed = end;
        }
        Ok(())
    }

    /// The text so far.
    pub fn text(&self) -> &[u32] {
        &self.history[self.prompt_len..]
    }

    /// Why the text ended, if it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Draws the next token on the host.
    fn draw_here(&mut self) -> Result<u32, LlamaError> {
        self.prefill()?;
        let tokens = &self.history[self.fed..];
        let feed = Feed { sequence: self.sequence, tokens, logits: Wanted::Last };
        let mut logits =
            self.model.forward(&mut self.cache, &[feed])?.to_array()?.into_raw_vec_and_offset().0;
        self.fed = self.history.len();
        self.options.sampling.draw(&mut logits, &self.history, &mut self.rng)
    }

    /// Draws the next token on the device.
    fn draw_there(&mut self) -> Result<u32, LlamaError> {
        let drawing = match self.ahead.take() {
            Some(drawing) => drawing,
            None => {
                self.prefill()?;
                self.begin(self.fed..self.history.len())?
            }
        };
        // The last token of a text is followed by no step.
        let more = self.text().len() + 1 < self.options.max_new_tokens;
        if D::QUEUES && more && self.history.len() < self.cache.max_tokens() {
            self.ahead = Some(self.begin(self.history.len()..self.history.len() + 1)?);
        }
        let token = self.model.drawn(&mut self.cache, drawing)?[0];
        token.ok_or(LlamaError::NonFiniteLogits { position: self.history.len() - 1 })
    }

    /// Begins a step that feeds these tokens of the history; the one behind it is the one being drawn.
    fn begin(&mut self, tokens: std::ops::Range<usize>) -> Result<Drawing, LlamaError> {
        self.fed = tokens.end;
        let next = self.history.get(tokens).map_or(Next::Drawn, Next::Tokens);
        let draw = self.options.sampling.of(self.rng.next_u64());
        self.model.step(&mut self.cache, &[Turn { sequence: self.sequence, next, draw }])
    }

    fn step(&mut self) -> Result<Option<u32>, LlamaError> {
        if self.text().len() == self.options.max_new_tokens {
            self.finish = Some(Finish::Length);
            return Ok(None);
        }
        if self.history.len() > self.cache.max_tokens() {
            self.finish = Some(Finish::Context);
            return Ok(None);
        }
        let token =
            if self.options.sampling.needs_history() { self.draw_here()? } else { self.draw_there()? };
        if self.options.stop_tokens.contains(&token) {
            self.finish = Some(Finish::Stop(token));
            return Ok(None);
        }
        self.history.push(token);
        Ok(Some(token))
    }
}

impl<D: Backend> Iterator for Generator<'_, D> {
    type Item = Result<u32, LlamaError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.finish.is_some() {
            return None;
        }
        let result = self.step();
        self.failed = result.is_err();
        result.transpose()
    }
}

/// Generates a text and hands each token to `on_token` as soon as it is known, until it says `Break`.
///
/// Errors: those of [`Generator::new`] and of the forward pass.
pub fn generate<D: Backend>(
    model: &Llama<D>,
    prompt: &[u32],
    options: GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, LlamaError> {
    let mut generator = Generator::new(model, prompt, options)?;
    while let Some(token) = generator.next().transpose()? {
        if on_token(token).is_break() {
            break;
        }
    }
    Ok(generator.text().to_vec())
}
