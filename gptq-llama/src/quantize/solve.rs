//! From second moments to quantised layers.

use std::time::{Duration, Instant};

use gptq_core::GptqConfig;
use gptq_kernels::{
    Linear, MatRef,
    quantize::{QuantizeBackend, Quantizer},
};
use ndarray::Array2;

use super::{
    LayerSummary,
    baseline::{Baseline, Rounding, sample},
    calibrate::Stream,
    layer::Stage,
    original::Original,
    quantizers::in_module,
    record::Finished,
    room::with_room,
    state::{PARTS, Run},
};
use crate::{
    Layer, LlamaError,
    buffers::{mat, mat_mut},
    projections::Projections,
};

/// Second moments, how long their inputs took, and the rounding errors of the layers that are to be quantised.
pub(super) struct Moments<D: QuantizeBackend> {
    moments: <D::Quantizer as Quantizer<D>>::Moments,
    roundings: Vec<Option<Rounding>>,
    calibration: Duration,
}

/// Second moments of the inputs that some layers share.
pub(super) struct Sums<'q, D: QuantizeBackend> {
    /// The first of the layers, for errors.
    module: Layer,
    with_reference: bool,
    quantizer: &'q D::Quantizer,
    sums: <D::Quantizer as Quantizer<D>>::Sums,
    start: Instant,
}

impl<D: QuantizeBackend> Sums<'_, D> {
    /// Adds inputs `(tokens, in_features)`.
    pub(super) fn add(
        &mut self,
        inputs: MatRef<'_, D>,
        reference: Option<MatRef<'_, D>>,
    ) -> Result<(), LlamaError> {
        let reference = reference.filter(|_| self.with_reference);
        self.quantizer
            .add_batch(&mut self.sums, inputs, reference)
            .map_err(|error| in_module(&self.module.to_string(), error))
    }

    pub(super) fn finish(self, roundings: Vec<Option<Rounding>>) -> Result<Moments<D>, LlamaError> {
        let Self { module, quantizer, sums, start, .. } = self;
        let moments = quantizer.finish(sums).map_err(|error| in_module(&module.to_string(), error))?;
        Ok(Moments { moments, roundings, calibration: start.elapsed() })
    }
}

/// Layers that share settings, and so a factorisation.
type Group<'p> = (&'p GptqConfig, Vec<usize>);

impl<'r, D: QuantizeBackend> Run<'r, '_, '_, D> {
    /// Empty second moments of the inputs of these layers; `None` if nobody needs them.
    pub(super) fn sums(
        &self,
        layers: &[Layer],
        recovered: &[Option<Array2<f32>>],
        streams: &mut [&mut Stream<D>],
    ) -> Result<Option<Sums<'r, D>>, LlamaError> {
        let open = layers.iter().zip(recovered).filter(|(_, recovered)| recovered.is_none());
        let settings: Vec<&GptqConfig> = open.filter_map(|(&layer, _)| self.plan.get(layer)).collect();
        let Some(first) = settings.first() else { return Ok(None) };
        let (module, features) = (layers[0], layers[0].module.shape(self.config).0);
        let corrected = settings.iter().find(|settings| settings.gptaq().is_some());
        let quantizer = self.quantizers.get(corrected.unwrap_or(first));
        let sums = with_room(self.device, streams, || {
            quantizer.sums(features).map_err(|error| in_module(&module.to_string(), error))
        })?;
        Ok(Some(Sums { module, with_reference: corrected.is_some(), quantizer, sums, start: Instant::now() }))
    }

    /// The rounding errors of layers that are to be quantised.
    pub(super) fn roundings(
        &self,
        layers: &[Layer],
        recovered: &[Option<Array2<f32>>],
    ) -> Result<Vec<Option<Rounding>>, LlamaError> {
        let mut roundings = Vec::with_capacity(layers.len());
        for (&layer, recovered) in layers.iter().zip(recovered) {
            let settings = self.plan.get(layer).filter(|_| recovered.is_none());
            let rounding = match settings {
                Some(settings) => {
                    let original = Original::read(self.source, layer.linear(self.config))?;
                    let rows = original.name().out_features;
                    Rounding::new(original.rows(&sample(rows)).view(), rows, settings)
                }
                None => None,
            };
            roundings.push(rounding);
        }
        Ok(roundings)
    }

    /// A layer as the checkpoint has it, in the device's type.
    pub(super) fn unchanged(&self, original: &Original<'_>) -> Result<Box<dyn Linear<D>>, LlamaError> {
        self.uploaded(original, original.weight())
    }

    /// A layer with `weight` in place of its own.
    fn uploaded(
        &self,
        original: &Original<'_>,
        weight: Array2<f32>,
    ) -> Result<Box<dyn Linear<D>>, LlamaError> {
        let (name, (flat, _)) = (original.name(), weight.into_raw_vec_and_offset());
        let mut buffer = self.device.alloc(flat.len())?;
        self.device.upload(&flat, D::slice_mut(&mut buffer, 0..flat.len()))?;
        let weight = mat(&buffer, name.out_features, name.in_features)?;
        self.preparation.resident(name, D::ELEMENT, weight, original.bias())
    }

    /// Quantises layers that share an input, as far as they are not recovered, and returns what the model goes on with.
    /// `moments` are there if some layer needs them; rows of `streams` leave the device if it has no room.
    pub(super) fn solve(
        &mut self,
        layers: &[Layer],
        recovered: Vec<Option<Array2<f32>>>,
        moments: Option<Moments<D>>,
        streams: &mut [&mut Stream<D>],
    ) -> Result<Projections<D>, LlamaError> {
        let device = self.device;
        let originals = self.read(layers)?;
        let mut linears: Vec<Option<Box<dyn Linear<D>>>> = layers.iter().map(|_| None).collect();
        let mut groups: Vec<Group<'_>> = Vec::new();
        let started = Instant::now();
        for (index, recovered) in recovered.into_iter().enumerate() {
            let original = &originals[index];
            match (recovered, self.plan.get(layers[index])) {
                (Some(weight), _) => {
                    linears[index] =
                        Some(with_room(device, streams, || self.uploaded(original, weight.clone()))?);
                }
                (None, None) => {
                    linears[index] = Some(with_room(device, streams, || self.unchanged(original))?);
                }
                (None, Some(settings)) => match groups.iter_mut().find(|(other, _)| *other == settings) {
                    Some((_, members)) => members.push(index),
                    None => groups.push((settings, vec![index])),
                },
            }
        }
        self.times.read += started.elapsed();
        let Some(Moments { moments, roundings, calibration }) = moments else {
            return Ok(Projections::of(linears.into_iter().flatten().collect()));
        };
        let started = Instant::now();
        let mut baselines: Vec<Option<Baseline>> = layers.iter().map(|_| None).collect();
        for (settings, members) in &groups {
            for &index in members {
                let Some(rounding) = &roundings[index] else { continue };
                let baseline = Baseline::new(rounding, self.quantizers.get(settings), &moments);
                baselines[index] =
                    Some(baseline.map_err(|error| in_module(&layers[index].to_string(), error))?);
            }
        }
        self.times.baseline += started.elapsed();
        let (count, mut moments) = (groups.len(), Some(moments));
        for (number, (settings, members)) in groups.into_iter().enumerate() {
            let quantizer = self.quantizers.get(settings);
            let module = layers[members[0]].to_string();
            let started = Instant::now();
            let prepared = with_room(device, streams, || {
                let moments = moments.as_ref().expect("invariant: kept until the last settings");
                quantizer.prepare_moments(moments).map_err(|error| in_module(&module, error))
            })?;
            if number + 1 == count {
                moments = None;
            }
            self.times.factorize += started.elapsed();
            for index in members {
                let (baseline, original) = (baselines[index].take(), &originals[index]);
                let linear = self.quantize(
                    (layers[index], original),
                    (quantizer, &prepared),
                    (baseline, calibration),
                    streams,
                )?;
                linears[index] = Some(linear);
            }
        }
        Ok(Projections::of(linears.into_iter().flatten().collect()))
    }

    /// Quantises one layer, hands it to the store, and returns it dequantised.
    fn quantize(
        &mut self,
        (layer, original): (Layer, &Original<'_>),
        (quantizer, prepared): (&D::Quantizer, &<D::Quantizer as Quantizer<D>>::Prepared),
        (baseline, calibration): (Option<Baseline>, Duration),
        streams: &mut [&mut Stream<D>],
    ) -> Result<Box<dyn Linear<D>>, LlamaError> {
        let (device, name) = (self.device, original.name());
        let failed = |error| in_module(&name.module, error);
        let started = Instant::now();
        let result =
            with_room(device, streams, || quantizer.quantize(prepared, &original.dense()).map_err(failed))?;
        let linear = with_room(device, streams, || {
            let mut weight = device.alloc(name.out_features * name.in_features)?;
            let y = mat_mut(&mut weight, name.out_features, name.in_features)?;
            quantizer.dequantize(&result, y).map_err(failed)?;
            let weight = mat(&weight, name.out_features, name.in_features)?;
            self.preparation.resident(name, D::ELEMENT, weight, original.bias())
        })?;
        let solved = Instant::now();
        let packed = with_room(device, streams, || quantizer.pack(&result, original.bias()).map_err(failed))?;
        let report = quantizer.report(&result).clone();
        let rtn_loss = baseline.as_ref().and_then(|baseline| baseline.loss(&report));
        let output_norm = baseline.map(|baseline| baseline.norm());
        let memory = self.reporter.memory();
        let summary = LayerSummary { layer, report, rtn_loss, output_norm, calibration, memory };
        let (loss, damp) = (summary.report.loss, &summary.report.damp);
        tracing::info!(module = %layer, loss, rtn_loss, ?damp, "quantised");
        self.layers.push(summary.clone());
        let scales = quantizer.scales(&result);
        let stored = Instant::now();
        self.store.put(Finished { packed, scales, summary: summary.clone() })?;
        self.times.solve += solved - started;
        self.times.pack += stored - solved;
        self.times.wait += stored.elapsed();
        let done = match Stage::of(layer.module) {
            Some(stage) => stage as usize as f64 + 1.0,
            None => PARTS as f64,
        };
        self.reporter.finished((layer.layer, done), &summary)?;
        Ok(linear)
    }
}
