//! Every kernel of a GPU passes the battery, and what only a GPU can do wrong. Without a GPU the tests say so and pass.
#![cfg(feature = "cuda")]
// clippy.toml allows both in tests, but not in the functions that tests share.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod gpu;
#[path = "cuda_kernels/layer.rs"]
mod layer;
#[path = "cuda_kernels/streams.rs"]
mod streams;

use std::sync::Arc;

use cudarc::driver::{CudaStream, sys};
use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::{
    Backend, Device, Epilogue, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef,
    Prologue, RmsNorm, Unsupported, Workspace,
    conformance::{self, Case},
    cuda::{self, CudaDevice, Element},
    reference::Reference,
};
use gpu::gpu;
use half::{bf16, f16};
use layer::{Layer, Random, Running, each};

/// Runs the battery and prints, for every kind of layer, the largest error in units of the kernel's bound: the table in
/// `docs/KERNEL-ERRORS.md`.
fn battery<T: Element>(device: Option<CudaDevice<T>>, dtype: &str) {
    let Some(device) = device else { return };
    let mut failed = Vec::new();
    for kernel in cuda::kernels(&device) {
        let mut run = 0;
        for kind in Case::all().chunk_by(|a, b| a.weight == b.weight) {
            let report = conformance::run_cases(&device, kernel.as_ref(), kind);
            run += report.run;
            if report.run > 0 {
                println!("{} | {dtype} | {:?} | {:.3}", kernel.name(), kind[0].weight, report.worst);
            }
            if !report.failures.is_empty() {
                failed.push(report.to_string());
            }
        }
        println!("{}, {dtype}: {run} cases run", kernel.name());
        assert!(run > 0, "{} has no case", kernel.name());
    }
    for (kernel, reason) in cuda::unavailable(&device) {
        println!("{kernel}: not run, {reason}");
    }
    assert!(failed.is_empty(), "{}", failed.concat());
}

#[test]
fn every_kernel_passes_the_battery_in_fp16() {
    battery(gpu::<f16>(), "fp16");
}

#[test]
fn every_kernel_passes_the_battery_in_bf16() {
    battery(gpu::<bf16>(), "bf16");
}

/// A part of the battery that is short enough to be run under a sanitizer: every kind of layer in one odd shape.
fn small_battery(name: &str) {
    let Some(device) = gpu::<f16>() else { return };
    let cases: Vec<Case> = Case::all()
        .into_iter()
        .filter(|case| {
            case.in_features == 203 || case.epilogue != Epilogue::Store || case.prologue != Prologue::Load
        })
        .map(|case| Case { rows: case.rows.min(17), ..case })
        .step_by(5)
        .collect();
    for device in [device.limited_to((8, 0)), device] {
        for kernel in cuda::kernels(&device).iter().filter(|kernel| kernel.name() == name) {
            let report = conformance::run_cases(&device, kernel.as_ref(), &cases);
            println!("{report}");
            assert!(report.failures.is_empty(), "{report}");
        }
    }
}

macro_rules! small_batteries {
    ($($test:ident $kernel:literal)*) => {
        $(#[test]
        fn $test() {
            small_battery($kernel);
        })*

        #[test]
        fn every_kernel_has_a_small_battery() {
            let Some(device) = gpu::<f16>() else { return };
            for device in [device.limited_to((8, 0)), device] {
                for kernel in cuda::kernels(&device) {
                    assert!([$($kernel),*].contains(&kernel.name()), "{}", kernel.name());
                }
            }
        }
    };
}

small_batteries! {
    a_small_battery_of_plain "cuda-plain"
    a_small_battery_of_exllama "cuda-exllama"
    a_small_battery_of_marlin "cuda-marlin"
    a_small_battery_of_gemv "cuda-gemv-sm90"
    a_small_battery_of_wgmma "cuda-wgmma-sm90"
    a_small_battery_of_dense "cuda-dense"
    a_small_battery_of_cublas "cuda-cublas"
}

/// Kernels may do hundreds of rows in another way than some: a part of the battery with so many.
#[test]
fn many_rows_pass_the_battery() {
    fn run<T: Element>() {
        let Some(device) = gpu::<T>() else { return };
        let packed = |case: &Case| {
            matches!(case.weight, conformance::CaseWeight::Packed { bits: Bits::B4 | Bits::B8, .. })
        };
        let cases: Vec<Case> = Case::all().into_iter().filter(packed).collect();
        let fused = |case: &Case| case.epilogue != Epilogue::Store;
        let some = cases
            .iter()
            .filter(|case| !fused(case))
            .step_by(7)
            .chain(cases.iter().filter(|case| fused(case)));
        let cases: Vec<Case> = some.map(|case| Case { rows: 300, ..case.clone() }).collect();
        for kernel in cuda::kernels(&device) {
            let report = conformance::run_cases(&device, kernel.as_ref(), &cases);
            println!("{report}");
            assert!(report.failures.is_empty(), "{report}");
        }
    }
    run::<f16>();
    run::<bf16>();
}

/// What every other GPU gets: the images for compute capability 8.0.
#[test]
fn every_generic_image_passes_the_battery() {
    let generic = |dtype| format!("{dtype}, generic image");
    battery(gpu::<f16>().map(|device| device.limited_to((8, 0))), &generic("fp16"));
    battery(gpu::<bf16>().map(|device| device.limited_to((8, 0))), &generic("bf16"));
}

#[test]
fn a_device_that_is_not_there_is_named() {
    match CudaDevice::<f16>::new(1000) {
        Err(Unsupported::NoDriver) => println!("no driver"),
        Err(Unsupported::NoDevice { ordinal: 1000, devices }) => println!("{devices} devices"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a thousand GPUs"),
    }
}

#[test]
fn long_tall_and_extreme_layers_are_exact_enough() {
    let rows = |layer: Layer, rows: usize, size: f32| (layer, rows, size);
    let cases = [
        rows(Layer::new(32768, 64), 3, 1.0),
        rows(Layer::new(32768, 64), 9, 1.0),
        rows(Layer::new(11008, 160), 8, 1.0),
        rows(Layer::new(32768, 64), 40, 1.0),
        rows(Layer::new(4096, 4100), 200, 1.0),
        rows(Layer::new(1024, 8200), 600, 1.0),
        rows(Layer { act_order: true, ..Layer::new(8192, 96) }, 300, 1.0),
        rows(Layer { group_size: 48, ..Layer::new(1000, 50) }, 33, 1.0),
        rows(Layer { scale: 0.5, ..Layer::new(4096, 64) }, 17, 500.0),
        rows(Layer::new(256, 96), 4096, 1.0),
        rows(Layer { act_order: true, ..Layer::new(8192, 96) }, 2, 1.0),
        rows(Layer { group_size: 48, ..Layer::new(1000, 50) }, 5, 1.0),
        // Scales at the bottom and at the top of fp16.
        rows(Layer { scale: 1e-6, ..Layer::new(512, 64) }, 3, 100.0),
        rows(Layer { scale: 40000.0, ..Layer::new(512, 64) }, 3, 1e-4),
        rows(Layer { scale: 1e-6, ..Layer::new(512, 64) }, 700, 100.0),
        rows(Layer { scale: 40000.0, ..Layer::new(512, 64) }, 700, 1e-4),
        // Sums that fp16 cannot hold, of products that it can.
        rows(Layer { scale: 0.5, ..Layer::new(4096, 64) }, 2, 500.0),
        rows(Layer { scale: 0.5, ..Layer::new(4096, 64) }, 700, 500.0),
        rows(Layer { code: Some(0), ..Layer::new(512, 64) }, 2, 1.0),
        rows(Layer { code: Some(15), ..Layer::new(512, 64) }, 2, 1.0),
    ];
    for (layer, rows, size) in cases {
        each::<f16>(&layer, |device, kernel, packed| {
            let mut random = Random(3);
            let run = Running::new(device, kernel, packed, rows, |_| size * random.symmetric()).unwrap();
            let worst = run.worst(kernel, packed, &run.forward().unwrap());
            assert!(worst <= 1.0, "{}, {layer:?}, {rows} rows: {worst} of the bound", kernel.name());
        });
    }
}

/// An act-ordered layer whose x comes in its order runs as one that is not act-ordered, and computes what it does otherwise.
#[test]
fn layers_in_order_are_the_layers() {
    in_order::<f16>(Epilogue::Store);
    in_order::<bf16>(Epilogue::SiluMul);
}

fn in_order<T: Element>(epilogue: Epilogue) {
    for layer in [Layer::new(4096, 256), Layer { group_size: 64, ..Layer::new(1000, 96) }] {
        let mut ran = 0;
        each::<T>(&Layer { act_order: true, ..layer }, |device, kernel, packed| {
            let (inputs, mut random) = (packed.in_features(), Random(5));
            let fusion = epilogue.into();
            if kernel.supports(&LinearSpec::of(packed).fused(&fusion)).is_err() {
                return;
            }
            for rows in [1, 3, 8, 16, 64, 300] {
                let natural = Running::new(device, kernel, packed, rows, |_| random.symmetric()).unwrap();
                let in_order = kernel.prepare_in_order(packed, &fusion).unwrap();
                assert_eq!(in_order.spec(), &LinearSpec::of_in_order(packed).fused(&fusion));
                let order = in_order.input_order().unwrap().to_vec();
                let moved = |i: usize| natural.x_host[i / inputs * inputs + order[i % inputs] as usize];
                let sorted = packed.with_input_order(&order).unwrap();
                let mut plain = Running::new(device, kernel, &sorted, rows, moved).unwrap();
                plain.layer = kernel.prepare_fused(&sorted, &fusion).unwrap();
                let want = plain.forward().unwrap();
                plain.layer = in_order;
                let got = plain.forward().unwrap();
                assert_eq!(got, want, "{}, {layer:?}, {rows} rows", kernel.name());
                if epilogue == Epilogue::Store {
                    let worst = natural.worst(kernel, packed, &got);
                    assert!(worst <= 1.0, "{}, {layer:?}, {rows} rows: {worst} of the bound", kernel.name());
                }
                ran += 1;
            }
        });
        println!("{layer:?}, {epilogue:?}: {ran} compared");
    }
}

#[test]
fn a_thousand_runs_are_equal_to_the_bit() {
    for rows in [1, 8, 16, 60, 150, 700] {
        each::<f16>(&Layer::new(4096, 1024), |device, kernel, packed| {
            let mut random = Random(5);
            let run = Running::new(device, kernel, packed, rows, |_| random.symmetric()).unwrap();
            let first = run.forward().unwrap();
            for _ in 0..1000 {
                let again = run.forward().unwrap();
                assert!(
                    first.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{}",
                    kernel.name()
                );
            }
        });
    }
}

#[test]
fn activations_may_begin_anywhere() {
    // The second is gathered, the third too long for one block.
    let layers = [
        Layer::new(640, 96),
        Layer { act_order: true, ..Layer::new(640, 96) },
        Layer::new(32768, 70),
        Layer { act_order: true, ..Layer::new(14336, 70) },
    ];
    for layer in layers {
        for rows in [3, 20] {
            begin_anywhere(&layer, rows);
        }
    }
    // More rows than are aligned at a time.
    begin_anywhere(&Layer::new(640, 96), 300);
}

fn begin_anywhere(layer: &Layer, rows: usize) {
    each::<bf16>(layer, |device, kernel, packed| {
        let (inputs, outputs) = (packed.in_features(), packed.out_features());
        let mut random = Random(11);
        let run = Running::new(device, kernel, packed, rows, |_| random.symmetric()).unwrap();
        let aligned = run.forward().unwrap();
        for (x_stride, y_stride) in [(inputs, outputs), (inputs + 1, outputs + 5)] {
            let mut x = device.alloc(1 + rows * x_stride).unwrap();
            for row in 0..rows {
                let at = 1 + row * x_stride;
                device
                    .upload(
                        &run.x_host[row * inputs..][..inputs],
                        CudaDevice::slice_mut(&mut x, at..at + inputs),
                    )
                    .unwrap();
            }
            let mut y = device.alloc(1 + rows * y_stride).unwrap();
            run.layer
                .forward(
                    MatRef::with_stride(
                        CudaDevice::slice(&x, 1..1 + rows * x_stride),
                        rows,
                        inputs,
                        x_stride,
                    )
                    .unwrap(),
                    MatMut::with_stride(
                        CudaDevice::slice_mut(&mut y, 1..1 + rows * y_stride),
                        rows,
                        outputs,
                        y_stride,
                    )
                    .unwrap(),
                    &mut Workspace::new(device, run.layer.workspace_len(rows)).unwrap(),
                )
                .unwrap();
            let mut got = vec![0.0; 1 + rows * y_stride];
            device.download(CudaDevice::slice(&y, 0..got.len()), &mut got).unwrap();
            for row in 0..rows {
                assert_eq!(
                    got[1 + row * y_stride..][..outputs],
                    aligned[row * outputs..][..outputs],
                    "{}, row {row}, strides {x_stride} {y_stride}",
                    kernel.name()
                );
            }
        }
    });
}

#[test]
fn a_prologue_gives_the_bits_of_the_norm() {
    let layers = [
        Layer::new(4096, 96),
        Layer::new(640, 96),
        Layer::new(203, 40),
        // Eight rows leave room for one slot of sums, which blocks use several times.
        Layer::new(8192, ROUNDS),
        // Longer than what threads hold.
        Layer::new(14336, 64),
        Layer { act_order: true, ..Layer::new(4096, 64) },
        Layer { act_order: true, ..Layer::new(203, 40) },
        Layer { act_order: true, ..Layer::new(14336, 32) },
    ];
    for layer in layers {
        same_bits_as_norm::<f16>(&layer);
        same_bits_as_norm::<bf16>(&layer);
    }
}

/// Outputs that 132 blocks of the GEMV do in three rounds.
const ROUNDS: usize = 8600;

/// The sums of a round lie in one of two slots, or in the only one if rows of x leave no room for more, as eight do here.
#[test]
fn eight_rows_have_the_bits_of_each_alone() {
    for act_order in [false, true] {
        let layer = Layer { act_order, ..Layer::new(8192, ROUNDS) };
        let mut ran = 0;
        each::<f16>(&layer, |device, kernel, packed| {
            if kernel.name() != "cuda-gemv-sm90" {
                return;
            }
            let (inputs, outputs, mut random) = (packed.in_features(), packed.out_features(), Random(31));
            let all = Running::new(device, kernel, packed, 8, |_| random.symmetric()).unwrap();
            let expected = all.forward().unwrap();
            for (x, y) in all.x_host.chunks(inputs).zip(expected.chunks(outputs)) {
                let one = Running::new(device, kernel, packed, 1, |i| x[i]).unwrap();
                assert_eq!(one.forward().unwrap(), y, "{layer:?}");
                ran += 1;
            }
        });
        println!("{layer:?}: {ran} rows compared");
    }
}

fn same_bits_as_norm<T: Element>(layer: &Layer) {
    let mut fused_any = false;
    each::<T>(layer, |device, kernel, packed| {
        let (inputs, outputs) = (packed.in_features(), packed.out_features());
        let mut random = Random(19);
        let weight: Vec<f32> = (0..inputs).map(|_| 1.0 + random.symmetric() / 2.0).collect();
        let norm = RmsNorm { weight: &weight, eps: 1e-5 };
        let (fusion, _) =
            kernel.fusible(&LinearSpec::of(packed), Fusion { norm: Some(norm), ..Fusion::default() });
        if fusion.norm.is_none() {
            return;
        }
        fused_any = true;
        let short = RmsNorm { weight: &weight[1..], eps: 1e-5 };
        let wrong = kernel.prepare_fused(packed, &Fusion { norm: Some(short), ..Fusion::default() });
        assert!(matches!(wrong, Err(KernelError::WeightLength { field: "norm", .. })));

        let fused = kernel.prepare_fused(packed, &fusion).unwrap();
        let mut norm_weight = device.alloc(inputs).unwrap();
        device.upload(&weight, CudaDevice::slice_mut(&mut norm_weight, 0..inputs)).unwrap();
        for rows in [1, 2, 3, 5, 8, 9, 20] {
            let run = Running::new(device, kernel, packed, rows, |i| {
                (1.0 + (i / inputs) as f32) * random.symmetric()
            })
            .unwrap();
            let read =
                |buffer, len, cols| MatRef::new(CudaDevice::slice(buffer, 0..len), rows, cols).unwrap();
            let (mut normed, mut y) =
                (device.alloc(rows * inputs).unwrap(), device.alloc(rows * outputs).unwrap());
            let into =
                MatMut::new(CudaDevice::slice_mut(&mut normed, 0..rows * inputs), rows, inputs).unwrap();
            let slice = CudaDevice::slice(&norm_weight, 0..inputs);
            device.rms_norm(read(&run.x, rows * inputs, inputs), slice, 1e-5, None, into).unwrap();
            let mut results = Vec::new();
            for (layer, x) in [(&run.layer, &normed), (&fused, &run.x)] {
                let mut workspace = Workspace::new(device, layer.workspace_len(rows)).unwrap();
                let into =
                    MatMut::new(CudaDevice::slice_mut(&mut y, 0..rows * outputs), rows, outputs).unwrap();
                layer.forward(read(x, rows * inputs, inputs), into, &mut workspace).unwrap();
                let mut got = vec![0.0; rows * outputs];
                device.download(CudaDevice::slice(&y, 0..rows * outputs), &mut got).unwrap();
                results.push(got);
            }
            assert_eq!(results[0], results[1], "{}, {layer:?}, {rows} rows", kernel.name());
        }
    });
    // Kernels with a prologue do not run on every GPU.
    println!("{layer:?}: {}", if fused_any { "compared" } else { "no kernel has a prologue" });
}

/// Input features, output features and rows of a call in which blocks of one kernel share tiles, on a GPU with 132
/// multiprocessors: one leaves the sums of the first input features to another.
const SHARED: (usize, usize, usize) = (1024, 8200, 600);
const SHARED_BY: &str = "cuda-wgmma-sm90";

#[test]
fn rows_of_shared_tiles_have_the_bits_of_whole_ones() {
    let (inputs, outputs, rows) = SHARED;
    each::<f16>(&Layer::new(inputs, outputs), |device, kernel, packed| {
        if kernel.name() != SHARED_BY {
            return;
        }
        let mut random = Random(29);
        let all = Running::new(device, kernel, packed, rows, |_| random.symmetric()).unwrap();
        let expected = all.forward().unwrap();
        // One tile of rows, and as many as leave another part of a tile to share.
        let mut compared = 0;
        for fewer in [256, 512, 599].into_iter().filter(|fewer| all.layer.row_class(rows).contains(fewer)) {
            let some = Running::new(device, kernel, packed, fewer, |i| all.x_host[i]).unwrap();
            assert_eq!(some.forward().unwrap(), expected[..fewer * outputs], "{fewer} rows");
            compared += 1;
        }
        assert!(compared > 1, "{:?}", all.layer.row_class(rows));
    });
}
