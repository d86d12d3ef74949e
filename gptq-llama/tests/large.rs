//! A model that is larger than the memory the process may take.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and says what it measures")]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use gptq_core::GptqConfig;
use gptq_format::{Checkpoint, CheckpointWriter, Dtype, WriteOptions};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{Layer, LlamaConfig, Module, QuantizeJob, QuantizeOptions, Rng, TokenRows, Watch};
use half::bf16;

/// 64 decoder layers of 7.1 million weights each.
const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 64,
    "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 512}"#;

/// Writes random weights in bfloat16, tensor by tensor.
fn write_model(dir: &Path) -> u64 {
    let config = LlamaConfig::from_json(CONFIG).unwrap();
    let mut writer = CheckpointWriter::create(dir, None, WriteOptions::default()).unwrap();
    let mut rng = Rng::new(1);
    let mut put = |name: &str, shape: &[usize], deviation: Option<f64>| {
        let mut value = || match deviation {
            Some(deviation) => (rng.next_f64() - 0.5) * 12f64.sqrt() * deviation,
            None => 1.0,
        };
        let len = shape.iter().product();
        let bytes: Vec<u8> = (0..len).flat_map(|_| bf16::from_f64(value()).to_le_bytes()).collect();
        writer.tensor(name, Dtype::BF16, shape, &bytes).unwrap();
    };
    put("model.embed_tokens.weight", &[512, 768], Some(1.0));
    put("lm_head.weight", &[512, 768], Some(0.04));
    put("model.norm.weight", &[768], None);
    for layer in 0..config.layers {
        for norm in ["input", "post_attention"] {
            put(&format!("model.layers.{layer}.{norm}_layernorm.weight"), &[768], None);
        }
        for module in Module::ALL {
            let (inputs, outputs) = module.shape(&config);
            let name = format!("{}.weight", Layer { layer, module });
            put(&name, &[outputs, inputs], Some(1.0 / (inputs as f64).sqrt()));
        }
    }
    let written = writer.finish().unwrap();
    fs::write(dir.join("config.json"), CONFIG).unwrap();
    written.tensor_bytes
}

const FOLDER: &str = "GPTQ_LARGE_TEST_FOLDER";

/// The process with little memory. Does nothing when it is run as an ordinary test.
#[test]
fn child_with_little_memory() {
    let Some(dir) = std::env::var_os(FOLDER) else { return };
    let dir = Path::new(&dir);
    let source = dir.join("model");
    let config = LlamaConfig::read(&source).unwrap();
    let checkpoint = Checkpoint::open(&source).unwrap();
    let rows = (0..8u32).map(|row| (0..256u32).map(|i| (i * i + 7 * row + 3 * i * row) % 512).collect());
    let rows = TokenRows::new(rows.collect()).unwrap();
    let gptq = GptqConfig::builder().group_size(Some(128)).build().unwrap();
    // The residual stream alone has 6.3 MB.
    let options = QuantizeOptions::new(gptq).with_activation_bytes(2 << 20);
    let outcome = QuantizeJob::new(&config, &checkpoint, &Cpu, options)
        .calibration(&rows)
        .run(&dir.join("out"), &mut Watch::default())
        .unwrap();
    let peak = outcome.report.peak_memory.map_or_else(|| "unknown".to_owned(), |peak| peak.to_string());
    println!("{} layers in {:?}, peak {peak} bytes", outcome.report.layers.len(), outcome.report.elapsed);
}

/// The limit is on memory that no file backs (RLIMIT_DATA), of which the system can take nothing back. Mapped weights are
/// no part of it, as they are no part of what a process needs.
#[test]
#[ignore = "writes 0.9 GB and takes minutes"]
fn a_model_three_times_as_large_as_memory() {
    if !cfg!(target_os = "linux") {
        println!("skipped: the limit is one of Linux");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = write_model(&dir.path().join("model"));
    let limit = bytes / 3;
    let script =
        format!("ulimit -d {}\nexec \"$0\" --exact child_with_little_memory --nocapture", limit / 1024);
    let mut command = Command::new("sh");
    command.args(["-c", &script]).arg(std::env::current_exe().unwrap()).env(FOLDER, dir.path());
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    println!("model {bytes} bytes, limit {limit}: {}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success());
    let written = Checkpoint::open(dir.path().join("out")).unwrap();
    assert_eq!(written.linears().count(), 64 * 7);
}
