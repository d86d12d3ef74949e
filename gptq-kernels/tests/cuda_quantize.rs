//! Quantising on a GPU against gptq-core, and against GPTQModel's golden files. Without a GPU the tests say so and pass.
// clippy.toml allows both in tests, but not in the functions that tests share.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

#[path = "cuda_quantize/golden.rs"]
mod golden;
mod gpu;

use gptq_core::{
    GptqConfig, GptqConfigBuilder, GptqError, Hessian, HessianAccumulator, Method, OnFailure,
    QuantizedWeight, rtn,
};
use gptq_format::PackedLinear;
use gptq_kernels::{
    DenseData, DenseWeight, Device, KernelError, MatMut, MatRef, Unsupported,
    cpu::{Cpu, CpuQuantizer},
    cuda::{CudaDevice, CudaQuantizer, Element},
    quantize::{QuantizeError, Quantizer},
};
use half::{bf16, f16};
use ndarray::{Array2, ArrayView2, Axis};

/// The first GPU with its libraries, or `None` with a printed reason.
fn gpu<T: Element>(config: &GptqConfig) -> Option<(CudaDevice<T>, CudaQuantizer<T>)> {
    let device = gpu::gpu()?;
    match CudaQuantizer::new(&device, config.clone()) {
        Ok(quantizer) => Some((device, quantizer)),
        Err(QuantizeError::Kernel(KernelError::Unsupported {
            reason: reason @ Unsupported::Library { .. },
            ..
        })) => {
            println!("skipped: {reason}");
            None
        }
        Err(error) => panic!("there is a GPU, but {error}"),
    }
}

/// A reproducible sequence.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        x ^ (x >> 29)
    }

    /// About normal: a sum of four uniform numbers, variance 1.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: f32 = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as f32 / 65536.0 - 0.5).sum();
        sum * 3f32.sqrt()
    }
}

/// Inputs as layers see them: correlated by a few common factors, features of different sizes, some of them outliers.
fn inputs<T: Element>(tokens: usize, features: usize, seed: u64) -> Array2<f32> {
    let mut random = Random(seed);
    let sizes: Vec<f32> =
        (0..features).map(|i| random.normal().exp() * if i % 97 == 5 { 8.0 } else { 0.3 }).collect();
    let factors = Array2::from_shape_simple_fn((8, features), || random.normal());
    let mut inputs = Array2::zeros((tokens, features));
    for mut row in inputs.outer_iter_mut() {
        let common: Vec<f32> = (0..8).map(|_| random.normal()).collect();
        for (i, x) in row.iter_mut().enumerate() {
            let shared: f32 = common.iter().zip(factors.column(i)).map(|(c, f)| c * f).sum();
            *x = T::from_f32(sizes[i] * (random.normal() + 0.5 * shared)).to_f32();
        }
    }
    inputs
}

fn weight(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut random = Random(seed);
    Array2::from_shape_simple_fn((rows, columns), || 0.02 * random.normal())
}

fn dense(weight: &Array2<f32>) -> DenseWeight<'_> {
    DenseWeight {
        in_features: weight.ncols(),
        out_features: weight.nrows(),
        data: DenseData::F32(weight.as_slice().unwrap()),
        bias: None,
    }
}

fn upload<T: Element>(
    device: &CudaDevice<T>,
    matrix: ArrayView2<'_, f32>,
) -> <CudaDevice<T> as Device>::Buffer {
    let flat: Vec<f32> = matrix.iter().copied().collect();
    let mut buffer = device.alloc(flat.len()).unwrap();
    device.upload(&flat, CudaDevice::<T>::slice_mut(&mut buffer, 0..flat.len())).unwrap();
    buffer
}

/// Sums of `batches` of the inputs' rows.
fn sums<T: Element>(
    device: &CudaDevice<T>,
    quantizer: &CudaQuantizer<T>,
    inputs: &Array2<f32>,
    reference: Option<&Array2<f32>>,
    batch: usize,
) -> <CudaQuantizer<T> as Quantizer<CudaDevice<T>>>::Sums {
    let mut sums = quantizer.sums(inputs.ncols()).unwrap();
    for (index, rows) in inputs.axis_chunks_iter(Axis(0), batch).enumerate() {
        let buffer = upload(device, rows);
        let reference = reference.map(|all| {
            let start = index * batch;
            upload(device, all.slice(ndarray::s![start..start + rows.nrows(), ..]))
        });
        let matrix = |buffer| {
            let slice = CudaDevice::<T>::slice(buffer, 0..rows.len());
            MatRef::new(slice, rows.nrows(), rows.ncols()).unwrap()
        };
        quantizer.add_batch(&mut sums, matrix(&buffer), reference.as_ref().map(matrix)).unwrap();
        device.synchronize().unwrap();
    }
    sums
}

fn host_hessian(inputs: &Array2<f32>, reference: Option<&Array2<f32>>) -> Hessian {
    let mut accumulator = match reference {
        Some(_) => HessianAccumulator::with_reference(inputs.ncols()),
        None => HessianAccumulator::new(inputs.ncols()),
    };
    match reference {
        Some(reference) => accumulator.add_batch_with_reference(inputs.view(), reference.view()).unwrap(),
        None => accumulator.add_batch(inputs.view()).unwrap(),
    }
    accumulator.finish().unwrap()
}

fn differing(a: &QuantizedWeight, b: &QuantizedWeight) -> f64 {
    let count = a.codes.iter().zip(&b.codes).filter(|(a, b)| a != b).count();
    count as f64 / a.codes.len() as f64
}

/// All settings that change a path through the kernels.
fn recipes() -> Vec<(&'static str, GptqConfig)> {
    type Build = fn(GptqConfigBuilder) -> GptqConfigBuilder;
    let recipes: [(&str, Build); 15] = [
        ("default", |c| c),
        ("asym", |c| c.sym(false)),
        ("g32", |c| c.group_size(Some(32))),
        ("g40, ragged blocks", |c| c.group_size(Some(40)).block_size(104)),
        ("one group", |c| c.group_size(None)),
        ("desc_act", |c| c.desc_act(true)),
        ("desc_act, static", |c| c.desc_act(true).static_groups(true)),
        ("group-aware", |c| c.act_group_aware(true).group_size(Some(64))),
        ("mse", |c| c.mse(Some(2.4))),
        ("mse, asym, desc_act, 3 bits", |c| c.mse(Some(2.4)).sym(false).desc_act(true).bits(3)),
        ("mse, asym, 2 bits", |c| c.mse(Some(2.4)).sym(false).bits(2).group_size(Some(64))),
        ("mse, one group", |c| c.mse(Some(2.4)).group_size(None)),
        ("8 bits", |c| c.bits(8)),
        ("gptaq", |c| c.gptaq(Some(0.25))),
        ("gptaq, desc_act, mse, asym", |c| c.gptaq(Some(0.5)).desc_act(true).mse(Some(2.4)).sym(false)),
    ];
    recipes.map(|(name, build)| (name, build(GptqConfig::builder()).build().unwrap())).into()
}

/// Given one Hessian, the GPU and gptq-core differ by the last bits of the factor and by the order of the lazy update's
/// sums, so codes may differ at ties and behind them: at most 1 in 1000, the gate for layers of this size, and the loss by
/// as little as the gate for output errors.
#[test]
fn codes_are_those_of_gptq_core() {
    let (tokens, columns, rows) = (1024, 500, 100);
    let mut inputs = inputs::<f16>(tokens, columns, 1);
    // Dead columns.
    for column in [17, 300] {
        inputs.column_mut(column).fill(0.0);
    }
    let reference = &inputs + &self::inputs::<f16>(tokens, columns, 2).mapv(|x| 0.05 * x);
    let weight = weight(rows, columns, 3);
    for (name, config) in recipes() {
        let Some((device, quantizer)) = gpu::<f16>(&config) else { return };
        let gptaq = config.gptaq().is_some();
        let hessian = host_hessian(&inputs, gptaq.then_some(&reference));
        let cpu = CpuQuantizer::new(config.clone());
        let expected = cpu.quantize(&cpu.prepare_hessian(hessian.clone()).unwrap(), &dense(&weight)).unwrap();
        let prepared = quantizer.prepare_hessian(hessian).unwrap();
        let on_device = quantizer.quantize(&prepared, &dense(&weight)).unwrap();
        let quantized = quantizer.download(&on_device).unwrap();
        let share = differing(&quantized, &expected);
        let (loss, expected_loss) = (quantized.report.loss.unwrap(), expected.report.loss.unwrap());
        println!("{name}: {:.5} % of codes differ, loss {loss:e} / {expected_loss:e}", 100.0 * share);
        assert!(share <= 0.001, "{name}: {share} of the codes differ");
        assert!((loss / expected_loss - 1.0).abs() < 0.005, "{name}: loss {loss:e}, {expected_loss:e}");
        assert_eq!(quantized.g_idx, expected.g_idx, "{name}");
        assert_eq!(quantized.report.dead_columns, [17, 300], "{name}");
        assert_eq!(quantized.report.damp, expected.report.damp, "{name}");
        assert_eq!(quantized.report.method, expected.report.method, "{name}");
        assert_eq!(quantized.report.samples, tokens as u64, "{name}");

        // What the device makes of its codes is what the host makes of them.
        let bias: Vec<f32> = (0..rows).map(|i| i as f32 / 8.0).collect();
        let packed: PackedLinear = quantizer.pack(&on_device, Some(&bias)).unwrap();
        assert_eq!(packed, cpu.pack(&quantized, Some(&bias)).unwrap(), "{name}");
        let mut y = device.alloc(rows * columns).unwrap();
        let all = 0..rows * columns;
        let matrix = CudaDevice::<f16>::slice_mut(&mut y, all.clone());
        quantizer.dequantize(&on_device, MatMut::new(matrix, rows, columns).unwrap()).unwrap();
        let mut got = vec![0.0; rows * columns];
        device.download(CudaDevice::<f16>::slice(&y, all), &mut got).unwrap();
        let rounded = quantized.dequantize().mapv(|x| f16::from_f32(x).to_f32());
        assert_eq!(got, rounded.as_slice().unwrap(), "{name}");
    }
}

/// A product of halves is exact in float32. Within 2048 of them, tensor cores cut sums to some 2^-23 of the largest partial
/// sum each time they add 16 products (16 eps more for the sixteen at once, if they add them one by one), eight such sums
/// are added in float32, and the whole is rounded to float32 once: at most `(2048 + 8 + 1) 2^-23 2/n sum |x_i x_j|`.
fn moments_are_exact<T: Element>() {
    let config = GptqConfig::builder().gptaq(Some(0.25)).build().unwrap();
    for with_reference in [false, true] {
        let config = if with_reference { config.clone() } else { GptqConfig::default() };
        let Some((device, quantizer)) = gpu::<T>(&config) else { return };
        for (tokens, features) in [(1, 8), (100, 33), (2500, 64), (20000, 72), (5000, 2051)] {
            let x = inputs::<T>(tokens, features, 7);
            let reference = inputs::<T>(tokens, features, 8);
            let reference = with_reference.then_some(&reference);
            let prefix = |batch| {
                let sums = sums(&device, &quantizer, &x, reference, batch);
                assert_eq!(sums.tokens(), tokens as u64);
                quantizer.hessian(sums).unwrap()
            };
            let got = prefix(tokens);
            // Batches do not matter, to the bit.
            if features < 2000 {
                assert_eq!(got, prefix(333), "{tokens} x {features}");
            }
            let exact = x.mapv(f64::from);
            let bound = 2057.0 * 2f64.powi(-23) * 2.0 / tokens as f64;
            let scale = 2.0 / tokens as f64;
            let check = |got: ArrayView2<'_, f64>, left: &Array2<f64>, slack: f64| {
                let (expected, sizes) =
                    (left.t().dot(&exact) * scale, left.mapv(f64::abs).t().dot(&exact.mapv(f64::abs)));
                let mut worst = 0.0f64;
                for ((got, expected), size) in got.iter().zip(&expected).zip(&sizes) {
                    worst = worst.max((got - expected).abs() / ((bound + slack * scale) * size + 1e-300));
                }
                assert!(
                    worst <= 1.0,
                    "{} {tokens} x {features}: {worst} of the bound",
                    T::from_f32(1.0).to_f32()
                );
                worst
            };
            let worst = check(got.matrix(), &exact, 0.0);
            print!("{tokens} x {features}: {worst:.5} of the bound");
            if let Some(reference) = reference {
                // The difference is rounded to float32, and to two halves: to 2^-16 of itself at worst, in bf16.
                let difference = (reference - &x).mapv(f64::from);
                print!(", cross {:.5}", check(got.cross().unwrap(), &difference, 2f64.powi(-16)));
            }
            println!();
        }
    }
}

#[test]
fn moments_of_fp16_are_exact_enough() {
    moments_are_exact::<f16>();
}

#[test]
fn moments_of_bf16_are_exact_enough() {
    moments_are_exact::<bf16>();
}

/// Everything on the device, in bf16, against everything on the CPU; twice, with equal bits.
#[test]
fn a_larger_layer_from_inputs_to_codes() {
    let (tokens, columns) = (4096, 1024);
    let x = inputs::<bf16>(tokens, columns, 11);
    for (name, config) in [
        ("default", GptqConfig::default()),
        ("desc_act", GptqConfig::builder().desc_act(true).build().unwrap()),
    ] {
        let Some((device, quantizer)) = gpu::<bf16>(&config) else { return };
        let cpu = CpuQuantizer::new(config.clone());
        let mut host = cpu.sums(columns).unwrap();
        let view = MatRef::<Cpu>::new(x.as_slice().unwrap(), tokens, columns).unwrap();
        cpu.add_batch(&mut host, view, None).unwrap();
        let host = cpu.prepare(host).unwrap();
        let run = || {
            let prepared = quantizer.prepare(sums(&device, &quantizer, &x, None, 1000)).unwrap();
            // Three weights share one Hessian.
            [21, 22, 23].map(|seed| {
                let quantized = quantizer.quantize(&prepared, &dense(&weight(192, columns, seed))).unwrap();
                quantizer.download(&quantized).unwrap()
            })
        };
        let (first, second) = (run(), run());
        let hessian = host_hessian(&x, None);
        for ((seed, a), b) in (21..).zip(first).zip(second) {
            assert_eq!((&a.codes, &a.zeros, a.report.loss), (&b.codes, &b.zeros, b.report.loss), "{name}");
            let bits = |q: &QuantizedWeight| q.scales.mapv(f32::to_bits);
            assert_eq!(bits(&a), bits(&b), "{name}");
            let weight = weight(192, columns, seed);
            let expected = cpu.quantize(&host, &dense(&weight)).unwrap();
            let error =
                |q: &QuantizedWeight| hessian.output_error((&weight - &q.dequantize()).view()).unwrap();
            let (share, ratio) = (differing(&a, &expected), error(&a) / error(&expected));
            println!("{name}: {:.4} % of codes differ, output error x {ratio:.6}", 100.0 * share);
            // The gates for layers of more than 512 columns.
            assert!(share <= 0.01 && (ratio - 1.0).abs() < 0.005, "{name}: {share}, {ratio}");
        }
    }
}

#[test]
fn an_indefinite_hessian_is_damped_reported_or_rounded() {
    let n = 200;
    let mut matrix = Array2::<f64>::eye(n);
    let weight = weight(16, n, 5);
    // Needs a tenth of the mean diagonal: pairs of columns with correlation 1.1.
    for i in 0..n / 2 {
        (matrix[[2 * i, 2 * i + 1]], matrix[[2 * i + 1, 2 * i]]) = (1.095, 1.095);
    }
    let hessian = Hessian::from_matrix(matrix.clone(), 10).unwrap();
    let config = GptqConfig::default();
    let Some((_, quantizer)) = gpu::<f16>(&config) else { return };
    let cpu = CpuQuantizer::new(config);
    let expected = cpu.quantize(&cpu.prepare_hessian(hessian.clone()).unwrap(), &dense(&weight)).unwrap();
    let prepared = quantizer.prepare_hessian(hessian.clone()).unwrap();
    let quantized = quantizer.quantize(&prepared, &dense(&weight)).unwrap();
    let damp = quantizer.report(&quantized).damp.unwrap();
    assert!(damp.raised > 0, "{damp:?}");
    assert_eq!(Some(damp), expected.report.damp);

    let strict = |on_failure| {
        let config = GptqConfig::builder().damp_auto_increment(0.0).on_failure(on_failure).build().unwrap();
        gpu::<f16>(&config).unwrap().1
    };
    let error = strict(OnFailure::Error).prepare_hessian(hessian.clone()).map(|_| ()).unwrap_err();
    let QuantizeError::Gptq(GptqError::NotPositiveDefinite { source, .. }) = error else { panic!("{error}") };
    // In reversed order the last pair fails first, at its first column: 1.01 - 1.095^2 / 1.01.
    assert_eq!(source.index, n - 2);
    assert!((source.pivot - (1.01 - 1.095 * 1.095 / 1.01)).abs() < 1e-12, "{}", source.pivot);

    let rounding = strict(OnFailure::Rtn);
    let prepared = rounding.prepare_hessian(hessian).unwrap();
    let quantized = rounding.quantize(&prepared, &dense(&weight)).unwrap();
    assert_eq!(rounding.report(&quantized).method, Method::RtnFallback(source));
    let expected = rtn(weight.view(), rounding.config()).unwrap();
    let quantized_on_host = rounding.download(&quantized).unwrap();
    assert_eq!(quantized_on_host.codes, expected.codes);
    rounding.pack(&quantized, None).unwrap();
}

#[test]
fn bad_input_has_a_typed_error() {
    let Some((device, quantizer)) = gpu::<f16>(&GptqConfig::default()) else { return };
    let n = 64;
    let mut x = inputs::<f16>(50, n, 1);
    let good = quantizer.prepare(sums(&device, &quantizer, &x, None, 50)).unwrap();
    let mut w = weight(8, n, 2);
    w[[5, 7]] = f32::INFINITY;
    let error = quantizer.quantize(&good, &dense(&w)).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, QuantizeError::Gptq(GptqError::NonFiniteWeight { row: 5, column: 7, value }) if value == f32::INFINITY),
        "{error}"
    );
    // The same weight from the device, and from there with rows further apart than they are long.
    let mut apart = Array2::zeros((8, n + 3));
    apart.slice_mut(ndarray::s![.., ..n]).assign(&w);
    let buffer = upload(&device, apart.view());
    let slice = CudaDevice::<f16>::slice(&buffer, 0..8 * (n + 3));
    let resident = MatRef::with_stride(slice, 8, n, n + 3).unwrap();
    let error = quantizer.quantize_resident(&good, resident).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, QuantizeError::Gptq(GptqError::NonFiniteWeight { row: 5, column: 7, value }) if value == f32::INFINITY),
        "{error}"
    );
    let rounded = weight(8, n, 2).mapv(|x| f16::from_f32(x).to_f32());
    apart.slice_mut(ndarray::s![.., ..n]).assign(&rounded);
    let buffer = upload(&device, apart.view());
    let slice = CudaDevice::<f16>::slice(&buffer, 0..8 * (n + 3));
    let resident = MatRef::with_stride(slice, 8, n, n + 3).unwrap();
    let resident = quantizer.quantize_resident(&good, resident).unwrap();
    let uploaded = quantizer.quantize(&good, &dense(&rounded)).unwrap();
    let (resident, uploaded) =
        (quantizer.download(&resident).unwrap(), quantizer.download(&uploaded).unwrap());
    assert_eq!((resident.codes, resident.scales), (uploaded.codes, uploaded.scales));

    let error = quantizer.quantize(&good, &dense(&weight(8, n + 8, 2))).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, QuantizeError::Gptq(GptqError::Features { what: "weight", expected: 64, found: 72 })),
        "{error}"
    );
    let huge = weight(8, n, 2).mapv(|w| w * 1e38 / 0.02);
    let error = quantizer.quantize(&good, &dense(&huge)).map(|_| ()).unwrap_err();
    assert!(matches!(error, QuantizeError::Gptq(GptqError::NonFiniteScale { .. })), "{error}");

    x[[3, 9]] = f32::NAN;
    let error = quantizer.prepare(sums(&device, &quantizer, &x, None, 50)).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, QuantizeError::Gptq(GptqError::NonFiniteHessian { row: 0, column: 9, .. })),
        "{error}"
    );
    let empty = quantizer.prepare(quantizer.sums(n).unwrap()).map(|_| ()).unwrap_err();
    assert!(matches!(empty, QuantizeError::Gptq(GptqError::NoSamples)), "{empty}");
    let error = quantizer.sums(65_535).map(|_| ()).err();
    assert!(
        matches!(error, None | Some(QuantizeError::Kernel(KernelError::OutOfGpuMemory { .. }))),
        "{error:?}"
    );
    let error = quantizer.sums(70_000).map(|_| ()).unwrap_err();
    assert!(matches!(error, QuantizeError::Kernel(KernelError::Unsupported { .. })), "{error}");

    // More memory than there is.
    let mut held = Vec::new();
    let error = loop {
        match quantizer.sums(40_000) {
            Ok(sums) => held.push(sums),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, QuantizeError::Kernel(KernelError::OutOfGpuMemory { .. })), "{error}");
    drop(held);
    // And the device is as good as before.
    quantizer.quantize(&good, &dense(&weight(8, n, 2))).unwrap();

    let wide = GptqConfig::builder().block_size(512).build().unwrap();
    let error = CudaQuantizer::new(&device, wide).map(|_| ()).unwrap_err();
    assert!(
        matches!(
            error,
            QuantizeError::Kernel(KernelError::Unsupported {
                reason: Unsupported::BlockSize { block_size: 512 },
                ..
            })
        ),
        "{error}"
    );
}
