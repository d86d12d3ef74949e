use std::ops::Range;

use crate::{
    DenseWeight, Device, Draw, KernelError, Linear, LinearKernel, MatMut, MatRef, Workspace,
    matrix::expect_below,
};

/// A device that can run a whole decoder: what a Llama needs besides quantised linear layers.
///
/// The contract is made so that one decoding step can be recorded once and replayed, as a CUDA graph is: everything
/// that changes from step to step (tokens, positions, lengths, page tables) lives in a [`Backend::Step`] that
/// [`set_step`](Self::set_step) refills; the operations only read it. Operations are queued in order and need not
/// finish before they return; [`argmax`](Self::argmax) and [`Device::download`] wait.
///
/// Row invariance holds for every operation, as for [`Linear`](crate::Linear): what is computed for a row of a sequence depends on
/// that sequence alone, to the bit, whatever else is in the batch and however the prompt was cut into steps.
pub trait Backend: Device + Sized {
    /// An embedding matrix on the device.
    type Embedding: Send + Sync;
    /// Cosines and sines of rotary position embeddings.
    type Rope: Send + Sync;
    /// Keys and values of every layer, in pages.
    type KvStore: Send + Sync;
    /// Tokens, lengths and page tables of one step.
    type Step: Send + Sync;

    /// Tokens in one page of the key-value store.
    const PAGE_LEN: usize;

    /// Whether work is queued, so that the next step may well be begun before the tokens of this one are known.
    const QUEUES: bool = false;

    /// Forward passes that have been recorded.
    type Recordings: Default + Send + Sync;

    /// An order of columns: of the input of a layer that was prepared
    /// [in order](crate::LinearKernel::prepare_in_order), as a rule.
    type Order: Send + Sync;

    /// Runs `work`, a series of operations, from where they start fastest: inside the thread pool, say.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    /// Runs `work`, the operations of one forward pass over `step`, or does again what was recorded when a pass over a
    /// step of the same shape ran.
    ///
    /// `work` queues operations of this device alone, the same ones, on the same memory, whenever `owner` and the shape of
    /// the step are the same; whoever frees or moves memory that it uses drops the recordings first. A key-value store
    /// may grow, and a step may be refilled.
    fn replay<E: From<KernelError> + Send>(
        &self,
        recordings: &mut Self::Recordings,
        owner: u64,
        step: &Self::Step,
        work: impl FnOnce() -> Result<(), E> + Send,
    ) -> Result<(), E> {
        let _ = (recordings, owner, step);
        self.run(work)
    }

    /// Kernels for linear layers, quantised and dense, that run on this machine, the preferred one first.
    fn kernels(&self) -> Vec<Box<dyn LinearKernel<Self>>>;

    /// Prepares an embedding matrix: `out_features` rows (the vocabulary) of `in_features` columns. The bias is not
    /// used.
    fn embedding(&self, weight: &DenseWeight<'_>) -> Result<Self::Embedding, KernelError>;

    /// Prepares rotary tables, both `(positions, head_dim / 2)` row-major.
    ///
    /// Errors: [`KernelError::CopyLength`] if the lengths differ or do not divide.
    fn rope(&self, cos: &[f32], sin: &[f32], head_dim: usize) -> Result<Self::Rope, KernelError>;

    /// An empty key-value store.
    fn kv_store(&self, shape: KvShape) -> Result<Self::KvStore, KernelError>;

    /// Bytes that a page of keys and values of every layer takes in a store of that shape.
    fn kv_page_bytes(&self, shape: KvShape) -> usize;

    /// Grows the store to `pages` pages and keeps its content. A store never shrinks.
    fn grow_kv(&self, store: &mut Self::KvStore, pages: usize) -> Result<(), KernelError>;

    /// An empty step.
    fn new_step(&self) -> Result<Self::Step, KernelError>;

    /// Refills a step. What was drawn in it before stays.
    ///
    /// Errors: [`KernelError::Argument`] if the sequences do not cover the tokens one after the other, if pages are
    /// too few, if two sequences would write the same page, or if a token is to be one that was not drawn.
    fn set_step(&self, step: &mut Self::Step, plan: &StepPlan<'_>) -> Result<(), KernelError>;

    /// `y[r] = table[tokens[r]]`.
    fn embed(
        &self,
        table: &Self::Embedding,
        step: &Self::Step,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError>;

    /// Prepares an order in which operations can write their columns: column `i` of what they write is column `order[i]` of
    /// what they would write without. An order costs the operation little or nothing.
    ///
    /// Errors: [`KernelError::Argument`] unless every column below `order.len()` is in it once.
    ///
    /// A norm in front of an act-ordered layer; the norm's weight goes into the same order once:
    ///
    /// ```
    /// use gptq_format::PackedLinear;
    /// use gptq_kernels::{Backend, Fusion, KernelError, LinearKernel, MatMut, MatRef, Workspace, cpu::{self, Cpu}};
    ///
    /// /// `y = layer(norm(x))` of one row.
    /// fn normalised(layer: &PackedLinear, norm: &[f32], x: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    ///     let kernels = cpu::kernels();
    ///     let layer = kernels[0].prepare_in_order(layer, &Fusion::default())?;
    ///     let order = layer.input_order().map(|order| Cpu.order(order)).transpose()?;
    ///     let norm = match layer.input_order() {
    ///         Some(order) => order.iter().map(|&column| norm[column as usize]).collect(),
    ///         None => norm.to_vec(),
    ///     };
    ///     let (inputs, outputs) = (x.len(), y.len());
    ///     let mut normed = vec![0.0; inputs];
    ///     let into = MatMut::new(&mut normed[..], 1, inputs)?;
    ///     Cpu.rms_norm(MatRef::new(x, 1, inputs)?, &norm, 1e-5, order.as_ref(), into)?;
    ///     let mut workspace = Workspace::new(&Cpu, layer.workspace_len(1))?;
    ///     layer.forward(MatRef::new(&normed[..], 1, inputs)?, MatMut::new(y, 1, outputs)?, &mut workspace)
    /// }
    /// # use gptq_format::{Bits, CodesRef};
    /// # let weight = PackedLinear::pack(&CodesRef {
    /// #     bits: Bits::B4, group_size: 2, in_features: 4, out_features: 1, codes: &[9; 4], zeros: &[8; 2],
    /// #     scales: &[1.0, 10.0], g_idx: &[0, 1, 1, 0], bias: None,
    /// # }).expect("a layer");
    /// # let mut y = [0.0];
    /// # normalised(&weight, &[1.0, 1.0, 1.0, 3.0], &[2.0, -2.0, 2.0, 2.0], &mut y)?;
    /// # assert!((y[0] - 4.0).abs() < 1e-3, "{y:?}");
    /// # Ok::<(), KernelError>(())
    /// ```
    fn order(&self, order: &[u32]) -> Result<Self::Order, KernelError>;

    /// `y[r, i] = y[r, order[i]]`, for what an operation without an order has written.
    fn reorder(&self, order: &Self::Order, y: MatMut<'_, Self>) -> Result<(), KernelError>;

    /// `y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight`; with an order, `x` is as ever, and the weight is in the order of `y`:
    /// `y[r, i] = x[r, order[i]] / sqrt(mean(x[r]^2) + eps) * weight[i]`, to the same bits.
    fn rms_norm(
        &self,
        x: MatRef<'_, Self>,
        weight: Self::Slice<'_>,
        eps: f32,
        order: Option<&Self::Order>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError>;

    /// [`rms_norm`](Self::rms_norm), to the same bits, of which `next` takes the result: a device may begin to fetch its weights
    /// meanwhile.
    fn rms_norm_for(
        &self,
        next: Option<&dyn Linear<Self>>,
        x: MatRef<'_, Self>,
        weight: Self::Slice<'_>,
        eps: f32,
        order: Option<&Self::Order>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError> {
        let _ = next;
        self.rms_norm(x, weight, eps, order, y)
    }

    /// `residual += delta`, then `y = rms_norm(residual)`: the two steps between blocks of a decoder, in one pass. The residual
    /// has no order.
    fn add_rms_norm(
        &self,
        residual: MatMut<'_, Self>,
        delta: MatRef<'_, Self>,
        weight: Self::Slice<'_>,
        eps: f32,
        order: Option<&Self::Order>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError>;

    /// `y += x`.
    fn add(&self, x: MatRef<'_, Self>, y: MatMut<'_, Self>) -> Result<(), KernelError>;

    /// Rotates queries and keys of `qkv` in place and writes the keys and values to `layer` of the store.
    ///
    /// `qkv` is `(rows, (heads + 2 * kv_heads) * head_dim)`: queries, keys, values. The rotation pairs feature `i` of a
    /// head with feature `i + head_dim / 2`.
    fn rope_append(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &Self::Step,
        rope: &Self::Rope,
        qkv: MatMut<'_, Self>,
        store: &mut Self::KvStore,
    ) -> Result<(), KernelError>;

    /// Elements of scratch that [`attention`](Self::attention) and [`attend`](Self::attend) need for a step.
    fn attention_workspace_len(&self, step: &Self::Step, shape: AttentionShape) -> usize;

    /// Causal attention of every row over its own sequence: `y (rows, heads * head_dim)` from the queries in `qkv` and
    /// the keys and values in `layer` of the store, which [`rope_append`](Self::rope_append) has filled.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &Self::Step,
        store: &Self::KvStore,
        qkv: MatRef<'_, Self>,
        y: MatMut<'_, Self>,
        workspace: &mut Workspace<Self>,
    ) -> Result<(), KernelError>;

    /// [`rope_append`](Self::rope_append), then [`attention`](Self::attention), to the same bits; a device may do both in
    /// one kernel, and then need not rotate in place: what `qkv` holds afterwards is not defined. With an order,
    /// `y[r, order[i]]` of these goes to `y[r, i]`.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        layer: usize,
        shape: AttentionShape,
        step: &Self::Step,
        rope: &Self::Rope,
        mut qkv: MatMut<'_, Self>,
        store: &mut Self::KvStore,
        order: Option<&Self::Order>,
        mut y: MatMut<'_, Self>,
        workspace: &mut Workspace<Self>,
    ) -> Result<(), KernelError> {
        self.rope_append(layer, shape, step, rope, qkv.reborrow(), store)?;
        self.attention(layer, shape, step, store, qkv.as_ref(), y.reborrow(), workspace)?;
        match order {
            Some(order) => self.reorder(order, y),
            None => Ok(()),
        }
    }

    /// `y[r, i] = silu(x[r, i]) * x[r, width + i]` with `silu(g) = g / (1 + exp(-g))`: `x` is `(rows, 2 * width)`, gate
    /// and up side by side, `y` is `(rows, width)`.
    fn silu_mul(&self, x: MatRef<'_, Self>, y: MatMut<'_, Self>) -> Result<(), KernelError>;

    /// `y[i] = x[rows[i]]` for the output rows of the step.
    fn gather_outputs(
        &self,
        step: &Self::Step,
        x: MatRef<'_, Self>,
        y: MatMut<'_, Self>,
    ) -> Result<(), KernelError>;

    /// Draws a token from each row of logits as the step's plan says, for the next step and for the host.
    ///
    /// Errors: [`KernelError::Argument`] if there is not one row for each draw of the plan.
    fn draw(&self, step: &Self::Step, logits: MatRef<'_, Self>) -> Result<(), KernelError>;

    /// Sends to the host what [`draw`](Self::draw) has drawn in the step as it is filled now; the number by which
    /// [`drawn`](Self::drawn) knows it.
    fn send_drawn(&self, step: &mut Self::Step) -> Result<u64, KernelError>;

    /// The tokens that were sent under that number, `None` for logits that are not finite ([`Draw::token`]). Waits for them,
    /// and for nothing behind them.
    ///
    /// Errors: [`KernelError::Argument`] if more than two steps have drawn since.
    fn drawn(&self, step: &mut Self::Step, number: u64) -> Result<Vec<Option<u32>>, KernelError>;

    /// Index of the largest element of each row, the first of equals; `None` where the row holds a NaN. Waits.
    fn argmax(&self, x: MatRef<'_, Self>, out: &mut [Option<u32>]) -> Result<(), KernelError>;
}

/// Shape of a key-value store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// Key-value heads a layer.
    pub kv_heads: usize,
    /// Features a head.
    pub head_dim: usize,
    /// Pages of [`Backend::PAGE_LEN`] tokens to begin with.
    pub pages: usize,
    /// What keys and values are kept as.
    pub format: KvFormat,
}

impl KvShape {
    /// Fails unless a store of this shape has this layer and heads of that shape.
    pub(crate) fn expect(&self, layer: usize, shape: AttentionShape) -> Result<(), KernelError> {
        expect_below("layer", layer, self.layers)?;
        let equal = |what, got: usize, want: usize| {
            if got == want { Ok(()) } else { Err(KernelError::Argument { what, got, limit: want + 1 }) }
        };
        equal("kv_heads", shape.kv_heads, self.kv_heads)?;
        equal("head_dim", shape.head_dim, self.head_dim)
    }

    /// Fails unless all pages below `end` are there.
    #[cfg(feature = "cuda")]
    pub(crate) fn expect_pages(&self, end: usize) -> Result<(), KernelError> {
        end.checked_sub(1).map_or(Ok(()), |last| expect_below("page", last, self.pages))
    }
}

/// What keys and values are kept as.
///
/// It changes what attention reads, of a token itself too, and nothing else: a text depends on it, but not on how the text was cut
/// into steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// As the activations are: fp16 or bf16 on a GPU, float32 on the CPU.
    #[default]
    Activations,
    /// One byte each, with a float32 scale for each token and head: key (after its rotation) and value are taken as they would
    /// have been kept otherwise; with `m` the largest magnitude in a head, feature `x` becomes `q = round(x 127 / m)`, to the
    /// nearest even, and is read as `q m / 127`. No feature moves by more than `(1/2 + 127 * 3 * 2^-24) m / 127`. Heads with
    /// `m < 2^-100` become zero.
    Int8,
}

/// Shape and extent of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Features a head, even.
    pub head_dim: usize,
    /// A token sees itself and at most `window - 1` tokens before it; `None` for all of them.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Columns of `qkv`: `(heads + 2 * kv_heads) * head_dim`.
    pub fn qkv_features(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the attention's output: `heads * head_dim`.
    pub fn out_features(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// One forward step: some new tokens for each of some sequences.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepPlan<'a> {
    /// New tokens of all sequences, one after the other: the rows of the step.
    pub tokens: &'a [u32],
    /// The sequences, in the order of their rows.
    pub sequences: &'a [SequencePlan<'a>],
    /// Rows whose logits are wanted.
    pub outputs: &'a [u32],
    /// Rows whose tokens the host need not know yet.
    pub drawn: &'a [DrawnToken],
    /// How a token is drawn from each output; none if no tokens are drawn.
    pub draws: &'a [Draw],
}

/// A row of a step that takes a token that was drawn on the device, instead of the one in [`StepPlan::tokens`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrawnToken {
    /// The row.
    pub row: usize,
    /// The output from which the token was drawn, of the last step that drew.
    pub output: usize,
}

/// What one sequence does in a step.
#[derive(Clone, Debug)]
pub struct SequencePlan<'a> {
    /// Its rows.
    pub rows: Range<usize>,
    /// Tokens that the store already holds: the position of the first new one.
    pub past: usize,
    /// Its pages, in order of position; they have room for `past + rows.len()` tokens.
    pub pages: &'a [u32],
}

impl StepPlan<'_> {
    /// Checks that the sequences cover the tokens one after the other, that their pages of `page_len` tokens have room, that
    /// no two of them write the same page, that outputs and drawn tokens are rows, and that there is a draw for every output or none.
    ///
    /// Errors: [`KernelError::Argument`].
    pub fn validate(&self, page_len: usize) -> Result<(), KernelError> {
        let rows = self.tokens.len();
        let argument = |what, got, limit| Err(KernelError::Argument { what, got, limit });
        if let Some(&row) = self.outputs.iter().find(|&&row| row as usize >= rows) {
            return argument("output row", row as usize, rows);
        }
        if let Some(drawn) = self.drawn.iter().find(|drawn| drawn.row >= rows) {
            return argument("row of a drawn token", drawn.row, rows);
        }
        if !self.draws.is_empty() && self.draws.len() != self.outputs.len() {
            return argument("draws", self.draws.len(), self.outputs.len() + 1);
        }
        let (mut row, mut written) = (0, Vec::with_capacity(self.sequences.len()));
        for sequence in self.sequences {
            let end = sequence.rows.end;
            if sequence.rows.start != row || end < row || end > rows {
                return argument("first row of a sequence", sequence.rows.start, row + 1);
            }
            let room = sequence.pages.len() * page_len;
            let len = sequence.past.saturating_add(end - row);
            if len > room {
                return argument("position", len, room + 1);
            }
            if row < end {
                written.extend_from_slice(&sequence.pages[sequence.past / page_len..len.div_ceil(page_len)]);
            }
            row = end;
        }
        if row != rows {
            return argument("rows covered by sequences", row, rows);
        }
        written.sort_unstable();
        match written.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => argument("page written by two sequences", pair[0] as usize, 0),
            None => Ok(()),
        }
    }
}

/// The place of every column in an order.
///
/// Errors: [`KernelError::Argument`] unless every column below `order.len()` is in it once.
pub(crate) fn inverse_order(order: &[u32]) -> Result<Vec<u32>, KernelError> {
    let len = order.len();
    let mut places = vec![u32::MAX; len];
    for (place, &column) in (0..).zip(order) {
        match places.get_mut(column as usize) {
            Some(free @ &mut u32::MAX) => *free = place,
            _ => {
                return Err(KernelError::Argument {
                    what: "column of an order",
                    got: column as usize,
                    limit: len,
                });
            }
        }
    }
    Ok(places)
}
