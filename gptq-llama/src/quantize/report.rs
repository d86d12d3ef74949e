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
    pub(super) identity: Option<Identity>,
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
    /// Time of the forward pass to its inputs and of their second moments, which layers with the same inputs share.
    pub calibration: Duration,
    /// Memory that the process took when the layer was finished, as in [`QuantizeReport::peak_memory`].
    pub memory: Option<u64>,
}

impl LayerSummary {
    pub(super) fn new(layer: Layer, report: LayerReport) -> Self {
        Self { layer, report, rtn_loss: None, calibration: Duration::ZERO, memory: None }
    }

    /// Time of the quantiser itself.
    pub fn solution(&self) -> Duration {
        let times = &self.report.times;
        times.prepare + times.factorize + times.solve
    }

    /// Calibration tokens a second, through the forward pass and into the second moments.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.calibration.as_secs_f64();
        (seconds > 0.0).then(|| self.report.samples as f64 / seconds)
    }
}

impl QuantizeReport {
    pub(super) fn empty(skipped: Vec<Layer>) -> Self {
        Self { layers: Vec::new(), skipped, elapsed: Duration::ZERO, peak_memory: None, identity: None }
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
        object.insert("loss".into(), json!(total(|summary| summary.report.loss)));
        object.insert("rtn_loss".into(), json!(total(|summary| summary.rtn_loss)));
        object.insert("skipped".into(), self.skipped.iter().map(|layer| json!(layer.to_string())).collect());
        object.insert("layers".into(), self.layers.iter().map(layer_json).collect());
        format!("{:#}\n", Value::Object(object))
    }
}

fn layer_json(summary: &LayerSummary) -> Value {
    let LayerSummary { layer, report, rtn_loss, calibration, memory } = summary;
    let seconds = |time: Duration| time.as_secs_f64();
    json!({
        "module": layer.to_string(),
        "method": method_name(&report.method),
        "loss": report.loss,
        "rtn_loss": rtn_loss,
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
