//! Putting a new checkpoint in the place of an old one, so that every moment shows one of the two.
//!
//! | step | a kill after it leaves |
//! |---|---|
//! | files are written to `.gptq-staging/` and synced | the old checkpoint, and a folder that readers ignore |
//! | the manifest is written, the staging folder synced | the same |
//! | `.gptq-staging/` is renamed to `.gptq-committed/` | the new checkpoint: readers look there first |
//! | the old entry is removed if more than the entry changes, then files move to their places, the new entry last | the same |
//! | files of the old checkpoint only are removed, then `.gptq-committed/` | the new checkpoint in its place |

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use super::is_own_name;
use crate::checkpoint::{Entry, INDEX_SUFFIX, SINGLE, find_entry, index_shards};
use crate::config::CONFIG_FILES;
use crate::folder::{COMMITTED, Folder, MANIFEST, Manifest, STAGING, exists};
use crate::{FormatError, QuantizeConfig};

pub(super) const LOCK: &str = "lock";

/// The hidden folder with the files of a checkpoint that is being written; removed with its content unless it is
/// committed.
#[derive(Debug)]
pub(super) struct Staging {
    target: PathBuf,
    path: PathBuf,
    /// Held as long as the writer lives; the system releases it if the process dies.
    _lock: File,
    side_files: Vec<String>,
    committed: bool,
    /// Whether the target itself was created for this checkpoint.
    is_new: bool,
}

impl Staging {
    pub(super) fn create(target: &Path) -> Result<Self, FormatError> {
        let is_new = !exists(target)?;
        fs::create_dir_all(target).map_err(|source| FormatError::io(target, source))?;
        recover(target)?;
        let path = target.join(STAGING);
        if exists(&path)? {
            // Left by a writer that was killed, unless the writer lives: then it holds the lock.
            drop(lock(target, &path)?);
            tracing::info!(path = %path.display(), "removing what an interrupted writer left");
            fs::remove_dir_all(&path).map_err(|source| FormatError::io(&path, source))?;
        }
        fs::create_dir(&path).map_err(|source| match source.kind() {
            ErrorKind::AlreadyExists => FormatError::Busy { dir: target.to_owned() },
            _ => FormatError::io(&path, source),
        })?;
        let lock = lock(target, &path)?;
        let target = target.to_owned();
        Ok(Self { target, path, _lock: lock, side_files: Vec::new(), committed: false, is_new })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Writes a whole file and waits until it is on disk.
    pub(super) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let path = self.path.join(name);
        if self.side_files.iter().any(|file| file == name) {
            return Err(FormatError::WrittenTwice { name: name.into() });
        }
        write_synced(&path, bytes).map_err(|source| FormatError::io(&path, source))?;
        self.side_files.push(name.into());
        Ok(())
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), FormatError> {
        let from = self.path.join(from);
        fs::rename(&from, self.path.join(to)).map_err(|source| FormatError::io(&from, source))
    }

    /// Commits `weights`, everything written here, and `entry`, which leads a reader to the weights.
    pub(super) fn commit(mut self, weights: Vec<String>, entry: String) -> Result<(), FormatError> {
        let folder = Folder::open(&self.target)?;
        let mut manifest = Manifest { files: weights, removed: Vec::new() };
        let side_files = std::mem::take(&mut self.side_files);
        for name in side_files.iter().filter(|&name| *name != entry) {
            if !self.drop_if_unchanged(name)? {
                manifest.files.push(name.clone());
            }
        }
        manifest.files.push(entry);
        manifest.removed =
            outdated(&folder, |name| manifest.files.iter().chain(&side_files).any(|new| new == name))?;
        let path = self.path.join(MANIFEST);
        let json = serde_json::json!(manifest).to_string();
        let committed = self.target.join(COMMITTED);
        write_synced(&path, json.as_bytes())
            .and_then(|()| sync_dir(&self.path))
            .and_then(|()| fs::rename(&self.path, &committed))
            .map_err(|source| FormatError::io(&self.path, source))?;
        self.committed = true;
        sync_dir(&self.target).map_err(|source| FormatError::io(&self.target, source))?;
        apply(&self.target, &manifest)
    }

    /// A file that the target already has stays as it is: the fewer files change, the more replacements are a single
    /// rename for every tool.
    fn drop_if_unchanged(&self, name: &str) -> Result<bool, FormatError> {
        let path = self.path.join(name);
        let old = fs::read(self.target.join(name)).ok();
        let new = fs::read(&path).map_err(|source| FormatError::io(&path, source))?;
        let unchanged = old.is_some_and(|old| old == new);
        if unchanged {
            fs::remove_file(&path).map_err(|source| FormatError::io(&path, source))?;
        }
        Ok(unchanged)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove an unfinished checkpoint");
        }
        if self.is_new {
            // Fails, as it should, if somebody has put something there meanwhile.
            let _ = fs::remove_dir(&self.target);
        }
    }
}

/// Completes a committed replacement that was interrupted.
pub(super) fn recover(target: &Path) -> Result<bool, FormatError> {
    let committed = target.join(COMMITTED);
    if !exists(&committed)? {
        return Ok(false);
    }
    let _lock = lock(target, &committed)?;
    let manifest = committed.join(MANIFEST);
    if exists(&manifest)? {
        tracing::info!(dir = %target.display(), "completing an interrupted replacement");
        apply(target, &Manifest::read(&manifest)?)?;
    } else {
        // The manifest goes first when the folder is removed, and only after everything else has moved.
        fs::remove_dir_all(&committed).map_err(|source| FormatError::io(&committed, source))?;
    }
    Ok(true)
}

/// Moves committed files to their places. May be repeated from any point.
fn apply(target: &Path, manifest: &Manifest) -> Result<(), FormatError> {
    let committed = target.join(COMMITTED);
    let remove = |name: &str| remove_if_there(&target.join(name));
    let step = || -> io::Result<()> {
        if manifest.files.len() > 1 || !manifest.removed.is_empty() {
            // Other tools read the folder without the manifest. Without an entry they find no checkpoint rather than
            // one that mixes old and new files.
            let replaced = manifest.files.iter().filter(|name| committed.join(name).exists());
            for name in replaced.chain(&manifest.removed).filter(|name| is_entry(name)) {
                remove(name)?;
            }
            sync_dir(target)?;
        }
        for name in &manifest.files {
            match fs::rename(committed.join(name), target.join(name)) {
                Err(error) if error.kind() == ErrorKind::NotFound && target.join(name).exists() => {}
                other => other?,
            }
        }
        for name in &manifest.removed {
            remove(name)?;
        }
        sync_dir(target)?;
        remove_if_there(&committed.join(MANIFEST))?;
        fs::remove_dir_all(&committed)?;
        sync_dir(target)
    };
    step().map_err(|source| FormatError::io(target, source))
}

/// The weights and configs of the old checkpoint that are none of the new one.
fn outdated(folder: &Folder, is_new: impl Fn(&str) -> bool) -> Result<Vec<String>, FormatError> {
    let mut old: Vec<String> = folder.names()?.into_iter().filter(|name| is_own_name(name)).collect();
    old.extend(CONFIG_FILES.map(String::from));
    // An old checkpoint that cannot be understood leads to no further files.
    let config = QuantizeConfig::find(folder).ok().flatten();
    let entry = find_entry(folder, config.as_ref()).ok();
    let is_model = |name: &str| {
        let named = config.as_ref().and_then(QuantizeConfig::model_basename);
        name.starts_with("gptq_model-")
            || named.is_some_and(|stem| name.starts_with(&format!("{stem}.safetensors")))
    };
    match entry {
        Some(Entry::File(name)) if is_model(&name) => old.push(name),
        Some(Entry::Index(name)) if is_model(&name) || is_own_name(&name) => {
            old.extend(index_shards(folder, &name).unwrap_or_default());
            old.push(name);
        }
        _ => {}
    }
    old.sort();
    old.dedup();
    let mut removed = Vec::new();
    for name in old {
        if !is_new(&name) && exists(&folder.dir().join(&name))? {
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Whether other tools find a checkpoint by this name: an index or a single file, but not a numbered shard.
fn is_entry(name: &str) -> bool {
    name.ends_with(INDEX_SUFFIX) || (name.ends_with(".safetensors") && (name == SINGLE || !is_own_name(name)))
}

fn lock(target: &Path, folder: &Path) -> Result<File, FormatError> {
    let path = folder.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|source| FormatError::io(&path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(FormatError::Busy { dir: target.to_owned() }),
        Err(TryLockError::Error(source)) => Err(FormatError::io(&path, source)),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes renames in a folder last; other systems than Unix have no such call and need none.
fn sync_dir(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}
