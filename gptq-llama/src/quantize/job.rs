//! From a folder to a folder, and on from where another run has ended.

use std::{
    collections::{HashMap, VecDeque},
    fs,
    io::ErrorKind,
    path::Path,
    sync::mpsc::sync_channel,
    thread,
    time::Instant,
};

use gptq_format::{Checkpoint, PackedLinear, WriteSummary};
use gptq_kernels::quantize::QuantizeBackend;

use super::{
    QuantizeMethod, QuantizeOptions, QuantizeReport,
    identity::Identity,
    journal::{self, Journal, OutputError, Records},
    plan::Plan,
    record::Finished,
    round, run,
    store::{Resumed, Store},
};
use crate::{
    Layer, LlamaConfig, LlamaError, ModelWriter, TokenRows, Watch, WeightSource,
    save::{LayerWriter, REPORT},
};

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
/// Finished layers are written by threads of their own while the next ones are computed: into `.gptq-journal/` in the
/// output folder, where they are synced before they count, and into the checkpoint, which is put in its place by one rename
/// at the end. Whatever ends the run before, a signal, a full disk, a power cut, [`Existing::Resume`] goes on from the
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
pub struct QuantizeJob<'a, D: QuantizeBackend> {
    config: &'a LlamaConfig,
    checkpoint: &'a Checkpoint,
    /// Where weights come from, if not from the checkpoint.
    weights: Option<&'a dyn WeightSource>,
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

impl<'a, D: QuantizeBackend> QuantizeJob<'a, D> {
    /// Rounds the model to nearest unless [`calibration`](Self::calibration) is called.
    pub fn new(
        config: &'a LlamaConfig,
        checkpoint: &'a Checkpoint,
        device: &'a D,
        options: QuantizeOptions,
    ) -> Self {
        Self { config, checkpoint, weights: None, device, options, rows: None, existing: Existing::Refuse }
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
        Self { weights: Some(weights), ..self }
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
        let identity = Identity::new(self.config, self.source(), self.device, self.rows, &self.options)?;
        let Some(mut journal) = self.journal(dir, &identity)? else {
            let report = QuantizeReport::empty(plan.skipped().to_vec());
            let resumed = plan.layers(self.config).count();
            return Ok(QuantizeOutcome { report, written: None, resumed });
        };
        let resumed = journal.records().summaries().len();
        let method = if self.rows.is_some() { QuantizeMethod::Gptq } else { QuantizeMethod::RoundToNearest };
        let writer = ModelWriter::create(dir, self.checkpoint, self.config, &self.options, method)?;
        let layers = Ordered::new(plan.layers(self.config), journal.records().clone(), writer.into_layers());
        let (mut report, layers) = self.quantize(&mut journal, layers, watch)?;
        report.identity = Some(identity);
        let started = Instant::now();
        let mut writer = ModelWriter::with_layers(self.checkpoint, layers);
        if let Some(weights) = self.weights {
            writer = writer.with_weights(weights);
        }
        let written = writer.finish(&report)?;
        journal.remove()?;
        report.times.assemble = started.elapsed();
        Ok(QuantizeOutcome { report, written: Some(written), resumed })
    }

    fn source(&self) -> &'a dyn WeightSource {
        self.weights.unwrap_or(self.checkpoint)
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

    /// Quantises what the journal does not have, and writes it there and to the checkpoint.
    fn quantize(
        &self,
        journal: &mut Journal,
        mut layers: Ordered,
        watch: &mut Watch<'_>,
    ) -> Result<(QuantizeReport, LayerWriter), LlamaError> {
        let records = journal.records().clone();
        thread::scope(|scope| {
            let (sender, receiver) = sync_channel::<Finished>(QUEUE);
            let (recorded, rest) = sync_channel::<Finished>(QUEUE);
            let recorder = scope.spawn(move || -> Result<(), LlamaError> {
                for finished in receiver {
                    journal.append(&finished)?;
                    if recorded.send(finished).is_err() {
                        // The thread behind has failed, and its error says why.
                        break;
                    }
                }
                Ok(())
            });
            let writer = scope.spawn(move || -> Result<Ordered, LlamaError> {
                layers.write_ready()?;
                for finished in rest {
                    layers.add(finished)?;
                }
                Ok(layers)
            });
            let mut store = Resumed { before: records.summaries(), records, writer: sender };
            let result = self.quantize_into(&mut store, watch);
            drop(store);
            let recorder = recorder.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let layers = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            recorder?;
            Ok((result?, layers.writer))
        })
    }

    fn quantize_into(
        &self,
        store: &mut dyn Store,
        watch: &mut Watch<'_>,
    ) -> Result<QuantizeReport, LlamaError> {
        match self.rows {
            Some(rows) => {
                run::quantize(self.config, self.source(), self.device, rows, &self.options, watch, store)
            }
            None => round::round_to_nearest(self.config, self.source(), &self.options, watch, store),
        }
    }
}

/// Writes finished layers in the order of the forward pass, whatever the order in which they come: a resumed run has some
/// already, and must write the same bytes.
struct Ordered {
    /// Not yet written.
    order: VecDeque<Layer>,
    early: HashMap<Layer, PackedLinear>,
    /// Of the run before.
    records: Records,
    writer: LayerWriter,
}

impl Ordered {
    fn new(order: impl Iterator<Item = Layer>, records: Records, writer: LayerWriter) -> Self {
        Self { order: order.collect(), early: HashMap::new(), records, writer }
    }

    fn add(&mut self, finished: Finished) -> Result<(), LlamaError> {
        self.early.insert(finished.summary.layer, finished.packed);
        self.write_ready()
    }

    /// Writes as many as are there without a gap.
    fn write_ready(&mut self) -> Result<(), LlamaError> {
        while let Some(&layer) = self.order.front() {
            let packed = match self.early.remove(&layer) {
                Some(packed) => packed,
                None if self.records.has(layer) => self.records.read(layer)?.0,
                None => break,
            };
            self.writer.layer(layer, &packed)?;
            self.order.pop_front();
        }
        Ok(())
    }
}
