//! What a run is: two runs of the same identity write the same bytes.

use gptq_core::GptqConfig;
use gptq_kernels::quantize::QuantizeBackend;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{QuantizeMethod, QuantizeOptions};
use crate::{Layer, LlamaConfig, LlamaError, TokenRows, WeightSource, names, weights::Fingerprint};

/// Everything that decides about the bytes of the result, as text by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity(Vec<(String, String)>);

impl Identity {
    pub(crate) fn new<D: QuantizeBackend>(
        config: &LlamaConfig,
        source: &dyn WeightSource,
        device: &D,
        rows: Option<&TokenRows>,
        options: &QuantizeOptions,
    ) -> Result<Self, LlamaError> {
        // Where activations are kept changes nothing.
        let QuantizeOptions {
            gptq,
            true_sequential,
            dynamic,
            lm_head,
            activation_bytes: _,
            device_activation_bytes: _,
        } = options;
        let method = if rows.is_some() { QuantizeMethod::Gptq } else { QuantizeMethod::RoundToNearest };
        let kernels: Vec<String> = device.kernels().iter().map(|kernel| kernel.name().to_owned()).collect();
        let mut parts = vec![
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            // Other kernels round in another way.
            ("kernels", kernels.join(" ")),
            ("arithmetic", device.arithmetic()),
            ("model", model(config, source)?),
            ("calibration", rows.map_or_else(|| "none".to_owned(), calibration)),
            ("method", method.name().to_owned()),
            ("true_sequential", true_sequential.to_string()),
            ("dynamic", dynamic.to_json()),
            ("lm_head", lm_head.to_string()),
        ];
        parts.extend(settings(gptq));
        Ok(Self(parts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()))
    }

    /// The first part in which `other` differs: its name, the value here and there.
    pub(crate) fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        let value = |parts: &Self, name: &str| {
            let part = parts.0.iter().find(|(part, _)| part == name);
            part.map_or_else(|| "nothing".to_owned(), |(_, value)| value.clone())
        };
        let names = self.0.iter().chain(&other.0).map(|(name, _)| name);
        names
            .map(|name| (name.clone(), value(self, name), value(other, name)))
            .find(|(_, here, there)| here != there)
    }

    /// The identity in a report that [`QuantizeReport::to_json`](super::QuantizeReport::to_json) has written.
    pub(crate) fn of_report(text: &str) -> Option<Self> {
        let report: serde_json::Value = serde_json::from_str(text).ok()?;
        let parts = report.get("identity")?.as_object()?;
        let part =
            |(name, value): (&String, &serde_json::Value)| Some((name.clone(), value.as_str()?.to_owned()));
        parts.iter().map(part).collect::<Option<_>>().map(Self)
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

fn settings(gptq: &GptqConfig) -> [(&'static str, String); 12] {
    [
        ("bits", gptq.bits().to_string()),
        ("group_size", gptq.group_size().map_or_else(|| "-1".to_owned(), |size| size.to_string())),
        ("sym", gptq.sym().to_string()),
        ("desc_act", gptq.desc_act().to_string()),
        ("static_groups", gptq.static_groups().to_string()),
        ("act_group_aware", gptq.act_group_aware().to_string()),
        ("mse", gptq.mse().unwrap_or(0.0).to_string()),
        ("damp_percent", gptq.damp_percent().to_string()),
        ("damp_auto_increment", gptq.damp_auto_increment().to_string()),
        ("block_size", gptq.block_size().to_string()),
        ("gptaq", gptq.gptaq().map_or_else(|| "off".to_owned(), |alpha| alpha.to_string())),
        ("on_failure", format!("{:?}", gptq.on_failure())),
    ]
}

fn model(config: &LlamaConfig, source: &dyn WeightSource) -> Result<String, LlamaError> {
    let mut fingerprint = Fingerprint::new();
    fingerprint.add(format!("{config:?}").as_bytes());
    let head = format!("{}.weight", names::LM_HEAD);
    for name in [names::EMBEDDING, names::FINAL_NORM, &head] {
        source.fingerprint(name, &mut fingerprint)?;
    }
    for layer in 0..config.layers {
        for norm in [names::INPUT_NORM, names::POST_NORM] {
            source.fingerprint(&format!("{}{norm}", names::layer_prefix(layer)), &mut fingerprint)?;
        }
    }
    for layer in Layer::of_decoder(config) {
        for part in ["weight", "bias"] {
            source.fingerprint(&format!("{layer}.{part}"), &mut fingerprint)?;
        }
    }
    Ok(fingerprint.finish())
}

fn calibration(rows: &TokenRows) -> String {
    let mut hash = Sha256::new();
    for row in rows.rows() {
        hash.update((row.len() as u64).to_le_bytes());
        row.iter().for_each(|token| hash.update(token.to_le_bytes()));
    }
    hex(&hash.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
