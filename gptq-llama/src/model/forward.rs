use std::time::{Duration, Instant};

use gptq_kernels::{Backend, KernelError, Linear, MatRef};
use ndarray::Array2;

use super::{DecoderLayer, Llama};
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

/// A whole buffer.
fn all<D: Backend>(buffer: &D::Buffer) -> D::Slice<'_> {
    D::slice(buffer, 0..D::buffer_len(buffer))
}

impl<D: Backend> Llama<D> {
    /// Runs new tokens of some sequences through the model, and stores their keys and values.
    ///
    /// What is computed for a sequence does not depend on the other sequences of the call, nor on how its tokens are
    /// distributed over calls, to the bit. Memory grows with the number of tokens in a call; long prompts are better fed
    /// in parts.
    ///
    /// Errors: [`LlamaError::NoTokens`], [`LlamaError::Token`], [`LlamaError::ContextLength`],
    /// [`LlamaError::UnknownSequence`], [`LlamaError::RepeatedSequence`]; the cache is as before then.
    pub fn forward<'c>(
        &'c self,
        cache: &'c mut KvCache<D>,
        feeds: &[Feed<'_>],
    ) -> Result<Logits<'c, D>, LlamaError> {
        let (rows, outputs) = cache.plan(&self.device, &self.config, feeds)?;
        let workspace = self.workspace_len(rows, outputs);
        cache.scratch.reserve(&self.device, &self.config, rows, outputs, workspace)?;
        self.device.run(|| self.run(cache, rows, outputs))?;
        cache.commit(feeds);
        let matrix = mat(&cache.scratch.logits, outputs, self.config.vocab_size)?;
        Ok(Logits { device: &self.device, matrix })
    }

    fn workspace_len(&self, rows: usize, outputs: usize) -> usize {
        let linear = |linear: &dyn Linear<D>, rows| linear.workspace_len(rows);
        let layers = self.layers.iter().map(|layer| {
            let linears = layer.qkv.linears().chain(layer.gate_up.linears());
            let linears = linears.chain([layer.o.as_ref(), layer.down.as_ref()]);
            let attention = self.device.attention_workspace_len(rows, layer.attention);
            linears.map(|l| linear(l, rows)).max().unwrap_or(0).max(attention)
        });
        layers.max().unwrap_or(0).max(linear(self.lm_head.as_ref(), outputs))
    }

    fn run(&self, cache: &mut KvCache<D>, rows: usize, outputs: usize) -> Result<(), LlamaError> {
        let (device, hidden) = (&self.device, self.config.hidden_size);
        let eps = self.config.rms_norm_eps;
        let KvCache { store, rope, step, scratch, timings, .. } = cache;
        let Scratch { rows: stream, outputs: chosen, qkv, block, logits } = scratch;
        if let Some(timings) = timings {
            timings.steps += 1;
        }
        let mut watch = Stopwatch { device, timings: timings.as_mut(), last: Instant::now() };
        device.embed(&self.embedding, step, mat_mut(&mut stream.hidden, rows, hidden)?)?;
        let last = self.layers.len() - 1;
        for (i, layer) in self.layers.iter().enumerate() {
            let norm = mat_mut(&mut block.norm, rows, hidden)?;
            let weight = all::<D>(&layer.input_norm);
            if i == 0 {
                device.rms_norm(mat(&stream.hidden, rows, hidden)?, weight, eps, norm)?;
            } else {
                let residual = mat_mut(&mut stream.hidden, rows, hidden)?;
                device.add_rms_norm(residual, mat(&block.delta, rows, hidden)?, weight, eps, norm)?;
            }
            watch.lap(|t| &mut t.norms)?;
            layer.qkv.forward(mat(&block.norm, rows, hidden)?, qkv, &mut block.workspace)?;
            watch.lap(|t| &mut t.qkv)?;
            let (shape, features) = (layer.attention, layer.qkv.features());
            device.rope_append(i, shape, step, rope, mat_mut(qkv, rows, features)?, store)?;
            watch.lap(|t| &mut t.rope)?;
            if i == last && outputs == 0 {
                break;
            }
            let width = shape.out_features();
            let y = mat_mut(&mut stream.attention, rows, width)?;
            let x = mat(qkv, rows, features)?;
            device.attention(i, shape, step, store, x, y, &mut block.workspace)?;
            watch.lap(|t| &mut t.attention)?;
            if i < last {
                self.finish_layer(layer, stream, block, rows, &mut watch)?;
                continue;
            }
            // After the last attention only the rows that give logits matter.
            let y = mat_mut(&mut chosen.hidden, outputs, hidden)?;
            device.gather_outputs(step, mat(&stream.hidden, rows, hidden)?, y)?;
            let y = mat_mut(&mut chosen.attention, outputs, width)?;
            device.gather_outputs(step, mat(&stream.attention, rows, width)?, y)?;
            watch.lap(|t| &mut t.norms)?;
            self.finish_layer(layer, chosen, block, outputs, &mut watch)?;
            let residual = mat_mut(&mut chosen.hidden, outputs, hidden)?;
            let norm = mat_mut(&mut block.norm, outputs, hidden)?;
            let delta = mat(&block.delta, outputs, hidden)?;
            device.add_rms_norm(residual, delta, all::<D>(&self.norm), eps, norm)?;
            watch.lap(|t| &mut t.norms)?;
            let x = mat(&block.norm, outputs, hidden)?;
            let y = mat_mut(logits, outputs, self.config.vocab_size)?;
            self.lm_head.forward(x, y, &mut block.workspace)?;
            watch.lap(|t| &mut t.lm_head)?;
        }
        Ok(())
    }

    /// Everything of a layer after its attention, but the addition of `block.delta`.
    fn finish_layer(
        &self,
        layer: &DecoderLayer<D>,
        stream: &mut Stream<D>,
        block: &mut Block<D>,
        rows: usize,
        watch: &mut Stopwatch<'_, D>,
    ) -> Result<(), LlamaError> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let x = mat(&stream.attention, rows, layer.attention.out_features())?;
        layer.o.forward(x, mat_mut(&mut block.delta, rows, hidden)?, &mut block.workspace)?;
        watch.lap(|t| &mut t.o)?;
        let residual = mat_mut(&mut stream.hidden, rows, hidden)?;
        let norm = mat_mut(&mut block.norm, rows, hidden)?;
        let delta = mat(&block.delta, rows, hidden)?;
        let weight = all::<D>(&layer.post_norm);
        self.device.add_rms_norm(residual, delta, weight, self.config.rms_norm_eps, norm)?;
        watch.lap(|t| &mut t.norms)?;
        layer.gate_up.forward(mat(&block.norm, rows, hidden)?, &mut block.gate_up, &mut block.workspace)?;
        watch.lap(|t| &mut t.gate_up)?;
        let x = mat(&block.gate_up, rows, 2 * inner)?;
        self.device.silu_mul(x, mat_mut(&mut block.inner, rows, inner)?)?;
        watch.lap(|t| &mut t.activation)?;
        let x = mat(&block.inner, rows, inner)?;
        layer.down.forward(x, mat_mut(&mut block.delta, rows, hidden)?, &mut block.workspace)?;
        watch.lap(|t| &mut t.down)?;
        Ok(())
    }
}
