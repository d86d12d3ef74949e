//! Float weights on a GPU: what the battery is too small for, and what only a GPU can do wrong. Without a GPU the tests say
//! so and pass.
#![cfg(feature = "cuda")]
// clippy.toml allows both in tests, but not in the functions that tests share.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod gpu;

use std::sync::Arc;

use cudarc::driver::sys;
use gptq_kernels::{
    DenseData, DenseWeight, Device, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Workspace,
    cuda::{self, CudaDevice, Element},
    reference::Reference,
};
use gpu::gpu;
use half::f16;

type Gpu = CudaDevice<f16>;

/// A layer of every kernel that does such layers, with activations.
struct Dense {
    in_features: usize,
    out_features: usize,
    weight: Vec<f16>,
    bias: Option<Vec<f32>>,
    x: Vec<f32>,
}

fn symmetric(i: usize) -> f32 {
    let mut v = i as u64 ^ 0x9e37_79b9_7f4a_7c15;
    v = (v ^ (v >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    v = (v ^ (v >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    ((v ^ (v >> 33)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

impl Dense {
    fn new(in_features: usize, out_features: usize, rows: usize, bias: bool) -> Self {
        let half = |i| f16::from_f32(symmetric(i));
        Self {
            in_features,
            out_features,
            weight: (0..in_features * out_features).map(|i| half(i + 7)).collect(),
            bias: bias.then(|| (0..out_features).map(symmetric).collect()),
            x: (0..rows * in_features).map(|i| half(i * 3 + 1).to_f32()).collect(),
        }
    }

    fn weight(&self) -> DenseWeight<'_> {
        DenseWeight {
            in_features: self.in_features,
            out_features: self.out_features,
            data: DenseData::F16(&self.weight),
            bias: self.bias.as_deref(),
        }
    }

    fn rows(&self) -> usize {
        self.x.len() / self.in_features
    }

    /// Largest error of some elements, in units of the bound.
    fn worst(&self, kernel: &dyn LinearKernel<Gpu>, y: &[f32]) -> f64 {
        let reference = Reference::dense(&self.weight()).unwrap();
        let bound = kernel.error_bound(&LinearSpec::of_dense(&self.weight()));
        let mut worst = 0.0f64;
        for row in (0..self.rows()).step_by(self.rows().div_ceil(6)).chain([self.rows() - 1]) {
            for output in (0..self.out_features).step_by(self.out_features.div_ceil(80)) {
                let exact = reference.element(&self.x[row * self.in_features..][..self.in_features], output);
                let got = f64::from(y[row * self.out_features + output]);
                let units = (got - exact.y).abs() / bound.of(exact.magnitude, exact.y, exact.weight_sum);
                worst = if units.is_nan() { f64::INFINITY } else { worst.max(units) };
            }
        }
        worst
    }
}

fn kernels(device: &Gpu) -> Vec<Box<dyn LinearKernel<Gpu>>> {
    for (kernel, reason) in cuda::unavailable(device) {
        println!("{kernel}: not run, {reason}");
    }
    let mut kernels = cuda::kernels(device);
    let spec = LinearSpec::of_dense(&Dense::new(1, 1, 1, false).weight());
    kernels.retain(|kernel| kernel.supports(&spec).is_ok());
    assert!(kernels.iter().any(|kernel| kernel.name() == "cuda-dense"));
    kernels
}

/// `y` of the rows from `start` on, in poisoned memory, with `margin` elements before x and y.
fn forward(
    device: &Gpu,
    layer: &dyn Linear<Gpu>,
    dense: &Dense,
    (start, rows): (usize, usize),
    margin: usize,
) -> Vec<f32> {
    let (inputs, outputs) = (dense.in_features, dense.out_features);
    let mut x = device.alloc(margin + rows * inputs).unwrap();
    let host = &dense.x[start * inputs..][..rows * inputs];
    device.upload(host, Gpu::slice_mut(&mut x, margin..margin + host.len())).unwrap();
    let mut y = vec![f32::NAN; rows * outputs];
    let mut buffer = device.alloc(margin + y.len()).unwrap();
    device.upload(&y, Gpu::slice_mut(&mut buffer, margin..margin + y.len())).unwrap();
    let mut workspace = Workspace::new(device, layer.workspace_len(rows)).unwrap();
    layer
        .forward(
            MatRef::new(Gpu::slice(&x, margin..margin + host.len()), rows, inputs).unwrap(),
            MatMut::new(Gpu::slice_mut(&mut buffer, margin..margin + y.len()), rows, outputs).unwrap(),
            &mut workspace,
        )
        .unwrap();
    device.download(Gpu::slice(&buffer, margin..margin + y.len()), &mut y).unwrap();
    y
}

#[test]
fn layers_of_real_shapes_are_exact_enough() {
    let Some(device) = gpu() else { return };
    for (inputs, outputs, rows, bias) in [
        (4096, 1003, 8, false),
        (4096, 512, 1, true),
        (11008, 300, 9, true),
        (8192, 256, 130, false),
        (32768, 40, 3, false),
        (64, 96, 4096, true),
    ] {
        let dense = Dense::new(inputs, outputs, rows, bias);
        for kernel in kernels(&device) {
            let layer = kernel.prepare_dense(&dense.weight()).unwrap();
            let y = forward(&device, layer.as_ref(), &dense, (0, rows), 0);
            let worst = dense.worst(kernel.as_ref(), &y);
            assert!(worst <= 1.0, "{}, {inputs} x {outputs}, {rows} rows: {worst}", kernel.name());
        }
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_eight() {
    let Some(device) = gpu() else { return };
    let dense = Dense::new(4096, 777, 8, true);
    for kernel in kernels(&device) {
        let layer = kernel.prepare_dense(&dense.weight()).unwrap();
        let whole = forward(&device, layer.as_ref(), &dense, (0, 8), 0);
        for (start, rows, margin) in [(0, 1, 0), (3, 1, 1), (2, 5, 0), (1, 7, 3)] {
            let part = forward(&device, layer.as_ref(), &dense, (start, rows), margin);
            assert_eq!(part, whole[start * 777..][..rows * 777], "{}", kernel.name());
        }
    }
}

#[test]
fn odd_pointers_are_as_good() {
    let Some(device) = gpu() else { return };
    for (rows, bias) in [(40, false), (40, true), (3, true)] {
        let dense = Dense::new(1000, 129, rows, bias);
        for kernel in kernels(&device) {
            let layer = kernel.prepare_dense(&dense.weight()).unwrap();
            let y = forward(&device, layer.as_ref(), &dense, (0, rows), 1);
            let worst = dense.worst(kernel.as_ref(), &y);
            assert!(worst <= 1.0, "{}, {rows} rows: {worst}", kernel.name());
        }
    }
}

#[test]
fn a_thousand_runs_are_equal_to_the_bit() {
    let Some(device) = gpu() else { return };
    for rows in [1, 33, 256] {
        let dense = Dense::new(2048, 512, rows, rows == 33);
        for kernel in kernels(&device) {
            let layer = kernel.prepare_dense(&dense.weight()).unwrap();
            let first = forward(&device, layer.as_ref(), &dense, (0, rows), 0);
            let runs = if rows == 1 { 1000 } else { 100 };
            for _ in 0..runs {
                let again = forward(&device, layer.as_ref(), &dense, (0, rows), 0);
                assert!(
                    first.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{}",
                    kernel.name()
                );
            }
        }
    }
}

/// No run comes before the recording: whatever a kernel loads when it is first needed must not be in the way.
#[test]
fn the_first_pass_can_be_recorded() {
    for rows in [1, 16, 300] {
        let Some(device) = gpu() else { return };
        let dense = Dense::new(1024, 512, rows, false);
        for kernel in kernels(&device) {
            let layer = kernel.prepare_dense(&dense.weight()).unwrap();
            let mut x = device.alloc(dense.x.len()).unwrap();
            device.upload(&dense.x, Gpu::slice_mut(&mut x, 0..dense.x.len())).unwrap();
            let mut y = device.alloc(rows * 512).unwrap();
            let mut workspace = Workspace::new(&device, layer.workspace_len(rows)).unwrap();
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            device.stream().begin_capture(mode).unwrap();
            let result = layer.forward(
                MatRef::new(Gpu::slice(&x, 0..rows * 1024), rows, 1024).unwrap(),
                MatMut::new(Gpu::slice_mut(&mut y, 0..rows * 512), rows, 512).unwrap(),
                &mut workspace,
            );
            let graph = device.stream().end_capture(sys::CUgraphInstantiate_flags(0));
            result.unwrap_or_else(|error| panic!("{}, {rows} rows: {error}", kernel.name()));
            graph.unwrap().expect("something was recorded").launch().unwrap();
            let mut got = vec![0.0; rows * 512];
            device.download(Gpu::slice(&y, 0..rows * 512), &mut got).unwrap();
            assert_eq!(got, forward(&device, layer.as_ref(), &dense, (0, rows), 0), "{}", kernel.name());
        }
    }
}

#[test]
fn two_streams_at_once_do_not_meet() {
    let Some(device) = gpu() else { return };
    for rows in [2, 64] {
        let dense = Dense::new(4096, 1024, rows, true);
        for kernel in kernels(&device) {
            let layer = kernel.prepare_dense(&dense.weight()).unwrap();
            let alone = forward(&device, layer.as_ref(), &dense, (0, rows), 0);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    let stream = device.stream().context().new_stream().unwrap();
                    let device = device.with_stream(Arc::clone(&stream));
                    let (layer, dense, alone) = (layer.as_ref(), &dense, &alone);
                    scope.spawn(move || {
                        for _ in 0..50 {
                            let y = forward(&device, layer, dense, (0, rows), 0);
                            assert!(y.iter().zip(alone).all(|(a, b)| a.to_bits() == b.to_bits()));
                        }
                    });
                }
            });
        }
    }
}

/// The type of the activations decides what cuBLAS can do; everything has a kernel.
#[test]
fn every_type_of_weight_has_a_kernel() {
    fn check<T: Element>() {
        let Ok(device) = CudaDevice::<T>::new(0) else { return println!("skipped: no GPU") };
        let (single, double) = (vec![0.5f32; 64], vec![f16::from_f32(0.5); 64]);
        for data in [DenseData::F32(&single), DenseData::F16(&double)] {
            let weight = DenseWeight { in_features: 32, out_features: 2, data, bias: None };
            let (kernel, why) =
                gptq_kernels::select(&cuda::kernels(&device), &LinearSpec::of_dense(&weight), None)
                    .map(|(kernel, why)| (kernel.name(), why))
                    .unwrap();
            println!("{}, {:?}: {why}", std::any::type_name::<T>(), data.dtype());
            assert!(kernel == "cuda-dense" || kernel == "cuda-cublas");
        }
    }
    check::<f16>();
    check::<half::bf16>();
}
