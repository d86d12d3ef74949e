//! Recipes tried side by side, sensitivities, and formats for a budget of bits.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::HashMap, num::NonZeroUsize};

use gptq_core::{GptqConfig, GptqConfigBuilder, GptqError};
use gptq_format::{Bits, PackedLinear};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{
    CancelToken, Layer, LayerFormat, LlamaConfig, LlamaError, MemoryWeights, Module, QuantizeOptions, Recipe,
    SensitivityJob, TokenRows, Trial, TrialError, TrialResult, TrialScore, Watch, allocate, quantize,
};

const CONFIG: &str = r#"{"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}"#;

fn config() -> LlamaConfig {
    LlamaConfig::from_json(CONFIG).unwrap()
}

fn rows(count: u32, first: u32) -> TokenRows {
    let row = |r: u32| (0..40 + r).map(|i| (i * i + 7 * (first + r) + i * r) % 50).collect();
    TokenRows::new((0..count).map(row).collect()).unwrap()
}

fn settings(build: impl FnOnce(GptqConfigBuilder) -> GptqConfigBuilder) -> GptqConfig {
    build(GptqConfig::builder().group_size(Some(16))).build().unwrap()
}

fn of_layer(layer: usize) -> Vec<Layer> {
    Module::ALL.map(|module| Layer { layer, module }).to_vec()
}

/// The model quantised, and the losses by layer.
fn quantized(options: &QuantizeOptions) -> (HashMap<Layer, PackedLinear>, HashMap<Layer, f64>) {
    let (config, weights) = (config(), MemoryWeights::random(&config(), 5));
    let mut layers = HashMap::new();
    let mut sink = |layer: Layer, packed| {
        layers.insert(layer, packed);
        Ok(())
    };
    let report =
        quantize(&config, &weights, &Cpu, &rows(8, 0), options, &mut Watch::default(), &mut sink).unwrap();
    let losses = report.layers.iter().map(|summary| (summary.layer, summary.report.loss.unwrap())).collect();
    (layers, losses)
}

fn scores(results: &[TrialResult], recipe: usize) -> Vec<TrialScore> {
    results
        .iter()
        .filter(|result| result.recipe == recipe)
        .map(|result| result.outcome.clone().unwrap())
        .collect()
}

/// Without true_sequential all modules of the first layer see the inputs of the unquantised model, as they do in a trial.
#[test]
fn a_trial_is_what_quantising_would_do() {
    let (config, weights) = (config(), MemoryWeights::random(&config(), 5));
    let recipes = [
        Recipe::new("4 bits", settings(|b| b)),
        Recipe::new("desc_act", settings(|b| b.desc_act(true))),
        Recipe::new("3 bits, damp", settings(|b| b.bits(3).damp_percent(0.1))),
        Recipe::new("by row", settings(|b| b.group_size(None).mse(Some(2.4)))),
    ];
    let (calibration, held_out) = (rows(8, 0), rows(2, 8));
    let trial = Trial::new(&config, &weights, &Cpu, &calibration, &held_out);
    let results = trial.run(&of_layer(0), &recipes, &mut Watch::default()).unwrap();
    assert_eq!(results.len(), 7 * recipes.len());
    for (index, recipe) in recipes.iter().enumerate() {
        let mut options = QuantizeOptions::new(recipe.settings.clone());
        options.true_sequential = false;
        let (packed, losses) = quantized(&options);
        for result in results.iter().filter(|result| result.recipe == index) {
            let score = result.outcome.as_ref().unwrap();
            assert_eq!(score.loss, losses.get(&result.layer).copied(), "{} {}", recipe.name, result.layer);
            let packed = &packed[&result.layer];
            let words = packed.qweight().len() + packed.qzeros().len() + packed.g_idx().len();
            assert_eq!(score.bits, (32 * words + 16 * packed.scales().len()) as u64);
            assert!(score.error > 0.0 && score.relative_error() < 1.0);
        }
    }
    // Alone or together, in any order.
    let alone =
        trial.run(&[Layer { layer: 0, module: Module::K }], &recipes[1..2], &mut Watch::default()).unwrap();
    let together = results.iter().find(|r| r.layer.module == Module::K && r.recipe == 1).unwrap();
    let strip = |result: &TrialResult| {
        let score = result.outcome.clone().unwrap();
        (score.loss, score.rtn_loss, score.error, score.rtn_error, score.norm)
    };
    assert_eq!(strip(&alone[0]), strip(together));
}

#[test]
fn held_out_rows_tell_recipes_apart() {
    let (config, weights) = (config(), MemoryWeights::random(&config(), 5));
    let recipes = Recipe::variants(&settings(|b| b));
    assert_eq!(recipes[0].settings, settings(|b| b));
    let (packed, _) = quantized(&QuantizeOptions::new(settings(|b| b)));
    let mut behind = MemoryWeights::in_front_of(&weights);
    packed.into_iter().for_each(|(layer, packed)| behind.insert_packed(&layer.to_string(), packed));
    let (calibration, held_out) = (rows(8, 0), rows(2, 8));
    let trial = Trial::new(&config, &weights, &Cpu, &calibration, &held_out).behind(&behind);
    let results = trial.run(&of_layer(1), &recipes, &mut Watch::default()).unwrap();
    let error = |name: &str| -> f64 {
        let index = recipes.iter().position(|recipe| recipe.name == name).unwrap();
        scores(&results, index).iter().map(|score| score.error).sum()
    };
    let rounded: f64 = scores(&results, 0).iter().map(|score| score.rtn_error).sum();
    assert!(error("as given") < rounded);
    assert!(error("8 bits") < error("as given") && error("as given") < error("3 bits"));
    assert!(error("3 bits") < error("2 bits"));
    assert!(error("damp 0.001") != error("damp 0.1"));
    // GPTAQ aims at the unquantised model's output, which is what the error is measured against.
    assert!(error("gptaq 0.25") < error("as given"));
}

#[test]
fn trials_that_cannot_be_are_named() {
    let (config, weights) = (config(), MemoryWeights::random(&config(), 5));
    let (calibration, held_out) = (rows(1, 0), rows(1, 8));
    let trial = Trial::new(&config, &weights, &Cpu, &calibration, &held_out);
    let mut watch = Watch::default();
    let gptaq = [Recipe::new("x", settings(|b| b.gptaq(Some(0.25))))];
    let error = trial.run(&of_layer(0), &gptaq, &mut watch).unwrap_err();
    assert!(
        matches!(error, LlamaError::Trial(TrialError::NoReference { ref recipe }) if recipe == "x"),
        "{error}"
    );
    let error = trial.run(&of_layer(2), &[], &mut watch).unwrap_err();
    assert!(error.to_string().starts_with("model.layers.2.self_attn.q_proj: "), "{error}");
    // 40 tokens for 64 features: without damping there is no factorisation. The other recipe goes on.
    let recipes = [
        Recipe::new("undamped", settings(|b| b.damp_percent(0.0).damp_auto_increment(0.0))),
        Recipe::new("damped", settings(|b| b)),
    ];
    let results = trial.run(&[Layer { layer: 0, module: Module::Q }], &recipes, &mut watch).unwrap();
    assert!(matches!(results[0].outcome, Err(GptqError::NotPositiveDefinite { .. })), "{:?}", results[0]);
    assert!(results[1].outcome.is_ok());
    let cancel = CancelToken::default();
    cancel.cancel();
    let mut watch = Watch::default().with_cancel(cancel);
    let error = trial.run(&of_layer(0), &recipes, &mut watch).unwrap_err();
    assert!(matches!(error, LlamaError::Cancelled), "{error}");
}

fn format(bits: u32, group_size: usize) -> LayerFormat {
    LayerFormat { bits: Bits::try_from(bits).unwrap(), group_size: NonZeroUsize::new(group_size) }
}

#[test]
fn sensitivities_fall_with_bits_and_make_rules_that_keep_the_budget() {
    let (config, weights) = (config(), MemoryWeights::random(&config(), 5));
    let formats = [format(2, 16), format(3, 16), format(4, 16), format(4, 32), format(8, 16)];
    let (calibration, probes) = (rows(8, 0), rows(2, 8));
    let base = settings(|b| b.gptaq(Some(0.25)).desc_act(true));
    let job = SensitivityJob::new(&config, &weights, &Cpu, &calibration, &base, &formats);
    let quick = job.run(&mut Watch::default()).unwrap();
    let job = SensitivityJob::new(&config, &weights, &Cpu, &calibration, &base, &formats);
    let job = job.divergence(&probes, format(3, 16)).with_lm_head(true);
    let found = job.run(&mut Watch::default()).unwrap();
    assert_eq!((quick.layers.len(), quick.divergences.len()), (14, 0));
    assert_eq!((found.layers.len(), found.divergences.len()), (15, 9));
    assert_eq!(quick.layers, found.layers[..14]);
    assert_eq!(quick.choices(&config).len(), 8);
    let apart = SensitivityJob::new(&config, &weights, &Cpu, &calibration, &base, &formats);
    let apart = apart.divergence(&probes, format(3, 32)).apart(true).run(&mut Watch::default()).unwrap();
    assert_eq!((apart.layers[0].losses.len(), apart.divergences.len()), (6, 14));
    for layer in &found.layers {
        let loss = |wanted| layer.losses.iter().find(|loss| loss.format == wanted).unwrap().loss;
        assert!(
            loss(format(8, 16)) < loss(format(4, 16)) && loss(format(4, 16)) < loss(format(3, 16)),
            "{layer:?}"
        );
        assert!(loss(format(3, 16)) < loss(format(2, 16)), "{layer:?}");
    }
    let choices = found.choices(&config);
    for choice in &choices {
        let cost = |wanted| choice.options.iter().find(|option| option.format == wanted).unwrap().cost;
        assert!(cost(format(8, 16)) < cost(format(2, 16)), "{choice:?}");
    }
    let weights_of = |layer: &Layer| {
        let (inputs, outputs) = layer.module.shape(&config);
        (inputs * outputs) as u64
    };
    let all: u64 = choices.iter().flat_map(|choice| &choice.layers).map(weights_of).sum();
    let budget = (5.5 * all as f64) as u64;
    let allocation = allocate(&choices, budget).unwrap();
    assert!(allocation.bits <= budget && allocation.bits_per_weight(all) > 5.0, "{allocation:?}");
    let options = QuantizeOptions::new(settings(|b| b)).with_lm_head(true);
    let (packed, _) = quantized(&options.with_dynamic(allocation.rules(format(4, 16))));
    let mut bits = 0;
    for (layers, format) in &allocation.formats {
        for layer in layers {
            let packed = &packed[layer];
            assert_eq!((packed.bits(), packed.group_size()), (format.bits, format.group_size.unwrap().get()));
            let words = packed.qweight().len() + packed.qzeros().len() + packed.g_idx().len();
            bits += (32 * words + 16 * packed.scales().len()) as u64;
        }
    }
    assert_eq!(bits, allocation.bits);
    let json: serde_json::Value = serde_json::from_str(&found.to_json()).unwrap();
    assert_eq!(json["layers"][14]["module"], "lm_head");
    assert_eq!(json["layers"][0]["losses"][4]["bits"], 8);
    assert_eq!(json["divergences"][0]["modules"][2], "model.layers.0.self_attn.v_proj");
    assert_eq!(json["divergences"][8]["divergence_nats"], found.divergences[8].nats);
}
