//! Quantising a model layer by layer.

mod calibrate;
mod layer;

use std::{borrow::Cow, num::NonZeroUsize, time::Duration};

use gptq_core::{Gptq, GptqConfig, Hessian, HessianAccumulator, LayerReport, QuantizedWeight, rtn};
use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::Backend;
use ndarray::Array2;

use crate::{
    Layer, LlamaConfig, LlamaError, Module, Precision, QuantizePhase, TokenRows, Watch, WeightSource,
    progress::Reporter,
    projections::{Preparation, Projections},
    weights::{LinearName, LinearWeight, Tensor, TensorData, read_linear},
};
use calibrate::{Calibration, Stream};
use layer::{Decoder, Stage};

/// How a model is quantised.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct QuantizeOptions {
    /// Settings of the quantiser, the same for every layer.
    pub gptq: GptqConfig,
    /// Within a decoder layer, quantise q, k and v first, then o behind their quantised versions, then gate and up, then
    /// down. Otherwise all seven see the inputs of the unquantised layer.
    pub true_sequential: bool,
    /// Bytes of MLP activations that may be kept between two passes; beyond, they are computed twice.
    pub activation_bytes: usize,
}

impl Default for QuantizeOptions {
    /// Symmetric 4-bit groups of 128, true_sequential, 4 GiB of activations.
    fn default() -> Self {
        Self { gptq: GptqConfig::default(), true_sequential: true, activation_bytes: 4 << 30 }
    }
}

impl QuantizeOptions {
    /// The default for these settings of the quantiser.
    pub fn new(gptq: GptqConfig) -> Self {
        Self { gptq, ..Self::default() }
    }

    /// The recipe with the lowest perplexity: asymmetric, `desc_act`, grids searched under the 2.4-norm, GPTAQ with
    /// strength 0.5.
    ///
    /// It was chosen among about twenty combinations of order, symmetry, grid search, damping and GPTAQ's strength by the
    /// perplexity of the bundled model on the last quarter of its calibration rows, quantised with the other three
    /// quarters. Its price: two passes of calibration instead of one, activations gathered at inference, and
    /// zero points in the `gptq_v2` convention, which old readers do not know.
    ///
    /// Errors: `bits` or `group_size` that cannot be.
    pub fn best(bits: u32, group_size: Option<usize>) -> Result<Self, gptq_core::ConfigError> {
        let builder = GptqConfig::builder().bits(bits).group_size(group_size);
        let builder = builder.sym(false).desc_act(true).mse(Some(2.4)).gptaq(Some(0.5));
        Ok(Self::new(builder.build()?))
    }
}

/// Share of a stage's time that is forward pass and Hessian, for the estimate of the time left.
const SHARE_OF_CALIBRATION: f64 = 0.8;

/// By what a model is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantizeMethod {
    /// [`quantize`]
    Gptq,
    /// [`round_to_nearest`]
    RoundToNearest,
}

impl QuantizeMethod {
    /// `gptq` or `rtn`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::RoundToNearest => "rtn",
        }
    }
}

/// What came of a quantisation.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QuantizeReport {
    /// Every linear layer, in the order of quantisation.
    pub layers: Vec<LayerSummary>,
    /// Wall-clock time in all.
    pub elapsed: Duration,
}

/// What came of one linear layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LayerSummary {
    /// Which one.
    pub layer: Layer,
    /// The quantiser's account.
    pub report: LayerReport,
}

/// Takes the finished layers, one after the other.
pub type LayerSink<'a> = dyn FnMut(Layer, PackedLinear) -> Result<(), LlamaError> + 'a;

/// Quantises all linear layers of a model by GPTQ; embedding, norms and output projection stay as they are.
///
/// Every calibration row runs through the model by itself, from position 0; all its tokens count. The inputs of a layer
/// are those behind its quantised predecessors, with scales in float32 as the solver has them. The forward pass runs on
/// `device` in float32, one decoder layer at a time: memory holds one layer's weights, the residual stream of all rows,
/// and one more activation of all rows.
///
/// Finished layers go to `sink`. Errors: [`LlamaError::AlreadyQuantized`], [`LlamaError::Quantize`] with the layer's name,
/// [`LlamaError::Cancelled`], what `sink` returns, and those of loading.
pub fn quantize<D: Backend>(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    device: &D,
    rows: &TokenRows,
    options: &QuantizeOptions,
    watch: &mut Watch<'_>,
    sink: &mut LayerSink<'_>,
) -> Result<QuantizeReport, LlamaError> {
    let span = tracing::info_span!("quantize", layers = config.layers, rows = rows.rows().len());
    let _guard = span.enter();
    rows.check_vocabulary(config.vocab_size)?;
    let kernels = device.kernels();
    let preparation = Preparation { kernels: &kernels, kernel: None, precision: Precision::Float32 };
    let mut run = Run {
        config,
        source,
        preparation: &preparation,
        options,
        gptq: Gptq::new(options.gptq.clone()),
        reporter: Reporter::new(watch, config.layers, Stage::ALL.len() + 1),
        sink,
        layers: Vec::new(),
    };
    let mut calibration = Calibration::new(device, config, source, rows, options.activation_bytes)?;
    let mut stream = calibration.embed()?;
    let mut reference = options.gptq.gptaq().map(|_| calibration.embed()).transpose()?;
    for layer in 0..config.layers {
        let span = tracing::info_span!("layer", layer);
        let _guard = span.enter();
        run.layer(layer, &mut calibration, &mut stream, reference.as_mut())?;
    }
    Ok(QuantizeReport { layers: run.layers, elapsed: run.reporter.elapsed() })
}

/// Rounds all linear layers of a model to nearest, the baseline of every comparison. Needs no calibration.
///
/// Errors: as [`quantize`].
pub fn round_to_nearest(
    config: &LlamaConfig,
    source: &dyn WeightSource,
    gptq: &GptqConfig,
    watch: &mut Watch<'_>,
    sink: &mut LayerSink<'_>,
) -> Result<QuantizeReport, LlamaError> {
    let span = tracing::info_span!("round_to_nearest", layers = config.layers);
    let _guard = span.enter();
    let mut reporter = Reporter::new(watch, config.layers, Module::ALL.len());
    let mut layers = Vec::new();
    for layer in 0..config.layers {
        for (done, module) in (1..).zip(Module::ALL) {
            let layer = Layer { layer, module };
            let original = Original::read(source, layer.linear(config))?;
            let result = rtn(original.weight.view(), gptq).map_err(|error| original.failed(error))?;
            sink(layer, original.pack(&result, gptq)?)?;
            layers.push(LayerSummary { layer, report: result.report });
            reporter.tell((layer.layer, f64::from(done)), &[module], QuantizePhase::Quantized, None)?;
        }
    }
    Ok(QuantizeReport { layers, elapsed: reporter.elapsed() })
}

/// What stays the same from layer to layer.
struct Run<'r, 'w, 'a, D: Backend> {
    config: &'r LlamaConfig,
    source: &'r dyn WeightSource,
    preparation: &'r Preparation<'r, D>,
    options: &'r QuantizeOptions,
    gptq: Gptq,
    reporter: Reporter<'w, 'a>,
    sink: &'r mut LayerSink<'r>,
    layers: Vec<LayerSummary>,
}

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
                let weights = self.read(layer, stage)?;
                let weights: Vec<_> = weights.into_iter().map(|o| o.with_weight(o.weight.clone())).collect();
                original.set(stage, self.preparation.projections(&weights)?);
            }
            Some(original)
        } else {
            None
        };
        if self.options.true_sequential {
            for stage in Stage::ALL {
                let pair = original.as_ref().zip(reference.as_deref_mut());
                let hessian = self.collect((layer, stage), calibration, &quantized, stream, pair)?;
                let projections = self.solve((layer, stage), hessian)?;
                quantized.set(stage, projections);
            }
        } else {
            let original = original.as_ref().expect("invariant: loaded unless true_sequential");
            let mut copy = calibration.copy(stream)?;
            let mut hessians = Vec::with_capacity(Stage::ALL.len());
            for stage in Stage::ALL {
                let pair = reference.as_deref_mut().map(|reference| (original, reference));
                hessians.push(self.collect((layer, stage), calibration, original, &mut copy, pair)?);
            }
            drop(copy);
            for (stage, hessian) in Stage::ALL.into_iter().zip(hessians) {
                let projections = self.solve((layer, stage), hessian)?;
                quantized.set(stage, projections);
            }
            for row in 0..calibration.rows() {
                for stage in Stage::ALL {
                    calibration.advance(stage, &quantized, stream, row)?;
                }
            }
        }
        if layer + 1 < self.config.layers {
            let rows = calibration.rows();
            for row in 0..rows {
                calibration.finish(&quantized, stream, row)?;
                if let Some((original, reference)) = original.as_ref().zip(reference.as_deref_mut()) {
                    calibration.finish(original, reference, row)?;
                }
                let done = Stage::ALL.len() as f64 + (row + 1) as f64 / rows as f64;
                self.reporter.tell((layer, done), &[], QuantizePhase::Advancing, None)?;
            }
        }
        Ok(())
    }

    fn read(&self, layer: usize, stage: Stage) -> Result<Vec<Original>, LlamaError> {
        let modules = stage.modules().iter();
        modules
            .map(|&module| Original::read(self.source, Layer { layer, module }.linear(self.config)))
            .collect()
    }

    /// Runs all rows up to the inputs of a stage, and takes their second moments.
    fn collect(
        &mut self,
        (layer, stage): (usize, Stage),
        calibration: &mut Calibration<'_, D>,
        decoder: &Decoder<D>,
        stream: &mut Stream<D>,
        mut reference: Option<(&Decoder<D>, &mut Stream<D>)>,
    ) -> Result<Hessian, LlamaError> {
        let first = Layer { layer, module: stage.modules()[0] };
        let failed = |source| LlamaError::Quantize { module: first.to_string(), source };
        let features = first.module.shape(self.config).0;
        let mut sums = match reference {
            Some(_) => HessianAccumulator::with_reference(features),
            None => HessianAccumulator::new(features),
        };
        let rows = calibration.rows();
        for row in 0..rows {
            let inputs = calibration.inputs(stage, decoder, stream, row)?;
            match &mut reference {
                Some((decoder, stream)) => {
                    let reference = calibration.inputs(stage, decoder, stream, row)?;
                    sums.add_batch_with_reference(inputs.view(), reference.view()).map_err(failed)?;
                }
                None => sums.add_batch(inputs.view()).map_err(failed)?,
            }
            let done = stage as usize as f64 + SHARE_OF_CALIBRATION * (row + 1) as f64 / rows as f64;
            self.reporter.tell((layer, done), stage.modules(), QuantizePhase::Calibrating, None)?;
        }
        sums.finish().map_err(failed)
    }

    /// Quantises the layers of a stage and makes their dequantised weights runnable.
    fn solve(
        &mut self,
        (layer, stage): (usize, Stage),
        hessian: Hessian,
    ) -> Result<Projections<D>, LlamaError> {
        let done = stage as usize as f64;
        let solving = (layer, done + SHARE_OF_CALIBRATION);
        self.reporter.tell(solving, stage.modules(), QuantizePhase::Solving, None)?;
        let originals = self.read(layer, stage)?;
        let prepared = self.gptq.prepare(hessian).map_err(|error| originals[0].failed(error))?;
        let mut weights = Vec::with_capacity(originals.len());
        for (&module, original) in stage.modules().iter().zip(&originals) {
            let layer = Layer { layer, module };
            let result = prepared.quantize(original.weight.view()).map_err(|error| original.failed(error))?;
            (self.sink)(layer, original.pack(&result, self.gptq.config())?)?;
            weights.push(original.with_weight(result.dequantize()));
            let loss = result.report.loss;
            tracing::info!(module = %layer, loss, damp = ?result.report.damp, "quantised");
            self.layers.push(LayerSummary { layer, report: result.report });
            let solved = (layer.layer, done + 1.0);
            self.reporter.tell(solved, &[module], QuantizePhase::Quantized, loss)?;
        }
        self.preparation.projections(&weights)
    }
}

/// A layer before it is quantised.
struct Original {
    name: LinearName,
    weight: Array2<f32>,
    bias: Option<Vec<f32>>,
}

impl Original {
    fn read(source: &dyn WeightSource, name: LinearName) -> Result<Self, LlamaError> {
        let LinearWeight::Dense { tensor, bias } = read_linear(source, &name)? else {
            return Err(LlamaError::AlreadyQuantized { tensor: name.module });
        };
        let weight = Array2::from_shape_vec((name.out_features, name.in_features), tensor.to_f32())
            .expect("invariant: read_linear has checked the shape");
        Ok(Self { name, weight, bias })
    }

    fn failed(&self, source: gptq_core::GptqError) -> LlamaError {
        LlamaError::Quantize { module: self.name.module.clone(), source }
    }

    fn pack(&self, result: &QuantizedWeight, gptq: &GptqConfig) -> Result<PackedLinear, LlamaError> {
        let bits = Bits::try_from(gptq.bits()).expect("invariant: both crates know the same widths");
        let codes = result.codes.as_standard_layout();
        let zeros = result.zeros.as_standard_layout();
        let scales = result.scales.as_standard_layout();
        let flat = "invariant: the layout is standard";
        PackedLinear::pack(&CodesRef {
            bits,
            group_size: gptq.group_size().map_or(self.name.in_features, NonZeroUsize::get),
            in_features: self.name.in_features,
            out_features: self.name.out_features,
            codes: codes.as_slice().expect(flat),
            zeros: zeros.as_slice().expect(flat),
            scales: scales.as_slice().expect(flat),
            g_idx: &result.g_idx,
            bias: self.bias.as_deref(),
        })
        .map_err(|source| LlamaError::Pack { tensor: self.name.module.clone(), source })
    }

    /// The layer with `weight` in place of its own.
    fn with_weight(&self, weight: Array2<f32>) -> (LinearName, LinearWeight<'static>) {
        let shape = weight.shape().to_vec();
        let (data, _) = weight.into_raw_vec_and_offset();
        let tensor = Tensor { shape, data: TensorData::F32(Cow::Owned(data)) };
        (self.name.clone(), LinearWeight::Dense { tensor, bias: self.bias.clone() })
    }
}
