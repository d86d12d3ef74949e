use std::num::NonZeroUsize;

use gptq_kernels::Draw;

use crate::{LlamaError, Rng};

/// How the next token is drawn from the logits.
///
/// The steps, in this order: `repetition_penalty` on every token of the prompt and the text so far (a positive logit is
/// divided by it, a negative one multiplied: Keskar et al. 2019, eq. 2); division by `temperature`; the `top_k` most
/// likely tokens; the fewest most likely tokens whose probability reaches `top_p` (Holtzman et al. 2019); tokens at
/// least `min_p` times as likely as the likeliest (Nguyen et al. 2024); one draw. Equally likely tokens are ranked by
/// their number, the lower first.
///
/// Each token takes 64 bits of the generator, and is drawn by the law of [`gptq_kernels::Draw`] on every device: the same logits
/// and the same seed give the same tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Number of tokens to draw from.
    pub top_k: Option<NonZeroUsize>,
    /// Probability to draw from, in `(0, 1]`.
    pub top_p: f32,
    /// Least probability relative to the likeliest token's, in `[0, 1]`.
    pub min_p: f32,
    /// 1 for none; above 1 against repetition.
    pub repetition_penalty: f32,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl Sampling {
    /// Whether the likeliest token is taken as the logits stand.
    pub fn is_argmax(&self) -> bool {
        self.temperature == 0.0 && !self.needs_history()
    }

    /// Errors: [`LlamaError::Sampling`] for a parameter out of range.
    pub fn validate(&self) -> Result<(), LlamaError> {
        let checks = [
            ("temperature", self.temperature, "must be 0 or more", self.temperature >= 0.0),
            ("top_p", self.top_p, "must be in (0, 1]", self.top_p > 0.0 && self.top_p <= 1.0),
            ("min_p", self.min_p, "must be in [0, 1]", (0.0..=1.0).contains(&self.min_p)),
            ("repetition_penalty", self.repetition_penalty, "must be above 0", self.repetition_penalty > 0.0),
        ];
        for (name, value, expected, ok) in checks {
            if !(ok && value.is_finite()) {
                return Err(LlamaError::Sampling { name, value: f64::from(value), expected });
            }
        }
        Ok(())
    }

    /// Draws a token. `history` is the prompt and the text so far; `logits` are changed.
    ///
    /// Errors: [`LlamaError::NonFiniteLogits`].
    pub fn draw(&self, logits: &mut [f32], history: &[u32], rng: &mut Rng) -> Result<u32, LlamaError> {
        self.penalise(logits, history);
        let position = history.len().saturating_sub(1);
        self.of(rng.next_u64()).token(logits).ok_or(LlamaError::NonFiniteLogits { position })
    }

    /// Whether tokens that came before matter, other than through the logits. If not, a device can draw ([`of`](Self::of)).
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// The draw with these 64 random bits, without the penalty: what [`draw`](Self::draw) does, for a [`Turn`](crate::Turn).
    pub fn of(&self, random: u64) -> Draw {
        let top_k = self.top_k.map_or(0, |k| u32::try_from(k.get()).unwrap_or(0));
        Draw { temperature: self.temperature, top_k, top_p: self.top_p, min_p: self.min_p, random }
    }

    fn penalise(&self, logits: &mut [f32], history: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut seen = history.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = match *logit {
                    positive if positive > 0.0 => positive / self.repetition_penalty,
                    other => other * self.repetition_penalty,
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, 2.0, -1.0];

    fn shares(sampling: &Sampling, history: &[u32]) -> [f64; 5] {
        let mut rng = Rng::new(7);
        let mut counts = [0.0; 5];
        let n = 20_000;
        for _ in 0..n {
            let token = sampling.draw(&mut LOGITS.clone(), history, &mut rng).unwrap();
            counts[token as usize] += 1.0 / f64::from(n);
        }
        counts
    }

    /// Shares of n draws stay within five standard deviations, at most 5 * sqrt(0.25 / n).
    fn assert_shares(sampling: &Sampling, history: &[u32], weights: [f64; 5]) {
        let total: f64 = weights.iter().sum();
        for (got, want) in shares(sampling, history).into_iter().zip(weights) {
            assert!(
                (got - want / total).abs() <= 5.0 * (0.25f64 / 20_000.0).sqrt(),
                "{sampling:?}: {got} {want}"
            );
            assert_eq!(want == 0.0, got == 0.0);
        }
    }

    #[test]
    fn temperature_scales_logits() {
        let e = std::f64::consts::E;
        let warm = Sampling { temperature: 1.0, ..Sampling::default() };
        assert_shares(&warm, &[], [1.0, e * e, e, e * e, 1.0 / e]);
        let hot = Sampling { temperature: 2.0, ..Sampling::default() };
        assert_shares(&hot, &[], [1.0, e, e.sqrt(), e, (-0.5f64).exp()]);
    }

    #[test]
    fn filters_keep_the_likeliest() {
        let e = std::f64::consts::E;
        let warm = Sampling { temperature: 1.0, ..Sampling::default() };
        let k = |k| Sampling { top_k: NonZeroUsize::new(k), ..warm.clone() };
        assert_shares(&k(1), &[], [0.0, 1.0, 0.0, 0.0, 0.0]);
        assert_shares(&k(3), &[], [0.0, e, 1.0, e, 0.0]);
        assert_shares(&k(99), &[], [1.0, e * e, e, e * e, 1.0 / e]);
        let p = |top_p| Sampling { top_p, ..warm.clone() };
        // Shares: 0.39, 0.39, 0.14, 0.05, 0.02.
        assert_shares(&p(0.3), &[], [0.0, 1.0, 0.0, 0.0, 0.0]);
        assert_shares(&p(0.7), &[], [0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_shares(&p(0.9), &[], [0.0, e, 1.0, e, 0.0]);
        let m = |min_p| Sampling { min_p, ..warm.clone() };
        assert_shares(&m(1.0), &[], [0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_shares(&m(0.3), &[], [0.0, e, 1.0, e, 0.0]);
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let mut rng = Rng::new(0);
        assert_eq!(Sampling::default().draw(&mut LOGITS.clone(), &[], &mut rng).unwrap(), 1);
        let wary = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(wary.draw(&mut LOGITS.clone(), &[1, 1, 4], &mut rng).unwrap(), 3);
        let mut logits = LOGITS;
        wary.penalise(&mut logits, &[1, 1, 4, 99]);
        assert_eq!(logits, [0.0, 1.0, 1.0, 2.0, -2.0]);
    }

    #[test]
    fn bad_parameters_and_logits() {
        let base = Sampling::default();
        let bad = [
            Sampling { temperature: -1.0, ..base.clone() },
            Sampling { temperature: f32::NAN, ..base.clone() },
            Sampling { top_p: 0.0, ..base.clone() },
            Sampling { top_p: 1.1, ..base.clone() },
            Sampling { min_p: -0.1, ..base.clone() },
            Sampling { repetition_penalty: 0.0, ..base.clone() },
            Sampling { repetition_penalty: f32::INFINITY, ..base.clone() },
        ];
        for sampling in bad {
            assert!(matches!(sampling.validate(), Err(LlamaError::Sampling { .. })), "{sampling:?}");
        }
        base.validate().unwrap();
        let mut rng = Rng::new(0);
        let warm = Sampling { temperature: 1.0, ..base.clone() };
        for (sampling, logit) in [(&base, f32::NAN), (&warm, f32::NAN), (&warm, f32::INFINITY)] {
            let error = sampling.draw(&mut [0.0, logit], &[5, 6], &mut rng).unwrap_err();
            assert!(matches!(error, LlamaError::NonFiniteLogits { position: 1 }));
        }
    }
}
