use std::fs;
use std::path::Path;

use half::{bf16, f16};
use tempfile::TempDir;

use super::*;
use crate::{
    Bits, CheckpointFormat, CheckpointWriter, CodesRef, Dtype, HeaderError, PackError, PackedLinear,
    WriteOptions, ZeroBasis,
};

mod hostile;
mod round_trip;
mod variants;

const CONFIG: &str = r#"{"bits": 4, "group_size": 32, "desc_act": false, "sym": true}"#;

/// A tensor for [`folder`].
struct Raw {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn raw<T: bytemuck::NoUninit>(name: &'static str, dtype: Dtype, shape: &[usize], values: &[T]) -> Raw {
    Raw { name, dtype, shape: shape.to_vec(), bytes: bytemuck::cast_slice(values).to_vec() }
}

/// A 4-bit layer `x` of 64 inputs in two groups and 8 outputs as version 1 stores it: every code 9, every true zero
/// point 8, every scale 0.5, so every weight 0.5.
fn layer() -> Vec<Raw> {
    let g_idx: Vec<i32> = (0..64).map(|i| i / 32).collect();
    vec![
        raw("x.qweight", Dtype::I32, &[8, 8], &[0x9999_9999u32; 64]),
        raw("x.qzeros", Dtype::I32, &[2, 1], &[0x7777_7777u32; 2]),
        raw("x.scales", Dtype::F16, &[2, 8], &[f16::from_f32(0.5); 16]),
        raw("x.g_idx", Dtype::I32, &[64], &g_idx),
    ]
}

/// [`layer`] with some tensors replaced or added, and those of `without` left out.
fn layer_with(changed: Vec<Raw>, without: &[&str]) -> Vec<Raw> {
    let mut tensors = layer();
    tensors.retain(|tensor| {
        !without.contains(&tensor.name) && changed.iter().all(|other| other.name != tensor.name)
    });
    tensors.extend(changed);
    tensors
}

/// A folder with these tensors in `model.safetensors` and this `quantize_config.json`.
fn folder(config: &str, tensors: &[Raw]) -> TempDir {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut writer = CheckpointWriter::create(dir.path(), None, WriteOptions::default()).expect("starts");
    for tensor in tensors {
        writer.tensor(tensor.name, tensor.dtype, &tensor.shape, &tensor.bytes).expect("writes");
    }
    writer.finish().expect("finishes");
    if !config.is_empty() {
        fs::write(dir.path().join("quantize_config.json"), config).expect("writes");
    }
    dir
}

/// The layer `x` of such a folder.
fn read(config: &str, tensors: &[Raw]) -> Result<(PackedLinear, Vec<Remark>), FormatError> {
    Checkpoint::open(folder(config, tensors).path())?.linear_with_remarks("x")
}

fn is_half(linear: &PackedLinear) -> bool {
    linear.dequantize().iter().all(|&weight| weight == 0.5)
}
