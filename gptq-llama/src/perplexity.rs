use gptq_kernels::Backend;
use ndarray::Axis;
use rayon::prelude::*;

use crate::{Feed, Llama, LlamaError, TokenRows, Wanted};

/// Logits computed in one step, at most: 64 MiB of float32.
const LOGITS: usize = 1 << 24;

/// Tokens fed in one step, at most.
const STEP: usize = 512;

/// How well a model predicts some rows of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Sum of the negative log-likelihoods, in nats.
    pub nll: f64,
    /// Predicted tokens.
    pub tokens: usize,
}

impl Perplexity {
    /// `exp(nll / tokens)`.
    pub fn value(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }
}

/// Perplexity of a model over rows of tokens: the exponential of the mean negative log-likelihood of tokens `1..n` of
/// each row of `n`, every row beginning at position 0.
///
/// The forward pass has the precision that the model was loaded with; `log(sum(exp))` and the mean are in float64.
/// `progress` is called after each row with the number of rows done and the result so far.
///
/// Errors: [`LlamaError::ShortRow`], [`LlamaError::Token`], [`LlamaError::NonFiniteLogits`].
pub fn perplexity<D: Backend>(
    model: &Llama<D>,
    rows: &TokenRows,
    mut progress: impl FnMut(usize, Perplexity),
) -> Result<Perplexity, LlamaError> {
    let span = tracing::info_span!("perplexity", rows = rows.rows().len());
    let _guard = span.enter();
    rows.check_vocabulary(model.config().vocab_size)?;
    if let Some(row) = rows.rows().iter().position(|row| row.len() < 2) {
        return Err(LlamaError::ShortRow { row, tokens: rows.rows()[row].len() });
    }
    let step = (LOGITS / model.config().vocab_size).clamp(32, STEP);
    let mut cache = model.cache(rows.longest())?;
    let mut total = Perplexity { nll: 0.0, tokens: 0 };
    for (done, row) in rows.rows().iter().enumerate() {
        let sequence = cache.add();
        let inputs = &row[..row.len() - 1];
        for (i, tokens) in inputs.chunks(step).enumerate() {
            let feed = Feed { sequence, tokens, logits: Wanted::All };
            let logits = model.forward(&mut cache, &[feed])?.to_array()?;
            let targets = &row[i * step + 1..];
            let losses: Vec<f64> = logits
                .axis_iter(Axis(0))
                .into_par_iter()
                .zip(targets.par_iter().take(tokens.len()))
                .map(|(logits, &target)| {
                    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
                    sum.ln() + f64::from(max) - f64::from(logits[target as usize])
                })
                .collect();
            if let Some(bad) = losses.iter().position(|loss| !loss.is_finite()) {
                return Err(LlamaError::NonFiniteLogits { position: i * step + bad });
            }
            total.nll += losses.iter().sum::<f64>();
            total.tokens += losses.len();
        }
        cache.remove(sequence)?;
        progress(done + 1, total);
    }
    Ok(total)
}
