//! The header of a safetensors file: eight bytes of length, then JSON that says where each tensor lies.
//!
//! Read here rather than by the `safetensors` crate so that every error names the tensor, every bound is checked before
//! anything is allocated, and a repeated name is an error. The crate is the oracle of the tests.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::Dtype;

/// The longest header that is read, the limit of the format's reference implementation.
const MAX_HEADER: u64 = 100_000_000;
/// The most dimensions of a tensor. Without a limit a header of two-byte numbers would grow fourfold in memory.
const MAX_RANK: usize = 16;
const LENGTH_BYTES: usize = 8;

/// Where a tensor lies in its file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorInfo {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// First byte and the byte behind the last, from the start of the file.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// A validated header: the tensors, by offset, cover everything behind it without gap or overlap.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: Vec<TensorInfo>,
    pub(crate) by_name: HashMap<String, usize>,
}

/// Why a file is not a safetensors file.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file ends before its header does.
    #[error("not a safetensors file: {len} bytes, but the header takes {needed}")]
    Truncated {
        /// Length of the file.
        len: u64,
        /// What the length field asks for, with the field itself.
        needed: u64,
    },
    /// The header's length is beyond what any real file has.
    #[error("header of {len} bytes is above the limit of {MAX_HEADER}")]
    TooLong {
        /// The length field.
        len: u64,
    },
    /// The header is not the JSON object of the format.
    #[error("header is not valid: {0}")]
    Json(String),
    /// Two tensors have one name.
    #[error("tensor `{tensor}` appears twice")]
    Duplicate {
        /// Its name.
        tensor: String,
    },
    /// An element type that the format does not define.
    #[error("tensor `{tensor}` has the unknown dtype `{dtype}`")]
    Dtype {
        /// Its name.
        tensor: String,
        /// The type's name.
        dtype: String,
    },
    /// Shape, type and offsets contradict each other, or the size overflows.
    #[error("tensor `{tensor}`: {dtype} {shape:?} does not take the bytes {start}..{end}")]
    Size {
        /// Its name.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// First byte, from the end of the header.
        start: u64,
        /// The byte behind the last.
        end: u64,
    },
    /// A gap before the tensor, or an overlap with the one before it.
    #[error("tensor `{tensor}` starts at byte {start} of the data, the one before it ends at {expected}")]
    Offset {
        /// Its name.
        tensor: String,
        /// Where it starts, from the end of the header.
        start: u64,
        /// Where it must start.
        expected: u64,
    },
    /// The tensors end before or behind the end of the file, as in a truncated download.
    #[error("the tensors take {tensors} bytes, the file has {file}")]
    DataLength {
        /// Bytes that the header describes.
        tensors: u64,
        /// Bytes behind the header.
        file: u64,
    },
}

impl Header {
    /// Reads and validates the header of a whole file.
    pub(crate) fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        let truncated = |needed| HeaderError::Truncated { len: file.len() as u64, needed };
        let (length, rest) =
            file.split_first_chunk::<LENGTH_BYTES>().ok_or(truncated(LENGTH_BYTES as u64))?;
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER {
            return Err(HeaderError::TooLong { len: length });
        }
        let (json, data) =
            rest.split_at_checked(length as usize).ok_or(truncated(length + LENGTH_BYTES as u64))?;
        let raw: RawHeader =
            serde_json::from_slice(json).map_err(|error| HeaderError::Json(error.to_string()))?;
        raw.validate(file.len() - data.len(), data.len())
    }

    /// Serialises a header whose tensors lie one behind the other in this order; the whole is a multiple of `align`
    /// bytes, so that the first tensor is aligned where the file is mapped.
    pub(crate) fn serialize<'a>(
        metadata: &BTreeMap<String, String>,
        tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
        align: usize,
    ) -> Vec<u8> {
        let mut json = serde_json::Map::new();
        if !metadata.is_empty() {
            json.insert("__metadata__".into(), serde_json::json!(metadata));
        }
        let mut start = 0;
        for (name, dtype, shape) in tensors {
            let end = start + dtype.byte_len(shape).expect("invariant: the tensor exists in memory");
            let info =
                serde_json::json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [start, end]});
            json.insert(name.into(), info);
            start = end;
        }
        let mut bytes = vec![0; LENGTH_BYTES];
        bytes.extend(serde_json::Value::Object(json).to_string().into_bytes());
        bytes.resize(bytes.len().next_multiple_of(align), b' ');
        let length = (bytes.len() - LENGTH_BYTES) as u64;
        bytes[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
        bytes
    }
}

/// The JSON as it stands.
#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawInfo)>,
}

#[derive(serde::Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Dims,
    data_offsets: (u64, u64),
}

struct Dims(Vec<u64>);

impl RawHeader {
    /// `data_at`: where the data starts in the file, `data_len`: how much there is.
    fn validate(mut self, data_at: usize, data_len: usize) -> Result<Header, HeaderError> {
        self.tensors.sort_by_key(|(_, info)| info.data_offsets);
        let mut header = Header { metadata: self.metadata, ..Header::default() };
        let mut expected = 0u64;
        for (tensor, info) in self.tensors {
            let (start, end) = info.data_offsets;
            let Some(dtype) = Dtype::from_name(&info.dtype) else {
                return Err(HeaderError::Dtype { tensor, dtype: info.dtype });
            };
            let shape: Option<Vec<usize>> = info.shape.0.iter().map(|&dim| dim.try_into().ok()).collect();
            let size = shape.as_deref().and_then(|shape| dtype.byte_len(shape));
            if size.is_none() || end.checked_sub(start) != size.map(|size| size as u64) {
                let shape = shape.unwrap_or_default();
                return Err(HeaderError::Size { tensor, dtype, shape, start, end });
            }
            if start != expected {
                return Err(HeaderError::Offset { tensor, start, expected });
            }
            if end > data_len as u64 {
                return Err(HeaderError::DataLength { tensors: end, file: data_len as u64 });
            }
            expected = end;
            let info = TensorInfo {
                name: tensor,
                dtype,
                shape: shape.unwrap_or_default(),
                start: data_at + start as usize,
                end: data_at + end as usize,
            };
            if header.by_name.insert(info.name.clone(), header.tensors.len()).is_some() {
                return Err(HeaderError::Duplicate { tensor: info.name });
            }
            header.tensors.push(info);
        }
        if expected != data_len as u64 {
            return Err(HeaderError::DataLength { tensors: expected, file: data_len as u64 });
        }
        Ok(header)
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<Cow<'_, str>>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(A::Error::duplicate_field("__metadata__"));
                        }
                        header.metadata = map.next_value()?;
                    } else {
                        let info = map.next_value();
                        let info =
                            info.map_err(|error| A::Error::custom(format_args!("tensor `{name}`: {error}")))?;
                        header.tensors.push((name.into_owned(), info));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbers;
        impl<'de> Visitor<'de> for Numbers {
            type Value = Dims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_RANK} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MAX_RANK {
                        return Err(A::Error::invalid_length(MAX_RANK + 1, &self));
                    }
                    dims.push(dim);
                }
                Ok(Dims(dims))
            }
        }
        deserializer.deserialize_seq(Numbers)
    }
}

#[cfg(test)]
mod tests;
