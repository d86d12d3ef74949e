//! The decoder's operations on a GPU: errors within what rounding explains, and bits that depend on nothing but a row's own
//! sequence. Without a GPU the tests say so and pass.
#![cfg(feature = "cuda")]
// clippy.toml allows both in tests, but not in the functions that tests share.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

#[path = "cuda_decoder/attention.rs"]
mod attention;
#[path = "cuda_decoder/draws.rs"]
mod draws;
mod gpu;

use gptq_kernels::{
    AttentionShape, Backend, DenseData, DenseWeight, Device, KernelError, KvFormat, KvShape, MatMut, MatRef,
    SequencePlan, StepPlan, Workspace,
    cuda::{Activation as _, CudaDevice, Element},
};
use gpu::gpu;
use half::{bf16, f16};

/// Unit roundoff of float32.
const EPS: f64 = 1.0 / (1u64 << 24) as f64;

/// The first GPU, and the same with the kernels of older ones.
fn both<T: Element>() -> Vec<CudaDevice<T>> {
    gpu().map_or_else(Vec::new, |device: CudaDevice<T>| vec![device.limited_to((8, 0)), device])
}

/// Numbers in `[-1, 1)` that look random and are exact in `T`: Knuth's linear congruential generator.
fn noise<T: Element>(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            T::from_f32((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0).to_f32()
        })
        .collect()
}

fn upload<D: Backend>(device: &D, data: &[f32]) -> D::Buffer {
    let mut buffer = device.alloc(data.len()).unwrap();
    device.upload(data, D::slice_mut(&mut buffer, 0..data.len())).unwrap();
    buffer
}

fn download<D: Backend>(device: &D, buffer: &D::Buffer) -> Vec<f32> {
    let mut data = vec![0.0; D::buffer_len(buffer)];
    device.download(D::slice(buffer, 0..data.len()), &mut data).unwrap();
    data
}

fn whole<D: Backend>(buffer: &D::Buffer, rows: usize, cols: usize) -> MatRef<'_, D> {
    MatRef::new(D::slice(buffer, 0..rows * cols), rows, cols).unwrap()
}

fn whole_mut<D: Backend>(buffer: &mut D::Buffer, rows: usize, cols: usize) -> MatMut<'_, D> {
    MatMut::new(D::slice_mut(buffer, 0..rows * cols), rows, cols).unwrap()
}

/// `0..len` in an order that looks random.
fn shuffled(len: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    order.sort_by_key(|&i| i.wrapping_mul(0x9E37_79B1));
    order
}

/// Columns `order[0], order[1], ..` of a matrix.
fn reordered(x: &[f32], order: &[u32]) -> Vec<f32> {
    let rows = x.chunks_exact(order.len());
    rows.flat_map(|row| order.iter().map(|&column| row[column as usize])).collect()
}

/// Rows and columns: no vectors, one thread's worth, the widths of models, more than what registers hold.
const SHAPES: [(usize, usize); 6] = [(1, 4096), (3, 20), (5, 257), (33, 1024), (2, 8192), (2, 20_000)];

fn norms<T: Element>() {
    let Some(device) = gpu::<T>() else { return };
    for (rows, cols) in SHAPES {
        let (x, delta, weight) =
            (noise::<T>(rows * cols, 1), noise::<T>(rows * cols, 2), noise::<T>(cols, 3));
        let weight_buffer = upload(&device, &weight);
        let weight_slice = CudaDevice::<T>::slice(&weight_buffer, 0..cols);
        let check = |what: &str, x: &[f32], y: &[f32]| {
            for r in 0..rows {
                let row = &x[r * cols..][..cols];
                let mean = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / cols as f64;
                for (c, &v) in row.iter().enumerate() {
                    let want = f64::from(v) / (mean + 1e-5).sqrt() * f64::from(weight[c]);
                    // A square passes at most cols roundings, half of which reach the root; then a root, a quotient and
                    // two products, and the rounding to T.
                    let bound = want.abs() * (T::UNIT + (cols as f64 + 10.0) * EPS) + T::SUBNORMAL;
                    let got = f64::from(y[r * cols + c]);
                    assert!((got - want).abs() <= bound, "{what} {rows} x {cols} ({r}, {c}): {got} {want}");
                }
            }
        };
        let x_buffer = upload(&device, &x);
        let mut y = device.alloc(rows * cols).unwrap();
        device
            .rms_norm(whole(&x_buffer, rows, cols), weight_slice, 1e-5, None, whole_mut(&mut y, rows, cols))
            .unwrap();
        let first = download(&device, &y);
        check("rms_norm", &x, &first);

        let (mut residual, delta_buffer) = (x_buffer, upload(&device, &delta));
        device
            .add_rms_norm(
                whole_mut(&mut residual, rows, cols),
                whole(&delta_buffer, rows, cols),
                weight_slice,
                1e-5,
                None,
                whole_mut(&mut y, rows, cols),
            )
            .unwrap();
        let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| T::from_f32(a + b).to_f32()).collect();
        assert_eq!(download(&device, &residual), sum);
        let added = download(&device, &y);
        check("add_rms_norm", &sum, &added);
        norms_in_order(&device, (&x, &delta, &weight), &sum, (&first, &added));

        // The same rows further apart, at an odd place, alone: the same bits.
        let (stride, offset) = (cols + 3, 1);
        let mut apart = vec![0.0; offset + rows * stride];
        for r in 0..rows {
            apart[offset + r * stride..][..cols].copy_from_slice(&x[r * cols..][..cols]);
        }
        let apart = upload(&device, &apart);
        for r in 0..rows {
            let start = offset + r * stride;
            let x = CudaDevice::<T>::slice(&apart, start..start + cols);
            let mut one = device.alloc(cols).unwrap();
            let x = MatRef::new(x, 1, cols).unwrap();
            device.rms_norm(x, weight_slice, 1e-5, None, whole_mut(&mut one, 1, cols)).unwrap();
            assert_eq!(download(&device, &one), first[r * cols..][..cols]);
        }
    }
}

/// The norms of `x` and of `sum = x + delta`, in another order: the same bits in other places.
fn norms_in_order<T: Element>(
    device: &CudaDevice<T>,
    (x, delta, weight): (&[f32], &[f32], &[f32]),
    sum: &[f32],
    (normed, added): (&[f32], &[f32]),
) {
    let (cols, rows) = (weight.len(), x.len() / weight.len());
    let columns = shuffled(cols);
    let order = device.order(&columns).unwrap();
    let weight = upload(device, &reordered(weight, &columns));
    let weight = CudaDevice::<T>::slice(&weight, 0..cols);
    let (mut x, delta) = (upload(device, x), upload(device, delta));
    let mut y = upload(device, &vec![f32::NAN; rows * cols]);
    let into = whole_mut(&mut y, rows, cols);
    device.rms_norm(whole(&x, rows, cols), weight, 1e-5, Some(&order), into).unwrap();
    assert_eq!(download(device, &y), reordered(normed, &columns), "{rows} x {cols}");

    let (residual, into) = (whole_mut(&mut x, rows, cols), whole_mut(&mut y, rows, cols));
    device.add_rms_norm(residual, whole(&delta, rows, cols), weight, 1e-5, Some(&order), into).unwrap();
    assert_eq!(download(device, &x), sum);
    assert_eq!(download(device, &y), reordered(added, &columns), "{rows} x {cols}");

    device.reorder(&order, whole_mut(&mut x, rows, cols)).unwrap();
    assert_eq!(download(device, &x), reordered(sum, &columns), "{rows} x {cols}");
    // Rows that begin anywhere.
    let (stride, offset) = (cols + 3, 1);
    let mut apart = upload(device, &vec![0.25; offset + rows * stride]);
    let slice = CudaDevice::<T>::slice_mut(&mut apart, offset..offset + rows * stride);
    let into = MatMut::with_stride(slice, rows, cols, stride).unwrap();
    let weight_only = whole(&delta, rows, cols);
    device.rms_norm(weight_only, weight, 1e-5, Some(&order), into).unwrap();
    let slice = CudaDevice::<T>::slice_mut(&mut apart, offset..offset + rows * stride);
    device.reorder(&order, MatMut::with_stride(slice, rows, cols, stride).unwrap()).unwrap();
    device.rms_norm(weight_only, weight, 1e-5, Some(&order), whole_mut(&mut y, rows, cols)).unwrap();
    let (apart, y) = (download(device, &apart), reordered(&download(device, &y), &columns));
    for r in 0..rows {
        let (row, margin) = apart[offset + r * stride..][..stride].split_at(cols);
        assert_eq!(row, &y[r * cols..][..cols]);
        assert_eq!(margin, [0.25; 3]);
    }

    let wrong = device.order(&[0, 0]).err();
    assert!(matches!(wrong, Some(KernelError::Argument { what: "column of an order", .. })));
    let short = device.order(&[0]).unwrap();
    let wrong = device.rms_norm(weight_only, weight, 1e-5, Some(&short), whole_mut(&mut x, rows, cols));
    assert!(matches!(wrong, Err(KernelError::Shape { argument: "order", .. })));
}

fn elements<T: Element>() {
    let Some(device) = gpu::<T>() else { return };
    for (rows, cols) in SHAPES {
        let x: Vec<f32> = noise::<T>(rows * 2 * cols, 4).iter().map(|v| v * 8.0).collect();
        let x_buffer = upload(&device, &x);
        let mut y = device.alloc(rows * cols).unwrap();
        device.silu_mul(whole(&x_buffer, rows, 2 * cols), whole_mut(&mut y, rows, cols)).unwrap();
        for (i, got) in download(&device, &y).into_iter().enumerate() {
            let (r, c) = (i / cols, i % cols);
            let (gate, up) = (f64::from(x[r * 2 * cols + c]), f64::from(x[(r * 2 + 1) * cols + c]));
            let want = gate / (1.0 + (-gate).exp()) * up;
            // The argument of the exponential is rounded once, its error becomes relative; then 2 ulp of the exponential
            // and four operations.
            let bound = want.abs() * (T::UNIT + (12.0 + 2.0 * gate.abs()) * EPS) + T::SUBNORMAL;
            assert!((f64::from(got) - want).abs() <= bound, "silu_mul {rows} x {cols}, {i}: {got} {want}");
        }

        let (a, b) = (noise::<T>(rows * cols, 5), noise::<T>(rows * cols, 6));
        let (a_buffer, mut b_buffer) = (upload(&device, &a), upload(&device, &b));
        device.add(whole(&a_buffer, rows, cols), whole_mut(&mut b_buffer, rows, cols)).unwrap();
        let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| T::from_f32(a + b).to_f32()).collect();
        assert_eq!(download(&device, &b_buffer), want);
    }
}

fn lookups<T: Element>() {
    let Some(device) = gpu::<T>() else { return };
    for (vocabulary, hidden) in [(50, 24), (1000, 257), (7, 4096)] {
        let table = noise::<T>(vocabulary * hidden, 7);
        let weight = DenseWeight {
            in_features: hidden,
            out_features: vocabulary,
            data: DenseData::F32(&table),
            bias: None,
        };
        let embedding = device.embedding(&weight).unwrap();
        let tokens: Vec<u32> = (0..9).map(|i| (i * 31 + 5) % vocabulary as u32).collect();
        let sequences = [SequencePlan { rows: 0..9, past: 0, pages: &[0] }];
        let mut step = device.new_step().unwrap();
        let plan =
            StepPlan { tokens: &tokens, sequences: &sequences, outputs: &[2, 8], ..StepPlan::default() };
        device.set_step(&mut step, &plan).unwrap();
        let mut y = device.alloc(9 * hidden).unwrap();
        device.embed(&embedding, &step, whole_mut(&mut y, 9, hidden)).unwrap();
        let rows: Vec<f32> =
            tokens.iter().flat_map(|&t| &table[t as usize * hidden..][..hidden]).copied().collect();
        assert_eq!(download(&device, &y), rows);
        let mut chosen = device.alloc(2 * hidden).unwrap();
        device.gather_outputs(&step, whole(&y, 9, hidden), whole_mut(&mut chosen, 2, hidden)).unwrap();
        assert_eq!(download(&device, &chosen), [&rows[2 * hidden..][..hidden], &rows[8 * hidden..]].concat());

        let bad = StepPlan {
            tokens: &[vocabulary as u32],
            sequences: &[SequencePlan { rows: 0..1, past: 0, pages: &[0] }],
            outputs: &[],
            ..StepPlan::default()
        };
        device.set_step(&mut step, &bad).unwrap();
        let error = device.embed(&embedding, &step, whole_mut(&mut y, 1, hidden)).unwrap_err();
        assert!(matches!(error, KernelError::Argument { what: "token", .. }), "{error}");
    }
    for cols in [1, 5, 32_000, 128_256] {
        let mut x = noise::<T>(6 * cols, 8);
        let last = cols - 1;
        x[last] = 3.0; // row 0: at the end
        x[cols] = 3.0; // row 1: at the start, and again later
        x[cols + last] = 3.0;
        x[3 * cols - 1 - last / 2] = f32::NAN; // row 2
        x[3 * cols..4 * cols].fill(f32::NEG_INFINITY);
        x[4 * cols..5 * cols].fill(-0.0);
        x[5 * cols - 1] = if cols > 1 { 0.0 } else { -0.0 };
        let want = |row: &[f32]| {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let first = row.iter().position(|&v| v == largest).map(|i| i as u32);
            if row.iter().any(|v| v.is_nan()) { None } else { first }
        };
        let want: Vec<_> = x.chunks(cols).map(want).collect();
        let mut got = [Some(77); 6];
        device.argmax(whole(&upload(&device, &x), 6, cols), &mut got).unwrap();
        assert_eq!(got[..], want[..], "{cols}");
    }
}

#[test]
fn row_operations_in_fp16() {
    norms::<f16>();
    elements::<f16>();
    lookups::<f16>();
}

#[test]
fn row_operations_in_bf16() {
    norms::<bf16>();
    elements::<bf16>();
    lookups::<bf16>();
}
