use std::path::PathBuf;

use gptq_kernels::{
    KernelError, KvFormat, KvShape, MatRef, SequencePlan, StepPlan, Workspace, quantize::QuantizeBackend,
};

use super::{
    activations::{Activations, Budget, Evicted, Shares},
    layer::{Decoder, Stage},
};
use crate::{
    LlamaConfig, LlamaError, TokenRows, WeightSource,
    buffers::{mat, mat_mut},
    names,
    weights::read_tensor,
};

/// Takes calibration rows through a decoder layer, stage by stage.
pub(super) struct Calibration<'a, D: QuantizeBackend> {
    device: &'a D,
    config: &'a LlamaConfig,
    source: &'a dyn WeightSource,
    rows: &'a TokenRows,
    /// Whether the inputs of the down projection are kept until the layer is finished; otherwise they are computed
    /// again.
    keep_inner: bool,
    /// What a stream may have in memory, and where the rest goes.
    shares: Shares,
    spill: Option<PathBuf>,
    rope: D::Rope,
    /// One sequence of one layer; every row overwrites the one before.
    store: D::KvStore,
    pages: Vec<u32>,
    step: D::Step,
    norm: D::Buffer,
    /// Another, for the inputs of the quantised model while `norm` has those of the other one; empty until then.
    spare: D::Buffer,
    qkv: D::Buffer,
    gate_up: D::Buffer,
    delta: D::Buffer,
    workspace: Workspace<D>,
}

/// The residual stream of all rows, and what a stage has computed for the next one.
pub(super) struct Stream<D: QuantizeBackend> {
    hidden: Activations<D>,
    kept: Activations<D>,
}

impl<D: QuantizeBackend> Stream<D> {
    /// Moves rows to the host; whether there were any.
    pub(super) fn make_room(&mut self, device: &D) -> Result<bool, LlamaError> {
        Ok(self.kept.evict(device)? > 0 || self.hidden.evict(device)? > 0)
    }

    /// A buffer on the device for a row of `kept`, which other rows leave for it if they must.
    fn alloc(&mut self, device: &D, len: usize) -> Result<D::Buffer, LlamaError> {
        self.with_room(device, || device.alloc(len))
    }

    /// How often rows had to leave the device since this was asked last.
    pub(super) fn take_evicted(&mut self) -> Vec<Evicted> {
        let mut evicted = self.kept.take_evicted();
        evicted.append(&mut self.hidden.take_evicted());
        evicted
    }

    /// Does `work`, again with fewer rows on the device as long as its memory is too small for it.
    fn with_room<R>(
        &mut self,
        device: &D,
        mut work: impl FnMut() -> Result<R, KernelError>,
    ) -> Result<R, LlamaError> {
        loop {
            match work() {
                Err(KernelError::OutOfGpuMemory { .. }) if self.make_room(device)? => {}
                result => return Ok(result?),
            }
        }
    }

    /// Rows of the residual stream and of the other activation on the device, and in the host's memory if that is another.
    pub(super) fn places(&self) -> [(usize, usize); 2] {
        [self.hidden.places(), self.kept.places()]
    }
}

impl<'a, D: QuantizeBackend> Calibration<'a, D> {
    pub(super) fn new(
        device: &'a D,
        config: &'a LlamaConfig,
        source: &'a dyn WeightSource,
        rows: &'a TokenRows,
        budget: &Budget,
        streams: usize,
    ) -> Result<Self, LlamaError> {
        let longest = rows.longest();
        let (cos, sin) = config.rope.table(config.head_dim, longest);
        let pages = longest.div_ceil(D::PAGE_LEN);
        let (kv_heads, head_dim, format) = (config.kv_heads, config.head_dim, KvFormat::Activations);
        let shape = KvShape { layers: 1, kv_heads, head_dim, pages, format };
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let alloc = |features: usize| device.alloc(longest * features);
        Ok(Self {
            device,
            config,
            source,
            rows,
            keep_inner: budget.spill.is_some()
                || budget.bytes_of(rows, inner) <= budget.bytes.saturating_add(budget.device.unwrap_or(0)),
            shares: budget.divide(rows, streams, hidden, inner.max(config.q_features())),
            spill: budget.spill.clone(),
            rope: device.rope(&cos, &sin, config.head_dim)?,
            store: device.kv_store(shape)?,
            pages: (0..pages as u32).collect(),
            step: device.new_step()?,
            norm: alloc(hidden)?,
            spare: device.alloc(0)?,
            qkv: alloc(config.q_features() + 2 * config.kv_features())?,
            gate_up: alloc(2 * inner)?,
            delta: alloc(hidden)?,
            workspace: Workspace::new(device, 0)?,
        })
    }

    pub(super) fn rows(&self) -> usize {
        self.rows.rows().len()
    }

    fn set_step(&mut self, row: usize) -> Result<usize, KernelError> {
        let tokens = &self.rows.rows()[row];
        let sequence = SequencePlan { rows: 0..tokens.len(), past: 0, pages: &self.pages };
        let plan = StepPlan { tokens, sequences: &[sequence], ..StepPlan::default() };
        self.device.set_step(&mut self.step, &plan)?;
        Ok(tokens.len())
    }

    /// The streams at the entry of the first layer.
    pub(super) fn embed(&mut self) -> Result<Stream<D>, LlamaError> {
        let (vocabulary, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let table = read_tensor(self.source, names::EMBEDDING, &[vocabulary, hidden])?;
        let table = self.device.embedding(&table.as_dense(None))?;
        let mut stream = self.empty()?;
        for row in 0..self.rows() {
            let tokens = self.set_step(row)?;
            let mut buffer = stream.hidden.alloc(self.device, tokens * hidden)?;
            self.device.embed(&table, &self.step, mat_mut(&mut buffer, tokens, hidden)?)?;
            stream.hidden.put(self.device, row, buffer)?;
        }
        Ok(stream)
    }

    /// A stream without content.
    fn empty(&self) -> Result<Stream<D>, LlamaError> {
        let kept = self.config.intermediate_size.max(self.config.q_features());
        let (shares, spill) = (self.shares, self.spill.as_deref());
        Ok(Stream {
            hidden: Activations::new(self.rows, self.config.hidden_size, shares.hidden, spill)?,
            kept: Activations::new(self.rows, kept, shares.kept, spill)?,
        })
    }

    /// A second stream with the same content.
    pub(super) fn copy(&self, stream: &mut Stream<D>) -> Result<Stream<D>, LlamaError> {
        let hidden = self.config.hidden_size;
        let mut copies = self.empty()?;
        for (row, tokens) in self.rows.rows().iter().enumerate() {
            let buffer = stream.hidden.take(self.device, row)?;
            // Adding to zeros copies exactly; a device need not have another way.
            let tokens = tokens.len();
            let mut copy = copies.hidden.alloc(self.device, tokens * hidden)?;
            self.device.add(mat(&buffer, tokens, hidden)?, mat_mut(&mut copy, tokens, hidden)?)?;
            stream.hidden.put_unchanged(self.device, row, buffer)?;
            copies.hidden.put(self.device, row, copy)?;
        }
        Ok(copies)
    }

    /// Takes a row to the entry of `stage`, and the row of the unquantised model if there is one, and lends both stages'
    /// inputs, `(tokens, in_features)`.
    pub(super) fn inputs(
        &mut self,
        stage: Stage,
        (decoder, stream): (&Decoder<D>, &mut Stream<D>),
        reference: Option<(&Decoder<D>, &mut Stream<D>)>,
        row: usize,
        work: impl FnOnce(MatRef<'_, D>, Option<MatRef<'_, D>>) -> Result<(), LlamaError>,
    ) -> Result<(), LlamaError> {
        self.advance(stage, decoder, stream, row)?;
        let kept = self.take_kept(stage, stream, row)?;
        let Some((decoder, other)) = reference else {
            let inputs = self.matrix(stage, kept.as_ref().unwrap_or(&self.norm), row)?;
            work(inputs, None)?;
            return self.put_kept(stage, stream, row, kept);
        };
        self.swap_norms()?;
        self.advance(stage, decoder, other, row)?;
        let other_kept = self.take_kept(stage, other, row)?;
        let inputs = self.matrix(stage, kept.as_ref().unwrap_or(&self.spare), row)?;
        let others = self.matrix(stage, other_kept.as_ref().unwrap_or(&self.norm), row)?;
        work(inputs, Some(others))?;
        self.put_kept(stage, stream, row, kept)?;
        self.put_kept(stage, other, row, other_kept)
    }

    /// The inputs of a stage that [`advance`](Self::advance) has left among the activations; those of others are in `norm`.
    fn take_kept(
        &self,
        stage: Stage,
        stream: &mut Stream<D>,
        row: usize,
    ) -> Result<Option<D::Buffer>, LlamaError> {
        match stage {
            Stage::Qkv | Stage::GateUp => Ok(None),
            Stage::O | Stage::Down => stream.kept.take(self.device, row).map(Some),
        }
    }

    fn put_kept(
        &self,
        stage: Stage,
        stream: &mut Stream<D>,
        row: usize,
        kept: Option<D::Buffer>,
    ) -> Result<(), LlamaError> {
        match kept {
            Some(kept) if stage == Stage::O || self.keep_inner => {
                stream.kept.put_unchanged(self.device, row, kept)
            }
            _ => Ok(()),
        }
    }

    fn matrix<'b>(
        &self,
        stage: Stage,
        buffer: &'b D::Buffer,
        row: usize,
    ) -> Result<MatRef<'b, D>, LlamaError> {
        let features = stage.modules()[0].shape(self.config).0;
        Ok(mat(buffer, self.rows.rows()[row].len(), features)?)
    }

    fn swap_norms(&mut self) -> Result<(), LlamaError> {
        if D::buffer_len(&self.spare) == 0 {
            self.spare = self.device.alloc(D::buffer_len(&self.norm))?;
        }
        std::mem::swap(&mut self.norm, &mut self.spare);
        Ok(())
    }

    /// Lends a row of the residual stream behind a norm, `(tokens, hidden_size)`, and of the unquantised model's.
    pub(super) fn normalized(
        &mut self,
        weight: &D::Buffer,
        stream: &mut Stream<D>,
        reference: Option<&mut Stream<D>>,
        row: usize,
        work: impl FnOnce(MatRef<'_, D>, Option<MatRef<'_, D>>) -> Result<(), LlamaError>,
    ) -> Result<(), LlamaError> {
        let (tokens, hidden) = (self.rows.rows()[row].len(), self.config.hidden_size);
        self.norm(weight, stream, row)?;
        let Some(reference) = reference else {
            return work(mat(&self.norm, tokens, hidden)?, None);
        };
        self.swap_norms()?;
        self.norm(weight, reference, row)?;
        work(mat(&self.spare, tokens, hidden)?, Some(mat(&self.norm, tokens, hidden)?))
    }

    /// [`advance`](Self::advance) where nobody wants to see the inputs of `stage`.
    pub(super) fn pass(
        &mut self,
        stage: Stage,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        row: usize,
    ) -> Result<(), LlamaError> {
        match stage {
            // Computed again by whoever needs it.
            Stage::Qkv => Ok(()),
            Stage::Down if !self.keep_inner => Ok(()),
            _ => self.advance(stage, decoder, stream, row),
        }
    }

    /// Takes a row to the entry of `stage`; it stands at the entry of the stage before.
    pub(super) fn advance(
        &mut self,
        stage: Stage,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        row: usize,
    ) -> Result<(), LlamaError> {
        match stage {
            Stage::Qkv => self.norm(&decoder.input_norm, stream, row),
            Stage::O => self.attend(decoder, stream, row),
            Stage::GateUp => {
                let attention = stream.kept.take(self.device, row)?;
                self.project(Stage::O, decoder, stream, row, &attention)?;
                self.norm(&decoder.post_norm, stream, row)
            }
            Stage::Down => self.activate(decoder, stream, row),
        }
    }

    /// Takes a row from the entry of the down projection to the next layer.
    pub(super) fn finish(
        &mut self,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        row: usize,
    ) -> Result<(), LlamaError> {
        if stream.kept.is_empty(row) {
            self.activate(decoder, stream, row)?;
        }
        let inner = stream.kept.take(self.device, row)?;
        self.project(Stage::Down, decoder, stream, row, &inner)
    }

    /// `self.norm = norm(hidden)`
    fn norm(&mut self, weight: &D::Buffer, stream: &mut Stream<D>, row: usize) -> Result<(), LlamaError> {
        let (tokens, hidden) = (self.rows.rows()[row].len(), self.config.hidden_size);
        let weight = D::slice(weight, 0..hidden);
        let buffer = stream.hidden.take(self.device, row)?;
        let y = mat_mut(&mut self.norm, tokens, hidden)?;
        self.device.rms_norm(mat(&buffer, tokens, hidden)?, weight, self.config.rms_norm_eps, None, y)?;
        stream.hidden.put_unchanged(self.device, row, buffer)
    }

    /// `kept = attention(q, k, v of norm(hidden))`
    fn attend(&mut self, decoder: &Decoder<D>, stream: &mut Stream<D>, row: usize) -> Result<(), LlamaError> {
        self.norm(&decoder.input_norm, stream, row)?;
        let tokens = self.set_step(row)?;
        self.run(Stage::Qkv, decoder, stream, tokens)?;
        let (shape, device) = (decoder.attention, self.device);
        let features = shape.qkv_features();
        let qkv = mat_mut(&mut self.qkv, tokens, features)?;
        device.rope_append(0, shape, &self.step, &self.rope, qkv, &mut self.store)?;
        let mut out = stream.alloc(device, tokens * shape.out_features())?;
        let scratch = device.attention_workspace_len(&self.step, shape);
        stream.with_room(device, || self.workspace.reserve(device, scratch))?;
        let qkv = mat(&self.qkv, tokens, features)?;
        let y = mat_mut(&mut out, tokens, shape.out_features())?;
        device.attention(0, shape, &self.step, &self.store, qkv, y, &mut self.workspace)?;
        stream.kept.put(self.device, row, out)
    }

    /// `kept = silu(gate) * up of norm(hidden)`
    fn activate(
        &mut self,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        row: usize,
    ) -> Result<(), LlamaError> {
        self.norm(&decoder.post_norm, stream, row)?;
        let (tokens, inner) = (self.rows.rows()[row].len(), self.config.intermediate_size);
        self.run(Stage::GateUp, decoder, stream, tokens)?;
        let x = mat(&self.gate_up, tokens, 2 * inner)?;
        let mut out = stream.alloc(self.device, tokens * inner)?;
        self.device.silu_mul(x, mat_mut(&mut out, tokens, inner)?)?;
        stream.kept.put(self.device, row, out)
    }

    /// Runs the projections that read `self.norm`.
    fn run(
        &mut self,
        stage: Stage,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        tokens: usize,
    ) -> Result<(), LlamaError> {
        let projections = decoder.stage(stage);
        let y = if stage == Stage::Qkv { &mut self.qkv } else { &mut self.gate_up };
        let scratch = projections.workspace_len(tokens);
        stream.with_room(self.device, || self.workspace.reserve(self.device, scratch))?;
        let x = mat(&self.norm, tokens, self.config.hidden_size)?;
        Ok(projections.forward(x, y, &mut self.workspace)?)
    }

    /// `hidden += stage(x)` for the o or down projection.
    fn project(
        &mut self,
        stage: Stage,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        row: usize,
        x: &D::Buffer,
    ) -> Result<(), LlamaError> {
        let (tokens, hidden) = (self.rows.rows()[row].len(), self.config.hidden_size);
        let projections = decoder.stage(stage);
        let scratch = projections.workspace_len(tokens);
        stream.with_room(self.device, || self.workspace.reserve(self.device, scratch))?;
        let x = mat(x, tokens, stage.modules()[0].shape(self.config).0)?;
        projections.forward(x, &mut self.delta, &mut self.workspace)?;
        let delta = mat(&self.delta, tokens, hidden)?;
        let mut buffer = stream.hidden.take(self.device, row)?;
        self.device.add(delta, mat_mut(&mut buffer, tokens, hidden)?)?;
        stream.hidden.put(self.device, row, buffer)
    }
}
