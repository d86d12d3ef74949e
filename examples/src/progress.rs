//! Progress bars on stderr; nothing where stderr is no terminal.

use std::time::Duration;

use gptq_llama::{Progress, QuantizePhase};
use indicatif::{ProgressBar, ProgressStyle};

/// A bar of `len` steps under a title.
pub fn bar(title: &str, len: u64) -> ProgressBar {
    let bar = ProgressBar::new(len);
    let style = ProgressStyle::with_template("{prefix:18} [{bar:30}] {percent:>3}% {msg}")
        .expect("invariant: the template is a constant")
        .progress_chars("=> ");
    bar.set_style(style);
    bar.set_prefix(title.to_owned());
    bar
}

/// Steps of a bar that shows a quantisation.
const STEPS: u64 = 1000;

/// A bar for [`show`].
pub fn quantization_bar(title: &str) -> ProgressBar {
    bar(title, STEPS)
}

/// Shows where a quantisation stands.
pub fn show(bar: &ProgressBar, progress: &Progress<'_>) {
    bar.set_position((progress.fraction * STEPS as f64) as u64);
    bar.set_message(describe(progress));
}

fn describe(progress: &Progress<'_>) -> String {
    let modules: Vec<&str> =
        progress.modules.iter().map(|module| module.name().rsplit('.').next().unwrap_or("")).collect();
    let what = match progress.phase {
        QuantizePhase::Calibrating => "inputs of",
        QuantizePhase::Solving => "solving",
        QuantizePhase::Quantized => "done:",
        _ => "advancing",
    };
    let place = match progress.layer + 1 {
        layer if layer > progress.layers => "output layer".to_owned(),
        layer => format!("layer {layer}/{}", progress.layers),
    };
    let mut text = format!("{place} {what} {}", modules.join(", "));
    if let Some(loss) = progress.loss {
        text.push_str(&format!(" loss {loss:.4}"));
    }
    if let Some(loss) = progress.rtn_loss {
        text.push_str(&format!(" (rounded {loss:.4})"));
    }
    if let Some(damp) = progress.damp {
        text.push_str(&format!(" damp {damp}"));
    }
    if let Some(speed) = progress.tokens_per_second {
        text.push_str(&format!(", {speed:.0} tokens/s"));
    }
    if let Some(bytes) = progress.memory {
        text.push_str(&format!(", {} MB", bytes / 1_000_000));
    }
    if let Some(eta) = progress.eta {
        text.push_str(&format!(", {} left", seconds(eta)));
    }
    text
}

/// A duration for people: `8 s`, `3 min 5 s`.
pub fn seconds(duration: Duration) -> String {
    match duration.as_secs() {
        short if short < 60 => format!("{short} s"),
        long => format!("{} min {} s", long / 60, long % 60),
    }
}

#[cfg(test)]
mod tests {
    use gptq_llama::Module;

    use super::*;

    #[test]
    fn a_line_says_where_and_how_long() {
        let progress = Progress {
            layer: 1,
            layers: 4,
            modules: &[Module::Q, Module::K],
            phase: QuantizePhase::Calibrating,
            loss: None,
            rtn_loss: None,
            damp: None,
            tokens_per_second: None,
            memory: None,
            fraction: 0.25,
            elapsed: Duration::from_secs(10),
            eta: Some(Duration::from_secs(65)),
        };
        assert_eq!(describe(&progress), "layer 2/4 inputs of q_proj, k_proj, 1 min 5 s left");
        let done = Progress { loss: Some(0.5), phase: QuantizePhase::Quantized, eta: None, ..progress };
        assert_eq!(describe(&done), "layer 2/4 done: q_proj, k_proj loss 0.5000");
        let done = Progress { layer: 4, modules: &[Module::LmHead], rtn_loss: Some(0.75), ..done };
        assert_eq!(describe(&done), "output layer done: lm_head loss 0.5000 (rounded 0.7500)");
        let damp = Some(0.015);
        let done = Progress { damp, tokens_per_second: Some(5230.4), memory: Some(311_900_000), ..done };
        let text =
            "output layer done: lm_head loss 0.5000 (rounded 0.7500) damp 0.015, 5230 tokens/s, 311 MB";
        assert_eq!(describe(&done), text);
    }
}
