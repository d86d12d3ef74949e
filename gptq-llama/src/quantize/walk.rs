//! Runs rows through a model and hands out what its linear layers see.

use gptq_kernels::{Fusion, MatRef, quantize::QuantizeBackend};
use ndarray::Array2;

use super::{
    activations::{Budget, element_bytes},
    calibrate::Calibration,
    layer::{Decoder, Stage},
    state::{PARTS, SHARE_OF_CALIBRATION, preparation},
};
use crate::{
    Layer, LlamaConfig, LlamaError, Module, QuantizePhase, TokenRows, Watch, WeightSource, model::load_norm,
    names, progress::Reporter, projections::Preparation, weights::read_linear,
};

/// Rows on their way through one or two models, decoder layer by decoder layer.
pub(super) struct Walk<'a, D: QuantizeBackend> {
    pub(super) config: &'a LlamaConfig,
    pub(super) device: &'a D,
    pub(super) rows: &'a TokenRows,
    /// The model that the rows run through, quantised or not.
    pub(super) model: &'a dyn WeightSource,
    /// Another one that they run through side by side with it.
    pub(super) reference: Option<&'a dyn WeightSource>,
    pub(super) activation_bytes: usize,
}

/// Takes the inputs of layers.
pub(super) trait Visitor {
    /// Whether the inputs of these layers, which share them, are wanted.
    fn wants(&self, layers: &[Layer]) -> bool;

    /// Takes one row's inputs `(tokens, in_features)` in the model, and in the reference if there is one.
    fn row(
        &mut self,
        layers: &[Layer],
        row: usize,
        inputs: Array2<f32>,
        reference: Option<Array2<f32>>,
    ) -> Result<(), LlamaError>;

    /// Is told that all rows have been there.
    fn finish(&mut self, layers: &[Layer]) -> Result<(), LlamaError>;
}

impl<D: QuantizeBackend> Walk<'_, D> {
    /// Goes as far as `visitor` wants something.
    pub(super) fn run(&self, visitor: &mut dyn Visitor, watch: &mut Watch<'_>) -> Result<(), LlamaError> {
        self.rows.check_vocabulary(self.config.vocab_size)?;
        let head = [Layer::lm_head(self.config)];
        let wants_head = visitor.wants(&head);
        let wanted = |layer: &usize| Stage::ALL.iter().any(|stage| visitor.wants(&stage.layers(*layer)));
        let layers = match wants_head {
            true => self.config.layers,
            false => (0..self.config.layers).rev().find(wanted).map_or(0, |last| last + 1),
        };
        let kernels = self.device.kernels();
        let preparation = preparation::<D>(&kernels);
        let budget =
            Budget { bytes: self.activation_bytes, device: None, spill: None, element: element_bytes::<D>() };
        let streams = 1 + usize::from(self.reference.is_some());
        let mut calibration =
            Calibration::new(self.device, self.config, self.model, self.rows, &budget, streams)?;
        let mut stream = calibration.embed()?;
        let mut beside = self.reference.map(|_| calibration.embed()).transpose()?;
        let mut reporter = Reporter::new(watch, layers, wants_head, PARTS);
        for layer in 0..layers {
            let decoder = self.decoder(&preparation, self.model, layer)?;
            let reference = match self.reference {
                Some(reference) => Some(self.decoder(&preparation, reference, layer)?),
                None => None,
            };
            for stage in Stage::ALL {
                let members = stage.layers(layer);
                let wanted = visitor.wants(&members);
                let phase = if wanted { QuantizePhase::Calibrating } else { QuantizePhase::Advancing };
                for row in 0..calibration.rows() {
                    let beside = reference.as_ref().zip(beside.as_mut());
                    if wanted {
                        let main = (&decoder, &mut stream);
                        calibration.inputs(stage, main, beside, row, |inputs, reference| {
                            let reference =
                                reference.map(|reference| self.download(reference)).transpose()?;
                            visitor.row(&members, row, self.download(inputs)?, reference)
                        })?;
                    } else {
                        calibration.pass(stage, &decoder, &mut stream, row)?;
                        if let Some((decoder, stream)) = beside {
                            calibration.pass(stage, decoder, stream, row)?;
                        }
                    }
                    let share = (row + 1) as f64 / calibration.rows() as f64;
                    let done = stage as usize as f64 + SHARE_OF_CALIBRATION * share;
                    reporter.tell((layer, done), stage.modules(), phase)?;
                }
                if wanted {
                    let done = stage as usize as f64 + SHARE_OF_CALIBRATION;
                    reporter.tell((layer, done), stage.modules(), QuantizePhase::Solving)?;
                    visitor.finish(&members)?;
                }
            }
            if layer + 1 == layers && !wants_head {
                break;
            }
            for row in 0..calibration.rows() {
                calibration.finish(&decoder, &mut stream, row)?;
                if let Some((decoder, stream)) = reference.as_ref().zip(beside.as_mut()) {
                    calibration.finish(decoder, stream, row)?;
                }
                let done = Stage::ALL.len() as f64 + (row + 1) as f64 / calibration.rows() as f64;
                reporter.tell((layer, done), &[], QuantizePhase::Advancing)?;
            }
        }
        if wants_head {
            let hidden = self.config.hidden_size;
            let norm = load_norm(self.device, self.model, names::FINAL_NORM, hidden)?;
            for row in 0..calibration.rows() {
                calibration.normalized(&norm, &mut stream, beside.as_mut(), row, |inputs, reference| {
                    let reference = reference.map(|reference| self.download(reference)).transpose()?;
                    visitor.row(&head, row, self.download(inputs)?, reference)
                })?;
            }
            reporter.tell((layers, 0.0), &[Module::LmHead], QuantizePhase::Solving)?;
            visitor.finish(&head)?;
        }
        Ok(())
    }

    fn download(&self, matrix: MatRef<'_, D>) -> Result<Array2<f32>, LlamaError> {
        let mut array = Array2::zeros((matrix.rows(), matrix.cols()));
        let flat = array.as_slice_mut().expect("invariant: a new array is contiguous");
        self.device.download(matrix.data(), flat)?;
        Ok(array)
    }

    /// A whole decoder layer.
    fn decoder(
        &self,
        preparation: &Preparation<'_, D>,
        source: &dyn WeightSource,
        layer: usize,
    ) -> Result<Decoder<D>, LlamaError> {
        let mut decoder = Decoder::load(self.device, self.config, source, layer)?;
        for stage in Stage::ALL {
            let names = stage.layers(layer).into_iter().map(|layer| layer.linear(self.config));
            let weights = names.map(|name| {
                let weight = read_linear(source, &name)?;
                Ok((name, weight))
            });
            let weights: Vec<_> = weights.collect::<Result<_, LlamaError>>()?;
            decoder.set(stage, preparation.fused_projections(weights, Fusion::default())?);
        }
        Ok(decoder)
    }
}
