//! Model folders with random weights, to measure loading with.

use std::path::Path;

use gptq_format::{Bits, CheckpointWriter, Dtype, QuantizeConfig, WriteOptions, WriteSummary};
use gptq_llama::{Layer, LlamaConfig, Module, TensorData, WeightSource};

use crate::{
    failure::Failure,
    random_model::{GROUP, RandomModel},
};

/// Writes the model as GPTQ tools do: `config.json` as given, `quantize_config.json` if layers are quantised, safetensors.
pub fn write(
    dir: &Path,
    config_json: &str,
    config: &LlamaConfig,
    model: &RandomModel,
) -> Result<WriteSummary, Failure> {
    let head = Layer::lm_head(config).to_string();
    let quantized = model.packed(&Layer { layer: 0, module: Module::Q }.to_string())?.is_some();
    let settings = quantized
        .then(|| {
            let quantized_head = model.packed(&head)?.is_some();
            let builder =
                QuantizeConfig::builder(Bits::B4, Some(GROUP)).sym(true).desc_act(model.act_order());
            Ok::<_, Failure>(builder.lm_head(quantized_head).build()?)
        })
        .transpose()?;
    let mut writer = CheckpointWriter::create(dir, settings.as_ref(), WriteOptions::default())?;
    let original = tempfile::tempdir()?;
    std::fs::write(original.path().join("config.json"), config_json)?;
    writer.carry_over(original.path())?;

    let float = |writer: &mut CheckpointWriter, name: &str| -> Result<(), Failure> {
        let tensor =
            model.tensor(name)?.ok_or_else(|| format!("{name}: a random model has no such tensor"))?;
        let (dtype, bytes): (_, &[u8]) = match &tensor.data {
            TensorData::F32(data) => (Dtype::F32, bytemuck::cast_slice(data)),
            TensorData::F16(data) => (Dtype::F16, bytemuck::cast_slice(data)),
            TensorData::Bf16(data) => (Dtype::BF16, bytemuck::cast_slice(data)),
        };
        Ok(writer.tensor(name, dtype, &tensor.shape, bytes)?)
    };
    let linear = |writer: &mut CheckpointWriter, module: &str| -> Result<(), Failure> {
        match model.packed(module)? {
            Some(packed) => Ok(writer.linear(module, &packed)?),
            None => float(writer, &format!("{module}.weight")),
        }
    };
    linear(&mut writer, &head)?;
    for layer in 0..config.layers {
        for module in Module::ALL {
            linear(&mut writer, &Layer { layer, module }.to_string())?;
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            float(&mut writer, &format!("model.layers.{layer}.{norm}.weight"))?;
        }
    }
    for name in ["model.embed_tokens.weight", "model.norm.weight"] {
        float(&mut writer, name)?;
    }
    Ok(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use gptq_kernels::cpu::Cpu;
    use gptq_llama::{Feed, Llama, LoadOptions, Wanted};

    use super::*;
    use crate::random_model::Weights;

    #[test]
    fn what_is_written_is_the_model() {
        let json = r#"{"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}"#;
        let config = LlamaConfig::from_json(json).unwrap();
        for (head, act_order) in [(Weights::Int4, false), (Weights::F16, false), (Weights::Int4, true)] {
            let model = RandomModel::new(config.clone(), Weights::Int4, head, Weights::F16);
            let model = model.with_act_order(act_order);
            let dir = tempfile::tempdir().unwrap();
            let summary = write(dir.path(), json, &config, &model).unwrap();
            assert!(summary.tensor_bytes > 0);
            let logits = |model: Llama<Cpu>| {
                let mut cache = model.cache(8).unwrap();
                let feed = Feed { sequence: cache.add(), tokens: &[1, 2, 3], logits: Wanted::All };
                model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap()
            };
            let options = LoadOptions::default();
            let written = logits(Llama::load(dir.path(), Cpu, &options).unwrap());
            assert_eq!(written, logits(Llama::from_source(config.clone(), &model, Cpu, &options).unwrap()));
        }
    }
}
