//! Quantised layers, from what other tools left on disk to the canonical [`PackedLinear`].

use std::fmt;

use half::f16;

use super::{Checkpoint, ReadOptions, SAMPLED_LAYERS, SAMPLED_ROWS, ZeroSample, words};
use crate::bitstream::padding_mask;
use crate::zeros::decode_zeros;
use crate::{
    Bits, CheckpointFormat, Dtype, FormatError, ModuleConfig, PackError, PackedLinear, PackedParts, Tensor,
    ZeroConvention, ZeroEvidence, marlin, planar,
};

/// Something about a layer on disk that was put right while it was read.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Remark {
    /// There is no `g_idx`; features were taken to be grouped in their order.
    NoGroupIndex,
    /// `g_idx` is all zero though there are several groups; features were taken to be grouped in their order.
    ZeroGroupIndex,
    /// The config says `desc_act`, but features are grouped in their order.
    TrivialGroupIndex,
    /// Scales or bias in another type, rounded to half precision.
    Rounded {
        /// `scales` or `bias`.
        field: &'static str,
        /// The type on disk.
        dtype: Dtype,
        /// How many values changed.
        changed: usize,
    },
    /// The bias is all zero, as AutoGPTQ adds to layers that have none.
    ZeroBias,
    /// Bits behind the last code were set; they were cleared.
    Padding,
}

impl Checkpoint {
    /// Whether `prefix` is a quantised layer, such as `model.layers.0.self_attn.q_proj`.
    pub fn is_quantized(&self, prefix: &str) -> bool {
        self.get(&format!("{prefix}.qweight")).is_some()
            || (self.is_marlin() && self.get(&format!("{prefix}.B")).is_some())
    }

    /// The names of all quantised layers, in the order of [`names`](Self::names).
    pub fn linears(&self) -> impl Iterator<Item = &str> {
        let is_marlin = self.is_marlin();
        let has_tiles = move |prefix: &str| is_marlin && self.get(&format!("{prefix}.B")).is_some();
        self.names().filter_map(move |name| match name.strip_suffix(".qweight") {
            // What has both is one layer.
            Some(prefix) => Some(prefix).filter(|prefix| !has_tiles(prefix)),
            None => name.strip_suffix(".B").filter(|_| is_marlin),
        })
    }

    /// Reads a quantised layer.
    ///
    /// # Errors
    /// [`FormatError`] with the tensor and its file: missing or of a wrong type or shape, out of range, or contradicting
    /// the config.
    pub fn linear(&self, prefix: &str) -> Result<PackedLinear, FormatError> {
        let (linear, remarks) = self.linear_with_remarks(prefix)?;
        for remark in remarks {
            tracing::debug!(layer = prefix, %remark, "read");
        }
        Ok(linear)
    }

    /// Reads a quantised layer, and says what had to be put right.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    pub fn linear_with_remarks(&self, prefix: &str) -> Result<(PackedLinear, Vec<Remark>), FormatError> {
        let config = self.module(prefix)?;
        let reader = Reader { checkpoint: self, prefix, config, remarks: Vec::new() };
        // A Marlin config beside ordinary tensors is a leftover of a conversion: the tensors are what they are.
        if self.is_marlin() && reader.optional("B").is_some() { reader.read_marlin() } else { reader.read() }
    }

    fn is_marlin(&self) -> bool {
        self.claims(CheckpointFormat::Marlin)
    }

    fn claims(&self, format: CheckpointFormat) -> bool {
        self.config.as_ref().and_then(|config| config.checkpoint_format()) == Some(format)
    }

    fn module(&self, prefix: &str) -> Result<ModuleConfig, FormatError> {
        let (prefix, dir) = (prefix.to_owned(), self.dir.clone());
        let Some(config) = &self.config else { return Err(FormatError::NoConfig { prefix, dir }) };
        config.module(&prefix).ok_or(FormatError::Skipped { prefix, dir })
    }

    pub(super) fn decide_zeros(&self, options: &ReadOptions) -> Result<Option<ZeroEvidence>, FormatError> {
        let Some(config) = &self.config else { return Ok(None) };
        let prefixes: Vec<&str> = self.linears().collect();
        if prefixes.is_empty() {
            return Ok(None);
        }
        let mut sample = ZeroSample::default();
        if config.checkpoint_format() != Some(CheckpointFormat::Planar) {
            for prefix in prefixes.iter().step_by(prefixes.len().div_ceil(SAMPLED_LAYERS)) {
                // A layer that cannot be read is an error when it is read, not when the folder is opened.
                let Some(module) = config.module(prefix) else { continue };
                let reader = Reader { checkpoint: self, prefix, config: module, remarks: Vec::new() };
                let Ok((_, out_features)) = reader.matrix_shape("qweight") else { continue };
                let Ok((rows, columns)) = reader.matrix_shape("qzeros") else { continue };
                let Ok(word_bits) = reader.word_bits("qzeros") else { continue };
                let Ok(zeros) = reader.tensor("qzeros") else { continue };
                let used = module.bits.words(out_features);
                if columns < words::words(module.bits, word_bits, out_features) {
                    continue;
                }
                let stored = zeros.bytes().chunks_exact(columns * word_bits / 8);
                for row in stored.step_by(rows.div_ceil(SAMPLED_ROWS)) {
                    sample.add(module.bits, &words::of_row(row)[..used], out_features);
                }
            }
        }
        let evidence = sample.decide(config, options.zeros);
        if evidence.contradicts_label {
            tracing::warn!(dir = %self.dir.display(), %evidence, "zero points");
        }
        Ok(Some(evidence))
    }
}

/// One layer on its way.
struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    prefix: &'a str,
    config: ModuleConfig,
    remarks: Vec<Remark>,
}

impl<'a> Reader<'a> {
    fn read(mut self) -> Result<(PackedLinear, Vec<Remark>), FormatError> {
        let bits = self.config.bits;
        let (rows, out_features) = self.matrix_shape("qweight")?;
        let (groups, scale_columns) = self.matrix_shape("scales")?;
        if scale_columns != out_features {
            return Err(self.wrong_shape("scales", format!("{out_features} columns, as qweight has")));
        }
        let word_bits = self.word_bits("qweight")?;
        let in_features = self.in_features(rows, word_bits)?;
        let group_size = self.config.group_size.unwrap_or(in_features);
        if in_features.div_ceil(group_size) != groups {
            let needed = in_features.div_ceil(group_size);
            let why = format!("{needed} rows for {in_features} inputs in groups of {group_size}");
            return Err(self.wrong_shape("scales", why));
        }

        // Without the rows that pad to whole runs of 32 codes, or to whole words of 64 bits.
        let used = bits.words(in_features) * out_features;
        let mut qweight = if word_bits == 32 {
            self.tensor("qweight")?.u32s()?[..used].to_vec()
        } else {
            let mut words = words::of_columns(self.tensor("qweight")?.bytes(), word_bits, out_features);
            words.truncate(used);
            words
        };
        if self.checkpoint.claims(CheckpointFormat::Planar) {
            if !in_features.is_multiple_of(32) || !out_features.is_multiple_of(32) {
                return Err(
                    self.wrong_shape("qweight", "multiples of 32 inputs and outputs for gptq_p".into())
                );
            }
            if planar::differs(bits) {
                planar::convert_rows(bits, &mut qweight, out_features, planar::Direction::ToStream);
            }
        }
        let last_row = qweight.len() - out_features;
        self.clear_padding(&mut qweight[last_row..], padding_mask(bits, in_features));
        let qzeros = self.qzeros(bits, groups, out_features)?;
        let scales = self.halves("scales")?;
        let g_idx = self.g_idx(in_features, group_size, groups)?;
        let bias = self.bias(out_features)?;
        let parts =
            PackedParts { bits, group_size, in_features, out_features, qweight, qzeros, scales, g_idx, bias };
        match PackedLinear::from_parts(parts) {
            Ok(linear) => Ok((linear, self.remarks)),
            Err(source) => Err(self.invalid(source)),
        }
    }

    fn read_marlin(mut self) -> Result<(PackedLinear, Vec<Remark>), FormatError> {
        let (input_tiles, columns) = self.matrix_shape("B")?;
        let (groups, out_features) = self.matrix_shape("s")?;
        // The tensor's bytes bound both numbers, so neither product overflows.
        let in_features = input_tiles * 16;
        if columns != 2 * out_features {
            return Err(self.wrong_shape("s", format!("{} columns, half of those of B", columns / 2)));
        }
        let expected_groups = self.config.group_size.map_or(1, |size| in_features.div_ceil(size));
        let fits = self.config.bits == Bits::B4 && marlin::shape_fits(in_features, out_features, groups);
        if !fits || groups != expected_groups {
            return Err(self.wrong_shape("B", format!("what Marlin takes: {}", marlin::NEEDS)));
        }
        let words = self.tensor("B")?.u32s()?;
        let scales = self.halves("s")?;
        let bias = self.bias(out_features)?;
        let bias: Option<Vec<f32>> = bias.map(|bias| bias.iter().map(|x| x.to_f32()).collect());
        match marlin::decode(&words, &scales, in_features, out_features, bias.as_deref()) {
            Ok(linear) => Ok((linear, self.remarks)),
            Err(source) => Err(self.invalid(source)),
        }
    }

    /// Bits of the words of a packed tensor: 32, or what `pack_dtype` was. The type decides, whatever the config says.
    fn word_bits(&self, field: &str) -> Result<usize, FormatError> {
        let tensor = self.tensor(field)?;
        match words::word_bits(tensor.dtype()) {
            Some(32) => Ok(32),
            // No tool packs codes that lie across words, or planes, into anything but 32 bits.
            Some(other) if !planar::differs(self.config.bits) => Ok(other),
            Some(_) => Err(tensor.wrong_dtype("I32 for this number of bits")),
            None => Err(tensor.wrong_dtype("I32, or I64, I16 or I8 as `pack_dtype` says")),
        }
    }

    /// The number of inputs, from `g_idx` where there is one, and from the rows of `qweight` elsewhere.
    fn in_features(&self, rows: usize, word_bits: usize) -> Result<usize, FormatError> {
        let bits = self.config.bits;
        let width = bits.get() as usize;
        let from_rows = rows.checked_mul(word_bits).map(|len| len / width).filter(|&len| len > 0);
        let Some(from_rows) = from_rows else {
            return Err(self.wrong_shape("qweight", "at least one row".into()));
        };
        let Some(g_idx) = self.optional("g_idx") else {
            let exact = words::words(bits, word_bits, from_rows) == rows;
            let why = || format!("a multiple of {width} rows for {width} bits");
            return if exact { Ok(from_rows) } else { Err(self.wrong_shape("qweight", why())) };
        };
        let len = g_idx.len();
        if g_idx.shape().len() != 1 || len > from_rows || !words::fit(bits, word_bits, rows, len) {
            let why =
                format!("one entry for each input of {rows} rows of {width}-bit qweight, about {from_rows}");
            return Err(self.wrong_shape("g_idx", why));
        }
        Ok(len)
    }

    fn qzeros(&self, bits: Bits, groups: usize, out_features: usize) -> Result<Vec<u32>, FormatError> {
        if self.optional("qzeros").is_none()
            && let Some(zeros) = self.optional("zeros")
        {
            let (tensor, path) = (zeros.name().to_owned(), zeros.path().to_owned());
            return Err(FormatError::FloatZeros { tensor, path });
        }
        let (rows, columns) = self.matrix_shape("qzeros")?;
        let word_bits = self.word_bits("qzeros")?;
        if rows != groups || !words::fit(bits, word_bits, columns, out_features) {
            let needed = words::words(bits, word_bits, out_features);
            let why = format!("({groups}, {needed}) for {} bits", bits.get());
            return Err(self.wrong_shape("qzeros", why));
        }
        let evidence = self.checkpoint.zeros.as_ref().expect("invariant: decided when a layer has codes");
        let mut convention = evidence.convention;
        let mut stored = self.tensor("qzeros")?.bytes().to_vec();
        if convention == ZeroConvention::V1WholeWord && word_bits != 32 {
            // What was borrowed stayed within words of this size.
            words::add_ones(bits, word_bits, &mut stored);
            convention = ZeroConvention::V2;
        }
        let used = bits.words(out_features);
        let rows = stored.chunks_exact(columns * word_bits / 8);
        let mut words: Vec<u32> = rows.flat_map(|row| words::of_row(row).into_iter().take(used)).collect();
        if self.checkpoint.claims(CheckpointFormat::Planar) && planar::differs(bits) {
            planar::convert_words(bits, &mut words, planar::Direction::ToStream);
        }
        decode_zeros(bits, out_features, &mut words, convention);
        Ok(words)
    }

    fn g_idx(
        &mut self,
        in_features: usize,
        group_size: usize,
        groups: usize,
    ) -> Result<Vec<u32>, FormatError> {
        let natural = || (0..in_features).map(|i| (i / group_size) as u32).collect();
        let Some(tensor) = self.optional("g_idx") else {
            self.remarks.push(Remark::NoGroupIndex);
            return Ok(natural());
        };
        let g_idx: Vec<u32> = match tensor.dtype() {
            // What does not fit becomes the largest index, which no layer has.
            Dtype::I64 => tensor.i64s()?.iter().map(|&group| group.try_into().unwrap_or(u32::MAX)).collect(),
            Dtype::I32 | Dtype::U32 => tensor.u32s()?.into_owned(),
            _ => return Err(tensor.wrong_dtype("I32")),
        };
        if groups > 1 && g_idx.iter().all(|&group| group == 0) {
            self.remarks.push(Remark::ZeroGroupIndex);
            return Ok(natural());
        }
        let is_natural = g_idx.iter().enumerate().all(|(i, &group)| group as usize == i / group_size);
        if self.config.desc_act && groups > 1 && is_natural {
            self.remarks.push(Remark::TrivialGroupIndex);
        }
        Ok(g_idx)
    }

    fn bias(&mut self, out_features: usize) -> Result<Option<Vec<f16>>, FormatError> {
        let Some(tensor) = self.optional("bias") else { return Ok(None) };
        if tensor.shape() != [out_features] {
            return Err(self.wrong_shape("bias", format!("[{out_features}]")));
        }
        let bias = self.halves("bias")?;
        if bias.iter().all(|x| x.to_f32() == 0.0) {
            self.remarks.push(Remark::ZeroBias);
        }
        Ok(Some(bias))
    }

    /// A floating-point tensor in half precision.
    fn halves(&mut self, field: &'static str) -> Result<Vec<f16>, FormatError> {
        let tensor = self.tensor(field)?;
        if tensor.dtype() == Dtype::F16 {
            return Ok(tensor.f16s()?.into_owned());
        }
        let wide = tensor.to_f32()?;
        let halves: Vec<f16> = wide.iter().map(|&x| f16::from_f32(x)).collect();
        if let Some(index) = halves.iter().position(|half| !half.is_finite()) {
            return Err(self.invalid(PackError::NonFinite { field, index, value: wide[index] }));
        }
        let changed = halves.iter().zip(&wide).filter(|(half, wide)| half.to_f32() != **wide).count();
        self.remarks.push(Remark::Rounded { field, dtype: tensor.dtype(), changed });
        Ok(halves)
    }

    fn clear_padding(&mut self, words: &mut [u32], mask: u32) {
        if words.iter().any(|word| word & mask != 0) {
            self.remarks.push(Remark::Padding);
            words.iter_mut().for_each(|word| *word &= !mask);
        }
    }

    fn optional(&self, field: &str) -> Option<Tensor<'a>> {
        self.checkpoint.get(&format!("{}.{field}", self.prefix))
    }

    fn tensor(&self, field: &str) -> Result<Tensor<'a>, FormatError> {
        self.checkpoint.tensor(&format!("{}.{field}", self.prefix))
    }

    fn matrix_shape(&self, field: &'static str) -> Result<(usize, usize), FormatError> {
        match *self.tensor(field)?.shape() {
            [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
            _ => Err(self.wrong_shape(field, "a matrix that is not empty".into())),
        }
    }

    fn wrong_shape(&self, field: &'static str, expected: String) -> FormatError {
        match self.tensor(field) {
            Err(missing) => missing,
            Ok(tensor) => FormatError::TensorShape {
                tensor: tensor.name().to_owned(),
                shape: tensor.shape().to_vec(),
                expected,
                path: tensor.path().to_owned(),
            },
        }
    }

    fn invalid(&self, source: PackError) -> FormatError {
        let path =
            self.tensor("qweight").map_or(self.checkpoint.dir.clone(), |tensor| tensor.path().to_owned());
        FormatError::Linear { prefix: self.prefix.to_owned(), source, path }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoGroupIndex => write!(f, "g_idx is missing, features taken in their order"),
            Self::ZeroGroupIndex => write!(f, "g_idx is all zero, features taken in their order"),
            Self::TrivialGroupIndex => write!(f, "desc_act is true, but g_idx is in natural order"),
            Self::Rounded { field, dtype, changed } => {
                write!(f, "{field} are {dtype}, {changed} values changed by rounding to F16")
            }
            Self::ZeroBias => write!(f, "the bias is all zero"),
            Self::Padding => write!(f, "bits behind the last code were set"),
        }
    }
}
