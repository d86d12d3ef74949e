//! Which format for which layers, when the bits are limited.

use std::num::NonZeroUsize;

use gptq_format::{Bits, DynamicRules};
use serde_json::{Map, Value, json};

use crate::Layer;

/// What decides about the size of a quantised layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerFormat {
    /// Width of a code.
    pub bits: Bits,
    /// Input features that share a scale; `None` for all.
    pub group_size: Option<NonZeroUsize>,
}

impl LayerFormat {
    /// Bits that a layer takes in a checkpoint: codes, zero points, scales and `g_idx`, without a bias.
    pub fn stored_bits(self, in_features: usize, out_features: usize) -> u64 {
        let groups = self.group_size.map_or(1, |size| in_features.div_ceil(size.get()));
        let words = self.bits.words(in_features) * out_features
            + groups * self.bits.words(out_features)
            + in_features;
        32 * words as u64 + 16 * (groups * out_features) as u64
    }
}

impl std::fmt::Display for LayerFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.group_size {
            Some(size) => write!(f, "{}-bit g{size}", self.bits.get()),
            None => write!(f, "{}-bit by row", self.bits.get()),
        }
    }
}

/// Layers that get one format, and what each format would cost them.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The layers.
    pub layers: Vec<Layer>,
    /// The formats to choose from, at least one.
    pub options: Vec<FormatCost>,
}

/// What a format costs some layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FormatCost {
    /// The format.
    pub format: LayerFormat,
    /// Bits in the checkpoint, [`LayerFormat::stored_bits`] of all layers of the choice.
    pub bits: u64,
    /// The harm that it does, at least 0, in a unit in which the harm to several layers adds up.
    pub cost: f64,
}

/// A format for every choice.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Allocation {
    /// The layers of every choice and their format, in the order given.
    pub formats: Vec<(Vec<Layer>, LayerFormat)>,
    /// Bits of all layers.
    pub bits: u64,
    /// Sum of the costs.
    pub cost: f64,
}

/// Why no allocation can be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BudgetError {
    /// Even the smallest formats take more.
    #[error("a budget of {budget} bits: the smallest formats take {smallest}")]
    TooSmall {
        /// The budget.
        budget: u64,
        /// Bits of the smallest formats.
        smallest: u64,
    },
    /// A choice between nothing, or between more than can be numbered.
    #[error("{layer}: {options} formats to choose from, there must be 1 to 65535")]
    Options {
        /// A layer of the choice, or `no layer`.
        layer: String,
        /// How many there are.
        options: usize,
    },
    /// A cost that is no number, or negative.
    #[error("{layer}: {format} costs {cost}, which is no finite number of at least 0")]
    Cost {
        /// A layer of the choice, or `no layer`.
        layer: String,
        /// The format.
        format: LayerFormat,
        /// The cost.
        cost: f64,
    },
}

impl Choice {
    fn name(&self) -> String {
        self.layers.first().map_or_else(|| "no layer".to_owned(), Layer::to_string)
    }
}

/// Sizes are counted in at most so many units: their greatest common divisor, or, if that is smaller, this share of the size
/// of the largest formats, to which they are rounded up.
const UNITS: u64 = 1 << 18;

/// Chooses a format for each choice, such that all together take at most `budget` bits and cost the least possible.
///
/// This is the multiple-choice knapsack problem, solved by dynamic programming over the choices and the bits. The result is an
/// optimum if all sizes are multiples of a `2^-18` of what the largest formats take together, which they are for models of
/// up to some billion weights. Otherwise sizes are rounded up to such multiples, so that the optimum for a budget smaller by
/// less than one multiple a choice is reached. It depends on the arguments alone; of equal costs the fewer bits are taken;
/// and a larger budget never costs more.
///
/// Memory: at most 512 KiB a choice. Errors: [`BudgetError`].
pub fn allocate(choices: &[Choice], budget: u64) -> Result<Allocation, BudgetError> {
    let sorted: Vec<Vec<FormatCost>> = choices.iter().map(sorted_options).collect::<Result<_, _>>()?;
    let smallest: u64 = sorted.iter().map(|options| options[0].bits).sum();
    if budget < smallest {
        return Err(BudgetError::TooSmall { budget, smallest });
    }
    let largest: u64 = sorted.iter().map(|options| options[options.len() - 1].bits).sum();
    let divisor = sorted.iter().flatten().fold(0, |divisor, option| gcd(divisor, option.bits));
    let unit = divisor.max(largest.div_ceil(UNITS)).max(1);
    let units = |option: &FormatCost| option.bits.div_ceil(unit) as usize;
    let room = (budget.min(largest + sorted.len() as u64 * unit) / unit) as usize;
    // least[r]: the least cost of the choices so far in r units. taken[c][r]: the option of choice c in it.
    let mut least = vec![0.0; room + 1];
    let mut taken = Vec::with_capacity(sorted.len());
    for options in &sorted {
        let mut next = vec![f64::INFINITY; room + 1];
        let mut indices = vec![0u16; room + 1];
        for (index, option) in (0..).zip(options) {
            for r in units(option)..=room {
                let cost = least[r - units(option)] + option.cost;
                if cost < next[r] {
                    (next[r], indices[r]) = (cost, index);
                }
            }
        }
        least = next;
        taken.push(indices);
    }
    let mut chosen: Vec<FormatCost> = sorted.iter().map(|options| options[0]).collect();
    // Rounded up, even the smallest formats may have no room.
    if least[room].is_finite() {
        let mut rest = room;
        for ((chosen, options), indices) in chosen.iter_mut().zip(&sorted).zip(&taken).rev() {
            *chosen = options[usize::from(indices[rest])];
            rest -= units(chosen);
        }
    }
    Ok(Allocation {
        formats: choices.iter().zip(&chosen).map(|(c, option)| (c.layers.clone(), option.format)).collect(),
        bits: chosen.iter().map(|option| option.bits).sum(),
        cost: chosen.iter().map(|option| option.cost).sum(),
    })
}

/// The options of a choice by size, then by cost.
fn sorted_options(choice: &Choice) -> Result<Vec<FormatCost>, BudgetError> {
    if let Some(bad) = choice.options.iter().find(|o| !(o.cost.is_finite() && o.cost >= 0.0)) {
        let FormatCost { format, cost, .. } = *bad;
        return Err(BudgetError::Cost { layer: choice.name(), format, cost });
    }
    if choice.options.is_empty() || choice.options.len() > usize::from(u16::MAX) {
        return Err(BudgetError::Options { layer: choice.name(), options: choice.options.len() });
    }
    let mut options = choice.options.clone();
    options.sort_by(|a, b| a.bits.cmp(&b.bits).then(a.cost.total_cmp(&b.cost)).then(a.format.cmp(&b.format)));
    Ok(options)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Allocation {
    /// Bits a weight, if the layers have so many weights.
    pub fn bits_per_weight(&self, weights: u64) -> f64 {
        self.bits as f64 / weights as f64
    }

    /// Rules of [`QuantizeOptions::dynamic`](crate::QuantizeOptions::dynamic) that say this: one for each format, in which
    /// the names of its layers stand side by side. Layers of which `default` is the format need none.
    pub fn rules(&self, default: LayerFormat) -> DynamicRules {
        let mut formats: Vec<LayerFormat> = self.formats.iter().map(|(_, format)| *format).collect();
        formats.sort_unstable();
        formats.dedup();
        let mut object = Map::new();
        for format in formats.into_iter().filter(|format| *format != default) {
            let layers = self.formats.iter().filter(|(_, other)| *other == format);
            let names: Vec<String> = layers
                .flat_map(|(layers, _)| layers)
                .map(|layer| layer.to_string().replace('.', "\\."))
                .collect();
            let group_size = format.group_size.map_or_else(|| json!(-1), |size| json!(size.get()));
            let overrides = json!({"bits": format.bits.get(), "group_size": group_size});
            object.insert(format!("+:(?:{})$", names.join("|")), overrides);
        }
        DynamicRules::from_json(&Value::Object(object).to_string())
            .expect("invariant: names of layers make patterns, and formats are those of layers")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Module;

    fn format(bits: u32, group_size: usize) -> LayerFormat {
        LayerFormat { bits: Bits::try_from(bits).unwrap(), group_size: NonZeroUsize::new(group_size) }
    }

    fn choice(layer: usize, options: &[(u32, u64, f64)]) -> Choice {
        let option =
            |&(width, bits, cost): &(u32, u64, f64)| FormatCost { format: format(width, 128), bits, cost };
        Choice {
            layers: vec![Layer { layer, module: Module::Q }],
            options: options.iter().map(option).collect(),
        }
    }

    fn widths(allocation: &Allocation) -> Vec<u32> {
        allocation.formats.iter().map(|(_, format)| format.bits.get()).collect()
    }

    #[test]
    fn bits_go_where_they_save_most() {
        let choices = [
            choice(0, &[(2, 2, 1.0), (4, 4, 0.5), (8, 8, 0.0)]),
            choice(1, &[(8, 8, 0.9), (2, 2, 9.0), (4, 4, 1.0)]),
        ];
        assert_eq!(widths(&allocate(&choices, 4).unwrap()), [2, 2]);
        assert_eq!(widths(&allocate(&choices, 6).unwrap()), [2, 4]);
        assert_eq!(widths(&allocate(&choices, 9).unwrap()), [4, 4]);
        assert_eq!(widths(&allocate(&choices, 13).unwrap()), [8, 4]);
        let all = allocate(&choices, u64::MAX).unwrap();
        assert_eq!((widths(&all), all.bits, all.cost), (vec![8, 8], 16, 0.9));
        assert_eq!(allocate(&choices, 3), Err(BudgetError::TooSmall { budget: 3, smallest: 4 }));
        assert_eq!(allocate(&[], 0).map(|nothing| nothing.bits), Ok(0));
    }

    /// The best rate a bit first would be 4 bits for the second, behind which nothing fits.
    #[test]
    fn greed_is_not_enough() {
        let choices = [
            choice(0, &[(2, 20, 1.0), (3, 30, 0.1)]),
            choice(1, &[(2, 20, 1.0), (3, 30, 0.1), (4, 35, 0.0)]),
        ];
        let best = allocate(&choices, 60).unwrap();
        assert_eq!((widths(&best), best.bits), (vec![3, 3], 60));
    }

    /// Two sizes without a common divisor, far above the number of units.
    #[test]
    fn large_sizes_are_rounded_up() {
        let (small, large) = ((1 << 40) + 1, (1 << 41) + 3);
        let choices =
            [choice(0, &[(2, small, 1.0), (4, large, 0.0)]), choice(1, &[(2, small, 2.0), (4, large, 0.0)])];
        assert_eq!(widths(&allocate(&choices, 2 * small).unwrap()), [2, 2]);
        assert_eq!(widths(&allocate(&choices, small + large + (1 << 26)).unwrap()), [2, 4]);
        assert_eq!(widths(&allocate(&choices, small + large - 1).unwrap()), [2, 2]);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let error = allocate(&[choice(3, &[(2, 2, f64::NAN)])], 9).unwrap_err().to_string();
        assert_eq!(
            error,
            "model.layers.3.self_attn.q_proj: 2-bit g128 costs NaN, which is no finite number of at least 0"
        );
        let error = allocate(&[choice(3, &[])], 9).unwrap_err().to_string();
        assert_eq!(
            error,
            "model.layers.3.self_attn.q_proj: 0 formats to choose from, there must be 1 to 65535"
        );
    }

    #[test]
    fn rules_name_every_layer_once() {
        let layers =
            |layer| Module::ALL[..3].iter().map(|&module| Layer { layer, module }).collect::<Vec<_>>();
        let formats =
            vec![(layers(1), format(3, 32)), (layers(11), format(4, 128)), (layers(2), format(3, 32))];
        let allocation = Allocation { formats, bits: 0, cost: 0.0 };
        let rules = allocation.rules(format(4, 128));
        let bits = |name: &str| rules.find(name).map(|(_, rule)| rule.overrides().unwrap());
        let three = Some(r#"{"bits":3,"group_size":32}"#.to_owned());
        assert_eq!(bits("model.layers.1.self_attn.q_proj"), three);
        assert_eq!(bits("model.layers.2.self_attn.v_proj"), three);
        for other in [
            "model.layers.11.self_attn.q_proj",
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.self_attn.q_projx",
        ] {
            assert_eq!(bits(other), None, "{other}");
        }
        assert_eq!(rules.rules().len(), 1);
    }

    #[test]
    fn stored_bits_are_those_of_a_packed_layer() {
        use gptq_core::{GptqConfig, rtn};
        use gptq_format::{CodesRef, PackedLinear};
        for (bits, group_size, inputs, outputs) in
            [(4, Some(32), 72, 40), (3, None, 64, 24), (2, Some(16), 48, 8)]
        {
            let weight =
                ndarray::Array2::from_shape_fn((outputs, inputs), |(o, i)| ((o * 31 + i * 17) % 23) as f32);
            let config = GptqConfig::builder().bits(bits).group_size(group_size).build().unwrap();
            let result = rtn(weight.view(), &config).unwrap();
            let format = LayerFormat { bits: Bits::try_from(bits).unwrap(), group_size: config.group_size() };
            let packed = PackedLinear::pack(&CodesRef {
                bits: format.bits,
                group_size: group_size.unwrap_or(inputs),
                in_features: inputs,
                out_features: outputs,
                codes: result.codes.as_slice().unwrap(),
                zeros: result.zeros.as_slice().unwrap(),
                scales: result.scales.as_slice().unwrap(),
                g_idx: &result.g_idx,
                bias: None,
            })
            .unwrap();
            let words = packed.qweight().len() + packed.qzeros().len() + packed.g_idx().len();
            let bits = 32 * words + 16 * packed.scales().len();
            assert_eq!(format.stored_bits(inputs, outputs), bits as u64);
        }
    }

    fn choices() -> impl Strategy<Value = Vec<Choice>> {
        let option = (prop_oneof![Just(2u32), Just(3), Just(4), Just(8)], 1u64..40, 0.0f64..10.0);
        proptest::collection::vec(proptest::collection::vec(option, 1..6), 1..6)
            .prop_map(|all| all.iter().enumerate().map(|(layer, options)| choice(layer, options)).collect())
    }

    /// The least cost of all combinations within the budget.
    fn optimum(choices: &[Choice], budget: u64) -> f64 {
        let Some((first, rest)) = choices.split_first() else { return 0.0 };
        let fitting = first.options.iter().filter(|option| option.bits <= budget);
        fitting.map(|o| o.cost + optimum(rest, budget - o.bits)).fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn budgets_are_kept_and_more_is_never_worse(choices in choices(), budget in 1u64..200, more in 0u64..30) {
            let smallest: u64 = choices.iter().map(|c| c.options.iter().map(|o| o.bits).min().unwrap()).sum();
            let Ok(small) = allocate(&choices, budget) else {
                prop_assert!(budget < smallest);
                return Ok(());
            };
            prop_assert!(small.bits <= budget);
            prop_assert_eq!(&small, &allocate(&choices, budget).unwrap());
            let large = allocate(&choices, budget + more).unwrap();
            prop_assert!(large.cost <= small.cost, "{} {}", large.cost, small.cost);
        }

        #[test]
        fn nothing_is_better(choices in choices(), budget in 1u64..200) {
            let Ok(allocation) = allocate(&choices, budget) else { return Ok(()) };
            // Sums of at most five costs below 10, in another order.
            prop_assert!((allocation.cost - optimum(&choices, budget)).abs() < 1e-13);
        }
    }
}
