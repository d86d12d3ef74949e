//! Checkpoints that other tools wrote: `input_ids` and the float32 `logits` of the model with its weights dequantised.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use gptq_format::TensorFile;
use gptq_kernels::cpu::Cpu;
use gptq_llama::{Feed, Llama, LoadOptions, Precision, Wanted};

/// The tools' own comparison of the same layers in another order of summation; the bound.
const TOLERANCE: f32 = 1e-4;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat").join(name)
}

/// Largest difference between our logits and the expected ones.
fn difference(name: &str) -> f32 {
    let dir = folder(name);
    let options = LoadOptions::default().with_precision(Precision::Float32);
    let model = Llama::load(&dir, Cpu, &options).unwrap();
    let expected = TensorFile::open(dir.join("expected.safetensors")).unwrap();
    let tokens = expected.tensor("input_ids").unwrap().u32s().unwrap();
    let want = expected.tensor("logits").unwrap().f32s().unwrap();
    let mut cache = model.cache(tokens.len()).unwrap();
    let feed = Feed { sequence: cache.add(), tokens: &tokens, logits: Wanted::All };
    let got = model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap();
    assert_eq!(got.len(), want.len());
    got.iter().zip(want.iter()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn assert_close(names: &[&str]) {
    let wrong: Vec<(&str, f32)> = names
        .iter()
        .map(|&name| (name, difference(name)))
        .filter(|(_, d)| d.is_nan() || *d > TOLERANCE)
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn unquantised_model() {
    assert_close(&["source"]);
}

#[test]
fn gptqmodel_checkpoints() {
    assert_close(&[
        "b2_g32",
        "b3_g32",
        "b8_g32",
        "g128_plain",
        "g32_act",
        "g32_act_static",
        "g32_asym_v2",
        "g32_dyn",
        "g32_plain",
        "gm1_plain",
        "min0",
    ]);
}

#[test]
fn autogptq_checkpoints() {
    assert_close(&["ag_desc_actTrue", "ag_g32"]);
}
