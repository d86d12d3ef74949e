//! Checkpoints that GPTQModel and AutoGPTQ wrote, read and compared with the model that they were made from.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::path::{Path, PathBuf};

use gptq_format::{Checkpoint, ReadOptions, ZeroBasis, ZeroConvention};

/// The checkpoints lie in the crate that also runs them; a published crate comes without.
fn fixtures() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gptq-llama/tests/compat");
    if !path.is_dir() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// Quantised checkpoints, with the zero convention that each was written with.
const CHECKPOINTS: [(&str, ZeroConvention); 20] = [
    ("ag_desc_actTrue", ZeroConvention::V1),
    ("ag_g32", ZeroConvention::V1),
    ("b2_g32", ZeroConvention::V1WholeWord),
    ("b3_g32", ZeroConvention::V1WholeWord),
    ("b8_g32", ZeroConvention::V1WholeWord),
    ("g128_plain", ZeroConvention::V1WholeWord),
    ("g32_act", ZeroConvention::V1WholeWord),
    ("g32_act_static", ZeroConvention::V1WholeWord),
    ("g32_asym_v2", ZeroConvention::V2),
    ("g32_dyn", ZeroConvention::V1WholeWord),
    ("g32_plain", ZeroConvention::V1WholeWord),
    ("gm1_plain", ZeroConvention::V1WholeWord),
    ("gm_asym_v1", ZeroConvention::V1WholeWord),
    ("gm_head8", ZeroConvention::V1WholeWord),
    ("gm_p3_g32", ZeroConvention::V2),
    ("gm_p4_dyn5", ZeroConvention::V2),
    ("gm_p5_g32", ZeroConvention::V2),
    ("gm_p6_g64_asym", ZeroConvention::V2),
    ("gm_p7_act", ZeroConvention::V2),
    ("min0", ZeroConvention::V1),
];

/// Rounding to a grid errs by a quarter of a step on average, and GPTQ's compensation adds less than that again. A wrong
/// zero convention adds one whole step to every weight, and since the error `e` itself has no preferred sign,
/// `E|1 + e| >= 1`. So 0.75 steps tell the two apart.
#[test]
fn weights_are_within_a_step_of_the_source() {
    let Some(fixtures) = fixtures() else { return };
    let source = Checkpoint::open(fixtures.join("source")).expect("the source opens");
    assert!(source.config().is_none() && source.zero_evidence().is_none());
    for (name, convention) in CHECKPOINTS {
        let checkpoint =
            Checkpoint::open(fixtures.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let evidence = checkpoint.zero_evidence().expect("quantised");
        assert_eq!(evidence.convention, convention, "{name}: {evidence}");
        assert!(!evidence.contradicts_label, "{name}: {evidence}");
        assert_ne!(evidence.basis, ZeroBasis::Default, "{name}: {evidence}");
        let prefixes: Vec<&str> = checkpoint.linears().collect();
        let expected = match name {
            "g32_dyn" => 12,
            "gm_p4_dyn5" => 13,
            "gm_head8" => 15,
            _ => 14,
        };
        assert_eq!(prefixes.len(), expected, "{name}");
        for prefix in prefixes {
            let linear = checkpoint.linear(prefix).unwrap_or_else(|error| panic!("{name}: {error}"));
            let original = source.tensor(&format!("{prefix}.weight")).expect("same model");
            assert_eq!(original.shape(), [linear.out_features(), linear.in_features()], "{name} {prefix}");
            let original = original.to_f32().expect("float32");
            let weight = linear.dequantize();
            let error: f32 = original.iter().zip(&weight).map(|(a, b)| (a - b).abs()).sum();
            let step: f32 = linear.scales().iter().map(|scale| scale.to_f32()).sum();
            let (error, step) = (error / weight.len() as f32, step / linear.scales().len() as f32);
            assert!(error < 0.75 * step, "{name} {prefix}: mean error {error}, step {step}");
            assert!(checkpoint.get(&format!("{prefix}.weight")).is_none());
        }
    }
}

#[test]
fn another_convention_can_be_forced() {
    let Some(fixtures) = fixtures() else { return };
    let options = ReadOptions::default().zero_convention(ZeroConvention::V2);
    let forced = Checkpoint::open_with(fixtures.join("g32_plain"), &options).expect("opens");
    let evidence = forced.zero_evidence().expect("quantised");
    assert_eq!((evidence.convention, evidence.basis), (ZeroConvention::V2, ZeroBasis::Override));
    assert!(evidence.contradicts_label);
    let linear = forced.linear("model.layers.0.mlp.up_proj").expect("reads");
    assert!(linear.unpack_zeros().iter().all(|&zero| zero == 7));
}

#[test]
fn dense_tensors_are_views_of_the_file() {
    let Some(fixtures) = fixtures() else { return };
    let checkpoint = Checkpoint::open(fixtures.join("g32_plain")).expect("opens");
    let head = checkpoint.tensor("lm_head.weight").expect("is there");
    assert_eq!((head.shape(), head.dtype().name()), (&[259, 128][..], "F32"));
    assert_eq!(head.f32s().expect("float32").len(), 259 * 128);
    assert!(head.f16s().is_err());
}
