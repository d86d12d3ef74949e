use std::path::Path;

use gptq_format::{CodesRef, PackedLinear};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{CostError, CostPoint, CostTable};
use crate::{
    DenseData, DenseType, DenseWeight, Device, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef,
    WeightFormat, Workspace,
};

/// How calls are timed.
///
/// Copies of a layer are called in turn, all queued before the device is waited for, and the time
/// ([`Device::seconds`]) divided by the calls: what a program sees that does nothing in between. The copies are there so that
/// weights come from memory, as they do in a model: together they should be some times as large as the last-level cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement {
    /// Bytes of all copies of a layer, at least. There are 2 copies at least and 64 at most.
    pub rotated_bytes: usize,
    /// Seconds after which the calls of one kernel, layer and number of rows are not repeated any more.
    pub seconds: f64,
}

impl Default for Measurement {
    /// 256 MB and a fifth of a second.
    fn default() -> Self {
        Self { rotated_bytes: 256 << 20, seconds: 0.2 }
    }
}

/// A kernel that takes this many times as long as another at some number of rows is not measured at larger ones.
const HOPELESS: f64 = 8.0;

impl CostTable {
    /// Measures all kernels that support a layer, with random weights, at those numbers of rows; what the table already
    /// has is not measured again, unless it is of another [version](LinearKernel::version) of the kernel: of such a kernel
    /// all times are dropped first. Returns how many times were added. Large layers take seconds for each kernel.
    ///
    /// Errors: those of the kernels.
    pub fn measure<D: Device>(
        &mut self,
        device: &D,
        kernels: &[Box<dyn LinearKernel<D>>],
        spec: &LinearSpec,
        rows: &[usize],
    ) -> Result<usize, KernelError> {
        self.measure_with(device, kernels, spec, rows, Measurement::default())
    }

    /// [`measure`](Self::measure) with other settings.
    pub fn measure_with<D: Device>(
        &mut self,
        device: &D,
        kernels: &[Box<dyn LinearKernel<D>>],
        spec: &LinearSpec,
        rows: &[usize],
        settings: Measurement,
    ) -> Result<usize, KernelError> {
        let mut rows = rows.to_vec();
        rows.sort_unstable();
        rows.dedup();
        for name in self.stale(kernels) {
            tracing::info!(kernel = name, "costs of another version of it are dropped");
            self.forget(name);
        }
        let wanted = |table: &Self, kernel: &dyn LinearKernel<D>| match kernel.supports(spec) {
            Ok(()) => table.missing(kernel.name(), spec, &rows),
            Err(_) => Vec::new(),
        };
        if kernels.iter().all(|kernel| wanted(self, kernel.as_ref()).is_empty()) {
            return Ok(0);
        }
        let layer = RandomLayer::new(spec)?;
        let mut added = 0;
        for kernel in kernels {
            let rows = wanted(self, kernel.as_ref());
            if rows.is_empty() {
                continue;
            }
            let copies = layer.copies(kernel.as_ref(), spec, settings.rotated_bytes)?;
            if let Some(version) = kernel.version() {
                self.versions.insert(kernel.name().to_owned(), version);
            }
            for rows in rows {
                let microseconds = 1e6 * seconds(device, &copies, spec, rows, settings.seconds)?;
                self.insert(CostPoint {
                    kernel: kernel.name().to_owned(),
                    in_features: spec.in_features,
                    out_features: spec.out_features,
                    weight: spec.weight,
                    rows,
                    microseconds,
                });
                added += 1;
                tracing::debug!(kernel = kernel.name(), ?spec, rows, microseconds, "measured");
                if microseconds > HOPELESS * self.fastest(spec, rows) {
                    break;
                }
            }
        }
        Ok(added)
    }

    /// The measured times of a layer: kernel, rows, microseconds.
    fn times(&self, spec: &LinearSpec) -> impl Iterator<Item = (&str, usize, f64)> {
        let shape = (spec.in_features, spec.out_features, spec.weight);
        let of_layer =
            move |point: &&CostPoint| (point.in_features, point.out_features, point.weight) == shape;
        let points = self.points.iter().filter(of_layer);
        points.map(|point| (point.kernel.as_str(), point.rows, point.microseconds))
    }

    /// The least time of any kernel.
    fn fastest(&self, spec: &LinearSpec, rows: usize) -> f64 {
        self.times(spec).filter(|&(_, r, _)| r == rows).map(|(.., time)| time).fold(f64::INFINITY, f64::min)
    }

    /// The numbers of rows, which ascend, that a kernel has no time for, as far as it is not hopeless.
    fn missing(&self, kernel: &str, spec: &LinearSpec, rows: &[usize]) -> Vec<usize> {
        let mut missing = Vec::new();
        for &rows in rows {
            match self.times(spec).find(|&(name, r, _)| name == kernel && r == rows) {
                Some((.., time)) if time > HOPELESS * self.fastest(spec, rows) => break,
                Some(_) => {}
                None => missing.push(rows),
            }
        }
        missing
    }
}

/// The costs of this machine for some layers: those that [ship](CostTable::shipped) if its model is known, otherwise those
/// in the file at `path`, to which is added what it lacks. Every measurement is a `tracing` event.
///
/// A file of another version is measured anew, with an event of level warn.
///
/// Errors: [`CostError`]; a file that is damaged or of another model is left as it is.
pub fn cached_costs<D: Device>(
    device: &D,
    kernels: &[Box<dyn LinearKernel<D>>],
    specs: &[LinearSpec],
    rows: &[usize],
    path: &Path,
) -> Result<CostTable, CostError> {
    let model = device.model();
    if let Some(table) = CostTable::shipped(&model) {
        match table.stale(kernels) {
            stale if stale.is_empty() => tracing::debug!(model, "shipped costs"),
            stale => tracing::warn!(model, ?stale, "shipped costs, of other versions of these kernels"),
        }
        return Ok(table);
    }
    let mut table = match CostTable::load(path, &model) {
        Ok(table) => table,
        Err(CostError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            CostTable::new(&model)
        }
        Err(error @ CostError::Version { .. }) => {
            tracing::warn!(%error, "costs are measured anew");
            CostTable::new(&model)
        }
        Err(error) => return Err(error),
    };
    let mut added = 0;
    for spec in specs {
        added += table.measure(device, kernels, spec, rows)?;
    }
    if added > 0 {
        table.save(path)?;
        tracing::info!(model, added, path = %path.display(), "costs of kernels measured");
    }
    Ok(table)
}

/// A layer with random weights.
enum RandomLayer {
    Packed(Box<PackedLinear>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// A number that looks random.
fn hash(index: usize) -> u64 {
    let mut v = index as u64 ^ 0x9e37_79b9_7f4a_7c15;
    v = (v ^ (v >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    v = (v ^ (v >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    v ^ (v >> 33)
}

/// In -1..1.
fn symmetric(index: usize) -> f32 {
    (hash(index) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

impl RandomLayer {
    fn new(spec: &LinearSpec) -> Result<Self, KernelError> {
        let elements = spec.in_features * spec.out_features;
        Ok(match spec.weight {
            WeightFormat::Dense(DenseType::F32) => {
                Self::F32((0..elements).into_par_iter().map(symmetric).collect())
            }
            WeightFormat::Dense(DenseType::F16) => {
                Self::F16((0..elements).into_par_iter().map(|i| f16::from_f32(symmetric(i))).collect())
            }
            WeightFormat::Dense(DenseType::Bf16) => {
                Self::Bf16((0..elements).into_par_iter().map(|i| bf16::from_f32(symmetric(i))).collect())
            }
            WeightFormat::Gptq { .. } => Self::Packed(Box::new(packed(spec)?)),
        })
    }

    fn prepare<D: Device>(
        &self,
        kernel: &dyn LinearKernel<D>,
        spec: &LinearSpec,
    ) -> Result<Box<dyn Linear<D>>, KernelError> {
        let data = match self {
            Self::Packed(packed) => return kernel.prepare_fused(packed, &spec.epilogue.into()),
            Self::F32(data) => DenseData::F32(data),
            Self::F16(data) => DenseData::F16(data),
            Self::Bf16(data) => DenseData::Bf16(data),
        };
        let &LinearSpec { in_features, out_features, .. } = spec;
        let bias = spec.bias.then(|| (0..out_features).map(symmetric).collect::<Vec<_>>());
        kernel.prepare_dense(&DenseWeight { in_features, out_features, data, bias: bias.as_deref() })
    }

    fn copies<D: Device>(
        &self,
        kernel: &dyn LinearKernel<D>,
        spec: &LinearSpec,
        bytes: usize,
    ) -> Result<Vec<Box<dyn Linear<D>>>, KernelError> {
        let first = self.prepare(kernel, spec)?;
        let count = bytes.div_ceil(first.weight_bytes().max(1)).clamp(2, 64);
        let mut copies = vec![first];
        for _ in 1..count {
            copies.push(self.prepare(kernel, spec)?);
        }
        Ok(copies)
    }
}

fn packed(spec: &LinearSpec) -> Result<PackedLinear, KernelError> {
    let WeightFormat::Gptq { bits, group_size, sym, act_order } = spec.weight else {
        return Err(KernelError::NoKernel { spec: Box::new(spec.clone()), reasons: Vec::new() });
    };
    let (inputs, outputs) = (spec.in_features, spec.out_features);
    let groups = inputs.div_ceil(group_size.max(1));
    let code = |i: usize| (hash(i) >> 20) as u8 & bits.max_code();
    let codes: Vec<u8> = (0..inputs * outputs).into_par_iter().map(code).collect();
    // One other zero point makes a layer asymmetric.
    let middle = 1 << (bits.get() - 1);
    let zeros: Vec<u8> =
        (0..groups * outputs).map(|i| if sym { middle } else { code(i).max(1) & !1 | 1 }).collect();
    let scales: Vec<f32> = (0..groups * outputs).map(|i| 0.006 + 0.004 * symmetric(i)).collect();
    let mut g_idx: Vec<u32> = (0..inputs).map(|i| (i / group_size.max(1)) as u32).collect();
    if act_order {
        for i in (1..inputs).rev() {
            g_idx.swap(i, hash(i) as usize % (i + 1));
        }
    }
    let bias = spec.bias.then(|| (0..outputs).map(symmetric).collect::<Vec<_>>());
    PackedLinear::pack(&CodesRef {
        bits,
        group_size,
        in_features: inputs,
        out_features: outputs,
        codes: &codes,
        zeros: &zeros,
        scales: &scales,
        g_idx: &g_idx,
        bias: bias.as_deref(),
    })
    // A spec that no layer can have: no features, or a group size of none.
    .map_err(|_| KernelError::NoKernel { spec: Box::new(spec.clone()), reasons: Vec::new() })
}

/// Seconds of a call, the median of some rounds through all copies.
fn seconds<D: Device>(
    device: &D,
    copies: &[Box<dyn Linear<D>>],
    spec: &LinearSpec,
    rows: usize,
    limit: f64,
) -> Result<f64, KernelError> {
    let (inputs, outputs) = (spec.in_features, spec.y_features());
    let host: Vec<f32> = (0..rows * inputs).map(symmetric).collect();
    let mut x = device.alloc(host.len())?;
    device.upload(&host, D::slice_mut(&mut x, 0..host.len()))?;
    let mut y = device.alloc(rows * outputs)?;
    let len = copies.iter().map(|copy| copy.workspace_len(rows)).max().unwrap_or(0);
    let mut workspace = Workspace::new(device, len)?;
    let mut round = |times: usize, count: usize| -> Result<f64, KernelError> {
        let mut work = || {
            for copy in copies.iter().cycle().take(times * copies.len()) {
                let x = MatRef::new(D::slice(&x, 0..rows * inputs), rows, inputs)?;
                let y = MatMut::new(D::slice_mut(&mut y, 0..rows * outputs), rows, outputs)?;
                copy.forward(x, y, &mut workspace)?;
            }
            Ok(())
        };
        let mut all = device.seconds(&mut work, count)?;
        all.sort_by(f64::total_cmp);
        Ok(all[all.len() / 2] / (times * copies.len()) as f64)
    };
    // How many times make a round of 2 ms, and how many rounds fit.
    let first = round(1, 1)?;
    let times = (0.002 / (first * copies.len() as f64)).ceil().max(1.0) as usize;
    let count = (limit / (first * (times * copies.len()) as f64)).clamp(1.0, 9.0) as usize;
    round(times, count)
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use gptq_format::Bits;

    use super::*;
    use crate::{Epilogue, Prologue, Reason, Selector, Workload, cpu};

    const QUICK: Measurement = Measurement { rotated_bytes: 1, seconds: 0.0 };

    fn spec(weight: WeightFormat) -> LinearSpec {
        LinearSpec {
            in_features: 96,
            out_features: 40,
            weight,
            bias: true,
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        }
    }

    #[test]
    fn kernels_are_measured_once_and_then_chosen_by_it() {
        let kernels = cpu::kernels();
        for act_order in [false, true] {
            let weight = WeightFormat::Gptq { bits: Bits::B4, group_size: 32, sym: !act_order, act_order };
            let spec = spec(weight);
            let mut table = CostTable::new("here");
            assert!(table.measure_with(&cpu::Cpu, &kernels, &spec, &[1, 4], QUICK).unwrap() > kernels.len());
            assert!(table.points().iter().all(|point| point.microseconds > 0.0 && point.weight == weight));
            let (kernel, why) = Selector::new().costs(&table).select(&kernels, &spec).unwrap();
            let least = table.points().iter().filter(|point| point.rows == 1);
            let least = least.min_by(|a, b| a.microseconds.total_cmp(&b.microseconds)).unwrap();
            assert_eq!(kernel.name(), least.kernel);
            assert_eq!(why.reason, Reason::Cheapest { microseconds: least.microseconds });
        }
    }

    /// The first kernel of the CPU, in some version.
    struct Versioned(Box<dyn LinearKernel<cpu::Cpu>>, &'static str);

    impl LinearKernel<cpu::Cpu> for Versioned {
        fn name(&self) -> &'static str {
            "versioned"
        }
        fn version(&self) -> Option<String> {
            Some(self.1.to_owned())
        }
        fn supports(&self, spec: &LinearSpec) -> Result<(), crate::Unsupported> {
            self.0.supports(spec)
        }
        fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<cpu::Cpu>>, KernelError> {
            self.0.prepare(weight)
        }
        fn error_bound(&self, spec: &LinearSpec) -> crate::ErrorBound {
            self.0.error_bound(spec)
        }
    }

    #[test]
    fn costs_of_another_version_are_noticed_and_measured_again() {
        let kernels = |version| -> Vec<Box<dyn LinearKernel<cpu::Cpu>>> {
            let mut kernels = cpu::kernels();
            kernels[0] = Box::new(Versioned(kernels.swap_remove(0), version));
            kernels
        };
        let weight = WeightFormat::Gptq { bits: Bits::B4, group_size: 32, sym: true, act_order: false };
        let small = LinearSpec { bias: false, ..spec(weight) };
        let large = LinearSpec { out_features: 80, ..small.clone() };
        let mut table = CostTable::new("here");
        let mut measure = |version, spec: &LinearSpec| {
            let added = table.measure_with(&cpu::Cpu, &kernels(version), spec, &[1], QUICK).unwrap();
            (added, table.clone())
        };
        let (all, _) = measure("a", &small);
        let (_, first) = measure("a", &large);
        assert!(first.stale(&kernels("a")).is_empty());
        assert_eq!(first.stale(&kernels("b")), ["versioned"]);
        assert_eq!(measure("a", &small).0, 0);
        // Of the new version there is what was asked for, of the others all.
        let (added, second) = measure("b", &small);
        assert_eq!((added, second.points().len()), (1, 2 * all - 1));
        assert!(second.stale(&kernels("b")).is_empty());
        let text = second.text();
        assert!(text.contains("\nversion versioned b\n") && !text.contains("versioned a"), "{text}");
    }

    #[test]
    fn what_is_known_or_hopeless_is_not_measured() {
        let weight = WeightFormat::Dense(DenseType::F32);
        let spec = spec(weight);
        let mut table = CostTable::new("here");
        for (kernel, rows, microseconds) in [("fast", 1, 1.0), ("slow", 1, 7.0), ("hopeless", 1, 9.0)] {
            let kernel = kernel.to_owned();
            let LinearSpec { in_features, out_features, .. } = spec;
            table.insert(CostPoint { kernel, in_features, out_features, weight, rows, microseconds });
        }
        for (kernel, missing) in
            [("fast", vec![2]), ("slow", vec![2]), ("hopeless", vec![]), ("new", vec![1, 2])]
        {
            assert_eq!(table.missing(kernel, &spec, &[1, 2]), missing, "{kernel}");
        }
    }

    #[test]
    fn random_layers_are_what_their_spec_says() {
        for sym in [false, true] {
            for act_order in [false, true] {
                let weight = WeightFormat::Gptq { bits: Bits::B3, group_size: 32, sym, act_order };
                assert_eq!(LinearSpec::of(&packed(&spec(weight)).unwrap()), spec(weight));
            }
        }
        for dtype in [DenseType::F32, DenseType::F16, DenseType::Bf16] {
            let spec = spec(WeightFormat::Dense(dtype));
            let layer = RandomLayer::new(&spec).unwrap();
            let kernels = cpu::kernels();
            assert_eq!(layer.prepare(kernels[0].as_ref(), &spec).unwrap().spec(), &spec);
        }
        let nothing = LinearSpec { in_features: 0, ..spec(WeightFormat::Dense(DenseType::F32)) };
        let mut table = CostTable::new("here");
        assert!(table.measure_with(&cpu::Cpu, &cpu::kernels(), &nothing, &[1], QUICK).is_err());
    }

    #[test]
    fn what_is_not_in_the_file_is_measured_and_kept() {
        let folder = std::env::temp_dir().join(format!("gptq-cached-costs-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("costs");
        let kernels = cpu::kernels();
        let kernels = &kernels[..1];
        let small = LinearSpec { in_features: 8, ..spec(WeightFormat::Dense(DenseType::F32)) };
        let large = LinearSpec { in_features: 16, ..small.clone() };
        let first = cached_costs(&cpu::Cpu, kernels, from_ref(&small), &[1], &path).unwrap();
        let second = cached_costs(&cpu::Cpu, kernels, &[small.clone(), large.clone()], &[1], &path).unwrap();
        assert_eq!((first.points().len(), second.points().len()), (1, 2));
        // Read back, not measured again; the file has two decimals.
        let third = cached_costs(&cpu::Cpu, kernels, &[small, large.clone()], &[1], &path).unwrap();
        assert_eq!(third, CostTable::load(&path, &cpu::Cpu.model()).unwrap());
        let estimate = third.estimate(kernels[0].name(), &large, &Workload::rows(1)).unwrap();
        assert!(estimate > 0.0);

        // Damage is not repaired in silence; another version is replaced.
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}nonsense\n")).unwrap();
        let damaged = cached_costs(&cpu::Cpu, kernels, from_ref(&large), &[1], &path);
        assert!(matches!(damaged, Err(CostError::Syntax { .. })));
        std::fs::write(&path, text.replacen("gptq-kernels", "gptq-kernels 0.0.0,", 1)).unwrap();
        let anew = cached_costs(&cpu::Cpu, kernels, &[large], &[1], &path).unwrap();
        assert_eq!(anew.points().len(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
