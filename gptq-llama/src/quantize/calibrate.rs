use std::path::PathBuf;

use gptq_kernels::{Backend, KernelError, KvShape, SequencePlan, StepPlan, Workspace};
use ndarray::Array2;

use super::{
    activations::{Activations, Budget, Shares},
    layer::{Decoder, Stage},
};
use crate::{
    LlamaConfig, LlamaError, TokenRows, WeightSource,
    buffers::{mat, mat_mut},
    names,
    weights::read_tensor,
};

/// Takes calibration rows through a decoder layer, stage by stage.
pub(super) struct Calibration<'a, D: Backend> {
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
    qkv: D::Buffer,
    gate_up: D::Buffer,
    delta: D::Buffer,
    workspace: Workspace<D>,
}

/// The residual stream of all rows, and what a stage has computed for the next one.
pub(super) struct Stream<D: Backend> {
    hidden: Activations<D>,
    kept: Activations<D>,
}

impl<'a, D: Backend> Calibration<'a, D> {
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
        let shape = KvShape { layers: 1, kv_heads: config.kv_heads, head_dim: config.head_dim, pages };
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let alloc = |features: usize| device.alloc(longest * features);
        Ok(Self {
            device,
            config,
            source,
            rows,
            keep_inner: budget.spill.is_some()
                || rows.tokens().saturating_mul(inner).saturating_mul(size_of::<f32>()) <= budget.bytes,
            shares: budget.divide(rows, streams, hidden, inner.max(config.q_features())),
            spill: budget.spill.clone(),
            rope: device.rope(&cos, &sin, config.head_dim)?,
            store: device.kv_store(shape)?,
            pages: (0..pages as u32).collect(),
            step: device.new_step()?,
            norm: alloc(hidden)?,
            qkv: alloc(config.q_features() + 2 * config.kv_features())?,
            gate_up: alloc(2 * inner)?,
            delta: alloc(hidden)?,
            workspace: Workspace::new(device, 0)?,
        })
    }

    pub(super) fn device(&self) -> &'a D {
        self.device
    }

    pub(super) fn rows(&self) -> usize {
        self.rows.rows().len()
    }

    fn set_step(&mut self, row: usize) -> Result<usize, KernelError> {
        let tokens = &self.rows.rows()[row];
        let sequence = SequencePlan { rows: 0..tokens.len(), past: 0, pages: &self.pages };
        let plan = StepPlan { tokens, sequences: &[sequence], outputs: &[] };
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
            let mut buffer = self.device.alloc(tokens * hidden)?;
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
            let mut copy = self.device.alloc(tokens.len() * hidden)?;
            let tokens = tokens.len();
            self.device.add(mat(&buffer, tokens, hidden)?, mat_mut(&mut copy, tokens, hidden)?)?;
            stream.hidden.put_unchanged(row, buffer);
            copies.hidden.put(self.device, row, copy)?;
        }
        Ok(copies)
    }

    /// Takes a row to the entry of `stage` and returns that stage's inputs, `(tokens, in_features)`.
    pub(super) fn inputs(
        &mut self,
        stage: Stage,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        row: usize,
    ) -> Result<Array2<f32>, LlamaError> {
        self.advance(stage, decoder, stream, row)?;
        let tokens = self.rows.rows()[row].len();
        let features = stage.modules()[0].shape(self.config).0;
        match stage {
            Stage::Qkv | Stage::GateUp => self.download(&self.norm, tokens, features),
            Stage::O | Stage::Down => {
                let kept = stream.kept.take(self.device, row)?;
                let inputs = self.download(&kept, tokens, features)?;
                if stage == Stage::O || self.keep_inner {
                    stream.kept.put_unchanged(row, kept);
                }
                Ok(inputs)
            }
        }
    }

    fn download(&self, buffer: &D::Buffer, rows: usize, cols: usize) -> Result<Array2<f32>, LlamaError> {
        let mut array = Array2::zeros((rows, cols));
        let flat = array.as_slice_mut().expect("invariant: a new array is contiguous");
        self.device.download(D::slice(buffer, 0..rows * cols), flat)?;
        Ok(array)
    }

    /// A row of the residual stream behind a norm, `(tokens, hidden_size)`.
    pub(super) fn normalized(
        &mut self,
        weight: &D::Buffer,
        stream: &mut Stream<D>,
        row: usize,
    ) -> Result<Array2<f32>, LlamaError> {
        self.norm(weight, stream, row)?;
        self.download(&self.norm, self.rows.rows()[row].len(), self.config.hidden_size)
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
        self.device.rms_norm(mat(&buffer, tokens, hidden)?, weight, self.config.rms_norm_eps, y)?;
        stream.hidden.put_unchanged(row, buffer);
        Ok(())
    }

    /// `kept = attention(q, k, v of norm(hidden))`
    fn attend(&mut self, decoder: &Decoder<D>, stream: &mut Stream<D>, row: usize) -> Result<(), LlamaError> {
        self.norm(&decoder.input_norm, stream, row)?;
        let tokens = self.set_step(row)?;
        self.run(Stage::Qkv, decoder, tokens)?;
        let (shape, device) = (decoder.attention, self.device);
        let features = shape.qkv_features();
        let qkv = mat_mut(&mut self.qkv, tokens, features)?;
        device.rope_append(0, shape, &self.step, &self.rope, qkv, &mut self.store)?;
        let mut out = device.alloc(tokens * shape.out_features())?;
        self.workspace.reserve(device, device.attention_workspace_len(&self.step, shape))?;
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
        self.run(Stage::GateUp, decoder, tokens)?;
        let x = mat(&self.gate_up, tokens, 2 * inner)?;
        let mut out = self.device.alloc(tokens * inner)?;
        self.device.silu_mul(x, mat_mut(&mut out, tokens, inner)?)?;
        stream.kept.put(self.device, row, out)
    }

    /// Runs the projections that read `self.norm`.
    fn run(&mut self, stage: Stage, decoder: &Decoder<D>, tokens: usize) -> Result<(), LlamaError> {
        let projections = decoder.stage(stage);
        let y = if stage == Stage::Qkv { &mut self.qkv } else { &mut self.gate_up };
        self.workspace.reserve(self.device, projections.workspace_len(tokens))?;
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
        self.workspace.reserve(self.device, projections.workspace_len(tokens))?;
        let x = mat(x, tokens, stage.modules()[0].shape(self.config).0)?;
        projections.forward(x, &mut self.delta, &mut self.workspace)?;
        let delta = mat(&self.delta, tokens, hidden)?;
        let mut buffer = stream.hidden.take(self.device, row)?;
        self.device.add(delta, mat_mut(&mut buffer, tokens, hidden)?)?;
        stream.hidden.put(self.device, row, buffer)
    }
}
