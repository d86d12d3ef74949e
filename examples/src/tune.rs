//! What `quantize` does before it quantises: tables of recipes, and rules for a budget of bits.

use std::{collections::BTreeMap, fs, num::NonZeroUsize, path::Path};

use gptq_core::GptqConfig;
use gptq_format::{Bits, DynamicRules};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{
    Layer, LayerFormat, LlamaConfig, LlamaError, MemoryWeights, Module, QuantizeOptions, Recipe,
    SensitivityJob, TokenRows, Trial, TrialResult, TrialScore, Watch, WeightSource, allocate, quantize,
};

use crate::{failure::Failure, progress, table};

/// The last `count` rows apart, an eighth of them unless said otherwise.
pub fn hold_out(rows: &TokenRows, count: Option<usize>) -> Result<(TokenRows, TokenRows), Failure> {
    let all = rows.rows();
    let count = count.unwrap_or(all.len().div_ceil(8));
    if count == 0 || count >= all.len() {
        return Err(
            format!("{count} of {} rows held out: some must be, and some must be left", all.len()).into()
        );
    }
    let (calibration, held_out) = all.split_at(all.len() - count);
    Ok((TokenRows::new(calibration.to_vec())?, TokenRows::new(held_out.to_vec())?))
}

/// Tries variants of `options` on one decoder layer, whose predecessors are quantised by `options`, and gives the lines of a
/// table.
pub fn try_recipes(
    config: &LlamaConfig,
    weights: &dyn WeightSource,
    rows: &TokenRows,
    held_out: Option<usize>,
    options: &QuantizeOptions,
    (layer, module): (usize, Option<Module>),
) -> Result<Vec<String>, Failure> {
    let (calibration, held_out) = hold_out(rows, held_out)?;
    let modules: Vec<Module> = module.map_or_else(|| Module::ALL.to_vec(), |module| vec![module]);
    let layers: Vec<Layer> = modules.iter().map(|&module| Layer { layer, module }).collect();
    if layer >= config.layers {
        return Err(format!("--layer {layer}: there are {}, the first is 0", config.layers).into());
    }
    let bar = progress::quantization_bar("preceding layers");
    let mut watch = Watch::default().on_progress(|progress| progress::show(&bar, progress));
    let mut behind = MemoryWeights::in_front_of(weights);
    let mut sink = |layer: Layer, packed| {
        behind.insert_packed(&layer.to_string(), packed);
        Ok(())
    };
    let options = options.clone().with_dynamic(only_up_to(layer, config)?);
    quantize(config, weights, &Cpu, &calibration, &options, &mut watch, &mut sink)?;
    drop(watch);
    bar.finish_and_clear();
    let recipes = Recipe::variants(&options.gptq);
    let bar = progress::quantization_bar("trying");
    let mut watch = Watch::default().on_progress(|progress| progress::show(&bar, progress));
    let trial = Trial::new(config, weights, &Cpu, &calibration, &held_out).behind(&behind);
    let results = trial.with_activation_bytes(options.activation_bytes).run(&layers, &recipes, &mut watch)?;
    drop(watch);
    bar.finish_and_clear();
    let header = ["recipe", "bits/weight", "loss", "rounded", "seconds", "output error", "rounded"];
    let rows: Vec<Vec<String>> =
        recipes.iter().enumerate().map(|(index, recipe)| row(recipe, index, &results)).collect();
    Ok(table::lines(&header, &rows))
}

/// A rule that leaves all layers behind this one as they are.
fn only_up_to(layer: usize, config: &LlamaConfig) -> Result<DynamicRules, Failure> {
    let behind: Vec<String> = (layer + 1..config.layers).map(|layer| layer.to_string()).collect();
    Ok(match behind.is_empty() {
        true => DynamicRules::default(),
        false => DynamicRules::from_json(&format!(
            r#"{{"-:model\\.layers\\.(?:{})\\.": {{}}}}"#,
            behind.join("|")
        ))?,
    })
}

/// A recipe's line: sums over the layers.
fn row(recipe: &Recipe, index: usize, results: &[TrialResult]) -> Vec<String> {
    let outcomes: Result<Vec<TrialScore>, _> =
        results.iter().filter(|result| result.recipe == index).map(|result| result.outcome.clone()).collect();
    let scores = match outcomes {
        Ok(scores) => scores,
        Err(error) => {
            let mut cells = vec![recipe.name.clone(), error.to_string()];
            cells.resize(7, String::new());
            return cells;
        }
    };
    let sum = |part: fn(&TrialScore) -> f64| scores.iter().map(part).sum::<f64>();
    let norm = sum(|score| score.norm);
    let losses = |part: fn(&TrialScore) -> Option<f64>| {
        scores
            .iter()
            .map(part)
            .sum::<Option<f64>>()
            .map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"))
    };
    vec![
        recipe.name.clone(),
        format!("{:.3}", sum(|score| score.bits as f64) / sum(|score| score.weights as f64)),
        losses(|score| score.loss),
        losses(|score| score.rtn_loss),
        format!("{:.2}", sum(|score| score.time.as_secs_f64())),
        format!("{:.3} %", 100.0 * sum(|score| score.error) / norm),
        format!("{:.3} %", 100.0 * sum(|score| score.rtn_error) / norm),
    ]
}

/// Formats that [`propose`] chooses from: 2, 3, 4 and 8 bits in groups of 128, 64, 32, and as the settings say.
fn formats(settings: &GptqConfig) -> Vec<LayerFormat> {
    let sizes = [NonZeroUsize::new(128), NonZeroUsize::new(64), NonZeroUsize::new(32), settings.group_size()];
    let mut formats: Vec<LayerFormat> = Vec::new();
    for bits in [Bits::B2, Bits::B3, Bits::B4, Bits::B8] {
        formats.extend(sizes.iter().map(|&group_size| LayerFormat { bits, group_size }));
    }
    formats.sort_unstable();
    formats.dedup();
    formats
}

/// Measures every layer, and writes rules under which layers take `budget` bits a weight, and beside them what was measured.
/// Gives lines that say what was chosen.
pub fn propose(
    config: &LlamaConfig,
    weights: &dyn WeightSource,
    rows: &TokenRows,
    held_out: Option<usize>,
    options: &QuantizeOptions,
    (budget, apart): (f64, bool),
    file: &Path,
) -> Result<Vec<String>, Failure> {
    let (calibration, probes) = hold_out(rows, held_out)?;
    let bar = progress::quantization_bar("measuring");
    let mut watch = Watch::default().on_progress(|progress| progress::show(&bar, progress));
    let bits = Bits::try_from(options.gptq.bits()).map_err(|bits| format!("--bits {bits}"))?;
    let default = LayerFormat { bits, group_size: options.gptq.group_size() };
    let job =
        SensitivityJob::new(config, weights, &Cpu, &calibration, &options.gptq, &formats(&options.gptq));
    let job = job
        .divergence(&probes, default)
        .apart(apart)
        .with_lm_head(options.lm_head)
        .with_activation_bytes(options.activation_bytes);
    let found = job.run(&mut watch)?;
    drop(watch);
    bar.finish_and_clear();
    let measured = file.with_extension("sensitivities.json");
    fs::write(&measured, found.to_json()).map_err(|error| format!("{}: {error}", measured.display()))?;
    let choices = found.choices(config);
    let weights: u64 = choices
        .iter()
        .flat_map(|choice| &choice.layers)
        .map(|layer| {
            let (inputs, outputs) = layer.module.shape(config);
            (inputs * outputs) as u64
        })
        .sum();
    let allocation = allocate(&choices, (budget * weights as f64) as u64).map_err(LlamaError::from)?;
    fs::write(file, allocation.rules(default).to_json())
        .map_err(|error| format!("{}: {error}", file.display()))?;
    let mut counts: BTreeMap<LayerFormat, usize> = BTreeMap::new();
    for (layers, format) in &allocation.formats {
        *counts.entry(*format).or_default() += layers.len();
    }
    let mut lines: Vec<String> =
        counts.iter().map(|(format, count)| format!("{format}: {count} layers")).collect();
    lines.push(format!(
        "{:.3} bits a weight, predicted divergence from the unquantised model {:.4} nats a token",
        allocation.bits_per_weight(weights),
        allocation.cost
    ));
    Ok(lines)
}
