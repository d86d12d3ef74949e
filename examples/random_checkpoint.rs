//! Writes a checkpoint with random weights of a real model's shape, and random calibration tokens, for measurements.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::Parser;
use gptq_examples::{
    failure::{Failure, run},
    random_model::{RandomModel, Weights},
    shape::Shape,
};
use gptq_llama::{Layer, Module, Rng, Tensor, TensorData, WeightSource};
use rayon::prelude::*;
use serde_json::json;

/// Writes random fp16 weights, a shard a decoder layer, with all cores. Nothing is synced: what is measured afterwards reads
/// from the page cache.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Shape of the model
    #[arg(long, value_enum)]
    shape: Shape,
    /// Decoder layers [default: the shape's]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Rows of random tokens, in DIR/ids.safetensors as `calibration`
    #[arg(long, default_value_t = 128, value_name = "N")]
    rows: usize,
    /// Tokens a row
    #[arg(long, default_value_t = 2048, value_name = "N")]
    seq_len: usize,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

fn main() -> ExitCode {
    run(|args: Args| write(&args))
}

fn write(args: &Args) -> Result<(), Failure> {
    let started = Instant::now();
    let config = args.shape.config(args.seq_len, args.layers)?;
    let model = RandomModel::new(config.clone(), Weights::F16, Weights::F16, Weights::F16);
    fs::create_dir_all(&args.out)?;
    fs::write(args.out.join("config.json"), args.shape.json(args.seq_len, args.layers))?;
    let mut shards: Vec<Vec<String>> = (0..config.layers)
        .map(|layer| {
            let norms =
                ["input", "post_attention"].map(|n| format!("model.layers.{layer}.{n}_layernorm.weight"));
            let linears = Module::ALL.map(|module| format!("{}.weight", Layer { layer, module }));
            norms.into_iter().chain(linears).collect()
        })
        .collect();
    shards
        .push(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(String::from).into());
    let count = shards.len();
    let name = |shard: usize| format!("model-{:05}-of-{count:05}.safetensors", shard + 1);
    let sizes: Vec<usize> = shards
        .par_iter()
        .enumerate()
        .map(|(shard, names)| {
            write_shard(&args.out.join(name(shard)), &model, names).map_err(|e| e.to_string())
        })
        .collect::<Result<_, String>>()?;
    let total: usize = sizes.iter().sum();
    let map: serde_json::Map<_, _> = shards
        .iter()
        .enumerate()
        .flat_map(|(shard, names)| names.iter().map(move |tensor| (tensor.clone(), json!(name(shard)))))
        .collect();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    fs::write(args.out.join("model.safetensors.index.json"), index.to_string())?;
    write_ids(&args.out.join("ids.safetensors"), args, config.vocab_size)?;
    println!("{:.2} GB in {count} shards in {:.1} s", total as f64 / 1e9, started.elapsed().as_secs_f64());
    Ok(())
}

/// A file in the format of safetensors; bytes of its tensors.
fn write_shard(path: &Path, model: &RandomModel, names: &[String]) -> Result<usize, Failure> {
    let tensors: Vec<Tensor<'_>> = names
        .iter()
        .map(|name| model.tensor(name)?.ok_or_else(|| Failure::from(format!("no tensor {name}"))))
        .collect::<Result<_, Failure>>()?;
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, tensor) in names.iter().zip(&tensors) {
        let start = end;
        end += 2 * tensor.shape.iter().product::<usize>();
        header.insert(
            name.clone(),
            json!({ "dtype": "F16", "shape": tensor.shape, "data_offsets": [start, end] }),
        );
    }
    let mut file = start_file(path, header)?;
    let mut bytes = Vec::with_capacity(1 << 20);
    for tensor in &tensors {
        let TensorData::F16(data) = &tensor.data else { return Err("weights are fp16".into()) };
        for block in data.chunks(1 << 19) {
            bytes.clear();
            bytes.extend(block.iter().flat_map(|x| x.to_le_bytes()));
            file.write_all(&bytes)?;
        }
    }
    file.flush()?;
    Ok(end)
}

/// A file with the header of tensors that follow.
fn start_file(
    path: &Path,
    header: serde_json::Map<String, serde_json::Value>,
) -> Result<BufWriter<File>, Failure> {
    let mut header = serde_json::Value::Object(header).to_string();
    // Tensors are aligned to 8 bytes.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    Ok(file)
}

fn write_ids(path: &Path, args: &Args, vocabulary: usize) -> Result<(), Failure> {
    let mut rng = Rng::new(1);
    let count = args.rows * args.seq_len;
    let entry = json!({ "dtype": "I32", "shape": [args.rows, args.seq_len], "data_offsets": [0, 4 * count] });
    let mut file = start_file(path, [("calibration".to_owned(), entry)].into_iter().collect())?;
    for _ in 0..count {
        file.write_all(&((rng.next_u64() % vocabulary as u64) as i32).to_le_bytes())?;
    }
    Ok(file.flush()?)
}
