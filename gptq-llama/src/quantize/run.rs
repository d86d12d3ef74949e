//! The walk through the decoder: collect, solve, advance.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use gptq_core::{Gptq, GptqConfig, Hessian, HessianAccumulator};
use gptq_kernels::{Backend, Selector};
use ndarray::Array2;

use super::{
    LayerSummary, QuantizeOptions, QuantizeReport,
    activations::Budget,
    baseline::Baseline,
    calibrate::{Calibration, Stream},
    layer::{Decoder, Stage},
    original::Original,
    plan::Plan,
    store::{Finished, Store},
};
use crate::{
    Layer, LlamaConfig, LlamaError, Module, Precision, QuantizePhase, TokenRows, Watch, WeightSource,
    model::load_norm,
    names,
    progress::Reporter,
    projections::Preparation,
    weights::{LinearName, LinearWeight},
};

/// Share of a stage's time that is forward pass and Hessian, for the estimate of the time left.
const SHARE_OF_CALIBRATION: f64 = 0.8;

/// Parts of equal weight in the estimate of a layer's time: the stages, and the way to the next layer.
const PARTS: usize = Stage::ALL.len() + 1;

pub(super) fn quantize<D: Backend>(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    device: &D,
    rows: &TokenRows,
    options: &QuantizeOptions,
    watch: &mut Watch<'_>,
    store: &mut dyn Store,
) -> Result<QuantizeReport, LlamaError> {
    let span = tracing::info_span!("quantize", layers = config.layers, rows = rows.rows().len());
    let _guard = span.enter();
    rows.check_vocabulary(config.vocab_size)?;
    let plan = Plan::new(config, options)?;
    let mut report = QuantizeReport::empty(plan.skipped().to_vec());
    let before = plan.layers(config).filter_map(|layer| store.finished(layer).cloned());
    report.layers = before.collect();
    let Some(last) = plan.layers(config).filter(|&layer| store.finished(layer).is_none()).last() else {
        return Ok(report);
    };
    let kernels = device.kernels();
    let precision = Precision::Float32;
    let preparation = Preparation { kernels: &kernels, kernel: None, precision, selector: Selector::new() };
    let mut run = Run {
        config,
        source,
        preparation: &preparation,
        options,
        plan: &plan,
        last: last.layer,
        reporter: Reporter::new(watch, config.layers, plan.quantizes_lm_head(), PARTS),
        store,
        layers: Vec::new(),
    };
    let budget = Budget { bytes: options.activation_bytes, spill: run.store.folder().map(Path::to_owned) };
    let streams = 1 + usize::from(plan.needs_reference()) + usize::from(!options.true_sequential);
    let mut calibration = Calibration::new(device, config, source, rows, &budget, streams)?;
    let mut stream = calibration.embed()?;
    let mut reference = if plan.needs_reference() { Some(calibration.embed()?) } else { None };
    for layer in 0..config.layers.min(last.layer + 1) {
        let span = tracing::info_span!("layer", layer);
        let _guard = span.enter();
        run.layer(layer, &mut calibration, &mut stream, reference.as_mut())?;
    }
    if last.module == Module::LmHead {
        run.lm_head(&mut calibration, &mut stream, reference.as_mut())?;
    }
    report.layers.append(&mut run.layers);
    report.finish(&run.reporter);
    Ok(report)
}

/// What stays the same from layer to layer.
struct Run<'r, 'w, 'a, D: Backend> {
    config: &'r LlamaConfig,
    source: &'r dyn WeightSource,
    preparation: &'r Preparation<'r, D>,
    options: &'r QuantizeOptions,
    plan: &'r Plan,
    /// The last decoder layer in which something is left to do; behind all for the output layer.
    last: usize,
    reporter: Reporter<'w, 'a>,
    store: &'r mut dyn Store,
    layers: Vec<LayerSummary>,
}

/// The layer as the checkpoint has it, and the stream of the unquantised model.
type Reference<'a, D> = Option<(&'a Decoder<D>, &'a mut Stream<D>)>;

impl<D: Backend> Run<'_, '_, '_, D> {
    /// Quantises one decoder layer and takes the streams behind it.
    fn layer(
        &mut self,
        layer: usize,
        calibration: &mut Calibration<'_, D>,
        stream: &mut Stream<D>,
        mut reference: Option<&mut Stream<D>>,
    ) -> Result<(), LlamaError> {
        let norms = || Decoder::load(calibration.device(), self.config, self.source, layer);
        let mut quantized = norms()?;
        // The unquantised layer as well, where something has to pass through it.
        let original = if reference.is_some() || !self.options.true_sequential {
            let mut original = norms()?;
            for stage in Stage::ALL {
                let weights: Vec<_> = self.read(layer, stage)?.into_iter().map(Original::unchanged).collect();
                original.set(stage, self.preparation.projections(&weights)?);
            }
            Some(original)
        } else {
            None
        };
        if self.options.true_sequential {
            for stage in Stage::ALL {
                let recovered = self.recover(&stage.layers(layer))?;
                let pair = original.as_ref().zip(reference.as_deref_mut());
                let hessian =
                    self.collect((layer, stage), &recovered, calibration, &quantized, stream, pair)?;
                self.tell_solving(layer, stage)?;
                let weights = self.solve(&stage.layers(layer), recovered, hessian)?;
                quantized.set(stage, self.preparation.projections(&weights)?);
            }
        } else {
            let original = original.as_ref().expect("invariant: loaded unless true_sequential");
            let mut copy = calibration.copy(stream)?;
            let mut collected = Vec::with_capacity(Stage::ALL.len());
            for stage in Stage::ALL {
                let recovered = self.recover(&stage.layers(layer))?;
                let pair = reference.as_deref_mut().map(|reference| (original, reference));
                let hessian =
                    self.collect((layer, stage), &recovered, calibration, original, &mut copy, pair)?;
                collected.push((recovered, hessian));
            }
            drop(copy);
            for (stage, (recovered, hessian)) in Stage::ALL.into_iter().zip(collected) {
                self.tell_solving(layer, stage)?;
                let weights = self.solve(&stage.layers(layer), recovered, hessian)?;
                quantized.set(stage, self.preparation.projections(&weights)?);
            }
            for row in 0..calibration.rows() {
                for stage in Stage::ALL {
                    calibration.advance(stage, &quantized, stream, row)?;
                }
            }
        }
        if layer < self.last {
            let rows = calibration.rows();
            for row in 0..rows {
                calibration.finish(&quantized, stream, row)?;
                if let Some((original, reference)) = original.as_ref().zip(reference.as_deref_mut()) {
                    calibration.finish(original, reference, row)?;
                }
                let done = Stage::ALL.len() as f64 + (row + 1) as f64 / rows as f64;
                self.reporter.tell((layer, done), &[], QuantizePhase::Advancing)?;
            }
        }
        Ok(())
    }

    /// Quantises the output layer on the outputs of the final norm.
    fn lm_head(
        &mut self,
        calibration: &mut Calibration<'_, D>,
        stream: &mut Stream<D>,
        mut reference: Option<&mut Stream<D>>,
    ) -> Result<(), LlamaError> {
        let head = [Layer::lm_head(self.config)];
        let recovered = self.recover(&head)?;
        let norm = load_norm(calibration.device(), self.source, names::FINAL_NORM, self.config.hidden_size)?;
        let mut sums = match self.sums(&head, &recovered) {
            Some(sums) => sums,
            None => return self.solve(&head, recovered, None).map(drop),
        };
        let rows = calibration.rows();
        for row in 0..rows {
            let inputs = calibration.normalized(&norm, stream, row)?;
            let reference = reference.as_deref_mut();
            let reference = reference.map(|stream| calibration.normalized(&norm, stream, row)).transpose()?;
            sums.add(&inputs, reference.as_ref())?;
            let done = PARTS as f64 * SHARE_OF_CALIBRATION * ((row + 1) as f64 / rows as f64);
            self.reporter.tell((head[0].layer, done), &[Module::LmHead], QuantizePhase::Calibrating)?;
        }
        let solving = (head[0].layer, PARTS as f64 * SHARE_OF_CALIBRATION);
        self.reporter.tell(solving, &[Module::LmHead], QuantizePhase::Solving)?;
        let moments = sums.finish()?;
        self.solve(&head, recovered, Some(moments)).map(drop)
    }

    fn read(&self, layer: usize, stage: Stage) -> Result<Vec<Original<'_>>, LlamaError> {
        stage
            .layers(layer)
            .iter()
            .map(|layer| Original::read(self.source, layer.linear(self.config)))
            .collect()
    }

    /// What an earlier run has left of these layers.
    fn recover(&mut self, layers: &[Layer]) -> Result<Vec<Option<Array2<f32>>>, LlamaError> {
        let planned = |layer| self.plan.get(layer).is_some();
        layers.iter().map(|&layer| if planned(layer) { self.store.weight(layer) } else { Ok(None) }).collect()
    }

    /// Empty second moments of the inputs of these layers; `None` if nobody needs them.
    fn sums(&self, layers: &[Layer], recovered: &[Option<Array2<f32>>]) -> Option<Sums> {
        let open = layers.iter().zip(recovered).filter(|(_, recovered)| recovered.is_none());
        let settings: Vec<&GptqConfig> = open.filter_map(|(&layer, _)| self.plan.get(layer)).collect();
        if settings.is_empty() {
            return None;
        }
        let features = layers[0].module.shape(self.config).0;
        let with_reference = settings.iter().any(|settings| settings.gptaq().is_some());
        let accumulator = if with_reference {
            HessianAccumulator::with_reference(features)
        } else {
            HessianAccumulator::new(features)
        };
        Some(Sums { module: layers[0], with_reference, accumulator, start: Instant::now() })
    }

    /// Runs all rows up to the inputs of a stage, and takes their second moments if some layer needs them.
    fn collect(
        &mut self,
        (layer, stage): (usize, Stage),
        recovered: &[Option<Array2<f32>>],
        calibration: &mut Calibration<'_, D>,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        mut reference: Reference<'_, D>,
    ) -> Result<Option<Moments>, LlamaError> {
        let mut sums = self.sums(&stage.layers(layer), recovered);
        let rows = calibration.rows();
        for row in 0..rows {
            match &mut sums {
                Some(sums) => {
                    let inputs = calibration.inputs(stage, decoder, stream, row)?;
                    let reference = reference.as_mut();
                    let reference = reference
                        .map(|(decoder, stream)| calibration.inputs(stage, decoder, stream, row))
                        .transpose()?;
                    sums.add(&inputs, reference.as_ref())?;
                }
                None => {
                    calibration.pass(stage, decoder, stream, row)?;
                    if let Some((decoder, stream)) = &mut reference {
                        calibration.pass(stage, decoder, stream, row)?;
                    }
                }
            }
            let phase = if sums.is_some() { QuantizePhase::Calibrating } else { QuantizePhase::Advancing };
            let done = stage as usize as f64 + SHARE_OF_CALIBRATION * ((row + 1) as f64 / rows as f64);
            self.reporter.tell((layer, done), stage.modules(), phase)?;
        }
        if recovered.iter().any(Option::is_some) {
            self.reporter.skip((layer, stage as usize as f64 + SHARE_OF_CALIBRATION));
        }
        sums.map(Sums::finish).transpose()
    }

    fn tell_solving(&mut self, layer: usize, stage: Stage) -> Result<(), LlamaError> {
        let done = stage as usize as f64 + SHARE_OF_CALIBRATION;
        self.reporter.tell((layer, done), stage.modules(), QuantizePhase::Solving)
    }

    /// Quantises layers that share an input, as far as they are not recovered, and returns the weights that the model
    /// goes on with. `moments` are there if some layer needs them.
    fn solve(
        &mut self,
        layers: &[Layer],
        recovered: Vec<Option<Array2<f32>>>,
        moments: Option<Moments>,
    ) -> Result<Vec<(LinearName, LinearWeight<'static>)>, LlamaError> {
        let mut originals = Vec::with_capacity(layers.len());
        for layer in layers {
            originals.push(Some(Original::read(self.source, layer.linear(self.config))?));
        }
        let mut weights: Vec<Option<(LinearName, LinearWeight<'static>)>> =
            layers.iter().map(|_| None).collect();
        // Layers with equal settings share a factorisation.
        let mut groups: Vec<(&GptqConfig, Vec<usize>)> = Vec::new();
        for (index, recovered) in recovered.into_iter().enumerate() {
            let mut original = || originals[index].take().expect("invariant: every layer is taken once");
            match (recovered, self.plan.get(layers[index])) {
                (Some(weight), _) => weights[index] = Some(original().with_weight(weight)),
                (None, None) => weights[index] = Some(original().unchanged()),
                (None, Some(settings)) => match groups.iter_mut().find(|(other, _)| *other == settings) {
                    Some((_, members)) => members.push(index),
                    None => groups.push((settings, vec![index])),
                },
            }
        }
        let Some(Moments { hessian, calibration }) = moments else {
            return Ok(weights.into_iter().flatten().collect());
        };
        let mut baselines: Vec<Option<Baseline>> = Vec::with_capacity(layers.len());
        for (&layer, original) in layers.iter().zip(&originals) {
            let open = original.as_ref().zip(self.plan.get(layer));
            baselines.push(open.and_then(|(original, settings)| {
                Baseline::new(original.weight().view(), &hessian, settings)
            }));
        }
        let count = groups.len();
        let mut hessian = Some(hessian);
        for (number, (settings, members)) in groups.into_iter().enumerate() {
            let hessian = if number + 1 == count { hessian.take() } else { hessian.clone() };
            let hessian = hessian.expect("invariant: only the last takes it");
            let first = layers[members[0]];
            let prepared = Gptq::new(settings.clone())
                .prepare(hessian)
                .map_err(|source| LlamaError::Quantize { module: first.to_string(), source })?;
            for index in members {
                let layer = layers[index];
                let original = originals[index].take().expect("invariant: every layer is taken once");
                let result =
                    prepared.quantize(original.weight().view()).map_err(|error| original.failed(error))?;
                let packed = original.pack(&result, settings)?;
                weights[index] = Some(original.with_weight(result.dequantize()));
                let rtn_loss = baselines[index].as_ref().and_then(|baseline| baseline.loss(&result.report));
                let memory = self.reporter.memory();
                let summary = LayerSummary { layer, report: result.report, rtn_loss, calibration, memory };
                let (loss, damp) = (summary.report.loss, &summary.report.damp);
                tracing::info!(module = %layer, loss, rtn_loss, ?damp, "quantised");
                self.layers.push(summary.clone());
                self.store.put(Finished { packed, scales: result.scales, summary: summary.clone() })?;
                let done = match Stage::of(layer.module) {
                    Some(stage) => stage as usize as f64 + 1.0,
                    None => PARTS as f64,
                };
                self.reporter.finished((layer.layer, done), &summary)?;
            }
        }
        Ok(weights.into_iter().flatten().collect())
    }
}

/// A Hessian, and how long its inputs took.
struct Moments {
    hessian: Hessian,
    calibration: Duration,
}

/// Second moments of the inputs that some layers share.
struct Sums {
    /// The first of the layers, for errors.
    module: Layer,
    with_reference: bool,
    accumulator: HessianAccumulator,
    start: Instant,
}

impl Sums {
    /// Adds inputs `(tokens, in_features)`.
    fn add(&mut self, inputs: &Array2<f32>, reference: Option<&Array2<f32>>) -> Result<(), LlamaError> {
        match reference.filter(|_| self.with_reference) {
            Some(reference) => self.accumulator.add_batch_with_reference(inputs.view(), reference.view()),
            None => self.accumulator.add_batch(inputs.view()),
        }
        .map_err(|source| LlamaError::Quantize { module: self.module.to_string(), source })
    }

    fn finish(self) -> Result<Moments, LlamaError> {
        let Self { module, accumulator, start, .. } = self;
        let failed = |source| LlamaError::Quantize { module: module.to_string(), source };
        let hessian = accumulator.finish().map_err(failed)?;
        Ok(Moments { hessian, calibration: start.elapsed() })
    }
}
