use serde_json::{Value, json};

use super::*;

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 2048, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    })
}

fn with(base: Value, changes: Value) -> Result<LlamaConfig, ConfigError> {
    let (Value::Object(mut base), Value::Object(changes)) = (base, changes) else { unreachable!() };
    base.extend(changes);
    LlamaConfig::from_json(&Value::Object(base).to_string())
}

#[test]
fn defaults_of_a_small_config() {
    let config = with(llama(), json!({})).unwrap();
    assert_eq!((config.kv_heads, config.head_dim, config.rope.theta), (4, 64, 10_000.0));
    assert!(!config.tie_word_embeddings && !config.qkv_bias && config.windows == [None; 4]);
    assert!(config.eos_token_ids.is_empty());
}

#[test]
fn old_and_new_rope_keys_mean_the_same() {
    let scaling = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    });
    let old = with(llama(), json!({"rope_theta": 500000.0, "rope_scaling": scaling})).unwrap();
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(500000.0);
    let new = with(llama(), json!({"rope_parameters": parameters})).unwrap();
    assert_eq!(old, new);
    assert_eq!(old.rope.theta, 500_000.0);
    assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { original_max_positions: 8192, .. }));
    let older = with(llama(), json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
    assert_eq!(older.rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn families_differ_in_biases_and_windows() {
    let qwen =
        with(llama(), json!({"model_type": "qwen2", "sliding_window": 100, "max_window_layers": 2})).unwrap();
    assert!(qwen.qkv_bias && !qwen.o_bias && qwen.windows == [None; 4]);
    let qwen = with(
        llama(),
        json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 100, "max_window_layers": 2}),
    )
    .unwrap();
    assert_eq!(qwen.windows, [None, None, Some(100), Some(100)]);
    let mistral = with(llama(), json!({"model_type": "mistral", "sliding_window": 4096})).unwrap();
    assert_eq!(mistral.windows, [Some(4096); 4]);
    let types = json!(["full_attention", "sliding_attention", "full_attention", "full_attention"]);
    let changes = json!({"model_type": "mistral", "sliding_window": 64, "layer_types": types});
    assert_eq!(with(llama(), changes).unwrap().windows, [None, Some(64), None, None]);
    let mistral = with(llama(), json!({"model_type": "mistral", "sliding_window": null})).unwrap();
    assert_eq!(mistral.windows, [None; 4]);
    let biased = with(llama(), json!({"attention_bias": true, "mlp_bias": true})).unwrap();
    assert!(biased.qkv_bias && biased.o_bias && biased.mlp_bias);
}

#[test]
fn token_ids_may_be_lists() {
    let config = with(llama(), json!({"bos_token_id": 1, "eos_token_id": [2, 3]})).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2, 3]));
}

#[test]
fn bad_values_name_their_key() {
    let cases = [
        (json!({"hidden_size": 0}), "hidden_size is 0: must be positive"),
        (json!({"hidden_size": null}), "hidden_size is missing"),
        (json!({"hidden_size": "256"}), "hidden_size is \"256\": must be a whole number below 2^32"),
        (json!({"hidden_size": 1.5}), "hidden_size is 1.5: must be a whole number below 2^32"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads is 3: must divide num_attention_heads"),
        (
            json!({"num_attention_heads": 3}),
            "hidden_size is 256: num_attention_heads must divide it if there is no head_dim",
        ),
        (json!({"head_dim": 5}), "head_dim is 5: must be even for rotary embeddings"),
        (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\": only silu is supported"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps is -1.0: must be in [0, 1)"),
        (json!({"model_type": "gpt2"}), "model_type \"gpt2\": there are llama, mistral and qwen2"),
        (json!({"model_type": 1}), "model_type is 1: must be a string"),
        (
            json!({"rope_scaling": {"rope_type": "yarn"}}),
            "rope_type \"yarn\": there are default, linear and llama3",
        ),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor is missing"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
            "rope_scaling.factor is 0.5: must be at least 1",
        ),
        (json!({"rope_scaling": 3}), "rope_scaling is 3: must be an object"),
        (json!({"rope_theta": 0.0}), "rope_theta is 0.0: must be at least 1"),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings is 1: must be true or false"),
        (json!({"eos_token_id": -1}), "eos_token_id is -1: must be a token id or a list of them"),
        (json!({"num_hidden_layers": 70000}), "num_hidden_layers is 70000: must be at most 65536"),
        (
            json!({"model_type": "mistral", "sliding_window": 9, "layer_types": ["full_attention"]}),
            "layer_types is [\"full_attention\"]: must have an entry for each layer",
        ),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5: only 1 is supported"),
    ];
    for (change, message) in cases {
        assert_eq!(with(llama(), change).unwrap_err().to_string(), message);
    }
    assert!(matches!(LlamaConfig::from_json("[]"), Err(ConfigError::Json { .. })));
    assert!(matches!(LlamaConfig::from_json("{"), Err(ConfigError::Json { .. })));
    let missing = LlamaConfig::read(Path::new("no such folder")).unwrap_err();
    assert!(missing.to_string().starts_with("no such folder/config.json: "), "{missing}");
}

/// Llama-3.1's own scaling: frequencies of head_dim 128, theta 500000, factor 8, 1, 4, 8192. Pair 0 turns often and is
/// kept; pair 63 turns less than once in 8192 positions and is divided by 8.
#[test]
fn llama3_frequencies() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 8192,
    };
    let plain = RopeConfig { theta: 500_000.0, scaling: RopeScaling::Default };
    let (cos, _) = RopeConfig { scaling, ..plain }.table(128, 2);
    let (plain, _) = plain.table(128, 2);
    assert_eq!(cos[64], plain[64]);
    let last = 500_000f64.powf(-126.0 / 128.0) / 8.0;
    assert_eq!(cos[64 + 63], (f64::from(last as f32)).cos() as f32);
    // Pair 32: 8192 / (2 pi / theta^-0.5) = 1.84 turns, so (1.84 - 1) / 3 of the frequency is kept as it is.
    let frequency = 500_000f64.powf(-0.5);
    let kept = (8192.0 * frequency / std::f64::consts::TAU - 1.0) / 3.0;
    let want = kept * frequency + (1.0 - kept) * frequency / 8.0;
    assert_eq!(cos[64 + 32], f64::from(want as f32).cos() as f32);
}
