//! From a folder to a folder, and on from where another run has ended.

use std::{fs, io::ErrorKind, path::Path, sync::mpsc::sync_channel, thread};

use gptq_format::{Checkpoint, WriteSummary};
use gptq_kernels::Backend;

use super::{
    QuantizeMethod, QuantizeOptions, QuantizeReport,
    identity::Identity,
    journal::{self, Journal, OutputError},
    plan::Plan,
    round, run,
    store::{Finished, Resumed, Store},
};
use crate::{LlamaConfig, LlamaError, ModelWriter, TokenRows, Watch, WeightSource, save::REPORT};

/// Finished layers that wait for the thread that writes them.
const QUEUE: usize = 2;

/// What to do with an output folder that is not empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// Fail with [`OutputError::Exists`] or [`OutputError::Unfinished`].
    #[default]
    Refuse,
    /// Go on with the run that is in it; the result is to the byte that of a run that was never interrupted. Fails with
    /// [`OutputError::Different`] if that run had another model, calibration set or option, or ran on other kernels. An
    /// empty folder is no reason to fail.
    Resume,
    /// Start again. A checkpoint in the folder is replaced once the new one is complete.
    Overwrite,
}

/// Quantises a checkpoint into another folder, layer by layer, so that nothing is lost when it is interrupted.
///
/// Finished layers are written by a thread of their own while the next ones are computed, into `.gptq-journal/` in the
/// output folder, and synced before they count. The checkpoint is put together from them at the end and put in its place
/// by one rename. Whatever ends the run before, a signal, a full disk, a power cut, [`Existing::Resume`] goes on from the
/// last finished layer.
///
/// ```no_run
/// use gptq_format::Checkpoint;
/// use gptq_kernels::cpu::Cpu;
/// use gptq_llama::{Existing, LlamaConfig, QuantizeJob, QuantizeOptions, TokenRows, Watch};
/// use std::path::Path;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = Path::new("model");
/// let (config, checkpoint) = (LlamaConfig::read(dir)?, Checkpoint::open(dir)?);
/// let rows = TokenRows::new(vec![(0..512).collect()])?;
/// let outcome = QuantizeJob::new(&config, &checkpoint, &Cpu, QuantizeOptions::default())
///     .calibration(&rows)
///     .existing(Existing::Resume)
///     .run(Path::new("model-4bit"), &mut Watch::default())?;
/// println!("{} layers, {} of them from before", outcome.report.layers.len(), outcome.resumed);
/// # Ok(())
/// # }
/// ```
pub struct QuantizeJob<'a, D: Backend> {
    config: &'a LlamaConfig,
    checkpoint: &'a Checkpoint,
    weights: &'a dyn WeightSource,
    device: &'a D,
    options: QuantizeOptions,
    rows: Option<&'a TokenRows>,
    existing: Existing,
}

/// What came of a [`QuantizeJob`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QuantizeOutcome {
    /// What became of every layer, those of the run before included.
    pub report: QuantizeReport,
    /// What was written; `None` if the folder held the complete result of the same run already.
    pub written: Option<WriteSummary>,
    /// Layers that the run before had finished.
    pub resumed: usize,
}

impl<'a, D: Backend> QuantizeJob<'a, D> {
    /// Rounds the model to nearest unless [`calibration`](Self::calibration) is called.
    pub fn new(
        config: &'a LlamaConfig,
        checkpoint: &'a Checkpoint,
        device: &'a D,
        options: QuantizeOptions,
    ) -> Self {
        Self {
            config,
            checkpoint,
            weights: checkpoint,
            device,
            options,
            rows: None,
            existing: Existing::Refuse,
        }
    }

    /// Quantises by GPTQ on these rows.
    #[must_use]
    pub fn calibration(self, rows: &'a TokenRows) -> Self {
        Self { rows: Some(rows), ..self }
    }

    /// Takes weights from here, such as [`LoraWeights`](crate::LoraWeights), instead of the checkpoint, which still says
    /// which tensors there are and of which types.
    #[must_use]
    pub fn weights(self, weights: &'a dyn WeightSource) -> Self {
        Self { weights, ..self }
    }

    /// What to do with a folder that is not empty; [`Existing::Refuse`] unless said otherwise.
    #[must_use]
    pub fn existing(self, existing: Existing) -> Self {
        Self { existing, ..self }
    }

    /// Whether a run in `dir` can be resumed.
    pub fn is_resumable(dir: &Path) -> bool {
        journal::find(dir).is_some()
    }

    /// Quantises into `dir`, which is created if need be.
    ///
    /// Errors: [`LlamaError::Output`], and those of [`quantize`](crate::quantize()) and [`ModelWriter`]. Layers that were
    /// finished before the error are kept.
    pub fn run(&self, dir: &Path, watch: &mut Watch<'_>) -> Result<QuantizeOutcome, LlamaError> {
        let plan = Plan::new(self.config, &self.options)?;
        if let Some(rows) = self.rows {
            rows.check_vocabulary(self.config.vocab_size)?;
        }
        let identity = Identity::new(self.config, self.weights, self.device, self.rows, &self.options)?;
        let Some(mut journal) = self.journal(dir, &identity)? else {
            let report = QuantizeReport::empty(plan.skipped().to_vec());
            let resumed = plan.layers(self.config).count();
            return Ok(QuantizeOutcome { report, written: None, resumed });
        };
        let resumed = journal.records().summaries().len();
        let mut report = self.quantize(&mut journal, watch)?;
        report.identity = Some(identity);
        let method = if self.rows.is_some() { QuantizeMethod::Gptq } else { QuantizeMethod::RoundToNearest };
        let mut writer = ModelWriter::create(dir, self.checkpoint, self.config, &self.options, method)?
            .with_weights(self.weights);
        for layer in plan.layers(self.config) {
            let (packed, _) = journal.records().read(layer)?;
            writer.layer(layer, &packed)?;
        }
        let written = writer.finish(&report)?;
        journal.remove()?;
        Ok(QuantizeOutcome { report, written: Some(written), resumed })
    }

    /// The journal to go on with; `None` if there is nothing left to do.
    fn journal(&self, dir: &Path, identity: &Identity) -> Result<Option<Journal>, LlamaError> {
        let at_dir = |source| OutputError::io(dir, source);
        fs::create_dir_all(dir).map_err(at_dir)?;
        let found = journal::find(dir);
        let mut others = 0;
        for entry in fs::read_dir(dir).map_err(at_dir)? {
            let name = entry.map_err(at_dir)?.file_name();
            // Folders of this name are what writers that were killed leave.
            others += usize::from(!name.to_str().is_some_and(|name| name.starts_with(".gptq-")));
        }
        match (self.existing, found) {
            (Existing::Overwrite, _) => Journal::create(dir, identity).map(Some),
            (Existing::Resume, Some(_)) => Journal::open(dir, identity).map(Some),
            (Existing::Refuse, Some(folder)) => {
                let layers = journal::count(&folder).unwrap_or(0);
                Err(OutputError::Unfinished { dir: dir.to_owned(), layers }.into())
            }
            (_, None) if others == 0 => Journal::create(dir, identity).map(Some),
            (Existing::Resume, None) if self.is_finished(dir, identity)? => {
                journal::remove_rest(dir)?;
                Ok(None)
            }
            (Existing::Resume, None) => Err(OutputError::NothingToResume { dir: dir.to_owned() }.into()),
            (Existing::Refuse, None) => Err(OutputError::Exists { dir: dir.to_owned() }.into()),
        }
    }

    /// Whether the folder holds the result of this very run: it was killed, or its last message was lost, after the end.
    fn is_finished(&self, dir: &Path, identity: &Identity) -> Result<bool, LlamaError> {
        gptq_format::CheckpointWriter::recover(dir)?;
        let path = dir.join(REPORT);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Identity::of_report(&text).is_some_and(|other| other == *identity)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(source) => Err(OutputError::io(&path, source).into()),
        }
    }

    /// Quantises what the journal does not have, and writes it there.
    fn quantize(&self, journal: &mut Journal, watch: &mut Watch<'_>) -> Result<QuantizeReport, LlamaError> {
        let records = journal.records().clone();
        thread::scope(|scope| {
            let (sender, receiver) = sync_channel::<Finished>(QUEUE);
            let writer =
                scope.spawn(move || receiver.iter().try_for_each(|finished| journal.append(&finished)));
            let mut store = Resumed { before: records.summaries(), records, writer: sender };
            let result = self.quantize_into(&mut store, watch);
            drop(store);
            match writer.join() {
                Ok(Ok(())) => result,
                Ok(Err(error)) => Err(error),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn quantize_into(
        &self,
        store: &mut dyn Store,
        watch: &mut Watch<'_>,
    ) -> Result<QuantizeReport, LlamaError> {
        match self.rows {
            Some(rows) => {
                run::quantize(self.config, self.weights, self.device, rows, &self.options, watch, store)
            }
            None => round::round_to_nearest(self.config, self.weights, &self.options, watch, store),
        }
    }
}
