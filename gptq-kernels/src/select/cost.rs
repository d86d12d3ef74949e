use std::{collections::BTreeMap, fmt};

use gptq_format::Bits;

use crate::{DenseType, Device, LinearKernel, LinearSpec, WeightFormat};

/// What calls of kernels cost on one model of machine, as measured.
///
/// A layer that was not measured is estimated from those that are most like it:
///
/// - of the kinds of weight with as many bits (or, for floats, of the same type), first the same kind, then one with
///   other groups, then one with the other kind of zero points, last one in another order;
/// - between two sizes, and between two numbers of rows, the logarithm of the time is interpolated over the logarithm of
///   the size or number. Beyond the largest, time grows in proportion; below the smallest size, it goes on as between
///   the two smallest, and below the smallest number of rows, it stays.
///
/// The element type of activations is not told apart, nor are bias, prologue and epilogue: they change a time by some
/// percent.
///
/// The table remembers which version of each kernel was measured; [`stale`](Self::stale) tells where that is another than
/// the one at hand.
#[derive(Clone, Debug, PartialEq)]
pub struct CostTable {
    pub(super) model: String,
    pub(super) points: Vec<CostPoint>,
    /// Of the kernels that say which version they are.
    pub(super) versions: BTreeMap<String, String>,
}

/// One measured time.
#[derive(Clone, Debug, PartialEq)]
pub struct CostPoint {
    /// Name of the kernel.
    pub kernel: String,
    /// Input features of the layer.
    pub in_features: usize,
    /// Output features of the layer.
    pub out_features: usize,
    /// How the layer stores its weight.
    pub weight: WeightFormat,
    /// Rows of the call.
    pub rows: usize,
    /// Microseconds of a call.
    pub microseconds: f64,
}

/// The calls that a layer will have to answer: numbers of rows, and how often each comes.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    calls: Vec<(usize, f64)>,
}

impl Default for Workload {
    /// One row a call, as decoding has it.
    fn default() -> Self {
        Self::rows(1)
    }
}

impl Workload {
    /// Calls of `rows` rows, and no others.
    pub fn rows(rows: usize) -> Self {
        Self { calls: vec![(rows, 1.0)] }
    }

    /// A prompt of `prompt` tokens in one call, then `new_tokens` calls of one row.
    pub fn generation(prompt: usize, new_tokens: usize) -> Self {
        Self { calls: vec![(prompt, 1.0), (1, new_tokens as f64)] }
    }

    /// `count` more calls of `rows` rows.
    #[must_use]
    pub fn and(mut self, rows: usize, count: f64) -> Self {
        self.calls.push((rows, count));
        self
    }

    /// Numbers of rows and of calls.
    pub fn calls(&self) -> &[(usize, f64)] {
        &self.calls
    }
}

/// A kind of weight: what costs are measured for. One group is a group size of its own, whatever the shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Dense(DenseType),
    Gptq { bits: Bits, group_size: Option<usize>, sym: bool, act_order: bool },
}

impl Kind {
    pub(super) fn of(weight: WeightFormat, in_features: usize) -> Self {
        match weight {
            WeightFormat::Dense(dtype) => Self::Dense(dtype),
            WeightFormat::Gptq { bits, group_size, sym, act_order } => {
                let group_size = Some(group_size).filter(|&size| size < in_features);
                Self::Gptq { bits, group_size, sym, act_order }
            }
        }
    }

    /// The format of such a weight with that many input features.
    pub(super) fn format(self, in_features: usize) -> WeightFormat {
        match self {
            Self::Dense(dtype) => WeightFormat::Dense(dtype),
            Self::Gptq { bits, group_size, sym, act_order } => {
                WeightFormat::Gptq { bits, group_size: group_size.unwrap_or(in_features), sym, act_order }
            }
        }
    }

    /// How unlike two kinds are; `None` if they have nothing to do with each other.
    fn distance(self, other: Self) -> Option<u32> {
        match (self, other) {
            (Self::Dense(a), Self::Dense(b)) => {
                let single = |dtype| dtype == DenseType::F32;
                (single(a) == single(b)).then_some(u32::from(a != b))
            }
            (
                Self::Gptq { bits, group_size, sym, act_order },
                Self::Gptq { bits: b, group_size: g, sym: s, act_order: a },
            ) => (bits == b).then_some(
                u32::from(group_size != g) + 2 * u32::from(sym != s) + 4 * u32::from(act_order != a),
            ),
            _ => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense(DenseType::F32) => write!(f, "f32"),
            Self::Dense(DenseType::F16) => write!(f, "f16"),
            Self::Dense(DenseType::Bf16) => write!(f, "bf16"),
            Self::Gptq { bits, group_size, sym, act_order } => {
                write!(f, "{}-{}", bits.get(), if *sym { "sym" } else { "asym" })?;
                match group_size {
                    Some(group_size) => write!(f, "-{group_size}")?,
                    None => write!(f, "-one")?,
                }
                write!(f, "{}", if *act_order { "-act" } else { "" })
            }
        }
    }
}

impl CostTable {
    /// An empty table for machines of that model, as [`Device::model`](crate::Device::model) calls them.
    pub fn new(model: &str) -> Self {
        Self { model: model.to_owned(), points: Vec::new(), versions: BTreeMap::new() }
    }

    /// The model of the machine that was measured.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// All measured times.
    pub fn points(&self) -> &[CostPoint] {
        &self.points
    }

    /// Adds a time, in place of one for the same kernel, layer and rows.
    pub fn insert(&mut self, point: CostPoint) {
        let same = |other: &CostPoint| {
            other.kernel == point.kernel
                && (other.in_features, other.out_features) == (point.in_features, point.out_features)
                && (other.weight, other.rows) == (point.weight, point.rows)
        };
        match self.points.iter_mut().find(|other| same(other)) {
            Some(old) => *old = point,
            None => self.points.push(point),
        }
    }

    /// Removes all times of a kernel, so that it is measured again.
    pub fn forget(&mut self, kernel: &str) {
        self.points.retain(|point| point.kernel != kernel);
        self.versions.remove(kernel);
    }

    /// The kernels in the table that were measured in another [version](LinearKernel::version) than they are now.
    pub fn stale<D: Device>(&self, kernels: &[Box<dyn LinearKernel<D>>]) -> Vec<&'static str> {
        let known = |name| self.points.iter().any(|point| point.kernel == name);
        let kernels = kernels.iter().filter(|kernel| known(kernel.name()));
        kernels
            .filter(|kernel| kernel.version().as_ref() != self.versions.get(kernel.name()))
            .map(|kernel| kernel.name())
            .collect()
    }

    /// Microseconds that a kernel takes for all calls of a workload; `None` if nothing like the layer was measured.
    pub fn estimate(&self, kernel: &str, spec: &LinearSpec, workload: &Workload) -> Option<f64> {
        let kind = Kind::of(spec.weight, spec.in_features);
        let of_kernel = || {
            self.points
                .iter()
                .filter(|point| point.kernel == kernel)
                .filter_map(|point| Some((Kind::of(point.weight, point.in_features).distance(kind)?, point)))
        };
        let nearest = of_kernel().map(|(distance, _)| distance).min()?;
        // Times by rows, of every shape.
        let mut shapes: BTreeMap<(usize, usize), BTreeMap<usize, f64>> = BTreeMap::new();
        for (_, point) in of_kernel().filter(|(distance, _)| *distance == nearest) {
            let shape = shapes.entry((point.in_features, point.out_features)).or_default();
            shape.insert(point.rows, point.microseconds);
        }
        let cost = |rows: usize| {
            if let Some(times) = shapes.get(&(spec.in_features, spec.out_features)) {
                return by_rows(times, rows);
            }
            // Shapes of one size count as one, by their geometric mean.
            let mut sizes: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
            for (&(k, n), times) in &shapes {
                let (logs, count) = sizes.entry(k as u64 * n as u64).or_default();
                *logs += by_rows(times, rows).ln();
                *count += 1.0;
            }
            let sizes: Vec<(f64, f64)> =
                sizes.iter().map(|(&size, (logs, count))| (size as f64, (logs / count).exp())).collect();
            by_size(&sizes, spec.in_features as f64 * spec.out_features as f64)
        };
        Some(workload.calls().iter().map(|&(rows, count)| count * cost(rows.max(1))).sum())
    }
}

/// The time for `rows` rows, from at least one measured.
fn by_rows(times: &BTreeMap<usize, f64>, rows: usize) -> f64 {
    let below = times.range(..=rows).next_back();
    let above = times.range(rows..).next();
    match (below, above) {
        (Some((&a, &low)), Some((&b, &high))) if a != b => {
            interpolate((a as f64, low), (b as f64, high), rows as f64)
        }
        (Some((&a, &low)), None) => low * rows as f64 / a as f64,
        (_, Some((_, &time))) => time,
        (None, None) => f64::INFINITY,
    }
}

/// The time for `size` weights, from at least one measured, in ascending order.
fn by_size(sizes: &[(f64, f64)], size: f64) -> f64 {
    let above = sizes.partition_point(|&(measured, _)| measured < size);
    match (above.checked_sub(1).map(|below| sizes[below]), sizes.get(above)) {
        (Some(low), Some(&high)) => interpolate(low, high, size),
        (Some((measured, time)), None) => time * size / measured,
        (None, Some(&low)) => match sizes.get(1) {
            Some(&high) => interpolate(low, high, size).min(low.1),
            None => low.1 * size / low.0,
        },
        (None, None) => f64::INFINITY,
    }
}

/// On the line through two points, if both axes are logarithmic.
fn interpolate((x0, y0): (f64, f64), (x1, y1): (f64, f64), x: f64) -> f64 {
    let slope = (y1 / y0).ln() / (x1 / x0).ln();
    y0 * (x / x0).powf(slope)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Epilogue, Prologue};

    fn spec(k: usize, n: usize, group_size: usize, sym: bool) -> LinearSpec {
        LinearSpec {
            in_features: k,
            out_features: n,
            weight: WeightFormat::Gptq { bits: Bits::B4, group_size, sym, act_order: false },
            bias: false,
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        }
    }

    fn table() -> CostTable {
        let mut table = CostTable::new("test");
        for (k, n, rows, microseconds) in
            [(1024, 1024, 1, 4.0), (1024, 1024, 16, 8.0), (4096, 4096, 1, 16.0), (4096, 4096, 16, 32.0)]
        {
            let weight = spec(k, n, 128, true).weight;
            let kernel = "a".to_owned();
            table.insert(CostPoint { kernel, in_features: k, out_features: n, weight, rows, microseconds });
        }
        table
    }

    fn cost(k: usize, n: usize, rows: usize) -> f64 {
        table().estimate("a", &spec(k, n, 128, true), &Workload::rows(rows)).unwrap()
    }

    #[test]
    fn what_was_measured_is_what_it_costs() {
        assert_eq!(cost(1024, 1024, 1), 4.0);
        assert_eq!(cost(4096, 4096, 16), 32.0);
    }

    #[test]
    fn between_and_beyond_the_measured() {
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a} {b}");
        near(cost(1024, 1024, 4), 4.0 * 2f64.sqrt());
        near(cost(2048, 2048, 1), 8.0);
        near(cost(2048, 512, 1), 4.0);
        near(cost(4096, 8192, 1), 32.0);
        near(cost(4096, 4096, 32), 64.0);
        near(cost(512, 512, 1), 2.0);
    }

    #[test]
    fn the_most_similar_kind_counts() {
        let mut table = table();
        let asym = spec(1024, 1024, 128, false);
        assert_eq!(table.estimate("a", &asym, &Workload::rows(1)), Some(4.0));
        table.insert(CostPoint {
            kernel: "a".to_owned(),
            in_features: 1024,
            out_features: 1024,
            weight: asym.weight,
            rows: 1,
            microseconds: 5.0,
        });
        assert_eq!(table.estimate("a", &asym, &Workload::rows(1)), Some(5.0));
        // Groups of 64 are nearer to other groups than to other zero points.
        assert_eq!(table.estimate("a", &spec(1024, 1024, 64, false), &Workload::rows(1)), Some(5.0));
        let eight = LinearSpec {
            weight: WeightFormat::Gptq { bits: Bits::B8, group_size: 128, sym: true, act_order: false },
            ..spec(1024, 1024, 128, true)
        };
        assert_eq!(table.estimate("a", &eight, &Workload::rows(1)), None);
        assert_eq!(table.estimate("b", &asym, &Workload::rows(1)), None);
    }

    #[test]
    fn a_kernel_that_is_forgotten_has_no_cost() {
        let mut table = table();
        table.forget("b");
        assert_eq!(table.points().len(), 4);
        table.forget("a");
        assert!(table.points().is_empty());
    }

    #[test]
    fn workloads_add_up() {
        let workload = Workload::generation(16, 10).and(1, 2.0);
        assert_eq!(table().estimate("a", &spec(1024, 1024, 128, true), &workload), Some(8.0 + 40.0 + 8.0));
    }
}
