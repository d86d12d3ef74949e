//! The same checkpoints, changed into what else lies about: older tools' omissions, other names, other words, other types.
//! The weights stay what they were, and so must the logits.

use std::fs;

use gptq_format::{
    Checkpoint, CheckpointFormat, CheckpointWriter, Dtype, QuantizeConfig, TensorFile, WriteOptions,
};
use half::f16;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{TOLERANCE, folder, largest_difference, logits};

struct Raw {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A fixture taken apart.
struct Model {
    expected: TensorFile,
    model_config: Map<String, Value>,
    config: Map<String, Value>,
    tensors: Vec<Raw>,
    file: String,
}

impl Model {
    fn of(fixture: &str) -> Self {
        let dir = folder("compat").join(fixture);
        let json = |name: &str| serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap();
        let mut model_config: Map<String, Value> = json("config.json");
        model_config.remove("quantization_config");
        let tensors = Checkpoint::open(&dir).unwrap();
        let tensors = tensors.tensors().map(|tensor| Raw {
            name: tensor.name().to_owned(),
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            bytes: tensor.bytes().to_vec(),
        });
        Self {
            expected: TensorFile::open(dir.join("expected.safetensors")).unwrap(),
            model_config,
            config: json("quantize_config.json"),
            tensors: tensors.collect(),
            file: "model.safetensors".into(),
        }
    }

    fn write(&self, shard_bytes: u64) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let options = WriteOptions::default().max_shard_bytes(shard_bytes);
        let mut writer = CheckpointWriter::create(dir.path(), None, options).unwrap();
        for tensor in &self.tensors {
            writer.tensor(&tensor.name, tensor.dtype, &tensor.shape, &tensor.bytes).unwrap();
        }
        writer.finish().unwrap();
        if self.file != "model.safetensors" {
            fs::rename(dir.path().join("model.safetensors"), dir.path().join(&self.file)).unwrap();
        }
        let put = |name: &str, value: &Map<String, Value>| {
            fs::write(dir.path().join(name), Value::Object(value.clone()).to_string()).unwrap();
        };
        put("config.json", &self.model_config);
        put("quantize_config.json", &self.config);
        dir
    }

    fn logits_of(&self, dir: &TempDir) -> Vec<f32> {
        logits(dir.path(), &self.expected)
    }

    /// The logits are still those that the tool's own checkpoint has.
    fn assert_same(&self, what: &str) {
        let difference = self.difference(&self.write(u64::MAX));
        assert!(difference <= TOLERANCE, "{what}: {difference}");
    }

    fn difference(&self, dir: &TempDir) -> f32 {
        largest_difference(&self.logits_of(dir), &self.expected.tensor("logits").unwrap().f32s().unwrap())
    }

    /// Changes every tensor whose name ends so; `None` removes it.
    fn change(&mut self, ending: &str, change: impl Fn(Raw) -> Option<Raw>) {
        let tensors = std::mem::take(&mut self.tensors);
        let changed = tensors.into_iter().filter_map(|tensor| match tensor.name.ends_with(ending) {
            true => change(tensor),
            false => Some(tensor),
        });
        self.tensors = changed.collect();
    }

    fn forget(&mut self, keys: &[&str]) {
        self.config.retain(|key, _| !keys.contains(&key.as_str()));
    }
}

fn halves(bytes: &[u8]) -> Vec<f16> {
    bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect()
}

#[test]
fn g_idx_missing_all_zero_or_of_64_bits() {
    for fixture in ["g32_plain", "g128_plain", "gm1_plain", "ag_g32", "b3_g32"] {
        let mut model = Model::of(fixture);
        model.change(".g_idx", |_| None);
        model.assert_same("without g_idx");

        let mut model = Model::of(fixture);
        model.change(".g_idx", |mut tensor| {
            tensor.bytes.fill(0);
            Some(tensor)
        });
        model.assert_same("zero g_idx");
        model.config.insert("desc_act".into(), json!(true));
        model.assert_same("zero g_idx and desc_act");
    }
    let mut model = Model::of("g32_act");
    model.change(".g_idx", |mut tensor| {
        let wide = tensor.bytes.chunks_exact(4).flat_map(|b| [b, &[0; 4]].concat());
        (tensor.bytes, tensor.dtype) = (wide.collect(), Dtype::I64);
        Some(tensor)
    });
    model.assert_same("g_idx of 64 bits");
}

#[test]
fn trivial_g_idx_although_desc_act() {
    let mut model = Model::of("g32_plain");
    model.config.insert("desc_act".into(), json!(true));
    model.assert_same("desc_act");
}

/// Every value of half precision is one of float32; bfloat16 is compared with the same values in half precision.
#[test]
fn scales_in_float32_and_bfloat16() {
    for fixture in ["g32_plain", "g32_asym_v2", "ag_desc_actTrue"] {
        let mut model = Model::of(fixture);
        model.change(".scales", |mut tensor| {
            tensor.bytes = halves(&tensor.bytes).iter().flat_map(|x| x.to_f32().to_le_bytes()).collect();
            tensor.dtype = Dtype::F32;
            Some(tensor)
        });
        model.assert_same("float32 scales");
    }
    // The upper half of a float32 is a bfloat16, and these have no more bits than half precision holds.
    let short = |x: f16| f32::from_bits(x.to_f32().to_bits() & 0xffff_0000);
    let mut narrow = Model::of("g32_plain");
    narrow.change(".scales", |mut tensor| {
        let halves = halves(&tensor.bytes);
        tensor.bytes = halves.iter().flat_map(|&x| f16::from_f32(short(x)).to_le_bytes()).collect();
        Some(tensor)
    });
    let mut brain = Model::of("g32_plain");
    brain.change(".scales", |mut tensor| {
        let halves = halves(&tensor.bytes);
        tensor.bytes = halves.iter().flat_map(|&x| short(x).to_bits().to_le_bytes()[2..].to_vec()).collect();
        tensor.dtype = Dtype::BF16;
        Some(tensor)
    });
    let [narrow, brain] = [&narrow, &brain].map(|model| model.logits_of(&model.write(u64::MAX)));
    assert_eq!(narrow, brain);
}

#[test]
fn configs_of_few_words() {
    let all = [
        "sym",
        "desc_act",
        "quant_method",
        "method",
        "checkpoint_format",
        "format",
        "meta",
        "pack_dtype",
        "lm_head",
    ];
    for fixture in ["g32_plain", "ag_g32", "b2_g32", "b3_g32", "b8_g32"] {
        for keys in all.iter().map(std::slice::from_ref).chain([&all[..]]) {
            let mut model = Model::of(fixture);
            model.forget(keys);
            model.assert_same(&format!("{fixture} without {keys:?}"));
        }
        let mut model = Model::of(fixture);
        for (key, synonym) in [("bits", "w_bit"), ("group_size", "q_group_size")] {
            let value = model.config.remove(key).unwrap();
            model.config.insert(synonym.into(), value);
        }
        model.assert_same("synonyms");
    }
    let mut asymmetric = Model::of("g32_asym_v2");
    asymmetric.forget(&["checkpoint_format", "format"]);
    asymmetric.assert_same("v2 without a label");
}

#[test]
fn config_in_any_place() {
    let model = Model::of("g32_plain");
    let dir = model.write(u64::MAX);
    let at = |name: &str| dir.path().join(name);
    fs::rename(at("quantize_config.json"), at("quant_config.json")).unwrap();
    assert!(model.difference(&dir) <= TOLERANCE);
    fs::remove_file(at("quant_config.json")).unwrap();
    let mut nested = model.model_config.clone();
    nested.insert("quantization_config".into(), Value::Object(model.config.clone()));
    fs::write(at("config.json"), Value::Object(nested).to_string()).unwrap();
    assert!(model.difference(&dir) <= TOLERANCE);
}

#[test]
fn zero_biases_and_extra_tensors() {
    let mut model = Model::of("g32_plain");
    let extra = |name: String, len: usize, dtype: Dtype| Raw {
        name,
        dtype,
        shape: vec![len],
        bytes: vec![0; len * dtype.bits() / 8],
    };
    let mut added = Vec::new();
    for tensor in model.tensors.iter().filter(|tensor| tensor.name.ends_with(".scales")) {
        let prefix = tensor.name.strip_suffix(".scales").unwrap();
        added.push(extra(format!("{prefix}.bias"), tensor.shape[1], Dtype::F16));
    }
    for layer in 0..2 {
        added.push(extra(format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"), 16, Dtype::F32));
    }
    added.push(extra("model.rotary_emb.inv_freq".into(), 16, Dtype::F32));
    model.tensors.extend(added);
    model.assert_same("zero biases, inv_freq");

    let mut without = Model::of("ag_g32");
    without.change(".bias", |_| None);
    without.assert_same("AutoGPTQ's zero biases left out");
}

/// The only group of each layer, cut into groups that do not divide the inputs, or named larger than they are.
#[test]
fn group_sizes_that_do_not_divide_the_inputs() {
    for (size, named) in [(48, 48), (100, 100), (1024, 1024), (256, 256)] {
        let mut model = Model::of("gm1_plain");
        model.config.insert("group_size".into(), json!(named));
        let inputs: Vec<(String, usize)> = model
            .tensors
            .iter()
            .filter_map(|tensor| Some((tensor.name.strip_suffix("g_idx")?.to_owned(), tensor.shape[0])))
            .collect();
        let groups = |name: &str| {
            let (_, inputs) = inputs.iter().find(|(prefix, _)| name.starts_with(prefix)).unwrap();
            inputs.div_ceil(size)
        };
        for ending in [".scales", ".qzeros"] {
            model.change(ending, |mut tensor| {
                let groups = groups(&tensor.name);
                (tensor.bytes, tensor.shape[0]) = (tensor.bytes.repeat(groups), groups);
                Some(tensor)
            });
        }
        model.change(".g_idx", |mut tensor| {
            let index = (0..tensor.shape[0]).flat_map(|i| ((i / size) as i32).to_le_bytes());
            tensor.bytes = index.collect();
            Some(tensor)
        });
        model.assert_same(&format!("groups of {size}"));
        model.change(".g_idx", |_| None);
        model.assert_same(&format!("groups of {size} without g_idx"));
    }
}

/// `pack_dtype` int8, int16 and int64: columns of `qweight` and rows of `qzeros` are the same bytes in other words.
#[test]
fn words_of_other_sizes() {
    for fixture in ["g32_plain", "b2_g32", "b8_g32", "g32_asym_v2", "ag_g32"] {
        for (dtype, size) in [(Dtype::I8, 1), (Dtype::I16, 2), (Dtype::I64, 8)] {
            let mut model = Model::of(fixture);
            model.config.insert("pack_dtype".into(), json!(format!("int{}", 8 * size)));
            model.change(".qzeros", |mut tensor| {
                let row = 4 * tensor.shape[1];
                // Only whole words can be regrouped; these layers have them.
                assert_eq!(row % size, 0);
                (tensor.shape[1], tensor.dtype) = (row / size, dtype);
                Some(tensor)
            });
            model.change(".qweight", |mut tensor| {
                let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
                assert_eq!(4 * rows % size, 0);
                let byte = |at: usize, column: usize| tensor.bytes[4 * (at / 4 * columns + column) + at % 4];
                let words =
                    (0..4 * rows / size).flat_map(|row| (0..columns).map(move |column| (row, column)));
                let bytes = words.flat_map(|(row, column)| (0..size).map(move |k| (size * row + k, column)));
                let bytes: Vec<u8> = bytes.map(|(at, column)| byte(at, column)).collect();
                (tensor.bytes, tensor.shape[0], tensor.dtype) = (bytes, 4 * rows / size, dtype);
                Some(tensor)
            });
            model.assert_same(&format!("{fixture} in {dtype}"));
            model.forget(&["pack_dtype"]);
            model.assert_same(&format!("{fixture} in {dtype}, unsaid"));
        }
    }
}

#[test]
fn names_of_files() {
    for (file, key) in [
        ("gptq_model-4bit-32g.safetensors", None),
        ("vicuna-7b-4bit-32g.compat.no-act-order.safetensors", None),
        ("base.safetensors", Some("model_basename")),
        ("base.safetensors", Some("model_file_base_name")),
    ] {
        let mut model = Model::of("ag_g32");
        model.file = file.into();
        if let Some(key) = key {
            model.config.insert(key.into(), json!("base"));
        }
        model.assert_same(file);
    }
    let model = Model::of("g32_plain");
    let dir = model.write(60_000);
    assert!(dir.path().join("model.safetensors.index.json").exists());
    assert!(model.difference(&dir) <= TOLERANCE);
    // Shards under AutoGPTQ's names.
    let names: Vec<String> = dir
        .path()
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for name in names.iter().filter(|name| name.starts_with("model")) {
        let renamed = name.replacen("model", "gptq_model-4bit-32g", 1);
        fs::rename(dir.path().join(name), dir.path().join(&renamed)).unwrap();
    }
    let index = dir.path().join("gptq_model-4bit-32g.safetensors.index.json");
    let json = fs::read_to_string(&index).unwrap().replace("\"model-0", "\"gptq_model-4bit-32g-0");
    fs::write(index, json).unwrap();
    assert!(model.difference(&dir) <= TOLERANCE);
}

/// Zero points that contradict the label: version 2 called `gptq`, and the reverse. Tools that believe it are off by 1.26.
#[test]
fn label_that_lies() {
    let mut model = Model::of("g32_plain");
    for key in ["checkpoint_format", "format"] {
        model.config.insert(key.into(), json!("gptq_v2"));
    }
    model.assert_same("v1 called gptq_v2");
    let mut model = Model::of("g32_asym_v2");
    for key in ["checkpoint_format", "format"] {
        model.config.insert(key.into(), json!("gptq"));
    }
    model.assert_same("v2 called gptq");
}

/// What `convert` does, through every layout that holds the layers.
#[test]
fn converted_checkpoints() {
    for fixture in ["g32_plain", "b3_g32", "g32_asym_v2", "g32_dyn", "ag_desc_actTrue"] {
        let source = Checkpoint::open(folder("compat").join(fixture)).unwrap();
        let model = Model::of(fixture);
        for format in [CheckpointFormat::Gptq, CheckpointFormat::GptqV2, CheckpointFormat::Planar] {
            let config: QuantizeConfig = source.config().unwrap().with_checkpoint_format(format);
            let dir = tempfile::tempdir().unwrap();
            let mut writer =
                CheckpointWriter::create(dir.path(), Some(&config), WriteOptions::default()).unwrap();
            writer.carry_over(source.dir()).unwrap();
            let mut refused = false;
            for prefix in source.linears() {
                refused |= writer.linear(prefix, &source.linear(prefix).unwrap()).is_err();
            }
            let has_zero = |prefix: &str| source.linear(prefix).unwrap().unpack_zeros().contains(&0);
            assert_eq!(
                refused,
                format == CheckpointFormat::Gptq && source.linears().any(has_zero),
                "{fixture}"
            );
            if refused {
                continue;
            }
            for tensor in source.tensors() {
                let prefix = tensor.name().rsplit_once('.').map_or("", |(prefix, _)| prefix);
                if !source.is_quantized(prefix) {
                    writer.tensor(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes()).unwrap();
                }
            }
            writer.finish().unwrap();
            let difference = model.difference(&dir);
            assert!(difference <= TOLERANCE, "{fixture} as {}: {difference}", format.name());
        }
    }
}
