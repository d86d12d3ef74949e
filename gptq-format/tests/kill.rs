//! A writer killed at any moment leaves a folder that opens as the old checkpoint or the new one, never as a mixture.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use gptq_format::{
    Bits, Checkpoint, CheckpointWriter, CodesRef, Dtype, PackedLinear, QuantizeConfig, WriteOptions,
};

const FOLDER: &str = "GPTQ_FORMAT_KILL_TEST_FOLDER";
const LAYERS: u32 = 6;

/// Generation `n`: its layout, its config and every one of its tensors depend on `n`.
fn write(dir: &Path, generation: u32) {
    // Single files and shards by turns, with the numbers of shards that make names collide or not.
    let shard_bytes = [u64::MAX, 20_000, 20_000, u64::MAX, u64::MAX, 40_000][generation as usize % 6];
    let group_size = [32, 64][generation as usize / 2 % 2];
    let config =
        QuantizeConfig::builder(Bits::B4, Some(group_size)).damp_percent(f64::from(generation)).build();
    let options = WriteOptions::default().max_shard_bytes(shard_bytes);
    let mut writer = CheckpointWriter::create(dir, Some(&config.expect("valid")), options).expect("starts");
    writer.tensor("generation", Dtype::U32, &[2], bytemuck::cast_slice(&[generation, 0])).expect("writes");
    for layer in 0..LAYERS {
        writer.linear(&format!("layers.{layer}"), &linear(generation, layer, group_size)).expect("writes");
    }
    writer.finish().expect("finishes");
}

fn linear(generation: u32, layer: u32, group_size: usize) -> PackedLinear {
    let (in_features, out_features) = (128, 128);
    let seed = generation.wrapping_mul(31).wrapping_add(layer);
    let codes: Vec<u8> =
        (0..in_features * out_features).map(|k| (k as u32).wrapping_mul(seed) as u8 >> 2 & 15).collect();
    let groups = in_features / group_size;
    let g_idx: Vec<u32> = (0..in_features).map(|i| (i / group_size) as u32).collect();
    let codes = CodesRef {
        bits: Bits::B4,
        group_size,
        in_features,
        out_features,
        codes: &codes,
        zeros: &vec![8; groups * out_features],
        scales: &vec![1.0 + generation as f32; groups * out_features],
        g_idx: &g_idx,
        bias: None,
    };
    PackedLinear::pack(&codes).expect("valid")
}

/// The generation in a folder, after every tensor and the config have been found to belong to it.
fn read(dir: &Path) -> u32 {
    let checkpoint = Checkpoint::open(dir).expect("opens");
    let generation = checkpoint.tensor("generation").expect("is there").u32s().expect("numbers")[0];
    let config = checkpoint.config().expect("quantised");
    assert_eq!(config.damp_percent(), Some(f64::from(generation)));
    let group_size = config.group_size().expect("groups");
    for layer in 0..LAYERS {
        let read = checkpoint.linear(&format!("layers.{layer}")).expect("reads");
        assert_eq!(read, linear(generation, layer, group_size));
    }
    generation
}

/// The process that is killed: writes one generation after the other. Does nothing when it is run as an ordinary test.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(FOLDER) else { return };
    let dir = Path::new(&dir);
    let first = read(dir);
    for generation in first + 1..first + 10_000 {
        write(dir, generation % 1000);
    }
}

#[test]
fn folder_opens_as_old_or_new_after_every_kill() {
    let dir = tempfile::tempdir().expect("temporary folder");
    write(dir.path(), 0);
    // How long one save takes here, so that the kills fall into saves on a fast disk as on a slow one.
    let start = Instant::now();
    write(dir.path(), 1);
    let save = start.elapsed();
    let mut generations = vec![read(dir.path())];
    for kill in 0..25u32 {
        let mut child = Command::new(std::env::current_exe().expect("the test program"))
            .args(["--exact", "child_that_writes_until_it_is_killed", "--test-threads", "1"])
            .env(FOLDER, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        // Its start takes some milliseconds; then moments spread over several saves, by the golden ratio.
        let moment = f64::from(kill) * 0.618_034 % 1.0;
        std::thread::sleep(
            Duration::from_millis(10) + save.mul_f64(4.0 * moment).min(Duration::from_secs(1)),
        );
        assert!(child.try_wait().expect("asks").is_none(), "the child ended by itself");
        child.kill().expect("kills");
        child.wait().expect("waits");
        generations.push(read(dir.path()));
    }
    generations.dedup();
    assert!(generations.len() > 5, "the kills came before anything was written: {generations:?}");
    // What the last kill left is completed or removed by the next save.
    write(dir.path(), 1000);
    assert_eq!(read(dir.path()), 1000);
    let hidden = std::fs::read_dir(dir.path())
        .expect("a folder")
        .filter(|entry| entry.as_ref().expect("an entry").file_name().as_encoded_bytes().starts_with(b"."));
    assert_eq!(hidden.count(), 0);
}
