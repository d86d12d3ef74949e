//! Checkpoints that other tools wrote: `input_ids` and the float32 `logits` of the model with its weights dequantised.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use gptq_format::TensorFile;
use gptq_kernels::cpu::Cpu;
use gptq_llama::{Feed, Llama, LoadOptions, Precision, Wanted};

/// The tools' own comparison of the same layers in another order of summation; the bound.
const TOLERANCE: f32 = 1e-4;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
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

fn assert_close(group: &str, names: &[&str]) {
    let differences = names.iter().map(|&name| (name, difference(&format!("{group}/{name}"))));
    let wrong: Vec<_> = differences.filter(|(_, d)| d.is_nan() || *d > TOLERANCE).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn unquantised_model() {
    assert_close("compat", &["source"]);
}

/// Small random models of transformers 5.23: Llama with llama3 and linear rope scaling, with and without biases; Qwen2
/// with tied embeddings, and with a window in one layer; Mistral with a window shorter than the text. In bfloat16,
/// float16 and float32.
#[test]
fn families() {
    let names = ["linear_rope", "llama3_rope", "mistral_window", "qwen2_tied", "qwen2_window"];
    assert_close("families", &names);
}

#[test]
fn gptqmodel_checkpoints() {
    assert_close(
        "compat",
        &[
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
        ],
    );
}

#[test]
fn autogptq_checkpoints() {
    assert_close("compat", &["ag_desc_actTrue", "ag_g32"]);
}
