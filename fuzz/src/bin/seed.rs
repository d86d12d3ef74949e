//! Makes the seeds of every target from the checkpoints that the tools wrote: `seed FIXTURES CORPUS`.

use std::fs;
use std::path::Path;

use gptq_format::{Checkpoint, CodesRef, Dtype, PackedLinear};
use gptq_fuzz::{folder, layer};

/// What is kept of a layer: enough for several groups and words of every width.
const OUTPUTS: usize = 32;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, fixtures, corpus] = &arguments[..] else { panic!("seed FIXTURES CORPUS") };
    let (fixtures, corpus) = (Path::new(fixtures), Path::new(corpus));
    let mut names: Vec<_> =
        fs::read_dir(fixtures).expect("fixtures").map(|entry| entry.expect("an entry").file_name()).collect();
    names.sort();
    for name in names {
        let name = name.into_string().expect("UTF-8");
        seed(&fixtures.join(&name), &name, corpus);
    }
}

fn put(corpus: &Path, target: &str, name: &str, bytes: &[u8]) {
    let folder = corpus.join(target);
    fs::create_dir_all(&folder).expect("makes the corpus");
    fs::write(folder.join(format!("seed-{name}")), bytes).expect("writes a seed");
}

fn seed(dir: &Path, name: &str, corpus: &Path) {
    for file in ["quantize_config.json", "config.json"] {
        let Ok(json) = fs::read_to_string(dir.join(file)) else { continue };
        let Ok(json) = serde_json::from_str::<serde_json::Value>(&json) else { continue };
        let config = if file == "config.json" { &json["quantization_config"] } else { &json };
        if config.is_object() {
            put(corpus, "quantize_config", &format!("{name}-{file}"), config.to_string().as_bytes());
        }
    }
    let checkpoint = Checkpoint::open(dir).expect("a fixture opens");
    for prefix in ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"] {
        if !checkpoint.is_quantized(prefix) {
            continue;
        }
        let small = narrowed(&checkpoint.linear(prefix).expect("a fixture's layer"));
        for (kind, as_codes) in [("words", false), ("codes", true)] {
            if let Some(bytes) = layer::encode(&small, as_codes) {
                put(corpus, "unpack_linear", &format!("{name}-{}-{kind}", prefix.len()), &bytes);
            }
        }
    }
    put(corpus, "tensor_file", name, &header(&checkpoint));
    put(corpus, "open_checkpoint", name, &records(dir, &checkpoint));
}

/// The first outputs of a layer.
fn narrowed(linear: &PackedLinear) -> PackedLinear {
    let (inputs, outputs, groups) = (linear.in_features(), linear.out_features(), linear.groups());
    let kept = OUTPUTS.min(outputs);
    let zeros = linear.unpack_zeros();
    let by_output = |output: usize| (0..groups).map(move |group| group * outputs + output);
    let zeros: Vec<u8> = (0..kept).flat_map(by_output).map(|at| zeros[at]).collect();
    let scales: Vec<f32> = (0..kept).flat_map(by_output).map(|at| linear.scales()[at].to_f32()).collect();
    let bias: Option<Vec<f32>> = linear.bias().map(|bias| bias[..kept].iter().map(|x| x.to_f32()).collect());
    PackedLinear::pack(&CodesRef {
        bits: linear.bits(),
        group_size: linear.group_size(),
        in_features: inputs,
        out_features: kept,
        codes: &linear.unpack_codes()[..kept * inputs],
        zeros: &zeros,
        scales: &scales,
        g_idx: linear.g_idx(),
        bias: bias.as_deref(),
    })
    .expect("a part of a layer")
}

/// A safetensors file with the tensors' names, types and numbers of dimensions, and a few elements of each.
fn header(checkpoint: &Checkpoint) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!(checkpoint.files()[0].metadata()));
    let mut content = Vec::new();
    for tensor in checkpoint.tensors().filter(|tensor| tensor.len() >= 4).take(12) {
        let mut shape = vec![1; tensor.shape().len()];
        shape[0] = 4;
        let len = 4 * tensor.dtype().bits() / 8;
        let offsets = [content.len(), content.len() + len];
        let info =
            serde_json::json!({"dtype": tensor.dtype().name(), "shape": shape, "data_offsets": offsets});
        header.insert(tensor.name().to_owned(), info);
        content.extend(&tensor.bytes()[..len]);
    }
    let header = serde_json::Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &content].concat()
}

/// The folder's configs and one layer as the tool wrote it.
fn records(dir: &Path, checkpoint: &Checkpoint) -> Vec<u8> {
    let mut bytes = Vec::new();
    for file in ["quantize_config.json", "config.json"] {
        let Ok(json) = fs::read_to_string(dir.join(file)) else { continue };
        let Ok(json) = serde_json::from_str::<serde_json::Value>(&json) else { continue };
        bytes.extend(folder::file(file, json.to_string().as_bytes()));
    }
    for field in ["g_idx", "scales", "qweight", "qzeros", "bias", "weight"] {
        let name = format!("model.layers.0.self_attn.k_proj.{field}");
        let Some(tensor) = checkpoint.get(&name) else { continue };
        let record =
            folder::tensor("model.safetensors", &name, tensor.dtype(), tensor.shape(), tensor.bytes());
        bytes.extend(record.into_iter().flatten());
    }
    let norm = [0u8; 32];
    let record = folder::tensor("model.safetensors", "model.norm.weight", Dtype::F32, &[8], &norm);
    bytes.extend(record.into_iter().flatten());
    bytes
}
