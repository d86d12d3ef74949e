//! The walk through the decoder: collect, solve, advance.

use std::{path::Path, time::Instant};

use gptq_kernels::quantize::QuantizeBackend;
use ndarray::Array2;

use super::{
    QuantizeOptions, QuantizeReport, RunTimes,
    activations::{Budget, element_bytes},
    calibrate::{Calibration, Stream},
    layer::{Decoder, Stage},
    original::Original,
    plan::Plan,
    quantizers::Quantizers,
    room::{self, with_room},
    solve::Moments,
    state::{PARTS, Run, SHARE_OF_CALIBRATION, preparation},
    store::Store,
};
use crate::{
    Layer, LlamaConfig, LlamaError, Module, QuantizePhase, TokenRows, Watch, WeightSource, model::load_norm,
    names, progress::Reporter, projections::Projections,
};

pub(super) fn quantize<D: QuantizeBackend>(
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
    let reporter = Reporter::new(watch, config.layers, plan.quantizes_lm_head(), PARTS);
    let kernels = device.kernels();
    let preparation = preparation::<D>(&kernels);
    let quantizers = Quantizers::new(device, &plan, config)?;
    let mut run = Run {
        device,
        config,
        source,
        preparation: &preparation,
        quantizers: &quantizers,
        options,
        plan: &plan,
        last: last.layer,
        reporter,
        store,
        layers: Vec::new(),
        moved: Vec::new(),
        times: RunTimes::default(),
    };
    let streams = 1 + usize::from(plan.needs_reference()) + usize::from(!options.true_sequential);
    let budget = Budget {
        bytes: options.activation_bytes,
        device: room::for_activations(device, config, &quantizers, options, rows, plan.needs_reference())?,
        spill: run.store.folder().map(Path::to_owned),
        element: element_bytes::<D>(),
    };
    let mut calibration = Calibration::new(device, config, source, rows, &budget, streams)?;
    let mut stream = calibration.embed()?;
    let mut reference = if plan.needs_reference() { Some(calibration.embed()?) } else { None };
    run.times.setup = run.reporter.elapsed();
    for layer in 0..config.layers.min(last.layer + 1) {
        let span = tracing::info_span!("layer", layer);
        let _guard = span.enter();
        run.layer(layer, &mut calibration, &mut stream, reference.as_mut())?;
        for stream in std::iter::once(&mut stream).chain(&mut reference) {
            run.note_moved(layer, stream);
        }
    }
    if last.module == Module::LmHead {
        run.lm_head(&mut calibration, &mut stream, reference.as_mut())?;
        for stream in std::iter::once(&mut stream).chain(&mut reference) {
            run.note_moved(config.layers, stream);
        }
    }
    report.layers.append(&mut run.layers);
    report.finish(&run.reporter);
    report.times = run.times;
    report.moved = run.moved;
    report.places = Some(stream.places());
    report.device_memory = room::taken(device)?;
    report.device = report.device_memory.map(|_| device.arithmetic());
    Ok(report)
}

/// The layer as the checkpoint has it, and the stream of the unquantised model.
type Reference<'a, D> = Option<(&'a Decoder<D>, &'a mut Stream<D>)>;

impl<'r, D: QuantizeBackend> Run<'r, '_, '_, D> {
    /// Quantises one decoder layer and takes the streams behind it.
    fn layer(
        &mut self,
        layer: usize,
        calibration: &mut Calibration<'_, D>,
        stream: &mut Stream<D>,
        mut reference: Option<&mut Stream<D>>,
    ) -> Result<(), LlamaError> {
        let (device, config, source) = (self.device, self.config, self.source);
        let norms = || Decoder::load(device, config, source, layer);
        let mut quantized = norms()?;
        // The unquantised layer as well, where something has to pass through it.
        let original = if reference.is_some() || !self.options.true_sequential {
            let mut original = norms()?;
            for stage in Stage::ALL {
                let originals = self.read(&stage.layers(layer))?;
                let mut linears = Vec::with_capacity(originals.len());
                for original in &originals {
                    let others = reference.as_deref_mut();
                    let mut streams: Vec<_> = [Some(&mut *stream), others].into_iter().flatten().collect();
                    linears.push(with_room(device, &mut streams, || self.unchanged(original))?);
                }
                original.set(stage, Projections::of(linears));
            }
            Some(original)
        } else {
            None
        };
        if self.options.true_sequential {
            for stage in Stage::ALL {
                let recovered = self.recover(&stage.layers(layer))?;
                let pair = original.as_ref().zip(reference.as_deref_mut());
                let moments =
                    self.collect((layer, stage), &recovered, calibration, &quantized, stream, pair)?;
                self.tell_solving(layer, stage)?;
                let mut streams: Vec<_> =
                    [Some(&mut *stream), reference.as_deref_mut()].into_iter().flatten().collect();
                quantized.set(stage, self.solve(&stage.layers(layer), recovered, moments, &mut streams)?);
            }
        } else {
            let original = original.as_ref().expect("invariant: loaded unless true_sequential");
            let mut copy = calibration.copy(stream)?;
            let mut collected = Vec::with_capacity(Stage::ALL.len());
            for stage in Stage::ALL {
                let recovered = self.recover(&stage.layers(layer))?;
                let pair = reference.as_deref_mut().map(|reference| (original, reference));
                let moments =
                    self.collect((layer, stage), &recovered, calibration, original, &mut copy, pair)?;
                collected.push((recovered, moments));
            }
            drop(copy);
            for (stage, (recovered, moments)) in Stage::ALL.into_iter().zip(collected) {
                self.tell_solving(layer, stage)?;
                let mut streams: Vec<_> =
                    [Some(&mut *stream), reference.as_deref_mut()].into_iter().flatten().collect();
                quantized.set(stage, self.solve(&stage.layers(layer), recovered, moments, &mut streams)?);
            }
            let started = Instant::now();
            for row in 0..calibration.rows() {
                for stage in Stage::ALL {
                    calibration.advance(stage, &quantized, stream, row)?;
                }
            }
            self.times.advance += started.elapsed();
        }
        if layer < self.last {
            let started = Instant::now();
            let rows = calibration.rows();
            for row in 0..rows {
                calibration.finish(&quantized, stream, row)?;
                if let Some((original, reference)) = original.as_ref().zip(reference.as_deref_mut()) {
                    calibration.finish(original, reference, row)?;
                }
                let done = Stage::ALL.len() as f64 + (row + 1) as f64 / rows as f64;
                self.reporter.tell((layer, done), &[], QuantizePhase::Advancing)?;
            }
            // The layer's weights are used until here, and freeing them would wait too.
            device.synchronize()?;
            self.times.advance += started.elapsed();
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
        let norm = load_norm(self.device, self.source, names::FINAL_NORM, self.config.hidden_size)?;
        let mut streams: Vec<_> =
            [Some(&mut *stream), reference.as_deref_mut()].into_iter().flatten().collect();
        let mut sums = match self.sums(&head, &recovered, &mut streams)? {
            Some(sums) => sums,
            None => return self.solve(&head, recovered, None, &mut streams).map(drop),
        };
        let started = Instant::now();
        let rows = calibration.rows();
        for row in 0..rows {
            calibration.normalized(&norm, stream, reference.as_deref_mut(), row, |inputs, reference| {
                sums.add(inputs, reference)
            })?;
            let done = PARTS as f64 * SHARE_OF_CALIBRATION * ((row + 1) as f64 / rows as f64);
            self.reporter.tell((head[0].layer, done), &[Module::LmHead], QuantizePhase::Calibrating)?;
        }
        let solving = (head[0].layer, PARTS as f64 * SHARE_OF_CALIBRATION);
        self.reporter.tell(solving, &[Module::LmHead], QuantizePhase::Solving)?;
        let roundings = self.roundings(&head, &recovered)?;
        let moments = sums.finish(roundings)?;
        self.times.calibrate += started.elapsed();
        let mut streams: Vec<_> = [Some(stream), reference].into_iter().flatten().collect();
        self.solve(&head, recovered, Some(moments), &mut streams).map(drop)
    }

    pub(super) fn read(&self, layers: &[Layer]) -> Result<Vec<Original<'r>>, LlamaError> {
        layers.iter().map(|layer| Original::read(self.source, layer.linear(self.config))).collect()
    }

    /// What an earlier run has left of these layers.
    fn recover(&mut self, layers: &[Layer]) -> Result<Vec<Option<Array2<f32>>>, LlamaError> {
        let planned = |layer| self.plan.get(layer).is_some();
        layers.iter().map(|&layer| if planned(layer) { self.store.weight(layer) } else { Ok(None) }).collect()
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
    ) -> Result<Option<Moments<D>>, LlamaError> {
        let started = Instant::now();
        let others = reference.as_mut().map(|(_, stream)| &mut **stream);
        let mut streams: Vec<_> = [Some(&mut *stream), others].into_iter().flatten().collect();
        let mut sums = self.sums(&stage.layers(layer), recovered, &mut streams)?;
        let rows = calibration.rows();
        for row in 0..rows {
            let mut reference = reference.as_mut().map(|(decoder, stream)| (*decoder, &mut **stream));
            match &mut sums {
                Some(sums) => {
                    let main = (decoder, &mut *stream);
                    calibration.inputs(stage, main, reference, row, |x, reference| sums.add(x, reference))?;
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
        // The device is still at it.
        let roundings = self.roundings(&stage.layers(layer), recovered)?;
        let moments = sums.map(|sums| sums.finish(roundings)).transpose()?;
        self.times.calibrate += started.elapsed();
        Ok(moments)
    }

    fn tell_solving(&mut self, layer: usize, stage: Stage) -> Result<(), LlamaError> {
        let done = stage as usize as f64 + SHARE_OF_CALIBRATION;
        self.reporter.tell((layer, done), stage.modules(), QuantizePhase::Solving)
    }
}
