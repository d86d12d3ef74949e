//! How far a model's predictions move when some of its layers are replaced.

use gptq_format::PackedLinear;
use gptq_kernels::Backend;
use ndarray::{Array2, ArrayView1, Axis};
use rayon::prelude::*;

use crate::{
    Feed, Llama, LlamaConfig, LlamaError, LoadOptions, MemoryWeights, Precision, TokenRows, Wanted,
    WeightSource,
};

/// Tokens fed in one step, at most.
const STEP: usize = 512;

/// The predictions of a model on some rows, to compare others with.
pub(super) struct Predictions<'a, D: Backend + Clone> {
    config: &'a LlamaConfig,
    weights: &'a dyn WeightSource,
    device: &'a D,
    rows: &'a TokenRows,
    /// Logarithms of the probabilities, row by row and step by step, `(tokens, vocab_size)`.
    reference: Vec<Array2<f32>>,
}

impl<'a, D: Backend + Clone> Predictions<'a, D> {
    pub(super) fn new(
        config: &'a LlamaConfig,
        weights: &'a dyn WeightSource,
        device: &'a D,
        rows: &'a TokenRows,
    ) -> Result<Self, LlamaError> {
        rows.check_vocabulary(config.vocab_size)?;
        let mut predictions = Self { config, weights, device, rows, reference: Vec::new() };
        let mut reference = Vec::new();
        predictions.predict(weights, &mut |logs| reference.push(logs))?;
        predictions.reference = reference;
        Ok(predictions)
    }

    /// The mean Kullback-Leibler divergence of the predictions with these layers replaced from those without, in nats a
    /// token.
    pub(super) fn with(&self, layers: Vec<(String, PackedLinear)>) -> Result<f64, LlamaError> {
        let mut weights = MemoryWeights::in_front_of(self.weights);
        for (name, packed) in layers {
            weights.insert_packed(&name, packed);
        }
        let mut references = self.reference.iter();
        let mut sum = 0.0;
        self.predict(&weights, &mut |logs| {
            let reference = references.next().expect("invariant: the same rows in the same steps");
            let rows: Vec<f64> = reference
                .axis_iter(Axis(0))
                .into_par_iter()
                .zip(logs.axis_iter(Axis(0)))
                .map(|(p, q)| divergence(p, q))
                .collect();
            sum += rows.iter().sum::<f64>();
        })?;
        // Rounding can make a divergence of nothing negative.
        Ok((sum / self.rows.tokens() as f64).max(0.0))
    }

    fn predict(
        &self,
        weights: &dyn WeightSource,
        take: &mut dyn FnMut(Array2<f32>),
    ) -> Result<(), LlamaError> {
        let options = LoadOptions::default().with_precision(Precision::Float32);
        let model = Llama::from_source(self.config.clone(), weights, self.device.clone(), &options)?;
        let mut cache = model.cache(self.rows.longest())?;
        for row in self.rows.rows() {
            let sequence = cache.add();
            for (step, tokens) in row.chunks(STEP).enumerate() {
                let feed = Feed { sequence, tokens, logits: Wanted::All };
                let mut logits = model.forward(&mut cache, &[feed])?.to_array()?;
                let bad = logits.axis_iter_mut(Axis(0)).into_par_iter().position_first(|mut logits| {
                    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
                    let log = (f64::from(max) + sum.ln()) as f32;
                    logits.mapv_inplace(|logit| logit - log);
                    !log.is_finite()
                });
                if let Some(bad) = bad {
                    return Err(LlamaError::NonFiniteLogits { position: step * STEP + bad });
                }
                take(logits);
            }
            cache.remove(sequence)?;
        }
        Ok(())
    }
}

/// `sum p (log p - log q)` of logarithms.
fn divergence(p: ArrayView1<'_, f32>, q: ArrayView1<'_, f32>) -> f64 {
    p.iter().zip(q).map(|(&p, &q)| f64::from(p.exp()) * f64::from(p - q)).sum()
}
