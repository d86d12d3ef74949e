//! Drawing a token from logits, by a law that every device follows to the bit.
//!
//! All that is added up is an integer, so that no order of summation changes anything. With `d` the distance of a logit to the
//! largest, in float32, and `e = d * rate` rounded once, `rate = log2(e) / temperature`:
//!
//! ```text
//! weight = trunc(2^40 * 2^-e), 0 from e = 41 on
//! 2^-e   = 2^-i * p(e - i),  i = floor(e + 1/2),  p the Taylor polynomial of 2^-f of degree 6, by Horner, each step rounded
//! ```
//!
//! which is within `2^-21` of the exponential; the likeliest token has the weight `2^40`. Tokens are ranked by their logits, equal
//! ones by their number, the lower first. `top_k` keeps the first ones; `top_p` the fewest first ones of these whose weights
//! reach `ceil(top_p * sum)`, product in float64; `min_p` those of these with a weight of at least `ceil(min_p * 2^40)`. Of
//! what is left the sum `s` is the range of the draw: the token is the first, by number, at which the running sum exceeds
//! `floor(random * s / 2^64)`.

/// How one token is drawn from one row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Most likely tokens that are kept; 0 for all.
    pub top_k: u32,
    /// Probability that is kept, in `(0, 1]`.
    pub top_p: f32,
    /// Least probability relative to the likeliest token's, in `[0, 1]`.
    pub min_p: f32,
    /// 64 uniform bits.
    pub random: u64,
}

/// The weight of the likeliest token.
const ONE: f32 = (1u64 << 40) as f32;
/// Distances, in powers of two, from which on a token weighs nothing.
const FAR: f32 = 41.0;
/// `(-ln 2)^k / k!`, k from 6 down to 0.
const POWER: [f32; 7] =
    [1.540_353e-4, -1.333_355_8e-3, 9.618_129e-3, -5.550_411e-2, 2.402_265e-1, -std::f32::consts::LN_2, 1.0];

impl Draw {
    /// The likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0 };

    /// Whether the likeliest token is taken, whatever the other parameters are.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Powers of two by which a token's weight falls as its logit falls by one. Finite, so that no product is NaN.
    pub(crate) fn rate(&self) -> f32 {
        ((std::f64::consts::LOG2_E / f64::from(self.temperature)) as f32).min(f32::MAX)
    }

    /// Weights below this are not kept.
    pub(crate) fn least(&self) -> u64 {
        (f64::from(self.min_p) * f64::from(ONE)).ceil() as u64
    }

    /// The token, or `None` if a logit is NaN, or infinite and the draw is not greedy, or there are none.
    pub fn token(&self, logits: &[f32]) -> Option<u32> {
        let best = likeliest(logits)?;
        if self.is_greedy() {
            return Some(best as u32);
        }
        let largest = logits[best];
        if largest == f32::INFINITY {
            return None;
        }
        let rate = self.rate();
        let mut weights: Vec<u64> = logits.iter().map(|&logit| weight(largest - logit, rate)).collect();
        let k = if self.top_k == 0 { logits.len() } else { logits.len().min(self.top_k as usize) };
        if k < logits.len() || self.top_p < 1.0 {
            let mut ranks: Vec<u32> = (0..logits.len() as u32).collect();
            let before = |a: &u32, b: &u32| {
                let (x, y) = (logits[*a as usize], logits[*b as usize]);
                y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
            };
            if k < ranks.len() {
                ranks.select_nth_unstable_by(k, before);
            }
            let kept = match self.top_p < 1.0 {
                true => {
                    let sum: u64 = ranks[..k].iter().map(|&token| weights[token as usize]).sum();
                    let needed = (sum as f64 * f64::from(self.top_p)).ceil() as u64;
                    shortest_prefix(&mut ranks[..k], &weights, needed, before)
                }
                false => k,
            };
            for &token in &ranks[kept..] {
                weights[token as usize] = 0;
            }
        }
        let least = self.least();
        for weight in &mut weights {
            if *weight < least {
                *weight = 0;
            }
        }
        let sum: u64 = weights.iter().sum();
        let target = ((u128::from(self.random) * u128::from(sum)) >> 64) as u64;
        let mut running = 0;
        let found = weights.iter().position(|&weight| {
            running += weight;
            running > target
        });
        found.map(|token| token as u32)
    }
}

/// The first of the largest, `None` if there is a NaN or nothing.
fn likeliest(logits: &[f32]) -> Option<usize> {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if logit > logits[best] {
            best = i;
        }
    }
    (!logits.is_empty()).then_some(best)
}

/// What a token weighs whose logit is `distance` below the largest.
fn weight(distance: f32, rate: f32) -> u64 {
    let e = distance * rate;
    // Also where the largest logit is that of an impossible token, and the distance is NaN.
    if e.is_nan() || e >= FAR {
        return if e.is_nan() { ONE as u64 } else { 0 };
    }
    let i = (e + 0.5).floor();
    let f = e - i;
    let power = POWER.into_iter().reduce(|sum, coefficient| sum * f + coefficient).unwrap_or(1.0);
    // 2^(40 - i), exact: i is at most 41.
    let scale = f32::from_bits((127 + 40 - i as u32) << 23);
    (power * scale) as u64
}

/// Length of the shortest prefix of the order whose weights reach `needed`; at least one. Puts that prefix in front.
fn shortest_prefix(
    ranks: &mut [u32],
    weights: &[u64],
    mut needed: u64,
    before: impl Fn(&u32, &u32) -> std::cmp::Ordering,
) -> usize {
    let (mut low, mut high) = (0, ranks.len());
    while high - low > 1 {
        let middle = (high - low) / 2;
        ranks[low..high].select_nth_unstable_by(middle, &before);
        let sum: u64 = ranks[low..low + middle].iter().map(|&token| weights[token as usize]).sum();
        if sum >= needed {
            high = low + middle;
        } else {
            needed -= sum;
            low += middle;
        }
    }
    high
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The law, word for word, with one sort.
    fn by_sorting(draw: &Draw, logits: &[f32]) -> u32 {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<u64> = logits.iter().map(|l| weight(largest - l, draw.rate())).collect();
        let mut ranks: Vec<usize> = (0..logits.len()).collect();
        ranks.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
        if draw.top_k > 0 {
            ranks.truncate(draw.top_k as usize);
        }
        let sum: u64 = ranks.iter().map(|&t| weights[t]).sum();
        let (needed, mut mass) = ((sum as f64 * f64::from(draw.top_p)).ceil() as u64, 0);
        if draw.top_p < 1.0 {
            let reached = ranks.iter().position(|&t| {
                mass += weights[t];
                mass >= needed
            });
            ranks.truncate(reached.unwrap() + 1);
        }
        ranks.retain(|&t| weights[t] as f64 >= f64::from(draw.min_p) * 2f64.powi(40));
        ranks.sort_unstable();
        let sum: u64 = ranks.iter().map(|&t| weights[t]).sum();
        let target = ((u128::from(draw.random) * u128::from(sum)) >> 64) as u64;
        let mut running = 0;
        let found = ranks.iter().find(|&&t| {
            running += weights[t];
            running > target
        });
        *found.unwrap() as u32
    }

    #[test]
    fn weights_are_the_exponential() {
        assert_eq!(weight(0.0, 3.7), 1 << 40);
        for i in 0..4000 {
            let e = i as f32 / 100.0;
            let want = 2f64.powf(40.0 - f64::from(e));
            // The polynomial ends before (ln 2 / 2)^7 / 7! < 2^-22.9, of a value that is at least 0.7; the roundings of the
            // last step of Horner, 2^-24 of what it gives and 2^-24 of its product, and less for those before; then what is
            // cut off.
            let bound = want * (2f64.powf(-22.9) / 0.7 + 3.0 * 2f64.powi(-24)) + 1.0;
            assert!((weight(e, 1.0) as f64 - want).abs() <= bound, "{e}");
        }
        assert_eq!((weight(41.0, 1.0), weight(f32::INFINITY, 1.0), weight(1e30, f32::MAX)), (0, 0, 0));
    }

    #[test]
    fn logits_that_are_no_numbers() {
        let draw = Draw { temperature: 1.0, random: 1 << 63, ..Draw::GREEDY };
        for draw in [draw, Draw::GREEDY] {
            assert_eq!(draw.token(&[]), None);
            assert_eq!(draw.token(&[0.0, f32::NAN]), None);
            assert_eq!(draw.token(&[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]), Some(1));
        }
        assert_eq!(draw.token(&[0.0, f32::INFINITY]), None);
        assert_eq!(Draw::GREEDY.token(&[0.0, f32::INFINITY, f32::INFINITY]), Some(1));
        // Nothing is possible, or all the same.
        assert_eq!(draw.token(&[f32::NEG_INFINITY; 4]), Some(2));
        assert_eq!(Draw { temperature: f32::MIN_POSITIVE, ..draw }.token(&[1.0, 2.0, 2.0]), Some(2));
    }

    proptest! {
        #[test]
        fn tokens_follow_the_law(
            logits in prop::collection::vec(-30i32..30, 1..200),
            (temperature, top_k, random) in (0.05f32..3.0, 0u32..40, any::<u64>()),
            (top_p, min_p) in (prop_oneof![Just(1.0f32), 0.01f32..1.0], prop_oneof![Just(0.0f32), 0.0f32..=1.0]),
        ) {
            // Many are equal.
            let logits: Vec<f32> = logits.into_iter().map(|l| l as f32 / 4.0).collect();
            let draw = Draw { temperature, top_k, top_p, min_p, random };
            prop_assert_eq!(draw.token(&logits), Some(by_sorting(&draw, &logits)));
        }
    }
}
