//! Which files of a folder are the checkpoint.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde::Deserialize;

use crate::folder::{Folder, MAX_INDEX, is_plain, read_json};
use crate::{FormatError, QuantizeConfig, TensorFile};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX_SUFFIX: &str = ".index.json";
const EXTENSION: &str = ".safetensors";
/// Endings of pickled weights.
const PICKLES: [&str; 4] = [".pt", ".pth", ".bin", ".ckpt"];
/// Safetensors files that lie beside models and are none.
const NOT_A_MODEL: [&str; 2] = ["adapter_model", "expected"];

/// The opened files of a checkpoint and which of them has which tensor.
#[derive(Debug, Default)]
pub(super) struct Weights {
    pub(super) files: Vec<TensorFile>,
    pub(super) by_name: HashMap<String, usize>,
    pub(super) oddities: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    pub(super) fn of_file(path: &Path) -> Result<Self, FormatError> {
        if is_pickle(&path.to_string_lossy()) {
            return Err(FormatError::Pickle { path: path.to_owned() });
        }
        let mut weights = Self::default();
        weights.add(TensorFile::open(path)?);
        Ok(weights)
    }

    pub(super) fn of_folder(folder: &Folder, config: Option<&QuantizeConfig>) -> Result<Self, FormatError> {
        match find(folder, config)? {
            Entry::File(name) => {
                let path = folder.locate(&name)?.unwrap_or_else(|| folder.dir().join(&name));
                Self::of_file(&path)
            }
            Entry::Index(name) => Self::of_index(folder, &name),
        }
    }

    fn of_index(folder: &Folder, name: &str) -> Result<Self, FormatError> {
        let path = folder.locate(name)?.unwrap_or_else(|| folder.dir().join(name));
        let index = Index::read(&path)?;
        let mut weights = Self::default();
        let mut places = HashMap::new();
        for shard in index.weight_map.values() {
            if places.contains_key(shard.as_str()) {
                continue;
            }
            let Some(file) = folder.locate(shard)? else {
                return Err(FormatError::MissingShard { path, shard: shard.clone() });
            };
            places.insert(shard.as_str(), weights.files.len());
            weights.files.push(TensorFile::open(file)?);
        }
        for (tensor, shard) in &index.weight_map {
            let file = places[shard.as_str()];
            if weights.files[file].get(tensor).is_none() {
                let path = weights.files[file].path().to_owned();
                return Err(FormatError::MissingTensor { name: tensor.clone(), path });
            }
            weights.by_name.insert(tensor.clone(), file);
        }
        for file in &weights.files {
            let unlisted =
                file.tensors().filter(|tensor| !weights.by_name.contains_key(tensor.name())).count();
            if unlisted > 0 {
                let file = file.path().display();
                weights.oddities.push(format!("{file} has {unlisted} tensors that the index does not list"));
            }
        }
        Ok(weights)
    }

    fn add(&mut self, file: TensorFile) {
        let place = self.files.len();
        self.by_name.extend(file.tensors().map(|tensor| (tensor.name().to_owned(), place)));
        self.files.push(file);
    }
}

impl Index {
    fn read(path: &Path) -> Result<Self, FormatError> {
        let index: Self = read_json(path, MAX_INDEX)?;
        match index.weight_map.values().find(|shard| !is_plain(shard) || !shard.ends_with(EXTENSION)) {
            None => Ok(index),
            Some(shard) => Err(FormatError::ShardName { path: path.to_owned(), name: shard.clone() }),
        }
    }
}

/// The shards that an index names; they need not exist.
pub(crate) fn index_shards(folder: &Folder, name: &str) -> Result<BTreeSet<String>, FormatError> {
    let Some(path) = folder.locate(name)? else { return Ok(BTreeSet::new()) };
    Ok(Index::read(&path)?.weight_map.into_values().collect())
}

/// What leads to all files of a checkpoint.
#[derive(Debug, PartialEq)]
pub(crate) enum Entry {
    File(String),
    Index(String),
}

/// Finds the entry: the standard names first (the single file before the index, as transformers does), then what the
/// config names, then AutoGPTQ's names, then the only candidate.
pub(crate) fn find(folder: &Folder, config: Option<&QuantizeConfig>) -> Result<Entry, FormatError> {
    let names = folder.names()?;
    let configured = config.and_then(|config| config.model_basename()).filter(|name| is_plain(name));
    for stem in ["model"].into_iter().chain(configured) {
        let file = format!("{stem}{EXTENSION}");
        let index = format!("{file}{INDEX_SUFFIX}");
        if names.contains(&file) {
            return Ok(Entry::File(file));
        }
        if names.contains(&index) {
            return Ok(Entry::Index(index));
        }
    }
    let mut candidates = entries(&names, |name| name.starts_with("gptq_model-"));
    if candidates.is_empty() {
        candidates = entries(&names, |name| !NOT_A_MODEL.iter().any(|other| name.starts_with(other)));
    }
    if candidates.len() > 1 && candidates.iter().all(|(name, _)| name.contains("-of-")) {
        return Err(FormatError::NoIndex { dir: folder.dir().to_owned() });
    }
    if candidates.len() > 1 {
        let names = candidates.into_iter().map(|(name, _)| name).collect();
        return Err(FormatError::Ambiguous { dir: folder.dir().to_owned(), names });
    }
    if let Some((_, entry)) = candidates.pop() {
        return Ok(entry);
    }
    match names.iter().find(|name| is_pickle(name)) {
        Some(pickle) => Err(FormatError::Pickle { path: folder.dir().join(pickle) }),
        None => Err(FormatError::NoCheckpoint { dir: folder.dir().to_owned() }),
    }
}

fn is_pickle(name: &str) -> bool {
    PICKLES.iter().any(|ending| name.ends_with(ending))
}

/// The indexes among these names, or without any the safetensors files.
fn entries(names: &BTreeSet<String>, wanted: impl Fn(&str) -> bool) -> Vec<(String, Entry)> {
    let ending = |ending: &str| -> Vec<String> {
        names.iter().filter(|name| name.ends_with(ending) && wanted(name)).cloned().collect()
    };
    let indexes = ending(".safetensors.index.json");
    if indexes.is_empty() {
        ending(EXTENSION).into_iter().map(|name| (name.clone(), Entry::File(name))).collect()
    } else {
        indexes.into_iter().map(|name| (name.clone(), Entry::Index(name))).collect()
    }
}
