use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::folder::Folder;
use crate::zeros::ZeroSample;
use crate::{FormatError, QuantizeConfig, Tensor, TensorFile, ZeroConvention, ZeroEvidence};

mod linear;
mod locate;
#[cfg(test)]
mod tests;
mod words;

pub use linear::Remark;
pub(crate) use locate::{Entry, INDEX_SUFFIX, SINGLE, find as find_entry, index_shards};

/// At most so many layers are looked at to decide the zero convention, and of each at most so many rows.
const SAMPLED_LAYERS: usize = 64;
const SAMPLED_ROWS: usize = 8;

/// A checkpoint folder, opened for reading.
///
/// All files are mapped: opening costs their headers and a sample of the zero points, whatever the model's size.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<TensorFile>,
    /// The file of every tensor.
    by_name: HashMap<String, usize>,
    config: Option<QuantizeConfig>,
    zeros: Option<ZeroEvidence>,
    oddities: Vec<String>,
}

/// How to read a [`Checkpoint`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadOptions {
    zeros: Option<ZeroConvention>,
}

impl ReadOptions {
    /// Reads zero points by this convention, whatever the evidence says.
    pub fn zero_convention(mut self, convention: ZeroConvention) -> Self {
        self.zeros = Some(convention);
        self
    }
}

impl Checkpoint {
    /// Opens a folder, or one safetensors file of a folder.
    ///
    /// In a folder the weights are `model.safetensors`, or the shards of `model.safetensors.index.json`, or what the
    /// config names, or the `gptq_model-*.safetensors` of AutoGPTQ, or the only safetensors file there is.
    ///
    /// # Errors
    /// [`FormatError`] with the file, and the tensor where one is at fault. Nothing in a file makes this panic or
    /// allocate more than some multiple of the file's size.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        Self::open_with(path, &ReadOptions::default())
    }

    /// [`open`](Self::open) with options.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Self, FormatError> {
        let path = path.as_ref();
        let (folder, file) = if path.is_file() {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            (Folder::open(parent.unwrap_or(Path::new(".")))?, Some(path))
        } else {
            (Folder::open(path)?, None)
        };
        let config = QuantizeConfig::find(&folder)?;
        let found = match file {
            Some(file) => locate::Weights::of_file(file)?,
            None => locate::Weights::of_folder(&folder, config.as_ref())?,
        };
        let dir = folder.dir().to_owned();
        let by_name = found.by_name;
        let mut checkpoint =
            Self { dir, files: found.files, by_name, config, zeros: None, oddities: found.oddities };
        checkpoint.zeros = checkpoint.decide_zeros(options)?;
        Ok(checkpoint)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The quantisation config; `None` if the model is not quantised.
    pub fn config(&self) -> Option<&QuantizeConfig> {
        self.config.as_ref()
    }

    /// How zero points are stored and how that was decided; `None` without quantised layers.
    pub fn zero_evidence(&self) -> Option<&ZeroEvidence> {
        self.zeros.as_ref()
    }

    /// What is odd about the folder though it can be read, one sentence each.
    pub fn oddities(&self) -> &[String] {
        &self.oddities
    }

    /// The files that hold tensors.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// The names of all tensors, file by file in the order in which they lie there.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors().map(|tensor| tensor.name())
    }

    /// All tensors, file by file in the order in which they lie there.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        let tensors = self.files.iter().enumerate().flat_map(|(file, f)| f.tensors().map(move |t| (file, t)));
        let listed = move |file, tensor: &Tensor<'_>| self.by_name.get(tensor.name()) == Some(&file);
        tensors.filter(move |(file, tensor)| listed(*file, tensor)).map(|(_, tensor)| tensor)
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.files[*self.by_name.get(name)?].get(name)
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`FormatError::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, FormatError> {
        self.get(name).ok_or_else(|| FormatError::MissingTensor { name: name.into(), path: self.dir.clone() })
    }
}
