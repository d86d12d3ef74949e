//! What a model takes of a device's memory, for errors that say what would have fitted.

use gptq_kernels::KernelError;

use crate::{
    Layer, LlamaConfig, LlamaError, WeightSource,
    names::{self, Module},
    weights::{LinearWeight, TensorData, read_linear},
};

/// Groups of layers that are imagined in 4 bits.
const GROUP: usize = 128;

/// Weights in one decoder layer.
pub(super) fn layer_weights(config: &LlamaConfig) -> usize {
    let sizes = Module::ALL.iter().map(|module| module.shape(config));
    sizes.map(|(inputs, outputs)| inputs.saturating_mul(outputs)).fold(0, usize::saturating_add)
}

/// Bytes of a layer as it is, and in 4 bits if it is not quantised.
struct Size {
    stored: usize,
    in_4_bits: usize,
}

/// About: kernels pad, and keep zeros in other forms.
fn size(config: &LlamaConfig, source: &dyn WeightSource, layer: Layer) -> Result<Size, LlamaError> {
    let name = layer.linear(config);
    Ok(match read_linear(source, &name)? {
        LinearWeight::Packed(packed) => {
            let (qweight, qzeros) = (size_of_val(packed.qweight()), size_of_val(packed.qzeros()));
            let zeros = if packed.is_symmetric() { 0 } else { qzeros };
            let stored = qweight + zeros + size_of_val(packed.scales());
            Size { stored, in_4_bits: stored }
        }
        LinearWeight::Dense { tensor, .. } => {
            let weights = name.in_features * name.out_features;
            Size { stored: bytes(&tensor.data), in_4_bits: weights / 2 + weights / GROUP * 2 }
        }
    })
}

fn bytes(data: &TensorData<'_>) -> usize {
    match data {
        TensorData::F32(data) => size_of_val(data.as_ref()),
        TensorData::F16(data) => size_of_val(data.as_ref()),
        TensorData::Bf16(data) => size_of_val(data.as_ref()),
    }
}

fn is_out_of_memory(error: &LlamaError) -> bool {
    matches!(
        error,
        LlamaError::Kernel(KernelError::OutOfGpuMemory { .. })
            | LlamaError::Layer { source: KernelError::OutOfGpuMemory { .. }, .. }
    )
}

/// Says of a load that found too little memory, of which `free` bytes were free before, what would have fitted. Other errors
/// stay what they are.
pub(super) fn explain_load(
    error: LlamaError,
    free: Option<usize>,
    config: &LlamaConfig,
    source: &dyn WeightSource,
) -> LlamaError {
    let (true, Some(free)) = (is_out_of_memory(&error), free) else { return error };
    // Layers are taken to be like the first; one that cannot be read would have been the error.
    let mut layer = Size { stored: 0, in_4_bits: 0 };
    for module in Module::ALL {
        let Ok(size) = size(config, source, Layer { layer: 0, module }) else { return error };
        layer.stored += size.stored;
        layer.in_4_bits += size.in_4_bits;
    }
    let embedding = source.tensor(names::EMBEDDING).ok().flatten().map_or(0, |table| bytes(&table.data));
    let head = size(config, source, Layer::lm_head(config)).map_or(embedding, |size| size.stored);
    let rest = embedding + head;
    let all = |layer: usize| layer.saturating_mul(config.layers).saturating_add(rest);
    let quantized = all(layer.in_4_bits);
    LlamaError::ModelMemory {
        needed: all(layer.stored),
        free,
        layers: config.layers,
        layers_that_fit: (free.saturating_sub(rest) / layer.stored.max(1)).min(config.layers),
        in_4_bits: (quantized < all(layer.stored) && quantized <= free).then_some(quantized),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryWeights;

    fn config() -> LlamaConfig {
        LlamaConfig::from_json(
            r#"{"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 10,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}"#,
        )
        .unwrap()
    }

    #[test]
    fn what_would_have_fitted() {
        let config = config();
        let weights = MemoryWeights::random(&config, 1);
        let layer = layer_weights(&config);
        assert_eq!(layer, 128 * (2 * 128 + 2 * 64) + 3 * 128 * 256);
        let rest = 2 * 4 * 100 * 128;
        let out = |free| {
            let source = KernelError::OutOfGpuMemory { bytes: 1, free: 0, total: 1 };
            explain_load(LlamaError::Layer { tensor: "x".into(), source }, Some(free), &config, &weights)
        };
        match out(rest + 13 * layer) {
            LlamaError::ModelMemory {
                needed,
                free,
                layers: 10,
                layers_that_fit: 3,
                in_4_bits: Some(bytes),
            } => {
                assert_eq!((needed, free), (rest + 40 * layer, rest + 13 * layer));
                assert_eq!(bytes, rest + 10 * (layer / 2 + layer / 128 * 2));
            }
            other => panic!("{other}"),
        }
        let message = out(rest + 13 * layer).to_string();
        assert!(message.contains("3 of 10 decoder layers fit; in 4 bits"), "{message}");
        // Not even in 4 bits.
        assert!(matches!(out(rest), LlamaError::ModelMemory { layers_that_fit: 0, in_4_bits: None, .. }));
    }

    #[test]
    fn other_errors_stay() {
        let config = config();
        let weights = MemoryWeights::random(&config, 1);
        let error = || LlamaError::MissingTensor { tensor: "x".into() };
        let explained = explain_load(error(), Some(1), &config, &weights);
        assert!(matches!(explained, LlamaError::MissingTensor { .. }));
        let out = KernelError::OutOfGpuMemory { bytes: 1, free: 0, total: 1 };
        assert!(matches!(explain_load(out.into(), None, &config, &weights), LlamaError::Kernel(_)));
    }
}
