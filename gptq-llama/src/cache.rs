use std::time::Duration;

use gptq_kernels::{
    Backend, Draw, DrawnToken, KernelError, KvFormat, KvShape, SequencePlan, StepPlan, Workspace,
};

use crate::{Feed, LlamaConfig, LlamaError, Wanted};

/// A sequence of a [`KvCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId(usize);

/// Keys and values of any number of sequences, and the scratch memory of forward passes over them.
///
/// Memory is taken in pages as sequences grow, and pages of removed or shortened sequences are used again.
pub struct KvCache<D: Backend> {
    pub(crate) store: D::KvStore,
    pub(crate) rope: D::Rope,
    pub(crate) step: D::Step,
    pub(crate) scratch: Scratch<D>,
    pub(crate) recordings: D::Recordings,
    pub(crate) timings: Option<Timings>,
    sequences: Vec<Option<Sequence>>,
    /// The sequences for which the last step that drew has drawn, in the order of its outputs.
    drawn: Vec<Option<SequenceId>>,
    free_pages: Vec<u32>,
    pages: usize,
    max_tokens: usize,
    /// Bytes of a page of all layers.
    page_bytes: usize,
}

#[derive(Default)]
struct Sequence {
    pages: Vec<u32>,
    len: usize,
}

/// Buffers of one forward pass.
pub(crate) struct Scratch<D: Backend> {
    /// Every row.
    pub(crate) rows: Stream<D>,
    /// The rows whose logits are wanted.
    pub(crate) outputs: Stream<D>,
    pub(crate) qkv: D::Buffer,
    pub(crate) block: Block<D>,
    pub(crate) logits: D::Buffer,
}

/// What flows between blocks.
pub(crate) struct Stream<D: Backend> {
    capacity: usize,
    pub(crate) hidden: D::Buffer,
    pub(crate) attention: D::Buffer,
}

/// What lives within a block.
pub(crate) struct Block<D: Backend> {
    pub(crate) norm: D::Buffer,
    pub(crate) delta: D::Buffer,
    pub(crate) gate_up: D::Buffer,
    pub(crate) inner: D::Buffer,
    pub(crate) workspace: Workspace<D>,
}

/// Wall-clock time of the parts of forward passes, since timing was switched on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Forward passes.
    pub steps: usize,
    /// Embedding, norms, residual additions, gathering.
    pub norms: Duration,
    /// q, k, v projections.
    pub qkv: Duration,
    /// Rotation, writing to the cache, attention.
    pub attention: Duration,
    /// o projection.
    pub o: Duration,
    /// gate and up projections.
    pub gate_up: Duration,
    /// `silu(gate) * up`.
    pub activation: Duration,
    /// down projection.
    pub down: Duration,
    /// Output projection.
    pub lm_head: Duration,
    /// Drawing tokens.
    pub draw: Duration,
}

impl<D: Backend> KvCache<D> {
    pub(crate) fn new(
        device: &D,
        config: &LlamaConfig,
        max_tokens: usize,
        format: KvFormat,
    ) -> Result<Self, LlamaError> {
        if max_tokens == 0 {
            return Err(LlamaError::NoTokens { what: "the cache" });
        }
        // Positions are 32-bit; no table that large could be made.
        if u32::try_from(max_tokens).is_err() {
            return Err(LlamaError::ContextLength { needed: max_tokens, limit: u32::MAX as usize });
        }
        let (cos, sin) = config.rope.table(config.head_dim, max_tokens);
        let (layers, kv_heads, head_dim) = (config.layers, config.kv_heads, config.head_dim);
        let shape = KvShape { layers, kv_heads, head_dim, pages: 0, format };
        Ok(Self {
            store: device.kv_store(shape)?,
            rope: device.rope(&cos, &sin, config.head_dim)?,
            step: device.new_step()?,
            scratch: Scratch::new(device)?,
            recordings: D::Recordings::default(),
            timings: None,
            sequences: Vec::new(),
            drawn: Vec::new(),
            free_pages: Vec::new(),
            pages: 0,
            max_tokens,
            page_bytes: device.kv_page_bytes(shape),
        })
    }

    /// A new, empty sequence.
    pub fn add(&mut self) -> SequenceId {
        let free = self.sequences.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.sequences.push(None);
            self.sequences.len() - 1
        });
        self.sequences[index] = Some(Sequence::default());
        SequenceId(index)
    }

    /// Forgets a sequence.
    ///
    /// Errors: [`LlamaError::UnknownSequence`].
    pub fn remove(&mut self, id: SequenceId) -> Result<(), LlamaError> {
        self.truncate(id, 0)?;
        self.sequences[id.0] = None;
        Ok(())
    }

    /// Forgets all but the first `len` tokens of a sequence.
    ///
    /// Errors: [`LlamaError::UnknownSequence`].
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<(), LlamaError> {
        let unknown = LlamaError::UnknownSequence { index: id.0 };
        let sequence = self.sequences.get_mut(id.0).and_then(Option::as_mut).ok_or(unknown)?;
        sequence.len = sequence.len.min(len);
        let kept = sequence.len.div_ceil(D::PAGE_LEN);
        self.free_pages.extend(sequence.pages.drain(kept..).rev());
        // What was drawn for it followed what is forgotten now.
        self.drawn.iter_mut().filter(|drawn| **drawn == Some(id)).for_each(|drawn| *drawn = None);
        Ok(())
    }

    /// Tokens of a sequence.
    ///
    /// Errors: [`LlamaError::UnknownSequence`].
    pub fn len(&self, id: SequenceId) -> Result<usize, LlamaError> {
        get(&self.sequences, id).map(|sequence| sequence.len)
    }

    /// Bytes that the keys and values of a token take.
    pub fn bytes_per_token(&self) -> usize {
        self.page_bytes / D::PAGE_LEN
    }

    /// Tokens that a sequence can have.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Switches timing on, or off and forgets what was measured. With timing the device is waited for after each part.
    pub fn set_timing(&mut self, on: bool) {
        self.timings = on.then(Timings::default);
    }

    /// What was measured, if timing is on.
    pub fn timings(&self) -> Option<&Timings> {
        self.timings.as_ref()
    }

    /// Checks the feeds, gives their sequences room and fills the step. The sequences are as long as before until
    /// [`commit`](Self::commit).
    pub(crate) fn plan(
        &mut self,
        device: &D,
        config: &LlamaConfig,
        feeds: &[Feed<'_>],
        drawn: &[DrawnToken],
        draws: &[Draw],
    ) -> Result<(usize, usize), LlamaError> {
        let vocab_size = config.vocab_size;
        for (i, feed) in feeds.iter().enumerate() {
            let past = get(&self.sequences, feed.sequence)?.len;
            if feed.tokens.is_empty() {
                return Err(LlamaError::NoTokens { what: "a feed" });
            }
            if feeds[..i].iter().any(|other| other.sequence == feed.sequence) {
                return Err(LlamaError::RepeatedSequence { index: feed.sequence.0 });
            }
            let needed = past + feed.tokens.len();
            if needed > self.max_tokens {
                return Err(LlamaError::ContextLength { needed, limit: self.max_tokens });
            }
            if let Some(index) = feed.tokens.iter().position(|&token| token as usize >= vocab_size) {
                let token = feed.tokens[index];
                return Err(LlamaError::Token { token, index: past + index, vocab_size });
            }
        }
        for feed in feeds {
            self.make_room(device, feed)?;
        }
        let mut tokens = Vec::new();
        let mut outputs = Vec::new();
        let mut plans = Vec::with_capacity(feeds.len());
        for feed in feeds {
            let sequence = get(&self.sequences, feed.sequence)?;
            let rows = tokens.len()..tokens.len() + feed.tokens.len();
            tokens.extend_from_slice(feed.tokens);
            match feed.logits {
                Wanted::None => {}
                Wanted::Last => outputs.push(rows.end as u32 - 1),
                Wanted::All => outputs.extend(rows.start as u32..rows.end as u32),
            }
            plans.push(SequencePlan { rows, past: sequence.len, pages: &sequence.pages });
        }
        let plan = StepPlan { tokens: &tokens, sequences: &plans, outputs: &outputs, drawn, draws };
        device.set_step(&mut self.step, &plan)?;
        Ok((tokens.len(), outputs.len()))
    }

    /// Counts the tokens of the feeds as stored.
    pub(crate) fn commit(&mut self, feeds: &[Feed<'_>]) {
        for feed in feeds {
            if let Some(Some(sequence)) = self.sequences.get_mut(feed.sequence.0) {
                sequence.len += feed.tokens.len();
            }
        }
    }

    /// Takes memory for `tokens` tokens now, rather than while sequences grow. Every sequence takes whole pages of
    /// [`Backend::PAGE_LEN`] tokens.
    ///
    /// Errors: [`LlamaError::CacheMemory`].
    pub fn reserve(&mut self, device: &D, tokens: usize) -> Result<(), LlamaError> {
        let pages = tokens.div_ceil(D::PAGE_LEN);
        if pages > self.pages { self.grow_to(device, pages, tokens) } else { Ok(()) }
    }

    fn grow(&mut self, device: &D, pages: usize) -> Result<(), KernelError> {
        device.grow_kv(&mut self.store, pages)?;
        // Pages are taken from the end; old free ones first.
        self.free_pages.splice(0..0, (self.pages as u32..pages as u32).rev());
        self.pages = pages;
        Ok(())
    }

    /// [`grow`](Self::grow) for a sequence of `length` tokens, with an error that says what would have fitted.
    fn grow_to(&mut self, device: &D, pages: usize, length: usize) -> Result<(), LlamaError> {
        let free = device.free_memory();
        let error = match (self.grow(device, pages), free) {
            (Err(KernelError::OutOfGpuMemory { .. }), Some(free)) => {
                let pages_that_fit = free / self.page_bytes.max(1);
                LlamaError::CacheMemory {
                    tokens: pages * D::PAGE_LEN,
                    bytes_per_token: self.page_bytes / D::PAGE_LEN,
                    free,
                    fits: (self.pages + pages_that_fit) * D::PAGE_LEN,
                    sequences: self.sequences.iter().flatten().count(),
                    length,
                }
            }
            (result, _) => return Ok(result?),
        };
        Err(error)
    }

    /// Which token of the last step that drew is the sequence's.
    pub(crate) fn drawn_output(&self, id: SequenceId) -> Result<usize, LlamaError> {
        get(&self.sequences, id)?;
        let output = self.drawn.iter().position(|&drawn| drawn == Some(id));
        output.ok_or(LlamaError::NothingDrawn { index: id.0 })
    }

    /// A step has drawn for these sequences.
    pub(crate) fn set_drawn(&mut self, sequences: impl Iterator<Item = SequenceId>) {
        self.drawn.clear();
        self.drawn.extend(sequences.map(Some));
    }

    fn make_room(&mut self, device: &D, feed: &Feed<'_>) -> Result<(), LlamaError> {
        let sequence = get(&self.sequences, feed.sequence)?;
        let sequence_len = sequence.len + feed.tokens.len();
        let needed = sequence_len.div_ceil(D::PAGE_LEN);
        let missing = needed.saturating_sub(sequence.pages.len());
        if missing > self.free_pages.len() {
            let pages = self.pages + missing - self.free_pages.len();
            // Doubling makes the copies of a growing store cost no more than the tokens themselves.
            if self.grow(device, pages.max(2 * self.pages)).is_err() {
                self.grow_to(device, pages, sequence_len)?;
            }
        }
        let taken = self.free_pages.split_off(self.free_pages.len() - missing);
        if let Some(Some(sequence)) = self.sequences.get_mut(feed.sequence.0) {
            sequence.pages.extend(taken.into_iter().rev());
        }
        Ok(())
    }
}

fn get(sequences: &[Option<Sequence>], id: SequenceId) -> Result<&Sequence, LlamaError> {
    let unknown = LlamaError::UnknownSequence { index: id.0 };
    sequences.get(id.0).and_then(Option::as_ref).ok_or(unknown)
}

impl<D: Backend> Stream<D> {
    fn new(device: &D) -> Result<Self, KernelError> {
        Ok(Self { capacity: 0, hidden: device.alloc(0)?, attention: device.alloc(0)? })
    }

    /// Makes room for `rows` rows; whether there was not enough.
    fn reserve(&mut self, device: &D, config: &LlamaConfig, rows: usize) -> Result<bool, KernelError> {
        if rows <= self.capacity {
            return Ok(false);
        }
        self.hidden = device.alloc(rows * config.hidden_size)?;
        self.attention = device.alloc(rows * config.q_features())?;
        self.capacity = rows;
        Ok(true)
    }
}

impl<D: Backend> Scratch<D> {
    fn new(device: &D) -> Result<Self, KernelError> {
        let empty = || device.alloc(0);
        Ok(Self {
            rows: Stream::new(device)?,
            outputs: Stream::new(device)?,
            qkv: empty()?,
            block: Block {
                norm: empty()?,
                delta: empty()?,
                gate_up: empty()?,
                inner: empty()?,
                workspace: Workspace::new(device, 0)?,
            },
            logits: empty()?,
        })
    }

    /// Makes room for `rows` rows, of which `outputs` get logits, and for `workspace` elements of kernels' scratch; whether
    /// anything has moved.
    pub(crate) fn reserve(
        &mut self,
        device: &D,
        config: &LlamaConfig,
        rows: usize,
        outputs: usize,
        workspace: usize,
    ) -> Result<bool, LlamaError> {
        let result = self.try_reserve(device, config, rows, outputs, workspace);
        if let Err(KernelError::OutOfGpuMemory { .. }) = result {
            // Some buffers are larger than before, others not: all go, and the next step takes them anew.
            *self = Self::new(device)?;
            let features = 4 * config.hidden_size + 2 * (config.q_features() + config.kv_features());
            let row = features + 3 * config.intermediate_size + workspace / rows.max(1);
            let mut fits = rows;
            while fits > 0 && device.alloc((fits * row).saturating_add(outputs * config.vocab_size)).is_err()
            {
                fits /= 2;
            }
            return Err(LlamaError::StepMemory { rows, fits });
        }
        Ok(result?)
    }

    fn try_reserve(
        &mut self,
        device: &D,
        config: &LlamaConfig,
        rows: usize,
        outputs: usize,
        workspace: usize,
    ) -> Result<bool, KernelError> {
        let mut moved = self.block.workspace.len() < workspace;
        if self.rows.reserve(device, config, rows)? {
            let (hidden, inner) = (config.hidden_size, config.intermediate_size);
            self.qkv = device.alloc(rows * (config.q_features() + 2 * config.kv_features()))?;
            self.block.norm = device.alloc(rows * hidden)?;
            self.block.delta = device.alloc(rows * hidden)?;
            self.block.gate_up = device.alloc(rows * 2 * inner)?;
            self.block.inner = device.alloc(rows * inner)?;
            moved = true;
        }
        if self.outputs.reserve(device, config, outputs)? {
            self.logits = device.alloc(outputs * config.vocab_size)?;
            moved = true;
        }
        self.block.workspace.reserve(device, workspace)?;
        Ok(moved)
    }
}
