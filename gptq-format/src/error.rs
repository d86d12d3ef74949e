use std::io;
use std::path::{Path, PathBuf};

use crate::{ConfigError, Dtype, HeaderError, PackError};

/// Why a checkpoint cannot be read or written. Every variant names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else than a regular file, such as a folder or a pipe.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// What it is called.
        path: PathBuf,
    },
    /// A file that is read into memory as a whole is too long for that.
    #[error("{} has {len} bytes, at most {limit} are read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// The limit.
        limit: u64,
    },
    /// A JSON file that is none, or has another structure.
    #[error("{}: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        reason: String,
    },
    /// A safetensors file that is none, or is truncated.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// An unusable quantisation config.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// A folder without a checkpoint.
    #[error("{} holds no model.safetensors, no index and no other safetensors file", dir.display())]
    NoCheckpoint {
        /// The folder.
        dir: PathBuf,
    },
    /// Numbered shards, but no index that lists them.
    #[error("{} holds shards, but no model.safetensors.index.json", dir.display())]
    NoIndex {
        /// The folder.
        dir: PathBuf,
    },
    /// Only weights in Python's pickle format, which can run code when it is read.
    #[error(
        "{} is a pickled PyTorch file, which this crate does not read: load it in PyTorch and save its tensors with \
         safetensors.torch.save_file(tensors, \"model.safetensors\", metadata={{\"format\": \"pt\"}})",
        path.display()
    )]
    Pickle {
        /// One of the files.
        path: PathBuf,
    },
    /// Several files could be the checkpoint, and neither an index nor the config says which.
    #[error("{} holds several checkpoints, open one of them by its file name: {}", dir.display(), names.join(", "))]
    Ambiguous {
        /// The folder.
        dir: PathBuf,
        /// The candidates.
        names: Vec<String>,
    },
    /// A file's name that is not one plain name, or not that of a safetensors file where it must be: it could lead out of
    /// the folder.
    #[error("{}: {name:?} is no plain name for a file of a checkpoint", path.display())]
    ShardName {
        /// The file or folder that it stands in.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A shard that the index names is absent, as after an incomplete download.
    #[error("{} names the shard {shard}, which is missing", path.display())]
    MissingShard {
        /// The index.
        path: PathBuf,
        /// The shard.
        shard: String,
    },
    /// A tensor that is needed, or that an index promises, is absent.
    #[error("{} has no tensor `{name}`", path.display())]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The file, or the folder if it is in none.
        path: PathBuf,
    },
    /// A tensor has another element type than is needed.
    #[error("{}: tensor `{tensor}` is {dtype}, expected {expected}", path.display())]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
        /// What is needed.
        expected: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A tensor has another shape than its neighbours and the config ask for.
    #[error("{}: tensor `{tensor}` has the shape {shape:?}, expected {expected}", path.display())]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// What is needed, and why.
        expected: String,
        /// The file.
        path: PathBuf,
    },
    /// The tensors of a quantised layer do not make one.
    #[error("{}: layer `{prefix}`: {source}", path.display())]
    Linear {
        /// The layer.
        prefix: String,
        /// What is wrong.
        source: PackError,
        /// The file that holds its codes.
        path: PathBuf,
    },
    /// A quantised layer, but no config that says how.
    #[error("{}: `{prefix}` is quantised, but there is no quantize_config.json and no quantization_config", dir.display())]
    NoConfig {
        /// The layer.
        prefix: String,
        /// The folder.
        dir: PathBuf,
    },
    /// The config says that this layer is not quantised, yet its codes are there.
    #[error("{}: the config's `dynamic` skips `{prefix}`, but its codes are there", dir.display())]
    Skipped {
        /// The layer.
        prefix: String,
        /// The folder.
        dir: PathBuf,
    },
    /// Zero points stored as floats, as tools before AutoGPTQ wrote them.
    #[error(
        "{}: `{tensor}` is the float zero point of a format older than AutoGPTQ. Quantise the model again, or convert the \
         layer: GPTQ-for-LLaMa stored the zero point times the scale, so `qzeros` is round(zeros / scales) - 1 in the config's \
         bits, packed along the outputs into int32 (groups, outputs * bits / 32), and `scales` is float16 (groups, outputs)",
        path.display()
    )]
    FloatZeros {
        /// The tensor.
        tensor: String,
        /// The file.
        path: PathBuf,
    },
    /// A layer that the chosen layout cannot hold.
    #[error("layer `{prefix}` cannot be written as {format}: {reason}")]
    Unwritable {
        /// The layer.
        prefix: String,
        /// The layout.
        format: &'static str,
        /// Why not.
        reason: Unwritable,
    },
    /// The same tensor or file was written twice.
    #[error("{name} was written before")]
    WrittenTwice {
        /// Its name.
        name: String,
    },
    /// A name that a safetensors header cannot hold, or one of thousands of characters.
    #[error("{name:?} cannot be the name of a tensor")]
    TensorName {
        /// Its beginning.
        name: String,
    },
    /// A tensor's bytes do not fit its shape.
    #[error("tensor `{tensor}`: {len} bytes are not {dtype} {shape:?}")]
    ByteLength {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes given.
        len: usize,
    },
    /// Another process is writing to this folder.
    #[error("{} is being written by another process", dir.display())]
    Busy {
        /// The folder.
        dir: PathBuf,
    },
}

/// Why a layer has no representation in a layout.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum Unwritable {
    /// Version 1 stores zero points minus one.
    #[error(
        "the zero point of group {group}, output {out} is 0, and this format stores zero points minus one; write gptq_v2"
    )]
    ZeroPoint {
        /// The group.
        group: usize,
        /// The output feature.
        out: usize,
    },
    /// The layer is not what the config says about it.
    #[error("{what} is {got}, the config says {expected}")]
    Contradiction {
        /// The setting.
        what: &'static str,
        /// The layer's.
        got: String,
        /// The config's.
        expected: String,
    },
    /// The config's `dynamic` skips the layer, or there is no config.
    #[error("the config says that it is not quantised")]
    NotQuantized,
    /// The layout does not take this width, shape, grouping or asymmetry.
    #[error("it takes {0}")]
    Needs(&'static str),
}

impl FormatError {
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}
