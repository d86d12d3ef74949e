use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use crate::{
    KernelError,
    cuda::{driver::zeros, failure::gpu_error, pinned::Pinned},
};

/// Outputs for which there is room from the start.
const FEWEST: usize = 64;
/// What kernels write for logits that are not finite.
pub(super) const NONE: u32 = u32::MAX;

/// Tokens that were drawn: on the device for the next step, and of the last two steps on the host, where kernels write them
/// themselves. An event tells when they are there.
pub(super) struct Drawn {
    stream: Arc<CudaStream>,
    tokens: CudaSlice<u32>,
    tokens_address: u64,
    host: [Pinned; 2],
    /// Outputs for which there is room.
    capacity: usize,
    /// Tokens of the last step that drew.
    len: usize,
    /// How many tokens were sent under the last two numbers.
    sent: [(u64, usize); 2],
    /// Steps that have drawn and sent.
    count: u64,
}

impl Drawn {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self, KernelError> {
        let tokens = zeros(stream, FEWEST)?;
        let tokens_address = tokens.device_ptr(stream).0;
        let host = [Pinned::new(stream.context(), FEWEST)?, Pinned::new(stream.context(), FEWEST)?];
        let stream = Arc::clone(stream);
        Ok(Self {
            stream,
            tokens,
            tokens_address,
            host,
            capacity: FEWEST,
            len: 0,
            sent: [(0, 0); 2],
            count: 0,
        })
    }

    /// Makes room for `outputs` tokens and keeps what there is.
    pub(super) fn reserve(&mut self, outputs: usize) -> Result<(), KernelError> {
        if outputs <= self.capacity {
            return Ok(());
        }
        let (stream, capacity) = (&self.stream, outputs.next_power_of_two());
        let mut tokens = zeros::<u32>(stream, capacity)?;
        let copied = stream.memcpy_dtod(&self.tokens, &mut tokens.slice_mut(..self.capacity));
        copied.map_err(|error| gpu_error("copying drawn tokens", error))?;
        for host in &mut self.host {
            let mut larger = Pinned::new(stream.context(), capacity)?;
            let old = host.words()?;
            larger.words()?[..old.len()].copy_from_slice(old);
            *host = larger;
        }
        self.tokens_address = tokens.device_ptr(stream).0;
        (self.tokens, self.capacity) = (tokens, capacity);
        Ok(())
    }

    /// Tokens of the last step that drew.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where the tokens for the next step are.
    pub(super) fn tokens(&self) -> u64 {
        self.tokens_address
    }

    /// Where kernels write the tokens for the host in steps of even and of odd numbers.
    pub(super) fn host(&self) -> [u64; 2] {
        self.host.each_ref().map(Pinned::address)
    }

    /// The number of the next step that draws.
    pub(super) fn next(&self) -> u64 {
        self.count + 1
    }

    /// Counts a step that has drawn `len` tokens.
    pub(super) fn send(&mut self, len: usize) -> Result<u64, KernelError> {
        let number = self.next();
        let slot = (number % 2) as usize;
        self.host[slot].mark(&self.stream)?;
        (self.count, self.len, self.sent[slot]) = (number, len, (number, len));
        Ok(number)
    }

    pub(super) fn sent(&mut self, number: u64) -> Result<Vec<Option<u32>>, KernelError> {
        let slot = (number % 2) as usize;
        let (of, len) = self.sent[slot];
        if of != number || number == 0 {
            let (got, limit) = (number as usize, self.count as usize + 1);
            return Err(KernelError::Argument { what: "drawing", got, limit });
        }
        let words = &self.host[slot].words()?[..len];
        Ok(words.iter().map(|&token| (token != NONE).then_some(token)).collect())
    }
}

impl Drop for Drawn {
    fn drop(&mut self) {
        // A kernel that writes to the host may have been queued without an event behind it. An error means that the context
        // is lost, and then no kernel runs.
        let _ = self.stream.synchronize();
    }
}
