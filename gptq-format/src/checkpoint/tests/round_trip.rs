//! What is written in any format is read back bit for bit.

use proptest::prelude::*;

use super::*;
use crate::QuantizeConfig;

/// A random layer, the config that describes it, and a format that can hold it.
fn layers() -> impl Strategy<Value = (PackedLinear, QuantizeConfig)> {
    let format = prop::sample::select(vec![
        CheckpointFormat::Gptq,
        CheckpointFormat::GptqV2,
        CheckpointFormat::Planar,
        CheckpointFormat::Marlin,
    ]);
    let shape = (1..70usize, 1..70usize, prop::option::of(1..80usize), 0..Bits::ALL.len());
    (format, shape, any::<(bool, bool, bool)>(), any::<u64>()).prop_map(
        |(format, (i, o, group_size, bits), (sym, desc_act, has_bias), seed)| {
            let marlin = format == CheckpointFormat::Marlin;
            let bits = if marlin { Bits::B4 } else { Bits::ALL[bits] };
            let format = if bits.is_planar_only() { CheckpointFormat::Planar } else { format };
            let (i, o, group_size) = match format {
                CheckpointFormat::Marlin => (128 * (1 + i % 3), 256, group_size.map(|_| 128)),
                CheckpointFormat::Planar => (i.next_multiple_of(32), o.next_multiple_of(32), group_size),
                _ => (i, o, group_size),
            };
            let (sym, desc_act) = (sym || marlin, desc_act && !marlin);
            let mut state = seed;
            let mut next = |limit: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % limit
            };
            let width = group_size.unwrap_or(i).min(i);
            let groups = i.div_ceil(width);
            let codes: Vec<u8> = (0..i * o).map(|_| next(1 << bits.get()) as u8).collect();
            // Version 1 holds zero points from 1 on.
            let lowest = u64::from(format == CheckpointFormat::Gptq);
            let zero = |next: &mut dyn FnMut(u64) -> u64| match sym {
                true => 1 << (bits.get() - 1),
                false => (lowest + next((1 << bits.get()) - lowest)) as u8,
            };
            let zeros: Vec<u8> = (0..groups * o).map(|_| zero(&mut next)).collect();
            let scales: Vec<f32> = (0..groups * o).map(|_| next(1000) as f32 / 64.0).collect();
            let mut g_idx: Vec<u32> = (0..i).map(|i| (i / width) as u32).collect();
            if desc_act {
                (0..i).for_each(|k| g_idx.swap(k, next(i as u64) as usize));
            }
            let bias: Vec<f32> = (0..o).map(|_| next(1000) as f32 / 8.0).collect();
            let linear = PackedLinear::pack(&CodesRef {
                bits,
                group_size: width,
                in_features: i,
                out_features: o,
                codes: &codes,
                zeros: &zeros,
                scales: &scales,
                g_idx: &g_idx,
                bias: has_bias.then_some(&bias),
            });
            let config = QuantizeConfig::builder(bits, group_size).sym(sym).desc_act(desc_act);
            let config = config.checkpoint_format(format).build().expect("valid");
            (linear.expect("valid"), config)
        },
    )
}

proptest! {
    #[test]
    fn every_format_is_read_as_it_was_written((linear, config) in layers()) {
        let dir = tempfile::tempdir().expect("temporary folder");
        let mut writer = CheckpointWriter::create(dir.path(), Some(&config), WriteOptions::default()).expect("starts");
        writer.linear("x", &linear).expect("writes");
        writer.finish().expect("finishes");
        // The convention is given: a random layer has no zero points that a statistic could go by.
        let convention = match config.checkpoint_format() {
            Some(CheckpointFormat::Gptq) => ZeroConvention::V1,
            _ => ZeroConvention::V2,
        };
        let options = ReadOptions::default().zero_convention(convention);
        let checkpoint = Checkpoint::open_with(dir.path(), &options).expect("opens");
        prop_assert_eq!(checkpoint.config(), Some(&config));
        prop_assert_eq!(checkpoint.linears().collect::<Vec<_>>(), ["x"]);
        prop_assert_eq!(checkpoint.linear("x").expect("reads"), linear.clone());
        if config.sym() {
            let by_evidence = Checkpoint::open(dir.path()).expect("opens");
            prop_assert_eq!(by_evidence.linear("x").expect("reads"), linear);
        }
    }
}
