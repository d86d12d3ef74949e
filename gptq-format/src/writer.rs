use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::checkpoint::{INDEX_SUFFIX, SINGLE};
use crate::config::{CONFIG_FILES, CONFIG_KEY};
use crate::folder::{Folder, MANIFEST, MAX_CONFIG, is_plain, read_json};
use crate::{CheckpointFormat, Dtype, FormatError, PackedLinear, QuantizeConfig};

mod encode;
mod replace;
mod shard;
#[cfg(test)]
mod tests;

use replace::{LOCK, Staging};
use shard::{FinishedShard, Shard};

/// What a model folder holds beside weights and configs, and what a new checkpoint of the same model keeps.
const CARRIED: [&str; 12] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
];

/// Writes a checkpoint, replacing the one that a folder may hold.
///
/// Everything goes to a hidden folder inside the target, shard by shard, and is synced. [`finish`](Self::finish) then
/// renames that folder: this one rename is the commit. Before it the target is untouched; after it [`Checkpoint`] reads
/// the new files, wherever the process is killed while they are moved to their places (the next writer, or
/// [`recover`](Self::recover), completes that). The file that leads to the others, `model.safetensors` or the index, is
/// moved last, and while more than it changes, the old one is taken away first: so other tools find the old checkpoint,
/// the new one, or for a moment none, but never a mixture.
///
/// At most some 70 MB of a shard, and one tensor, are in memory at any time; 8 MB unless tensors have odd lengths.
///
/// [`Checkpoint`]: crate::Checkpoint
#[derive(Debug)]
pub struct CheckpointWriter {
    staging: Staging,
    config: Option<QuantizeConfig>,
    options: WriteOptions,
    shard: Shard,
    shards: Vec<FinishedShard>,
    names: HashSet<String>,
    /// `config.json` of the model, without what this writer adds.
    model_config: Option<Map<String, Value>>,
    /// Keys of the config that held calibration data.
    left_out: Vec<String>,
    carried: BTreeMap<String, PathBuf>,
}

/// How a [`CheckpointWriter`] writes.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    max_shard_bytes: u64,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { max_shard_bytes: 4_000_000_000 }
    }
}

impl WriteOptions {
    /// A shard is closed before a tensor that would make it longer than this; a longer tensor has its own shard.
    /// 4 GB unless said otherwise.
    pub fn max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = bytes;
        self
    }
}

/// What a [`CheckpointWriter`] has written.
#[derive(Clone, Debug)]
pub struct WriteSummary {
    /// The files that hold tensors.
    pub weights: Vec<PathBuf>,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Keys of the config that held calibration data and were left out, such as `dataset`.
    pub left_out: Vec<String>,
}

impl CheckpointWriter {
    /// Starts a checkpoint in `dir`, which is created if need be. `config` is that of the quantised layers, `None` for a
    /// model without any.
    ///
    /// A config without `checkpoint_format` gets `gptq` if it is symmetric and `gptq_v2` otherwise. Calibration data in it
    /// are [left out](QuantizeConfig::without_calibration_data).
    ///
    /// # Errors
    /// [`FormatError::Io`], and [`FormatError::Busy`] if another process writes to the folder.
    pub fn create(
        dir: impl AsRef<Path>,
        config: Option<&QuantizeConfig>,
        options: WriteOptions,
    ) -> Result<Self, FormatError> {
        let staging = Staging::create(dir.as_ref())?;
        let config = config.map(|config| match config.checkpoint_format() {
            Some(_) => config.clone(),
            None if config.sym() => config.with_checkpoint_format(CheckpointFormat::Gptq),
            None => config.with_checkpoint_format(CheckpointFormat::GptqV2),
        });
        let (config, left_out) = match config.map(|config| config.without_calibration_data()) {
            Some((config, left_out)) => (Some(config), left_out),
            None => (None, Vec::new()),
        };
        if !left_out.is_empty() {
            tracing::warn!(keys = left_out.join(", "), "calibration data in the config, left out");
        }
        let shard = Shard::create(staging.path().join(shard_file(0)));
        Ok(Self {
            staging,
            config,
            options,
            shard,
            shards: Vec::new(),
            names: HashSet::new(),
            model_config: None,
            left_out,
            carried: BTreeMap::new(),
        })
    }

    /// Completes a replacement that was interrupted after its commit. Returns whether there was one. Only other tools
    /// need this: [`Checkpoint`](crate::Checkpoint) reads such a folder as it is.
    ///
    /// # Errors
    /// [`FormatError::Io`], and [`FormatError::Busy`] if another process is at it.
    pub fn recover(dir: impl AsRef<Path>) -> Result<bool, FormatError> {
        replace::recover(dir.as_ref())
    }

    /// Takes over `config.json`, `generation_config.json` and the tokenizer's files from the folder of another
    /// checkpoint, which may be the one that is replaced. In `config.json` the quantisation config becomes this one's.
    ///
    /// # Errors
    /// [`FormatError::Io`] and [`FormatError::Json`].
    pub fn carry_over(&mut self, source: impl AsRef<Path>) -> Result<(), FormatError> {
        let folder = Folder::open(source.as_ref())?;
        for name in CARRIED {
            if let Some(path) = folder.locate(name)? {
                self.carried.insert(name.into(), path);
            }
        }
        if let Some(path) = folder.locate("config.json")? {
            self.model_config = Some(read_json(&path, MAX_CONFIG)?);
        }
        Ok(())
    }

    /// Adds a file beside the weights, such as a report.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::ShardName`] for a name that is not plain, [`FormatError::WrittenTwice`] for
    /// one that is taken.
    pub fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        if !is_plain(name) || name.starts_with('.') || is_own_name(name) || name == MANIFEST || name == LOCK {
            return Err(FormatError::ShardName { path: self.staging.target().to_owned(), name: name.into() });
        }
        self.staging.write(name, bytes)
    }

    /// Writes a tensor; `bytes` are its elements, little-endian, row-major.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::WrittenTwice`], [`FormatError::TensorName`], [`FormatError::ByteLength`].
    pub fn tensor(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), FormatError> {
        if dtype.byte_len(shape) != Some(bytes.len()) {
            let (tensor, shape, len) = (name.to_owned(), shape.to_vec(), bytes.len());
            return Err(FormatError::ByteLength { tensor, dtype, shape, len });
        }
        if name == "__metadata__" || name.len() > shard::MAX_NAME {
            return Err(FormatError::TensorName { name: name.chars().take(80).collect() });
        }
        if !self.names.insert(name.to_owned()) {
            return Err(FormatError::WrittenTwice { name: name.into() });
        }
        if !self.shard.has_room(bytes.len() as u64, self.options.max_shard_bytes) {
            self.next_shard()?;
        }
        self.shard.add(name, dtype, shape, bytes)
    }

    /// Writes a quantised layer in the config's format: `qweight`, `qzeros`, `scales`, `g_idx` and, if the layer has
    /// one, `bias`; for Marlin `B`, `s` and `bias`.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor), and [`FormatError::Unwritable`] if the format cannot hold the layer, or the layer is
    /// not what the config says.
    pub fn linear(&mut self, prefix: &str, linear: &PackedLinear) -> Result<(), FormatError> {
        for field in encode::fields(self.config.as_ref(), prefix, linear)? {
            self.tensor(&format!("{prefix}.{}", field.name), field.dtype, &field.shape, &field.bytes)?;
        }
        Ok(())
    }

    /// Completes the checkpoint and puts it in the place of the old one.
    ///
    /// # Errors
    /// [`FormatError::Io`]. Unless the error arose after the commit, the folder is as it was.
    pub fn finish(mut self) -> Result<WriteSummary, FormatError> {
        if self.shards.is_empty() || !self.shard.is_empty() {
            self.next_shard()?;
        }
        let left_out = std::mem::take(&mut self.left_out);
        let mut summary =
            WriteSummary { weights: Vec::new(), tensors: self.names.len(), tensor_bytes: 0, left_out };
        let count = self.shards.len();
        let mut weight_map = BTreeMap::new();
        let mut weights = Vec::new();
        for (index, shard) in std::mem::take(&mut self.shards).into_iter().enumerate() {
            let name = if count == 1 { SINGLE.into() } else { shard_name(index, count) };
            self.staging.rename(&shard_file(index), &name)?;
            weight_map.extend(shard.tensors.into_iter().map(|tensor| (tensor, name.clone())));
            summary.tensor_bytes += shard.data_len;
            summary.weights.push(self.staging.target().join(&name));
            weights.push(name);
        }
        for (name, path) in &self.carried {
            let bytes = fs::read(path).map_err(|source| FormatError::io(path, source))?;
            self.staging.write(name, &bytes)?;
        }
        self.write_configs()?;
        let entry = if count == 1 {
            weights.pop().expect("invariant: one shard")
        } else {
            let index = json!({"metadata": {"total_size": summary.tensor_bytes}, "weight_map": weight_map});
            let name = format!("{SINGLE}{INDEX_SUFFIX}");
            self.staging.write(&name, format!("{index:#}\n").as_bytes())?;
            name
        };
        tracing::info!(
            dir = %self.staging.target().display(),
            tensors = summary.tensors,
            bytes = summary.tensor_bytes,
            shards = count,
            "checkpoint written"
        );
        self.staging.commit(weights, entry)?;
        Ok(summary)
    }

    fn next_shard(&mut self) -> Result<(), FormatError> {
        let next = self.staging.path().join(shard_file(self.shards.len() + 1));
        let full = std::mem::replace(&mut self.shard, Shard::create(next));
        self.shards.push(full.finish()?);
        Ok(())
    }

    /// `config.json` with this quantisation config, or without any; and `quantize_config.json`.
    fn write_configs(&mut self) -> Result<(), FormatError> {
        if let Some(config) = &self.config {
            self.staging.write(CONFIG_FILES[0], format!("{}\n", config.to_json()).as_bytes())?;
        }
        let fields = self.config.as_ref().map(|config| Value::Object(config.fields().clone()));
        let Some(mut model) = self.model_config.take() else { return Ok(()) };
        match fields {
            Some(fields) => {
                model.insert(CONFIG_KEY.into(), fields);
            }
            None => {
                model.shift_remove(CONFIG_KEY);
            }
        }
        self.staging.write("config.json", format!("{:#}\n", Value::Object(model)).as_bytes())
    }
}

/// A shard while the number of shards is unknown.
fn shard_file(index: usize) -> String {
    format!("shard-{:05}", index + 1)
}

fn shard_name(index: usize, count: usize) -> String {
    format!("model-{:05}-of-{count:05}.safetensors", index + 1)
}

/// Whether this is a name that [`CheckpointWriter`] gives to weights.
fn is_own_name(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(INDEX_SUFFIX).unwrap_or(name).strip_suffix(".safetensors") else {
        return false;
    };
    let numbers = stem.strip_prefix("model-").and_then(|numbers| numbers.split_once("-of-"));
    let is_number = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    stem == "model" || numbers.is_some_and(|(index, count)| is_number(index) && is_number(count))
}
