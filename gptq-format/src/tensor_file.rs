use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use bytemuck::AnyBitPattern;
use half::{bf16, f16};
use memmap2::Mmap;

use crate::header::{Header, TensorInfo};
use crate::{Dtype, FormatError};

const _: () = assert!(cfg!(target_endian = "little"), "safetensors data is little-endian and used in place");

/// One safetensors file, mapped into memory and validated.
///
/// Opening reads the header only; the data is read by the system when a tensor's bytes are. Nobody may shorten the file
/// meanwhile: the system would end the process on the next access. Replacing it by a rename, as
/// [`CheckpointWriter`](crate::CheckpointWriter) does, is fine.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Option<Mmap>,
    header: Header,
}

/// A view of one tensor in a [`TensorFile`]; row-major.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    info: &'a TensorInfo,
    bytes: &'a [u8],
    path: &'a Path,
}

impl TensorFile {
    /// Maps a file and validates its header.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::NotAFile`] for anything but a regular file, [`FormatError::Header`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, FormatError> {
        let path = path.into();
        // Asked before opening: opening a named pipe would wait for its writer.
        let metadata = std::fs::metadata(&path).map_err(|source| FormatError::io(&path, source))?;
        if !metadata.is_file() {
            return Err(FormatError::NotAFile { path });
        }
        let file = File::open(&path).map_err(|source| FormatError::io(&path, source))?;
        let map = if metadata.len() == 0 {
            None
        } else {
            // SAFETY: the map is only read, and only as plain bytes, for which every value is valid. What Rust cannot
            // rule out is another process writing to the file: the bytes may then change under a reader, which no code
            // here relies on (lengths and offsets come from the header, which has been copied), or the file may be
            // shortened, which ends the process instead of corrupting it. The type's documentation states that condition.
            Some(unsafe { Mmap::map(&file) }.map_err(|source| FormatError::io(&path, source))?)
        };
        let bytes = map.as_deref().unwrap_or_default();
        match Header::parse(bytes) {
            Ok(header) => Ok(Self { path, map, header }),
            Err(source) => Err(FormatError::Header { path, source }),
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes, header included.
    pub fn byte_len(&self) -> u64 {
        self.map.as_deref().map_or(0, |map| map.len() as u64)
    }

    /// The free-form strings of the header, such as `format: pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The tensors in the order in which they lie in the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.header.tensors.iter().map(|info| self.view(info))
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.header.by_name.get(name).map(|&index| self.view(&self.header.tensors[index]))
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`FormatError::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, FormatError> {
        self.get(name)
            .ok_or_else(|| FormatError::MissingTensor { name: name.into(), path: self.path.clone() })
    }

    fn view<'a>(&'a self, info: &'a TensorInfo) -> Tensor<'a> {
        let bytes = &self.map.as_deref().unwrap_or_default()[info.start..info.end];
        Tensor { info, bytes, path: &self.path }
    }
}

impl<'a> Tensor<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        &self.info.name
    }

    /// Its element type.
    pub fn dtype(&self) -> Dtype {
        self.info.dtype
    }

    /// Its shape; empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        &self.info.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        // The header's validation has multiplied the same numbers without overflow.
        self.info.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its bytes, little-endian, row-major.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The file that holds it.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// The elements of an `F32` tensor: a view where the file aligns them, a copy elsewhere.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for another type.
    pub fn f32s(&self) -> Result<Cow<'a, [f32]>, FormatError> {
        self.elements(&[Dtype::F32])
    }

    /// The elements of an `F16` tensor: a view where the file aligns them, a copy elsewhere.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for another type.
    pub fn f16s(&self) -> Result<Cow<'a, [f16]>, FormatError> {
        self.elements(&[Dtype::F16])
    }

    /// The elements of a `BF16` tensor: a view where the file aligns them, a copy elsewhere.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for another type.
    pub fn bf16s(&self) -> Result<Cow<'a, [bf16]>, FormatError> {
        self.elements(&[Dtype::BF16])
    }

    /// The elements of an `I32` or `U32` tensor, bit for bit: a view where the file aligns them, a copy elsewhere.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for another type.
    pub fn u32s(&self) -> Result<Cow<'a, [u32]>, FormatError> {
        self.elements(&[Dtype::I32, Dtype::U32])
    }

    /// The elements of an `I64` tensor: a view where the file aligns them, a copy elsewhere.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for another type.
    pub fn i64s(&self) -> Result<Cow<'a, [i64]>, FormatError> {
        self.elements(&[Dtype::I64])
    }

    /// A copy of an `F32`, `F16`, `BF16` or `F64` tensor as float32; only `F64` is rounded.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for another type.
    pub fn to_f32(&self) -> Result<Vec<f32>, FormatError> {
        match self.dtype() {
            Dtype::F32 => Ok(self.f32s()?.into_owned()),
            Dtype::F16 => Ok(self.f16s()?.iter().map(|x| x.to_f32()).collect()),
            Dtype::BF16 => Ok(self.bf16s()?.iter().map(|x| x.to_f32()).collect()),
            Dtype::F64 => Ok(self.elements::<f64>(&[Dtype::F64])?.iter().map(|&x| x as f32).collect()),
            _ => Err(self.wrong_dtype("F32, F16, BF16 or F64")),
        }
    }

    pub(crate) fn wrong_dtype(&self, expected: &'static str) -> FormatError {
        let (tensor, path) = (self.name().to_owned(), self.path.to_owned());
        FormatError::Dtype { tensor, dtype: self.dtype(), expected, path }
    }

    fn elements<T: AnyBitPattern + bytemuck::NoUninit>(
        &self,
        dtypes: &'static [Dtype],
    ) -> Result<Cow<'a, [T]>, FormatError> {
        if !dtypes.contains(&self.dtype()) {
            return Err(self.wrong_dtype(dtypes[0].name()));
        }
        Ok(match bytemuck::try_cast_slice(self.bytes) {
            Ok(aligned) => Cow::Borrowed(aligned),
            Err(_) => Cow::Owned(bytemuck::allocation::pod_collect_to_vec(self.bytes)),
        })
    }
}
