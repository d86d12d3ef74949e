//! Summaries as the journal and the report have them.

use std::time::Duration;

use gptq_core::{DampReport, LayerReport, Method, NotPositiveDefinite, PhaseTimes};
use serde::{Deserialize, Serialize};

use super::LayerSummary;
use crate::{Layer, Module};

/// A finished layer's line in the journal. Floats are texts: their shortest form, which is read back to the bit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    layer: usize,
    module: String,
    hash: String,
    method: String,
    /// Pivot and its value, where the method is a fallback.
    pivot: Option<(usize, String)>,
    loss: Option<String>,
    rtn_loss: Option<String>,
    output_norm: Option<String>,
    /// Share, steps, floor.
    damp: Option<(String, u32, String)>,
    dead_columns: Vec<usize>,
    samples: u64,
    /// Nanoseconds of calibration, preparation, factorisation and solution.
    times: [u64; 4],
    memory: Option<u64>,
}

impl Entry {
    pub(super) fn new(summary: &LayerSummary, hash: String) -> Self {
        let LayerSummary { layer, report, rtn_loss, output_norm, calibration, memory } = summary;
        let nanoseconds = |time: &Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let times = &report.times;
        Self {
            layer: layer.layer,
            module: layer.module.name().to_owned(),
            hash,
            method: method_name(&report.method).to_owned(),
            pivot: match report.method {
                Method::RtnFallback(NotPositiveDefinite { index, pivot }) => Some((index, pivot.to_string())),
                _ => None,
            },
            loss: report.loss.map(|loss| loss.to_string()),
            rtn_loss: rtn_loss.map(|loss| loss.to_string()),
            output_norm: output_norm.map(|norm| norm.to_string()),
            damp: report.damp.map(|damp| (damp.percent.to_string(), damp.raised, damp.floor.to_string())),
            dead_columns: report.dead_columns.clone(),
            samples: report.samples,
            times: [calibration, &times.prepare, &times.factorize, &times.solve].map(nanoseconds),
            memory: *memory,
        }
    }

    pub(super) fn layer(&self) -> Layer {
        let mut modules = Module::ALL.into_iter().chain([Module::LmHead]);
        let module = modules.find(|module| module.name() == self.module).unwrap_or(Module::LmHead);
        Layer { layer: self.layer, module }
    }

    pub(super) fn hash(&self) -> &str {
        &self.hash
    }

    pub(super) fn summary(&self) -> LayerSummary {
        let number = |text: &String| text.parse().unwrap_or(f64::NAN);
        let [calibration, prepare, factorize, solve] = self.times.map(Duration::from_nanos);
        let method = match (self.method.as_str(), &self.pivot) {
            ("gptq", _) => Method::Gptq,
            ("gptaq", _) => Method::Gptaq,
            (_, Some((index, pivot))) => {
                Method::RtnFallback(NotPositiveDefinite { index: *index, pivot: number(pivot) })
            }
            _ => Method::Rtn,
        };
        let damp = self.damp.as_ref();
        LayerSummary {
            layer: self.layer(),
            report: LayerReport {
                method,
                loss: self.loss.as_ref().map(number),
                damp: damp.map(|(percent, raised, floor)| DampReport {
                    percent: number(percent),
                    raised: *raised,
                    floor: number(floor),
                }),
                dead_columns: self.dead_columns.clone(),
                samples: self.samples,
                times: PhaseTimes { prepare, factorize, solve },
            },
            rtn_loss: self.rtn_loss.as_ref().map(number),
            output_norm: self.output_norm.as_ref().map(number),
            calibration,
            memory: self.memory,
        }
    }
}

pub(crate) fn method_name(method: &Method) -> &'static str {
    match method {
        Method::Gptq => "gptq",
        Method::Gptaq => "gptaq",
        Method::RtnFallback(_) => "rtn-fallback",
        _ => "rtn",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_comes_back_to_the_bit() {
        let summary = LayerSummary {
            layer: Layer { layer: 3, module: Module::Down },
            report: LayerReport {
                method: Method::RtnFallback(NotPositiveDefinite { index: 5, pivot: -1.5e-300 }),
                loss: Some(0.1 + 0.2),
                damp: Some(DampReport { percent: 0.01 + 0.0015, raised: 1, floor: 1e-7 / 3.0 }),
                dead_columns: vec![1, 9],
                samples: 77,
                times: PhaseTimes { prepare: Duration::from_nanos(3), ..PhaseTimes::default() },
            },
            rtn_loss: Some(f64::MIN_POSITIVE / 3.0),
            output_norm: Some(1.0 / 3.0),
            calibration: Duration::from_millis(5),
            memory: Some(1 << 40),
        };
        let entry = Entry::new(&summary, "abc".to_owned());
        let json = serde_json::to_string(&entry).unwrap();
        let read: Entry = serde_json::from_str(&json).unwrap();
        assert_eq!(read.hash(), "abc");
        assert_eq!(read.summary(), summary);
        let gptq = LayerSummary {
            report: LayerReport { method: Method::Gptq, ..summary.report.clone() },
            ..summary
        };
        assert_eq!(Entry::new(&gptq, String::new()).summary(), gptq);
    }
}
