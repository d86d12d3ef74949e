//! LoRA adapters, merged into the weights that they were trained for.

mod config;
mod targets;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use gptq_format::{Dtype, PackedLinear, TensorFile};
use rayon::prelude::*;

use crate::{
    Fingerprint, Layer, LlamaConfig, LlamaError, Tensor, TensorData, WeightSource,
    names::{self, EMBEDDING},
};
use config::AdapterConfig;
use targets::Targets;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the names of the model.
const PREFIX: &str = "base_model.model.";

/// The weights of a model with a PEFT adapter merged into them.
///
/// ```text
/// W' = W + s B A        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora       (arXiv:2106.09685, eq. 3)
/// ```
///
/// `A` is `(r, in_features)` and `B` `(out_features, r)`. The sum over `r` runs in its order in float32, is scaled and then
/// added to the float32 value of `W`. Weights are merged when they are asked for, so that a model larger than memory can
/// be read through this.
///
/// Modules listed in `modules_to_save`, and biases that were trained, replace the model's. Everything in the adapter is
/// used or refused: nothing is left out in silence. `fan_in_fan_out` is ignored with a warning, as PEFT does for
/// layers that store `(out_features, in_features)`, and those of these models do.
///
/// ```no_run
/// use gptq_format::Checkpoint;
/// use gptq_llama::{LlamaConfig, LoraWeights};
/// use std::path::Path;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = Path::new("model");
/// let config = LlamaConfig::read(dir)?;
/// let base = Checkpoint::open(dir)?;
/// let merged = LoraWeights::open(Path::new("adapter"), &base, &config)?;
/// # Ok(())
/// # }
/// ```
pub struct LoraWeights<'a> {
    base: &'a dyn WeightSource,
    /// By the name of the tensor that they are added to.
    updates: HashMap<String, Update>,
    /// By the name of the tensor that they stand for.
    replaced: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

/// `scaling * left * right`, a matrix of the shape of the tensor that it is added to.
struct Update {
    rows: usize,
    cols: usize,
    rank: usize,
    scaling: f32,
    /// `(rows, rank)`
    left: Vec<f32>,
    /// `(rank, cols)`
    right: Vec<f32>,
}

/// Why an adapter cannot be merged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoraError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The folder has no weights that can be read.
    #[error("{} has no {WEIGHTS}{}", dir.display(), if *pickled { "; convert its adapter_model.bin, a pickled file, with safetensors" } else { "" })]
    NoWeights {
        /// The folder.
        dir: PathBuf,
        /// Whether there is a pickled file instead.
        pickled: bool,
    },
    /// The config is no JSON object, or a value has the wrong type or is out of range.
    #[error("{}: {key}{} {expected}", path.display(), if key.is_empty() { "" } else { ":" })]
    Config {
        /// The file.
        path: PathBuf,
        /// The key; empty for the file as a whole.
        key: String,
        /// What it must be.
        expected: String,
    },
    /// The adapter is of a kind that is not merged here.
    #[error("{}: {key} = {value} is not supported: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// A tensor of the adapter belongs to nothing in the model, or is of a kind that is not known.
    #[error("{}: {tensor} would be ignored: {reason}", path.display())]
    Unused {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why.
        reason: &'static str,
    },
    /// A tensor that the config promises, or whose counterpart is there, is absent.
    #[error("{}: {tensor} is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor of the adapter does not fit the model or the rank.
    #[error("{}: {tensor} has shape {got:?}, the model and the rank need {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is needed.
        expected: Vec<usize>,
        /// What is there.
        got: Vec<usize>,
    },
    /// A tensor of the adapter holds something else than floats.
    #[error("{}: {tensor} has dtype {dtype:?}, which is no weight's", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
    },
    /// NaN or infinity.
    #[error("{}: {tensor} holds {value}", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The value.
        value: f32,
    },
    /// The layer that an adapter changes is quantised.
    #[error("{tensor} is quantised: an adapter is merged into float weights")]
    QuantizedBase {
        /// The layer.
        tensor: String,
    },
}

impl<'a> LoraWeights<'a> {
    /// Reads a folder with `adapter_config.json` and `adapter_model.safetensors`, for the model that `base` holds.
    ///
    /// Errors: [`LlamaError::Lora`], [`LlamaError::Format`] for a weights file that is damaged.
    pub fn open(dir: &Path, base: &'a dyn WeightSource, config: &LlamaConfig) -> Result<Self, LlamaError> {
        let path = dir.join(CONFIG);
        let text = read_config(&path)?;
        let adapter = AdapterConfig::parse(&path, &text)?;
        let weights = dir.join(WEIGHTS);
        if !weights.is_file() {
            let pickled = dir.join("adapter_model.bin").exists();
            return Err(LoraError::NoWeights { dir: dir.to_owned(), pickled }.into());
        }
        let file = TensorFile::open(&weights)?;
        let mut merge = Merge {
            path: &weights,
            file: &file,
            adapter: &adapter,
            targets: Targets::new(&path, &adapter, config)?,
            base,
            model: config,
            halves: BTreeMap::new(),
            lora: Self { base, updates: HashMap::new(), replaced: HashMap::new() },
        };
        merge.run()?;
        Ok(merge.lora)
    }

    /// The tensors of the model that the adapter changes, sorted.
    pub fn changed(&self) -> Vec<&str> {
        let mut names: Vec<&str> =
            self.updates.keys().chain(self.replaced.keys()).map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

/// A config is short; nothing longer is read.
const MAX_CONFIG: u64 = 4 << 20;

fn read_config(path: &Path) -> Result<String, LoraError> {
    let io = |source| LoraError::Io { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(io)?.len();
    if length > MAX_CONFIG {
        let expected = format!("has {length} bytes, more than any adapter's config");
        return Err(LoraError::Config { path: path.to_owned(), key: String::new(), expected });
    }
    std::fs::read_to_string(path).map_err(io)
}

impl WeightSource for LoraWeights<'_> {
    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, LlamaError> {
        if let Some((shape, values)) = self.replaced.get(name) {
            return Ok(Some(Tensor { shape: shape.clone(), data: TensorData::F32(Cow::Borrowed(values)) }));
        }
        let (Some(update), Some(tensor)) = (self.updates.get(name), self.base.tensor(name)?) else {
            return self.base.tensor(name);
        };
        let mut values = tensor.to_f32();
        update.add_to(&mut values);
        Ok(Some(Tensor { shape: tensor.shape, data: TensorData::F32(Cow::Owned(values)) }))
    }

    fn fingerprint(&self, name: &str, fingerprint: &mut Fingerprint) -> Result<(), LlamaError> {
        self.base.fingerprint(name, fingerprint)?;
        if let Some(update) = self.updates.get(name) {
            let numbers = update.left.iter().chain(&update.right).chain([&update.scaling]);
            fingerprint.add(&numbers.flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        }
        if let Some((_, values)) = self.replaced.get(name) {
            fingerprint.add(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        }
        Ok(())
    }

    fn packed(&self, module: &str) -> Result<Option<PackedLinear>, LlamaError> {
        let weight = format!("{module}.weight");
        let packed = self.base.packed(module)?;
        if packed.is_some() && (self.updates.contains_key(&weight) || self.replaced.contains_key(&weight)) {
            return Err(LoraError::QuantizedBase { tensor: module.to_owned() }.into());
        }
        Ok(packed)
    }
}

impl Update {
    fn add_to(&self, values: &mut [f32]) {
        let rows = values.par_chunks_mut(self.cols).zip(self.left.par_chunks(self.rank));
        rows.for_each_init(
            || vec![0.0; self.cols],
            |sum, (values, left)| {
                sum.fill(0.0);
                for (&x, right) in left.iter().zip(self.right.chunks_exact(self.cols)) {
                    for (sum, &y) in sum.iter_mut().zip(right) {
                        *sum += x * y;
                    }
                }
                for (value, &sum) in values.iter_mut().zip(&*sum) {
                    *value += self.scaling * sum;
                }
            },
        );
    }
}

/// The two halves of an update.
#[derive(Default)]
struct Halves {
    /// Name in the file, `(r, in_features)`, for embeddings `(r, vocab_size)`.
    a: Option<String>,
    /// Name in the file, `(out_features, r)`, for embeddings `(hidden_size, r)`.
    b: Option<String>,
}

/// An adapter while its tensors are sorted.
struct Merge<'m, 'a> {
    path: &'m Path,
    file: &'m TensorFile,
    adapter: &'m AdapterConfig,
    targets: Targets,
    base: &'a dyn WeightSource,
    model: &'m LlamaConfig,
    /// By the module's name in the model, and whether they are an embedding's.
    halves: BTreeMap<(String, bool), Halves>,
    lora: LoraWeights<'a>,
}

impl Merge<'_, '_> {
    fn run(&mut self) -> Result<(), LlamaError> {
        let names: Vec<String> = self.file.tensors().map(|tensor| tensor.name().to_owned()).collect();
        for name in &names {
            self.sort(name)?;
        }
        for module in self.targets.modules().map(str::to_owned).collect::<Vec<_>>() {
            if !self.halves.contains_key(&(module.clone(), false))
                && !self.halves.contains_key(&(module.clone(), true))
            {
                let tensor = format!("{PREFIX}{module}.lora_A.weight");
                return Err(self.missing(tensor));
            }
        }
        for module in &self.adapter.modules_to_save {
            let saved = |name: &String| {
                let module_of = name.strip_suffix(".weight").unwrap_or(name);
                module_of == module || module_of.ends_with(&format!(".{module}"))
            };
            if !self.lora.replaced.keys().any(saved) {
                return Err(self.missing(format!("{PREFIX}{module}.weight")));
            }
        }
        for ((module, embedding), halves) in std::mem::take(&mut self.halves) {
            self.update(&module, embedding, halves)?;
        }
        Ok(())
    }

    /// Decides what a tensor of the adapter is.
    fn sort(&mut self, name: &str) -> Result<(), LlamaError> {
        let unused = |reason| {
            let (path, tensor) = (self.path.to_owned(), name.to_owned());
            LlamaError::from(LoraError::Unused { path, tensor, reason })
        };
        let inner =
            name.strip_prefix(PREFIX).ok_or_else(|| unused("it does not begin with base_model.model."))?;
        for (marker, embedding, is_a) in [
            (".lora_A", false, true),
            (".lora_B", false, false),
            (".lora_embedding_A", true, true),
            (".lora_embedding_B", true, false),
        ] {
            let Some((module, rest)) = inner.split_once(marker) else { continue };
            // `.weight`, or with the adapter's name, `.default.weight`; an embedding's halves are bare parameters.
            let rest = rest.strip_suffix(".weight").unwrap_or(rest);
            if rest.ends_with(".bias") {
                return Err(unused("biases of lora_B are not supported"));
            }
            if !rest.is_empty() && (!rest.starts_with('.') || rest[1..].contains('.')) {
                continue;
            }
            if !self.targets.contains(module) {
                return Err(unused("the model has no such module among the adapter's target_modules"));
            }
            if embedding != (module == EMBEDDING.trim_end_matches(".weight")) {
                return Err(unused("it is of another kind of layer"));
            }
            let halves = self.halves.entry((module.to_owned(), embedding)).or_default();
            let half = if is_a { &mut halves.a } else { &mut halves.b };
            if half.replace(name.to_owned()).is_some() {
                return Err(unused("the folder holds several adapters for its module"));
            }
            return Ok(());
        }
        self.sort_whole(name, inner)
    }

    /// A tensor that stands for one of the model.
    fn sort_whole(&mut self, name: &str, inner: &str) -> Result<(), LlamaError> {
        let unused = |reason| {
            let (path, tensor) = (self.path.to_owned(), name.to_owned());
            LlamaError::from(LoraError::Unused { path, tensor, reason })
        };
        let (module, part) = match inner.rsplit_once('.') {
            Some((module, part @ ("weight" | "bias"))) => (module, part),
            _ => return Err(unused("no known kind of adapter has it")),
        };
        // Wrapped layers keep their own tensors under these names; saved modules may carry the adapter's name.
        let module = module.strip_suffix(".base_layer").unwrap_or(module);
        let module = match module.split_once(".modules_to_save") {
            Some((module, rest)) if rest.is_empty() || !rest[1..].contains('.') => module,
            Some(_) => return Err(unused("no known kind of adapter has it")),
            None => module,
        };
        let target = format!("{module}.{part}");
        let Some(base) = self.base.tensor(&target)? else {
            return Err(unused("the model has no such tensor"));
        };
        let values = self.floats(name, Some(&base.shape))?;
        let saved = self.adapter.saves(module);
        let trained_bias = part == "bias"
            && match self.adapter.bias {
                config::Bias::None => false,
                config::Bias::All => true,
                config::Bias::LoraOnly => self.targets.contains(module),
            };
        if saved || trained_bias {
            if self.model.tie_word_embeddings && target == EMBEDDING {
                return Err(unused("the embedding is tied to the output layer"));
            }
            if self.lora.replaced.insert(target, (base.shape, values)).is_some() {
                return Err(unused("its module stands in the file twice"));
            }
            return Ok(());
        }
        // PEFT saves the embedding of a model along with some adapters, though they do not change it.
        let same = values.iter().zip(base.to_f32()).all(|(a, b)| a.to_bits() == b.to_bits());
        if same {
            Ok(())
        } else {
            Err(unused("modules_to_save does not list its module, and the model holds other values"))
        }
    }

    fn update(&mut self, module: &str, embedding: bool, halves: Halves) -> Result<(), LlamaError> {
        let kind = if embedding { "lora_embedding_" } else { "lora_" };
        let suffix = if embedding { "" } else { ".weight" };
        let missing = |half| self.missing(format!("{PREFIX}{module}.{kind}{half}{suffix}"));
        let a = halves.a.ok_or_else(|| missing("A"))?;
        let b = halves.b.ok_or_else(|| missing("B"))?;
        let target = format!("{module}.weight");
        let (rank, alpha) = (self.adapter.rank(module), self.adapter.alpha(module));
        let (out_features, in_features) = if embedding {
            (self.model.hidden_size, self.model.vocab_size)
        } else {
            self.targets.shape(module)
        };
        let a_values = self.floats(&a, Some(&[rank, in_features]))?;
        let b_values = self.floats(&b, Some(&[out_features, rank]))?;
        if self.lora.replaced.contains_key(&target) {
            let (path, tensor) = (self.path.to_owned(), a);
            let reason = "its module is in modules_to_save as well";
            return Err(LoraError::Unused { path, tensor, reason }.into());
        }
        let divisor = if self.adapter.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        let scaling = (alpha / divisor) as f32;
        let update = if embedding {
            // The embedding's table is the transpose of what a linear layer would store.
            let (left, right) = (transposed(&a_values, in_features), transposed(&b_values, rank));
            Update { rows: in_features, cols: out_features, rank, scaling, left, right }
        } else {
            Update { rows: out_features, cols: in_features, rank, scaling, left: b_values, right: a_values }
        };
        // The base may be of another shape than its config says; then loading fails there, but not in here.
        if let Some(base) = self.base.tensor(&target)?
            && base.shape != [update.rows, update.cols]
        {
            let expected = vec![update.rows, update.cols];
            return Err(LlamaError::TensorShape { tensor: target, expected, got: base.shape });
        }
        self.lora.updates.insert(target, update);
        Ok(())
    }

    /// The numbers of a tensor of the adapter.
    fn floats(&self, name: &str, shape: Option<&[usize]>) -> Result<Vec<f32>, LlamaError> {
        let (path, tensor) = (self.path.to_owned(), name.to_owned());
        let stored = self.file.tensor(name)?;
        if let Some(shape) = shape
            && stored.shape() != shape
        {
            let (expected, got) = (shape.to_vec(), stored.shape().to_vec());
            return Err(LoraError::Shape { path, tensor, expected, got }.into());
        }
        let values: Vec<f32> = match stored.dtype() {
            Dtype::F32 => stored.f32s()?.into_owned(),
            Dtype::F16 => stored.f16s()?.iter().map(|x| x.to_f32()).collect(),
            Dtype::BF16 => stored.bf16s()?.iter().map(|x| x.to_f32()).collect(),
            dtype => return Err(LoraError::Type { path, tensor, dtype }.into()),
        };
        match values.iter().find(|value| !value.is_finite()) {
            Some(&value) => Err(LoraError::NonFinite { path, tensor, value }.into()),
            None => Ok(values),
        }
    }

    fn missing(&self, tensor: String) -> LlamaError {
        LoraError::Missing { path: self.path.to_owned(), tensor }.into()
    }
}

/// The transpose of a row-major matrix with `cols` columns.
fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols;
    (0..values.len()).map(|k| values[k % rows * cols + k / rows]).collect()
}

/// Every module that an adapter may target, with `(out_features, in_features)`.
fn modules(config: &LlamaConfig) -> impl Iterator<Item = (String, (usize, usize))> {
    let linears = Layer::of_decoder(config).chain([Layer::lm_head(config)]);
    let shape = |layer: Layer| {
        let (inputs, outputs) = layer.module.shape(config);
        (layer.to_string(), (outputs, inputs))
    };
    let embedding = EMBEDDING.trim_end_matches(".weight").to_owned();
    linears
        .map(shape)
        .chain([(embedding, (config.vocab_size, config.hidden_size))])
        .collect::<Vec<_>>()
        .into_iter()
}

/// The layer number in a module's name.
fn layer_number(module: &str) -> Option<usize> {
    module.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Whether this is the output layer.
fn is_lm_head(module: &str) -> bool {
    module == names::LM_HEAD
}
