use proptest::prelude::*;

use super::*;

fn file(json: &str, data: usize) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.bytes());
    file.resize(file.len() + data, 7);
    file
}

fn refuse(json: &str, data: usize) -> HeaderError {
    Header::parse(&file(json, data)).expect_err("a bad header")
}

#[test]
fn good_header_is_read() {
    let json = r#"{"b":{"dtype":"I32","shape":[2],"data_offsets":[2,10]},"__metadata__":{"format":"pt"},
        "a \"é":{"dtype":"F16","shape":[],"data_offsets":[0,2]},"z":{"dtype":"F32","shape":[0,5],"data_offsets":[10,10]}}   "#;
    let header = Header::parse(&file(json, 10)).expect("good");
    assert_eq!(header.metadata["format"], "pt");
    let names: Vec<&str> = header.tensors.iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, ["a \"é", "b", "z"]);
    let b = &header.tensors[header.by_name["b"]];
    assert_eq!((b.dtype, b.shape.as_slice(), b.end - b.start), (Dtype::I32, &[2][..], 8));
    assert_eq!(b.end, 8 + json.len() + 10);
}

#[test]
fn file_shorter_than_its_length_field() {
    for len in 0..8 {
        let error = Header::parse(&vec![0; len]).expect_err("short");
        assert_eq!(error, HeaderError::Truncated { len: len as u64, needed: 8 });
    }
}

#[test]
fn header_length_beyond_the_file() {
    let mut bytes = file("{}", 0);
    bytes[0] = 3;
    assert_eq!(Header::parse(&bytes), Err(HeaderError::Truncated { len: 10, needed: 11 }));
}

#[test]
fn header_length_beyond_memory() {
    for length in [u64::MAX, 1 << 63, MAX_HEADER + 1] {
        let mut bytes = file("{}", 0);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert_eq!(Header::parse(&bytes), Err(HeaderError::TooLong { len: length }));
    }
}

#[test]
fn header_that_is_no_object_of_tensors() {
    let cases = [
        "",
        "[]",
        "null",
        "{",
        "{]",
        "\u{0}",
        r#"{"a":1}"#,
        r#"{"a":{}}"#,
        r#"{"a":null}"#,
        r#"{"__metadata__":{"a":1}}"#,
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}}"#,
    ];
    for json in cases {
        let error = refuse(json, 4);
        assert!(matches!(error, HeaderError::Json(_)), "{json}: {error}");
    }
    assert!(matches!(Header::parse(&[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), Err(HeaderError::Json(_))));
    let HeaderError::Json(reason) = refuse(r#"{"some.weight":{}}"#, 0) else { unreachable!("checked above") };
    assert!(reason.contains("some.weight"), "{reason}");
}

#[test]
fn json_bomb_of_depth_is_refused() {
    let deep = format!(r#"{{"a":{{"dtype":"F32","extra":{}"#, "[".repeat(1 << 20));
    assert!(matches!(refuse(&deep, 0), HeaderError::Json(_)));
}

#[test]
fn json_bomb_of_dimensions_is_refused() {
    let dims = vec!["1"; 1 << 20].join(",");
    let json = format!(r#"{{"a":{{"dtype":"U8","shape":[{dims}],"data_offsets":[0,1]}}}}"#);
    assert!(matches!(refuse(&json, 1), HeaderError::Json(_)));
}

#[test]
fn unknown_dtype_is_named() {
    let error = refuse(r#"{"w":{"dtype":"F128","shape":[1],"data_offsets":[0,16]}}"#, 16);
    assert_eq!(error, HeaderError::Dtype { tensor: "w".into(), dtype: "F128".into() });
}

#[test]
fn shape_whose_size_overflows() {
    for shape in ["[9223372036854775808,2]", "[4294967296,4294967296]", "[18446744073709551615]"] {
        let json = format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}"#);
        assert!(matches!(refuse(&json, 4), HeaderError::Size { tensor, .. } if tensor == "w"));
    }
    // A product that would wrap around to the right size.
    let json = r#"{"w":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}"#;
    assert!(matches!(refuse(json, 0), HeaderError::Size { .. }));
}

#[test]
fn size_that_contradicts_the_offsets() {
    for offsets in ["[0,3]", "[0,5]", "[4,0]", "[0,18446744073709551615]"] {
        let json = format!(r#"{{"w":{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}}}"#);
        assert!(matches!(refuse(&json, 4), HeaderError::Size { .. }), "{offsets}");
    }
    let json = r#"{"w":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}"#;
    assert!(matches!(refuse(json, 1), HeaderError::Size { .. }), "half a byte");
}

#[test]
fn tensors_that_overlap_or_leave_a_gap() {
    let two = |start: usize| {
        let end = start + 4;
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},"b":{{"dtype":"F32","shape":[1],"data_offsets":[{start},{end}]}}}}"#
        )
    };
    for start in [1, 3, 5] {
        let error = refuse(&two(start), start + 4);
        assert_eq!(error, HeaderError::Offset { tensor: "b".into(), start: start as u64, expected: 4 });
    }
    assert!(Header::parse(&file(&two(4), 8)).is_ok());
}

#[test]
fn offsets_near_the_largest_number_do_not_wrap() {
    let near = u64::MAX - 3;
    let json = format!(r#"{{"w":{{"dtype":"F32","shape":[1],"data_offsets":[{},{near}]}}}}"#, near - 4);
    assert!(matches!(refuse(&json, 0), HeaderError::Offset { .. }));
}

#[test]
fn truncated_or_lengthened_data() {
    let json = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    for data in [0, 4, 7, 9, 100] {
        assert_eq!(refuse(json, data), HeaderError::DataLength { tensors: 8, file: data as u64 });
    }
}

#[test]
fn repeated_name_is_an_error() {
    let json = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    assert_eq!(refuse(json, 2), HeaderError::Duplicate { tensor: "a".into() });
    assert!(matches!(refuse(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), HeaderError::Json(_)));
}

/// Well-formed headers over small shapes.
fn tensors() -> impl Strategy<Value = Vec<(String, Dtype, Vec<usize>)>> {
    let dtype = prop::sample::select(vec![Dtype::U8, Dtype::F16, Dtype::I32, Dtype::F64]);
    let tensor = (".{0,8}", dtype, prop::collection::vec(0..4usize, 0..4));
    prop::collection::vec(tensor, 0..6).prop_map(|mut tensors| {
        for (at, tensor) in tensors.iter_mut().enumerate() {
            tensor.0 = format!("{at}{}", tensor.0);
        }
        tensors
    })
}

fn serialized(tensors: &[(String, Dtype, Vec<usize>)]) -> Vec<u8> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = tensors.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, shape.as_slice()));
    let mut file = Header::serialize(&metadata, views, 64);
    assert_eq!(file.len() % 64, 0);
    let data: usize = tensors.iter().map(|(_, dtype, shape)| dtype.byte_len(shape).expect("small")).sum();
    file.resize(file.len() + data, 0);
    file
}

proptest! {
    #[test]
    fn what_is_serialized_is_read_by_us_and_by_the_reference(tensors in tensors()) {
        let file = serialized(&tensors);
        let header = Header::parse(&file).expect("ours");
        let reference = safetensors::SafeTensors::deserialize(&file).expect("the reference reads it");
        prop_assert_eq!(reference.len(), tensors.len());
        for (name, dtype, shape) in &tensors {
            let info = &header.tensors[header.by_name[name]];
            prop_assert_eq!((&info.dtype, &info.shape), (dtype, shape));
            let view = reference.tensor(name).expect("is there");
            prop_assert_eq!(view.shape(), &shape[..]);
            prop_assert_eq!(view.data().as_ptr() as usize - file.as_ptr() as usize, info.start);
        }
    }

    /// Whatever a changed byte does, we do not panic, and we accept nothing that the reference refuses.
    #[test]
    fn changed_bytes_never_panic_and_never_pass_what_the_reference_refuses(
        tensors in tensors(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut file = serialized(&tensors);
        for (at, byte) in &changes {
            let at = at.index(file.len());
            file[at] = *byte;
        }
        for bytes in [&file[..], &file[..cut.index(file.len())]] {
            if Header::parse(bytes).is_ok() {
                prop_assert!(safetensors::SafeTensors::deserialize(bytes).is_ok());
            }
        }
    }

    #[test]
    fn noise_never_panics(json in ".{0,200}", data in 0..20usize) {
        let _ = Header::parse(&file(&json, data));
    }
}
