//! What goes wrong on a GPU, or without one, has a type. Without a GPU the tests that need one say so and pass.
#![cfg(feature = "cuda")]
// clippy.toml allows both in tests, but not in the functions that tests share.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod gpu;

use std::process::Command;

use gptq_kernels::{
    DenseData, DenseWeight, Device, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef,
    Unsupported, Workspace,
    cuda::{self, CudaDevice},
};
use gpu::gpu;
use half::f16;

type Gpu = CudaDevice<f16>;

const WEIGHT: [f16; 64 * 4] = [f16::ONE; 64 * 4];

fn weight() -> DenseWeight<'static> {
    DenseWeight { in_features: 64, out_features: 4, data: DenseData::F16(&WEIGHT), bias: None }
}

fn dense(device: &Gpu) -> Box<dyn LinearKernel<Gpu>> {
    cuda::kernels(device).into_iter().find(|kernel| kernel.name() == "cuda-dense").unwrap()
}

/// 64 ones times 64 ones.
fn works(device: &Gpu, layer: &dyn Linear<Gpu>) {
    let (mut x, mut y) = (device.alloc(64).unwrap(), device.alloc(4).unwrap());
    device.upload(&[1.0; 64], Gpu::slice_mut(&mut x, 0..64)).unwrap();
    let mut workspace = Workspace::new(device, layer.workspace_len(1)).unwrap();
    let to = MatMut::new(Gpu::slice_mut(&mut y, 0..4), 1, 4).unwrap();
    layer.forward(MatRef::new(Gpu::slice(&x, 0..64), 1, 64).unwrap(), to, &mut workspace).unwrap();
    let mut got = [0.0; 4];
    device.download(Gpu::slice(&y, 0..4), &mut got).unwrap();
    assert_eq!(got, [64.0; 4]);
}

/// Runs one test of this program by itself, with the driver told that there are no GPUs.
#[test]
fn a_driver_without_devices_is_told_from_no_driver() {
    const CHILD: &str = "GPTQ_TEST_NO_DEVICE";
    if std::env::var_os(CHILD).is_some() {
        match Gpu::new(0) {
            Err(Unsupported::NoDevice { ordinal: 0, devices: 0 }) => return,
            other => panic!("{:?}", other.map(|_| "a device")),
        }
    }
    if gpu::<f16>().is_none() {
        return;
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_driver_without_devices_is_told_from_no_driver"])
        .env(CHILD, "1")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
}

#[test]
fn an_old_gpu_has_no_kernels_and_is_told_why() {
    let Some(device) = gpu::<f16>() else { return };
    let old = device.limited_to((7, 5));
    assert!(cuda::kernels(&old).is_empty());
    let missing = cuda::unavailable(&old);
    assert_eq!(missing.len(), cuda::kernels(&device).len() + cuda::unavailable(&device).len());
    for (kernel, reason) in missing {
        match reason {
            Unsupported::ComputeCapability { needed, got: (7, 5) } => assert!(needed >= (8, 0), "{kernel}"),
            Unsupported::Library { library: "cublas" } => println!("{kernel}: {reason}"),
            other => panic!("{kernel}: {other}"),
        }
    }
    // Nothing is limited to more than it has.
    assert_eq!(device.limited_to((99, 0)).compute_capability(), device.compute_capability());
}

#[test]
fn memory_that_is_not_there_has_sizes_and_leaves_the_device_usable() {
    let Some(device) = gpu::<f16>() else { return };
    let layer = dense(&device).prepare_dense(&weight()).unwrap();
    let elements = 1 << 40;
    match device.alloc(elements) {
        Err(KernelError::OutOfGpuMemory { bytes, free, total }) => {
            assert!(bytes == 2 * elements && free <= total && (1 << 30..bytes).contains(&total));
        }
        other => panic!("{:?}", other.map(|_| "a buffer of 2 TB")),
    }
    assert!(matches!(Workspace::new(&device, elements), Err(KernelError::OutOfGpuMemory { .. })));
    // More elements than bytes can be counted.
    assert!(matches!(device.alloc(usize::MAX), Err(KernelError::OutOfGpuMemory { .. })));
    works(&device, layer.as_ref());
    works(&device, dense(&device).prepare_dense(&weight()).unwrap().as_ref());
}

#[test]
fn copies_of_other_lengths_are_refused() {
    let Some(device) = gpu::<f16>() else { return };
    let mut buffer = device.alloc(8).unwrap();
    assert!(matches!(
        device.upload(&[0.0; 7], Gpu::slice_mut(&mut buffer, 0..8)),
        Err(KernelError::CopyLength { src: 7, dst: 8 })
    ));
    assert!(matches!(
        device.download(Gpu::slice(&buffer, 0..8), &mut [0.0; 9]),
        Err(KernelError::CopyLength { src: 8, dst: 9 })
    ));
}

#[test]
fn weights_that_a_kernel_does_not_take_are_refused() {
    let Some(device) = gpu::<f16>() else { return };
    let single = vec![1.0f32; 64 * 4];
    for kernel in cuda::kernels(&device) {
        let short = DenseWeight { out_features: 5, ..weight() };
        match kernel.prepare_dense(&short) {
            Err(KernelError::WeightLength { field: "weight", got: 256, .. }) => {
                assert!(kernel.supports(&LinearSpec::of_dense(&weight())).is_ok());
            }
            Err(KernelError::Unsupported { reason: Unsupported::WeightFormat, .. }) => {
                assert!(kernel.supports(&LinearSpec::of_dense(&weight())).is_err());
            }
            other => panic!("{}: {:?}", kernel.name(), other.map(|_| "a layer")),
        }
        let other_type = DenseWeight { data: DenseData::F32(&single), ..weight() };
        match kernel.prepare_dense(&other_type) {
            Ok(layer) => assert_eq!(layer.kernel(), "cuda-dense"),
            Err(KernelError::Unsupported { .. }) => assert_ne!(kernel.name(), "cuda-dense"),
            Err(other) => panic!("{}: {other}", kernel.name()),
        }
    }
}

#[test]
fn work_is_timed_and_leaves_the_device_usable_if_it_fails() {
    let Some(device) = gpu::<f16>() else { return };
    let layer = dense(&device).prepare_dense(&weight()).unwrap();
    let (x, mut y) = (device.alloc(64).unwrap(), device.alloc(4).unwrap());
    let mut workspace = Workspace::new(&device, layer.workspace_len(1)).unwrap();
    let mut calls = 0;
    let mut times = |fails_at: usize| {
        device.seconds(
            &mut || {
                calls += 1;
                if calls == fails_at {
                    return Err(KernelError::Workspace { needed: 1, got: 0 });
                }
                let to = MatMut::new(Gpu::slice_mut(&mut y, 0..4), 1, 4)?;
                layer.forward(MatRef::new(Gpu::slice(&x, 0..64), 1, 64)?, to, &mut workspace)
            },
            3,
        )
    };
    let got = times(0).unwrap();
    assert!(got.len() == 3 && got.iter().all(|&seconds| seconds > 0.0), "{got:?}");
    // Before the recording, and while it goes on.
    for fails_at in [3, 5] {
        assert!(matches!(times(fails_at), Err(KernelError::Workspace { needed: 1, got: 0 })));
    }
    works(&device, layer.as_ref());
}
