//! Linear layers on a GPU with activations in float32. Without a GPU the tests say so and pass.
#![cfg(feature = "cuda")]
// clippy.toml allows both in tests, but not in the functions that tests share.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod gpu;

use gptq_kernels::{
    AttentionShape, Backend, DenseData, DenseWeight, Device, KvFormat, KvShape, MatMut, MatRef, SequencePlan,
    StepPlan, Workspace,
    conformance::{self, Case},
    cpu::Cpu,
    cuda::CudaDevice,
};
use gpu::gpu;

#[test]
fn the_battery() {
    let Some(device) = gpu::<f32>() else { return };
    for kernel in device.kernels() {
        for (rows, step) in [(None, 7), (Some(100), 97)] {
            let with_rows = |case: Case| Case { rows: rows.unwrap_or(case.rows), ..case };
            let cases: Vec<Case> = Case::all().into_iter().step_by(step).map(with_rows).collect();
            let report = conformance::run_cases(&device, kernel.as_ref(), &cases);
            println!("{report}");
            assert!(report.run > 0 && report.failures.is_empty(), "{report}");
        }
    }
}

/// Numbers in `[-1, 1)` that look random: Knuth's linear congruential generator.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

/// Numbers of all magnitudes that activations have: errors in the 2-norm are those of float32 sums, far below those of
/// halves (3e-4). A sum of `n` terms of random signs in float32 errs by about `sqrt(n) 2^-24`, and what is cut off by tensor
/// cores by more: `2^-18` leaves an order of magnitude.
#[test]
fn products_are_those_of_float32() {
    let Some(device) = gpu::<f32>() else { return };
    let kernels = device.kernels();
    let kernel = kernels.first().unwrap();
    for (rows, k, n, magnitude) in
        [(70, 100, 60, 1.0), (33, 4096, 128, 1.0), (9, 512, 64, 3e4), (9, 512, 64, 1e-3)]
    {
        let x: Vec<f32> = noise(rows * k, 1).iter().map(|x| x * magnitude).collect();
        let w: Vec<f32> = noise(n * k, 2).iter().map(|w| w * w * w * 0.1).collect();
        let weight = DenseWeight { in_features: k, out_features: n, data: DenseData::F32(&w), bias: None };
        let linear = kernel.prepare_dense(&weight).unwrap();
        let mut buffer = device.alloc(rows * k).unwrap();
        device.upload(&x, CudaDevice::<f32>::slice_mut(&mut buffer, 0..rows * k)).unwrap();
        let mut y = device.alloc(rows * n).unwrap();
        let mut workspace = Workspace::new(&device, linear.workspace_len(rows)).unwrap();
        let from = MatRef::new(CudaDevice::<f32>::slice(&buffer, 0..rows * k), rows, k).unwrap();
        let to = MatMut::new(CudaDevice::<f32>::slice_mut(&mut y, 0..rows * n), rows, n).unwrap();
        linear.forward(from, to, &mut workspace).unwrap();
        let mut got = vec![0.0; rows * n];
        device.download(CudaDevice::<f32>::slice(&y, 0..rows * n), &mut got).unwrap();
        let (mut error, mut norm) = (0.0, 0.0);
        for (i, &got) in got.iter().enumerate() {
            let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
            let want: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            error += (f64::from(got) - want).powi(2);
            norm += want.powi(2);
        }
        let error = (error / norm).sqrt();
        println!("{rows} x {k} x {n}, activations up to {magnitude:e}: {error:.2e}");
        assert!(error < 1.0 / f64::from(1 << 18), "{error:e}");
    }
}

/// A step of 70 rows and one of a single row through every operation of a decoder, on any device.
fn decoder<D: Backend>(device: &D, shape: AttentionShape) -> Vec<f32> {
    let (hidden, vocabulary, rows) = (shape.out_features(), 40, 70);
    let (qkv_features, half) = (shape.qkv_features(), shape.head_dim / 2);
    let upload = |data: &[f32]| {
        let mut buffer = device.alloc(data.len()).unwrap();
        device.upload(data, D::slice_mut(&mut buffer, 0..data.len())).unwrap();
        buffer
    };
    let table = noise(vocabulary * hidden, 3);
    let table = DenseWeight {
        in_features: hidden,
        out_features: vocabulary,
        data: DenseData::F32(&table),
        bias: None,
    };
    let table = device.embedding(&table).unwrap();
    let weight = upload(&noise(hidden, 4));
    let columns: Vec<u32> = (0..hidden as u32).map(|i| (i + 5) % hidden as u32).collect();
    let order = device.order(&columns).unwrap();
    let angles: Vec<f32> =
        (0..(rows + 1) * half).map(|i| (i / half) as f32 / (1 + i % half) as f32).collect();
    let [cos, sin] = [f32::cos, f32::sin].map(|f| angles.iter().map(|&a| f(a)).collect::<Vec<_>>());
    let rope = device.rope(&cos, &sin, shape.head_dim).unwrap();
    let kv = KvShape {
        layers: 1,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        pages: 1,
        format: KvFormat::default(),
    };
    let mut store = device.kv_store(kv).unwrap();
    device.grow_kv(&mut store, 3).unwrap();
    let mut all = Vec::new();
    for (past, rows) in [(0, rows), (rows, 1)] {
        let tokens: Vec<u32> = (0..rows as u32).map(|i| (i * 7 + past as u32) % vocabulary as u32).collect();
        let sequences = [SequencePlan { rows: 0..rows, past, pages: &[2, 0] }];
        let outputs = [rows as u32 - 1];
        let plan =
            StepPlan { tokens: &tokens, sequences: &sequences, outputs: &outputs, ..StepPlan::default() };
        let mut step = device.new_step().unwrap();
        device.set_step(&mut step, &plan).unwrap();
        let new = |cols: usize| upload(&vec![f32::NAN; rows * cols]);
        fn read<D: Backend>(buffer: &D::Buffer, rows: usize, cols: usize) -> MatRef<'_, D> {
            MatRef::new(D::slice(buffer, 0..rows * cols), rows, cols).unwrap()
        }
        fn write<D: Backend>(buffer: &mut D::Buffer, rows: usize, cols: usize) -> MatMut<'_, D> {
            MatMut::new(D::slice_mut(buffer, 0..rows * cols), rows, cols).unwrap()
        }
        let mut collect = |buffer: &D::Buffer, len: usize| {
            let mut values = vec![0.0; len];
            device.download(D::slice(buffer, 0..len), &mut values).unwrap();
            all.extend(values);
        };
        let (mut x, mut y) = (new(hidden), new(hidden));
        device.embed(&table, &step, write(&mut x, rows, hidden)).unwrap();
        let norm = D::slice(&weight, 0..hidden);
        device.rms_norm(read(&x, rows, hidden), norm, 1e-5, None, write(&mut y, rows, hidden)).unwrap();
        collect(&y, rows * hidden);
        let norm = D::slice(&weight, 0..hidden);
        let (residual, delta) = (write(&mut x, rows, hidden), read(&y, rows, hidden));
        let mut z = new(hidden);
        device.add_rms_norm(residual, delta, norm, 1e-5, Some(&order), write(&mut z, rows, hidden)).unwrap();
        collect(&z, rows * hidden);
        let mut qkv = upload(&noise(rows * qkv_features, 5 + past as u64));
        let mut workspace = Workspace::new(device, device.attention_workspace_len(&step, shape)).unwrap();
        let into = write(&mut qkv, rows, qkv_features);
        device
            .attend(
                0,
                shape,
                &step,
                &rope,
                into,
                &mut store,
                None,
                write(&mut y, rows, hidden),
                &mut workspace,
            )
            .unwrap();
        collect(&y, rows * hidden);
        device.add(read(&y, rows, hidden), write(&mut x, rows, hidden)).unwrap();
        let mut product = new(hidden / 2);
        device.silu_mul(read(&x, rows, hidden), write(&mut product, rows, hidden / 2)).unwrap();
        collect(&product, rows * hidden / 2);
        let mut chosen = upload(&vec![f32::NAN; hidden]);
        device.gather_outputs(&step, read(&x, rows, hidden), write(&mut chosen, 1, hidden)).unwrap();
        collect(&chosen, hidden);
        let mut best = [None];
        device.argmax(read(&chosen, 1, hidden), &mut best).unwrap();
        all.push(best[0].unwrap() as f32);
    }
    all
}

/// Sums of up to a hundred terms of both signs: 2^-24 each, and a few more in the exponentials.
#[test]
fn a_decoder_is_the_cpus() {
    let Some(device) = gpu::<f32>() else { return };
    for (heads, kv_heads, head_dim, window) in [(4, 2, 64, None), (6, 1, 20, Some(9)), (2, 2, 128, Some(65))]
    {
        let shape = AttentionShape { heads, kv_heads, head_dim, window };
        let (want, got) = (decoder(&Cpu, shape), decoder(&device, shape));
        let difference = |(want, got): (&f32, &f32)| f64::from(want - got).powi(2);
        let error: f64 = want.iter().zip(&got).map(difference).sum();
        let norm: f64 = want.iter().map(|&want| f64::from(want).powi(2)).sum();
        println!("{shape:?}: {:.2e}", (error / norm).sqrt());
        assert!((error / norm).sqrt() < 100.0 / f64::from(1 << 24), "{shape:?}");
    }
}
