//! A writer killed at any moment leaves a folder that opens as the old checkpoint or the new one, never as a mixture.
//!
//! `cargo test -p gptq-format --test kill -- --nocapture` prints where the kills fell.
#![allow(clippy::print_stdout, reason = "says what was tested")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gptq_format::{
    Bits, Checkpoint, CheckpointWriter, CodesRef, Dtype, PackedLinear, QuantizeConfig, WriteOptions,
};

const FOLDER: &str = "GPTQ_FORMAT_KILL_TEST_FOLDER";
const BEGIN: &str = "begins to save";
const KILLS: u32 = 50;
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

/// The process that is killed: says that it begins, saves the next generation over the one that is there, and waits for its
/// end. Does nothing when it is run as an ordinary test.
#[test]
fn child_that_saves_until_it_is_killed() {
    let Some(dir) = std::env::var_os(FOLDER) else { return };
    let next = read(Path::new(&dir)) + 1;
    println!("{BEGIN}");
    write(Path::new(&dir), next);
    std::thread::sleep(Duration::from_secs(60));
}

/// The child, which has just begun to save.
fn saving(dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().expect("the test program"))
        .args(["--exact", "child_that_saves_until_it_is_killed", "--test-threads", "1", "--nocapture"])
        .env(FOLDER, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    // The test harness may have begun the line.
    assert!(lines.any(|line| line.expect("text").ends_with(BEGIN)), "the child begins");
    child
}

/// Waits for a file or folder that the child makes; a save that is already over will not make it.
fn wait_for(path: &Path, at_most: Duration) {
    let start = Instant::now();
    while !path.exists() && start.elapsed() < at_most {
        std::hint::spin_loop();
    }
}

#[test]
fn folder_opens_as_old_or_new_after_each_of_fifty_kills() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let (staging, committed) = (dir.path().join(".gptq-staging"), dir.path().join(".gptq-committed"));
    write(dir.path(), 0);
    // How long one save takes here, so that the kills fall into saves on a fast disk as on a slow one.
    let start = Instant::now();
    write(dir.path(), 1);
    let save = start.elapsed();
    let (mut old, mut new, mut while_staging, mut while_moving) = (0, 0, 0, 0);
    for kill in 0..KILLS {
        let before = read(dir.path());
        // What the last kill left is not what this one leaves, until the child has cleared it away.
        let leftover = committed.exists();
        let mut child = saving(dir.path());
        // Moments by the golden ratio, which spreads them evenly: over the whole save and a little more, or, since some
        // phases are short, from the beginning of one.
        let moment = f64::from(kill) * 0.618_034 % 1.0;
        match kill % 5 {
            3 => {
                wait_for(&staging.join("quantize_config.json"), 4 * save);
                std::thread::sleep(save.mul_f64(0.2 * moment));
            }
            4 => {
                wait_for(&committed, 4 * save);
                std::thread::sleep(save.mul_f64(0.1 * moment));
            }
            _ => std::thread::sleep(save.mul_f64(1.2 * moment)),
        }
        child.kill().expect("kills");
        child.wait().expect("waits");

        let after = read(dir.path());
        assert!(after == before || after == before + 1, "generation {after} after {before}");
        let is_new = after == before + 1;
        assert!(is_new || leftover || !committed.exists(), "a commit is the new checkpoint");
        assert!(!is_new || !staging.exists(), "what is staged is not the new checkpoint yet");
        old += u32::from(!is_new);
        new += u32::from(is_new);
        while_staging += u32::from(!is_new && staging.exists());
        while_moving += u32::from(is_new && committed.exists());
    }
    println!(
        "{KILLS} kills in saves of {} ms: {old} left the old checkpoint ({while_staging} while files were prepared), {new} the \
         new one ({while_moving} while they were moved)",
        save.as_millis()
    );
    assert!(old > 0 && new > 0, "{old} old, {new} new: the kills were all at one end");
    // What the last kill left is completed or removed by the next save.
    write(dir.path(), 1000);
    assert_eq!(read(dir.path()), 1000);
    let hidden = std::fs::read_dir(dir.path())
        .expect("a folder")
        .filter(|entry| entry.as_ref().expect("an entry").file_name().as_encoded_bytes().starts_with(b"."));
    assert_eq!(hidden.count(), 0);
}
