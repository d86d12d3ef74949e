//! How long a program waits for its first result from a GPU, step by step:
//!
//! ```text
//! cargo build --release -p gptq-kernels --features cuda --example cold_start
//! CUDA_CACHE_PATH=$(mktemp -d) target/release/examples/cold_start     # the driver's cache of compiled PTX is empty then
//! ```

// A program for the terminal, which ends with the first error.
#![allow(clippy::print_stdout)]

use std::{error::Error, time::Instant};

use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::{
    CostTable, DenseData, DenseWeight, Device, Linear, LinearSpec, MatMut, MatRef, Selector, Workspace,
    cuda::{self, CudaDevice},
};
use half::f16;

type Gpu = CudaDevice<f16>;

const K: usize = 4096;
const N: usize = 4096;

fn packed() -> Result<PackedLinear, Box<dyn Error>> {
    let groups = K / 128;
    let codes: Vec<u8> = (0..K * N).map(|i| (i * 7 % 16) as u8).collect();
    let g_idx: Vec<u32> = (0..K as u32).map(|i| i / 128).collect();
    Ok(PackedLinear::pack(&CodesRef {
        bits: Bits::B4,
        group_size: 128,
        in_features: K,
        out_features: N,
        codes: &codes,
        zeros: &vec![8; groups * N],
        scales: &vec![0.01; groups * N],
        g_idx: &g_idx,
        bias: None,
    })?)
}

/// One row, there and back.
fn first_result(device: &Gpu, layer: &dyn Linear<Gpu>) -> Result<f32, Box<dyn Error>> {
    let (mut x, mut y) = (device.alloc(K)?, device.alloc(N)?);
    device.upload(&vec![0.5; K], Gpu::slice_mut(&mut x, 0..K))?;
    let mut workspace = Workspace::new(device, layer.workspace_len(1))?;
    let to = MatMut::new(Gpu::slice_mut(&mut y, 0..N), 1, N)?;
    layer.forward(MatRef::new(Gpu::slice(&x, 0..K), 1, K)?, to, &mut workspace)?;
    let mut got = vec![0.0; N];
    device.download(Gpu::slice(&y, 0..N), &mut got)?;
    Ok(got[0])
}

fn main() -> Result<(), Box<dyn Error>> {
    let weight = packed()?;
    let start = Instant::now();
    let said = |what: &str| println!("{:7.1} ms  {what}", 1e3 * start.elapsed().as_secs_f64());
    let device = Gpu::new(0)?;
    said("the device");
    let kernels = cuda::kernels(&device);
    said("the kernels it can run");
    let costs = CostTable::shipped(&device.model()).unwrap_or_else(|| CostTable::new(&device.model()));
    let selector = Selector::new().costs(&costs);
    let (kernel, _) = selector.select(&kernels, &LinearSpec::of(&weight))?;
    let layer = kernel.prepare(&weight)?;
    said(&format!("a layer of {K} x {N} prepared by {}", kernel.name()));
    first_result(&device, layer.as_ref())?;
    said("its first result on the host");
    let float = vec![f16::ONE; K * N];
    let dense = DenseWeight { in_features: K, out_features: N, data: DenseData::F16(&float), bias: None };
    let (kernel, _) = selector.select(&kernels, &LinearSpec::of_dense(&dense))?;
    let layer = kernel.prepare_dense(&dense)?;
    said(&format!("a float layer prepared by {}", kernel.name()));
    first_result(&device, layer.as_ref())?;
    said("its first result on the host");
    Ok(())
}
