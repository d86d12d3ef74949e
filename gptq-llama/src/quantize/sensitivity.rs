//! What each layer loses at each format.

use std::num::NonZeroUsize;

use gptq_core::{
    Gptq, GptqConfig, GptqError, Hessian, HessianAccumulator, PreparedHessian, QuantizedWeight, rtn,
};
use gptq_kernels::quantize::QuantizeBackend;
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{
    baseline::sample,
    budget::{Choice, FormatCost, LayerFormat},
    layer::Stage,
    original::Original,
    plan::builder_of,
    predictions::Predictions,
    walk::{Visitor, Walk},
};
use crate::{Layer, LlamaConfig, LlamaError, TokenRows, Watch, WeightSource};

/// Measures what each layer of a model loses at each of some formats.
pub struct SensitivityJob<'a, D: QuantizeBackend + Clone> {
    config: &'a LlamaConfig,
    weights: &'a dyn WeightSource,
    device: &'a D,
    calibration: &'a TokenRows,
    settings: GptqConfig,
    formats: Vec<LayerFormat>,
    probe: Option<(&'a TokenRows, LayerFormat)>,
    apart: bool,
    lm_head: bool,
    activation_bytes: usize,
}

/// What each layer of a model loses at each format.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Sensitivities {
    /// By layer, in the order of the forward pass.
    pub layers: Vec<LayerSensitivity>,
    /// What the model's predictions lose by some layers, if that was measured.
    pub divergences: Vec<Divergence>,
}

/// What one layer loses at each format, all layers before it being unquantised.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerSensitivity {
    /// The layer.
    pub layer: Layer,
    /// Its loss at each format.
    pub losses: Vec<FormatLoss>,
}

/// The loss of one layer at one format.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct FormatLoss {
    /// The format.
    pub format: LayerFormat,
    /// `tr(E H E^T) / tr(W H W^T)`, E = Q - W: GPTQ's objective `|Q X - W X|^2` (arXiv:2210.17323, equation 1), as a share of
    /// the squared output `|W X|^2`, over the calibration rows. Measured on 64 evenly spaced rows of the weight (all if there
    /// are no more), which are quantised exactly as they are among all others.
    pub loss: f64,
    /// The same with the weight rounded to nearest.
    pub rtn_loss: f64,
}

/// What the model's predictions lose when some layers are quantised and all others are not.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Divergence {
    /// The layers.
    pub layers: Vec<Layer>,
    /// In which format.
    pub format: LayerFormat,
    /// Mean Kullback-Leibler divergence from the unquantised model's predictions, nats a token.
    pub nats: f64,
}

impl<'a, D: QuantizeBackend + Clone> SensitivityJob<'a, D> {
    /// Measures `formats` under otherwise these settings, GPTAQ excepted: every layer sees the inputs of the unquantised
    /// model.
    pub fn new(
        config: &'a LlamaConfig,
        weights: &'a dyn WeightSource,
        device: &'a D,
        calibration: &'a TokenRows,
        settings: &GptqConfig,
        formats: &[LayerFormat],
    ) -> Self {
        Self {
            config,
            weights,
            device,
            calibration,
            settings: settings.clone(),
            formats: formats.to_vec(),
            probe: None,
            apart: false,
            lm_head: false,
            activation_bytes: 4 << 30,
        }
    }

    /// Measures also what the model's predictions on `rows` lose when layers that share an input are quantised to `format`, once
    /// for all such layers. Each time the whole model is loaded and runs over the rows.
    #[must_use]
    pub fn divergence(mut self, rows: &'a TokenRows, format: LayerFormat) -> Self {
        self.probe = Some((rows, format));
        if !self.formats.contains(&format) {
            self.formats.push(format);
        }
        self
    }

    /// Measures divergences for every layer apart. Layers that share an input may then get different formats, and engines that
    /// run them as one layer will have to run them one by one, or refuse them.
    #[must_use]
    pub fn apart(self, apart: bool) -> Self {
        Self { apart, ..self }
    }

    /// Measures the output layer too.
    #[must_use]
    pub fn with_lm_head(self, lm_head: bool) -> Self {
        Self { lm_head, ..self }
    }

    /// As [`QuantizeOptions::activation_bytes`](super::QuantizeOptions::activation_bytes).
    #[must_use]
    pub fn with_activation_bytes(self, bytes: usize) -> Self {
        Self { activation_bytes: bytes, ..self }
    }

    /// Errors: [`LlamaError::AlreadyQuantized`], [`LlamaError::Quantize`] with the layer's name, [`LlamaError::Cancelled`], and
    /// those of loading.
    pub fn run(&self, watch: &mut Watch<'_>) -> Result<Sensitivities, LlamaError> {
        let predictions = match self.probe {
            Some((rows, _)) => Some(Predictions::new(self.config, self.weights, self.device, rows)?),
            None => None,
        };
        let walk = Walk {
            config: self.config,
            device: self.device,
            rows: self.calibration,
            model: self.weights,
            reference: None,
            activation_bytes: self.activation_bytes,
        };
        let found = Sensitivities { layers: Vec::new(), divergences: Vec::new() };
        let mut meter = Meter { job: self, predictions, sums: None, found };
        walk.run(&mut meter, watch)?;
        Ok(meter.found)
    }
}

struct Meter<'j, 'a, D: QuantizeBackend + Clone> {
    job: &'j SensitivityJob<'a, D>,
    predictions: Option<Predictions<'a, D>>,
    sums: Option<HessianAccumulator>,
    found: Sensitivities,
}

impl<D: QuantizeBackend + Clone> Visitor for Meter<'_, '_, D> {
    fn wants(&self, layers: &[Layer]) -> bool {
        self.job.lm_head || layers[0] != Layer::lm_head(self.job.config)
    }

    fn row(
        &mut self,
        layers: &[Layer],
        _: usize,
        inputs: Array2<f32>,
        _: Option<Array2<f32>>,
    ) -> Result<(), LlamaError> {
        let sums = self.sums.get_or_insert_with(|| HessianAccumulator::new(inputs.ncols()));
        let failed = |source| LlamaError::Quantize { module: layers[0].to_string(), source };
        sums.add_batch(inputs.view()).map_err(failed)
    }

    fn finish(&mut self, layers: &[Layer]) -> Result<(), LlamaError> {
        let job = self.job;
        let failed = |source| LlamaError::Quantize { module: layers[0].to_string(), source };
        let Some(sums) = self.sums.take() else { return Ok(()) };
        let hessian = sums.finish().map_err(failed)?;
        let originals: Vec<Original<'_>> = layers
            .iter()
            .map(|layer| Original::read(job.weights, layer.linear(job.config)))
            .collect::<Result<_, _>>()?;
        let subjects: Vec<Subject> = originals
            .iter()
            .map(|original| Subject::new(original, &hessian))
            .collect::<Result<_, _>>()
            .map_err(failed)?;
        let mut losses: Vec<Vec<FormatLoss>> = layers.iter().map(|_| Vec::new()).collect();
        let mut prepared: Option<PreparedHessian> = None;
        for &format in &job.formats {
            let settings = builder_of(&job.settings)
                .bits(format.bits.get())
                .group_size(format.group_size.map(NonZeroUsize::get))
                .gptaq(None)
                .build()
                .map_err(|source| failed(GptqError::Config(source)))?;
            let shared = prepared.take().and_then(|prepared| prepared.for_settings(&settings));
            let factor = match shared {
                Some(shared) => shared,
                None => Gptq::new(settings.clone()).prepare_shared(&hessian).map_err(failed)?,
            };
            for (index, (original, subject)) in originals.iter().zip(&subjects).enumerate() {
                let sample = subject.sample.view();
                let share = |quantized: Result<QuantizedWeight, GptqError>| -> Result<f64, LlamaError> {
                    let error = quantized.map_err(|error| original.failed(error))?.dequantize() - sample;
                    let error = energy(&hessian, error.view()).map_err(failed)?;
                    Ok(if subject.norm > 0.0 { error / subject.norm } else { 0.0 })
                };
                let (loss, rtn_loss) = (share(factor.quantize(sample))?, share(rtn(sample, &settings))?);
                losses[index].push(FormatLoss { format, loss, rtn_loss });
            }
            if job.probe.is_some_and(|(_, probe)| probe == format) {
                self.probe(layers, &originals, &factor, &settings, format)?;
            }
            prepared = Some(factor);
        }
        let by_layer = layers.iter().zip(losses);
        self.found.layers.extend(by_layer.map(|(&layer, losses)| LayerSensitivity { layer, losses }));
        Ok(())
    }
}

impl<D: QuantizeBackend + Clone> Meter<'_, '_, D> {
    /// Runs the model with these layers quantised.
    fn probe(
        &mut self,
        layers: &[Layer],
        originals: &[Original<'_>],
        factor: &PreparedHessian,
        settings: &GptqConfig,
        format: LayerFormat,
    ) -> Result<(), LlamaError> {
        let Some(predictions) = &self.predictions else { return Ok(()) };
        let members: Vec<usize> = (0..layers.len()).collect();
        for set in members.chunks(if self.job.apart { 1 } else { layers.len() }) {
            let mut replaced = Vec::new();
            for &index in set {
                let original = &originals[index];
                let quantized =
                    factor.quantize(original.weight().view()).map_err(|error| original.failed(error))?;
                replaced.push((layers[index].to_string(), original.pack(&quantized, settings)?));
            }
            let nats = predictions.with(replaced)?;
            let layers = set.iter().map(|&index| layers[index]).collect();
            self.found.divergences.push(Divergence { layers, format, nats });
        }
        Ok(())
    }
}

/// Rows of a task.
const CHUNK: usize = 16;

/// Some rows of a weight, and `tr(W H W^T) / 2` of them.
struct Subject {
    sample: Array2<f32>,
    norm: f64,
}

impl Subject {
    fn new(original: &Original<'_>, hessian: &Hessian) -> Result<Self, GptqError> {
        let sample = original.rows(&sample(original.name().out_features));
        let norm = energy(hessian, sample.view())?;
        Ok(Self { sample, norm })
    }
}

/// `tr(E H E^T) / 2`
fn energy(hessian: &Hessian, error: ArrayView2<'_, f32>) -> Result<f64, GptqError> {
    let chunks: Vec<_> = error.axis_chunks_iter(Axis(0), CHUNK).collect();
    let parts: Vec<f64> =
        chunks.into_par_iter().map(|chunk| hessian.output_error(chunk)).collect::<Result<_, _>>()?;
    Ok(parts.iter().sum())
}

impl Sensitivities {
    /// What [`allocate`](super::allocate) chooses from. The cost of a format is the divergence measured, times the loss of the
    /// layers in that format over their loss in the one measured: predictions get worse in proportion to the squared error of
    /// a layer, and by the sum over layers, as long as errors are small (the linearity theorem of arXiv:2411.17525).
    ///
    /// Where no divergence was measured, it is the sum of the losses of layers that share an input, which takes every layer to
    /// be as important as any other.
    pub fn choices(&self, config: &LlamaConfig) -> Vec<Choice> {
        if self.divergences.is_empty() {
            let mut sets: Vec<Vec<Layer>> = Vec::new();
            let input = |layer: &Layer| (layer.layer, Stage::of(layer.module));
            for LayerSensitivity { layer, .. } in &self.layers {
                match sets.last_mut().filter(|set| input(&set[0]) == input(layer)) {
                    Some(set) => set.push(*layer),
                    None => sets.push(vec![*layer]),
                }
            }
            return sets.into_iter().map(|set| self.choice(set, config, |loss| loss)).collect();
        }
        let choice = |measured: &Divergence| {
            let at_probe = self.loss(&measured.layers, measured.format);
            let scale = if at_probe > 0.0 { measured.nats / at_probe } else { 0.0 };
            self.choice(measured.layers.clone(), config, |loss| scale * loss)
        };
        self.divergences.iter().map(choice).collect()
    }

    fn choice(&self, layers: Vec<Layer>, config: &LlamaConfig, cost: impl Fn(f64) -> f64) -> Choice {
        let first = self.layers.iter().find(|sensitivity| layers.first() == Some(&sensitivity.layer));
        let losses = first.map_or(&[][..], |first| &first.losses);
        let option = |&FormatLoss { format, .. }: &FormatLoss| {
            let shapes = layers.iter().map(|layer| layer.module.shape(config));
            let bits = shapes.map(|(inputs, outputs)| format.stored_bits(inputs, outputs)).sum();
            FormatCost { format, bits, cost: cost(self.loss(&layers, format)) }
        };
        Choice { options: losses.iter().map(option).collect(), layers }
    }

    /// Sum of the losses of some layers.
    fn loss(&self, layers: &[Layer], format: LayerFormat) -> f64 {
        let these = self.layers.iter().filter(|sensitivity| layers.contains(&sensitivity.layer));
        these.flat_map(|these| &these.losses).filter(|loss| loss.format == format).map(|loss| loss.loss).sum()
    }

    /// All as JSON.
    pub fn to_json(&self) -> String {
        let with_format = |format: LayerFormat, rest: Value| {
            let group_size = format.group_size.map_or_else(|| json!(-1), |size| json!(size.get()));
            let mut object = json!({"bits": format.bits.get(), "group_size": group_size});
            if let (Some(object), Value::Object(rest)) = (object.as_object_mut(), rest) {
                object.extend(rest);
            }
            object
        };
        let loss = |loss: &FormatLoss| {
            with_format(loss.format, json!({"loss": loss.loss, "rtn_loss": loss.rtn_loss}))
        };
        let layer = |sensitivity: &LayerSensitivity| {
            let losses: Vec<Value> = sensitivity.losses.iter().map(loss).collect();
            json!({"module": sensitivity.layer.to_string(), "losses": losses})
        };
        let divergence = |divergence: &Divergence| {
            let names: Vec<String> = divergence.layers.iter().map(Layer::to_string).collect();
            with_format(divergence.format, json!({"modules": names, "divergence_nats": divergence.nats}))
        };
        let layers: Vec<Value> = self.layers.iter().map(layer).collect();
        let divergences: Vec<Value> = self.divergences.iter().map(divergence).collect();
        format!("{:#}\n", json!({"layers": layers, "divergences": divergences}))
    }
}
