use proptest::prelude::*;

use super::*;

fn config(json: &str) -> QuantizeConfig {
    QuantizeConfig::from_json(json).expect("valid")
}

fn sample(bits: Bits, fields: &[u8]) -> ZeroSample {
    let mut words = vec![0; bits.words(fields.len())];
    pack_stream(bits, fields, &mut words);
    let mut sample = ZeroSample::default();
    sample.add(bits, &words, fields.len());
    sample
}

/// True zero points of an asymmetric 4-bit grid: near 7.5, now and then far from it.
fn asymmetric() -> Vec<u8> {
    (0..1024).map(|k| if k % 97 == 0 { (k / 97 % 16) as u8 } else { [6, 7, 8, 9, 7, 8][k % 6] }).collect()
}

#[test]
fn symmetric_words_decide_against_the_label() {
    for label in ["gptq", "gptq_v2"] {
        for sym in ["true", "false"] {
            let config = config(&format!(r#"{{"bits": 4, "sym": {sym}, "checkpoint_format": "{label}"}}"#));
            for bits in Bits::ALL {
                let middle = 1 << (bits.get() - 1);
                let v1 = sample(bits, &[middle - 1; 1024]).decide(&config, None);
                let v2 = sample(bits, &[middle; 1024]).decide(&config, None);
                assert_eq!((v1.convention, v1.basis), (ZeroConvention::V1, ZeroBasis::SymmetricWords));
                assert_eq!((v2.convention, v2.basis), (ZeroConvention::V2, ZeroBasis::SymmetricWords));
                assert_eq!(v1.contradicts_label, label == "gptq_v2");
                assert_eq!(v2.contradicts_label, label == "gptq");
            }
        }
    }
}

#[test]
fn asymmetric_mean_decides_against_the_label() {
    let v1: Vec<u8> = asymmetric().iter().map(|zero| zero.saturating_sub(1)).collect();
    for label in ["gptq", "gptq_v2"] {
        let config = config(&format!(r#"{{"bits": 4, "sym": false, "format": "{label}"}}"#));
        let found = sample(Bits::B4, &asymmetric()).decide(&config, None);
        assert_eq!((found.convention, found.basis), (ZeroConvention::V2, ZeroBasis::Mean), "{found}");
        let found = sample(Bits::B4, &v1).decide(&config, None);
        assert_eq!((found.convention, found.basis), (ZeroConvention::V1, ZeroBasis::Mean), "{found}");
    }
}

#[test]
fn without_evidence_the_label_decides() {
    // All weights positive: every true zero point is 0, far from what either convention predicts.
    let odd = sample(Bits::B4, &[0; 1024]);
    for (label, convention) in [("gptq", ZeroConvention::V1), ("gptq_v2", ZeroConvention::V2)] {
        let config = config(&format!(r#"{{"bits": 4, "sym": false, "checkpoint_format": "{label}"}}"#));
        let found = odd.decide(&config, None);
        assert_eq!((found.convention, found.basis), (convention, ZeroBasis::Label));
        // Eight values are no statistics.
        let few = sample(Bits::B4, &[7; 8]).decide(&config, None);
        assert_eq!((few.convention, few.basis), (convention, ZeroBasis::Label));
    }
    let unlabelled = config(r#"{"bits": 4, "sym": false}"#);
    assert_eq!(odd.decide(&unlabelled, None).basis, ZeroBasis::Default);
    let planar = config(r#"{"bits": 4, "format": "gptq_p"}"#);
    let found = sample(Bits::B4, &[7; 1024]).decide(&planar, None);
    assert_eq!((found.convention, found.basis), (ZeroConvention::V2, ZeroBasis::Layout));
}

#[test]
fn gptqmodel_borrows_from_whole_words() {
    let ours = config(r#"{"bits": 4}"#);
    let theirs = config(r#"{"bits": 4, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}"#);
    let sample = sample(Bits::B4, &[7; 64]);
    assert_eq!(sample.decide(&ours, None).convention, ZeroConvention::V1);
    assert_eq!(sample.decide(&theirs, None).convention, ZeroConvention::V1WholeWord);
    let forced = sample.decide(&theirs, Some(ZeroConvention::V2));
    assert_eq!((forced.convention, forced.basis), (ZeroConvention::V2, ZeroBasis::Override));
    assert_eq!(forced.to_string(), "v2 (stored as they are): as asked for");
}

/// The example that was seen in a checkpoint: 0x88888880 stored minus one is 0x7777776f.
#[test]
fn whole_word_borrow_is_taken_back() {
    let mut words = [0x7777_776f];
    decode_zeros(Bits::B4, 8, &mut words, ZeroConvention::V1WholeWord);
    assert_eq!(words, [0x8888_8880]);
    let mut words = [0x7777_776f];
    decode_zeros(Bits::B4, 8, &mut words, ZeroConvention::V1);
    assert_eq!(words, [0x8888_8870]);
}

#[test]
fn padding_is_cleared() {
    // Three zero points of 4 bits; whole-word subtraction has filled the rest of the word.
    for convention in [ZeroConvention::V1WholeWord, ZeroConvention::V1] {
        let mut words = [0x0000_0888u32.wrapping_sub(0x1111_1111)];
        decode_zeros(Bits::B4, 3, &mut words, convention);
        assert_eq!(words, [0x888]);
    }
    let mut words = [0xffff_f888];
    decode_zeros(Bits::B4, 3, &mut words, ZeroConvention::V2);
    assert_eq!(words, [0x888]);
}

#[test]
fn version_1_cannot_hold_zero() {
    let mut words = [0x811, 0x188];
    assert_eq!(encode_v1(Bits::B4, 3, &mut words), Ok(()));
    assert_eq!(words, [0x700, 0x077]);
    let mut words = [0x811, 0x108];
    assert_eq!(encode_v1(Bits::B4, 3, &mut words), Err((1, 1)));
}

proptest! {
    #[test]
    fn encoding_and_decoding_are_inverse(
        bits in prop::sample::select(Bits::ALL.to_vec()),
        seed in prop::collection::vec(any::<u8>(), 1..80),
    ) {
        let zeros: Vec<u8> = seed.iter().map(|&zero| (zero & bits.max_code()).max(1)).collect();
        let mut words = vec![0; bits.words(zeros.len())];
        pack_stream(bits, &zeros, &mut words);
        let original = words.clone();
        prop_assert_eq!(encode_v1(bits, zeros.len(), &mut words), Ok(()));
        let mut by_word = words.clone();
        decode_zeros(bits, zeros.len(), &mut words, ZeroConvention::V1);
        decode_zeros(bits, zeros.len(), &mut by_word, ZeroConvention::V1WholeWord);
        prop_assert_eq!(&words, &original);
        // Without a zero point of 0 nothing was borrowed, and both readings agree.
        prop_assert_eq!(&by_word, &original);
    }

    #[test]
    fn whole_word_subtraction_is_undone_even_with_zeros_of_zero(
        bits in prop::sample::select(vec![Bits::B2, Bits::B4, Bits::B8]),
        words in prop::collection::vec(any::<u32>(), 1..8),
    ) {
        let mut stored: Vec<u32> = words.iter().map(|word| word.wrapping_sub(ones(bits))).collect();
        let fields = words.len() * 32 / bits.get() as usize;
        decode_zeros(bits, fields, &mut stored, ZeroConvention::V1WholeWord);
        prop_assert_eq!(stored, words);
    }
}
