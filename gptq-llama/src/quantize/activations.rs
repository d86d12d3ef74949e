//! Activations of all calibration rows: on the device as far as its budget reaches, in the host's memory as far as that
//! one does, and in a file beyond.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use gptq_kernels::{DenseType, KernelError, quantize::QuantizeBackend};

use super::journal::OutputError;
use crate::{LlamaError, TokenRows};

/// How much of the activations may be where.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    /// Bytes of all activations together in the host's memory.
    pub(super) bytes: usize,
    /// Bytes in the memory of the device, if it has its own.
    pub(super) device: Option<usize>,
    /// Folder for what does not fit. Without one the residual stream stays in memory all the same, and what else does not
    /// fit is computed again.
    pub(super) spill: Option<PathBuf>,
    /// Bytes of an element.
    pub(super) element: usize,
}

/// Bytes of an element of a device's activations.
pub(super) const fn element_bytes<D: QuantizeBackend>() -> usize {
    match D::ELEMENT {
        DenseType::F32 => 4,
        DenseType::F16 | DenseType::Bf16 => 2,
    }
}

impl Budget {
    /// Bytes of so many features of every token.
    pub(super) fn bytes_of(&self, rows: &TokenRows, features: usize) -> usize {
        rows.tokens().saturating_mul(features).saturating_mul(self.element)
    }

    /// Divides the budget among `streams` streams that each have a residual of `hidden` features a token, and one more
    /// activation of up to `kept` features. The residual is used most, and so comes first.
    pub(super) fn divide(&self, rows: &TokenRows, streams: usize, hidden: usize, kept: usize) -> Shares {
        let (hidden, kept) = (self.bytes_of(rows, hidden), self.bytes_of(rows, kept));
        let divide = |bytes: usize, hidden: usize| {
            let each = bytes / streams;
            (each.min(hidden), each - each.min(hidden))
        };
        match self.device {
            None if self.spill.is_none() => Shares { hidden: Share::near(hidden), kept: Share::near(kept) },
            None => {
                let (hidden, kept) = divide(self.bytes, hidden);
                Shares { hidden: Share::near(hidden), kept: Share::near(kept) }
            }
            Some(device) => {
                let near = divide(device, hidden);
                let far = divide(self.bytes, hidden - near.0);
                Shares {
                    hidden: Share { near: near.0, far: far.0 },
                    kept: Share { near: near.1, far: far.1 },
                }
            }
        }
    }
}

/// Bytes that one stream may have in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shares {
    pub(super) hidden: Share,
    pub(super) kept: Share,
}

/// Bytes of one activation of all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// Where the device works.
    pub(super) near: usize,
    /// In the host's memory, if that is another.
    pub(super) far: usize,
}

impl Share {
    fn near(near: usize) -> Self {
        Self { near, far: 0 }
    }
}

/// One activation of every calibration row.
pub(super) struct Activations<D: QuantizeBackend> {
    rows: Vec<Slot<D>>,
    /// Rows that are neither on the device nor in the file: room for the longest activation, and how many bytes are in use.
    host: Vec<Option<(D::HostBytes, usize)>>,
    /// Where a row lies in the file.
    offsets: Vec<u64>,
    /// The rows before this many lie on the device.
    near: usize,
    /// The rows behind those and before this many lie in the host's memory, the others in the file.
    far: usize,
    spill: Option<SpillFile>,
    folder: Option<PathBuf>,
    /// Rows that had to leave the device, each time.
    evicted: Vec<Evicted>,
}

/// Rows that left a device for the host because it had no memory left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Evicted {
    pub(super) moved: usize,
    pub(super) kept: usize,
}

enum Slot<D: QuantizeBackend> {
    Empty,
    Near(D::Buffer),
    /// So many elements in the host's memory or in the file.
    Saved(usize),
}

impl<D: QuantizeBackend> Activations<D> {
    /// Room for activations of up to `features` features a token.
    pub(super) fn new(
        rows: &TokenRows,
        features: usize,
        share: Share,
        folder: Option<&Path>,
    ) -> Result<Self, LlamaError> {
        let mut offsets = vec![0];
        for row in rows.rows() {
            let bytes = (row.len() * features * element_bytes::<D>()) as u64;
            offsets.push(offsets.last().copied().unwrap_or(0) + bytes);
        }
        let count = rows.rows().len();
        let fitting = |bytes: usize| offsets[1..].iter().take_while(|&&end| end <= bytes as u64).count();
        let near = fitting(share.near);
        let far = match folder {
            Some(_) => fitting(share.near.saturating_add(share.far)),
            None => count,
        };
        let mut activations = Self {
            rows: (0..count).map(|_| Slot::Empty).collect(),
            host: (0..count).map(|_| None).collect(),
            offsets,
            near,
            far,
            spill: None,
            folder: folder.map(Path::to_owned),
            evicted: Vec::new(),
        };
        if far < count {
            // Now, so that a folder that cannot be written to is told before the work.
            activations.spill_file()?;
        }
        Ok(activations)
    }

    /// Rows on the device, and in the host's memory if that is another.
    pub(super) fn places(&self) -> (usize, usize) {
        (self.near, self.far - self.near)
    }

    fn spill_file(&mut self) -> Result<&mut SpillFile, LlamaError> {
        let folder = self.folder.as_deref().expect("invariant: without a folder nothing goes to a file");
        let file = match self.spill.take() {
            Some(file) => file,
            None => SpillFile::create(folder)?,
        };
        Ok(self.spill.insert(file))
    }

    pub(super) fn is_empty(&self, row: usize) -> bool {
        matches!(self.rows[row], Slot::Empty)
    }

    /// A row, which is empty afterwards. Panics if it is empty.
    pub(super) fn take(&mut self, device: &D, row: usize) -> Result<D::Buffer, LlamaError> {
        match std::mem::replace(&mut self.rows[row], Slot::Empty) {
            Slot::Near(buffer) => Ok(buffer),
            Slot::Saved(len) => {
                let mut buffer = self.alloc(device, len)?;
                let offset = self.offsets[row];
                let bytes = len * element_bytes::<D>();
                let bytes = match &self.host[row] {
                    Some((host, used)) if row < self.far => &host.as_ref()[..*used],
                    _ => self.spill_file()?.read(offset, bytes)?,
                };
                device.restore(bytes, D::slice_mut(&mut buffer, 0..len))?;
                Ok(buffer)
            }
            Slot::Empty => panic!("invariant: the stage before has computed this row"),
        }
    }

    /// A buffer on the device, which other rows leave for it if they must.
    pub(super) fn alloc(&mut self, device: &D, len: usize) -> Result<D::Buffer, LlamaError> {
        loop {
            match device.alloc(len) {
                Err(KernelError::OutOfGpuMemory { .. }) if self.evict(device)? > 0 => {}
                result => return Ok(result?),
            }
        }
    }

    /// Moves half of the rows that are on the device to the host; how many those are.
    pub(super) fn evict(&mut self, device: &D) -> Result<usize, LlamaError> {
        let (rows, keep) = (self.near, self.near / 2);
        self.near = keep;
        for row in keep..rows {
            if let Slot::Near(buffer) = std::mem::replace(&mut self.rows[row], Slot::Empty) {
                self.save(device, row, &buffer)?;
            }
        }
        if rows > keep {
            let moved = rows - keep;
            tracing::warn!(moved, kept = keep, "out of GPU memory: activations of rows go to the host");
            self.evicted.push(Evicted { moved, kept: keep });
        }
        Ok(rows - keep)
    }

    /// What [`evict`](Self::evict) has done since this was asked last.
    pub(super) fn take_evicted(&mut self) -> Vec<Evicted> {
        std::mem::take(&mut self.evicted)
    }

    /// Sets a row.
    pub(super) fn put(&mut self, device: &D, row: usize, buffer: D::Buffer) -> Result<(), LlamaError> {
        if row < self.near {
            self.rows[row] = Slot::Near(buffer);
            return Ok(());
        }
        self.save(device, row, &buffer)
    }

    fn save(&mut self, device: &D, row: usize, buffer: &D::Buffer) -> Result<(), LlamaError> {
        let len = D::buffer_len(buffer);
        let (bytes, offset) = (len * element_bytes::<D>(), self.offsets[row]);
        if row < self.far {
            let room = (self.offsets[row + 1] - offset) as usize;
            let (host, used) = self.host[row].get_or_insert_with(|| (device.host_bytes(room), 0));
            device.save(D::slice(buffer, 0..len), &mut host.as_mut()[..bytes])?;
            *used = bytes;
        } else {
            let spill = self.spill_file()?;
            device.save(D::slice(buffer, 0..len), spill.buffer(bytes))?;
            spill.write(offset)?;
        }
        self.rows[row] = Slot::Saved(len);
        Ok(())
    }

    /// Sets a row to what [`take`](Self::take) has returned.
    pub(super) fn put_unchanged(
        &mut self,
        device: &D,
        row: usize,
        buffer: D::Buffer,
    ) -> Result<(), LlamaError> {
        let len = D::buffer_len(&buffer);
        let is_in_file = self.spill.is_some() && row >= self.far;
        let bytes = self.host[row].as_ref().map(|&(_, used)| used);
        if row >= self.near && (is_in_file || bytes == Some(len * element_bytes::<D>())) {
            self.rows[row] = Slot::Saved(len);
            return Ok(());
        }
        self.put(device, row, buffer)
    }
}

/// A file that nobody else sees.
///
/// Written through the page cache, it is memory as long as there is some to spare, and on disk when there is none.
struct SpillFile {
    path: PathBuf,
    file: File,
    bytes: Vec<u8>,
}

impl SpillFile {
    fn create(folder: &Path) -> Result<Self, LlamaError> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let path = folder.join(format!("spill-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(|source| OutputError::io(&path, source))?;
        if cfg!(unix) {
            // The open file goes on without its name, and is gone when the process is.
            fs::remove_file(&path).map_err(|source| OutputError::io(&path, source))?;
        }
        Ok(Self { path, file, bytes: Vec::new() })
    }

    /// Room for what is to be written.
    fn buffer(&mut self, len: usize) -> &mut [u8] {
        self.bytes.resize(len, 0);
        &mut self.bytes
    }

    fn write(&mut self, offset: u64) -> Result<(), LlamaError> {
        let mut write = || -> io::Result<()> {
            self.file.seek(SeekFrom::Start(offset))?;
            self.file.write_all(&self.bytes)
        };
        write().map_err(|source| OutputError::io(&self.path, source).into())
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<&[u8], LlamaError> {
        self.bytes.resize(len, 0);
        let mut read = || -> io::Result<()> {
            self.file.seek(SeekFrom::Start(offset))?;
            self.file.read_exact(&mut self.bytes)
        };
        read().map_err(|source| OutputError::io(&self.path, source))?;
        Ok(&self.bytes)
    }
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        if !cfg!(unix) {
            // Left behind it does no harm: the next run removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use gptq_kernels::{Device, cpu::Cpu};

    use super::*;

    fn buffer(values: &[f32]) -> <Cpu as Device>::Buffer {
        let mut buffer = Cpu.alloc(values.len()).unwrap();
        Cpu.upload(values, Cpu::slice_mut(&mut buffer, 0..values.len())).unwrap();
        buffer
    }

    #[test]
    fn rows_come_back_from_memory_and_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let rows = TokenRows::new(vec![vec![0; 3], vec![0; 1], vec![0; 2]]).unwrap();
        for bytes in [0, 3 * 2 * 4, 4 * 2 * 4, 1000] {
            let shares = [Share::near(bytes), Share { near: bytes / 2, far: bytes / 4 }];
            for share in shares {
                let mut all: Activations<Cpu> = Activations::new(&rows, 2, share, Some(dir.path())).unwrap();
                let values = |row: usize, shift: f32| -> Vec<f32> {
                    (0..rows.rows()[row].len() * 2).map(|i| i as f32 + shift + 10.0 * row as f32).collect()
                };
                for shift in [0.5, 0.25] {
                    for row in 0..3 {
                        assert!(all.is_empty(row));
                        all.put(&Cpu, row, buffer(&values(row, shift))).unwrap();
                    }
                    for row in [2, 0, 1] {
                        for _ in 0..2 {
                            let taken = all.take(&Cpu, row).unwrap();
                            let mut got = vec![0.0; rows.rows()[row].len() * 2];
                            let len = got.len();
                            Cpu.download(Cpu::slice(&taken, 0..len), &mut got).unwrap();
                            assert_eq!(got, values(row, shift), "{share:?}, row {row}");
                            if row == 0 {
                                // Also the row that is away while others leave the device.
                                all.evict(&Cpu).unwrap();
                            }
                            all.put_unchanged(&Cpu, row, taken).unwrap();
                        }
                        drop(all.take(&Cpu, row).unwrap());
                    }
                }
            }
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), usize::from(!cfg!(unix)));
    }

    #[test]
    fn the_residual_comes_first() {
        let rows = TokenRows::new(vec![vec![0; 100]]).unwrap();
        let divide = |bytes, device, spill: bool| {
            let spill = spill.then(PathBuf::new);
            let shares = Budget { bytes, device, spill, element: 4 }.divide(&rows, 2, 8, 32);
            [shares.hidden.near, shares.hidden.far, shares.kept.near, shares.kept.far]
        };
        assert_eq!(divide(0, None, true), [0; 4]);
        assert_eq!(divide(4000, None, true), [2000, 0, 0, 0]);
        assert_eq!(divide(10_000, None, true), [3200, 0, 1800, 0]);
        assert_eq!(divide(0, None, false), [3200, 0, 12_800, 0]);
        assert_eq!(divide(10_000, Some(4000), true), [2000, 1200, 0, 3800]);
        assert_eq!(divide(10_000, Some(8000), true), [3200, 0, 800, 5000]);
    }
}
