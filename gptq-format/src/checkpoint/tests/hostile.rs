//! Files that were made, or broken, to make a reader fail. Everything here must end in a typed error.

use proptest::prelude::*;

use super::*;

fn refuse(config: &str, tensors: &[Raw]) -> FormatError {
    read(config, tensors).expect_err("a bad checkpoint")
}

fn refuse_layer(changed: Raw) -> FormatError {
    refuse(CONFIG, &layer_with(vec![changed], &[]))
}

/// Two shards, `a` in the first and `b` in the second, and their index.
fn shards() -> TempDir {
    let dir = tempfile::tempdir().expect("temporary folder");
    let options = WriteOptions::default().max_shard_bytes(8);
    let mut writer = CheckpointWriter::create(dir.path(), None, options).expect("starts");
    writer.tensor("a", Dtype::F32, &[2], &[0; 8]).expect("writes");
    writer.tensor("b", Dtype::F32, &[2], &[0; 8]).expect("writes");
    writer.finish().expect("finishes");
    dir
}

const INDEX: &str = "model.safetensors.index.json";

fn index(dir: &Path, json: &str) -> FormatError {
    fs::write(dir.join(INDEX), json).expect("writes");
    Checkpoint::open(dir).expect_err("a bad index")
}

#[test]
fn shard_name_that_leads_out_of_the_folder() {
    let dir = shards();
    let secret = dir.path().join("secret.safetensors");
    fs::copy(dir.path().join("model-00001-of-00002.safetensors"), secret).expect("copies");
    let inner = dir.path().join("inner");
    fs::create_dir(&inner).expect("creates");
    let absolute = dir.path().join("secret.safetensors");
    for name in [
        "../secret.safetensors",
        "./../secret.safetensors",
        absolute.to_str().expect("UTF-8"),
        "a/../../secret.safetensors",
        "..",
        ".",
        "",
        "/",
        "a\\..\\secret.safetensors",
        "c:secret.safetensors",
        "secret.safetensors/",
        "secret.safetensors\0",
        "passwd",
    ] {
        let json = serde_json::json!({"weight_map": {"a": name}}).to_string();
        let error = index(&inner, &json);
        assert!(matches!(&error, FormatError::ShardName { name: n, .. } if n == name), "{name:?}: {error}");
    }
}

#[test]
fn missing_shard() {
    let dir = shards();
    let shard = "model-00002-of-00002.safetensors";
    fs::remove_file(dir.path().join(shard)).expect("removes");
    let error = Checkpoint::open(dir.path()).expect_err("a shard is missing");
    assert!(matches!(&error, FormatError::MissingShard { shard: s, .. } if s == shard), "{error}");
}

#[test]
fn missing_index() {
    let dir = shards();
    fs::remove_file(dir.path().join(INDEX)).expect("removes");
    assert!(matches!(Checkpoint::open(dir.path()), Err(FormatError::NoIndex { .. })));
}

#[test]
fn tensor_that_only_the_index_has() {
    let dir = shards();
    let error = index(dir.path(), r#"{"weight_map": {"c": "model-00001-of-00002.safetensors"}}"#);
    assert!(
        matches!(&error, FormatError::MissingTensor { name, path } if name == "c" && path.ends_with("model-00001-of-00002.safetensors"))
    );
}

#[test]
fn index_that_is_none() {
    let dir = shards();
    for json in ["", "[]", "{}", r#"{"weight_map": []}"#, r#"{"weight_map": {"a": 1}}"#, &"[".repeat(1 << 20)]
    {
        let error = index(dir.path(), json);
        assert!(matches!(error, FormatError::Json { .. }), "{error}");
    }
}

#[test]
fn tensors_beside_the_index_are_an_oddity() {
    let dir = shards();
    fs::write(dir.path().join(INDEX), r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#)
        .expect("writes");
    let checkpoint = Checkpoint::open(dir.path()).expect("opens");
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a"]);
    assert!(checkpoint.get("b").is_none());
    fs::write(dir.path().join(INDEX), r#"{"weight_map": {}}"#).expect("writes");
    assert_eq!(Checkpoint::open(dir.path()).expect("opens").names().count(), 0);
}

#[test]
fn json_larger_than_any_config() {
    let dir = folder(CONFIG, &layer());
    let padded = format!("{}{CONFIG}", " ".repeat(17 << 20));
    fs::write(dir.path().join("quantize_config.json"), padded).expect("writes");
    assert!(matches!(Checkpoint::open(dir.path()), Err(FormatError::TooLong { .. })));
}

#[test]
fn folder_without_a_model() {
    let dir = tempfile::tempdir().expect("temporary folder");
    assert!(matches!(Checkpoint::open(dir.path()), Err(FormatError::NoCheckpoint { .. })));
    assert!(matches!(Checkpoint::open(dir.path().join("absent")), Err(FormatError::Io { .. })));
    fs::write(dir.path().join("pytorch_model.bin"), b"").expect("writes");
    let error = Checkpoint::open(dir.path()).expect_err("pickled");
    assert!(matches!(error, FormatError::Pickle { .. }) && error.to_string().contains("save_file"));
    for name in ["llama-7b-4bit-128g.pt", "x.pth", "x.ckpt", "pytorch_model.bin"] {
        let path = dir.path().join(name);
        fs::write(&path, b"PK\x03\x04").expect("writes");
        let error = Checkpoint::open(&path).expect_err("pickled");
        assert!(matches!(&error, FormatError::Pickle { path: p } if *p == path), "{error}");
        assert!(error.to_string().contains("save_file"), "{error}");
    }
    for name in ["a.safetensors", "b.safetensors"] {
        fs::write(dir.path().join(name), b"").expect("writes");
    }
    let error = Checkpoint::open(dir.path()).expect_err("two candidates");
    assert!(matches!(&error, FormatError::Ambiguous { names, .. } if names.len() == 2), "{error}");
}

#[test]
fn model_that_is_no_regular_file() {
    let dir = tempfile::tempdir().expect("temporary folder");
    fs::create_dir(dir.path().join("model.safetensors")).expect("creates");
    assert!(matches!(Checkpoint::open(dir.path()), Err(FormatError::NotAFile { .. })));
    fs::create_dir(dir.path().join("config.json")).expect("creates");
    assert!(matches!(Checkpoint::open(dir.path()), Err(FormatError::NotAFile { .. })));
}

#[test]
fn truncated_file_at_every_length() {
    let dir = folder(CONFIG, &layer());
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).expect("reads");
    for len in 0..whole.len() {
        // A new file each time: what is mapped must not be shortened.
        fs::remove_file(&path).expect("removes");
        fs::write(&path, &whole[..len]).expect("writes");
        let error = Checkpoint::open(dir.path()).expect_err("truncated");
        assert!(matches!(&error, FormatError::Header { path: p, .. } if *p == path), "{len}: {error}");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).expect("writes");
    let error = Checkpoint::open(dir.path()).expect_err("lengthened");
    let is_length = |source: &HeaderError| matches!(source, HeaderError::DataLength { .. });
    assert!(matches!(&error, FormatError::Header { source, .. } if is_length(source)), "{error}");
}

#[test]
fn bits_that_contradict_the_shape() {
    for bits in [2, 3, 8] {
        let error = refuse(&format!(r#"{{"bits": {bits}, "group_size": 32}}"#), &layer());
        assert!(
            matches!(&error, FormatError::TensorShape { tensor, .. } if tensor == "x.g_idx"),
            "{bits}: {error}"
        );
    }
}

#[test]
fn group_size_that_contradicts_the_shape() {
    for group_size in [-1, 16, 64, 128] {
        let error = refuse(&format!(r#"{{"bits": 4, "group_size": {group_size}}}"#), &layer());
        assert!(matches!(&error, FormatError::TensorShape { tensor, .. } if tensor == "x.scales"), "{error}");
    }
}

#[test]
fn shapes_that_contradict_each_other() {
    let cases = [
        raw("x.qweight", Dtype::I32, &[64], &[0u32; 64]),
        raw("x.qweight", Dtype::I32, &[0, 8], &[0u32; 0]),
        raw("x.qweight", Dtype::I32, &[8, 0], &[0u32; 0]),
        raw("x.qweight", Dtype::I32, &[8, 4], &[0u32; 32]),
        raw("x.qweight", Dtype::I32, &[9, 8], &[0u32; 72]),
        raw("x.qzeros", Dtype::I32, &[2], &[0u32; 2]),
        raw("x.qzeros", Dtype::I32, &[3, 1], &[0u32; 3]),
        raw("x.qzeros", Dtype::I32, &[2, 2], &[0u32; 4]),
        raw("x.qzeros", Dtype::I64, &[2, 2], &[0u64; 4]),
        raw("x.qzeros", Dtype::I8, &[2, 1], &[0u8; 2]),
        raw("x.qweight", Dtype::I64, &[8, 8], &[0u64; 64]),
        raw("x.qweight", Dtype::I16, &[8, 8], &[0u16; 64]),
        raw("x.scales", Dtype::F16, &[2, 7], &[f16::ONE; 14]),
        raw("x.scales", Dtype::F16, &[16], &[f16::ONE; 16]),
        raw("x.scales", Dtype::F16, &[1, 8], &[f16::ONE; 8]),
        raw("x.g_idx", Dtype::I32, &[65], &[0i32; 65]),
        raw("x.g_idx", Dtype::I32, &[32], &[0i32; 32]),
        raw("x.g_idx", Dtype::I32, &[0], &[0i32; 0]),
        raw("x.g_idx", Dtype::I32, &[8, 8], &[0i32; 64]),
        raw("x.bias", Dtype::F16, &[7], &[f16::ONE; 7]),
        raw("x.bias", Dtype::F16, &[8, 1], &[f16::ONE; 8]),
    ];
    for case in cases {
        let what = format!("{} {:?}", case.name, case.shape);
        let error = refuse_layer(case);
        assert!(matches!(error, FormatError::TensorShape { .. }), "{what}: {error}");
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
}

#[test]
fn wrong_dtypes_are_named() {
    let cases = [
        raw("x.qweight", Dtype::F32, &[8, 8], &[0u32; 64]),
        raw("x.qweight", Dtype::Bool, &[8, 8], &[0u8; 64]),
        raw("x.qzeros", Dtype::BF16, &[2, 1], &[0u16; 2]),
        raw("x.scales", Dtype::I32, &[2, 8], &[0u32; 16]),
        raw("x.g_idx", Dtype::F32, &[64], &[0f32; 64]),
        raw("x.bias", Dtype::I32, &[8], &[0u32; 8]),
    ];
    for case in cases {
        let name = case.name;
        let error = refuse_layer(case);
        assert!(matches!(&error, FormatError::Dtype { tensor, .. } if tensor == name), "{name}: {error}");
    }
}

/// GPTQModel's other words are for 2, 4 and 8 bits: codes of 3 bits would lie across them in ways no tool defines.
#[test]
fn words_of_64_bits_hold_no_codes_of_3() {
    let tensors = [
        raw("x.qweight", Dtype::I64, &[3, 8], &[0u64; 24]),
        raw("x.qzeros", Dtype::I64, &[2, 1], &[0u64; 2]),
        raw("x.scales", Dtype::F16, &[2, 8], &[f16::ONE; 16]),
    ];
    for config in [
        r#"{"bits": 3, "group_size": 32, "pack_dtype": "int64"}"#,
        r#"{"bits": 6, "group_size": 32, "pack_dtype": "int64"}"#,
    ] {
        let error = refuse(config, &tensors);
        assert!(matches!(&error, FormatError::Dtype { tensor, .. } if tensor == "x.qweight"), "{error}");
    }
}

#[test]
fn missing_tensors_are_named() {
    for name in ["x.qzeros", "x.scales", "x.qweight"] {
        let error = refuse(CONFIG, &layer_with(vec![], &[name]));
        assert!(matches!(&error, FormatError::MissingTensor { name: n, .. } if n == name), "{error}");
    }
}

#[test]
fn float_zeros_of_old_tools() {
    let zeros = raw("x.zeros", Dtype::F32, &[8, 2], &[0f32; 16]);
    let error = refuse(CONFIG, &layer_with(vec![zeros], &["x.qzeros"]));
    assert!(matches!(&error, FormatError::FloatZeros { tensor, .. } if tensor == "x.zeros"), "{error}");
    let text = error.to_string();
    assert!(text.contains("model.safetensors") && text.contains("round(zeros / scales) - 1"), "{text}");
}

#[test]
fn g_idx_out_of_range() {
    for bad in [-1, 2, i32::MAX, i32::MIN] {
        let mut g_idx = vec![0i32; 64];
        g_idx[40] = bad;
        let error = refuse_layer(raw("x.g_idx", Dtype::I32, &[64], &g_idx));
        let is_index = |source: &PackError| matches!(source, PackError::GroupIndex { index: 40, .. });
        assert!(matches!(&error, FormatError::Linear { source, .. } if is_index(source)), "{error}");
        let wide: Vec<i64> = g_idx.iter().map(|&group| i64::from(group) << 32 | i64::from(group)).collect();
        assert!(matches!(refuse_layer(raw("x.g_idx", Dtype::I64, &[64], &wide)), FormatError::Linear { .. }));
    }
}

#[test]
fn scales_that_are_no_numbers() {
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        let mut scales = vec![f16::ONE; 16];
        scales[3] = bad;
        let error = refuse_layer(raw("x.scales", Dtype::F16, &[2, 8], &scales));
        assert!(matches!(error, FormatError::Linear { source: PackError::NonFinite { index: 3, .. }, .. }));
    }
}

#[test]
fn layer_that_the_config_skips() {
    let error = refuse(r#"{"bits": 4, "group_size": 32, "dynamic": {"-:x": {}}}"#, &layer());
    assert!(matches!(&error, FormatError::Skipped { prefix, .. } if prefix == "x"), "{error}");
}

#[test]
fn marlin_of_an_impossible_shape() {
    let config = r#"{"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}"#;
    let s = |shape: [usize; 2]| raw("x.s", Dtype::F16, &shape, &vec![f16::ONE; shape[0] * shape[1]]);
    let b = |shape: [usize; 2]| raw("x.B", Dtype::I32, &shape, &vec![0u32; shape[0] * shape[1]]);
    for (b_shape, s_shape) in [
        ([8, 512], [2, 256]),
        ([8, 256], [1, 256]),
        ([7, 512], [1, 256]),
        ([8, 128], [1, 64]),
        ([8, 511], [1, 255]),
    ] {
        let error = refuse(config, &[b(b_shape), s(s_shape)]);
        assert!(matches!(error, FormatError::TensorShape { .. }), "{b_shape:?} {s_shape:?}: {error}");
    }
    let error = refuse(config, &[b([8, 512])]);
    assert!(matches!(error, FormatError::MissingTensor { .. }), "{error}");
}

#[test]
fn manifest_that_leads_out_of_the_folder() {
    let dir = folder(CONFIG, &layer());
    let committed = dir.path().join(crate::folder::COMMITTED);
    fs::create_dir(&committed).expect("creates");
    fs::write(committed.join("manifest.json"), r#"{"files": ["../x"], "removed": []}"#).expect("writes");
    assert!(matches!(Checkpoint::open(dir.path()), Err(FormatError::ShardName { .. })));
    let create = CheckpointWriter::create(dir.path(), None, WriteOptions::default());
    assert!(matches!(create, Err(FormatError::ShardName { .. })));
}

/// Opens everything that can be opened in a folder whose files may be anything.
fn try_everything(dir: &Path) {
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    for tensor in checkpoint.tensors() {
        let _ = (tensor.to_f32(), tensor.bytes().len());
    }
    for prefix in checkpoint.linears() {
        let _ = checkpoint.linear(prefix).map(|linear| linear.dequantize());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn changed_bytes_never_panic(
        file in 0..3usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let dir = folder(CONFIG, &layer());
        let sharded = shards();
        let path = match file {
            0 => dir.path().join("model.safetensors"),
            1 => dir.path().join("quantize_config.json"),
            _ => sharded.path().join(INDEX),
        };
        let mut bytes = fs::read(&path).expect("reads");
        // Mostly in the header, where a change means something.
        let reach = bytes.len().min(700);
        for (at, byte) in changes {
            bytes[at.index(reach)] = byte;
        }
        fs::write(&path, bytes).expect("writes");
        try_everything(dir.path());
        try_everything(sharded.path());
    }

    #[test]
    fn digits_changed_in_the_header_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 1..4)) {
        let dir = folder(CONFIG, &layer());
        let path = dir.path().join("model.safetensors");
        let mut bytes = fs::read(&path).expect("reads");
        let digits: Vec<usize> = (8..bytes.len().min(700)).filter(|&at| bytes[at].is_ascii_digit()).collect();
        for (at, digit) in changes {
            bytes[digits[at.index(digits.len())]] = digit;
        }
        fs::write(&path, bytes).expect("writes");
        try_everything(dir.path());
    }
}
