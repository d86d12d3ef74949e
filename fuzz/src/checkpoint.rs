use std::path::{Path, PathBuf};

use gptq_format::{
    Checkpoint, CheckpointFormat, CheckpointWriter, FormatError, PackedLinear, QuantizeConfig, ReadOptions,
    Remark, Tensor, WriteOptions, ZeroConvention,
};

use crate::config::config_memory;
use crate::memory::bounded;
use crate::{folder, layer, scratch};

pub(crate) const FORMATS: [CheckpointFormat; 4] =
    [CheckpointFormat::Gptq, CheckpointFormat::GptqV2, CheckpointFormat::Planar, CheckpointFormat::Marlin];

/// Any folder is a checkpoint or a typed error that names a file in it, within bounded memory. Every tensor and layer of
/// what opens can be asked for; a layer that reads is consistent, and reads the same again; and a checkpoint whose layers
/// all read is the same after it has been converted to another layout, and back.
pub fn open_checkpoint(data: &[u8]) {
    let dir = scratch::empty("in");
    let (json, all) = folder::build(data, &dir);
    // Codes of two bits become float32, sixteen times their size; a layer is held twice while it is read.
    let limit = config_memory(json) + 64 * all;
    let checkpoint = match bounded(limit, || Checkpoint::open(&dir)) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return names_its_place(&error, &dir),
    };
    for tensor in checkpoint.tensors() {
        assert_eq!(tensor.len() * tensor.dtype().bits(), 8 * tensor.bytes().len());
        let found = checkpoint.get(tensor.name()).expect("it has been listed");
        assert_eq!((found.path(), found.bytes().as_ptr()), (tensor.path(), tensor.bytes().as_ptr()));
        let _ = bounded(limit, || tensor.to_f32().map(|values| values.len()));
    }
    let mut linears = Vec::new();
    let mut broken = false;
    for prefix in checkpoint.linears() {
        assert!(checkpoint.is_quantized(prefix));
        match bounded(limit, || checkpoint.linear_with_remarks(prefix)) {
            Ok((linear, _)) => {
                layer::check(&linear);
                assert!(checkpoint.linear(prefix).expect("it has been read") == linear, "read twice");
                other_conventions(&dir, prefix, &linear);
                linears.push((prefix, linear));
            }
            Err(error) => {
                names_its_place(&error, &dir);
                broken = true;
            }
        }
    }
    if let (false, Some(config)) = (broken, checkpoint.config()) {
        let format = FORMATS[data.len() % FORMATS.len()];
        convert(&checkpoint, config, &linears, format);
    }
}

fn names_its_place(error: &FormatError, dir: &Path) {
    let (text, dir) = (error.to_string(), dir.display().to_string());
    assert!(text.contains(&dir), "{text:?} does not say where");
}

/// How zero points are read changes nothing else.
fn other_conventions(dir: &Path, prefix: &str, linear: &PackedLinear) {
    for convention in [ZeroConvention::V1, ZeroConvention::V1WholeWord, ZeroConvention::V2] {
        let options = ReadOptions::default().zero_convention(convention);
        let other = Checkpoint::open_with(dir, &options).expect("it has been opened").linear(prefix);
        let other = other.expect("it has been read");
        assert_eq!(other.qweight(), linear.qweight());
        assert_eq!((other.scales(), other.g_idx()), (linear.scales(), linear.g_idx()));
    }
}

fn convert(
    source: &Checkpoint,
    config: &QuantizeConfig,
    linears: &[(&str, PackedLinear)],
    format: CheckpointFormat,
) {
    // As `convert` does: the tensors of a layer go with it, all others as they are.
    let is_part = |tensor: &Tensor<'_>| {
        tensor.name().rsplit_once('.').is_some_and(|(prefix, field)| {
            matches!(field, "qweight" | "qzeros" | "scales" | "g_idx" | "bias" | "B" | "s")
                && source.is_quantized(prefix)
        })
    };
    let rest: Vec<Tensor<'_>> = source.tensors().filter(|tensor| !is_part(tensor)).collect();
    if rest.iter().any(|tensor| tensor.name().ends_with(".B")) {
        return; // It would be a layer of a Marlin checkpoint.
    }
    let linears: Vec<(&str, &PackedLinear)> =
        linears.iter().map(|(prefix, linear)| (*prefix, linear)).collect();
    let planar_only = linears.iter().any(|(_, linear)| linear.bits().is_planar_only());
    let back = if planar_only { CheckpointFormat::Planar } else { CheckpointFormat::GptqV2 };
    for (name, format) in [("there", format), ("back", back)] {
        let Some(dir) = write(name, &config.with_checkpoint_format(format), &linears, &rest) else { return };
        let written = read_back(&dir, format);
        let mut expected: Vec<&str> = linears.iter().map(|(prefix, _)| *prefix).collect();
        let mut found: Vec<&str> = written.linears().collect();
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
        for (prefix, linear) in &linears {
            let (read, remarks) = written.linear_with_remarks(prefix).expect("what was written is read");
            assert!(read == **linear, "{prefix} as {}", format.name());
            let harmless = |remark: &Remark| matches!(remark, Remark::ZeroBias | Remark::TrivialGroupIndex);
            assert!(remarks.iter().all(harmless), "{remarks:?}");
        }
        for tensor in &rest {
            let read = written.tensor(tensor.name()).expect("what was written is there");
            assert_eq!(
                (read.dtype(), read.shape(), read.bytes()),
                (tensor.dtype(), tensor.shape(), tensor.bytes())
            );
        }
    }
}

/// Writes a checkpoint; `None` if the layout cannot hold a layer, which must leave no folder.
pub(crate) fn write(
    name: &str,
    config: &QuantizeConfig,
    linears: &[(&str, &PackedLinear)],
    rest: &[Tensor<'_>],
) -> Option<PathBuf> {
    let dir = scratch::empty(name);
    let mut writer =
        CheckpointWriter::create(&dir, Some(config), WriteOptions::default()).expect("starts to write");
    for (prefix, linear) in linears {
        match writer.linear(prefix, linear) {
            Ok(()) => {}
            Err(FormatError::Unwritable { .. }) => {
                drop(writer);
                assert_eq!(dir.read_dir().expect("a folder").count(), 0, "nothing is left");
                return None;
            }
            Err(error) => panic!("{error}"),
        }
    }
    for tensor in rest {
        writer
            .tensor(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes())
            .expect("writes a tensor");
    }
    writer.finish().expect("finishes");
    Some(dir)
}

/// Opens what was written. The convention is given: zero points that an input made up are no evidence.
pub(crate) fn read_back(dir: &Path, format: CheckpointFormat) -> Checkpoint {
    let convention = match format {
        CheckpointFormat::Gptq => ZeroConvention::V1,
        _ => ZeroConvention::V2,
    };
    let options = ReadOptions::default().zero_convention(convention);
    Checkpoint::open_with(dir, &options).expect("what was written opens")
}
