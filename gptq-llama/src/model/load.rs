use std::{
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use gptq_format::{Checkpoint, PackedLinear};
use gptq_kernels::{AttentionShape, Backend, CostTable, Epilogue, Fusion, KvFormat, Selector, Workload};
use rayon::prelude::*;

use super::{DecoderLayer, Llama, capacity, norm::OrderedNorm};
use crate::{
    Layer, LlamaConfig, LlamaError, Precision, WeightSource,
    buffers::upload,
    generate::PREFILL,
    names::{self, Module},
    projections::{Preparation, Projections},
    weights::{LinearName, LinearWeight, read_linear, read_tensor},
};

/// Weights of the decoder layers that are on their way from the source to the device at a time: 128 MB of them at 4 bits,
/// and not less than one layer, whose linear layers are loaded side by side. A layer is read, joined with those beside it and
/// repacked, so that this takes two to three times its size on the host, one time more if it is act-ordered, and more where an
/// allocator keeps what is freed.
const ON_THE_WAY: usize = 1 << 28;

/// How a model is made ready to run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Name of the kernel of quantised layers; the preferred one of the device if `None`.
    pub kernel: Option<String>,
    /// How exact the arithmetic has to be.
    pub precision: Precision,
    /// What kernels cost on this machine, by which the preferred one is found; if `None`, the table that ships with
    /// gptq-kernels for this model of machine, and where there is none, the device's order of kernels decides.
    pub costs: Option<CostTable>,
    /// The calls that layers will have to answer. Only costs make a difference of it.
    pub workload: Workload,
    /// What the model's caches keep keys and values as.
    pub kv: KvFormat,
}

impl Default for LoadOptions {
    /// No kernel by name, shipped costs, a workload of prompts of 512 tokens with 128 new tokens each, and caches of the
    /// activations' type.
    fn default() -> Self {
        Self {
            kernel: None,
            precision: Precision::default(),
            costs: None,
            workload: Workload::generation(PREFILL, 128),
            kv: KvFormat::default(),
        }
    }
}

impl LoadOptions {
    /// Sets [`kernel`](Self::kernel).
    #[must_use]
    pub fn with_kernel(mut self, kernel: Option<String>) -> Self {
        self.kernel = kernel;
        self
    }

    /// Sets [`precision`](Self::precision).
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Sets [`costs`](Self::costs).
    #[must_use]
    pub fn with_costs(mut self, costs: Option<CostTable>) -> Self {
        self.costs = costs;
        self
    }

    /// Sets [`workload`](Self::workload).
    #[must_use]
    pub fn with_workload(mut self, workload: Workload) -> Self {
        self.workload = workload;
        self
    }

    /// Sets [`kv`](Self::kv).
    #[must_use]
    pub fn with_kv(mut self, kv: KvFormat) -> Self {
        self.kv = kv;
        self
    }
}

impl<D: Backend> Llama<D> {
    /// Loads a Hugging Face folder: `config.json` and the weights, quantised or not.
    ///
    /// Files are mapped, and layers go from the map to the device some at a time, on all threads of the pool.
    ///
    /// Errors: [`LlamaError::Config`], [`LlamaError::Format`] for files that cannot be read, and what
    /// [`from_source`](Self::from_source) says.
    pub fn load(dir: &Path, device: D, options: &LoadOptions) -> Result<Self, LlamaError> {
        let config = LlamaConfig::read(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        Self::from_source(config, &checkpoint, device, options)
    }

    /// Makes a model of weights from anywhere.
    ///
    /// Errors: [`LlamaError::MissingTensor`], [`LlamaError::TensorShape`], [`LlamaError::Layer`] if no kernel takes a
    /// layer, [`LlamaError::ModelMemory`] if the device's memory is too small.
    pub fn from_source(
        config: LlamaConfig,
        source: &dyn WeightSource,
        device: D,
        options: &LoadOptions,
    ) -> Result<Self, LlamaError> {
        let span = tracing::info_span!("load", layers = config.layers);
        let _guard = span.enter();
        let free = device.free_memory();
        let kernels = device.kernels();
        let costs = options.costs.clone().or_else(|| CostTable::shipped(&device.model()));
        let stale = costs.as_ref().map_or(Vec::new(), |costs| costs.stale(&kernels));
        if !stale.is_empty() {
            tracing::warn!(?stale, "costs of other versions of these kernels");
        }
        let selector = Selector::new().workload(options.workload.clone());
        let prepare = Preparation {
            kernels: &kernels,
            kernel: options.kernel.as_deref(),
            precision: options.precision,
            in_order: true,
            selector: match &costs {
                Some(costs) => selector.costs(costs),
                None => selector,
            },
        };
        match parts(&config, source, &device, &prepare) {
            Ok(Parts { embedding, lm_head, norm, layers }) => {
                let (id, kv) = (next_id(), options.kv);
                Ok(Self { id, device, config, kv, embedding, layers, norm, lm_head })
            }
            // What has been loaded is gone by now.
            Err(error) => Err(capacity::explain_load(error, free, &config, source)),
        }
    }
}

/// A number that no other model of this process has.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

struct Parts<D: Backend> {
    embedding: D::Embedding,
    lm_head: Box<dyn gptq_kernels::Linear<D>>,
    norm: OrderedNorm<D>,
    layers: Vec<DecoderLayer<D>>,
}

fn parts<D: Backend>(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    device: &D,
    prepare: &Preparation<'_, D>,
) -> Result<Parts<D>, LlamaError> {
    let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
    let table = read_tensor(source, names::EMBEDDING, &[vocabulary, hidden])?;
    let name = LinearName {
        module: names::LM_HEAD.to_owned(),
        in_features: hidden,
        out_features: vocabulary,
        bias: false,
    };
    let lm_head = if config.tie_word_embeddings && source.packed(names::LM_HEAD)?.is_none() {
        let shared = LinearWeight::Dense { tensor: table.clone(), bias: None };
        prepare.linear(&name, &shared)?
    } else {
        prepare.linear(&name, &read_linear(source, &name)?)?
    };
    let embedding = device.embedding(&table.as_dense(None))?;
    drop(table);
    let shape = (hidden, config.rms_norm_eps);
    let norm = OrderedNorm::load(device, source, names::FINAL_NORM, shape, lm_head.input_order())?;
    let layers = load_layers(config, source, device, prepare)?;
    Ok(Parts { embedding, lm_head, norm, layers })
}

/// All decoder layers, some at a time.
fn load_layers<D: Backend>(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    device: &D,
    prepare: &Preparation<'_, D>,
) -> Result<Vec<DecoderLayer<D>>, LlamaError> {
    let at_a_time = (ON_THE_WAY / capacity::layer_weights(config).max(1)).clamp(1, config.layers.max(1));
    let (next, loaded) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(config.layers)));
    (0..at_a_time).into_par_iter().with_max_len(1).for_each(|_| {
        loop {
            let layer = next.fetch_add(1, Ordering::Relaxed);
            if layer >= config.layers {
                break;
            }
            let result = load_layer(config, source, device, prepare, layer);
            if result.is_err() {
                // Nobody begins another layer.
                next.store(config.layers, Ordering::Relaxed);
            }
            loaded.lock().unwrap_or_else(PoisonError::into_inner).push((layer, result));
        }
    });
    let mut loaded = loaded.into_inner().unwrap_or_else(PoisonError::into_inner);
    loaded.sort_unstable_by_key(|&(layer, _)| layer);
    loaded.into_iter().map(|(_, layer)| layer).collect()
}

fn load_layer<D: Backend>(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    device: &D,
    prepare: &Preparation<'_, D>,
    layer: usize,
) -> Result<DecoderLayer<D>, LlamaError> {
    let read = |module: Module| {
        let name = Layer { layer, module }.linear(config);
        let weight = read_linear(source, &name)?;
        Ok::<_, LlamaError>((name, weight))
    };
    let read_all = |modules: &[Module]| -> Result<Vec<_>, LlamaError> {
        modules.par_iter().map(|&module| read(module)).collect()
    };
    let norm = |name, order: Option<&[u32]>| {
        let name = format!("{}{name}", names::layer_prefix(layer));
        OrderedNorm::load(device, source, &name, (config.hidden_size, config.rms_norm_eps), order)
    };
    // Reading is copying out of a map, as a rule, and takes as long as repacking.
    let qkv = || prepare.fused_projections(read_all(&[Module::Q, Module::K, Module::V])?, Fusion::default());
    // This ends in an addition to the residual stream.
    let o = || {
        let (name, weight) = read(Module::O)?;
        prepare.fused(&name, &weight, Epilogue::Add.into())
    };
    let mlp = || {
        let (gate_up, down) = rayon::join(|| read_all(&[Module::Gate, Module::Up]), || read(Module::Down));
        load_mlp(prepare, gate_up?, down?)
    };
    let ((qkv, o), mlp) = rayon::join(|| rayon::join(qkv, o), mlp);
    let (qkv, o, (gate_up, down)) = (qkv?, o?, mlp?);
    Ok(DecoderLayer {
        attention: attention_shape(config, layer),
        input_norm: norm(names::INPUT_NORM, qkv.input_order())?,
        qkv,
        attention_order: o.input_order().map(|order| device.order(order)).transpose()?,
        o,
        post_norm: norm(names::POST_NORM, gate_up.input_order())?,
        gate_up,
        down,
    })
}

/// Gate and up side by side, and down, whose input they write: in its order, if they can.
type Mlp<D> = (Projections<D>, Box<dyn gptq_kernels::Linear<D>>);

fn load_mlp<D: Backend>(
    prepare: &Preparation<'_, D>,
    gate_up: Vec<(LinearName, LinearWeight<'_>)>,
    (name, weight): (LinearName, LinearWeight<'_>),
) -> Result<Mlp<D>, LlamaError> {
    let prepare_gate_up = |layers| prepare.fused_projections(layers, Epilogue::SiluMul.into());
    // This ends in an addition to the residual stream.
    let prepare_down = |prepare: &Preparation<'_, D>| prepare.fused(&name, &weight, Epilogue::Add.into());
    let movable = gate_up.iter().all(|(_, weight)| weight.packed().is_some());
    if !(movable && weight.packed().is_some_and(PackedLinear::is_act_order)) {
        let (gate_up, down) = rayon::join(|| prepare_gate_up(gate_up), || prepare_down(&prepare.as_it_is()));
        return Ok((gate_up?, down?));
    }
    let down = prepare_down(prepare)?;
    let gate_up = match down.input_order() {
        Some(order) => gate_up
            .into_par_iter()
            .map(|(name, weight)| {
                let weight = weight.with_output_order(&name, order)?;
                Ok((name, weight))
            })
            .collect::<Result<_, LlamaError>>()?,
        None => gate_up,
    };
    Ok((prepare_gate_up(gate_up)?, down))
}

pub(crate) fn attention_shape(config: &LlamaConfig, layer: usize) -> AttentionShape {
    AttentionShape {
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        window: config.windows[layer],
    }
}

pub(crate) fn load_norm<D: Backend>(
    device: &D,
    source: &dyn WeightSource,
    name: &str,
    features: usize,
) -> Result<D::Buffer, LlamaError> {
    let weight = read_tensor(source, name, &[features])?.to_f32();
    Ok(upload(device, &weight)?)
}
