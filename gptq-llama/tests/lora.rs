//! Adapters merged into a model, against a computation of its own in float64.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, path::Path};

use gptq_core::{GptqConfig, rtn};
use gptq_format::{Checkpoint, CheckpointWriter, Dtype, DynamicRules, TensorFile, WriteOptions};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{
    Feed, Layer, Llama, LlamaConfig, LlamaError, LoadOptions, LoraError, LoraWeights, MemoryWeights,
    ModelWriter, Module, Precision, QuantizeMethod, QuantizeOptions, Rng, Wanted, Watch, WeightSource,
    round_to_nearest,
};
use half::bf16;
use ndarray::Array2;

fn config(tied: bool) -> LlamaConfig {
    LlamaConfig::from_json(&format!(
        r#"{{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": {tied}}}"#
    ))
    .unwrap()
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn random(name: &str, shape: &[usize], seed: u64) -> (String, Vec<usize>, Vec<f32>) {
    let mut rng = Rng::new(seed);
    let values = (0..shape.iter().product()).map(|_| (rng.next_f64() - 0.5) as f32).collect();
    (format!("base_model.model.{name}"), shape.to_vec(), values)
}

/// Both halves of an update.
fn pair(module: &str, rank: usize, (outputs, inputs): (usize, usize), seed: u64) -> Tensors {
    vec![
        random(&format!("{module}.lora_A.weight"), &[rank, inputs], seed),
        random(&format!("{module}.lora_B.weight"), &[outputs, rank], seed + 1),
    ]
}

/// Writes an adapter folder.
fn write(dir: &Path, config: &str, tensors: &Tensors) {
    let mut writer = CheckpointWriter::create(dir, None, WriteOptions::default()).unwrap();
    for (name, shape, values) in tensors {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.tensor(name, Dtype::F32, shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
    fs::rename(dir.join("model.safetensors"), dir.join("adapter_model.safetensors")).unwrap();
    fs::write(dir.join("adapter_config.json"), config).unwrap();
}

const Q0: &str = "model.layers.0.self_attn.q_proj";
const K1: &str = "model.layers.1.self_attn.k_proj";

fn open<'a>(
    settings: &str,
    tensors: &Tensors,
    base: &'a MemoryWeights<'_>,
    config: &LlamaConfig,
) -> Result<LoraWeights<'a>, LlamaError> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &format!(r#"{{"peft_type": "LORA", {settings}}}"#), tensors);
    LoraWeights::open(dir.path(), base, config)
}

/// `W + s B A` in float64, and how far float32 may be from it: a sum of `rank` products, scaled and added, is off by at most
/// `(rank + 3) eps` of the sum of the absolute values of all its parts.
fn merged(base: &[f32], a: &[f32], b: &[f32], rank: usize, inputs: usize, scaling: f64) -> Vec<(f64, f64)> {
    let element = |(at, &weight): (usize, &f32)| {
        let (row, column) = (at / inputs, at % inputs);
        let products = (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * inputs + column]));
        let (sum, size) = products.fold((0.0, 0.0), |(sum, size): (f64, f64), x| (sum + x, size + x.abs()));
        let bound =
            (rank as f64 + 3.0) * f64::from(f32::EPSILON) * (f64::from(weight.abs()) + scaling * size);
        (f64::from(weight) + scaling * sum, bound)
    };
    base.iter().enumerate().map(element).collect()
}

fn check(lora: &LoraWeights<'_>, name: &str, want: &[(f64, f64)]) {
    let got = lora.tensor(name).unwrap().unwrap().to_f32();
    assert_eq!(got.len(), want.len());
    for (at, (&got, &(want, bound))) in got.iter().zip(want).enumerate() {
        assert!((f64::from(got) - want).abs() <= bound, "{name}[{at}]: {got} is not {want} within {bound}");
    }
}

#[test]
fn updates_are_scaled_products() {
    let config = config(false);
    let base = MemoryWeights::random(&config, 1);
    let weight = |name: &str| base.tensor(name).unwrap().unwrap().to_f32();
    let mut tensors = pair(Q0, 4, (64, 64), 10);
    tensors.extend(pair(K1, 2, (32, 64), 20));
    let lists = r#""target_modules": ["layers.0.self_attn.q_proj", "1.self_attn.k_proj"]"#;
    let regex = r#""target_modules": ".*\\.(0\\.self_attn\\.q|1\\.self_attn\\.k)_proj""#;
    let cases = [
        (lists, r#""lora_alpha": 16, "use_rslora": false"#, 16.0 / 4.0, 16.0 / 2.0),
        (regex, r#""lora_alpha": 8, "use_rslora": true"#, 8.0 / 2.0, 8.0 / 2f64.sqrt()),
        (lists, r#""lora_alpha": 8, "alpha_pattern": {"k_proj": 3}, "fan_in_fan_out": true"#, 2.0, 1.5),
    ];
    for (targets, settings, q_scaling, k_scaling) in cases {
        let settings = format!(
            r#"{targets}, "r": 4, "rank_pattern": {{"layers.1.*": 2}}, "use_dora": false, {settings}"#
        );
        let lora = open(&settings, &tensors, &base, &config).unwrap();
        let (a, b) = (&tensors[0].2, &tensors[1].2);
        let name = format!("{Q0}.weight");
        check(&lora, &name, &merged(&weight(&name), a, b, 4, 64, q_scaling));
        let (a, b) = (&tensors[2].2, &tensors[3].2);
        let name = format!("{K1}.weight");
        check(&lora, &name, &merged(&weight(&name), a, b, 2, 64, k_scaling));
        assert_eq!(lora.changed(), [format!("{Q0}.weight"), format!("{K1}.weight")]);
        let other = "model.layers.1.self_attn.q_proj.weight";
        assert_eq!(lora.tensor(other).unwrap().unwrap().to_f32(), weight(other));
    }
}

/// PEFT's own result for adapters that it wrote (tests/lora_peft/make.py).
#[test]
fn peft_merges_to_the_same_weights() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lora_peft");
    let config = LlamaConfig::from_json(
        r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 10}"#,
    )
    .unwrap();
    for (name, count) in [("patterns", 4), ("rslora", 4), ("head", 4)] {
        let dir = folder.join(name);
        let expected = TensorFile::open(dir.join("expected.safetensors")).unwrap();
        let random = MemoryWeights::random(&config, 1);
        let mut base = MemoryWeights::in_front_of(&random);
        for tensor in expected.tensors() {
            if let Some(name) = tensor.name().strip_prefix("base.") {
                base.insert(name, tensor.shape(), tensor.f32s().unwrap().into_owned()).unwrap();
            }
        }
        let lora = LoraWeights::open(&dir, &base, &config).unwrap();
        assert_eq!(lora.changed().len(), count);
        for weight in lora.changed() {
            let got = lora.tensor(weight).unwrap().unwrap().to_f32();
            let want = expected.tensor(&format!("merged.{weight}")).unwrap();
            // Factors are below 2 and scalings at most 4: the sum of absolute values stays below 4 * 4 * 2 * 2 + 1, and
            // two sums of at most 4 products, a scaling and an addition are each off by 7 eps of it.
            let bound = 2.0 * 7.0 * f32::EPSILON * 65.0;
            for (got, want) in got.iter().zip(want.f32s().unwrap().iter()) {
                assert!((got - want).abs() <= bound, "{name}, {weight}: {got} is not {want}");
            }
        }
    }
}

#[test]
fn all_linear_means_all_but_the_output_layer() {
    let config = config(false);
    let base = MemoryWeights::random(&config, 1);
    let shapes = [
        ("self_attn.q_proj", (64, 64)),
        ("self_attn.k_proj", (32, 64)),
        ("self_attn.v_proj", (32, 64)),
        ("self_attn.o_proj", (64, 64)),
        ("mlp.gate_proj", (96, 64)),
        ("mlp.up_proj", (96, 64)),
        ("mlp.down_proj", (64, 96)),
    ];
    let mut tensors = Tensors::new();
    for layer in 0..2 {
        for (index, (module, shape)) in shapes.iter().enumerate() {
            tensors.extend(pair(
                &format!("model.layers.{layer}.{module}"),
                2,
                *shape,
                100 * layer + 2 * index as u64,
            ));
        }
    }
    let settings = r#""target_modules": "all-linear", "r": 2, "lora_alpha": 2"#;
    assert_eq!(open(settings, &tensors, &base, &config).unwrap().changed().len(), 14);
    let missing = tensors.split_off(tensors.len() - 2);
    let error = open(settings, &tensors, &base, &config).err().unwrap();
    assert!(
        error.to_string().ends_with("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight is missing"),
        "{error}"
    );
    let settings = r#""target_modules": ["down_proj"], "layers_to_transform": [1], "r": 2, "lora_alpha": 2"#;
    assert_eq!(
        open(settings, &missing, &base, &config).unwrap().changed(),
        ["model.layers.1.mlp.down_proj.weight"]
    );
}

/// The merged model and a model whose layer is replaced by the merged weight are the same.
#[test]
fn a_model_loads_through_it() {
    let config = config(false);
    let base = MemoryWeights::random(&config, 1);
    let tensors = pair(Q0, 4, (64, 64), 10);
    let settings = r#""target_modules": ["q_proj"], "layers_to_transform": 0, "r": 4, "lora_alpha": 4"#;
    let lora = open(settings, &tensors, &base, &config).unwrap();
    let mut by_hand = MemoryWeights::in_front_of(&base);
    let name = format!("{Q0}.weight");
    by_hand.insert(&name, &[64, 64], lora.tensor(&name).unwrap().unwrap().to_f32()).unwrap();
    let logits = |source: &dyn WeightSource| {
        let options = LoadOptions::default().with_precision(Precision::Float32);
        let model = Llama::from_source(config.clone(), source, Cpu, &options).unwrap();
        let mut cache = model.cache(8).unwrap();
        let feed = Feed { sequence: cache.add(), tokens: &[1, 2, 3], logits: Wanted::All };
        model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap()
    };
    assert_eq!(logits(&lora), logits(&by_hand));
    assert_ne!(logits(&lora), logits(&base));
}

#[test]
fn embeddings_and_saved_modules() {
    let config = config(false);
    let base = MemoryWeights::random(&config, 1);
    let embedding = "model.embed_tokens.weight";
    let table = base.tensor(embedding).unwrap().unwrap().to_f32();
    let tensors = vec![
        random("model.embed_tokens.lora_embedding_A", &[4, 50], 1),
        random("model.embed_tokens.lora_embedding_B", &[64, 4], 2),
        random("lm_head.weight", &[50, 64], 3),
    ];
    let settings =
        r#""target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"], "r": 4, "lora_alpha": 12"#;
    let lora = open(settings, &tensors, &base, &config).unwrap();
    // Row v of the update is the transpose of B times column v of A.
    let (a, b) = (&tensors[0].2, &tensors[1].2);
    let transpose = |x: &[f32], cols: usize| -> Vec<f32> {
        (0..cols).flat_map(|column| x.iter().skip(column).step_by(cols).copied()).collect()
    };
    check(&lora, embedding, &merged(&table, &transpose(b, 4), &transpose(a, 50), 4, 64, 3.0));
    assert_eq!(lora.tensor("lm_head.weight").unwrap().unwrap().to_f32(), tensors[2].2);

    // The embedding that PEFT saves along is accepted if it is the model's, and refused if it is not.
    let mut along = pair(Q0, 4, (64, 64), 10);
    let name = format!("base_model.model.{embedding}");
    along.push((name.clone(), vec![50, 64], table.clone()));
    let settings = r#""target_modules": ["0.self_attn.q_proj"], "r": 4, "lora_alpha": 12"#;
    assert_eq!(open(settings, &along, &base, &config).unwrap().changed().len(), 1);
    along[2].2[7] += 1.0;
    let error = open(settings, &along, &base, &config).err().unwrap();
    assert!(
        matches!(&error, LlamaError::Lora(LoraError::Unused { tensor, .. }) if *tensor == name),
        "{error}"
    );
}

#[test]
fn trained_biases_replace_those_of_the_model() {
    let config = LlamaConfig::from_json(
        r#"{"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}"#,
    )
    .unwrap();
    let base = MemoryWeights::random(&config, 1);
    let mut tensors = pair(Q0, 4, (64, 64), 10);
    tensors.push(random(&format!("{Q0}.base_layer.bias"), &[64], 30));
    let settings =
        |bias| format!(r#""target_modules": ["q_proj"], "r": 4, "lora_alpha": 4, "bias": "{bias}""#);
    for bias in ["all", "lora_only"] {
        let lora = open(&settings(bias), &tensors, &base, &config).unwrap();
        assert_eq!(lora.tensor(&format!("{Q0}.bias")).unwrap().unwrap().to_f32(), tensors[2].2);
    }
    let error = open(&settings("none"), &tensors, &base, &config).err().unwrap();
    assert!(matches!(error, LlamaError::Lora(LoraError::Unused { .. })), "{error}");
}

#[test]
fn what_does_not_fit_is_named() {
    let config = config(false);
    let base = MemoryWeights::random(&config, 1);
    let fail = |settings: &str, tensors: &Tensors| {
        open(settings, tensors, &base, &config).err().unwrap().to_string()
    };
    let good = r#""target_modules": ["0.self_attn.q_proj"], "r": 4, "lora_alpha": 4"#;
    let tensors = pair(Q0, 4, (64, 64), 10);
    assert!(open(good, &tensors, &base, &config).is_ok());

    let a = format!("base_model.model.{Q0}.lora_A.weight");
    let b = format!("base_model.model.{Q0}.lora_B.weight");
    let wide = pair(Q0, 4, (64, 96), 10);
    let error = fail(good, &wide);
    assert!(
        error.ends_with(&format!("{a} has shape [4, 96], the model and the rank need [4, 64]")),
        "{error}"
    );
    let error = fail(good, &pair(Q0, 8, (64, 64), 10));
    assert!(error.contains("has shape [8, 64], the model and the rank need [4, 64]"), "{error}");
    assert!(fail(good, &tensors[..1].to_vec()).ends_with(&format!("{b} is missing")));
    assert!(fail(good, &tensors[1..].to_vec()).ends_with(&format!("{a} is missing")));
    let mut nan = tensors.clone();
    nan[1].2[3] = f32::NAN;
    assert!(fail(good, &nan).ends_with(&format!("{b} holds NaN")));

    for (extra, shape) in [
        ("model.layers.7.self_attn.q_proj.lora_A.weight", [4, 64]),
        ("model.layers.1.self_attn.q_proj.lora_A.weight", [4, 64]),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", [64, 1]),
        ("model.layers.0.self_attn.q_proj.weight", [64, 64]),
        ("model.layers.0.self_attn.q_proj.lora_A.other.weight", [4, 64]),
        ("score.weight", [2, 64]),
    ] {
        let mut more = tensors.clone();
        more.push(random(extra, &shape, 5));
        let error = fail(good, &more);
        assert!(error.contains(&format!("base_model.model.{extra} would be ignored")), "{error}");
    }
    let mut unprefixed = tensors.clone();
    unprefixed.push(("lm_head.weight".into(), vec![50, 64], vec![0.0; 50 * 64]));
    assert!(fail(good, &unprefixed).contains("lm_head.weight would be ignored: it does not begin with"));

    for (settings, want) in [
        (r#""use_dora": true"#, "use_dora = true is not supported"),
        (r#""init_lora_weights": "pissa""#, "init_lora_weights = \"pissa\" is not supported"),
        (r#""layer_replication": [[0, 1]]"#, "layer_replication"),
        (r#""rank_pattern": {"(": 2}"#, "rank_pattern: \"(\" is no regular expression"),
        (r#""bias": "some""#, "bias: must be none, all or lora_only"),
        (r#""modules_to_save": ["lm_head"]"#, "base_model.model.lm_head.weight is missing"),
        (r#""exclude_modules": ["q_proj"]"#, "target_modules: must name modules of the model"),
    ] {
        let error = fail(&format!("{good}, {settings}"), &tensors);
        assert!(error.contains(want), "{error}");
    }
    assert!(fail(r#""r": 4"#, &tensors).contains("target_modules: is missing"));
    assert!(fail(r#""target_modules": ["q_proj"], "r": 0"#, &tensors).contains("r: must be a whole number"));

    let dir = tempfile::tempdir().unwrap();
    let open = |dir: &Path| LoraWeights::open(dir, &base, &config).err().unwrap();
    assert!(matches!(open(dir.path()), LlamaError::Lora(LoraError::Io { .. })));
    fs::write(dir.path().join("adapter_config.json"), r#"{"peft_type": "LOHA"}"#).unwrap();
    assert!(open(dir.path()).to_string().contains("peft_type = \"LOHA\" is not supported"));
    fs::write(dir.path().join("adapter_config.json"), format!(r#"{{"peft_type": "LORA", {good}}}"#)).unwrap();
    fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
    assert!(matches!(open(dir.path()), LlamaError::Lora(LoraError::NoWeights { pickled: true, .. })));
}

/// Merged layers that stay dense are written with their merged values, in the checkpoint's type; the others are quantised
/// from them.
#[test]
fn a_merged_model_is_written() {
    let config = config(false);
    let random = MemoryWeights::random(&config, 1);
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let mut writer = CheckpointWriter::create(&source, None, WriteOptions::default()).unwrap();
    let mut names: Vec<String> =
        ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(String::from).into();
    for layer in 0..2 {
        names.extend(
            ["input_layernorm", "post_attention_layernorm"]
                .map(|n| format!("model.layers.{layer}.{n}.weight")),
        );
        names.extend(Module::ALL.map(|module| format!("{}.weight", Layer { layer, module })));
    }
    for name in &names {
        let tensor = random.tensor(name).unwrap().unwrap();
        let bytes: Vec<u8> = tensor.to_f32().iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        writer.tensor(name, Dtype::BF16, &tensor.shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let base = Checkpoint::open(&source).unwrap();
    let adapter = dir.path().join("adapter");
    let settings = r#"{"peft_type": "LORA", "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0], "r": 4}"#;
    let mut tensors = pair(Q0, 4, (64, 64), 10);
    tensors.extend(pair("model.layers.0.self_attn.o_proj", 4, (64, 64), 12));
    write(&adapter, settings, &tensors);
    let lora = LoraWeights::open(&adapter, &base, &config).unwrap();

    let rules = DynamicRules::from_json(r#"{"-:.*q_proj": {}}"#).unwrap();
    let gptq = GptqConfig::builder().group_size(Some(32)).build().unwrap();
    let options = QuantizeOptions::new(gptq.clone()).with_dynamic(rules);
    let method = QuantizeMethod::RoundToNearest;
    let writer = ModelWriter::create(&out, &base, &config, &options, method).unwrap();
    let mut writer = writer.with_weights(&lora);
    let mut sink = |layer: Layer, packed| writer.layer(layer, &packed);
    let report = round_to_nearest(&config, &lora, &options, &mut Watch::default(), &mut sink).unwrap();
    writer.finish(&report).unwrap();

    let written = Checkpoint::open(&out).unwrap();
    let q = format!("{Q0}.weight");
    let want: Vec<bf16> =
        lora.tensor(&q).unwrap().unwrap().to_f32().into_iter().map(bf16::from_f32).collect();
    assert_eq!(*written.tensor(&q).unwrap().bf16s().unwrap(), want);
    assert_ne!(written.tensor(&q).unwrap().bytes(), base.tensor(&q).unwrap().bytes());
    let same = "model.layers.1.self_attn.q_proj.weight";
    assert_eq!(written.tensor(same).unwrap().bytes(), base.tensor(same).unwrap().bytes());
    let o = "model.layers.0.self_attn.o_proj";
    let merged = lora.tensor(&format!("{o}.weight")).unwrap().unwrap().to_f32();
    let merged = Array2::from_shape_vec((64, 64), merged).unwrap();
    let codes = rtn(merged.view(), &gptq).unwrap().codes;
    assert_eq!(written.linear(o).unwrap().unpack_codes(), codes.into_raw_vec_and_offset().0);
}

#[test]
fn tied_and_quantised_bases_are_refused() {
    let config = config(true);
    let base = MemoryWeights::random(&config, 1);
    let tensors = vec![
        random("model.embed_tokens.lora_embedding_A", &[4, 50], 1),
        random("model.embed_tokens.lora_embedding_B", &[64, 4], 2),
    ];
    let error =
        open(r#""target_modules": ["embed_tokens"], "r": 4"#, &tensors, &base, &config).err().unwrap();
    assert!(error.to_string().contains("tie_word_embeddings"), "{error}");

    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/g32_plain");
    let config = LlamaConfig::read(&folder).unwrap();
    let quantized = Checkpoint::open(&folder).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (inputs, outputs) = Module::Q.shape(&config);
    let settings = r#"{"peft_type": "LORA", "target_modules": ["0.self_attn.q_proj"], "r": 4}"#;
    write(dir.path(), settings, &pair(Q0, 4, (outputs, inputs), 1));
    let lora = LoraWeights::open(dir.path(), &quantized, &config).unwrap();
    let error = lora.packed(Q0).unwrap_err();
    assert!(matches!(error, LlamaError::Lora(LoraError::QuantizedBase { .. })), "{error}");
}
