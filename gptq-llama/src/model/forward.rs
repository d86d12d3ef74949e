use std::time::{Duration, Instant};

use gptq_kernels::{Backend, Draw, DrawnToken, Epilogue, KernelError, Linear, MatRef, Workspace};
use ndarray::Array2;

use super::{DecoderLayer, Llama, norm::OrderedNorm};
use crate::{
    KvCache, LlamaError, SequenceId,
    buffers::{mat, mat_mut},
    cache::{Block, Scratch, Stream, Timings},
};

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// The sequence they belong to.
    pub sequence: SequenceId,
    /// The tokens, at least one.
    pub tokens: &'a [u32],
    /// Which of them should give logits.
    pub logits: Wanted,
}

/// Rows whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: the tokens only go to the cache.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// Logits on the device: one row for every token they were wanted for, in the order of the feeds.
pub struct Logits<'a, D: Backend> {
    device: &'a D,
    matrix: MatRef<'a, D>,
}

impl<D: Backend> Logits<'_, D> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Copies them to the host, `(rows, vocab_size)`.
    pub fn to_array(&self) -> Result<Array2<f32>, LlamaError> {
        let mut array = Array2::zeros((self.matrix.rows(), self.matrix.cols()));
        let flat = array.as_slice_mut().expect("invariant: a new array is contiguous");
        self.device.download(self.matrix.data(), flat)?;
        Ok(array)
    }

    /// The likeliest token of each row, the first of equals; `None` if a row holds a NaN.
    pub fn argmax(&self) -> Result<Vec<Option<u32>>, LlamaError> {
        let mut tokens = vec![None; self.rows()];
        self.device.argmax(self.matrix, &mut tokens)?;
        Ok(tokens)
    }
}

/// Time since the last part, if timing is on.
struct Stopwatch<'a, D: Backend> {
    device: &'a D,
    timings: Option<&'a mut Timings>,
    last: Instant,
}

impl<D: Backend> Stopwatch<'_, D> {
    fn lap(&mut self, part: fn(&mut Timings) -> &mut Duration) -> Result<(), KernelError> {
        if let Some(timings) = &mut self.timings {
            self.device.synchronize()?;
            let now = Instant::now();
            *part(timings) += now - self.last;
            self.last = now;
        }
        Ok(())
    }
}

impl<D: Backend> Llama<D> {
    /// Runs new tokens of some sequences through the model, and stores their keys and values.
    ///
    /// What is computed for a sequence does not depend on the other sequences of the call, nor on how its tokens are
    /// distributed over calls, to the bit, as long as calls stay in one [row class](gptq_kernels::Linear::row_class) of the layers'
    /// kernels; those of the CPU have only one. Memory grows with the number of tokens in a call; long prompts are better fed
    /// in parts.
    ///
    /// Errors: [`LlamaError::NoTokens`], [`LlamaError::Token`], [`LlamaError::ContextLength`],
    /// [`LlamaError::UnknownSequence`], [`LlamaError::RepeatedSequence`], [`LlamaError::CacheMemory`],
    /// [`LlamaError::StepMemory`]; the cache is as before then.
    pub fn forward<'c>(
        &'c self,
        cache: &'c mut KvCache<D>,
        feeds: &[Feed<'_>],
    ) -> Result<Logits<'c, D>, LlamaError> {
        let outputs = self.pass(cache, feeds, &[], &[])?;
        cache.commit(feeds);
        let matrix = mat(&cache.scratch.logits, outputs, self.config.vocab_size)?;
        Ok(Logits { device: &self.device, matrix })
    }

    /// One forward pass; the sequences stay as long as they were until [`KvCache::commit`]. Gives the number of outputs.
    pub(super) fn pass(
        &self,
        cache: &mut KvCache<D>,
        feeds: &[Feed<'_>],
        drawn: &[DrawnToken],
        draws: &[Draw],
    ) -> Result<usize, LlamaError> {
        let (rows, outputs) = cache.plan(&self.device, &self.config, feeds, drawn, draws)?;
        let workspace = self.workspace_len(&cache.step, rows, outputs);
        let moved = cache.scratch.reserve(&self.device, &self.config, rows, outputs, workspace);
        if !matches!(moved, Ok(false)) {
            cache.recordings = D::Recordings::default();
        }
        moved?;
        let KvCache { store, rope, step, scratch, recordings, timings, .. } = &mut *cache;
        let draw = !draws.is_empty();
        let mut pass = Pass { model: self, rope, step, store, scratch, rows, outputs, draw };
        match timings {
            // Waiting for each part cannot be recorded.
            Some(timings) => self.device.run(|| pass.run(Some(timings)))?,
            None => self.device.replay(recordings, self.id, step, || pass.run(None))?,
        }
        Ok(outputs)
    }

    fn workspace_len(&self, step: &D::Step, rows: usize, outputs: usize) -> usize {
        let linear = |linear: &dyn Linear<D>, rows| linear.workspace_len(rows);
        let layers = self.layers.iter().map(|layer| {
            let linears = layer.qkv.linears().chain(layer.gate_up.linears());
            let linears = linears.chain([layer.o.as_ref(), layer.down.as_ref()]);
            let attention = self.device.attention_workspace_len(step, layer.attention);
            linears.map(|l| linear(l, rows)).max().unwrap_or(0).max(attention)
        });
        layers.max().unwrap_or(0).max(linear(self.lm_head.as_ref(), outputs))
    }
}

/// One forward pass: what it reads and where it writes.
struct Pass<'a, D: Backend> {
    model: &'a Llama<D>,
    rope: &'a D::Rope,
    step: &'a D::Step,
    store: &'a mut D::KvStore,
    scratch: &'a mut Scratch<D>,
    rows: usize,
    outputs: usize,
    draw: bool,
}

/// Whether a block's sum has been added to the stream, or waits in `block.delta` for the next norm to add it.
#[derive(Clone, Copy, PartialEq)]
enum Residual {
    Added,
    Waiting,
}

impl<D: Backend> Pass<'_, D> {
    fn run(&mut self, mut timings: Option<&mut Timings>) -> Result<(), LlamaError> {
        let Self { model, rope, step, rows, outputs, draw, .. } = *self;
        let (device, config) = (&model.device, &model.config);
        let hidden = config.hidden_size;
        if let Some(timings) = &mut timings {
            timings.steps += 1;
        }
        let Scratch { rows: stream, outputs: chosen, qkv, block, logits } = &mut *self.scratch;
        let mut watch = Stopwatch { device, timings, last: Instant::now() };
        device.embed(&model.embedding, step, mat_mut(&mut stream.hidden, rows, hidden)?)?;
        let mut residual = Residual::Added;
        let last = model.layers.len() - 1;
        for (i, layer) in model.layers.iter().enumerate() {
            model.normalise(residual, &layer.input_norm, layer.qkv.linears().next(), stream, block, rows)?;
            watch.lap(|t| &mut t.norms)?;
            layer.qkv.forward(mat(&block.norm, rows, hidden)?, qkv, &mut block.workspace)?;
            watch.lap(|t| &mut t.qkv)?;
            let (shape, x) = (layer.attention, mat_mut(qkv, rows, layer.qkv.features())?);
            if i == last && outputs == 0 {
                device.rope_append(i, shape, step, rope, x, self.store)?;
                watch.lap(|t| &mut t.attention)?;
                break;
            }
            let width = shape.out_features();
            let y = mat_mut(&mut stream.attention, rows, width)?;
            let order = layer.attention_order.as_ref();
            device.attend(i, shape, step, rope, x, self.store, order, y, &mut block.workspace)?;
            watch.lap(|t| &mut t.attention)?;
            // After the last attention only the rows that give logits matter. Rows of outputs rise, so that as many outputs
            // as rows are all of them.
            let (stream, rows) = if i == last && outputs < rows {
                let y = mat_mut(&mut chosen.hidden, outputs, hidden)?;
                device.gather_outputs(step, mat(&stream.hidden, rows, hidden)?, y)?;
                let y = mat_mut(&mut chosen.attention, outputs, width)?;
                device.gather_outputs(step, mat(&stream.attention, rows, width)?, y)?;
                watch.lap(|t| &mut t.norms)?;
                (&mut *chosen, outputs)
            } else {
                (&mut *stream, rows)
            };
            residual = model.finish_layer(layer, stream, block, rows, &mut watch)?;
            if i == last {
                model.normalise(residual, &model.norm, Some(model.lm_head.as_ref()), stream, block, rows)?;
                watch.lap(|t| &mut t.norms)?;
                let y = mat_mut(logits, rows, config.vocab_size)?;
                model.lm_head.forward(mat(&block.norm, rows, hidden)?, y, &mut block.workspace)?;
                watch.lap(|t| &mut t.lm_head)?;
                if draw {
                    device.draw(step, mat(logits, rows, config.vocab_size)?)?;
                    watch.lap(|t| &mut t.draw)?;
                }
            }
        }
        Ok(())
    }
}

impl<D: Backend> Llama<D> {
    /// `block.norm = norm(hidden)`, in the order of the layers behind it, of which `next` is the first, after what waits has been added.
    fn normalise(
        &self,
        residual: Residual,
        norm: &OrderedNorm<D>,
        next: Option<&dyn Linear<D>>,
        stream: &mut Stream<D>,
        block: &mut Block<D>,
        rows: usize,
    ) -> Result<(), KernelError> {
        let (device, hidden) = (&self.device, self.config.hidden_size);
        let y = mat_mut(&mut block.norm, rows, hidden)?;
        match residual {
            Residual::Added => norm.forward(device, next, mat(&stream.hidden, rows, hidden)?, y),
            Residual::Waiting => {
                let x = mat_mut(&mut stream.hidden, rows, hidden)?;
                norm.add_and_forward(device, x, mat(&block.delta, rows, hidden)?, y)
            }
        }
    }

    /// `hidden += linear(x)`, or `block.delta = linear(x)` if the kernel does not add.
    fn project(
        &self,
        linear: &dyn Linear<D>,
        x: MatRef<'_, D>,
        hidden: &mut D::Buffer,
        delta: &mut D::Buffer,
        workspace: &mut Workspace<D>,
    ) -> Result<Residual, KernelError> {
        let (y, residual) = match linear.spec().epilogue {
            Epilogue::Add => (hidden, Residual::Added),
            _ => (delta, Residual::Waiting),
        };
        linear.forward(x, mat_mut(y, x.rows(), self.config.hidden_size)?, workspace)?;
        Ok(residual)
    }

    /// Everything of a layer after its attention.
    fn finish_layer(
        &self,
        layer: &DecoderLayer<D>,
        stream: &mut Stream<D>,
        block: &mut Block<D>,
        rows: usize,
        watch: &mut Stopwatch<'_, D>,
    ) -> Result<Residual, KernelError> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let x = mat(&stream.attention, rows, layer.attention.out_features())?;
        let Block { delta, workspace, .. } = block;
        let residual = self.project(layer.o.as_ref(), x, &mut stream.hidden, delta, workspace)?;
        watch.lap(|t| &mut t.o)?;
        self.normalise(residual, &layer.post_norm, layer.gate_up.linears().next(), stream, block, rows)?;
        watch.lap(|t| &mut t.norms)?;
        let x = mat(&block.norm, rows, hidden)?;
        if layer.gate_up.is_fused() {
            layer.gate_up.forward(x, &mut block.inner, &mut block.workspace)?;
            watch.lap(|t| &mut t.gate_up)?;
        } else {
            layer.gate_up.forward(x, &mut block.gate_up, &mut block.workspace)?;
            watch.lap(|t| &mut t.gate_up)?;
            let x = mat(&block.gate_up, rows, 2 * inner)?;
            self.device.silu_mul(x, mat_mut(&mut block.inner, rows, inner)?)?;
            watch.lap(|t| &mut t.activation)?;
        }
        let Block { inner: x, delta, workspace, .. } = block;
        let x = mat(x, rows, inner)?;
        let residual = self.project(layer.down.as_ref(), x, &mut stream.hidden, delta, workspace)?;
        watch.lap(|t| &mut t.down)?;
        Ok(residual)
    }
}
