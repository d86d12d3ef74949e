//! A checkpoint folder as one input: records of files and of tensors.
//!
//! A record starts with a tag, of which the low four bits count. `0 ..= 9`: the file of that name, three bytes of length
//! (little-endian; cut to what is left), its content. `10 ..= 15`: a tensor of the safetensors file of that name, for which
//! headers are made, so that changed inputs stay readable: layer, field, type and rank (a byte each), dimensions (two bytes
//! each), and as many bytes as these ask for; what is missing is zero.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use gptq_format::Dtype;

/// What tags `0 ..= 9` name, and `10 ..= 15`.
pub const FILES: [&str; 16] = [
    "quantize_config.json",
    "config.json",
    "quant_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "gptq_model-4bit-32g.safetensors",
    "base.safetensors",
    ".gptq-committed/manifest.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "gptq_model-4bit-32g.safetensors",
    ".gptq-committed/model.safetensors",
    "base.safetensors",
];

/// Names of layers in records of tensors.
pub const LAYERS: [&str; 5] =
    ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head", "model.norm", "x"];

/// Names of their tensors.
pub const FIELDS: [&str; 11] =
    ["qweight", "qzeros", "scales", "g_idx", "bias", "B", "s", "weight", "zeros", "inv_freq", "extra"];

/// Types of tensors.
pub const DTYPES: [Dtype; 14] = [
    Dtype::I32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F32,
    Dtype::I64,
    Dtype::I16,
    Dtype::I8,
    Dtype::U8,
    Dtype::U16,
    Dtype::U32,
    Dtype::U64,
    Dtype::F64,
    Dtype::Bool,
    Dtype::F8E4M3,
];

/// A tensor with more bytes is left out.
const MAX_TENSOR: usize = 1 << 17;

/// The record of a file; `name` is one of the first ten of [`FILES`].
pub fn file(name: &str, content: &[u8]) -> Vec<u8> {
    let tag = FILES.iter().position(|file| *file == name).expect("a name of the list") as u8;
    let length = u32::try_from(content.len()).expect("a small file").to_le_bytes();
    [&[tag], &length[..3], content].concat()
}

/// The record of a tensor; `in_file` is one of the last six of [`FILES`].
pub fn tensor(in_file: &str, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Option<Vec<u8>> {
    let tag = 10 + FILES[10..].iter().position(|file| *file == in_file)?;
    let (layer, field) = name.rsplit_once('.')?;
    let layer = LAYERS.iter().position(|name| *name == layer)?;
    let field = FIELDS.iter().position(|name| *name == field)?;
    let dtype = DTYPES.iter().position(|other| *other == dtype)?;
    let mut record = vec![tag as u8, layer as u8, field as u8, dtype as u8, shape.len() as u8];
    for &dim in shape {
        record.extend(u16::try_from(dim).ok()?.to_le_bytes());
    }
    record.extend(bytes);
    (bytes.len() <= MAX_TENSOR).then_some(record)
}

/// A tensor to be written.
type Raw = (Dtype, Vec<usize>, Vec<u8>);

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn byte(&mut self) -> usize {
        self.take(1).first().copied().unwrap_or_default().into()
    }

    fn number(&mut self, bytes: usize) -> usize {
        (0..bytes).map(|k| self.byte() << (8 * k)).sum()
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// Writes the files of an input, and returns how many bytes they have: of JSON, and of everything.
pub(crate) fn build(data: &[u8], dir: &Path) -> (usize, usize) {
    let mut files: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    let mut tensors: BTreeMap<&str, BTreeMap<String, Raw>> = BTreeMap::new();
    let mut rest = Rest(data);
    while !rest.0.is_empty() {
        let tag = rest.byte() & 15;
        if tag < 10 {
            let len = rest.number(3);
            files.insert(FILES[tag], rest.take(len).to_vec());
            continue;
        }
        let name = format!("{}.{}", LAYERS[rest.byte() % LAYERS.len()], FIELDS[rest.byte() % FIELDS.len()]);
        let dtype = DTYPES[rest.byte() % DTYPES.len()];
        let rank = rest.byte() % 4;
        let shape: Vec<usize> = (0..rank).map(|_| rest.number(2)).collect();
        let len = shape.iter().product::<usize>().saturating_mul(dtype.bits() / 8);
        if len <= MAX_TENSOR {
            let mut bytes = rest.take(len).to_vec();
            bytes.resize(len, 0);
            tensors.entry(FILES[tag]).or_default().insert(name, (dtype, shape, bytes));
        }
    }
    for (file, tensors) in tensors {
        let mut header = serde_json::Map::new();
        let mut content = Vec::new();
        for (name, (dtype, shape, bytes)) in tensors {
            let offsets = [content.len(), content.len() + bytes.len()];
            header.insert(
                name,
                serde_json::json!({"dtype": dtype.name(), "shape": shape, "data_offsets": offsets}),
            );
            content.extend(bytes);
        }
        let header = serde_json::Value::Object(header).to_string();
        let length = (header.len() as u64).to_le_bytes();
        files.insert(file, [&length, header.as_bytes(), &content].concat());
    }
    let (mut json, mut all) = (0, 0);
    for (name, content) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().expect("it has a folder")).expect("makes folders");
        fs::write(path, &content).expect("writes");
        json += if name.ends_with(".json") { content.len() } else { 0 };
        all += content.len();
    }
    (json, all)
}
