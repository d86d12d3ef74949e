use gptq_kernels::{Backend, KernelError, Linear, MatMut, MatRef};

use crate::{
    LlamaError, WeightSource,
    buffers::{all, upload},
    weights::read_tensor,
};

/// A norm that writes its columns in the order in which the layers behind it take them.
pub(super) struct OrderedNorm<D: Backend> {
    /// In that order.
    weight: D::Buffer,
    order: Option<D::Order>,
    eps: f32,
}

impl<D: Backend> OrderedNorm<D> {
    pub(super) fn load(
        device: &D,
        source: &dyn WeightSource,
        name: &str,
        (features, eps): (usize, f32),
        order: Option<&[u32]>,
    ) -> Result<Self, LlamaError> {
        // An order is checked before it is used.
        let prepared = order.map(|order| device.order(order)).transpose()?;
        let mut weight = read_tensor(source, name, &[features])?.to_f32();
        if let Some(order) = order {
            if order.len() != features {
                let (what, got) = ("columns of an order", order.len());
                return Err(KernelError::Argument { what, got, limit: features + 1 }.into());
            }
            weight = order.iter().map(|&column| weight[column as usize]).collect();
        }
        Ok(Self { weight: upload(device, &weight)?, order: prepared, eps })
    }

    /// `y = norm(x)`, for `next` to read.
    pub(super) fn forward(
        &self,
        device: &D,
        next: Option<&dyn Linear<D>>,
        x: MatRef<'_, D>,
        y: MatMut<'_, D>,
    ) -> Result<(), KernelError> {
        device.rms_norm_for(next, x, all::<D>(&self.weight), self.eps, self.order.as_ref(), y)
    }

    /// `residual += delta`, then `y = norm(residual)`
    pub(super) fn add_and_forward(
        &self,
        device: &D,
        residual: MatMut<'_, D>,
        delta: MatRef<'_, D>,
        y: MatMut<'_, D>,
    ) -> Result<(), KernelError> {
        device.add_rms_norm(residual, delta, all::<D>(&self.weight), self.eps, self.order.as_ref(), y)
    }
}
