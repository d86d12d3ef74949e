use std::fs;

use gptq_format::{FormatError, HeaderError, TensorFile};
use safetensors::SafeTensors;

use crate::memory::bounded;
use crate::scratch;

/// Any bytes are a file or a typed error, within bounded memory. What is read, the reference implementation reads alike;
/// what is refused, it refuses too, but for the cases in which ours is stricter.
pub fn tensor_file(data: &[u8]) {
    let path = scratch::empty("file").join("x.safetensors");
    fs::write(&path, data).expect("writes");
    // A header's names and shapes are small strings and vectors; ninety bytes each for entries of thirty and more.
    let opened = bounded((1 << 16) + 64 * data.len(), || TensorFile::open(&path));
    let reference = SafeTensors::deserialize(data);
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            let FormatError::Header { path: named, source } = &error else { panic!("{error}") };
            assert_eq!(*named, path);
            assert!(reference.is_err() || is_stricter(source, data), "only ours refuses: {error}");
            return;
        }
    };
    let reference = reference.unwrap_or_else(|error| panic!("only the reference refuses: {error}"));
    assert_eq!(file.tensors().len(), reference.len());
    let mut end = None;
    for tensor in file.tensors() {
        let other = reference.tensor(tensor.name()).expect("the same names");
        assert_eq!(tensor.bytes(), other.data(), "{}", tensor.name());
        assert_eq!(tensor.shape(), other.shape());
        assert_eq!(tensor.dtype().name(), other.dtype().to_string());
        assert_eq!(tensor.bytes().len() * 8, tensor.len() * tensor.dtype().bits());
        let range = tensor.bytes().as_ptr_range();
        assert!(end.is_none_or(|end| end == range.start), "in the order of the file, without gaps");
        end = Some(range.end);
        let again = file.get(tensor.name()).expect("found by its name");
        assert_eq!(again.bytes().as_ptr(), tensor.bytes().as_ptr());
        if let Ok(values) = tensor.to_f32() {
            assert_eq!(values.len(), tensor.len());
        }
    }
}

/// Whether this is a rule that the reference does not have: at most 16 dimensions, no repeated name, and a header that is
/// padded with blanks only.
fn is_stricter(error: &HeaderError, data: &[u8]) -> bool {
    match error {
        HeaderError::Duplicate { .. } => true,
        HeaderError::Json(reason) => {
            reason.contains("dimensions") || reason.contains("duplicate field") || data.len() < 10
        }
        _ => false,
    }
}
