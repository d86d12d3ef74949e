//! Random layers, and calls of them.

use super::*;

/// A reproducible sequence.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    /// In -1..1.
    pub(super) fn symmetric(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }
}

/// What a test layer is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layer {
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    pub(super) group_size: usize,
    pub(super) scale: f32,
    /// A code for all weights, or random ones.
    pub(super) code: Option<u8>,
    pub(super) act_order: bool,
}

impl Layer {
    pub(super) const fn new(in_features: usize, out_features: usize) -> Self {
        Self { in_features, out_features, group_size: 128, scale: 0.01, code: None, act_order: false }
    }

    pub(super) fn pack(&self) -> PackedLinear {
        let mut random = Random(7);
        let (inputs, outputs) = (self.in_features, self.out_features);
        let groups = inputs.div_ceil(self.group_size);
        let codes: Vec<u8> =
            (0..inputs * outputs).map(|_| self.code.unwrap_or(random.next() as u8 % 16)).collect();
        let zeros: Vec<u8> = (0..groups * outputs).map(|_| random.next() as u8 % 16).collect();
        let scales: Vec<f32> =
            (0..groups * outputs).map(|_| self.scale * (1.0 + random.symmetric() / 2.0)).collect();
        let mut g_idx: Vec<u32> = (0..inputs).map(|i| (i / self.group_size) as u32).collect();
        if self.act_order {
            for i in (1..inputs).rev() {
                g_idx.swap(i, random.next() as usize % (i + 1));
            }
        }
        PackedLinear::pack(&CodesRef {
            bits: Bits::B4,
            group_size: self.group_size,
            in_features: inputs,
            out_features: outputs,
            codes: &codes,
            zeros: &zeros,
            scales: &scales,
            g_idx: &g_idx,
            bias: None,
        })
        .unwrap()
    }
}

/// A layer on the GPU with activations for it.
pub(super) struct Running<T: Element> {
    pub(super) device: CudaDevice<T>,
    pub(super) layer: Box<dyn Linear<CudaDevice<T>>>,
    pub(super) x: <CudaDevice<T> as Device>::Buffer,
    /// What the device holds.
    pub(super) x_host: Vec<f32>,
    pub(super) rows: usize,
}

impl<T: Element> Running<T> {
    pub(super) fn new(
        device: &CudaDevice<T>,
        kernel: &dyn LinearKernel<CudaDevice<T>>,
        packed: &PackedLinear,
        rows: usize,
        x: impl FnMut(usize) -> f32,
    ) -> Result<Self, KernelError> {
        let mut x_host: Vec<f32> = (0..rows * packed.in_features()).map(x).collect();
        let mut x = device.alloc(x_host.len())?;
        device.upload(&x_host, CudaDevice::slice_mut(&mut x, 0..x_host.len()))?;
        device.download(CudaDevice::slice(&x, 0..x_host.len()), &mut x_host)?;
        Ok(Self { device: device.clone(), layer: kernel.prepare(packed)?, x, x_host, rows })
    }

    /// `y`, in poisoned memory, on `stream`.
    pub(super) fn forward(&self) -> Result<Vec<f32>, KernelError> {
        let (inputs, outputs) = (self.layer.spec().in_features, self.layer.spec().y_features());
        let mut y = vec![f32::NAN; self.rows * outputs];
        let mut buffer = self.device.alloc(y.len())?;
        self.device.upload(&y, CudaDevice::slice_mut(&mut buffer, 0..y.len()))?;
        self.layer.forward(
            MatRef::new(CudaDevice::slice(&self.x, 0..self.rows * inputs), self.rows, inputs)?,
            MatMut::new(CudaDevice::slice_mut(&mut buffer, 0..y.len()), self.rows, outputs)?,
            &mut Workspace::new(&self.device, self.layer.workspace_len(self.rows))?,
        )?;
        self.device.download(CudaDevice::slice(&buffer, 0..y.len()), &mut y)?;
        Ok(y)
    }

    /// Largest error in units of the bound; checks some rows if there are many.
    pub(super) fn worst(
        &self,
        kernel: &dyn LinearKernel<CudaDevice<T>>,
        packed: &PackedLinear,
        y: &[f32],
    ) -> f64 {
        let (inputs, outputs) = (packed.in_features(), packed.out_features());
        let (reference, bound) = (Reference::new(packed), kernel.error_bound(&LinearSpec::of(packed)));
        let mut worst = 0.0f64;
        for row in (0..self.rows).step_by(self.rows.div_ceil(4)).chain([self.rows - 1]) {
            for output in 0..outputs {
                let exact = reference.element(&self.x_host[row * inputs..][..inputs], output);
                let got = f64::from(y[row * outputs + output]);
                let largest = T::from_f32(f32::MAX).to_f32().is_infinite() && exact.y.abs() > 65519.0;
                let units = if largest {
                    if got == f64::INFINITY.copysign(exact.y) { 0.0 } else { f64::INFINITY }
                } else {
                    (got - exact.y).abs() / bound.of(exact.magnitude, exact.y, exact.weight_sum)
                };
                worst = if units.is_nan() { f64::INFINITY } else { worst.max(units) };
            }
        }
        worst
    }
}

/// Runs `check` for every kernel that supports the layer.
pub(super) fn each<T: Element>(
    layer: &Layer,
    mut check: impl FnMut(&CudaDevice<T>, &dyn LinearKernel<CudaDevice<T>>, &PackedLinear),
) {
    let Some(device) = gpu::<T>() else { return };
    let packed = layer.pack();
    for kernel in cuda::kernels(&device) {
        if kernel.supports(&LinearSpec::of(&packed)).is_ok() {
            check(&device, kernel.as_ref(), &packed);
        }
    }
}
