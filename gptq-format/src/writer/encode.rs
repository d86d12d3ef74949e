//! A layer's tensors as a checkpoint holds them.

use crate::zeros::encode_v1;
use crate::{CheckpointFormat, Dtype, FormatError, PackedLinear, QuantizeConfig, Unwritable, marlin, planar};

/// One tensor of a layer.
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

impl Field {
    fn new<T: bytemuck::NoUninit>(name: &'static str, dtype: Dtype, shape: &[usize], values: &[T]) -> Self {
        Self { name, dtype, shape: shape.to_vec(), bytes: bytemuck::cast_slice(values).to_vec() }
    }
}

/// The tensors of `linear` in the config's format.
pub(super) fn fields(
    config: Option<&QuantizeConfig>,
    prefix: &str,
    linear: &PackedLinear,
) -> Result<Vec<Field>, FormatError> {
    let format = config.and_then(QuantizeConfig::checkpoint_format).unwrap_or(CheckpointFormat::Gptq);
    let refuse =
        |reason| FormatError::Unwritable { prefix: prefix.to_owned(), format: format.name(), reason };
    check(config, prefix, linear).map_err(refuse)?;
    let out_features = linear.out_features();
    let mut qweight = linear.qweight().to_vec();
    let mut qzeros = linear.qzeros().to_vec();
    if linear.groups() > 1 && linear.g_idx().iter().all(|&group| group == 0) {
        return Err(refuse(Unwritable::Needs(
            "no g_idx of zeros alone where there are several groups: readers ignore it",
        )));
    }
    if linear.bits().is_planar_only() && format != CheckpointFormat::Planar {
        return Err(refuse(Unwritable::Needs("2, 3, 4 or 8 bits; write gptq_p")));
    }
    match format {
        CheckpointFormat::GptqV2 => {}
        CheckpointFormat::Gptq => encode_v1(linear.bits(), out_features, &mut qzeros)
            .map_err(|(group, out)| refuse(Unwritable::ZeroPoint { group, out }))?,
        CheckpointFormat::Planar => {
            if !linear.in_features().is_multiple_of(32) || !out_features.is_multiple_of(32) {
                return Err(refuse(Unwritable::Needs("inputs and outputs in multiples of 32")));
            }
            if planar::differs(linear.bits()) {
                let direction = planar::Direction::FromStream;
                planar::convert_rows(linear.bits(), &mut qweight, out_features, direction);
                planar::convert_words(linear.bits(), &mut qzeros, direction);
            }
        }
        CheckpointFormat::Marlin => {
            if !marlin::fits(linear) {
                return Err(refuse(Unwritable::Needs(marlin::NEEDS)));
            }
            let (words, scales) = marlin::encode(linear);
            let mut fields = vec![
                Field::new("B", Dtype::I32, &[linear.in_features() / 16, 2 * out_features], &words),
                Field::new("s", Dtype::F16, &[linear.groups(), out_features], &scales),
            ];
            fields.extend(linear.bias().map(|bias| Field::new("bias", Dtype::F16, &[out_features], bias)));
            return Ok(fields);
        }
    }
    let (words, zero_words) = (qweight.len() / out_features, qzeros.len() / linear.groups());
    let mut fields = vec![
        Field::new("qweight", Dtype::I32, &[words, out_features], &qweight),
        Field::new("qzeros", Dtype::I32, &[linear.groups(), zero_words], &qzeros),
        Field::new("scales", Dtype::F16, &[linear.groups(), out_features], linear.scales()),
        Field::new("g_idx", Dtype::I32, &[linear.in_features()], linear.g_idx()),
    ];
    fields.extend(linear.bias().map(|bias| Field::new("bias", Dtype::F16, &[out_features], bias)));
    Ok(fields)
}

/// Whether the layer is what the config says: a reader believes the config.
fn check(config: Option<&QuantizeConfig>, prefix: &str, linear: &PackedLinear) -> Result<(), Unwritable> {
    let module = config.and_then(|config| config.module(prefix)).ok_or(Unwritable::NotQuantized)?;
    let contradiction =
        |what, got: String, expected: String| Err(Unwritable::Contradiction { what, got, expected });
    if linear.bits() != module.bits {
        return contradiction("bits", linear.bits().get().to_string(), module.bits.get().to_string());
    }
    let group_size = module.group_size.unwrap_or(usize::MAX).min(linear.in_features());
    if linear.group_size() != group_size {
        return contradiction("group_size", linear.group_size().to_string(), group_size.to_string());
    }
    if module.sym && !linear.is_symmetric() {
        return contradiction("sym", "false".into(), "true".into());
    }
    if !module.desc_act && linear.is_act_order() {
        return contradiction("desc_act", "true".into(), "false".into());
    }
    Ok(())
}
