//! GPTQModel's golden files, which lie beside gptq-core's tests, with the gates of those.

use std::path::{Path, PathBuf};

use gptq_core::{GptqConfig, HessianAccumulator};
use gptq_kernels::quantize::Quantizer;
use half::f16;
use ndarray::Array2;
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;

fn elements<T>(tensor: &TensorView<'_>, from_bytes: impl Fn([u8; 4]) -> T) -> Vec<T> {
    tensor.data().chunks_exact(4).map(|b| from_bytes(b.try_into().unwrap())).collect()
}

fn matrix(tensor: &TensorView<'_>) -> Array2<f32> {
    let shape = (tensor.shape()[0], tensor.shape()[1]);
    Array2::from_shape_vec(shape, elements(tensor, f32::from_le_bytes)).unwrap()
}

/// Empty, with a printed reason, in the published package, which leaves them out.
fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gptq-core/tests/golden");
    let Ok(entries) = std::fs::read_dir(&folder) else {
        println!("skipped: {} is absent", folder.display());
        return Vec::new();
    };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 14, "golden files are missing: {files:?}");
    files
}

#[test]
fn codes_equal_the_reference() {
    for path in files() {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |name: &str| tensors.tensor(name).unwrap();
        let config: Value = serde_json::from_str(&metadata["config"]).unwrap();
        let flag = |key: &str| config[key].as_bool().unwrap();
        let mse = config["mse"].as_f64().unwrap() as f32;
        let config = GptqConfig::builder()
            .bits(config["bits"].as_u64().unwrap() as u32)
            .group_size(usize::try_from(config["group_size"].as_i64().unwrap()).ok())
            .sym(flag("sym"))
            .desc_act(flag("desc_act"))
            .act_group_aware(flag("act_group_aware"))
            .static_groups(flag("static_groups"))
            .mse((mse > 0.0).then_some(mse))
            .damp_percent(metadata["effective_damp_percent"].parse().unwrap())
            .build()
            .unwrap();
        let Some((_, quantizer)) = super::gpu::<f16>(&config) else { return };
        let (weight, inputs) = (matrix(&tensor("weight")), matrix(&tensor("inputs")));
        let mut sums = HessianAccumulator::new(inputs.ncols());
        sums.add_batch(inputs.view()).unwrap();
        let hessian = sums.finish().unwrap();
        let prepared = quantizer.prepare_hessian(hessian.clone()).unwrap();
        let quantized = quantizer.quantize(&prepared, &super::dense(&weight)).unwrap();
        let quantized = quantizer.download(&quantized).unwrap();

        let cpu = gptq_core::Gptq::new(config).quantize(weight.view(), hessian).unwrap();
        let equals_cpu = cpu.codes.iter().zip(&quantized.codes).filter(|(a, b)| a != b).count();
        let codes = elements(&tensor("codes"), i32::from_le_bytes);
        let differing = quantized.codes.iter().zip(&codes).filter(|(a, b)| i32::from(**a) != **b).count();
        let norm = |w: Array2<f32>| {
            inputs.mapv(f64::from).dot(&w.mapv(f64::from).t()).iter().map(|y| y * y).sum::<f64>()
        };
        let error = norm(&weight - &quantized.dequantize()) / norm(weight.clone());
        let expected: f64 = metadata["relative_output_error"].parse().unwrap();
        println!(
            "{name}: {differing} codes of {} differ from the reference, {equals_cpu} from gptq-core; output error \
             {error:e} (reference {expected:e})",
            codes.len()
        );
        assert!(differing * 1000 <= codes.len(), "{name}: {differing} codes of {} differ", codes.len());
        let zeros = elements(&tensor("zeros"), i32::from_le_bytes);
        assert!(quantized.zeros.iter().map(|&z| i32::from(z)).eq(zeros), "{name}: zeros");
        let g_idx = elements(&tensor("g_idx"), i32::from_le_bytes);
        assert!(quantized.g_idx.iter().map(|&g| g as i32).eq(g_idx), "{name}: g_idx");
        assert!((error / expected - 1.0).abs() < 0.005, "{name}: output error {error:e}, {expected:e}");
    }
}
