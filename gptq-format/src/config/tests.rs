use proptest::prelude::*;

use super::*;

fn parse(json: &str) -> Result<QuantizeConfig, ConfigError> {
    QuantizeConfig::from_json(json)
}

fn good(json: &str) -> QuantizeConfig {
    parse(json).unwrap_or_else(|error| panic!("{json}: {error}"))
}

#[test]
fn the_least_that_tools_accept() {
    let config =
        good(r#"{"bits": 4, "group_size": 32, "desc_act": false, "sym": true, "quant_method": "gptq"}"#);
    assert_eq!((config.bits(), config.group_size()), (Bits::B4, Some(32)));
    assert_eq!(config.checkpoint_format(), None);
    let bare = good(r#"{"bits": 8}"#);
    assert_eq!((bare.sym(), bare.desc_act(), bare.group_size()), (true, false, None));
}

#[test]
fn synonyms() {
    let config = good(r#"{"w_bit": 3, "q_group_size": -1, "format": "gptq_v2"}"#);
    assert_eq!((config.bits(), config.group_size()), (Bits::B3, None));
    assert_eq!(config.checkpoint_format(), Some(CheckpointFormat::GptqV2));
    let marlin = r#"{"bits": 4, "group_size": 128, "is_marlin_format": true, "quant_method": "gptq"}"#;
    assert_eq!(good(marlin).checkpoint_format(), Some(CheckpointFormat::Marlin));
    assert_eq!(
        good(r#"{"bits": 4, "quant_method": "marlin"}"#).checkpoint_format(),
        Some(CheckpointFormat::Marlin)
    );
    assert_eq!(good(r#"{"bits": 4, "model_basename": "m"}"#).model_basename(), Some("m"));
    assert_eq!(good(r#"{"bits": 4, "model_file_base_name": null}"#).model_basename(), None);
    assert_eq!(good(r#"{"bits": 4, "meta": {"damp_percent": 0.5}}"#).damp_percent(), Some(0.5));
    assert_eq!(good(r#"{"bits": 4, "damp_percent": 0.25}"#).damp_percent(), Some(0.25));
}

#[test]
fn unusable_configs_are_refused_with_the_key() {
    let cases = [
        ("[]", "valid JSON"),
        ("{}", "`bits`"),
        (r#"{"bits": 9}"#, "bits = 9"),
        (r#"{"bits": 1}"#, "bits = 1"),
        (r#"{"bits": "4"}"#, "bits"),
        (r#"{"bits": 4.5}"#, "bits"),
        (r#"{"bits": 4, "group_size": 0}"#, "group_size = 0"),
        (r#"{"bits": 4, "group_size": -2}"#, "group_size = -2"),
        (r#"{"bits": 4, "sym": 1}"#, "sym = 1"),
        (r#"{"bits": 4, "quant_method": "awq"}"#, "awq"),
        (r#"{"bits": 4, "checkpoint_format": "bitblas"}"#, "bitblas"),
        (r#"{"bits": 4, "pack_dtype": "float16"}"#, "pack_dtype"),
        (r#"{"bits": 4, "pack_dtype": 32}"#, "pack_dtype"),
        (r#"{"bits": 4, "dynamic": []}"#, "dynamic"),
        (r#"{"bits": 4, "dynamic": {"+:a": 3}}"#, "+:a"),
        (r#"{"bits": 4, "dynamic": {"+:a": {"bits": 9}}}"#, "+:a"),
        (r#"{"bits": 4, "dynamic": {"-:(": {}}}"#, "pattern `(`"),
        (r#"{"bits": 4, "dynamic": {"-:(?!a)b": {}}}"#, "pattern `(?!a)b`"),
    ];
    for (json, part) in cases {
        let error = parse(json).expect_err(json).to_string();
        assert!(error.contains(part), "{json}: {error}");
        assert!(!error.contains('\n') || error.contains("pattern"), "{error}");
    }
}

#[test]
fn json_bombs_are_refused() {
    assert!(parse(&"[".repeat(1 << 20)).is_err());
    assert!(parse(&format!(r#"{{"bits": 4, "x": {}"#, r#"{"a":"#.repeat(1 << 18))).is_err());
    let repetition = r#"{"bits": 4, "dynamic": {"-:((((a{1000}){1000}){1000}){1000})": {}}}"#;
    assert!(matches!(parse(repetition), Err(ConfigError::Pattern { .. })));
    // Each of these compiles to some megabytes if one lets it.
    let rules: Vec<String> = (0..100).map(|k| format!(r#""-:{k}(a{{99}}){{99}}": {{}}"#)).collect();
    let many = format!(r#"{{"bits": 4, "dynamic": {{{}}}}}"#, rules.join(","));
    assert!(matches!(parse(&many), Err(ConfigError::Pattern { .. })));
    let rules: Vec<String> = (0..100).map(|k| format!(r#""-:{k}(ab{{9}}){{9}}": {{}}"#)).collect();
    let many = format!(r#"{{"bits": 4, "dynamic": {{{}}}}}"#, rules.join(","));
    assert!(matches!(parse(&many), Err(ConfigError::Pattern { .. })));
    let rules: Vec<String> = (0..70_000).map(|k| format!(r#""-:{k}": {{}}"#)).collect();
    let many = format!(r#"{{"bits": 4, "dynamic": {{{}}}}}"#, rules.join(","));
    assert!(parse(&many).expect_err("too many").to_string().contains("more than 65536 rules"));
    let long = parse(&format!(r#"{{"bits": "{}"}}"#, "4".repeat(1 << 20))).expect_err("a long value");
    assert!(long.to_string().len() < 200);
}

/// A rule for each expert of each layer, and the patterns that tools' documentation shows.
#[test]
fn many_rules_and_rich_patterns_are_read() {
    let rules: Vec<String> = (0..20_000)
        .map(|k| format!(r#""+:^model\\.layers\\.{k}\\.mlp\\.down_proj$": {{"bits": 8}}"#))
        .collect();
    let config = good(&format!(r#"{{"bits": 4, "dynamic": {{{}}}}}"#, rules.join(",")));
    assert_eq!(config.module("model.layers.19999.mlp.down_proj").map(|module| module.bits), Some(Bits::B8));
    let rich = r#"{"bits": 4, "dynamic": {"+:.*\\.(?:1[0-9]|2[0-7])\\..*(?:gate|up)_proj": {"bits": 8},
        "-:model\\.layers\\.(0|[3-9]|1\\d{1,2})\\.self_attn\\.(?i)[QK]_proj\\b": {}, "\\w{3,20}\\.x": {"bits": 3}}}"#;
    assert_eq!(good(rich).module("model.layers.3.self_attn.q_proj"), None);
}

#[test]
fn dynamic_rules_apply_in_their_order_from_the_start_of_the_name() {
    let config = good(
        r#"{"bits": 4, "group_size": 128, "dynamic": {"-:.*down_proj.*": {}, "+:.*\\.1\\..*": {"bits": 8, "group_size": 64},
            "model\\.layers\\.1": {"bits": 2}, ".*q_proj": {"desc_act": true, "group_size": -1}}}"#,
    );
    assert_eq!(config.module("model.layers.1.mlp.down_proj"), None);
    let first = config.module("model.layers.1.q_proj").expect("quantised");
    assert_eq!((first.bits, first.group_size, first.desc_act), (Bits::B8, Some(64), false));
    let last = config.module("model.layers.0.q_proj").expect("quantised");
    assert_eq!((last.bits, last.group_size, last.desc_act), (Bits::B4, None, true));
    let other = config.module("not.model.layers.2.k_proj").expect("quantised");
    assert_eq!((other.bits, other.group_size), (Bits::B4, Some(128)));
}

#[test]
fn unknown_keys_stay_in_their_order() {
    let json = r#"{"zeta":[1,2.5,null],"bits":4,"alpha":{"b":"é"},"group_size":-1,"meta":{"quantizer":["gptqmodel:7.7.0"]}}"#;
    let config = good(json);
    let keys: Vec<&str> = config.keys().collect();
    assert_eq!(keys, ["zeta", "bits", "alpha", "group_size", "meta"]);
    assert_eq!(config.get("zeta").as_deref(), Some("[1,2.5,null]"));
    assert_eq!(config.quantizers(), ["gptqmodel:7.7.0"]);
    assert_eq!(good(&config.to_json()), config);
    assert_eq!(config.to_json().split_whitespace().collect::<String>(), json);
}

/// Found by fuzzing: the faster way to parse a float is off by its last bit, and is so again with each time it is written.
#[test]
fn numbers_of_unknown_keys_stay_to_the_last_bit() {
    let config =
        good(r#"{"bits": 4, "meta": {"a": 5.01e112, "b": 2.4, "c": 1e-323, "d": 18446744073709551615}}"#);
    assert_eq!(good(&config.to_json()), config);
    assert_eq!(
        config.get("meta").as_deref(),
        Some(r#"{"a":5.01e+112,"b":2.4,"c":1e-323,"d":18446744073709551615}"#)
    );
}

#[test]
fn builder_writes_what_it_was_told() {
    let config = QuantizeConfig::builder(Bits::B3, None)
        .desc_act(true)
        .static_groups(true)
        .true_sequential(false)
        .lm_head(true)
        .damp_percent(0.01)
        .override_modules("lm_head", Bits::B8, Some(32))
        .skip_modules(".*down_proj")
        .recipe_number("mse", 2.4)
        .recipe_switch("act_group_aware", true)
        .recipe_text("solver", "gptq")
        .build()
        .expect("valid");
    let read = good(&config.to_json());
    assert_eq!(read, config);
    assert_eq!((read.bits(), read.group_size(), read.desc_act(), read.sym()), (Bits::B3, None, true, true));
    assert_eq!(read.checkpoint_format(), Some(CheckpointFormat::Gptq));
    assert_eq!(read.damp_percent(), Some(0.01));
    let head = read.module("lm_head").expect("quantised");
    assert_eq!((head.bits, head.group_size), (Bits::B8, Some(32)));
    assert_eq!(read.module("model.layers.3.mlp.down_proj"), None);
    assert_eq!(read.get("group_size").as_deref(), Some("-1"));
    assert!(read.get("meta").is_some_and(|meta| meta.contains("act_group_aware") && meta.contains("2.4")));
    let asym = QuantizeConfig::builder(Bits::B4, Some(128)).sym(false).build().expect("valid");
    assert_eq!(asym.checkpoint_format(), Some(CheckpointFormat::GptqV2));
    assert!(QuantizeConfig::builder(Bits::B4, Some(0)).build().is_err());
    assert!(QuantizeConfig::builder(Bits::B4, None).skip_modules("(").build().is_err());
}

#[test]
fn widths_that_only_planes_have_decide_the_layout() {
    for json in [
        r#"{"bits": 5, "group_size": 32}"#,
        r#"{"bits": 6, "group_size": 32, "checkpoint_format": "gptq"}"#,
        r#"{"bits": 4, "format": "gptq_v2", "dynamic": {"+:.*down": {"bits": 7}}}"#,
        r#"{"bits": 4, "format": "gptq_p"}"#,
    ] {
        assert_eq!(good(json).checkpoint_format(), Some(CheckpointFormat::Planar), "{json}");
    }
    let skipped = good(r#"{"bits": 4, "format": "gptq", "dynamic": {"-:.*down": {"bits": 7}}}"#);
    assert_eq!(skipped.checkpoint_format(), Some(CheckpointFormat::Gptq));
    let built = QuantizeConfig::builder(Bits::B6, Some(32)).build().expect("valid");
    assert_eq!(built.checkpoint_format(), Some(CheckpointFormat::Planar));
    assert_eq!(built.get("checkpoint_format").as_deref(), Some("\"gptq_p\""));
}

#[test]
fn what_is_written_is_packed_into_32_bits() {
    let read = good(r#"{"bits": 4, "pack_dtype": "int16"}"#);
    let written = read.with_checkpoint_format(CheckpointFormat::Gptq);
    assert_eq!(written.get("pack_dtype").as_deref(), Some("\"int32\""));
}

#[test]
fn another_format_removes_the_old_markers() {
    let old = good(
        r#"{"bits": 4, "is_marlin_format": true, "quant_method": "marlin", "format": "marlin", "x": 1}"#,
    );
    let new = old.with_checkpoint_format(CheckpointFormat::GptqV2);
    let read = good(&new.to_json());
    assert_eq!(read.checkpoint_format(), Some(CheckpointFormat::GptqV2));
    assert_eq!(read, new);
    assert_eq!(read.get("x").as_deref(), Some("1"));
}

proptest! {
    #[test]
    fn noise_never_panics(json in ".{0,200}") {
        let _ = parse(&json);
    }

    #[test]
    fn changed_bytes_never_panic(at in any::<prop::sample::Index>(), byte in 0u8..128) {
        let mut json = QuantizeConfig::builder(Bits::B4, Some(128))
            .override_modules("a.*b", Bits::B8, None)
            .skip_modules("c+")
            .build()
            .expect("valid")
            .to_json()
            .into_bytes();
        let at = at.index(json.len());
        json[at] = byte;
        if let Ok(config) = parse(std::str::from_utf8(&json).expect("ASCII")) {
            let _ = config.module("model.layers.0");
            prop_assert_eq!(good(&config.to_json()), config);
        }
    }
}

#[test]
fn rules_alone_keep_their_order_and_refuse_repetition() {
    let json = r#"{"-:.*down_proj":{},"+:.*":{"bits":8,"mse":2.4}}"#;
    let rules = DynamicRules::from_json(json).expect("valid");
    assert_eq!(rules.to_json().split_whitespace().collect::<String>(), json);
    assert_eq!(DynamicRules::from_json(&rules.to_json()), Ok(rules.clone()));
    let overrides: Vec<Option<String>> = rules.rules().iter().map(|rule| rule.overrides()).collect();
    assert_eq!(overrides, [None, Some(r#"{"bits":8,"mse":2.4}"#.into())]);
    let written = QuantizeConfig::builder(Bits::B4, Some(128)).dynamic(&rules).build().expect("valid");
    assert_eq!(written.dynamic(), &rules);
    assert_eq!(good(&written.to_json()).dynamic(), &rules);

    let error = |json| DynamicRules::from_json(json).expect_err("refused").to_string();
    assert!(error(r#"{"-:a": {}, "-:a": {}}"#).ends_with("it stands twice"));
    assert!(error("[]").starts_with("not valid JSON"));
    assert!(error("{} {}").starts_with("not valid JSON"));
    assert!(error(r#"{"+:(": {}}"#).starts_with("dynamic pattern `(`"));
    assert_eq!(error(r#"{"a": {"sym": 1}}"#), "dynamic[\"a\"].sym = 1 should be true or false");
}
