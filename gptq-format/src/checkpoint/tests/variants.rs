//! What old and foreign tools left on disk.

use super::*;

fn good(config: &str, tensors: &[Raw]) -> Vec<Remark> {
    let (linear, remarks) = read(config, tensors).unwrap_or_else(|error| panic!("{error}"));
    assert!(is_half(&linear));
    assert_eq!(linear.g_idx(), (0..64).map(|i| i / linear.group_size() as u32).collect::<Vec<_>>());
    remarks
}

#[test]
fn plain_layer() {
    assert_eq!(good(CONFIG, &layer()), []);
    assert_eq!(good(r#"{"bits": 4, "group_size": 32}"#, &layer()), []);
}

#[test]
fn label_is_not_trusted() {
    for label in ["gptq", "gptq_v2"] {
        let config = format!(r#"{{"bits": 4, "group_size": 32, "checkpoint_format": "{label}"}}"#);
        good(&config, &layer());
        let v2 = raw("x.qzeros", Dtype::I32, &[2, 1], &[0x8888_8888u32; 2]);
        good(&config, &layer_with(vec![v2], &[]));
    }
}

#[test]
fn missing_g_idx() {
    assert_eq!(good(CONFIG, &layer_with(vec![], &["x.g_idx"])), [Remark::NoGroupIndex]);
}

#[test]
fn all_zero_g_idx() {
    let zero = || raw("x.g_idx", Dtype::I32, &[64], &[0i32; 64]);
    assert_eq!(good(CONFIG, &layer_with(vec![zero()], &[])), [Remark::ZeroGroupIndex]);
    // With one group it is what it should be.
    let one = vec![
        zero(),
        raw("x.qzeros", Dtype::I32, &[1, 1], &[0x7777_7777u32]),
        raw("x.scales", Dtype::F16, &[1, 8], &[f16::from_f32(0.5); 8]),
    ];
    assert_eq!(good(r#"{"bits": 4, "group_size": -1}"#, &layer_with(one, &[])), []);
}

#[test]
fn trivial_g_idx_although_desc_act() {
    let config = r#"{"bits": 4, "group_size": 32, "desc_act": true}"#;
    assert_eq!(good(config, &layer()), [Remark::TrivialGroupIndex]);
}

#[test]
fn g_idx_of_64_bits() {
    let g_idx: Vec<i64> = (0..64).map(|i| i / 32).collect();
    assert_eq!(good(CONFIG, &layer_with(vec![raw("x.g_idx", Dtype::I64, &[64], &g_idx)], &[])), []);
}

#[test]
fn scales_of_other_types() {
    let f32s = raw("x.scales", Dtype::F32, &[2, 8], &[0.5f32; 16]);
    let rounded = |dtype, changed| Remark::Rounded { field: "scales", dtype, changed };
    assert_eq!(good(CONFIG, &layer_with(vec![f32s], &[])), [rounded(Dtype::F32, 0)]);
    let bf16s = raw("x.scales", Dtype::BF16, &[2, 8], &[bf16::from_f32(0.5); 16]);
    assert_eq!(good(CONFIG, &layer_with(vec![bf16s], &[])), [rounded(Dtype::BF16, 0)]);
    let thirds = raw("x.scales", Dtype::F32, &[2, 8], &[1.0f32 / 3.0; 16]);
    let (_, remarks) = read(CONFIG, &layer_with(vec![thirds], &[])).expect("reads");
    assert_eq!(remarks, [rounded(Dtype::F32, 16)]);
    for large in [1e5, f32::NAN, f32::INFINITY] {
        let large = raw("x.scales", Dtype::F32, &[2, 8], &[large; 16]);
        let error = read(CONFIG, &layer_with(vec![large], &[])).expect_err("no half-precision number");
        let source = |error: &FormatError| {
            matches!(error, FormatError::Linear { prefix, source, .. }
            if prefix == "x" && matches!(source, PackError::NonFinite { field: "scales", index: 0, .. }))
        };
        assert!(source(&error), "{error}");
    }
}

#[test]
fn bias_that_is_zero_or_wide() {
    let zero = raw("x.bias", Dtype::F16, &[8], &[f16::ZERO; 8]);
    assert_eq!(good(CONFIG, &layer_with(vec![zero], &[])), [Remark::ZeroBias]);
    let wide = raw("x.bias", Dtype::BF16, &[8], &[bf16::ONE; 8]);
    let (linear, _) = read(CONFIG, &layer_with(vec![wide], &[])).expect("reads");
    assert_eq!(linear.bias(), Some(&[f16::ONE; 8][..]));
}

#[test]
fn extra_tensors_are_left_alone() {
    let extra = vec![
        raw("model.rotary_emb.inv_freq", Dtype::F32, &[4], &[1.0f32; 4]),
        raw("x.extra", Dtype::U8, &[3], &[1u8, 2, 3]),
    ];
    assert_eq!(good(CONFIG, &layer_with(extra, &[])), []);
}

#[test]
fn group_size_that_does_not_divide_the_inputs() {
    let config = r#"{"bits": 4, "group_size": 48}"#;
    let g_idx: Vec<i32> = (0..64).map(|i| i / 48).collect();
    good(config, &layer_with(vec![raw("x.g_idx", Dtype::I32, &[64], &g_idx)], &[]));
    let one = vec![
        raw("x.g_idx", Dtype::I32, &[64], &[0i32; 64]),
        raw("x.qzeros", Dtype::I32, &[1, 1], &[0x7777_7777u32]),
        raw("x.scales", Dtype::F16, &[1, 8], &[f16::from_f32(0.5); 8]),
    ];
    good(r#"{"bits": 4, "group_size": 1024}"#, &layer_with(one, &[]));
}

#[test]
fn inputs_that_do_not_fill_the_last_word() {
    let g_idx: Vec<i32> = (0..61).map(|i| i / 32).collect();
    let short = || raw("x.g_idx", Dtype::I32, &[61], &g_idx);
    let (linear, remarks) = read(CONFIG, &layer_with(vec![short()], &[])).expect("reads");
    assert_eq!((linear.in_features(), remarks), (61, vec![Remark::Padding]));
    assert!(is_half(&linear));
}

#[test]
fn rows_padded_to_whole_runs_of_three_bits() {
    // 40 inputs take 4 words of 3 bits, but 6 when padded to 64.
    let tensors = [
        raw("x.qweight", Dtype::I32, &[6, 32], &[0u32; 192]),
        raw("x.qzeros", Dtype::I32, &[1, 3], &[0xdb6d_b6dbu32, 0xb6db_6db6, 0x6db6_db6d]),
        raw("x.scales", Dtype::F16, &[1, 32], &[f16::ONE; 32]),
        raw("x.g_idx", Dtype::I32, &[40], &[0i32; 40]),
    ];
    let (linear, _) = read(r#"{"bits": 3, "group_size": -1}"#, &tensors).expect("reads");
    assert_eq!((linear.in_features(), linear.unpack_zeros()), (40, vec![4; 32]));
}

#[test]
fn names_of_other_tools() {
    for (config, name) in [
        (CONFIG.to_owned(), "gptq_model-4bit-32g.safetensors"),
        (CONFIG.to_owned(), "vicuna-7b.compat.no-act-order.safetensors"),
        (format!(r#"{{"model_basename": "base", {}"#, &CONFIG[1..]), "base.safetensors"),
        (format!(r#"{{"model_file_base_name": "base", {}"#, &CONFIG[1..]), "base.safetensors"),
    ] {
        let dir = folder(&config, &layer());
        fs::rename(dir.path().join("model.safetensors"), dir.path().join(name)).expect("renames");
        fs::copy(dir.path().join(name), dir.path().join("expected.safetensors")).expect("copies");
        if name.starts_with("base") {
            fs::copy(dir.path().join(name), dir.path().join("other.safetensors")).expect("copies");
        }
        for path in [dir.path().to_owned(), dir.path().join(name)] {
            let checkpoint = Checkpoint::open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(is_half(&checkpoint.linear("x").expect("reads")));
        }
    }
}

#[test]
fn config_in_any_of_its_places() {
    let places = [
        ("quantize_config.json", CONFIG.to_owned()),
        ("quant_config.json", CONFIG.to_owned()),
        ("config.json", format!(r#"{{"hidden_size": 8, "quantization_config": {CONFIG}}}"#)),
    ];
    for (name, json) in places {
        let dir = folder("", &layer());
        assert!(matches!(
            Checkpoint::open(dir.path()).expect("opens").linear("x"),
            Err(FormatError::NoConfig { prefix, .. }) if prefix == "x"
        ));
        fs::write(dir.path().join(name), json).expect("writes");
        assert!(is_half(&Checkpoint::open(dir.path()).expect("opens").linear("x").expect("reads")));
    }
}

#[test]
fn zero_convention_can_be_overridden() {
    let dir = folder(CONFIG, &layer());
    let options = ReadOptions::default().zero_convention(ZeroConvention::V2);
    let checkpoint = Checkpoint::open_with(dir.path(), &options).expect("opens");
    assert_eq!(checkpoint.zero_evidence().map(|zeros| zeros.basis), Some(ZeroBasis::Override));
    let weight = checkpoint.linear("x").expect("reads").dequantize();
    assert!(weight.iter().all(|&weight| weight == 1.0));
}

#[test]
fn marlin_checkpoint_by_its_old_marker() {
    let zero_scales = vec![f16::from_f32(0.5); 512];
    let tensors = [
        // Nibble 9 everywhere, which no permutation changes.
        raw("x.B", Dtype::I32, &[16, 512], &[0x9999_9999u32; 8192]),
        raw("x.s", Dtype::F16, &[2, 256], &zero_scales),
    ];
    let config = r#"{"bits": 4, "group_size": 128, "is_marlin_format": true}"#;
    let dir = folder(config, &tensors);
    let checkpoint = Checkpoint::open(dir.path()).expect("opens");
    assert_eq!(checkpoint.linears().collect::<Vec<_>>(), ["x"]);
    assert!(checkpoint.is_quantized("x"));
    assert_eq!(checkpoint.zero_evidence().map(|zeros| zeros.basis), Some(ZeroBasis::Layout));
    let linear = checkpoint.linear("x").expect("reads");
    assert!(is_half(&linear) && linear.is_symmetric());
    assert_eq!((linear.in_features(), linear.out_features(), linear.groups()), (256, 256, 2));
}

#[test]
fn layer_with_tiles_and_ordinary_codes_is_one() {
    let tensors = [
        raw("x.qweight", Dtype::I32, &[8, 8], &[0u32; 64]),
        raw("x.B", Dtype::I32, &[16, 512], &[0x9999_9999u32; 8192]),
        raw("x.s", Dtype::F16, &[2, 256], &[f16::from_f32(0.5); 512]),
    ];
    let dir = folder(r#"{"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}"#, &tensors);
    let checkpoint = Checkpoint::open(dir.path()).expect("opens");
    assert_eq!(checkpoint.linears().collect::<Vec<_>>(), ["x"]);
    assert!(is_half(&checkpoint.linear("x").expect("reads")));
}

/// The same layer as in words of 32 bits: `pack_dtype` int8, int16 and int64.
#[test]
fn words_of_any_size() {
    for (dtype, size) in [(Dtype::I8, 1), (Dtype::I16, 2), (Dtype::I64, 8), (Dtype::U8, 1)] {
        // Rows of 64 inputs and of 8 outputs, 4 bits each.
        let (rows, columns) = (32 / size, 4usize.div_ceil(size));
        let mut zeros = [[0x77u8; 4].as_slice(), &[0; 4]].concat();
        zeros.truncate(columns * size);
        let zeros = [zeros.clone(), zeros].concat();
        let tensors = [
            raw("x.qweight", dtype, &[rows, 8], &vec![0x99u8; rows * 8 * size]),
            raw("x.qzeros", dtype, &[2, columns], &zeros),
        ];
        let said = CONFIG.replace("false", r#"false, "pack_dtype": "int64""#);
        for config in [CONFIG, &said] {
            let tensors = tensors.each_ref().map(|t| raw(t.name, t.dtype, &t.shape, &t.bytes));
            assert_eq!(good(config, &layer_with(tensors.into(), &[])), [], "{dtype}");
        }
    }
}

/// GPTQModel subtracts from whole words, whatever their size, and the borrow ends at their border.
#[test]
fn whole_words_of_64_bits_are_borrowed_from() {
    let true_zeros = 0x0000_0000_8888_8880u64;
    let stored = true_zeros.wrapping_sub(0x1111_1111_1111_1111);
    let v2_zeros = raw("x.qzeros", Dtype::I64, &[2, 1], &[stored; 2]);
    let config = r#"{"bits": 4, "group_size": 32, "sym": false, "checkpoint_format": "gptq", "pack_dtype": "int64",
                     "meta": {"quantizer": ["gptqmodel:7.7.0"]}}"#;
    let (linear, _) = read(config, &layer_with(vec![v2_zeros], &[])).expect("reads");
    assert_eq!(linear.unpack_zeros(), [[0, 8, 8, 8, 8, 8, 8, 8]; 2].as_flattened());
}

/// Five bits: GPTQModel's planes, read under any label.
#[test]
fn planar_codes_of_five_bits() {
    // Every code 17 = 0b1_0001, every zero point 16 = 0b1_0000: four words of low bits, one of high ones.
    let qweight: Vec<u32> = [[0x1111_1111u32; 32].repeat(4), vec![u32::MAX; 32]].concat();
    let tensors = [
        raw("x.qweight", Dtype::I32, &[10, 32], &[qweight.clone(), qweight].concat()),
        raw("x.qzeros", Dtype::I32, &[2, 5], &[0u32, 0, 0, 0, u32::MAX, 0, 0, 0, 0, u32::MAX]),
        raw("x.scales", Dtype::F16, &[2, 32], &[f16::from_f32(0.5); 64]),
        raw("x.g_idx", Dtype::I32, &[64], &(0..64).map(|i| i / 32).collect::<Vec<i32>>()),
    ];
    for label in ["gptq_p", "gptq", "gptq_v2"] {
        let config = format!(r#"{{"bits": 5, "group_size": 32, "checkpoint_format": "{label}"}}"#);
        assert_eq!(good(&config, &tensors), []);
    }
    let (linear, _) = read(r#"{"bits": 5, "group_size": 32}"#, &tensors).expect("reads");
    assert!(linear.is_symmetric());
    assert_eq!((linear.bits(), linear.in_features(), linear.out_features()), (Bits::B5, 64, 32));
}
