use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::mem::take;
use std::path::{Path, PathBuf};

use crate::header::Header;
use crate::{Dtype, FormatError};

/// The longest tensor name, so that one entry always fits in [`HEADER_ROOM`].
pub(super) const MAX_NAME: usize = 4096;
/// A shard up to this length is kept in memory and gets a header of just the right length. Little, because a quantiser that
/// writes layers as it goes has its own use for memory.
const IN_MEMORY: usize = 8 << 20;
/// The header of a longer one has this much room, filled up with blanks; when it is full, so is the shard.
const HEADER_ROOM: usize = 1 << 20;
/// Tensors whose length would leave the next one unaligned wait for the end of the shard, together at most this long.
const WAITING: usize = 64 << 20;
/// Bytes that wait in the system's cache at most, so that closing a long shard does not mean waiting for all of it.
const UNSYNCED: usize = 256 << 20;
/// Offsets of tensors are multiples of this, which suffices for every element type.
const ALIGN: usize = 8;
/// Where the data starts, so that it can be used in place by vector instructions.
const DATA_ALIGN: usize = 64;

/// One safetensors file, written while its tensors arrive.
///
/// The format wants the header first and the tensors without gaps, and some of its readers want every tensor aligned to
/// its element. So the header's room is reserved, and tensors of an odd length go last, larger elements first.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    file: Option<File>,
    buffer: Vec<u8>,
    tensors: Vec<(String, Dtype, Vec<usize>)>,
    waiting: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    waiting_len: usize,
    data_len: u64,
    header_bound: usize,
    unsynced: usize,
}

/// A complete shard.
#[derive(Debug)]
pub(super) struct FinishedShard {
    pub(super) tensors: Vec<String>,
    pub(super) data_len: u64,
}

impl Shard {
    /// Nothing is written yet.
    pub(super) fn create(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            buffer: Vec::new(),
            tensors: Vec::new(),
            waiting: Vec::new(),
            waiting_len: 0,
            data_len: 0,
            header_bound: 256,
            unsynced: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.waiting.is_empty()
    }

    pub(super) fn has_room(&self, bytes: u64, max: u64) -> bool {
        // Every byte of a name takes at most six when it is escaped.
        let entry = 6 * MAX_NAME;
        let fits = self.data_len + self.waiting_len as u64 + bytes <= max;
        self.is_empty() || (fits && self.header_bound + entry < HEADER_ROOM && self.waiting_len < WAITING)
    }

    pub(super) fn add(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), FormatError> {
        let escaped = serde_json::Value::from(name).to_string().len();
        self.header_bound += escaped + 21 * shape.len() + 128;
        let tensor = (name.to_owned(), dtype, shape.to_vec());
        if bytes.len().is_multiple_of(ALIGN) {
            self.append(bytes)?;
            self.tensors.push(tensor);
        } else {
            self.waiting_len += bytes.len();
            self.waiting.push((tensor.0, tensor.1, tensor.2, bytes.to_vec()));
        }
        Ok(())
    }

    /// Completes the file and waits until it is on disk.
    pub(super) fn finish(mut self) -> Result<FinishedShard, FormatError> {
        // A stable sort by descending element size: each tensor's length is a multiple of its own element, so every
        // offset is a multiple of the next one's.
        let mut waiting = take(&mut self.waiting);
        waiting.sort_by_key(|(_, dtype, _, _)| std::cmp::Reverse(dtype.bits()));
        for (name, dtype, shape, bytes) in waiting {
            self.append(&bytes)?;
            self.tensors.push((name, dtype, shape));
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors =
            self.tensors.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, shape.as_slice()));
        let header =
            Header::serialize(&metadata, tensors, if self.file.is_some() { HEADER_ROOM } else { DATA_ALIGN });
        let path = take(&mut self.path);
        self.write_out(&path, &header).map_err(|source| FormatError::io(&path, source))?;
        let tensors = self.tensors.into_iter().map(|(name, _, _)| name).collect();
        Ok(FinishedShard { tensors, data_len: self.data_len })
    }

    fn write_out(&mut self, path: &Path, header: &[u8]) -> std::io::Result<()> {
        match &mut self.file {
            None => {
                let mut file = File::create_new(path)?;
                file.write_all(header)?;
                file.write_all(&self.buffer)?;
                file.sync_all()
            }
            Some(file) => {
                file.write_all(&self.buffer)?;
                file.seek(SeekFrom::Start(0))?;
                file.write_all(header)?;
                file.sync_all()
            }
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.data_len += bytes.len() as u64;
        if self.buffer.len() + bytes.len() <= IN_MEMORY {
            self.buffer.extend_from_slice(bytes);
            return Ok(());
        }
        self.spill(bytes).map_err(|source| FormatError::io(&self.path, source))
    }

    fn spill(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let mut file = File::create_new(&self.path)?;
                file.seek(SeekFrom::Start(HEADER_ROOM as u64))?;
                none.insert(file)
            }
        };
        file.write_all(&self.buffer)?;
        file.write_all(bytes)?;
        self.unsynced += self.buffer.len() + bytes.len();
        self.buffer.clear();
        if self.unsynced >= UNSYNCED {
            file.sync_data()?;
            self.unsynced = 0;
        }
        Ok(())
    }
}
