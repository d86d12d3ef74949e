//! What a run leaves behind so that another can go on from it.
//!
//! `.gptq-journal/` in the output folder holds
//!
//! | file | content |
//! |---|---|
//! | `lock` | locked as long as a run lives |
//! | `journal` | a line with the run's identity, then a line for each finished layer: its summary, the hash of its data |
//! | `NAME.layer` | a layer's codes, and its scales in float32 |
//!
//! A layer's data is written and synced, then the folder, then its line, which is synced too: whatever moment the power
//! fails at, a line that can be read speaks of data that is there. Every line begins with the SHA-256 of the rest, and the
//! first that does not ends the journal.
//!
//! The inputs of the layers that are left are not kept: they are computed again by running the finished layers forward,
//! which costs a small part of quantising them and no disk, whereas the residual stream of 128 rows of 2048 tokens of a 7B
//! model would be 4 GB a layer.

use std::{
    collections::HashMap,
    fs::{self, File, TryLockError},
    io::{self, ErrorKind, Write as _},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use gptq_format::{FormatError, PackedLinear};
use ndarray::Array2;
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use super::{
    LayerSummary,
    identity::{Identity, hex},
    record::{self, Finished},
    summary::Entry,
};
use crate::{Layer, LlamaError};

pub(super) const FOLDER: &str = ".gptq-journal";
const JOURNAL: &str = "journal";
const NEW: &str = "journal.new";
const LOCK: &str = "lock";
/// How often a lock is tried, and how long is waited in between.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// Of the layout of these files.
const FIRST_WORD: &str = "gptq-journal-1";

/// Why a run cannot start, go on or be written down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// The folder is not empty.
    #[error("{} is not empty: resume the run that is in it, or allow it to be overwritten", dir.display())]
    Exists {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder holds a run that did not end.
    #[error("{} holds an unfinished run with {layers} finished layers: resume it, or allow it to be overwritten", dir.display())]
    Unfinished {
        /// The folder.
        dir: PathBuf,
        /// Layers that need not be quantised again.
        layers: usize,
    },
    /// The run in the folder is another one.
    #[error("{} holds a run that cannot be resumed like this: {what} was {was}, and is {is}", dir.display())]
    Different {
        /// The folder.
        dir: PathBuf,
        /// In what it differs.
        what: String,
        /// Its value.
        was: String,
        /// The value now.
        is: String,
    },
    /// The folder holds something, but no run.
    #[error("{} holds no run that could be resumed, but other files", dir.display())]
    NothingToResume {
        /// The folder.
        dir: PathBuf,
    },
    /// The journal's first line cannot be read.
    #[error("{} cannot be understood: another version has written it, or it is damaged", path.display())]
    Unreadable {
        /// The journal.
        path: PathBuf,
    },
    /// A finished layer's data has changed since it was written.
    #[error("{} is damaged: resume again, and the layer is quantised again", path.display())]
    Damaged {
        /// The layer's file.
        path: PathBuf,
    },
    /// The system refused. Layers that were finished before are kept.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl OutputError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

/// A run's journal, open for this process alone.
#[derive(Debug)]
pub(super) struct Journal {
    records: Records,
    file: File,
    _lock: File,
}

/// The finished layers of a journal.
#[derive(Clone, Debug)]
pub(super) struct Records {
    folder: PathBuf,
    entries: HashMap<Layer, Entry>,
}

/// The journal's folder of an output folder, if there is one.
pub(super) fn find(dir: &Path) -> Option<PathBuf> {
    let folder = dir.join(FOLDER);
    folder.join(JOURNAL).is_file().then_some(folder)
}

/// The number of finished layers of a journal, if it can be read.
pub(super) fn count(folder: &Path) -> Option<usize> {
    let (_, entries, _) = parse(&fs::read(folder.join(JOURNAL)).ok()?)?;
    Some(entries.len())
}

impl Journal {
    /// Starts a journal in `dir`; whatever is left of another one is removed.
    pub(super) fn create(dir: &Path, identity: &Identity) -> Result<Self, LlamaError> {
        let folder = dir.join(FOLDER);
        let at_folder = |source| OutputError::io(&folder, source);
        fs::create_dir_all(&folder).map_err(at_folder)?;
        let lock = lock(dir, &folder)?;
        for entry in fs::read_dir(&folder).map_err(at_folder)? {
            let path = entry.map_err(at_folder)?.path();
            if path.file_name().is_some_and(|name| name != LOCK) {
                fs::remove_file(&path).map_err(|source| OutputError::io(&path, source))?;
            }
        }
        // Under its name only once it is whole: what is found is a journal.
        let new = folder.join(NEW);
        let create = || -> io::Result<File> {
            let mut file = File::create_new(&new)?;
            file.write_all(format!("{FIRST_WORD}\n{}", line(identity)).as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, folder.join(JOURNAL))?;
            Ok(file)
        };
        let file = create().map_err(|source| OutputError::io(&new, source))?;
        for folder in [&folder, dir] {
            sync_dir(folder).map_err(|source| OutputError::io(folder, source))?;
        }
        Ok(Self { records: Records { folder, entries: HashMap::new() }, file, _lock: lock })
    }

    /// Opens the journal in `dir` to go on with it. Layers whose data is not what the journal says are dropped.
    pub(super) fn open(dir: &Path, identity: &Identity) -> Result<Self, LlamaError> {
        let folder = dir.join(FOLDER);
        let lock = lock(dir, &folder)?;
        let path = folder.join(JOURNAL);
        let at_path = |source| OutputError::io(&path, source);
        let bytes = fs::read(&path).map_err(at_path)?;
        let (was, entries, valid) =
            parse(&bytes).ok_or_else(|| OutputError::Unreadable { path: path.clone() })?;
        if let Some((what, was, is)) = was.difference(identity) {
            return Err(OutputError::Different { dir: dir.to_owned(), what, was, is }.into());
        }
        let file = File::options().append(true).open(&path).map_err(at_path)?;
        if valid < bytes.len() {
            // The last line was cut off by whatever ended the run.
            file.set_len(valid as u64).map_err(at_path)?;
        }
        let mut records = Records { folder, entries: HashMap::new() };
        for entry in entries {
            let layer = entry.layer();
            if records.data(layer, &entry)?.is_some() {
                records.entries.insert(layer, entry);
            } else {
                tracing::warn!(%layer, "its data is damaged: it will be quantised again");
                records.entries.remove(&layer);
            }
        }
        Ok(Self { records, file, _lock: lock })
    }

    /// What is finished by now.
    pub(super) fn records(&self) -> &Records {
        &self.records
    }

    /// Writes a finished layer down.
    pub(super) fn append(&mut self, finished: &Finished) -> Result<(), LlamaError> {
        let layer = finished.summary.layer;
        let (path, folder) = (self.records.path(layer), &self.records.folder);
        let data = record::encode(&finished.packed, &finished.scales);
        let entry = Entry::new(&finished.summary, hex(&Sha256::digest(&data)));
        let write = |bytes: &[u8]| -> io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write(&data).map_err(|source| OutputError::io(&path, source))?;
        sync_dir(folder).map_err(|source| OutputError::io(folder, source))?;
        let journal = folder.join(JOURNAL);
        let at_journal = |source| OutputError::io(&journal, source);
        self.file.write_all(line(&entry).as_bytes()).map_err(at_journal)?;
        self.file.sync_all().map_err(at_journal)?;
        self.records.entries.insert(layer, entry);
        Ok(())
    }

    /// Removes everything, once the checkpoint is in its place.
    pub(super) fn remove(self) -> Result<(), LlamaError> {
        // First what makes it a journal, so that a run that dies here leaves none to resume.
        let folder = &self.records.folder;
        let remove = || {
            fs::remove_file(folder.join(JOURNAL))?;
            fs::remove_dir_all(folder)
        };
        remove().map_err(|source| OutputError::io(folder, source).into())
    }
}

impl Records {
    /// The journal's folder, for files that only this run needs.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn summaries(&self) -> HashMap<Layer, LayerSummary> {
        self.entries.iter().map(|(&layer, entry)| (layer, entry.summary())).collect()
    }

    pub(super) fn has(&self, layer: Layer) -> bool {
        self.entries.contains_key(&layer)
    }

    /// A finished layer and its scales, `(out_features, groups)`.
    ///
    /// Errors: [`OutputError::Damaged`] if it is not there any more.
    pub(super) fn read(&self, layer: Layer) -> Result<(PackedLinear, Array2<f32>), LlamaError> {
        let damaged = || OutputError::Damaged { path: self.path(layer) };
        let entry = self.entries.get(&layer).ok_or_else(damaged)?;
        let data = self.data(layer, entry)?.ok_or_else(damaged)?;
        Ok(record::decode(&data).ok_or_else(damaged)?)
    }

    /// The weight that the forward pass goes on with, `(out_features, in_features)`.
    pub(super) fn weight(&self, layer: Layer) -> Result<Array2<f32>, LlamaError> {
        let damaged = || OutputError::Damaged { path: self.path(layer) };
        let (packed, scales) = self.read(layer)?;
        let summary = self.entries.get(&layer).ok_or_else(damaged)?.summary();
        Ok(record::dequantize(&packed, scales, &summary.report).ok_or_else(damaged)?)
    }

    fn path(&self, layer: Layer) -> PathBuf {
        self.folder.join(format!("{layer}.layer"))
    }

    /// The data of an entry, if it is what the entry says.
    fn data(&self, layer: Layer, entry: &Entry) -> Result<Option<Vec<u8>>, LlamaError> {
        let path = self.path(layer);
        match fs::read(&path) {
            Ok(data) => Ok(Some(data).filter(|data| hex(&Sha256::digest(data)) == entry.hash())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(OutputError::io(&path, source).into()),
        }
    }
}

/// JSON behind its hash.
fn line(value: &impl Serialize) -> String {
    let json = serde_json::json!(value).to_string();
    format!("{} {json}\n", hex(&Sha256::digest(json.as_bytes())))
}

/// The identity, the entries, and how many bytes of the journal are good.
fn parse(bytes: &[u8]) -> Option<(Identity, Vec<Entry>, usize)> {
    let mut lines = bytes.split_inclusive(|&byte| byte == b'\n');
    let first = lines.next()?;
    if first != format!("{FIRST_WORD}\n").as_bytes() {
        return None;
    }
    let head = lines.next()?;
    let identity = parse_line(head)?;
    let mut valid = first.len() + head.len();
    let mut entries = Vec::new();
    for line in lines {
        let Some(entry) = parse_line(line) else { break };
        entries.push(entry);
        valid += line.len();
    }
    Some((identity, entries, valid))
}

fn parse_line<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (hash, json) = line.split_once(' ')?;
    if hex(&Sha256::digest(json.as_bytes())) != hash {
        return None;
    }
    serde_json::from_str(json).ok()
}

fn lock(dir: &Path, folder: &Path) -> Result<File, LlamaError> {
    let path = folder.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|source| OutputError::io(&path, source))?;
    for attempt in 0.. {
        match file.try_lock() {
            Ok(()) => break,
            // A process that another thread has just started shares our files until it runs its own program, and with
            // them the lock of a run that has ended.
            Err(TryLockError::WouldBlock) if attempt < LOCK_ATTEMPTS => thread::sleep(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => return Err(FormatError::Busy { dir: dir.to_owned() }.into()),
            Err(TryLockError::Error(source)) => return Err(OutputError::io(&path, source).into()),
        }
    }
    Ok(file)
}

/// Removes what a run has left that was ended while it removed its journal.
pub(super) fn remove_rest(dir: &Path) -> Result<(), LlamaError> {
    let folder = dir.join(FOLDER);
    if !folder.is_dir() {
        return Ok(());
    }
    let _lock = lock(dir, &folder)?;
    fs::remove_dir_all(&folder).map_err(|source| OutputError::io(&folder, source).into())
}

/// Makes a new file's name last; other systems than Unix have no such call and need none.
fn sync_dir(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}
