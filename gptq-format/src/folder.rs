//! The files of a checkpoint folder, seen through a replacement that was interrupted.
//!
//! [`CheckpointWriter`](crate::CheckpointWriter) prepares everything in [`STAGING`] and commits by renaming that folder to
//! [`COMMITTED`]; only then are the files moved to their places. As long as `COMMITTED` exists its files, and its list of
//! removals, go before what lies in the folder itself. So a reader sees the new checkpoint from the commit on, whatever
//! moment the writer was killed at, and never writes anything itself.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read as _};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::FormatError;

/// Where a writer prepares files; readers ignore it.
pub(crate) const STAGING: &str = ".gptq-staging";
/// What the staging folder is called once everything in it is complete and on disk.
pub(crate) const COMMITTED: &str = ".gptq-committed";
/// The list of what a commit replaces and removes.
pub(crate) const MANIFEST: &str = "manifest.json";

/// A file beyond this is no config: parsed, JSON takes some fifteen times as much memory.
pub(crate) const MAX_CONFIG: u64 = 16 << 20;
/// The same for an index, whose strings take some three times as much; a model of a million tensors needs this.
pub(crate) const MAX_INDEX: u64 = 128 << 20;

/// What a commit does to the folder.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// New or replaced, in the order in which they are moved to their places.
    pub(crate) files: Vec<String>,
    /// Of the old checkpoint, and not part of the new one.
    pub(crate) removed: Vec<String>,
}

/// A folder that may have a committed replacement.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: PathBuf,
    pending: Option<Manifest>,
}

impl Folder {
    pub(crate) fn open(dir: &Path) -> Result<Self, FormatError> {
        let metadata = fs::metadata(dir).map_err(|source| FormatError::io(dir, source))?;
        if !metadata.is_dir() {
            let source = ErrorKind::NotADirectory.into();
            return Err(FormatError::io(dir, source));
        }
        let manifest = dir.join(COMMITTED).join(MANIFEST);
        let pending = if exists(&manifest)? { Some(Manifest::read(&manifest)?) } else { None };
        Ok(Self { dir: dir.to_owned(), pending })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file of this name is, or `None` if there is none.
    pub(crate) fn locate(&self, name: &str) -> Result<Option<PathBuf>, FormatError> {
        if let Some(manifest) = &self.pending {
            if manifest.removed.iter().any(|removed| removed == name) {
                return Ok(None);
            }
            if manifest.files.iter().any(|file| file == name) {
                let path = self.dir.join(COMMITTED).join(name);
                if exists(&path)? {
                    return Ok(Some(path));
                }
            }
        }
        let path = self.dir.join(name);
        Ok(exists(&path)?.then_some(path))
    }

    /// The names of all files, sorted.
    pub(crate) fn names(&self) -> Result<BTreeSet<String>, FormatError> {
        let io = |source| FormatError::io(&self.dir, source);
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.dir).map_err(io)? {
            // A name that is no UTF-8 cannot be one that a checkpoint is looked for under.
            names.extend(entry.map_err(io)?.file_name().into_string());
        }
        if let Some(manifest) = &self.pending {
            names.extend(manifest.files.iter().cloned());
            names.retain(|name| !manifest.removed.contains(name));
        }
        Ok(names)
    }
}

impl Manifest {
    pub(crate) fn read(path: &Path) -> Result<Self, FormatError> {
        let manifest: Self = read_json(path, MAX_CONFIG)?;
        match manifest.files.iter().chain(&manifest.removed).find(|name| !is_plain(name)) {
            None => Ok(manifest),
            Some(name) => Err(FormatError::ShardName { path: path.to_owned(), name: name.clone() }),
        }
    }
}

/// Whether this names something directly in a folder: one component, no `..`, no separator, no root.
pub(crate) fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let single = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    // `a/` and `a/.` are one component too, and a backslash separates on other systems.
    single && !name.contains(['/', '\\', '\0', ':'])
}

pub(crate) fn exists(path: &Path) -> Result<bool, FormatError> {
    path.try_exists().map_err(|source| FormatError::io(path, source))
}

/// Reads a JSON file of bounded size.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<T, FormatError> {
    let io = |source| FormatError::io(path, source);
    let metadata = fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(FormatError::NotAFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(io)?.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(FormatError::TooLong { path: path.to_owned(), len: metadata.len(), limit });
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| FormatError::Json { path: path.to_owned(), reason: error.to_string() })
}
