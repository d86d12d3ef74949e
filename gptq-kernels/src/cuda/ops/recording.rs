use std::{collections::HashMap, sync::Arc};

use cudarc::driver::{CudaGraph, CudaStream, sys};

use super::step::{CudaStep, StepShape};
use crate::{KernelError, cuda::failure::gpu_error};

/// Shapes of steps that are remembered; a server that meets more of them records some of them again.
const MOST: usize = 256;

/// Forward passes as CUDA graphs, by the shape of their step.
#[derive(Default)]
pub struct CudaRecordings {
    owner: u64,
    by_shape: HashMap<StepShape, Recording>,
}

enum Recording {
    /// Has run once: what it needs has been loaded.
    Seen,
    Graph(Graph),
}

struct Graph(CudaGraph);

// SAFETY: a graph may be used by any thread, one at a time; `CudaRecordings` gives access through `&mut` alone.
unsafe impl Send for Graph {}
// SAFETY: as above; a shared `CudaRecordings` does nothing.
unsafe impl Sync for Graph {}

impl CudaRecordings {
    pub(super) fn replay<E: From<KernelError>>(
        &mut self,
        stream: &Arc<CudaStream>,
        owner: u64,
        step: &CudaStep,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let shape = step.shape();
        if !shape.single {
            return work();
        }
        if self.owner != owner || self.by_shape.len() >= MOST {
            *self = Self { owner, by_shape: HashMap::new() };
        }
        match self.by_shape.get(&shape) {
            None => {
                work()?;
                self.by_shape.insert(shape, Recording::Seen);
            }
            Some(Recording::Seen) => match record(stream, work)? {
                Some(graph) => {
                    launch(&graph)?;
                    self.by_shape.insert(shape, Recording::Graph(graph));
                }
                None => {
                    tracing::debug!("the stream cannot be recorded; every step is launched kernel by kernel")
                }
            },
            Some(Recording::Graph(graph)) => launch(graph)?,
        }
        Ok(())
    }
}

fn launch(graph: &Graph) -> Result<(), KernelError> {
    graph.0.launch().map_err(|error| gpu_error("cuGraphLaunch", error))
}

/// Records `work`; on a stream that cannot be recorded, does it and gives `None`.
fn record<E: From<KernelError>>(
    stream: &Arc<CudaStream>,
    work: impl FnOnce() -> Result<(), E>,
) -> Result<Option<Graph>, E> {
    if stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).is_err() {
        work()?;
        return Ok(None);
    }
    let result = work();
    // The recording ends whatever `work` says, or the stream would stay unusable.
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    result?;
    let graph = graph.map_err(|error| gpu_error("recording a step", error))?;
    let empty = || KernelError::Gpu { during: "recording a step", message: "nothing was recorded".into() };
    Ok(Some(Graph(graph.ok_or_else(empty)?)))
}
