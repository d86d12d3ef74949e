use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use gptq_format::Checkpoint;
use gptq_kernels::{AttentionShape, Backend, Epilogue, KernelError};

use super::{DecoderLayer, Llama};
use crate::{
    Layer, LlamaConfig, LlamaError, Precision, WeightSource,
    names::{self, Module},
    projections::Preparation,
    weights::{LinearName, LinearWeight, read_linear, read_tensor},
};

/// How a model is made ready to run.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Name of the kernel of quantised layers; the preferred one of the device if `None`.
    pub kernel: Option<String>,
    /// How exact the arithmetic has to be.
    pub precision: Precision,
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
}

impl<D: Backend> Llama<D> {
    /// Loads a Hugging Face folder: `config.json` and the weights, quantised or not.
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
    /// layer.
    pub fn from_source(
        config: LlamaConfig,
        source: &dyn WeightSource,
        device: D,
        options: &LoadOptions,
    ) -> Result<Self, LlamaError> {
        let span = tracing::info_span!("load", layers = config.layers);
        let _guard = span.enter();
        let kernels = device.kernels();
        let prepare = Preparation {
            kernels: &kernels,
            kernel: options.kernel.as_deref(),
            precision: options.precision,
        };
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = read_tensor(source, names::EMBEDDING, &[vocabulary, hidden])?;
        let name = LinearName {
            module: names::LM_HEAD.to_owned(),
            in_features: hidden,
            out_features: vocabulary,
            bias: false,
        };
        let lm_head = if config.tie_word_embeddings && source.packed(names::LM_HEAD)?.is_none() {
            let shared = LinearWeight::Dense { tensor: embedding.clone(), bias: None };
            prepare.linear(&name, &shared)?
        } else {
            prepare.linear(&name, &read_linear(source, &name)?)?
        };
        let layers = (0..config.layers)
            .map(|layer| load_layer(&config, source, &device, &prepare, layer))
            .collect::<Result<_, _>>()?;
        let norm = load_norm(&device, source, names::FINAL_NORM, hidden)?;
        let embedding = device.embedding(&embedding.as_dense(None))?;
        Ok(Self { id: next_id(), device, config, embedding, layers, norm, lm_head })
    }
}

/// A number that no other model of this process has.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
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
    let norm = |name| {
        load_norm(device, source, &format!("{}{name}", names::layer_prefix(layer)), config.hidden_size)
    };
    // Repacking takes longer than reading, and partly goes on one thread.
    let qkv = [read(Module::Q)?, read(Module::K)?, read(Module::V)?];
    let gate_up = [read(Module::Gate)?, read(Module::Up)?];
    let (o, down) = (read(Module::O)?, read(Module::Down)?);
    let ((qkv, o), (gate_up, down)) = rayon::join(
        || {
            rayon::join(
                || prepare.projections(&qkv),
                // This one and `down` end in an addition to the residual stream.
                || prepare.fused(&o.0, &o.1, Epilogue::Add),
            )
        },
        || {
            rayon::join(
                || prepare.fused_projections(&gate_up, Epilogue::SiluMul),
                || prepare.fused(&down.0, &down.1, Epilogue::Add),
            )
        },
    );
    Ok(DecoderLayer {
        attention: attention_shape(config, layer),
        input_norm: norm(names::INPUT_NORM)?,
        qkv: qkv?,
        o: o?,
        post_norm: norm(names::POST_NORM)?,
        gate_up: gate_up?,
        down: down?,
    })
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

pub(crate) fn upload<D: Backend>(device: &D, data: &[f32]) -> Result<D::Buffer, KernelError> {
    let mut buffer = device.alloc(data.len())?;
    device.upload(data, D::slice_mut(&mut buffer, 0..data.len()))?;
    Ok(buffer)
}
