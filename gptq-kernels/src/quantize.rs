//! Quantising where the activations are: gptq-core's algorithm behind one trait, for every device.
//!
//! ```text
//! sums      <- inputs of a layer, batch by batch        add_batch
//! moments   <- sums: scaled, in float64                 finish
//! prepared  <- moments: ordered, damped, factorised     prepare_moments   once for q, k and v
//! quantized <- prepared, weight: the column loop        quantize       for each of them
//! codes, packed words, weights again <- quantized       download, pack, dequantize
//! ```

mod backend;

use gptq_core::{GptqConfig, GptqError, Hessian, LayerReport, QuantizedWeight};
use gptq_format::{PackError, PackedLinear};
use ndarray::{Array2, ArrayView2};

pub use backend::{DeviceMemory, QuantizeBackend};

use crate::{DenseWeight, Device, KernelError, MatMut, MatRef};

/// Quantises weights by their inputs' second moments, on one device.
///
/// All implementations take the same settings and follow the same reference: codes differ where the devices' arithmetic
/// rounds differently near a tie, and nowhere else. The same inputs in the same order give the same bits on the same
/// device, run after run, however they are split into batches.
pub trait Quantizer<D: Device>: Send + Sync {
    /// Second moments under construction.
    type Sums: Send;
    /// Finished second moments: a [`Hessian`] where the device has it.
    type Moments: Send + Sync;
    /// A factorised Hessian.
    type Prepared: Send + Sync;
    /// Codes, scales and zeros of one weight.
    type Quantized: Send + Sync;

    /// The settings.
    fn config(&self) -> &GptqConfig;

    /// Empty sums for a layer with that many inputs; with GPTAQ in the settings, for reference inputs too.
    ///
    /// # Errors
    /// No memory, or more features than the device takes.
    fn sums(&self, in_features: usize) -> Result<Self::Sums, QuantizeError>;

    /// Adds inputs (tokens, in_features) of the layer, and those of the same tokens in the unquantised model, which GPTAQ
    /// needs.
    ///
    /// # Errors
    /// [`GptqError::Features`], [`GptqError::ReferenceTokens`], [`GptqError::MissingReference`] and
    /// [`GptqError::UnexpectedReference`]; what the device says.
    fn add_batch(
        &self,
        sums: &mut Self::Sums,
        inputs: MatRef<'_, D>,
        reference: Option<MatRef<'_, D>>,
    ) -> Result<(), QuantizeError>;

    /// The second moments of all tokens; waits for them.
    ///
    /// # Errors
    /// [`GptqError::NoSamples`], [`GptqError::NonFiniteHessian`]; what the device says.
    fn finish(&self, sums: Self::Sums) -> Result<Self::Moments, QuantizeError>;

    /// Second moments computed elsewhere.
    ///
    /// # Errors
    /// What the device says.
    fn moments(&self, hessian: Hessian) -> Result<Self::Moments, QuantizeError>;

    /// Diagonal of the Hessian, (in_features).
    fn diagonal(&self, moments: &Self::Moments) -> Vec<f64>;

    /// [`Hessian::output_error`] of a weight error (rows, in_features).
    ///
    /// # Errors
    /// [`GptqError::Features`]; what the device says.
    fn output_error(&self, moments: &Self::Moments, error: ArrayView2<'_, f32>)
    -> Result<f64, QuantizeError>;

    /// Orders, damps and factorises the Hessian, once for all weights that share it.
    ///
    /// # Errors
    /// [`GptqError::NotPositiveDefinite`] unless the settings fall back to rounding, [`GptqError::MissingReference`]; what
    /// the device says.
    fn prepare_moments(&self, moments: &Self::Moments) -> Result<Self::Prepared, QuantizeError>;

    /// [`finish`](Self::finish), then [`prepare_moments`](Self::prepare_moments).
    ///
    /// # Errors
    /// Theirs.
    fn prepare(&self, sums: Self::Sums) -> Result<Self::Prepared, QuantizeError> {
        self.prepare_moments(&self.finish(sums)?)
    }

    /// [`moments`](Self::moments), then [`prepare_moments`](Self::prepare_moments).
    ///
    /// # Errors
    /// Theirs.
    fn prepare_hessian(&self, hessian: Hessian) -> Result<Self::Prepared, QuantizeError> {
        self.prepare_moments(&self.moments(hessian)?)
    }

    /// Quantises a weight.
    ///
    /// # Errors
    /// [`GptqError::Features`], [`GptqError::NonFiniteWeight`], [`GptqError::NonFiniteScale`],
    /// [`GptqError::NonFiniteLoss`]; [`KernelError::WeightLength`]; what the device says.
    fn quantize(
        &self,
        prepared: &Self::Prepared,
        weight: &DenseWeight<'_>,
    ) -> Result<Self::Quantized, QuantizeError>;

    /// The same for a weight (out_features, in_features) that is on the device already, in the type of its activations.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize).
    fn quantize_resident(
        &self,
        prepared: &Self::Prepared,
        weight: MatRef<'_, D>,
    ) -> Result<Self::Quantized, QuantizeError>;

    /// How it went.
    fn report<'a>(&self, quantized: &'a Self::Quantized) -> &'a LayerReport;

    /// Scales (out_features, groups), as the solver has them.
    fn scales(&self, quantized: &Self::Quantized) -> Array2<f32>;

    /// Codes, scales and zeros on the host.
    ///
    /// # Errors
    /// What the device says.
    fn download(&self, quantized: &Self::Quantized) -> Result<QuantizedWeight, QuantizeError>;

    /// The layer as it is stored, with the bias of the original.
    ///
    /// # Errors
    /// [`PackError::NonFinite`] if a scale or bias has no finite half precision value; what the device says.
    fn pack(&self, quantized: &Self::Quantized, bias: Option<&[f32]>) -> Result<PackedLinear, QuantizeError>;

    /// Writes the weight that the codes stand for, scales in float32, to `y` (out_features, in_features).
    ///
    /// # Errors
    /// [`KernelError::Shape`]; what the device says.
    fn dequantize(&self, quantized: &Self::Quantized, y: MatMut<'_, D>) -> Result<(), QuantizeError>;

    /// Bytes of device memory that quantising weights of up to `out_features` rows takes at most, from the first
    /// batch to the packed layer, besides activations and the weights of the forward pass.
    fn working_bytes(&self, in_features: usize, out_features: usize) -> usize;
}

/// What can go wrong in quantising on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The algorithm cannot use what it was given.
    #[error(transparent)]
    Gptq(#[from] GptqError),
    /// The device cannot do it.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The result cannot be stored.
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// Bias as [`PackedLinear`] holds it.
#[cfg(feature = "cuda")]
pub(crate) fn half_bias(bias: &[f32]) -> Result<Vec<half::f16>, PackError> {
    let halves = bias.iter().enumerate().map(|(index, &value)| {
        let half = half::f16::from_f32(value);
        if half.is_finite() { Ok(half) } else { Err(PackError::NonFinite { field: "bias", index, value }) }
    });
    halves.collect()
}
