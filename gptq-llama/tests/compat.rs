//! Checkpoints that other tools wrote: `input_ids` and the float32 `logits` of the model with its weights dequantised. The
//! table of largest differences is printed by
//!
//! ```text
//! cargo test -p gptq-llama --test compat -- --nocapture --test-threads 1
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints its table")]

use std::path::{Path, PathBuf};

use gptq_format::{CheckpointFormat, TensorFile};
use gptq_kernels::{WeightFormat, cpu::Cpu};
use gptq_llama::{Feed, Llama, LoadOptions, Precision, Wanted};

mod variations;

/// The tools' own comparison of the same layers in another order of summation; the issue's bound.
const TOLERANCE: f32 = 1e-4;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// Our float32 logits of the tokens in `expected`.
fn logits(dir: &Path, expected: &TensorFile) -> Vec<f32> {
    let options = LoadOptions::default().with_precision(Precision::Float32);
    let model = Llama::load(dir, Cpu, &options).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let tokens = expected.tensor("input_ids").unwrap().u32s().unwrap();
    let mut cache = model.cache(tokens.len()).unwrap();
    let feed = Feed { sequence: cache.add(), tokens: &tokens, logits: Wanted::All };
    let logits = model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap();
    logits.into_iter().collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    // A NaN is the largest of all, and stays.
    differences.fold(0.0, |most, next| if next > most || next.is_nan() { next } else { most })
}

/// Largest difference between our logits and the expected ones.
fn difference(name: &str) -> f32 {
    let dir = folder(name);
    let expected = TensorFile::open(dir.join("expected.safetensors")).unwrap();
    largest_difference(&logits(&dir, &expected), &expected.tensor("logits").unwrap().f32s().unwrap())
}

/// What norms, attention, gate and up write must be in the order that the layers behind them expect: the comparisons with
/// other tools' logits go through that.
#[test]
fn act_ordered_layers_take_their_input_in_order() {
    for (name, in_order) in [("g32_act", true), ("ag_desc_actTrue", true), ("g32_plain", false)] {
        let model = Llama::load(&folder("compat").join(name), Cpu, &LoadOptions::default()).unwrap();
        let packed =
            model.linears().filter(|linear| matches!(linear.spec().weight, WeightFormat::Gptq { .. }));
        let orders: Vec<bool> = packed.map(|linear| linear.input_order().is_some()).collect();
        assert!(!orders.is_empty() && orders.iter().all(|&order| order == in_order), "{name}: {orders:?}");
    }
}

/// Every folder of a group.
fn assert_close(group: &str, least: usize) {
    let mut names: Vec<String> = folder(group)
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= least, "{group} has {} checkpoints", names.len());
    println!("| checkpoint | what | max delta logit |\n|---|---|---|");
    let mut wrong = Vec::new();
    for name in names {
        let difference = difference(&format!("{group}/{name}"));
        println!("| {name} | {} | {difference:.1e} |", description(&folder(group).join(&name)));
        if difference > TOLERANCE || difference.is_nan() {
            wrong.push((name, difference));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// What a checkpoint's config says.
fn description(dir: &Path) -> String {
    let checkpoint = gptq_format::Checkpoint::open(dir).unwrap();
    let Some(config) = checkpoint.config() else { return "not quantised".into() };
    let mut parts = vec![
        config.checkpoint_format().map_or("no format", CheckpointFormat::name).to_owned(),
        format!("{} bits", config.bits().get()),
        config.group_size().map_or("one group".into(), |size| format!("groups of {size}")),
        if config.sym() { "sym" } else { "asym" }.to_owned(),
    ];
    let switch = |key: &str| config.get(key).is_some_and(|value| value == "true");
    parts.extend(config.desc_act().then(|| "desc_act".to_owned()));
    parts.extend(switch("static_groups").then(|| "static_groups".to_owned()));
    parts.extend(switch("lm_head").then(|| "lm_head".to_owned()));
    parts.extend((!config.dynamic().rules().is_empty()).then(|| "dynamic".to_owned()));
    let pack_dtype = config.get("pack_dtype").unwrap_or_default();
    parts.extend((pack_dtype.len() > 2 && pack_dtype != "\"int32\"").then(|| pack_dtype.replace('"', "")));
    let writer = match config.quantizers().first() {
        Some(name) => (*name).to_owned(),
        // AutoGPTQ does not say so, but leaves this key.
        None if config.get("is_marlin_format").is_some() => "auto_gptq:0.7.1".into(),
        None => "a minimal config".into(),
    };
    format!("{writer}: {}", parts.join(", "))
}

/// One tiny random Llama, unquantised, and as GPTQModel 7.7.0 (`g*`, `b*`, `p*`, `min*` and others) and AutoGPTQ 0.7.1
/// (`ag_*`) quantised it.
#[test]
fn checkpoints_of_other_tools() {
    assert_close("compat", 14);
}

/// Small random models of transformers 5.23: Llama with llama3 and linear rope scaling, with and without biases; Qwen2
/// with tied embeddings, and with a window in one layer; Mistral with a window shorter than the text. In bfloat16,
/// float16 and float32.
#[test]
fn families() {
    assert_close("families", 5);
}
