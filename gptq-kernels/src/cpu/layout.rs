//! The packed layout that all float kernels of the CPU share.
//!
//! Outputs come in blocks of 64, four tiles of 16: a tile is the lanes of one AVX-512 register. Within a block all data lie
//! in the order in which they are read, so that a kernel streams one contiguous range:
//!
//! ```text
//! block:   segment, segment, ...                    (all of K)
//! segment: [2 lines of scales][1 line of zeros]     as the format has them
//!          word row, word row, ...                  each 4 lines, one a tile: word of outputs 16 t .. 16 t + 15
//! line:    16 words of 32 bits, 64 bytes, aligned to 64
//! ```
//!
//! A segment is at most 128 input features of one group; longer groups are cut. Features are sorted by group first,
//! so that act-order costs one gather of the activations and nothing else. The last block is filled up with zeros.

use rayon::prelude::*;

use gptq_format::{Bits, PackedLinear};

use super::format::shift;
use crate::{DenseData, DenseType, DenseWeight, KernelError};

/// Outputs of a tile: lanes of one float32 AVX-512 register.
pub(super) const TILE: usize = 16;
/// Tiles of a block.
pub(super) const TILES: usize = 4;
/// Outputs of a block.
pub(super) const BLOCK: usize = TILE * TILES;
/// Most input features of a segment: what is decoded at once, 32 KiB of float32 a block, stays in the first-level cache.
pub(super) const SEGMENT: usize = 128;

/// One cache line: a word for each output of a tile.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; TILE]);

const EMPTY: Line = Line([0; TILE]);

/// Width of a code in this layout. Wider codes than 4 bits take a byte: no kernel gains by reading 5 bits of 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Two = 2,
    Three = 3,
    Four = 4,
    Byte = 8,
}

impl Width {
    fn of(bits: Bits) -> Self {
        match bits {
            Bits::B2 => Self::Two,
            Bits::B3 => Self::Three,
            Bits::B4 => Self::Four,
            Bits::B5 | Bits::B6 | Bits::B7 | Bits::B8 => Self::Byte,
        }
    }
}

/// What a word holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// GPTQ codes.
    Codes { width: Width, zeros: bool },
    /// Floats.
    Dense(DenseType),
}

impl Encoding {
    /// Lines before the words of a segment.
    pub(super) fn header(self) -> usize {
        match self {
            Self::Codes { zeros, .. } => 2 + usize::from(zeros),
            Self::Dense(_) => 0,
        }
    }

    /// Weights of a word.
    pub(super) fn per_word(self) -> usize {
        match self {
            Self::Codes { width, .. } => 2 * (16 / width as usize),
            Self::Dense(DenseType::F32) => 1,
            Self::Dense(DenseType::F16 | DenseType::Bf16) => 2,
        }
    }
}

/// Neighbouring input features, in sorted order, with one scale and zero point an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// First feature, in sorted order.
    pub(super) start: usize,
    /// Number of features, 1 ..= [`SEGMENT`].
    pub(super) len: usize,
    /// The group they belong to.
    group: usize,
}

/// A weight in this layout.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    pub(super) encoding: Encoding,
    pub(super) segments: Vec<Segment>,
    lines: Vec<Line>,
    /// Lines of one block.
    block_lines: usize,
    /// Feature at each place of the sorted order, unless that is the identity.
    pub(super) order: Option<Vec<u32>>,
}

impl Packed {
    /// Repacks GPTQ codes.
    pub(super) fn new(weight: &PackedLinear) -> Result<Self, KernelError> {
        let (inputs, outputs) = (weight.in_features(), weight.out_features());
        let g_idx = weight.g_idx();
        let mut order: Vec<u32> = (0..inputs as u32).collect();
        order.sort_by_key(|&i| g_idx[i as usize]);
        let segments = segments(order.iter().map(|&i| g_idx[i as usize] as usize));

        let width = Width::of(weight.bits());
        // Without zero points a kernel subtracts the middle of the layout's width.
        let is_middle = width as u32 == weight.bits().get() && weight.is_symmetric();
        let encoding = Encoding::Codes { width, zeros: !is_middle };
        let codes = weight.unpack_codes();
        let zeros = weight.unpack_zeros();
        let scales = weight.scales();
        let header = |segment: &Segment, tile: usize, lane: usize, lines: &mut [Line]| {
            let output = tile * TILE + lane;
            let (tile, at) = (tile % TILES, segment.group * outputs + output);
            lines[tile / 2].0[lane] |= u32::from(scales[at].to_bits()) << (16 * (tile % 2));
            if lines.len() > 2 {
                lines[2].0[lane] |= u32::from(zeros[at]) << (8 * tile);
            }
        };
        let word = |start: usize, len: usize, output: usize| {
            let row = &codes[output * inputs..][..inputs];
            order[start..start + len]
                .iter()
                .enumerate()
                .fold(0, |word, (slot, &i)| word | u32::from(row[i as usize]) << shift(width as u32, slot))
        };
        let (lines, block_lines) = fill(encoding, &segments, outputs, header, word)?;
        let sorted = order.iter().enumerate().all(|(place, &i)| place == i as usize);
        Ok(Self { encoding, segments, lines, block_lines, order: (!sorted).then_some(order) })
    }

    /// Copies a dense weight, whose shape must have been validated.
    pub(super) fn dense(weight: &DenseWeight<'_>) -> Result<Self, KernelError> {
        let (inputs, outputs) = (weight.in_features, weight.out_features);
        let segments = segments((0..inputs).map(|_| 0));
        let encoding = Encoding::Dense(weight.data.dtype());
        let none = |_: &Segment, _: usize, _: usize, _: &mut [Line]| {};
        let pair = |halves: &[u16]| halves.iter().rev().fold(0, |word, &half| word << 16 | u32::from(half));
        let at =
            |start: usize, len: usize, output: usize| output * inputs + start..output * inputs + start + len;
        let (lines, block_lines) = match weight.data {
            DenseData::F32(data) => {
                fill(encoding, &segments, outputs, none, |s, n, o| data[at(s, n, o)][0].to_bits())?
            }
            DenseData::F16(data) => {
                let data: &[u16] = bytemuck::cast_slice(data);
                fill(encoding, &segments, outputs, none, |s, n, o| pair(&data[at(s, n, o)]))?
            }
            DenseData::Bf16(data) => {
                let data: &[u16] = bytemuck::cast_slice(data);
                fill(encoding, &segments, outputs, none, |s, n, o| pair(&data[at(s, n, o)]))?
            }
        };
        Ok(Self { encoding, segments, lines, block_lines, order: None })
    }

    /// The lines of block `index`.
    pub(super) fn block(&self, index: usize) -> &[Line] {
        &self.lines[index * self.block_lines..][..self.block_lines]
    }

    /// Size of everything.
    pub(super) fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }
}

/// Cuts features, given by their groups in sorted order, into segments.
fn segments(groups: impl Iterator<Item = usize>) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    for (start, group) in groups.enumerate() {
        match segments.last_mut() {
            Some(last) if last.group == group && last.len < SEGMENT => last.len += 1,
            _ => segments.push(Segment { start, len: 1, group }),
        }
    }
    segments
}

/// Lays out all blocks. `header(segment, tile, lane, lines)` writes the header of one output, `word(start, len, output)`
/// packs the features `start .. start + len` of the sorted order.
fn fill(
    encoding: Encoding,
    segments: &[Segment],
    outputs: usize,
    header: impl Fn(&Segment, usize, usize, &mut [Line]) + Sync,
    word: impl Fn(usize, usize, usize) -> u32 + Sync,
) -> Result<(Vec<Line>, usize), KernelError> {
    let per_word = encoding.per_word();
    let block_lines: usize =
        segments.iter().map(|s| encoding.header() + s.len.div_ceil(per_word) * TILES).sum();
    let count = outputs.div_ceil(BLOCK) * block_lines;
    let mut lines = Vec::new();
    lines
        .try_reserve_exact(count)
        .map_err(|_| KernelError::OutOfMemory { elements: count.saturating_mul(TILE) })?;
    lines.resize(count, EMPTY);
    lines.par_chunks_mut(block_lines).enumerate().for_each(|(block, mut rest)| {
        for segment in segments {
            let (head, tail) = rest.split_at_mut(encoding.header());
            let (words, tail) = tail.split_at_mut(segment.len.div_ceil(per_word) * TILES);
            for output in block * BLOCK..((block + 1) * BLOCK).min(outputs) {
                let (tile, lane) = (output / TILE, output % TILE);
                header(segment, tile, lane, head);
                for (row, start) in (0..segment.len).step_by(per_word).enumerate() {
                    let len = per_word.min(segment.len - start);
                    words[row * TILES + tile % TILES].0[lane] = word(segment.start + start, len, output);
                }
            }
            rest = tail;
        }
    });
    Ok((lines, block_lines))
}
