use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::f16;

use super::replace::recover;
use super::*;
use crate::folder::{COMMITTED, STAGING};
use crate::{Bits, Checkpoint, CodesRef, PackedLinear, Unwritable};

/// A symmetric 4-bit layer of 64 inputs in groups of 32 and 16 outputs, whose codes start at `seed`.
pub(crate) fn layer(seed: u8) -> PackedLinear {
    let codes: Vec<u8> = (0..64 * 16).map(|k| (k as u8).wrapping_mul(7).wrapping_add(seed) & 15).collect();
    let g_idx: Vec<u32> = (0..64).map(|i| i / 32).collect();
    let codes = CodesRef {
        bits: Bits::B4,
        group_size: 32,
        in_features: 64,
        out_features: 16,
        codes: &codes,
        zeros: &[8; 32],
        scales: &[0.5; 32],
        g_idx: &g_idx,
        bias: None,
    };
    PackedLinear::pack(&codes).expect("valid")
}

pub(crate) fn config() -> QuantizeConfig {
    QuantizeConfig::builder(Bits::B4, Some(32)).build().expect("valid")
}

/// Writes a small checkpoint whose content depends on `seed`; several shards if `shard_bytes` is small.
fn write(dir: &Path, seed: u8, shard_bytes: u64) -> Result<WriteSummary, FormatError> {
    let options = WriteOptions::default().max_shard_bytes(shard_bytes);
    let mut writer = CheckpointWriter::create(dir, Some(&config()), options)?;
    for k in 0..3 {
        writer.linear(&format!("layers.{k}"), &layer(seed + k))?;
    }
    writer.tensor("seed", Dtype::U8, &[1], &[seed])?;
    writer.tensor("norm", Dtype::F16, &[3], bytemuck::cast_slice(&[f16::ONE; 3]))?;
    writer.finish()
}

/// Reads what [`write`] wrote, and checks that it is of one piece.
fn read(dir: &Path) -> u8 {
    let checkpoint = Checkpoint::open(dir).expect("opens");
    let seed = checkpoint.tensor("seed").expect("written").bytes()[0];
    for k in 0..3 {
        assert_eq!(checkpoint.linear(&format!("layers.{k}")).expect("reads"), layer(seed + k), "seed {seed}");
    }
    assert_eq!(checkpoint.names().count(), 14);
    seed
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

#[test]
fn what_was_written_is_read() {
    for shard_bytes in [u64::MAX, 1000] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let summary = write(dir.path(), 5, shard_bytes).expect("writes");
        assert_eq!(read(dir.path()), 5);
        assert_eq!(summary.tensors, 14);
        assert!(summary.weights.iter().all(|file| file.exists()));
        assert_eq!(summary.weights.len(), if shard_bytes == 1000 { 3 } else { 1 });
        assert!(names(dir.path()).iter().all(|name| !name.starts_with('.')));
    }
}

#[test]
fn every_tensor_is_aligned_and_the_reference_reads_it() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut writer = CheckpointWriter::create(dir.path(), None, WriteOptions::default()).expect("starts");
    let mut tensors = BTreeMap::new();
    for (k, (dtype, size)) in
        [(Dtype::U8, 1), (Dtype::F32, 4), (Dtype::F16, 2), (Dtype::I64, 8), (Dtype::U8, 1), (Dtype::F32, 4)]
            .into_iter()
            .enumerate()
    {
        let len = 3 + k;
        let bytes: Vec<u8> = (0..len * size).map(|b| (b + k) as u8).collect();
        let name = format!("tensor {k} \"\\\u{e9}");
        writer.tensor(&name, dtype, &[len], &bytes).expect("writes");
        tensors.insert(name, (size, bytes));
    }
    writer.finish().expect("finishes");
    let file = fs::read(dir.path().join("model.safetensors")).expect("reads");
    let reference =
        safetensors::SafeTensors::deserialize(&file).expect("the reference implementation reads it");
    assert_eq!(reference.len(), tensors.len());
    for (name, (size, bytes)) in &tensors {
        let data = reference.tensor(name).expect("is there").data();
        assert_eq!(data, bytes);
        let offset = data.as_ptr() as usize - file.as_ptr() as usize;
        assert_eq!(offset % size, 0, "{name} lies at {offset}");
    }
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).expect("reads");
    assert_eq!(
        metadata.metadata().as_ref().and_then(|map| map.get("format")).map(String::as_str),
        Some("pt")
    );
}

#[test]
fn replacing_leaves_nothing_of_the_old_checkpoint() {
    let single = ["model.safetensors", "quantize_config.json"].map(String::from).to_vec();
    let sizes = [(u64::MAX, 1000), (1000, u64::MAX), (1000, 2000), (u64::MAX, u64::MAX), (1000, 1000)];
    for (old, new) in sizes {
        let dir = tempfile::tempdir().expect("temporary folder");
        let fresh = tempfile::tempdir().expect("temporary folder");
        write(dir.path(), 1, old).expect("writes");
        write(dir.path(), 2, new).expect("replaces");
        write(fresh.path(), 2, new).expect("writes");
        assert_eq!(read(dir.path()), 2);
        assert_eq!(names(dir.path()), names(fresh.path()));
        if new == u64::MAX {
            assert_eq!(names(dir.path()), single);
        }
    }
}

#[test]
fn replacing_leaves_files_of_others() {
    let dir = tempfile::tempdir().expect("temporary folder");
    for name in ["ids.safetensors", "README.md", "model-card.safetensors"] {
        fs::write(dir.path().join(name), b"keep").expect("writes");
    }
    write(dir.path(), 1, u64::MAX).expect("writes");
    write(dir.path(), 2, 1000).expect("replaces");
    for name in ["ids.safetensors", "README.md", "model-card.safetensors"] {
        assert_eq!(fs::read(dir.path().join(name)).expect("is there"), b"keep");
    }
}

#[test]
fn an_abandoned_writer_leaves_the_old_checkpoint() {
    let dir = tempfile::tempdir().expect("temporary folder");
    write(dir.path(), 1, u64::MAX).expect("writes");
    let before = names(dir.path());
    let mut writer =
        CheckpointWriter::create(dir.path(), Some(&config()), WriteOptions::default()).expect("starts");
    writer.linear("layers.0", &layer(9)).expect("writes");
    assert_eq!(read(dir.path()), 1);
    drop(writer);
    assert_eq!(names(dir.path()), before);
    assert_eq!(read(dir.path()), 1);
}

#[test]
fn an_abandoned_writer_leaves_no_folder() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let target = dir.path().join("new");
    let writer = CheckpointWriter::create(&target, None, WriteOptions::default()).expect("starts");
    assert!(target.exists());
    drop(writer);
    assert!(!target.exists());
}

/// As a conversion in place does: the old files are mapped while the new ones take their names.
#[test]
fn a_checkpoint_can_be_replaced_while_it_is_read() {
    let dir = tempfile::tempdir().expect("temporary folder");
    write(dir.path(), 1, u64::MAX).expect("writes");
    fs::write(dir.path().join("config.json"), r#"{"x": 1}"#).expect("writes");
    let old = Checkpoint::open(dir.path()).expect("opens");
    let v2 = config().with_checkpoint_format(CheckpointFormat::GptqV2);
    let mut writer =
        CheckpointWriter::create(dir.path(), Some(&v2), WriteOptions::default()).expect("starts");
    writer.carry_over(dir.path()).expect("carries over");
    for k in 0..3 {
        let prefix = format!("layers.{k}");
        writer.linear(&prefix, &old.linear(&prefix).expect("reads")).expect("writes");
    }
    for name in ["seed", "norm"] {
        let tensor = old.tensor(name).expect("is there");
        writer.tensor(name, tensor.dtype(), tensor.shape(), tensor.bytes()).expect("writes");
    }
    writer.finish().expect("finishes");
    assert_eq!(read(dir.path()), 1);
    assert_eq!(QuantizeConfig::from_dir(dir.path()).expect("reads"), Some(v2));
    assert_eq!(old.linear("layers.2").expect("still mapped"), layer(3));
}

#[test]
fn a_second_writer_is_refused_while_the_first_lives() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let first = CheckpointWriter::create(dir.path(), None, WriteOptions::default()).expect("starts");
    let second = CheckpointWriter::create(dir.path(), None, WriteOptions::default());
    assert!(matches!(second, Err(FormatError::Busy { .. })), "{second:?}");
    drop(first);
    CheckpointWriter::create(dir.path(), None, WriteOptions::default()).expect("starts");
}

#[test]
fn what_a_killed_writer_left_is_ignored_and_removed() {
    let dir = tempfile::tempdir().expect("temporary folder");
    write(dir.path(), 1, u64::MAX).expect("writes");
    fs::create_dir(dir.path().join(STAGING)).expect("creates");
    fs::write(dir.path().join(STAGING).join("model.safetensors"), b"half a file").expect("writes");
    assert_eq!(read(dir.path()), 1);
    write(dir.path(), 2, u64::MAX).expect("replaces");
    assert_eq!(read(dir.path()), 2);
    assert!(!dir.path().join(STAGING).exists());
}

/// Every state between the commit and its end, made by moving the first `moved` files by hand.
#[test]
fn a_replacement_killed_after_its_commit_reads_as_new_and_is_completed() {
    for (old, new) in [(u64::MAX, 1000), (1000, u64::MAX), (1000, 2000), (u64::MAX, u64::MAX)] {
        for moved in 0.. {
            let dir = tempfile::tempdir().expect("temporary folder");
            let target = dir.path().join("old");
            write(&target, 1, old).expect("writes");
            let fresh = dir.path().join("new");
            write(&fresh, 2, new).expect("writes");
            let files = names(&fresh);
            let removed: Vec<String> =
                names(&target).into_iter().filter(|name| !files.contains(name)).collect();
            let manifest = json!({"files": files, "removed": removed});
            fs::write(fresh.join(MANIFEST), manifest.to_string()).expect("writes");
            fs::rename(&fresh, target.join(COMMITTED)).expect("commits");
            for name in files.iter().take(moved) {
                fs::rename(target.join(COMMITTED).join(name), target.join(name)).expect("moves");
            }
            assert_eq!(read(&target), 2, "{old} {new} {moved}");
            assert!(recover(&target).expect("recovers"));
            assert_eq!(read(&target), 2);
            assert_eq!(names(&target), files);
            assert!(!recover(&target).expect("nothing to recover"));
            if moved == files.len() {
                break;
            }
        }
    }
}

#[test]
fn version_1_refuses_a_zero_point_of_zero() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let config = QuantizeConfig::builder(Bits::B4, Some(32)).sym(false);
    let mut zeros = [8; 32];
    zeros[5] = 0;
    let g_idx: Vec<u32> = (0..64).map(|i| i / 32).collect();
    let codes = CodesRef {
        bits: Bits::B4,
        group_size: 32,
        in_features: 64,
        out_features: 16,
        codes: &[3; 64 * 16],
        zeros: &zeros,
        scales: &[0.5; 32],
        g_idx: &g_idx,
        bias: None,
    };
    let linear = PackedLinear::pack(&codes).expect("valid");
    let v1 = config.clone().checkpoint_format(CheckpointFormat::Gptq).build().expect("valid");
    let mut writer =
        CheckpointWriter::create(dir.path(), Some(&v1), WriteOptions::default()).expect("starts");
    let error = writer.linear("x", &linear).expect_err("zero point 0");
    let reason = Unwritable::ZeroPoint { group: 1, out: 2 };
    assert!(
        matches!(&error, FormatError::Unwritable { reason: r, format: "gptq", .. } if *r == reason),
        "{error}"
    );
    drop(writer);

    let v2 = config.build().expect("valid");
    assert_eq!(v2.checkpoint_format(), Some(CheckpointFormat::GptqV2));
    let mut writer =
        CheckpointWriter::create(dir.path(), Some(&v2), WriteOptions::default()).expect("starts");
    writer.linear("x", &linear).expect("writes");
    writer.finish().expect("finishes");
    let read = Checkpoint::open(dir.path()).expect("opens").linear("x").expect("reads");
    assert_eq!(read, linear);
}

#[test]
fn a_layer_that_contradicts_the_config_is_refused() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let g64 = QuantizeConfig::builder(Bits::B4, Some(64)).build().expect("valid");
    let b8 = QuantizeConfig::builder(Bits::B8, Some(32)).build().expect("valid");
    let skip = QuantizeConfig::builder(Bits::B4, Some(32)).skip_modules("x").build().expect("valid");
    for config in [Some(&g64), Some(&b8), Some(&skip), None] {
        let mut writer =
            CheckpointWriter::create(dir.path(), config, WriteOptions::default()).expect("starts");
        let error = writer.linear("x", &layer(0)).expect_err("contradiction");
        assert!(matches!(error, FormatError::Unwritable { .. }), "{error}");
    }
}

#[test]
fn bad_tensors_are_refused() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut writer = CheckpointWriter::create(dir.path(), None, WriteOptions::default()).expect("starts");
    let short = writer.tensor("x", Dtype::F32, &[2], &[0; 7]);
    assert!(matches!(short, Err(FormatError::ByteLength { len: 7, .. })), "{short:?}");
    let huge = writer.tensor("x", Dtype::F32, &[usize::MAX, 2], &[]);
    assert!(matches!(huge, Err(FormatError::ByteLength { .. })), "{huge:?}");
    let reserved = writer.tensor("__metadata__", Dtype::U8, &[0], &[]);
    assert!(matches!(reserved, Err(FormatError::TensorName { .. })), "{reserved:?}");
    writer.tensor("x", Dtype::U8, &[1], &[0]).expect("writes");
    let twice = writer.tensor("x", Dtype::U8, &[1], &[0]);
    assert!(matches!(twice, Err(FormatError::WrittenTwice { .. })), "{twice:?}");
    for name in ["../x", "/x", "", "a/b", "model.safetensors", "lock"] {
        let file = writer.file(name, b"");
        assert!(matches!(file, Err(FormatError::ShardName { .. })), "{name} {file:?}");
    }
}

#[test]
fn configs_and_tokenizer_are_carried_over() {
    let source = tempfile::tempdir().expect("temporary folder");
    let put = |name: &str, text: &str| fs::write(source.path().join(name), text).expect("writes");
    put("config.json", r#"{"z": 1, "a": {"b": [1.5]}, "quantization_config": {"old": true}}"#);
    put("tokenizer.json", "tokens");
    put("generation_config.json", "{}");
    let dir = tempfile::tempdir().expect("temporary folder");
    let config = config();
    let mut writer =
        CheckpointWriter::create(dir.path(), Some(&config), WriteOptions::default()).expect("starts");
    writer.carry_over(source.path()).expect("carries over");
    writer.file("report.json", b"[]").expect("writes");
    writer.finish().expect("finishes");
    let text = |name: &str| fs::read_to_string(dir.path().join(name)).expect("is there");
    assert_eq!(text("tokenizer.json"), "tokens");
    assert_eq!(text("generation_config.json"), "{}");
    assert_eq!(text("report.json"), "[]");
    let model: Value = serde_json::from_str(&text("config.json")).expect("JSON");
    assert_eq!(model["a"]["b"][0], 1.5);
    assert!(model["quantization_config"].get("old").is_none());
    assert_eq!(QuantizeConfig::from_dir(dir.path()).expect("reads"), Some(config.clone()));
    fs::remove_file(dir.path().join("quantize_config.json")).expect("removes");
    assert_eq!(QuantizeConfig::from_dir(dir.path()).expect("reads"), Some(config));
}

#[test]
fn five_bits_are_written_as_planes_only() {
    let g_idx = [0; 32];
    let codes = CodesRef {
        bits: Bits::B5,
        group_size: 32,
        in_features: 32,
        out_features: 32,
        codes: &[31; 32 * 32],
        zeros: &[16; 32],
        scales: &[0.5; 32],
        g_idx: &g_idx,
        bias: None,
    };
    let linear = PackedLinear::pack(&codes).expect("valid");
    let planar = QuantizeConfig::builder(Bits::B5, Some(32)).build().expect("valid");
    for format in [CheckpointFormat::Gptq, CheckpointFormat::GptqV2, CheckpointFormat::Marlin] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let config = planar.with_checkpoint_format(format);
        let mut writer =
            CheckpointWriter::create(dir.path(), Some(&config), WriteOptions::default()).expect("starts");
        let error = writer.linear("x", &linear).expect_err("no such layout");
        assert!(matches!(error, FormatError::Unwritable { reason: Unwritable::Needs(_), .. }), "{error}");
    }
}

/// Such a file is what old tools wrote for "no act-order", and every reader takes it for that.
#[test]
fn g_idx_of_zeros_alone_is_refused() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let codes = CodesRef {
        bits: Bits::B4,
        group_size: 32,
        in_features: 64,
        out_features: 8,
        codes: &[1; 64 * 8],
        zeros: &[8; 16],
        scales: &[0.5; 16],
        g_idx: &[0; 64],
        bias: None,
    };
    let linear = PackedLinear::pack(&codes).expect("valid");
    let config = QuantizeConfig::builder(Bits::B4, Some(32)).desc_act(true).build().expect("valid");
    let mut writer =
        CheckpointWriter::create(dir.path(), Some(&config), WriteOptions::default()).expect("starts");
    let error = writer.linear("x", &linear).expect_err("would be read in natural order");
    assert!(matches!(error, FormatError::Unwritable { reason: Unwritable::Needs(_), .. }), "{error}");
}

#[test]
fn calibration_texts_are_not_published() {
    let source = tempfile::tempdir().expect("temporary folder");
    let quantization =
        r#"{"bits": 4, "group_size": 32, "dataset": ["A private letter.", "Another."], "batch_size": 1}"#;
    let model = format!(r#"{{"hidden_size": 64, "quantization_config": {quantization}}}"#);
    fs::write(source.path().join("config.json"), model).expect("writes");
    let config = QuantizeConfig::from_dir(source.path()).expect("reads").expect("quantised");
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut writer =
        CheckpointWriter::create(dir.path(), Some(&config), WriteOptions::default()).expect("starts");
    writer.carry_over(source.path()).expect("carries over");
    writer.linear("x", &layer(0)).expect("writes");
    let summary = writer.finish().expect("finishes");
    assert_eq!(summary.left_out, ["dataset"]);
    for name in names(dir.path()) {
        let bytes = fs::read(dir.path().join(&name)).expect("reads");
        assert!(!bytes.windows(7).any(|window| window == b"private"), "{name}");
    }
    let written = QuantizeConfig::from_dir(dir.path()).expect("reads").expect("quantised");
    assert_eq!((written.get("dataset"), written.get("batch_size").as_deref()), (None, Some("1")));
}
