//! Quantises one layer given as a file: weight and inputs in; codes, scales, zeros, g_idx and the dequantised weight out.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use gptq_core::{Gptq, GptqConfig, HessianAccumulator, OnFailure, QuantizedWeight, SampleUnit, rtn};
use gptq_examples::failure::{Failure, run};
use ndarray::{Array1, Array2, ArrayView, Dimension};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value};

/// Quantises one layer given as a safetensors file.
///
/// The input file holds `weight` (out, in) and `inputs` (tokens, in), float32, and for GPTAQ `inputs_reference`, the inputs
/// that the same tokens have in the unquantised model. Its metadata key `config` is a JSON object with any of: bits,
/// group_size (-1 for one group), sym, desc_act, static_groups, act_group_aware, mse (0 for off), damp_percent,
/// damp_auto_increment, block_size, gptaq (its alpha, or an object with `alpha`), method (gptq or rtn), on_failure (error or
/// rtn); null is as good as absent. If the metadata key `effective_damp_percent` tells that damping had to be raised elsewhere, that is used.
///
/// The output file holds codes, zeros, g_idx (int32), scales and dequantized (float32), and the report in its metadata.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Safetensors file with weight, inputs and config
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// Safetensors file to write
    #[arg(long = "out", value_name = "FILE")]
    output: PathBuf,
}

fn main() -> ExitCode {
    run(|args: Args| solve_layer(&args))
}

fn solve_layer(args: &Args) -> Result<(), Failure> {
    let bytes = std::fs::read(&args.input).map_err(|error| format!("{}: {error}", args.input.display()))?;
    let layer = Layer::read(&bytes).map_err(|error| format!("{}: {error}", args.input.display()))?;
    let quantized = layer.quantize()?;
    write(&args.output, &quantized, layer.config_text)?;
    let report = &quantized.report;
    let loss = report.loss.map_or_else(|| "none".to_owned(), |loss| format!("{loss:e}"));
    let damp = report
        .damp
        .map_or_else(|| "none".to_owned(), |damp| format!("{} raised {}x", damp.percent, damp.raised));
    println!(
        "method: {:?}  loss: {loss}  damp: {damp}  dead columns: {}  factorize: {:.3} s  solve: {:.3} s",
        report.method,
        report.dead_columns.len(),
        report.times.factorize.as_secs_f64(),
        report.times.solve.as_secs_f64(),
    );
    Ok(())
}

/// What the input file asks for.
struct Layer {
    config: GptqConfig,
    config_text: String,
    round_to_nearest: bool,
    weight: Array2<f32>,
    inputs: Array2<f32>,
    reference: Option<Array2<f32>>,
}

impl Layer {
    fn read(bytes: &[u8]) -> Result<Self, Failure> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let tensors = SafeTensors::deserialize(bytes)?;
        let empty = HashMap::new();
        let metadata = header.metadata().as_ref().unwrap_or(&empty);
        let config_text = metadata.get("config").cloned().ok_or("metadata has no key `config`")?;
        let config: Map<String, Value> =
            serde_json::from_str(&config_text).map_err(|error| format!("metadata key `config`: {error}"))?;
        let effective_damp = match metadata.get("effective_damp_percent") {
            Some(text) => Some(text.parse::<f64>().map_err(|_| format!("effective_damp_percent: {text}"))?),
            None => None,
        };
        let reference = match tensors.tensor("inputs_reference") {
            Ok(tensor) => Some(matrix("inputs_reference", &tensor)?),
            Err(_) => None,
        };
        Ok(Self {
            round_to_nearest: read_method(&config)?,
            config: read_config(&config, effective_damp)?,
            config_text,
            weight: matrix("weight", &tensors.tensor("weight")?)?,
            inputs: matrix("inputs", &tensors.tensor("inputs")?)?,
            reference,
        })
    }

    fn quantize(&self) -> Result<QuantizedWeight, Failure> {
        if self.round_to_nearest {
            return Ok(rtn(self.weight.view(), &self.config)?);
        }
        let features = self.inputs.ncols();
        let hessian = if self.config.gptaq().is_some() {
            let reference = self.reference.as_ref().ok_or("gptaq needs the tensor `inputs_reference`")?;
            let mut accumulator = HessianAccumulator::with_reference(features);
            accumulator.add_batch_with_reference(self.inputs.view(), reference.view())?;
            // The reference implementation of GPTAQ counts sequences, and this file is one.
            accumulator.finish_per(SampleUnit::Batch)?
        } else {
            let mut accumulator = HessianAccumulator::new(features);
            accumulator.add_batch(self.inputs.view())?;
            accumulator.finish()?
        };
        Ok(Gptq::new(self.config.clone()).quantize(self.weight.view(), hessian)?)
    }
}

fn read_method(config: &Map<String, Value>) -> Result<bool, Failure> {
    match config.get("method").map(Value::as_str) {
        None | Some(Some("gptq")) => Ok(false),
        Some(Some("rtn")) => Ok(true),
        Some(_) => Err("config: method must be \"gptq\" or \"rtn\"".into()),
    }
}

fn read_config(config: &Map<String, Value>, effective_damp: Option<f64>) -> Result<GptqConfig, Failure> {
    let mut builder = GptqConfig::builder();
    for (key, value) in config.iter().filter(|(_, value)| !value.is_null()) {
        let wrong = || format!("config: {key} cannot be {value}");
        let flag = || value.as_bool().ok_or_else(wrong);
        let number = || value.as_f64().ok_or_else(wrong);
        let count = || value.as_u64().and_then(|x| usize::try_from(x).ok()).ok_or_else(wrong);
        builder = match key.as_str() {
            "bits" => builder.bits(value.as_u64().and_then(|x| u32::try_from(x).ok()).ok_or_else(wrong)?),
            "group_size" if value.as_i64() == Some(-1) => builder.group_size(None),
            "group_size" => builder.group_size(Some(count()?)),
            "sym" => builder.sym(flag()?),
            "desc_act" => builder.desc_act(flag()?),
            "static_groups" => builder.static_groups(flag()?),
            "act_group_aware" => builder.act_group_aware(flag()?),
            "mse" => builder.mse(Some(number()? as f32).filter(|&mse| mse != 0.0)),
            "damp_percent" => builder.damp_percent(number()?),
            "damp_auto_increment" => builder.damp_auto_increment(number()?),
            "block_size" => builder.block_size(count()?),
            "gptaq" if value == &Value::Bool(false) => builder.gptaq(None),
            "gptaq" => {
                let alpha = value.get("alpha").unwrap_or(value).as_f64().ok_or_else(wrong)?;
                builder.gptaq(Some(alpha as f32))
            }
            "on_failure" => builder.on_failure(match value.as_str() {
                Some("error") => OnFailure::Error,
                Some("rtn") => OnFailure::Rtn,
                _ => return Err(wrong().into()),
            }),
            "method" => builder,
            _ => {
                tracing::warn!(key, "config: key not known, ignored");
                builder
            }
        };
    }
    // 1 stands for "nothing helped" in files of the reference implementation.
    if let Some(damp) = effective_damp.filter(|damp| (0.0..1.0).contains(damp)) {
        builder = builder.damp_percent(damp);
    }
    Ok(builder.build()?)
}

fn matrix(name: &str, tensor: &TensorView<'_>) -> Result<Array2<f32>, Failure> {
    let (&[rows, columns], Dtype::F32) = (tensor.shape(), tensor.dtype()) else {
        return Err(format!(
            "tensor {name} is {:?} {:?}, not a float32 matrix",
            tensor.dtype(),
            tensor.shape()
        )
        .into());
    };
    let values =
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    Ok(Array2::from_shape_vec((rows, columns), values)?)
}

fn write(path: &Path, quantized: &QuantizedWeight, config: String) -> Result<(), Failure> {
    let g_idx: Array1<i32> = quantized.g_idx.iter().map(|&group| group as i32).collect();
    let tensors = [
        (
            "codes",
            bytes(quantized.codes.mapv(i32::from).view(), i32::to_le_bytes),
            Dtype::I32,
            quantized.codes.shape(),
        ),
        ("scales", bytes(quantized.scales.view(), f32::to_le_bytes), Dtype::F32, quantized.scales.shape()),
        (
            "zeros",
            bytes(quantized.zeros.mapv(i32::from).view(), i32::to_le_bytes),
            Dtype::I32,
            quantized.zeros.shape(),
        ),
        ("g_idx", bytes(g_idx.view(), i32::to_le_bytes), Dtype::I32, g_idx.shape()),
        (
            "dequantized",
            bytes(quantized.dequantize().view(), f32::to_le_bytes),
            Dtype::F32,
            quantized.codes.shape(),
        ),
    ];
    let views = tensors
        .iter()
        .map(|(name, data, dtype, shape)| Ok((*name, TensorView::new(*dtype, shape.to_vec(), data)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let mut metadata = HashMap::from([
        ("config".to_owned(), config),
        ("producer".to_owned(), concat!("gptq-core ", env!("CARGO_PKG_VERSION")).to_owned()),
    ]);
    if let Some(damp) = quantized.report.damp {
        metadata.insert("effective_damp_percent".to_owned(), damp.percent.to_string());
    }
    if let Some(loss) = quantized.report.loss {
        metadata.insert("loss".to_owned(), loss.to_string());
    }
    let file = safetensors::serialize(views, Some(metadata))?;
    std::fs::write(path, file).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn bytes<T: Copy, D: Dimension>(values: ArrayView<'_, T, D>, to_bytes: impl Fn(T) -> [u8; 4]) -> Vec<u8> {
    values.iter().flat_map(|&value| to_bytes(value)).collect()
}
