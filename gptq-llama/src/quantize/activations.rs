//! Activations of all calibration rows, in memory as far as a budget reaches and in a file beyond.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use gptq_kernels::Backend;

use super::journal::OutputError;
use crate::{LlamaError, TokenRows};

/// How much of the activations may be in memory, and where the rest goes.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    /// Bytes of all activations together.
    pub(super) bytes: usize,
    /// Folder for what does not fit. Without one the residual stream stays in memory all the same, and what else does not
    /// fit is computed again.
    pub(super) spill: Option<PathBuf>,
}

impl Budget {
    /// Divides the budget among `streams` streams that each have a residual of `hidden` features a token, and one more
    /// activation of up to `kept` features. The residual is used most, and so comes first.
    pub(super) fn divide(&self, rows: &TokenRows, streams: usize, hidden: usize, kept: usize) -> Shares {
        let bytes = |features: usize| rows.tokens().saturating_mul(features).saturating_mul(size_of::<f32>());
        let all = bytes(hidden);
        if self.spill.is_none() {
            return Shares { hidden: all, kept: bytes(kept) };
        }
        let each = self.bytes / streams;
        let hidden = each.min(all);
        Shares { hidden, kept: each - hidden }
    }
}

/// Bytes that one stream may have in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shares {
    pub(super) hidden: usize,
    pub(super) kept: usize,
}

/// One activation of every calibration row.
pub(super) struct Activations<D: Backend> {
    rows: Vec<Slot<D>>,
    /// Where a row lies in the file; the rows before this many lie in memory.
    offsets: Vec<u64>,
    resident: usize,
    spill: Option<SpillFile>,
}

enum Slot<D: Backend> {
    Empty,
    Memory(D::Buffer),
    /// So many elements in the file.
    File(usize),
}

impl<D: Backend> Activations<D> {
    /// Room for activations of up to `features` features a token, the first rows of which stay in memory, up to `bytes`.
    pub(super) fn new(
        rows: &TokenRows,
        features: usize,
        bytes: usize,
        folder: Option<&Path>,
    ) -> Result<Self, LlamaError> {
        let mut offsets = vec![0];
        for row in rows.rows() {
            let end = offsets.last().copied().unwrap_or(0) + (row.len() * features * size_of::<f32>()) as u64;
            offsets.push(end);
        }
        let count = rows.rows().len();
        let resident = match folder {
            Some(_) => offsets[1..].iter().take_while(|&&end| end <= bytes as u64).count(),
            None => count,
        };
        let spill = match folder {
            Some(folder) if resident < count => Some(SpillFile::create(folder)?),
            _ => None,
        };
        Ok(Self { rows: (0..count).map(|_| Slot::Empty).collect(), offsets, resident, spill })
    }

    pub(super) fn is_empty(&self, row: usize) -> bool {
        matches!(self.rows[row], Slot::Empty)
    }

    /// A row, which is empty afterwards. Panics if it is empty.
    pub(super) fn take(&mut self, device: &D, row: usize) -> Result<D::Buffer, LlamaError> {
        match std::mem::replace(&mut self.rows[row], Slot::Empty) {
            Slot::Memory(buffer) => Ok(buffer),
            Slot::File(len) => {
                let spill =
                    self.spill.as_mut().expect("invariant: a row is in the file only if there is one");
                let values = spill.read(self.offsets[row], len)?;
                let mut buffer = device.alloc(len)?;
                device.upload(values, D::slice_mut(&mut buffer, 0..len))?;
                Ok(buffer)
            }
            Slot::Empty => panic!("invariant: the stage before has computed this row"),
        }
    }

    /// Sets a row.
    pub(super) fn put(&mut self, device: &D, row: usize, buffer: D::Buffer) -> Result<(), LlamaError> {
        self.rows[row] = match &mut self.spill {
            Some(spill) if row >= self.resident => {
                let len = D::buffer_len(&buffer);
                let values = spill.buffer(len);
                device.download(D::slice(&buffer, 0..len), values)?;
                spill.write(self.offsets[row])?;
                Slot::File(len)
            }
            _ => Slot::Memory(buffer),
        };
        Ok(())
    }

    /// Sets a row to what [`take`](Self::take) has returned.
    pub(super) fn put_unchanged(&mut self, row: usize, buffer: D::Buffer) {
        self.rows[row] = match &self.spill {
            Some(_) if row >= self.resident => Slot::File(D::buffer_len(&buffer)),
            _ => Slot::Memory(buffer),
        };
    }
}

/// A file that nobody else sees.
///
/// Written through the page cache, it is memory as long as there is some to spare, and on disk when there is none.
struct SpillFile {
    path: PathBuf,
    file: File,
    values: Vec<f32>,
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
        Ok(Self { path, file, values: Vec::new() })
    }

    /// Room for values to be written.
    fn buffer(&mut self, len: usize) -> &mut [f32] {
        self.values.resize(len, 0.0);
        &mut self.values
    }

    fn write(&mut self, offset: u64) -> Result<(), LlamaError> {
        let mut write = || -> io::Result<()> {
            self.file.seek(SeekFrom::Start(offset))?;
            self.file.write_all(bytemuck::cast_slice(&self.values))
        };
        write().map_err(|source| OutputError::io(&self.path, source).into())
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<&[f32], LlamaError> {
        self.values.resize(len, 0.0);
        let mut read = || -> io::Result<()> {
            self.file.seek(SeekFrom::Start(offset))?;
            self.file.read_exact(bytemuck::cast_slice_mut(&mut self.values))
        };
        read().map_err(|source| OutputError::io(&self.path, source))?;
        Ok(&self.values)
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
            let mut all: Activations<Cpu> = Activations::new(&rows, 2, bytes, Some(dir.path())).unwrap();
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
                        assert_eq!(got, values(row, shift), "{bytes} bytes, row {row}");
                        all.put_unchanged(row, taken);
                    }
                    drop(all.take(&Cpu, row).unwrap());
                }
            }
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), usize::from(!cfg!(unix)));
    }

    #[test]
    fn the_residual_comes_first() {
        let rows = TokenRows::new(vec![vec![0; 100]]).unwrap();
        let divide =
            |bytes, spill: bool| Budget { bytes, spill: spill.then(PathBuf::new) }.divide(&rows, 2, 8, 32);
        assert_eq!(divide(0, true), Shares { hidden: 0, kept: 0 });
        assert_eq!(divide(4000, true), Shares { hidden: 2000, kept: 0 });
        assert_eq!(divide(10_000, true), Shares { hidden: 3200, kept: 1800 });
        assert_eq!(divide(0, false), Shares { hidden: 3200, kept: 12_800 });
    }
}
