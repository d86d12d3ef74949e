//! Runs on a GPU that are killed at random moments, and resumed.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use gptq_kernels::{cuda::CudaDevice, quantize::QuantizeBackend};
use gptq_llama::{Existing, QuantizeOptions, QuantizePhase, Rng, Watch};
use half::f16;

use super::{gpu, job, rows};

const OUT: &str = "GPTQ_GPU_KILL_TEST_OUT";
const TYPE: &str = "GPTQ_GPU_KILL_TEST_TYPE";

/// The process that is killed. Says on a line when it begins and whenever a layer is finished. Does nothing when it is run as
/// an ordinary test.
#[test]
fn child_that_quantizes() {
    let (Some(out), Some(element)) = (std::env::var_os(OUT), std::env::var_os(TYPE)) else { return };
    let out = Path::new(&out);
    match element.to_str() {
        Some("f32") => quantize_and_tell(&CudaDevice::<f32>::new(0).unwrap(), out),
        _ => quantize_and_tell(&CudaDevice::<f16>::new(0).unwrap(), out),
    }
}

fn quantize_and_tell<D: QuantizeBackend>(device: &D, out: &Path) {
    println!("begins");
    let mut watch = Watch::default().on_progress(|progress| {
        if progress.phase == QuantizePhase::Quantized {
            println!("layer");
        }
    });
    job(device, out, &QuantizeOptions::default(), &rows("calibration", 128), Existing::Resume, &mut watch)
        .unwrap();
}

/// A child and the lines that it has told.
struct Run {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Run {
    fn start(out: &Path, element: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "kills::child_that_quantizes", "--nocapture"]);
        command.env(OUT, out).env(TYPE, element).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Waits for a line that ends so; whether there was one.
    fn wait_for(&mut self, what: &str) -> bool {
        self.lines.by_ref().map_while(Result::ok).any(|line| line.ends_with(what))
    }

    /// Lets it end; how many layers it has told of.
    fn finish(mut self) -> (ExitStatus, usize) {
        let layers = self.lines.by_ref().map_while(Result::ok).filter(|line| line.ends_with("layer")).count();
        (self.child.wait().unwrap(), layers)
    }
}

/// Every file but the two that hold times.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let entries = entries.filter(|name| name != "quant_log.csv" && name != "quantize_report.json");
    entries.map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

/// Kills runs so many times. A moment is drawn from the time between the first work and the end: a number of layers that are
/// still to be finished, and a part of the time of a layer behind that. What hits nothing because the process has just
/// ended does not count.
fn kill_at_random(kills: usize, element: &str) {
    if gpu::gpu::<f16>().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let mut undisturbed = Run::start(&whole, element);
    assert!(undisturbed.wait_for("begins"));
    let start = Instant::now();
    let (status, layers) = undisturbed.finish();
    assert!(status.success());
    let each = start.elapsed() / layers as u32;
    let seed = u64::from(std::process::id());
    println!("{element}: seed {seed}, {layers} layers in {:?}", start.elapsed());
    let (mut rng, mut killed, mut finished) = (Rng::new(seed), 0, 0);
    let mut places = Vec::new();
    while killed < kills {
        let out = dir.path().join(format!("out-{finished}"));
        let mut left = layers;
        // Three or four kills a run, so that some hit what an earlier one has left.
        for _ in 0..4 {
            let mut run = Run::start(&out, element);
            assert!(run.wait_for("begins"));
            let behind = (rng.next_f64() * left as f64) as usize;
            let seen = (0..behind).take_while(|_| run.wait_for("layer")).count();
            thread::sleep(each.mul_f64(rng.next_f64()));
            let ended = run.child.try_wait().unwrap();
            run.child.kill().unwrap();
            let status = run.child.wait().unwrap();
            if ended.is_some() || status.success() {
                assert!(status.success(), "{status}");
                break;
            }
            killed += 1;
            left = left.saturating_sub(seen).max(1);
            places.push(layers - left);
        }
        let (status, _) = Run::start(&out, element).finish();
        assert!(status.success());
        assert_eq!(files(&out), files(&whole), "seed {seed}, run {finished}");
        finished += 1;
        fs::remove_dir_all(&out).unwrap();
    }
    println!("{element}: {killed} kills, behind {places:?} of {layers} layers, in {finished} runs");
    // So that the driver has cleaned up behind them when other tests begin.
    thread::sleep(Duration::from_millis(100));
}

#[test]
#[ignore = "takes half a minute"]
fn killed_at_random_the_bytes_are_the_same() {
    kill_at_random(10, "f16");
}

#[test]
#[ignore = "takes half a minute"]
fn killed_at_random_the_bytes_are_the_same_in_float32() {
    kill_at_random(10, "f32");
}
