use gptq_format::{CheckpointFormat, ModuleConfig, QuantizeConfig};

use crate::checkpoint::FORMATS;
use crate::memory::bounded;

const MODULES: [&str; 6] = [
    "",
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "a.b",
    "model.layers.10.x",
];

/// The most memory for a config of `len` bytes: 1 KiB and 128 bytes a byte for a rule of `dynamic`, which takes at least six
/// bytes, 256 KiB for each of at most 64 large ones, twice while vectors grow; JSON, the rest.
pub(crate) fn config_memory(len: usize) -> usize {
    (1 << 20) + 2 * 64 * (256 << 10) + 1024 * len
}

/// What a config says, beside its JSON.
fn meaning(config: &QuantizeConfig) -> impl PartialEq + std::fmt::Debug {
    let modules: Vec<Option<ModuleConfig>> = MODULES.iter().map(|name| config.module(name)).collect();
    let names: Vec<String> = config.quantizers().into_iter().map(str::to_owned).collect();
    let common = (config.bits(), config.group_size(), config.desc_act(), config.sym());
    let rest = (config.checkpoint_format(), config.damp_percent().map(f64::to_bits));
    (common, rest, modules, names, config.model_basename().map(str::to_owned))
}

/// Any text is a config or a typed error, within bounded memory. A config says the same after it is written and read, and
/// converting it to another layout changes that layout only.
pub fn quantize_config(data: &[u8]) {
    let Ok(json) = std::str::from_utf8(data) else { return };
    let parsed = bounded(config_memory(json.len()), || QuantizeConfig::from_json(json));
    let config = match parsed {
        Ok(config) => config,
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty() && text.len() <= 4 * json.len() + 400, "{} bytes of error", text.len());
            return;
        }
    };
    let read = QuantizeConfig::from_json(&config.to_json()).expect("what was written is read");
    assert_eq!(read, config);
    assert_eq!(meaning(&read), meaning(&config));
    assert!(read.keys().eq(config.keys()), "the order of keys");
    for format in FORMATS {
        let converted = config.with_checkpoint_format(format);
        let read = QuantizeConfig::from_json(&converted.to_json()).expect("what was converted is read");
        assert_eq!(read, converted);
        // Widths that only the planes have decide the layout, whatever is claimed.
        let decided = [Some(format), Some(CheckpointFormat::Planar)];
        assert!(decided.contains(&read.checkpoint_format()), "{:?}", read.checkpoint_format());
        for name in MODULES {
            assert_eq!(read.module(name), config.module(name), "{name}");
        }
        assert_eq!(
            converted.with_checkpoint_format(format),
            converted,
            "converting twice is converting once"
        );
    }
}
