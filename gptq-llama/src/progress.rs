use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{LayerSummary, LlamaError, Module, memory::resident_anonymous};

/// A flag that stops a long run from another thread. Clones share the flag.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks the run to stop; it does so before the next row of calibration or the next layer.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<(), LlamaError> {
        if self.is_cancelled() { Err(LlamaError::Cancelled) } else { Ok(()) }
    }
}

/// What a quantisation is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QuantizePhase {
    /// Running calibration rows up to the inputs of the modules named.
    Calibrating,
    /// Factorising their Hessian and choosing codes.
    Solving,
    /// The module is quantised.
    Quantized,
    /// Running the rows through the rest of the quantised layer.
    Advancing,
}

/// Where a quantisation stands.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Decoder layer; at the output layer the number of decoder layers.
    pub layer: usize,
    /// Decoder layers in all.
    pub layers: usize,
    /// Modules at work: those that share an input, or one.
    pub modules: &'a [Module],
    /// What is being done.
    pub phase: QuantizePhase,
    /// Loss of the module, once it is quantised by GPTQ.
    pub loss: Option<f64>,
    /// What rounding to nearest would have lost, see [`LayerSummary::rtn_loss`].
    pub rtn_loss: Option<f64>,
    /// Damping of the module, once it is quantised by GPTQ.
    pub damp: Option<f64>,
    /// Calibration tokens a second, once the module is quantised by GPTQ.
    pub tokens_per_second: Option<f64>,
    /// Bytes of memory that the process takes and that no file backs; `None` where the system does not tell.
    pub memory: Option<u64>,
    /// Share of the whole run that is done.
    pub fraction: f64,
    /// Time since the start.
    pub elapsed: Duration,
    /// Time left, if the rest goes like what is done; `None` at the start.
    pub eta: Option<Duration>,
}

/// How a caller watches and stops a run.
pub struct Watch<'a> {
    callback: Box<dyn FnMut(&Progress<'_>) + 'a>,
    cancel: CancelToken,
}

impl Default for Watch<'_> {
    /// Nobody watches.
    fn default() -> Self {
        Self { callback: Box::new(|_| {}), cancel: CancelToken::default() }
    }
}

impl<'a> Watch<'a> {
    /// Calls `callback` after each calibration row and each module.
    #[must_use]
    pub fn on_progress(self, callback: impl FnMut(&Progress<'_>) + 'a) -> Self {
        Self { callback: Box::new(callback), ..self }
    }

    /// Stops when `cancel` is set, with [`LlamaError::Cancelled`].
    #[must_use]
    pub fn with_cancel(self, cancel: CancelToken) -> Self {
        Self { cancel, ..self }
    }
}

/// Counts work and tells the watcher.
pub(crate) struct Reporter<'w, 'a> {
    watch: &'w mut Watch<'a>,
    start: Instant,
    layers: usize,
    /// Decoder layers, and one for the output layer if it is quantised.
    units: usize,
    /// Parts of equal weight that a layer's work is counted in.
    parts: usize,
    /// Share of the whole that took no time worth mention, and when it ended.
    skipped: (f64, Instant),
    memory: Option<u64>,
    peak_memory: Option<u64>,
}

impl<'w, 'a> Reporter<'w, 'a> {
    pub(crate) fn new(watch: &'w mut Watch<'a>, layers: usize, lm_head: bool, parts: usize) -> Self {
        let units = layers + usize::from(lm_head);
        let start = Instant::now();
        let skipped = (0.0, start);
        Self { watch, start, layers, units, parts, skipped, memory: None, peak_memory: None }
    }

    /// Bytes taken, as last looked at.
    pub(crate) fn memory(&self) -> Option<u64> {
        self.memory
    }

    pub(crate) fn peak_memory(&self) -> Option<u64> {
        self.peak_memory
    }

    fn fraction(&self, (layer, done): (usize, f64)) -> f64 {
        ((layer as f64 + done / self.parts as f64) / self.units as f64).min(1.0)
    }

    /// What is done up to here was there before: it says nothing about the time left.
    pub(crate) fn skip(&mut self, at: (usize, f64)) {
        self.skipped = (self.fraction(at), Instant::now());
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Tells that `done` parts of `layer` are done; fails if the run was cancelled.
    pub(crate) fn tell(
        &mut self,
        at: (usize, f64),
        modules: &[Module],
        phase: QuantizePhase,
    ) -> Result<(), LlamaError> {
        self.tell_all(at, modules, phase, None)
    }

    /// Tells that a module is quantised.
    pub(crate) fn finished(&mut self, at: (usize, f64), summary: &LayerSummary) -> Result<(), LlamaError> {
        self.tell_all(at, &[summary.layer.module], QuantizePhase::Quantized, Some(summary))
    }

    fn tell_all(
        &mut self,
        at: (usize, f64),
        modules: &[Module],
        phase: QuantizePhase,
        summary: Option<&LayerSummary>,
    ) -> Result<(), LlamaError> {
        self.watch.cancel.check()?;
        self.memory = resident_anonymous();
        self.peak_memory = self.peak_memory.max(self.memory);
        let fraction = self.fraction(at);
        let (before, since) = self.skipped;
        let share = fraction - before;
        let eta = (share > 0.0).then(|| since.elapsed().mul_f64((1.0 - fraction) / share));
        (self.watch.callback)(&Progress {
            layer: at.0,
            layers: self.layers,
            modules,
            phase,
            loss: summary.and_then(|summary| summary.report.loss),
            rtn_loss: summary.and_then(|summary| summary.rtn_loss),
            damp: summary.and_then(|summary| summary.report.damp).map(|damp| damp.percent),
            tokens_per_second: summary.and_then(LayerSummary::tokens_per_second),
            memory: self.memory,
            fraction,
            elapsed: self.start.elapsed(),
            eta,
        });
        self.watch.cancel.check()
    }
}
