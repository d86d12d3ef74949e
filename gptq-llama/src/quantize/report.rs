//! What came of a quantisation, and how it is written down.

use std::time::Duration;

use gptq_core::LayerReport;
use serde_json::{Map, Value, json};

use super::{identity::Identity, summary::method_name};
use crate::{Layer, progress::Reporter};

/// What came of a quantisation.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QuantizeReport {
    /// Every quantised layer, in the order of the forward pass.
    pub layers: Vec<LayerSummary>,
    /// Layers that rules of [`QuantizeOptions::dynamic`](super::QuantizeOptions::dynamic) leave as they are.
    pub skipped: Vec<Layer>,
    /// Wall-clock time in all; of a resumed run, of its last part.
    pub elapsed: Duration,
    /// The most memory that the process took, as far as it was looked at: bytes that no file backs. `None` where the
    /// system does not tell.
    pub peak_memory: Option<u64>,
    /// Where the time went.
    pub times: RunTimes,
    /// What a device calculates with, where it is not the CPU.
    pub device: Option<String>,
    /// Bytes of a device's own memory that were taken at the end, by whomever. What is freed meanwhile stays with the process,
    /// so that this is the most that was taken.
    pub device_memory: Option<u64>,
    /// Rows of the residual stream, then of the other activation: how many were on the device at the end, and how many in
    /// the host's memory because the device had no room. The others were in a file.
    pub(super) places: Option<[(usize, usize); 2]>,
    /// How often a device's memory was too small for what had been planned, and what was done.
    pub moved: Vec<RowsMoved>,
    pub(super) identity: Option<Identity>,
}

/// A device was out of memory, and activations of calibration rows went to the host.
///
/// It happens where a budget promises more than there is, or another process takes memory meanwhile. The run goes on with fewer
/// rows on the device; the result is the same to the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RowsMoved {
    /// The decoder layer that was being worked on; one behind the last for the output layer.
    pub layer: usize,
    /// Rows that went to the host, of the residual stream or of the other activation.
    pub moved: usize,
    /// Rows of it that stayed on the device.
    pub kept: usize,
}

/// Where the wall-clock time of a run went. What the thread that writes finished layers does meanwhile is not in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunTimes {
    /// Before the first layer: quantisers, embedding.
    pub setup: Duration,
    /// Bringing weights that stay as they are, and those of a run that is resumed, to the device.
    pub read: Duration,
    /// The forward pass up to the inputs of layers, and their second moments.
    pub calibrate: Duration,
    /// What rounding to nearest would have lost.
    pub baseline: Duration,
    /// Ordering, damping and factorising.
    pub factorize: Duration,
    /// Reading weights, choosing their codes, and what the codes stand for.
    pub solve: Duration,
    /// Packing, and the way to the host.
    pub pack: Duration,
    /// Waiting for finished layers to be written.
    pub wait: Duration,
    /// The forward pass from the inputs of a decoder layer's last linear layer to the next layer.
    pub advance: Duration,
    /// Putting the checkpoint together; in a report that is written with it, not yet known.
    pub assemble: Duration,
}

impl RunTimes {
    /// All of them by name.
    pub fn parts(&self) -> [(&'static str, Duration); 10] {
        [
            ("setup", self.setup),
            ("read", self.read),
            ("calibrate", self.calibrate),
            ("baseline", self.baseline),
            ("factorize", self.factorize),
            ("solve", self.solve),
            ("pack", self.pack),
            ("wait", self.wait),
            ("advance", self.advance),
            ("assemble", self.assemble),
        ]
    }
}

/// What came of one linear layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerSummary {
    /// Which one.
    pub layer: Layer,
    /// The quantiser's account.
    pub report: LayerReport,
    /// What [`LayerReport::loss`] would be had the layer been rounded to nearest, estimated from 64 evenly spaced rows of
    /// its weight (exact where it has no more). `None` for a layer that was rounded.
    pub rtn_loss: Option<f64>,
    /// `tr(W H W^T) / 2`, the squared output of the unquantised layer in the unit of the losses, estimated from the same rows.
    /// `None` for a layer that was rounded.
    pub output_norm: Option<f64>,
    /// Time of the forward pass to its inputs and of their second moments, which layers with the same inputs share.
    pub calibration: Duration,
    /// Memory that the process took when the layer was finished, as in [`QuantizeReport::peak_memory`].
    pub memory: Option<u64>,
}

impl LayerSummary {
    pub(super) fn new(layer: Layer, report: LayerReport) -> Self {
        Self { layer, report, rtn_loss: None, output_norm: None, calibration: Duration::ZERO, memory: None }
    }

    /// Time of the quantiser itself.
    pub fn solution(&self) -> Duration {
        let times = &self.report.times;
        times.prepare + times.factorize + times.solve
    }

    /// The loss as a share of the output: how sensitive the layer is to its format. Comparable between layers, unlike the
    /// loss; what predictions lose by it differs from layer to layer all the same, see
    /// [`SensitivityJob`](super::SensitivityJob).
    pub fn relative_loss(&self) -> Option<f64> {
        self.report.loss.zip(self.output_norm).filter(|(_, norm)| *norm > 0.0).map(|(loss, norm)| loss / norm)
    }

    /// Calibration tokens a second, through the forward pass and into the second moments.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.calibration.as_secs_f64();
        (seconds > 0.0).then(|| self.report.samples as f64 / seconds)
    }
}

impl QuantizeReport {
    pub(super) fn empty(skipped: Vec<Layer>) -> Self {
        Self {
            layers: Vec::new(),
            skipped,
            elapsed: Duration::ZERO,
            peak_memory: None,
            times: RunTimes::default(),
            device: None,
            device_memory: None,
            places: None,
            moved: Vec::new(),
            identity: None,
        }
    }

    /// Takes the times and puts layers in order.
    pub(super) fn finish(&mut self, reporter: &Reporter<'_, '_>) {
        self.layers.sort_by_key(|summary| summary.layer);
        self.elapsed = reporter.elapsed();
        self.peak_memory = reporter.peak_memory();
    }

    /// A line a layer, in the columns of GPTQModel's `quant_log.csv`, and the loss of rounding to nearest.
    pub fn to_csv(&self) -> String {
        let mut text = String::from("layer,module,loss,samples,damp,time,rtn_loss\n");
        let number = |number: Option<f64>| number.map(|number| number.to_string()).unwrap_or_default();
        for summary in &self.layers {
            let LayerSummary { layer, report, rtn_loss, .. } = summary;
            text.push_str(&format!(
                "{},{},{},{},{},{:.3},{}\n",
                layer.layer,
                layer.module.name(),
                number(report.loss),
                report.samples,
                number(report.damp.map(|damp| damp.percent)),
                summary.solution().as_secs_f64(),
                number(*rtn_loss),
            ));
        }
        text
    }

    /// Everything as JSON.
    pub fn to_json(&self) -> String {
        let mut object = Map::new();
        if let Some(identity) = &self.identity {
            let parts = identity.parts().map(|(name, value)| (name.to_owned(), json!(value)));
            object.insert("identity".into(), Value::Object(parts.collect()));
        }
        let total = |part: fn(&LayerSummary) -> Option<f64>| self.layers.iter().filter_map(part).sum::<f64>();
        object.insert("elapsed_seconds".into(), json!(self.elapsed.as_secs_f64()));
        object.insert("peak_memory_bytes".into(), json!(self.peak_memory));
        object.insert("device".into(), json!(self.device));
        object.insert("device_memory_bytes".into(), json!(self.device_memory));
        if let Some([hidden, kept]) = self.places {
            let places = |(near, far): (usize, usize)| json!({ "device": near, "host": far });
            let rows = json!({ "residual": places(hidden), "other": places(kept) });
            object.insert("rows_of_activations".into(), rows);
        }
        let moved =
            |event: &RowsMoved| json!({ "layer": event.layer, "moved": event.moved, "kept": event.kept });
        object.insert("out_of_device_memory".into(), self.moved.iter().map(moved).collect());
        let seconds = |(name, time): (&'static str, Duration)| (name.to_owned(), json!(time.as_secs_f64()));
        object.insert("seconds".into(), Value::Object(self.times.parts().map(seconds).into_iter().collect()));
        object.insert("loss".into(), json!(total(|summary| summary.report.loss)));
        object.insert("rtn_loss".into(), json!(total(|summary| summary.rtn_loss)));
        object.insert("skipped".into(), self.skipped.iter().map(|layer| json!(layer.to_string())).collect());
        object.insert("layers".into(), self.layers.iter().map(layer_json).collect());
        format!("{:#}\n", Value::Object(object))
    }
}

fn layer_json(summary: &LayerSummary) -> Value {
    let LayerSummary { layer, report, rtn_loss, output_norm, calibration, memory } = summary;
    let seconds = |time: Duration| time.as_secs_f64();
    json!({
        "module": layer.to_string(),
        "method": method_name(&report.method),
        "loss": report.loss,
        "rtn_loss": rtn_loss,
        "output_norm": output_norm,
        "relative_loss": summary.relative_loss(),
        "damp_percent": report.damp.map(|damp| damp.percent),
        "damp_raised": report.damp.map(|damp| damp.raised),
        "damp_floor": report.damp.map(|damp| damp.floor),
        "dead_columns": report.dead_columns.len(),
        "samples": report.samples,
        "seconds": {
            "calibration": seconds(*calibration),
            "prepare": seconds(report.times.prepare),
            "factorize": seconds(report.times.factorize),
            "solve": seconds(report.times.solve),
        },
        "tokens_per_second": summary.tokens_per_second(),
        "memory_bytes": memory,
    })
}
