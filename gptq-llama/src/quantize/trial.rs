//! Several recipes on the same layers, side by side.

use std::time::Duration;

use gptq_core::{
    Gptq, GptqConfig, GptqConfigBuilder, GptqError, Hessian, HessianAccumulator, QuantizedWeight, rtn,
};
use gptq_format::Bits;
use gptq_kernels::{cpu::CpuQuantizer, quantize::QuantizeBackend};
use ndarray::{Array2, ArrayView2, Axis, linalg::general_mat_mul};
use rayon::prelude::*;

use super::{
    baseline::{Baseline, Rounding, sample},
    budget::LayerFormat,
    original::Original,
    plan::builder_of,
    walk::{Visitor, Walk},
};
use crate::{Layer, LlamaConfig, LlamaError, Module, TokenRows, Watch, WeightSource};

/// Settings of the quantiser under a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// For tables.
    pub name: String,
    /// The settings.
    pub settings: GptqConfig,
}

impl Recipe {
    /// A recipe.
    pub fn new(name: impl Into<String>, settings: GptqConfig) -> Self {
        Self { name: name.into(), settings }
    }

    /// `base`, and what differs from it in one thing: bits 2, 3, 4, 8; groups of 128, 64, 32, one a row; symmetry; the orders of
    /// columns; the grid search; GPTAQ; damping 0.001, 0.005, 0.01, 0.05, 0.1. Variants that are `base` itself are left out.
    pub fn variants(base: &GptqConfig) -> Vec<Self> {
        type Change = fn(GptqConfigBuilder) -> GptqConfigBuilder;
        let changes: [(&str, Change); 21] = [
            ("as given", |b| b),
            ("2 bits", |b| b.bits(2)),
            ("3 bits", |b| b.bits(3)),
            ("4 bits", |b| b.bits(4)),
            ("8 bits", |b| b.bits(8)),
            ("groups of 128", |b| b.group_size(Some(128))),
            ("groups of 64", |b| b.group_size(Some(64))),
            ("groups of 32", |b| b.group_size(Some(32))),
            ("one group a row", |b| b.group_size(None)),
            ("sym", |b| b.sym(true)),
            ("asym", |b| b.sym(false)),
            ("desc_act", |b| b.act_group_aware(false).desc_act(true)),
            ("desc_act, static_groups", |b| b.act_group_aware(false).desc_act(true).static_groups(true)),
            ("act_group_aware", |b| b.desc_act(false).act_group_aware(true)),
            ("mse 2.4", |b| b.mse(Some(2.4))),
            ("gptaq 0.25", |b| b.gptaq(Some(0.25))),
            ("gptaq 0.5", |b| b.gptaq(Some(0.5))),
            ("damp 0.001", |b| b.damp_percent(0.001)),
            ("damp 0.005", |b| b.damp_percent(0.005)),
            ("damp 0.05", |b| b.damp_percent(0.05)),
            ("damp 0.1", |b| b.damp_percent(0.1)),
        ];
        let mut recipes: Vec<Self> = Vec::new();
        for (name, change) in changes {
            let settings =
                change(builder_of(base)).build().expect("invariant: no change makes a contradiction");
            if recipes.iter().all(|recipe| recipe.settings != settings) {
                recipes.push(Self::new(name, settings));
            }
        }
        recipes
    }
}

/// Tries recipes on some layers of a model: their inputs are collected once, and every recipe is measured on held-out rows.
///
/// ```
/// use gptq_core::GptqConfig;
/// use gptq_kernels::cpu::Cpu;
/// use gptq_llama::{Layer, LlamaConfig, MemoryWeights, Module, Recipe, TokenRows, Trial, Watch};
///
/// let config = LlamaConfig::from_json(
///     r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
///         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}"#,
/// )
/// .expect("a valid configuration");
/// let weights = MemoryWeights::random(&config, 1);
/// let calibration = TokenRows::new(vec![(0..60).collect(), (20..100).collect()])?;
/// let held_out = TokenRows::new(vec![(0..40).rev().collect()])?;
/// let recipes = [3, 4].map(|bits| {
///     let settings = GptqConfig::builder().bits(bits).group_size(Some(32)).build().expect("valid settings");
///     Recipe::new(format!("{bits} bits"), settings)
/// });
/// let down = Layer { layer: 1, module: Module::Down };
/// let results = Trial::new(&config, &weights, &Cpu, &calibration, &held_out).run(
///     &[down],
///     &recipes,
///     &mut Watch::default(),
/// )?;
/// let error = |recipe: usize| results[recipe].outcome.as_ref().map_or(f64::NAN, |score| score.relative_error());
/// assert!(error(1) < error(0));
/// # Ok::<(), gptq_llama::LlamaError>(())
/// ```
pub struct Trial<'a, D: QuantizeBackend> {
    config: &'a LlamaConfig,
    weights: &'a dyn WeightSource,
    device: &'a D,
    calibration: &'a TokenRows,
    held_out: &'a TokenRows,
    behind: Option<&'a dyn WeightSource>,
    activation_bytes: usize,
}

/// What a recipe made of a layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TrialResult {
    /// The layer.
    pub layer: Layer,
    /// Index of the recipe.
    pub recipe: usize,
    /// Its score, or why it could not quantise the layer.
    pub outcome: Result<TrialScore, GptqError>,
}

/// How good a recipe is on a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct TrialScore {
    /// [`LayerReport::loss`](gptq_core::LayerReport::loss) on the calibration rows. Includes the damping's share, and under
    /// GPTAQ is no output error: compare recipes by [`error`](Self::error).
    pub loss: Option<f64>,
    /// The same for rounding to nearest, as [`LayerSummary::rtn_loss`](super::LayerSummary::rtn_loss).
    pub rtn_loss: Option<f64>,
    /// `|Q X - W X~|^2` over the held-out rows: Q the quantised weight, X its inputs, W and X~ those of the unquantised
    /// model.
    pub error: f64,
    /// The same with W rounded to nearest for Q.
    pub rtn_error: f64,
    /// `|W X~|^2`
    pub norm: f64,
    /// Bits in a checkpoint, [`LayerFormat::stored_bits`].
    pub bits: u64,
    /// Weights of the layer.
    pub weights: u64,
    /// The damping used.
    pub damp: Option<f64>,
    /// Time of the quantiser, factorisation included.
    pub time: Duration,
}

impl TrialScore {
    /// [`error`](Self::error) as a share of the output.
    pub fn relative_error(&self) -> f64 {
        self.error / self.norm
    }
}

/// Why recipes cannot be tried.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TrialError {
    /// A layer that the model does not have.
    #[error("{layer}: the model has no such layer")]
    UnknownLayer {
        /// The layer.
        layer: Layer,
    },
    /// GPTAQ corrects for what quantised predecessors do.
    #[error("{recipe}: GPTAQ needs a model whose preceding layers are quantised (Trial::behind)")]
    NoReference {
        /// The recipe.
        recipe: String,
    },
}

impl<'a, D: QuantizeBackend> Trial<'a, D> {
    /// Recipes quantise on `calibration` and are measured on `held_out`.
    pub fn new(
        config: &'a LlamaConfig,
        weights: &'a dyn WeightSource,
        device: &'a D,
        calibration: &'a TokenRows,
        held_out: &'a TokenRows,
    ) -> Self {
        Self { config, weights, device, calibration, held_out, behind: None, activation_bytes: 4 << 30 }
    }

    /// Layers see what they see in this model, a quantised version of the one tried on, as they do when a model is
    /// quantised layer by layer. Otherwise they see the inputs of the unquantised model.
    #[must_use]
    pub fn behind(self, quantized: &'a dyn WeightSource) -> Self {
        Self { behind: Some(quantized), ..self }
    }

    /// As [`QuantizeOptions::activation_bytes`](super::QuantizeOptions::activation_bytes).
    #[must_use]
    pub fn with_activation_bytes(self, bytes: usize) -> Self {
        Self { activation_bytes: bytes, ..self }
    }

    /// Results by layer, in the order of the forward pass, and within a layer by recipe.
    ///
    /// Memory: beside what [`quantize`](crate::quantize()) needs, the held-out inputs of one layer. A recipe that fails on a
    /// layer says so in its result.
    ///
    /// Errors: [`TrialError`], [`LlamaError::AlreadyQuantized`], [`LlamaError::Cancelled`], and those of loading.
    pub fn run(
        &self,
        layers: &[Layer],
        recipes: &[Recipe],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<TrialResult>, LlamaError> {
        let known = |layer: &Layer| match layer.module {
            Module::LmHead => *layer == Layer::lm_head(self.config),
            _ => layer.layer < self.config.layers,
        };
        if let Some(&layer) = layers.iter().find(|layer| !known(layer)) {
            return Err(TrialError::UnknownLayer { layer }.into());
        }
        let with_gptaq = recipes.iter().find(|recipe| recipe.settings.gptaq().is_some());
        if let (Some(recipe), None) = (with_gptaq, self.behind) {
            return Err(TrialError::NoReference { recipe: recipe.name.clone() }.into());
        }
        let rows = TokenRows::new([self.calibration.rows(), self.held_out.rows()].concat())?;
        let walk = Walk {
            config: self.config,
            device: self.device,
            rows: &rows,
            model: self.behind.unwrap_or(self.weights),
            reference: self.behind.map(|_| self.weights),
            activation_bytes: self.activation_bytes,
        };
        let mut bench = Bench {
            trial: self,
            layers,
            recipes,
            with_gptaq: with_gptaq.is_some(),
            sums: None,
            held_out: Vec::new(),
            results: Vec::new(),
        };
        walk.run(&mut bench, watch)?;
        Ok(bench.results)
    }
}

/// Inputs of one held-out row in the quantised and in the unquantised model; nothing for the latter if they are the same.
type HeldOut = (Array2<f32>, Option<Array2<f32>>);

/// Collects inputs and runs the recipes on them.
struct Bench<'t, 'a, D: QuantizeBackend> {
    trial: &'t Trial<'a, D>,
    layers: &'t [Layer],
    recipes: &'t [Recipe],
    with_gptaq: bool,
    sums: Option<HessianAccumulator>,
    held_out: Vec<HeldOut>,
    results: Vec<TrialResult>,
}

impl<D: QuantizeBackend> Visitor for Bench<'_, '_, D> {
    fn wants(&self, layers: &[Layer]) -> bool {
        layers.iter().any(|layer| self.layers.contains(layer))
    }

    fn row(
        &mut self,
        layers: &[Layer],
        row: usize,
        inputs: Array2<f32>,
        reference: Option<Array2<f32>>,
    ) -> Result<(), LlamaError> {
        if row >= self.trial.calibration.rows().len() {
            self.held_out.push((inputs, reference));
            return Ok(());
        }
        let with_gptaq = self.with_gptaq;
        let sums = self.sums.get_or_insert_with(|| match with_gptaq {
            true => HessianAccumulator::with_reference(inputs.ncols()),
            false => HessianAccumulator::new(inputs.ncols()),
        });
        match reference.filter(|_| with_gptaq) {
            Some(reference) => sums.add_batch_with_reference(inputs.view(), reference.view()),
            None => sums.add_batch(inputs.view()),
        }
        .map_err(|source| LlamaError::Quantize { module: layers[0].to_string(), source })
    }

    fn finish(&mut self, layers: &[Layer]) -> Result<(), LlamaError> {
        let failed = |source| LlamaError::Quantize { module: layers[0].to_string(), source };
        let held_out = std::mem::take(&mut self.held_out);
        let Some(sums) = self.sums.take() else { return Ok(()) };
        let hessian = sums.finish().map_err(failed)?;
        let wanted: Vec<Layer> = layers.iter().copied().filter(|layer| self.layers.contains(layer)).collect();
        let mut subjects = Vec::with_capacity(wanted.len());
        for layer in wanted {
            let original = Original::read(self.trial.weights, layer.linear(self.trial.config))?;
            let weight = original.weight();
            let norm =
                held_out.iter().map(|(x, reference)| norm(&weight, reference.as_ref().unwrap_or(x))).sum();
            subjects.push(Subject { layer, weight, norm });
        }
        let mut results = try_all(self.recipes, &hessian, &subjects, &held_out);
        results.sort_by_key(|result| (result.layer, result.recipe));
        self.results.append(&mut results);
        Ok(())
    }
}

/// A layer that recipes are tried on.
struct Subject {
    layer: Layer,
    /// `(out_features, in_features)`
    weight: Array2<f32>,
    norm: f64,
}

/// Recipes that need the same factorisation follow one another, so that there is one factorisation in memory at a time.
fn try_all(
    recipes: &[Recipe],
    hessian: &Hessian,
    subjects: &[Subject],
    held_out: &[HeldOut],
) -> Vec<TrialResult> {
    let mut results = Vec::with_capacity(recipes.len() * subjects.len());
    let mut open: Vec<usize> = (0..recipes.len()).collect();
    while let Some(&first) = open.first() {
        let prepared = match Gptq::new(recipes[first].settings.clone()).prepare_shared(hessian) {
            Ok(prepared) => prepared,
            Err(error) => {
                let failed = |subject: &Subject| TrialResult {
                    layer: subject.layer,
                    recipe: first,
                    outcome: Err(error.clone()),
                };
                results.extend(subjects.iter().map(failed));
                open.remove(0);
                continue;
            }
        };
        open.retain(|&recipe| {
            let settings = &recipes[recipe].settings;
            let Some(prepared) = prepared.for_settings(settings) else { return true };
            for subject in subjects {
                let weight = subject.weight.view();
                let outcome = prepared.quantize(weight).and_then(|quantized| {
                    let rounded = rtn(weight, settings)?;
                    let baseline = baseline(weight, hessian, settings);
                    Ok(score(subject, settings, &quantized, &rounded, baseline.as_ref(), held_out))
                });
                results.push(TrialResult { layer: subject.layer, recipe, outcome });
            }
            false
        });
    }
    results
}

/// What rounding would have cost, as the report of a quantisation estimates it.
fn baseline(weight: ArrayView2<'_, f32>, hessian: &Hessian, settings: &GptqConfig) -> Option<Baseline> {
    let sampled = weight.select(Axis(0), &sample(weight.nrows()));
    let rounding = Rounding::new(sampled.view(), weight.nrows(), settings)?;
    Baseline::new(&rounding, &CpuQuantizer::new(settings.clone()), hessian).ok()
}

fn score(
    subject: &Subject,
    settings: &GptqConfig,
    quantized: &QuantizedWeight,
    rounded: &QuantizedWeight,
    baseline: Option<&Baseline>,
    held_out: &[HeldOut],
) -> TrialScore {
    let report = &quantized.report;
    let error = |quantized: &QuantizedWeight| {
        let quantized = quantized.dequantize();
        held_out.iter().map(|(x, reference)| error(&quantized, x, &subject.weight, reference.as_ref())).sum()
    };
    let (outputs, inputs) = subject.weight.dim();
    let bits = Bits::try_from(settings.bits()).expect("invariant: both crates know the same widths");
    let format = LayerFormat { bits, group_size: settings.group_size() };
    TrialScore {
        loss: report.loss,
        rtn_loss: baseline.and_then(|baseline| baseline.loss(report)),
        error: error(quantized),
        rtn_error: error(rounded),
        norm: subject.norm,
        bits: format.stored_bits(inputs, outputs),
        weights: (outputs * inputs) as u64,
        damp: report.damp.map(|damp| damp.percent),
        time: report.times.prepare + report.times.factorize + report.times.solve,
    }
}

/// Tokens of a task.
const TOKENS: usize = 64;

/// `|W X|^2`
fn norm(weight: &Array2<f32>, inputs: &Array2<f32>) -> f64 {
    let chunks: Vec<ArrayView2<'_, f32>> = inputs.axis_chunks_iter(Axis(0), TOKENS).collect();
    let squares: Vec<f64> = chunks.into_par_iter().map(|x| square(&x.dot(&weight.t()))).collect();
    squares.iter().sum()
}

/// `|Q X - W X~|^2`; X is X~ if there is no reference.
fn error(
    quantized: &Array2<f32>,
    inputs: &Array2<f32>,
    weight: &Array2<f32>,
    reference: Option<&Array2<f32>>,
) -> f64 {
    let chunks: Vec<_> = inputs.axis_chunks_iter(Axis(0), TOKENS).collect();
    let Some(reference) = reference else {
        let difference = quantized - weight;
        return norm(&difference, inputs);
    };
    let references: Vec<_> = reference.axis_chunks_iter(Axis(0), TOKENS).collect();
    let squares: Vec<f64> = chunks
        .into_par_iter()
        .zip(references)
        .map(|(x, reference)| {
            let mut difference = reference.dot(&weight.t());
            general_mat_mul(1.0, &x, &quantized.t(), -1.0, &mut difference);
            square(&difference)
        })
        .collect();
    squares.iter().sum()
}

fn square(matrix: &Array2<f32>) -> f64 {
    matrix.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}
