//! Memory of a device that has its own.

use gptq_kernels::{
    KernelError,
    quantize::{QuantizeBackend, Quantizer},
};

use super::{QuantizeOptions, activations::element_bytes, calibrate::Stream, quantizers::Quantizers};
use crate::{Layer, LlamaConfig, LlamaError, Module, TokenRows};

/// What is left free besides all that is counted: scratch of libraries, kernels, and what the pool cannot use because it is
/// in pieces.
const MARGIN: usize = 2 << 30;

/// Bytes of activations that a device can have, if it has memory of its own: what is free now without what a layer needs,
/// unless the options say it.
pub(super) fn for_activations<D: QuantizeBackend>(
    device: &D,
    config: &LlamaConfig,
    quantizers: &Quantizers<D>,
    options: &QuantizeOptions,
    rows: &TokenRows,
    with_reference: bool,
) -> Result<Option<usize>, LlamaError> {
    let Some(memory) = device.memory()? else { return Ok(None) };
    if let Some(bytes) = options.device_activation_bytes {
        return Ok(Some(bytes));
    }
    let free = usize::try_from(memory.free).unwrap_or(usize::MAX);
    let modules = Module::ALL.into_iter().chain(options.lm_head.then_some(Module::LmHead));
    let working = modules.map(|module| {
        let (inputs, outputs) = module.shape(config);
        let each = quantizers.all().iter().map(|quantizer| quantizer.working_bytes(inputs, outputs));
        each.max().unwrap_or(0)
    });
    let working = working.max().unwrap_or(0);
    // Without true_sequential the moments of all four stages wait for each other.
    let waiting = if options.true_sequential { 0 } else { working / 2 };
    let element = element_bytes::<D>();
    let weights: usize = Layer::of_decoder(config)
        .take_while(|layer| layer.layer == 0)
        .map(|layer| {
            let (inputs, outputs) = layer.module.shape(config);
            inputs * outputs * element
        })
        .sum();
    let copies = 1 + usize::from(with_reference || !options.true_sequential);
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let row =
        rows.longest() * element * (4 * hidden + 4 * inner + config.q_features() + 2 * config.kv_features());
    let embedding = config.vocab_size * hidden * 4;
    let needed = [working, waiting, copies * weights, row, embedding, MARGIN];
    Ok(Some(needed.into_iter().fold(free, usize::saturating_sub)))
}

/// Bytes of the device's memory that are taken, by whomever.
pub(super) fn taken<D: QuantizeBackend>(device: &D) -> Result<Option<u64>, LlamaError> {
    Ok(device.memory()?.map(|memory| memory.total.saturating_sub(memory.free)))
}

/// Does `work`, again with fewer rows of activations on the device as long as its memory is too small for it.
pub(super) fn with_room<D: QuantizeBackend, R>(
    device: &D,
    streams: &mut [&mut Stream<D>],
    mut work: impl FnMut() -> Result<R, LlamaError>,
) -> Result<R, LlamaError> {
    loop {
        let error = match work() {
            Err(error) if is_out_of_memory(&error) => error,
            result => return result,
        };
        let mut moved = false;
        for stream in streams.iter_mut() {
            moved |= stream.make_room(device)?;
        }
        if !moved {
            return Err(error);
        }
        // What the rows had is free once they are copied.
        device.synchronize()?;
    }
}

fn is_out_of_memory(error: &LlamaError) -> bool {
    matches!(
        error,
        LlamaError::Kernel(KernelError::OutOfGpuMemory { .. })
            | LlamaError::Layer { source: KernelError::OutOfGpuMemory { .. }, .. }
    )
}
