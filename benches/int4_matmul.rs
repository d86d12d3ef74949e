//! `y = x W^T` with packed weights, on every kernel of this machine.
//!
//! ```text
//! cargo bench -p gptq-benches --bench int4_matmul                       # criterion, weights in the cache
//! cargo bench -p gptq-benches --bench int4_matmul -- --table [FILTER]   # a table, weights from memory
//! ```
//!
//! The table rotates over copies of each layer that together are at least three times the last-level cache, so that no
//! time is one that the cache has served, and shows beside each time the share of two limits measured in the same run:
//! the read bandwidth, and the peak of float32 fused multiply-adds. FILTER keeps the lines that contain it, such as
//! `4096x11008/4bit/M=1/`; several may be given.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput};
use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::{
    DenseData, DenseWeight, Linear, LinearSpec, MatMut, MatRef, Workspace,
    cpu::{self, Cpu},
};
use ndarray::Array2;

/// Input features, output features.
const SHAPES: [(usize, usize); 4] = [(2048, 2048), (2048, 5632), (4096, 4096), (4096, 11008)];
const ROWS: [usize; 6] = [1, 2, 4, 16, 64, 512];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().position(|arg| arg == "--table") {
        // From inside the pool, as a decoder calls: no thread has to be woken to hand over each call.
        Some(at) => rayon::scope(|_| table(&args[at + 1..])),
        None => {
            let mut criterion = Criterion::default().configure_from_args();
            bench(&mut criterion);
            criterion.final_summary();
        }
    }
}

/// What a layer is made from.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Packed { bits: Bits, sym: bool, act_order: bool },
    Float,
    Bf16,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::Packed { bits: Bits::B4, sym: true, act_order: false },
        Kind::Packed { bits: Bits::B4, sym: false, act_order: false },
        Kind::Packed { bits: Bits::B4, sym: true, act_order: true },
        Kind::Packed { bits: Bits::B2, sym: true, act_order: false },
        Kind::Packed { bits: Bits::B3, sym: true, act_order: false },
        Kind::Packed { bits: Bits::B8, sym: true, act_order: false },
        Kind::Packed { bits: Bits::B8, sym: false, act_order: false },
        Kind::Bf16,
        Kind::Float,
    ];

    fn name(self) -> String {
        match self {
            Kind::Packed { bits, sym, act_order } => format!(
                "{}bit{}{}",
                bits.get(),
                if sym { "" } else { "-asym" },
                if act_order { "-act" } else { "" }
            ),
            Kind::Float => "f32".to_owned(),
            Kind::Bf16 => "bf16".to_owned(),
        }
    }

    /// Bytes that any kernel has to read: codes, half precision scales and zero points, groups of 128.
    fn useful_bytes(self, k: usize, n: usize) -> usize {
        match self {
            Kind::Packed { bits, sym, .. } => {
                let grid = k.div_ceil(GROUP) * n;
                let zeros = if sym { 0 } else { grid * bits.get() as usize / 8 };
                k * n * bits.get() as usize / 8 + 2 * grid + zeros
            }
            Kind::Float => 4 * k * n,
            Kind::Bf16 => 2 * k * n,
        }
    }
}

const GROUP: usize = 128;

/// Numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn symmetric(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }
}

fn packed(kind: Kind, k: usize, n: usize) -> Option<PackedLinear> {
    let Kind::Packed { bits, sym, act_order } = kind else { return None };
    let mut random = Random(7);
    let groups = k.div_ceil(GROUP);
    let max = u32::from(bits.max_code());
    let codes: Vec<u8> = (0..k * n).map(|_| (random.next() >> 8 & max) as u8).collect();
    let zeros: Vec<u8> = (0..groups * n)
        .map(|_| if sym { 1 << (bits.get() - 1) } else { (random.next() >> 8 & max) as u8 })
        .collect();
    let scales: Vec<f32> = (0..groups * n).map(|_| 0.01 + 0.001 * random.symmetric()).collect();
    let g_idx: Vec<u32> =
        (0..k).map(|i| if act_order { i * 997 % k / GROUP } else { i / GROUP } as u32).collect();
    let (codes, zeros, scales, g_idx) = (&codes[..], &zeros[..], &scales[..], &g_idx[..]);
    let (in_features, out_features, group_size) = (k, n, GROUP);
    let codes =
        CodesRef { bits, group_size, in_features, out_features, codes, zeros, scales, g_idx, bias: None };
    Some(PackedLinear::pack(&codes).expect("invariant: every code is below 2^bits"))
}

/// `copies` equal layers, each in memory of its own.
fn layers(kind: Kind, k: usize, n: usize, kernel: &str, copies: usize) -> Vec<Box<dyn Linear<Cpu>>> {
    let kernels = cpu::kernels();
    let packed = packed(kind, k, n);
    let floats: Vec<f32> = if packed.is_some() {
        Vec::new()
    } else {
        let mut r = Random(7);
        (0..k * n).map(|_| r.symmetric()).collect()
    };
    let halves: Vec<half::bf16> = match kind {
        Kind::Bf16 => floats.iter().map(|&w| half::bf16::from_f32(w)).collect(),
        _ => Vec::new(),
    };
    let data = if kind == Kind::Bf16 { DenseData::Bf16(&halves) } else { DenseData::F32(&floats) };
    let dense = DenseWeight { in_features: k, out_features: n, data, bias: None };
    let spec = packed.as_ref().map_or_else(|| LinearSpec::of_dense(&dense), LinearSpec::of);
    let Ok((kernel, _)) = gptq_kernels::select(&kernels, &spec, Some(kernel)) else { return Vec::new() };
    (0..copies)
        .map(|_| match &packed {
            Some(packed) => kernel.prepare(packed),
            None => kernel.prepare_dense(&dense),
        })
        .collect::<Result<_, _>>()
        .expect("the kernel supports the layer")
}

/// Activations in, activations out, scratch.
struct Operands {
    x: Vec<f32>,
    y: Vec<f32>,
    workspace: Workspace<Cpu>,
    rows: usize,
}

impl Operands {
    fn new(layer: &dyn Linear<Cpu>, rows: usize) -> Self {
        let mut random = Random(11);
        Self {
            x: (0..rows * layer.spec().in_features).map(|_| random.symmetric()).collect(),
            y: vec![0.0; rows * layer.spec().out_features],
            workspace: Workspace::new(&Cpu, layer.workspace_len(rows)).expect("scratch fits in memory"),
            rows,
        }
    }

    fn forward(&mut self, layer: &dyn Linear<Cpu>) {
        let spec = layer.spec();
        let x = MatRef::new(&self.x[..], self.rows, spec.in_features).expect("x has that many elements");
        let y = MatMut::new(&mut self.y[..], self.rows, spec.out_features).expect("y has that many elements");
        layer.forward(x, y, &mut self.workspace).expect("the operands fit the layer");
        black_box(&mut self.y);
    }
}

fn bench(criterion: &mut Criterion) {
    let (k, n) = (2048, 2048);
    let mut group = criterion.benchmark_group("int4_matmul");
    group.sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
    for kernel in cpu::kernels() {
        if kernel.name() == "cpu-reference-f64" {
            continue;
        }
        for kind in Kind::ALL {
            for rows in [1, 64] {
                let Some(layer) = layers(kind, k, n, kernel.name(), 1).pop() else { continue };
                let mut operands = Operands::new(layer.as_ref(), rows);
                group.throughput(Throughput::Bytes(kind.useful_bytes(k, n) as u64));
                let id = BenchmarkId::new(kernel.name(), format!("{k}x{n}/{}/M={rows}", kind.name()));
                group.bench_function(id, |bencher| bencher.iter(|| operands.forward(layer.as_ref())));
            }
        }
    }
}

/// Seconds of a call, median of at least `least` calls and 0.6 s.
fn median(least: usize, mut call: impl FnMut(usize)) -> f64 {
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < least || start.elapsed() < Duration::from_millis(600) {
        let begin = Instant::now();
        call(times.len());
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[allow(clippy::print_stdout)]
fn table(filters: &[String]) {
    let cache = last_level_cache();
    let bandwidth = read_bandwidth(3 * cache);
    let peak = fma_peak();
    println!(
        "{} threads, last-level cache {} MB; read bandwidth {:.1} GB/s, float32 FMA peak {:.0} GFLOP/s",
        rayon::current_num_threads(),
        cache >> 20,
        bandwidth / 1e9,
        peak / 1e9
    );
    println!(
        "{:<34} {:<18} {:>10} {:>9} {:>7} {:>9} {:>7}",
        "K x N / weights / rows", "kernel", "us", "GB/s", "of read", "GFLOP/s", "of FMA"
    );
    for (k, n) in SHAPES {
        for kind in Kind::ALL {
            let line = |rows: usize| format!("{k}x{n}/{}/M={rows}/", kind.name());
            let wanted = |kernel: &str, rows: usize| {
                let id = line(rows) + kernel;
                filters.is_empty() || filters.iter().any(|filter| id.contains(filter.as_str()))
            };
            for kernel in cpu::kernels().iter().map(|kernel| kernel.name()) {
                let rows: Vec<usize> = ROWS.into_iter().filter(|&rows| wanted(kernel, rows)).collect();
                if rows.is_empty() || kernel == "cpu-reference-f64" {
                    continue;
                }
                // With many rows the arithmetic is what takes time, and a few copies will do.
                let most = if rows.iter().any(|&rows| rows < 64) { 3 * cache } else { cache / 8 };
                let copies = most.div_ceil(kind.useful_bytes(k, n));
                let layers = layers(kind, k, n, kernel, copies);
                let Some(first) = layers.first() else { continue };
                for rows in rows {
                    let mut operands = Operands::new(first.as_ref(), rows);
                    operands.forward(first.as_ref());
                    let seconds = median(5, |i| operands.forward(layers[i % layers.len()].as_ref()));
                    let bytes = kind.useful_bytes(k, n) as f64 / seconds;
                    let flops = 2.0 * (k * n * rows) as f64 / seconds;
                    println!(
                        "{:<34} {:<18} {:>10.1} {:>9.2} {:>6.0}% {:>9.1} {:>6.0}%",
                        line(rows),
                        kernel,
                        seconds * 1e6,
                        bytes / 1e9,
                        100.0 * bytes / bandwidth,
                        flops / 1e9,
                        100.0 * flops / peak
                    );
                }
            }
        }
        for rows in ROWS {
            let id = format!("{k}x{n}/f32/M={rows}/ndarray");
            if filters.is_empty() || filters.iter().any(|filter| id.contains(filter.as_str())) {
                let mut random = Random(3);
                let w = Array2::from_shape_simple_fn((n, k), || random.symmetric());
                let x = Array2::from_shape_simple_fn((rows, k), || random.symmetric());
                let seconds = median(3, |_| {
                    black_box(x.dot(&w.t()));
                });
                let flops = 2.0 * (k * n * rows) as f64 / seconds;
                println!(
                    "{:<34} {:<18} {:>10.1} {:>9} {:>7} {:>9.1} {:>6.0}%",
                    id.trim_end_matches("ndarray"),
                    "ndarray, 1 thread",
                    seconds * 1e6,
                    "",
                    "",
                    flops / 1e9,
                    100.0 * flops / peak
                );
            }
        }
    }
}

/// Bytes of the last-level cache, as Linux tells; 64 MB where it does not.
fn last_level_cache() -> usize {
    (0..8)
        .filter_map(|index| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
            let size = std::fs::read_to_string(path).ok()?;
            Some(size.trim().strip_suffix('K')?.parse::<usize>().ok()? << 10)
        })
        .max()
        .unwrap_or(64 << 20)
}

/// Bytes per second that all threads together read from memory: the best of five passes over `bytes` bytes, each thread
/// adding up a contiguous share.
fn read_bandwidth(bytes: usize) -> f64 {
    let data: Vec<u64> = (0..bytes / 8).map(|i| i as u64).collect();
    let share = data.len().div_ceil(rayon::current_num_threads());
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begin = Instant::now();
        rayon::scope(|scope| {
            for part in data.chunks(share) {
                scope.spawn(|_| {
                    let mut sums = [0u64; 32];
                    for chunk in part.as_chunks::<32>().0 {
                        for (sum, value) in sums.iter_mut().zip(chunk) {
                            *sum = sum.wrapping_add(*value);
                        }
                    }
                    black_box(sums);
                });
            }
        });
        best = best.min(begin.elapsed().as_secs_f64());
    }
    bytes as f64 / best
}

/// Float32 operations per second of all threads in chains of fused multiply-adds on registers, the best of five.
fn fma_peak() -> f64 {
    const STEPS: usize = 4_000_000;
    let (run, lanes): (fn(usize) -> f32, usize) = fma_loop();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begin = Instant::now();
        rayon::broadcast(|_| black_box(run(black_box(STEPS))));
        best = best.min(begin.elapsed().as_secs_f64());
    }
    (2 * CHAINS * lanes * STEPS * rayon::current_num_threads()) as f64 / best
}

/// Independent chains: latency 4 times 2 units, and some.
const CHAINS: usize = 12;

/// The widest loop that this CPU runs, and its lanes.
#[cfg(target_arch = "x86_64")]
fn fma_loop() -> (fn(usize) -> f32, usize) {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    fn avx512(steps: usize) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        let mut total = 0.0;
        for sum in sums {
            total += _mm512_reduce_add_ps(sum);
        }
        total
    }
    #[target_feature(enable = "avx2,fma")]
    fn avx2(steps: usize) -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        let mut total = 0.0;
        for sum in sums {
            total += _mm256_cvtss_f32(sum);
        }
        total
    }
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512F has been detected.
        (|steps| unsafe { avx512(steps) }, 16)
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: AVX2 and FMA have been detected.
        (|steps| unsafe { avx2(steps) }, 8)
    } else {
        (plain, 4)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fma_loop() -> (fn(usize) -> f32, usize) {
    (plain, 4)
}

/// Four lanes of whatever the compiler makes of it.
fn plain(steps: usize) -> f32 {
    let mut sums = [[1.0f32; 4]; CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            for lane in sum.iter_mut() {
                *lane = *lane * 0.999 + 0.001;
            }
        }
    }
    sums.as_flattened().iter().sum()
}
