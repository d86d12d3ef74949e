//! A run that is interrupted, by whatever, and resumed ends with the bytes of one that was not.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and says what it skips")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Instant,
};

use gptq_core::GptqConfig;
use gptq_format::{Checkpoint, CheckpointWriter, Dtype, DynamicRules, FormatError, WriteOptions};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{
    CancelToken, Existing, Layer, LlamaConfig, LlamaError, MemoryWeights, Module, OutputError, QuantizeJob,
    QuantizeOptions, QuantizeOutcome, QuantizePhase, Rng, TokenRows, Watch, WeightSource,
};

const CONFIG: &str = r#"{"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}"#;

/// A model folder with random weights.
fn model(seed: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = LlamaConfig::from_json(CONFIG).unwrap();
    let weights = MemoryWeights::random(&config, seed);
    let mut names: Vec<String> =
        ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(String::from).into();
    for layer in 0..config.layers {
        names.extend(
            ["input", "post_attention"].map(|n| format!("model.layers.{layer}.{n}_layernorm.weight")),
        );
        names.extend(Module::ALL.map(|module| format!("{}.weight", Layer { layer, module })));
        names.extend(Module::ALL.map(|module| format!("{}.bias", Layer { layer, module })));
    }
    let mut writer = CheckpointWriter::create(dir.path(), None, WriteOptions::default()).unwrap();
    for name in names {
        let Some(tensor) = weights.tensor(&name).unwrap() else { continue };
        let bytes: Vec<u8> = tensor.to_f32().iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.tensor(&name, Dtype::F32, &tensor.shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    dir
}

fn rows(count: u32) -> TokenRows {
    let row = |r: u32| (0..40 + r).map(|i| (i * i + 7 * r + i * r) % 50).collect();
    TokenRows::new((0..count).map(row).collect()).unwrap()
}

fn options(bits: u32) -> QuantizeOptions {
    QuantizeOptions::new(GptqConfig::builder().bits(bits).group_size(Some(16)).build().unwrap())
}

/// Quantises, and is cancelled after so many layers.
fn run(
    source: &Path,
    out: &Path,
    rows: &TokenRows,
    options: &QuantizeOptions,
    existing: Existing,
    layers: usize,
) -> Result<QuantizeOutcome, LlamaError> {
    let config = LlamaConfig::read(source).unwrap();
    let checkpoint = Checkpoint::open(source).unwrap();
    let cancel = CancelToken::default();
    let mut done = 0;
    let mut watch = Watch::default().with_cancel(cancel.clone()).on_progress(|progress| {
        done += usize::from(progress.phase == QuantizePhase::Quantized);
        if done == layers {
            cancel.cancel();
        }
    });
    QuantizeJob::new(&config, &checkpoint, &Cpu, options.clone())
        .calibration(rows)
        .existing(existing)
        .run(out, &mut watch)
}

const ALL: usize = usize::MAX;

/// Every file but the two that hold times.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let entries = entries.filter(|name| name != "quant_log.csv" && name != "quantize_report.json");
    entries.map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

/// The columns of `quant_log.csv` but the time.
fn log(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(dir.join("quant_log.csv")).unwrap();
    let without_time = |line: &str| {
        let cells = line.split(',').enumerate().filter(|&(column, _)| column != 5);
        cells.map(|(_, cell)| cell).collect::<Vec<_>>().join(",")
    };
    text.lines().map(without_time).collect()
}

#[test]
fn resumed_after_any_layer_the_bytes_are_the_same() {
    let source = model(5);
    let rows = rows(4);
    let rules =
        DynamicRules::from_json(r#"{"-:.*1\\.mlp\\.up_proj": {}, "+:.*k_proj": {"bits": 8}}"#).unwrap();
    let mut parallel = options(4);
    parallel.true_sequential = false;
    let gptaq = GptqConfig::builder().group_size(Some(32)).sym(false).desc_act(true).gptaq(Some(0.5)).build();
    for options in [
        options(3),
        options(4).with_dynamic(rules).with_lm_head(true),
        parallel,
        QuantizeOptions::new(gptaq.unwrap()).with_lm_head(true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let whole = dir.path().join("whole");
        let outcome = run(source.path(), &whole, &rows, &options, Existing::Refuse, ALL).unwrap();
        let count = outcome.report.layers.len();
        assert_eq!(outcome.resumed, 0);
        for cut in [1, 2, 3, 5, 7, 8, 13, count - 1] {
            let out = dir.path().join(format!("cut-{cut}"));
            let error = run(source.path(), &out, &rows, &options, Existing::Refuse, cut).unwrap_err();
            assert!(matches!(error, LlamaError::Cancelled), "{error}");
            assert!(QuantizeJob::<Cpu>::is_resumable(&out));
            let outcome = run(source.path(), &out, &rows, &options, Existing::Resume, ALL).unwrap();
            assert_eq!((outcome.resumed, outcome.report.layers.len()), (cut, count), "{options:?}");
            assert_eq!(files(&out), files(&whole), "{options:?}");
            assert_eq!(log(&out), log(&whole));
        }
    }
}

/// Wherever activations are kept, in memory, in a file or in both, they are the same.
#[test]
fn spilled_activations_change_nothing() {
    let source = model(5);
    let rows = rows(5);
    let gptaq = GptqConfig::builder().group_size(Some(32)).gptaq(Some(0.5)).build().unwrap();
    let mut parallel = QuantizeOptions::new(gptaq.clone());
    parallel.true_sequential = false;
    for options in [options(4), QuantizeOptions::new(gptaq).with_lm_head(true), parallel] {
        let dir = tempfile::tempdir().unwrap();
        let whole = dir.path().join("whole");
        run(source.path(), &whole, &rows, &options, Existing::Refuse, ALL).unwrap();
        // The residual stream of these rows has 53760 bytes, their MLP activations 80640.
        for bytes in [0, 30_000, 100_000, 150_000] {
            let out = dir.path().join(format!("{bytes}"));
            let options = options.clone().with_activation_bytes(bytes);
            run(source.path(), &out, &rows, &options, Existing::Refuse, ALL).unwrap();
            assert_eq!(files(&out), files(&whole), "{bytes} bytes, {options:?}");
        }
    }
}

#[test]
fn a_run_can_be_interrupted_many_times() {
    let source = model(5);
    let rows = rows(4);
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    run(source.path(), &whole, &rows, &options(4), Existing::Refuse, ALL).unwrap();
    for _ in 0..20 {
        assert!(run(source.path(), &out, &rows, &options(4), Existing::Resume, 1).is_err());
    }
    let outcome = run(source.path(), &out, &rows, &options(4), Existing::Resume, ALL).unwrap();
    assert_eq!(outcome.resumed, 20);
    assert_eq!(files(&out), files(&whole));
    // All layers are there, but the checkpoint was not put together.
    let out = dir.path().join("all");
    assert!(run(source.path(), &out, &rows, &options(4), Existing::Refuse, 21).is_err());
    assert_eq!(run(source.path(), &out, &rows, &options(4), Existing::Resume, ALL).unwrap().resumed, 21);
    assert_eq!(files(&out), files(&whole));
}

#[test]
fn rounding_is_resumed_as_well() {
    let source = model(5);
    let dir = tempfile::tempdir().unwrap();
    let config = LlamaConfig::read(source.path()).unwrap();
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let round = |out: &Path, existing, layers| {
        let cancel = CancelToken::default();
        let mut done = 0;
        let mut watch = Watch::default().with_cancel(cancel.clone()).on_progress(|_| {
            done += 1;
            if done == layers {
                cancel.cancel();
            }
        });
        QuantizeJob::new(&config, &checkpoint, &Cpu, options(4)).existing(existing).run(out, &mut watch)
    };
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    round(&whole, Existing::Refuse, ALL).unwrap();
    assert!(round(&out, Existing::Refuse, 9).is_err());
    assert_eq!(round(&out, Existing::Resume, ALL).unwrap().resumed, 9);
    assert_eq!(files(&out), files(&whole));
}

#[test]
fn folders_that_are_not_empty_are_refused() {
    let source = model(5);
    let rows = rows(3);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let go = |existing, layers| run(source.path(), &out, &rows, &options(4), existing, layers);
    let refused = |result: Result<QuantizeOutcome, LlamaError>| match result.unwrap_err() {
        LlamaError::Output(error) => error,
        other => panic!("{other}"),
    };
    assert!(go(Existing::Refuse, 4).is_err());
    assert!(matches!(refused(go(Existing::Refuse, ALL)), OutputError::Unfinished { layers: 4, .. }));
    go(Existing::Overwrite, ALL).unwrap();
    let first = files(&out);
    assert!(matches!(refused(go(Existing::Refuse, ALL)), OutputError::Exists { .. }));

    // The result of this very run is no reason to fail, that of another one is.
    let again = go(Existing::Resume, ALL).unwrap();
    assert!(again.written.is_none());
    let other = run(source.path(), &out, &rows, &options(3), Existing::Resume, ALL);
    assert!(matches!(refused(other), OutputError::NothingToResume { .. }));

    // While a new one is made the old checkpoint stays, and its run can be resumed.
    assert!(run(source.path(), &out, &rows, &options(3), Existing::Overwrite, 2).is_err());
    assert_eq!(Checkpoint::open(&out).unwrap().config().unwrap().bits().get(), 4);
    let outcome = run(source.path(), &out, &rows, &options(3), Existing::Resume, ALL).unwrap();
    assert_eq!(outcome.resumed, 2);
    assert_eq!(Checkpoint::open(&out).unwrap().config().unwrap().bits().get(), 3);
    assert_ne!(files(&out), first);
}

#[test]
fn another_run_is_not_resumed() {
    let (source, other_source) = (model(5), model(6));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let three = rows(3);
    assert!(run(source.path(), &out, &three, &options(4), Existing::Refuse, 2).is_err());
    let different = |source: &Path, rows: &TokenRows, options: &QuantizeOptions| match run(
        source,
        &out,
        rows,
        options,
        Existing::Resume,
        ALL,
    )
    .unwrap_err()
    {
        LlamaError::Output(OutputError::Different { what, was, is, .. }) => (what, was, is),
        other => panic!("{other}"),
    };
    let text = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
    assert_eq!(different(source.path(), &three, &options(3)), text("bits", "4", "3"));
    let mut parallel = options(4);
    parallel.true_sequential = false;
    assert_eq!(different(source.path(), &three, &parallel), text("true_sequential", "true", "false"));
    let head = options(4).with_lm_head(true);
    assert_eq!(different(source.path(), &three, &head), text("lm_head", "false", "true"));
    assert_eq!(different(source.path(), &rows(4), &options(4)).0, "calibration");
    assert_eq!(different(other_source.path(), &three, &options(4)).0, "model");
    // How activations are kept changes no byte.
    let mut spilling = options(4);
    spilling.activation_bytes = 0;
    run(source.path(), &out, &three, &spilling, Existing::Resume, ALL).unwrap();
}

#[test]
fn damaged_journals_lose_only_what_is_damaged() {
    let source = model(5);
    let rows = rows(3);
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    run(source.path(), &whole, &rows, &options(4), Existing::Refuse, ALL).unwrap();
    let resume = |name: &str, harm: fn(&Path)| {
        let out = dir.path().join(name);
        assert!(run(source.path(), &out, &rows, &options(4), Existing::Refuse, 10).is_err());
        harm(&out.join(".gptq-journal"));
        let outcome = run(source.path(), &out, &rows, &options(4), Existing::Resume, ALL);
        if outcome.is_ok() {
            assert_eq!(files(&out), files(&whole), "{name}");
        }
        outcome.map(|outcome| outcome.resumed)
    };
    let cut = |journal: &Path| {
        let file = File::options().write(true).open(journal.join("journal")).unwrap();
        file.set_len(file.metadata().unwrap().len() - 9).unwrap();
    };
    assert_eq!(resume("a line cut off", cut).unwrap(), 9);
    let garbage = |journal: &Path| {
        let mut file = File::options().append(true).open(journal.join("journal")).unwrap();
        file.write_all(&[0; 700]).unwrap();
    };
    assert_eq!(resume("garbage behind", garbage).unwrap(), 10);
    let flipped = |journal: &Path| {
        let path = journal.join("model.layers.0.mlp.down_proj.layer");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
    };
    assert_eq!(resume("a bit flipped", flipped).unwrap(), 9);
    let missing =
        |journal: &Path| fs::remove_file(journal.join("model.layers.0.self_attn.v_proj.layer")).unwrap();
    assert_eq!(resume("a file gone", missing).unwrap(), 9);
    let first = |journal: &Path| fs::write(journal.join("journal"), "gptq-journal-9\n").unwrap();
    let error = resume("another version", first).unwrap_err();
    assert!(matches!(error, LlamaError::Output(OutputError::Unreadable { .. })), "{error}");
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let source = model(5);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    assert!(run(source.path(), &out, &rows(3), &options(4), Existing::Refuse, 2).is_err());
    let lock = File::options().write(true).open(out.join(".gptq-journal/lock")).unwrap();
    lock.lock().unwrap();
    for existing in [Existing::Resume, Existing::Overwrite] {
        let error = run(source.path(), &out, &rows(3), &options(4), existing, ALL).unwrap_err();
        assert!(matches!(error, LlamaError::Format(FormatError::Busy { .. })), "{error}");
    }
    drop(lock);
    run(source.path(), &out, &rows(3), &options(4), Existing::Resume, ALL).unwrap();
}

const SOURCE: &str = "GPTQ_RESUME_TEST_SOURCE";
const OUT: &str = "GPTQ_RESUME_TEST_OUT";

/// The process that is killed, or runs out of space. Does nothing when it is run as an ordinary test.
#[test]
fn child_that_quantizes() {
    let (Some(source), Some(out)) = (std::env::var_os(SOURCE), std::env::var_os(OUT)) else { return };
    let result = run(
        Path::new(&source),
        Path::new(&out),
        &child_rows(Path::new(&source)),
        &options(4),
        Existing::Resume,
        ALL,
    );
    if let Err(error) = result {
        println!("child failed: {error}");
        std::process::exit(3);
    }
}

fn child_rows(source: &Path) -> TokenRows {
    if source.join("ids.safetensors").exists() {
        let file = gptq_format::TensorFile::open(source.join("ids.safetensors")).unwrap();
        let ids = file.tensor("calibration").unwrap().bytes().to_vec();
        let ids: Vec<u32> =
            ids.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        return TokenRows::windows(&ids, 512).unwrap().take(4).unwrap();
    }
    rows(20)
}

/// The child, behind a shell that prepares its limits.
fn child(source: &Path, out: &Path, shell: &str) -> Child {
    let executable = std::env::current_exe().unwrap();
    let script = format!("{shell}\nexec \"$0\" --exact child_that_quantizes --nocapture");
    let mut command = Command::new("sh");
    command.args(["-c", &script]).arg(executable).env(SOURCE, source).env(OUT, out);
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// The bundled model where it is, a random one otherwise.
fn source() -> (Option<tempfile::TempDir>, PathBuf) {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-books");
    if bundled.is_dir() {
        return (None, bundled);
    }
    let random = model(5);
    let path = random.path().to_owned();
    (Some(random), path)
}

fn kill_at_random(kills: usize) {
    let (_guard, source) = source();
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let start = Instant::now();
    assert!(child(&source, &whole, "").wait().unwrap().success());
    let undisturbed = start.elapsed();
    let seed = u64::from(std::process::id());
    println!("seed {seed}, undisturbed {undisturbed:?}");
    let (mut rng, mut killed, mut finished) = (Rng::new(seed), 0, 0);
    while killed < kills {
        let out = dir.path().join(format!("out-{finished}"));
        // A run that is killed again and again gets on all the same: the longer delays let it.
        loop {
            let mut child = child(&source, &out, "");
            thread::sleep(undisturbed.mul_f64(1.1 * rng.next_f64()));
            let ended = child.try_wait().unwrap();
            let _ = child.kill();
            match ended.or(child.wait().ok().filter(|status| status.success())) {
                Some(status) => {
                    assert!(status.success());
                    break;
                }
                None => killed += 1,
            }
        }
        assert_eq!(files(&out), files(&whole), "seed {seed}, run {finished}");
        assert_eq!(log(&out), log(&whole));
        finished += 1;
        fs::remove_dir_all(&out).unwrap();
    }
    println!("{killed} kills in {finished} runs");
}

#[test]
fn killed_at_random_the_bytes_are_the_same() {
    kill_at_random(8);
}

/// The long form: `cargo test -p gptq-llama --test resume -- --ignored --nocapture`.
#[test]
#[ignore = "takes a minute"]
fn killed_a_hundred_times_the_bytes_are_the_same() {
    kill_at_random(100);
}

fn output(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A disk that takes no more bytes, at several points of the run: a limit on the length of files stands for it, which needs
/// no rights.
#[test]
fn a_full_disk_loses_nothing() {
    if !cfg!(unix) {
        println!("skipped: limits are set by a shell");
        return;
    }
    let source = model(5);
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    assert!(child(source.path(), &whole, "").wait().unwrap().success());
    let mut failures = 0;
    for blocks in [0, 2, 4, 8, 12, 60, 150] {
        let out = dir.path().join(format!("limit-{blocks}"));
        // Ignored, the signal becomes an error of the write.
        let (code, text) = output(child(source.path(), &out, &format!("trap '' XFSZ; ulimit -f {blocks}")));
        if code == Some(3) {
            failures += 1;
            assert!(text.contains("child failed: ") && text.contains("limit-"), "{text}");
        } else {
            assert_eq!(code, Some(0), "{text}");
        }
        assert!(child(source.path(), &out, "").wait().unwrap().success());
        assert_eq!(files(&out), files(&whole), "limit {blocks}");
    }
    // Some limits stop the journal, others the checkpoint.
    assert!(failures >= 4, "{failures}");
}

/// A real file system without room, where the tests may mount one.
#[test]
fn a_full_file_system_loses_nothing() {
    let source = model(5);
    let dir = tempfile::tempdir().unwrap();
    let (whole, mount) = (dir.path().join("whole"), dir.path().join("small"));
    fs::create_dir(&mount).unwrap();
    let small = |options: &str| {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&mount).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if !small("size=128k") {
        println!("skipped: this process may not mount a file system");
        return;
    }
    assert!(child(source.path(), &whole, "").wait().unwrap().success());
    let out = mount.join("out");
    let (code, text) = output(child(source.path(), &out, ""));
    let resumable = QuantizeJob::<Cpu>::is_resumable(&out);
    let grown = small("remount,size=16m");
    let (second, other) = output(child(source.path(), &out, ""));
    let same = second == Some(0) && files(&out) == files(&whole);
    let read_only = small("remount,ro");
    let (third, refused) = output(child(source.path(), &mount.join("new"), ""));
    let unmounted = Command::new("umount").arg(&mount).status().is_ok_and(|status| status.success());
    assert!(unmounted && grown && read_only);
    assert_eq!(code, Some(3));
    assert!(text.contains("No space left on device"), "{text}");
    assert!(resumable);
    assert!(same, "{second:?} {other}");
    assert_eq!(third, Some(3));
    assert!(refused.contains("Read-only file system"), "{refused}");
}
