//! What is in a model folder: config, layers, zero convention, sizes, problems.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use gptq_examples::{
    failure::{Failure, run},
    table,
    zeros::Zeros,
};
use gptq_format::{Checkpoint, CheckpointWriter, Dtype, FormatError, QuantizeConfig, Tensor};

/// Shows what a model folder holds, and what is wrong with it.
///
/// Reads any GPTQ checkpoint (gptq, gptq_v2, gptq_p, marlin), and unquantised ones. Exit code 1 if there are problems.
/// Without --verify only the headers and a sample of the zero points are read.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Model folder, or one .safetensors file in it
    #[arg(value_name = "DIR")]
    model: PathBuf,
    /// Read every tensor: shapes, ranges, g_idx, NaN and infinity, agreement with the config
    #[arg(long)]
    verify: bool,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Read zero points by this convention instead of deciding by evidence
    #[arg(long, value_enum, value_name = "CONVENTION")]
    zeros: Option<Zeros>,
    /// Complete a save that was interrupted while its files were moved to their places
    #[arg(long)]
    recover: bool,
}

fn main() -> ExitCode {
    run(|args: Args| inspect(&args))
}

/// What was found, beside the facts.
#[derive(Default)]
struct Findings {
    problems: Vec<String>,
    /// What was put right while reading, with the number of layers.
    notes: BTreeMap<String, usize>,
}

impl Findings {
    fn note(&mut self, text: impl ToString) {
        *self.notes.entry(text.to_string()).or_default() += 1;
    }
}

fn inspect(args: &Args) -> Result<(), Failure> {
    if args.recover && CheckpointWriter::recover(&args.model)? {
        line("recovered", "an interrupted save was completed");
    }
    let checkpoint = Checkpoint::open_with(&args.model, &Zeros::read_options(args.zeros))?;
    let mut findings = Findings::default();
    findings.problems.extend(checkpoint.oddities().iter().cloned());
    show_config(&checkpoint, &mut findings)?;
    show_sizes(&checkpoint)?;
    if args.tensors {
        show_tensors(&checkpoint);
    }
    if args.verify {
        verify(&checkpoint, &mut findings);
    }
    for (note, &count) in &findings.notes {
        line("note", &if count > 1 { format!("{note} ({count} layers)") } else { note.clone() });
    }
    for problem in &findings.problems {
        line("problem", problem);
    }
    match findings.problems.len() {
        0 => {
            line(
                "problems",
                if args.verify { "none, every tensor read" } else { "none; --verify reads every tensor" },
            );
            Ok(())
        }
        1 => Err(format!("{}: 1 problem", args.model.display()).into()),
        count => Err(format!("{}: {count} problems", args.model.display()).into()),
    }
}

fn line(key: &str, value: &str) {
    println!("{key:<12} {value}");
}

fn show_config(checkpoint: &Checkpoint, findings: &mut Findings) -> Result<(), Failure> {
    line("checkpoint", &checkpoint.dir().display().to_string());
    let layers = checkpoint.linears().count();
    let Some(config) = checkpoint.config() else {
        line("config", "not quantised");
        if layers > 0 {
            findings.problems.push(format!("{layers} quantised layers, but no quantisation config"));
        }
        return Ok(());
    };
    line("config", &summary(config));
    let quantizers = config.quantizers().join(", ");
    line("written by", if quantizers.is_empty() { "not said" } else { &quantizers });
    match checkpoint.zero_evidence() {
        None => findings.problems.push("a quantisation config, but no quantised layers".into()),
        Some(evidence) => {
            line("zero points", &evidence.to_string());
            if evidence.contradicts_label {
                let label = evidence.label.map_or("absent", |label| label.name());
                findings.problems.push(format!(
                    "checkpoint_format is {label}, but the zero points are {}: tools that trust the label compute wrong \
                     weights",
                    evidence.convention
                ));
            }
        }
    }
    compare_configs(checkpoint.dir(), config, findings)
}

fn summary(config: &QuantizeConfig) -> String {
    let group_size = config.group_size().map_or("one group".to_owned(), |size| format!("groups of {size}"));
    let mut parts = vec![
        config.checkpoint_format().map_or("no checkpoint_format", |format| format.name()).to_owned(),
        format!("{} bits", config.bits().get()),
        group_size,
        if config.sym() { "symmetric" } else { "asymmetric" }.to_owned(),
        if config.desc_act() { "desc_act" } else { "no desc_act" }.to_owned(),
    ];
    parts.extend(config.damp_percent().map(|damp| format!("damp_percent {damp}")));
    if config.get("dynamic").is_some_and(|rules| rules != "null" && rules != "{}") {
        parts.push("rules for single layers (dynamic)".into());
    }
    parts.join(", ")
}

/// Tools look in one place or the other; both must say the same.
fn compare_configs(dir: &Path, config: &QuantizeConfig, findings: &mut Findings) -> Result<(), Failure> {
    let Ok(text) = std::fs::read_to_string(dir.join("config.json")) else { return Ok(()) };
    let model: serde_json::Value = serde_json::from_str(&text)
        .map_err(|error| format!("{}: {error}", dir.join("config.json").display()))?;
    let Some(nested) = model.get("quantization_config").filter(|value| !value.is_null()) else {
        findings.note(
            "config.json has no quantization_config: transformers takes the model for an unquantised one",
        );
        return Ok(());
    };
    match QuantizeConfig::from_json(&nested.to_string()) {
        Err(error) => findings.problems.push(format!("config.json: {error}")),
        Ok(nested) => {
            let settings = |config: &QuantizeConfig| {
                (config.bits(), config.group_size(), config.sym(), config.desc_act(), config.get("dynamic"))
            };
            if settings(&nested) != settings(config) {
                findings.problems.push("config.json and quantize_config.json contradict each other".into());
            }
        }
    }
    Ok(())
}

/// The tensors of a quantised layer.
fn parts<'a>(checkpoint: &'a Checkpoint, prefix: &str) -> impl Iterator<Item = Tensor<'a>> {
    let fields = ["qweight", "qzeros", "scales", "g_idx", "bias", "B", "s"];
    fields.map(|field| checkpoint.get(&format!("{prefix}.{field}"))).into_iter().flatten()
}

/// Inputs and outputs of a layer, by the shapes of its tensors.
fn features(checkpoint: &Checkpoint, prefix: &str, bits: usize) -> Option<(usize, usize)> {
    if let Some(tensor) = checkpoint.get(&format!("{prefix}.B")) {
        let &[rows, columns] = tensor.shape() else { return None };
        return Some((rows * 16, columns / 2));
    }
    let qweight = checkpoint.get(&format!("{prefix}.qweight"))?;
    let &[rows, out_features] = qweight.shape() else { return None };
    let g_idx = checkpoint.get(&format!("{prefix}.g_idx"));
    // The words are of 32 bits, or of what `pack_dtype` was.
    Some((g_idx.map_or(rows * qweight.dtype().bits() / bits, |g_idx| g_idx.len()), out_features))
}

fn show_sizes(checkpoint: &Checkpoint) -> Result<(), Failure> {
    let files = checkpoint.files();
    let on_disk: u64 = files.iter().map(|file| file.byte_len()).sum();
    let tensors = checkpoint.tensors().count();
    line("files", &format!("{}, {}, {tensors} tensors", files.len(), bytes(on_disk)));

    // Layers of one kind make one row: bits, group size, inputs, outputs.
    let mut kinds: BTreeMap<_, (usize, u64)> = BTreeMap::new();
    let (mut weights, mut quantized) = (0u64, 0u64);
    for prefix in checkpoint.linears() {
        let Some(module) = checkpoint.config().and_then(|config| config.module(prefix)) else { continue };
        let Some((inputs, outputs)) = features(checkpoint, prefix, module.bits.get() as usize) else {
            continue;
        };
        let size = parts(checkpoint, prefix).map(|tensor| tensor.bytes().len() as u64).sum::<u64>();
        let kind = (module.bits.get(), module.group_size, inputs, outputs);
        let row = kinds.entry(kind).or_default();
        row.0 += 1;
        row.1 += size;
        weights += (inputs * outputs) as u64;
        quantized += size;
    }
    if weights > 0 {
        let rest: u64 =
            checkpoint.tensors().map(|tensor| tensor.bytes().len() as u64).sum::<u64>() - quantized;
        let per_weight = 8.0 * quantized as f64 / weights as f64;
        line(
            "quantised",
            &format!("{weights} weights in {}, {per_weight:.3} bits per weight", bytes(quantized)),
        );
        line("the rest", &bytes(rest));
        let row =
            |(&(bits, group, inputs, outputs), &(count, size)): (&(u32, Option<usize>, usize, usize), &_)| {
                let (count, size): (usize, u64) = (count, size);
                let per_weight = 8.0 * size as f64 / (count * inputs * outputs) as f64;
                let group = group.map_or("one".to_owned(), |size| size.to_string());
                vec![
                    format!("  {inputs} -> {outputs}"),
                    bits.to_string(),
                    group,
                    count.to_string(),
                    format!("{per_weight:.3}"),
                ]
            };
        let rows: Vec<_> = kinds.iter().map(row).collect();
        for line in table::lines(&["  layers", "bits", "group", "count", "bits/weight"], &rows) {
            println!("{line}");
        }
    }
    Ok(())
}

fn bytes(count: u64) -> String {
    match count {
        0..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

fn show_tensors(checkpoint: &Checkpoint) {
    let row = |tensor: Tensor<'_>| {
        let shape = format!("{:?}", tensor.shape());
        vec![
            format!("  {}", tensor.name()),
            tensor.dtype().to_string(),
            shape,
            bytes(tensor.bytes().len() as u64),
        ]
    };
    let rows: Vec<_> = checkpoint.tensors().map(row).collect();
    for line in table::lines(&["  tensor", "dtype", "shape", "size"], &rows) {
        println!("{line}");
    }
}

/// Reads everything.
fn verify(checkpoint: &Checkpoint, findings: &mut Findings) {
    for prefix in checkpoint.linears() {
        if let Err(error) = verify_linear(checkpoint, prefix, findings) {
            findings.problems.push(error.to_string());
        }
    }
    for tensor in checkpoint.tensors() {
        match not_finite(&tensor) {
            Ok(0) => {}
            Ok(count) => {
                let (path, name) = (tensor.path().display(), tensor.name());
                findings
                    .problems
                    .push(format!("{path}: tensor `{name}` has {count} values that are NaN or infinite"));
            }
            Err(error) => findings.problems.push(error.to_string()),
        }
    }
}

fn verify_linear(checkpoint: &Checkpoint, prefix: &str, findings: &mut Findings) -> Result<(), FormatError> {
    let (linear, remarks) = checkpoint.linear_with_remarks(prefix)?;
    remarks.iter().for_each(|remark| findings.note(remark));
    let Some(module) = checkpoint.config().and_then(|config| config.module(prefix)) else { return Ok(()) };
    if module.sym && !linear.is_symmetric() {
        findings.problems.push(format!("layer `{prefix}`: the config says sym, but its zero points differ"));
    }
    if !module.desc_act && linear.is_act_order() {
        let problem = "the config says no desc_act, but g_idx is not in natural order: tools that trust it ignore g_idx";
        findings.problems.push(format!("layer `{prefix}`: {problem}"));
    }
    if linear.scales().iter().any(|scale| scale.to_f32() <= 0.0) {
        findings.note("some scales are zero or negative");
    }
    Ok(())
}

/// How many values of a floating-point tensor are NaN or infinite; 0 for other types.
fn not_finite(tensor: &Tensor<'_>) -> Result<usize, FormatError> {
    Ok(match tensor.dtype() {
        Dtype::F32 => tensor.f32s()?.iter().filter(|value| !value.is_finite()).count(),
        Dtype::F16 => tensor.f16s()?.iter().filter(|value| !value.is_finite()).count(),
        Dtype::BF16 => tensor.bf16s()?.iter().filter(|value| !value.is_finite()).count(),
        _ => 0,
    })
}
