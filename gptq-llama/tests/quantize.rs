//! Quantising small random models, and the bundled one.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and says what it skips")]

use std::{cell::Cell, collections::HashMap, path::Path};

use gptq_core::GptqConfig;
use gptq_format::{Checkpoint, PackedLinear, TensorFile};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{
    CancelToken, Layer, Llama, LlamaConfig, LlamaError, LoadOptions, MemoryWeights, ModelWriter, Precision,
    QuantizeMethod, QuantizeOptions, QuantizePhase, TokenRows, Watch, WeightSource, perplexity, quantize,
    round_to_nearest,
};

const CONFIG: &str = r#"{"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}"#;

fn config() -> LlamaConfig {
    LlamaConfig::from_json(CONFIG).unwrap()
}

fn rows(count: u32) -> TokenRows {
    let row = |r: u32| (0..40 + r).map(|i| (i * i + 7 * r + i * r) % 50).collect();
    TokenRows::new((0..count).map(row).collect()).unwrap()
}

fn options(
    build: impl FnOnce(gptq_core::GptqConfigBuilder) -> gptq_core::GptqConfigBuilder,
) -> QuantizeOptions {
    QuantizeOptions::new(build(GptqConfig::builder().group_size(Some(16))).build().unwrap())
}

type Layers = HashMap<String, PackedLinear>;

fn run(options: &QuantizeOptions, rows: &TokenRows) -> Layers {
    let config = config();
    let weights = MemoryWeights::random(&config, 5);
    let mut layers = Layers::new();
    let mut sink = |layer: Layer, packed| {
        assert!(layers.insert(layer.to_string(), packed).is_none(), "{layer} came twice");
        Ok(())
    };
    let report = quantize(&config, &weights, &Cpu, rows, options, &mut Watch::default(), &mut sink).unwrap();
    assert_eq!(report.layers.len(), 14);
    assert!(report.layers.iter().all(|summary| summary.report.loss.is_some()));
    layers
}

/// `sum |model(quantised) - model(original)|^2` over the logits of other rows.
fn logit_error(layers: &Layers) -> f64 {
    let config = config();
    let original = MemoryWeights::random(&config, 5);
    let mut quantized = MemoryWeights::in_front_of(&original);
    for (name, packed) in layers {
        quantized.insert_packed(name, packed.clone());
    }
    let logits = |source: &dyn WeightSource| {
        let model = Llama::from_source(config.clone(), source, Cpu, &LoadOptions::default()).unwrap();
        let tokens: Vec<u32> = (0..50).map(|i| (i * 11 + 3) % 50).collect();
        let mut cache = model.cache(50).unwrap();
        let feed =
            gptq_llama::Feed { sequence: cache.add(), tokens: &tokens, logits: gptq_llama::Wanted::All };
        model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap()
    };
    let difference = logits(&quantized) - logits(&original);
    difference.iter().map(|d| f64::from(d * d)).sum()
}

/// GPTQ's point: closer to the original than rounding, in every mode.
#[test]
fn every_mode_beats_rounding() {
    let config = config();
    let weights = MemoryWeights::random(&config, 5);
    let mut rounded = Layers::new();
    let baseline = options(|b| b);
    let mut sink = |layer: Layer, packed| {
        rounded.insert(layer.to_string(), packed);
        Ok(())
    };
    let report = round_to_nearest(&config, &weights, &baseline, &mut Watch::default(), &mut sink).unwrap();
    assert_eq!(report.layers.len(), 14);
    let baseline = logit_error(&rounded);
    let rows = rows(12);
    let mut parallel = options(|b| b);
    parallel.true_sequential = false;
    let mut parallel_gptaq = options(|b| b.gptaq(Some(0.25)));
    parallel_gptaq.true_sequential = false;
    let modes = [
        options(|b| b),
        options(|b| b.desc_act(true)),
        options(|b| b.gptaq(Some(0.25))),
        options(|b| b.sym(false).mse(Some(2.4))),
        parallel,
        parallel_gptaq,
    ];
    for mode in modes {
        let error = logit_error(&run(&mode, &rows));
        assert!(error < 0.8 * baseline, "{mode:?}: {error} against {baseline}");
    }
}

#[test]
fn recomputed_activations_change_nothing() {
    let rows = rows(5);
    let kept = options(|b| b.gptaq(Some(0.25)));
    let mut recomputed = kept.clone();
    recomputed.activation_bytes = 0;
    assert_eq!(run(&kept, &rows), run(&recomputed, &rows));
}

#[test]
fn biases_go_along() {
    let config = config();
    let weights = MemoryWeights::random(&config, 5);
    let layers = run(&options(|b| b), &rows(3));
    for (name, packed) in &layers {
        let bias = weights.tensor(&format!("{name}.bias")).unwrap();
        let want = bias.map(|bias| bias.to_f32().into_iter().map(half::f16::from_f32).collect::<Vec<_>>());
        assert_eq!(packed.bias(), want.as_deref(), "{name}");
        assert_eq!(packed.bias().is_some(), name.contains("self_attn") && !name.contains("o_proj"));
    }
}

#[test]
fn progress_runs_to_its_end_and_can_be_stopped() {
    let config = config();
    let weights = MemoryWeights::random(&config, 5);
    let rows = rows(4);
    let (last, calls, done) = (Cell::new(0.0), Cell::new(0), Cell::new(0));
    let mut watch = Watch::default().on_progress(|progress| {
        assert!(progress.fraction >= last.get() && progress.fraction <= 1.0);
        assert_eq!(progress.loss.is_some(), progress.phase == QuantizePhase::Quantized);
        last.set(progress.fraction);
        calls.set(calls.get() + 1);
        done.set(done.get() + usize::from(progress.phase == QuantizePhase::Quantized));
    });
    let options = options(|b| b);
    quantize(&config, &weights, &Cpu, &rows, &options, &mut watch, &mut |_, _| Ok(())).unwrap();
    assert_eq!(done.get(), 14);
    // Four stages of four rows and a solution in each layer, four rows of advance in the first.
    assert_eq!(calls.get(), 2 * (4 * 4 + 4) + 14 + 4);

    let cancel = CancelToken::default();
    let mut modules = 0;
    let mut watch = Watch::default().with_cancel(cancel.clone());
    let mut sink = |_, _| {
        modules += 1;
        if modules == 4 {
            cancel.cancel();
        }
        Ok(())
    };
    let error = quantize(&config, &weights, &Cpu, &rows, &options, &mut watch, &mut sink).unwrap_err();
    assert!(matches!(error, LlamaError::Cancelled), "{error}");
    assert_eq!(modules, 4);
}

#[test]
fn bad_input_names_what_is_wrong() {
    let config = config();
    let original = MemoryWeights::random(&config, 5);
    let fail = |source: &dyn WeightSource, rows: &TokenRows| {
        let options = options(|b| b);
        quantize(&config, source, &Cpu, rows, &options, &mut Watch::default(), &mut |_, _| Ok(()))
            .unwrap_err()
            .to_string()
    };
    let mut broken = MemoryWeights::in_front_of(&original);
    let mut data = vec![0.5; 96 * 64];
    data[3 * 64 + 2] = f32::NAN;
    broken.insert("model.layers.1.mlp.up_proj.weight", &[96, 64], data).unwrap();
    assert_eq!(fail(&broken, &rows(2)), "model.layers.1.mlp.up_proj: weight[3, 2] is NaN");

    let mut broken = MemoryWeights::in_front_of(&original);
    broken.insert("model.layers.0.mlp.up_proj.weight", &[64, 96], vec![0.5; 96 * 64]).unwrap();
    assert_eq!(
        fail(&broken, &rows(2)),
        "model.layers.0.mlp.up_proj.weight has shape [64, 96], the configuration needs [96, 64]"
    );

    let layers = run(&options(|b| b), &rows(2));
    let mut twice = MemoryWeights::in_front_of(&original);
    twice.insert_packed("model.layers.0.self_attn.o_proj", layers["model.layers.0.self_attn.o_proj"].clone());
    assert_eq!(fail(&twice, &rows(2)), "model.layers.0.self_attn.o_proj is quantised already");

    let strange = TokenRows::new(vec![vec![1, 50]]).unwrap();
    assert_eq!(fail(&original, &strange), "token 50 at position 1: the vocabulary has 50 entries");
}

fn bundled() -> Option<std::path::PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-books");
    if !dir.is_dir() {
        println!("skipped: {} is absent (it is in no published crate)", dir.display());
        return None;
    }
    Some(dir)
}

fn bundled_rows(dir: &Path, key: &str, count: usize) -> TokenRows {
    let file = TensorFile::open(dir.join("ids.safetensors")).unwrap();
    let ids = file.tensor(key).unwrap().bytes().to_vec();
    let ids: Vec<u32> = ids.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    TokenRows::windows(&ids, 512).unwrap().take(count).unwrap()
}

/// Writing, reading back and running a quantised checkpoint. Eight rows stand for all; the README says how to measure
/// every setting on all rows.
#[test]
fn bundled_model_there_and_back() {
    let Some(dir) = bundled() else { return };
    let config = LlamaConfig::read(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let evaluation = bundled_rows(&dir, "evaluation", 8);
    let float32 = LoadOptions::default().with_precision(Precision::Float32);
    let measure = |dir: &Path| {
        let model = Llama::load(dir, Cpu, &float32).unwrap();
        perplexity(&model, &evaluation, |_, _| {}).unwrap().value()
    };
    let out = tempfile::tempdir().unwrap();
    let write = |name: &str, calibration: Option<&TokenRows>| {
        let target = out.path().join(name);
        let options = QuantizeOptions::default();
        let method =
            if calibration.is_some() { QuantizeMethod::Gptq } else { QuantizeMethod::RoundToNearest };
        let mut writer = ModelWriter::create(&target, &checkpoint, &config, &options, method).unwrap();
        let mut sink = |layer, packed: PackedLinear| writer.layer(layer, &packed);
        let mut watch = Watch::default();
        let report = match calibration {
            Some(rows) => quantize(&config, &checkpoint, &Cpu, rows, &options, &mut watch, &mut sink),
            None => round_to_nearest(&config, &checkpoint, &options, &mut watch, &mut sink),
        };
        writer.finish(&report.unwrap()).unwrap();
        measure(&target)
    };
    let original = measure(&dir);
    let rounded = write("rtn", None);
    let gptq = write("gptq", Some(&bundled_rows(&dir, "calibration", 8)));
    // On all rows these are 11.28, 18.32 and, calibrated on all rows, 16.16.
    assert!(original < gptq && gptq < rounded, "{original} {gptq} {rounded}");
    assert!((original / 11.278 - 1.0).abs() < 0.1, "{original}");

    let options = QuantizeOptions::default();
    let writer =
        ModelWriter::create(&out.path().join("x"), &checkpoint, &config, &options, QuantizeMethod::Gptq);
    let report = round_to_nearest(&config, &checkpoint, &options, &mut Watch::default(), &mut |_, _| Ok(()));
    let error = writer.unwrap().finish(&report.unwrap()).unwrap_err();
    assert!(matches!(error, LlamaError::MissingTensor { .. }), "{error}");
    assert!(!out.path().join("x/model.safetensors").exists());
}

/// Modules that rules skip stay as they are, others have their own width; the output layer goes along.
#[test]
fn rules_and_output_layer_there_and_back() {
    let config = config();
    let weights = MemoryWeights::random(&config, 5);
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    save_dense(&weights, &config, &source);
    let rules = r#"{"-:.*down_proj": {}, "+:.*\\.0\\.self_attn\\.[qk]": {"bits": 8, "group_size": -1},
        "+:.*v_proj": {"sym": false, "desc_act": true}, "lm_head": {"bits": 8, "group_size": 32}}"#;
    let rules = gptq_format::DynamicRules::from_json(rules).unwrap();
    let options = options(|b| b).with_dynamic(rules.clone()).with_lm_head(true);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let rows = rows(6);
    let write = |method| {
        let mut writer = ModelWriter::create(&out, &checkpoint, &config, &options, method).unwrap();
        let mut sink = |layer, packed: PackedLinear| writer.layer(layer, &packed);
        let mut watch = Watch::default();
        let report = match method {
            QuantizeMethod::Gptq => {
                quantize(&config, &checkpoint, &Cpu, &rows, &options, &mut watch, &mut sink)
            }
            QuantizeMethod::RoundToNearest => {
                round_to_nearest(&config, &checkpoint, &options, &mut watch, &mut sink)
            }
        }
        .unwrap();
        assert_eq!(report.layers.len(), 2 * 6 + 1);
        let names: Vec<String> = report.skipped.iter().map(Layer::to_string).collect();
        assert_eq!(names, ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]);
        writer.finish(&report).unwrap();
        let written = Checkpoint::open(&out).unwrap();
        let config = written.config().unwrap();
        assert_eq!(config.dynamic(), &rules);
        assert_eq!(config.get("lm_head").as_deref(), Some("true"));
        // Asymmetric layers need the second version of zero points, whatever the others are.
        assert_eq!(config.checkpoint_format(), Some(gptq_format::CheckpointFormat::GptqV2));
        let shape = |name: &str| {
            let linear = written.linear(name).unwrap();
            (linear.bits().get(), linear.group_size())
        };
        assert_eq!(shape("model.layers.0.self_attn.q_proj"), (8, 64));
        assert_eq!(shape("model.layers.1.self_attn.q_proj"), (4, 16));
        assert_eq!(shape("lm_head"), (8, 32));
        assert!(!written.linear("model.layers.1.self_attn.v_proj").unwrap().is_symmetric());
        for tensor in ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"] {
            assert_eq!(written.tensor(tensor).unwrap().bytes(), checkpoint.tensor(tensor).unwrap().bytes());
        }
        let float32 = LoadOptions::default().with_precision(Precision::Float32);
        let model = Llama::load(&out, Cpu, &float32).unwrap();
        perplexity(&model, &rows, |_, _| {}).unwrap();
    };
    write(QuantizeMethod::RoundToNearest);
    write(QuantizeMethod::Gptq);
}

/// The output layer alone: GPTQ sees the outputs of the final norm, so that it beats rounding on the logits.
#[test]
fn output_layer_is_calibrated_behind_the_final_norm() {
    let config = config();
    let weights = MemoryWeights::random(&config, 5);
    let rows = rows(12);
    let only_head = gptq_format::DynamicRules::from_json(r#"{"-:model\\.": {}}"#).unwrap();
    let options = options(|b| b.bits(3)).with_dynamic(only_head).with_lm_head(true);
    let (mut gptq, mut rtn) = (Layers::new(), Layers::new());
    let mut last = 0.0;
    let mut watch = Watch::default().on_progress(|progress| {
        assert!(progress.fraction >= last);
        last = progress.fraction;
    });
    let mut sink = |layer: Layer, packed| {
        gptq.insert(layer.to_string(), packed);
        Ok(())
    };
    quantize(&config, &weights, &Cpu, &rows, &options, &mut watch, &mut sink).unwrap();
    drop(watch);
    assert!((last - 1.0).abs() < 1e-9, "{last}");
    let mut sink = |layer: Layer, packed| {
        rtn.insert(layer.to_string(), packed);
        Ok(())
    };
    round_to_nearest(&config, &weights, &options, &mut Watch::default(), &mut sink).unwrap();
    assert_eq!(gptq.keys().collect::<Vec<_>>(), ["lm_head"]);
    let (gptq, rtn) = (logit_error(&gptq), logit_error(&rtn));
    assert!(gptq < 0.8 * rtn, "{gptq} against {rtn}");
}

/// A dense checkpoint of random weights, with a config that gives the same shapes.
fn save_dense(weights: &MemoryWeights<'_>, config: &LlamaConfig, dir: &Path) {
    let mut writer =
        gptq_format::CheckpointWriter::create(dir, None, gptq_format::WriteOptions::default()).unwrap();
    let mut names: Vec<String> =
        ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(String::from).into();
    for layer in 0..config.layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            names.push(format!("model.layers.{layer}.{norm}.weight"));
        }
        for module in gptq_llama::Module::ALL {
            names.push(format!("{}.weight", Layer { layer, module }));
            names.push(format!("{}.bias", Layer { layer, module }));
        }
    }
    for name in names {
        let Some(tensor) = weights.tensor(&name).unwrap() else { continue };
        let bytes: Vec<u8> = tensor.to_f32().iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.tensor(&name, gptq_format::Dtype::F32, &tensor.shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
    std::fs::write(dir.join("config.json"), CONFIG).unwrap();
}
