use std::sync::Arc;

use cudarc::driver::{CudaStream, sys};

use super::failure::gpu_error;
use crate::KernelError;

/// Seconds of each of `count` replays of `work` as a CUDA graph, by the GPU's own clock: without what it takes the host to
/// launch one kernel after the other.
pub(super) fn seconds(
    stream: &Arc<CudaStream>,
    work: &mut dyn FnMut() -> Result<(), KernelError>,
    count: usize,
) -> Result<Vec<f64>, KernelError> {
    let failed = |error| gpu_error("timing a graph", error);
    // Once as it stands: nothing may be loaded while a stream is recorded.
    work()?;
    stream.synchronize().map_err(failed)?;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
    let result = work();
    // The recording ends whatever `work` says, or the stream would stay unusable.
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    result?;
    let empty = || KernelError::Gpu { during: "timing a graph", message: "nothing was recorded".into() };
    let graph = graph.map_err(failed)?.ok_or_else(empty)?;
    let event = || stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed);
    let (start, end) = (event()?, event()?);
    // The first replay uploads the graph.
    graph.launch().map_err(failed)?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        start.record(stream).map_err(failed)?;
        graph.launch().map_err(failed)?;
        end.record(stream).map_err(failed)?;
        // Waits for the end.
        times.push(f64::from(start.elapsed_ms(&end).map_err(failed)?) / 1e3);
    }
    Ok(times)
}
