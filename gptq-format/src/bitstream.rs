//! Codes to words and back: the little-endian continuous bit stream of the format.
//!
//! Code `k` of a stream sits at bits `[b*k, b*k + b)`. The least common multiple is 32 codes in `b` words, so every loop
//! here works on such a run and treats a ragged end as one run padded with zeros. Eight codes are squeezed together in one
//! 64-bit register (three shift-or-mask steps), which the compiler widens to whatever vectors the target has.

use std::ops::Range;

use crate::Bits;

/// Codes in one run; they fill exactly `b` words.
pub(crate) const RUN: usize = 32;

/// Output features in a tile of [`pack_columns`]: a row of it is eight cache lines of the word matrix.
const TILE_COLUMNS: usize = 128;
/// Codes of an output feature in a tile. With 4 bits these are one cache line of words, and a tile takes 8 KiB. Twice as
/// many codes of half as many outputs take half as long again: columns two lines apart use only half of the sets of the
/// first cache. Measured on a layer of 4096 x 11008.
const TILE_LEN: usize = 4 * RUN;
/// Words in a tile of any width.
const TILE_WORDS: usize = TILE_COLUMNS * TILE_LEN / 4;

/// The low `used` bits of every `lane` bits.
const fn lanes(lane: u32, used: u32) -> u64 {
    let one = u64::MAX >> (64 - used);
    let mut mask = 0;
    let mut at = 0;
    while at < 64 {
        mask |= one << at;
        at += lane;
    }
    mask
}

/// Eight codes, one per byte, to `8 * B` adjacent bits.
#[inline(always)]
fn squeeze<const B: u32>(codes: u64) -> u64 {
    let gap = 8 - B;
    if B > gap && gap > 0 {
        // What is moved would fall on what stays, so each is masked by itself.
        let pairs = codes & const { lanes(16, B) } | codes >> gap & const { lanes(16, B) << B };
        let quads =
            pairs & const { lanes(32, 2 * B) } | pairs >> (2 * gap) & const { lanes(32, 2 * B) << (2 * B) };
        return quads & const { lanes(64, 4 * B) }
            | quads >> (4 * gap) & const { lanes(64, 4 * B) << (4 * B) };
    }
    let pairs = (codes | codes >> gap) & const { lanes(16, 2 * B) };
    let quads = (pairs | pairs >> (2 * gap)) & const { lanes(32, 4 * B) };
    (quads | quads >> (4 * gap)) & const { lanes(64, 8 * B) }
}

/// The inverse of [`squeeze`]; bits above `8 * B` must be zero.
#[inline(always)]
fn spread<const B: u32>(stream: u64) -> u64 {
    let gap = 8 - B;
    if B > gap && gap > 0 {
        let quads =
            stream & const { lanes(64, 4 * B) } | stream << (4 * gap) & const { lanes(64, 4 * B) << 32 };
        let pairs =
            quads & const { lanes(32, 2 * B) } | quads << (2 * gap) & const { lanes(32, 2 * B) << 16 };
        return pairs & const { lanes(16, B) } | pairs << gap & const { lanes(16, B) << 8 };
    }
    let quads = (stream | stream << (4 * gap)) & const { lanes(32, 4 * B) };
    let pairs = (quads | quads << (2 * gap)) & const { lanes(16, 2 * B) };
    (pairs | pairs << gap) & const { lanes(8, B) }
}

#[inline(always)]
fn eight(codes: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&codes[at * 8..at * 8 + 8]);
    u64::from_le_bytes(bytes)
}

/// Packs one run: `words.len() == B`.
#[inline(always)]
fn pack_run<const B: u32>(codes: &[u8; RUN], words: &mut [u32]) {
    let mut pending = 0u128;
    let mut filled = 0;
    let mut word = 0;
    for part in 0..4 {
        pending |= u128::from(squeeze::<B>(eight(codes, part))) << filled;
        filled += 8 * B;
        while filled >= 32 {
            words[word] = pending as u32;
            word += 1;
            pending >>= 32;
            filled -= 32;
        }
    }
}

/// Unpacks one run: `words.len() == B`.
#[inline(always)]
fn unpack_run<const B: u32>(words: &[u32], codes: &mut [u8; RUN]) {
    let mut pending = 0u128;
    let mut filled = 0;
    let mut word = 0;
    for part in 0..4 {
        while filled < 8 * B {
            pending |= u128::from(words[word]) << filled;
            word += 1;
            filled += 32;
        }
        let stream = pending as u64 & const { lanes(64, 8 * B) };
        codes[part * 8..part * 8 + 8].copy_from_slice(&spread::<B>(stream).to_le_bytes());
        pending >>= 8 * B;
        filled -= 8 * B;
    }
}

/// Packs whole octets of codes of a width that divides 32: one loop without carried state, which vectorises.
#[inline(always)]
fn pack_even<const B: u32>(codes: &[[u8; 8]], words: &mut [u32]) {
    match B {
        8 => {
            for (codes, words) in codes.iter().zip(words.chunks_exact_mut(2)) {
                let both = u64::from_le_bytes(*codes);
                words.copy_from_slice(&[both as u32, (both >> 32) as u32]);
            }
        }
        4 => {
            for (codes, word) in codes.iter().zip(words) {
                *word = squeeze::<B>(u64::from_le_bytes(*codes)) as u32;
            }
        }
        _ => {
            for (codes, word) in codes.as_chunks::<2>().0.iter().zip(words) {
                let [low, high] = codes.map(|codes| squeeze::<B>(u64::from_le_bytes(codes)) as u32);
                *word = low | high << 16;
            }
        }
    }
}

/// The inverse of [`pack_even`].
#[inline(always)]
fn unpack_even<const B: u32>(words: &[u32], codes: &mut [[u8; 8]]) {
    match B {
        8 => {
            for (codes, words) in codes.iter_mut().zip(words.as_chunks::<2>().0) {
                *codes = (u64::from(words[0]) | u64::from(words[1]) << 32).to_le_bytes();
            }
        }
        4 => {
            for (codes, &word) in codes.iter_mut().zip(words) {
                *codes = spread::<B>(word.into()).to_le_bytes();
            }
        }
        _ => {
            for (codes, &word) in codes.as_chunks_mut::<2>().0.iter_mut().zip(words) {
                *codes = [word & 0xffff, word >> 16].map(|half| spread::<B>(half.into()).to_le_bytes());
            }
        }
    }
}

fn pack<const B: u32>(codes: &[u8], words: &mut [u32]) {
    let width = B as usize;
    let (runs, tail) = codes.as_chunks::<RUN>();
    if 32 % B == 0 {
        pack_even::<B>(runs.as_flattened().as_chunks().0, &mut words[..runs.len() * width]);
    } else {
        for (run, words) in runs.iter().zip(words.chunks_exact_mut(width)) {
            pack_run::<B>(run, words);
        }
    }
    if !tail.is_empty() {
        let mut run = [0; RUN];
        run[..tail.len()].copy_from_slice(tail);
        let mut last = [0; 8];
        pack_run::<B>(&run, &mut last[..width]);
        let words = &mut words[runs.len() * width..];
        words.copy_from_slice(&last[..words.len()]);
    }
}

fn unpack<const B: u32>(words: &[u32], codes: &mut [u8]) {
    let width = B as usize;
    let (runs, tail) = codes.as_chunks_mut::<RUN>();
    let whole = runs.len() * width;
    if 32 % B == 0 {
        unpack_even::<B>(&words[..whole], runs.as_flattened_mut().as_chunks_mut().0);
    } else {
        for (run, words) in runs.iter_mut().zip(words.chunks_exact(width)) {
            unpack_run::<B>(words, run);
        }
    }
    if !tail.is_empty() {
        let mut last = [0; 8];
        last[..words.len() - whole].copy_from_slice(&words[whole..]);
        let mut run = [0; RUN];
        unpack_run::<B>(&last[..width], &mut run);
        tail.copy_from_slice(&run[..tail.len()]);
    }
}

/// Packs one stream. `words.len()` must be `bits.words(codes.len())`, every code must fit in `bits`.
pub(crate) fn pack_stream(bits: Bits, codes: &[u8], words: &mut [u32]) {
    assert_eq!(words.len(), bits.words(codes.len()), "invariant: the caller sized the words");
    match bits {
        Bits::B2 => pack::<2>(codes, words),
        Bits::B3 => pack::<3>(codes, words),
        Bits::B4 => pack::<4>(codes, words),
        Bits::B5 => pack::<5>(codes, words),
        Bits::B6 => pack::<6>(codes, words),
        Bits::B7 => pack::<7>(codes, words),
        Bits::B8 => pack::<8>(codes, words),
    }
}

/// Unpacks one stream. `words.len()` must be `bits.words(codes.len())`.
pub(crate) fn unpack_stream(bits: Bits, words: &[u32], codes: &mut [u8]) {
    assert_eq!(words.len(), bits.words(codes.len()), "invariant: the caller sized the words");
    match bits {
        Bits::B2 => unpack::<2>(words, codes),
        Bits::B3 => unpack::<3>(words, codes),
        Bits::B4 => unpack::<4>(words, codes),
        Bits::B5 => unpack::<5>(words, codes),
        Bits::B6 => unpack::<6>(words, codes),
        Bits::B7 => unpack::<7>(words, codes),
        Bits::B8 => unpack::<8>(words, codes),
    }
}

/// Packs every row of `codes` `(columns, len)` into a column of the result `(words(len), columns)`, or returns `None` if
/// a code does not fit in `bits`.
///
/// Going tile by tile keeps both the rows that are read and the rows that are written within a few pages: a straight
/// transposition would touch another page for every word.
pub(crate) fn pack_columns(bits: Bits, codes: &[u8], len: usize, columns: usize) -> Option<Vec<u32>> {
    let mut packed = vec![0; bits.words(len) * columns];
    let mut tile = [0u32; TILE_WORDS];
    for tile_columns in tiles(columns, TILE_COLUMNS) {
        for run in tiles(len, TILE_LEN) {
            let first = bits.words(run.start);
            let height = bits.words(run.len());
            for (column, words) in tile_columns.clone().zip(tile.chunks_exact_mut(height)) {
                let codes = &codes[column * len..][run.clone()];
                if codes.iter().fold(0, |all, code| all | code) > bits.max_code() {
                    return None;
                }
                pack_stream(bits, codes, words);
            }
            for row in 0..height {
                let target = &mut packed[(first + row) * columns..][tile_columns.clone()];
                for (target, words) in target.iter_mut().zip(tile.chunks_exact(height)) {
                    *target = words[row];
                }
            }
        }
    }
    Some(packed)
}

/// The inverse of [`pack_columns`] for some of the columns: rows of `len` codes each, one behind the other.
pub(crate) fn unpack_columns(
    bits: Bits,
    packed: &[u32],
    len: usize,
    columns: usize,
    wanted: Range<usize>,
    codes: &mut [u8],
) {
    let mut tile = [0u32; TILE_WORDS];
    for tile_columns in tiles(wanted.len(), TILE_COLUMNS) {
        for run in tiles(len, TILE_LEN) {
            let first = bits.words(run.start);
            let height = bits.words(run.len());
            for row in 0..height {
                let source = &packed[(first + row) * columns + wanted.start..][tile_columns.clone()];
                for (source, words) in source.iter().zip(tile.chunks_exact_mut(height)) {
                    words[row] = *source;
                }
            }
            for (column, words) in tile_columns.clone().zip(tile.chunks_exact(height)) {
                unpack_stream(bits, words, &mut codes[column * len..][run.clone()]);
            }
        }
    }
}

/// `0..len` in steps; the last one may be short.
fn tiles(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step).map(move |start| start..len.min(start + step))
}

/// The bits of a stream's last word that lie behind its `len` codes; zero where the codes fill the word.
pub(crate) fn padding_mask(bits: Bits, len: usize) -> u32 {
    match (len % 32) as u32 * bits.get() % 32 {
        0 => 0,
        used => u32::MAX << used,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, straight from the definition.
    fn naive(bits: Bits, codes: &[u8]) -> Vec<u32> {
        let mut words = vec![0; bits.words(codes.len())];
        for (k, &code) in codes.iter().enumerate() {
            for bit in 0..bits.get() as usize {
                let at = k * bits.get() as usize + bit;
                words[at / 32] |= u32::from(code >> bit & 1) << (at % 32);
            }
        }
        words
    }

    /// A fixed sequence that reaches every code.
    fn sequence(bits: Bits, len: usize) -> Vec<u8> {
        let mut state = 12345u32;
        let next = |_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) as u8 & bits.max_code()
        };
        (0..len).map(next).collect()
    }

    #[test]
    fn streams_of_every_length_equal_the_definition() {
        for bits in Bits::ALL {
            for len in 0..=100 {
                let codes = sequence(bits, len);
                let mut words = vec![0; bits.words(len)];
                pack_stream(bits, &codes, &mut words);
                assert_eq!(words, naive(bits, &codes), "{bits:?} {len}");
                let mut back = vec![0; len];
                unpack_stream(bits, &words, &mut back);
                assert_eq!(back, codes, "{bits:?} {len}");
                if let Some(last) = words.last() {
                    assert_eq!(last & padding_mask(bits, len), 0, "{bits:?} {len}");
                }
            }
        }
    }

    /// The three-bit words that the symmetric zero 4 and its v1 form 3 have on disk (GPTQModel writes them).
    #[test]
    fn three_bit_words_are_the_published_ones() {
        let mut words = [0; 3];
        pack_stream(Bits::B3, &[3; 32], &mut words);
        assert_eq!(words, [0xdb6d_b6db, 0xb6db_6db6, 0x6db6_db6d]);
        let codes: Vec<u8> = (0..32).map(|k| u8::from(k == 10) * 0b101 + u8::from(k == 21) * 0b110).collect();
        pack_stream(Bits::B3, &codes, &mut words);
        assert_eq!(words, [0b01 << 30, 1, 0b11]);
    }

    #[test]
    fn columns_equal_one_stream_per_column() {
        for bits in Bits::ALL {
            for (len, columns) in [(1, 1), (7, 3), (256, 64), (257, 65), (600, 130), (32, 200)] {
                let codes = sequence(bits, len * columns);
                let packed = pack_columns(bits, &codes, len, columns).expect("codes fit");
                for column in 0..columns {
                    let words = naive(bits, &codes[column * len..][..len]);
                    let got: Vec<u32> = packed.iter().skip(column).step_by(columns).copied().collect();
                    assert_eq!(got, words, "{bits:?} {len} {columns} {column}");
                }
                let mut back = vec![0; codes.len()];
                unpack_columns(bits, &packed, len, columns, 0..columns, &mut back);
                assert_eq!(back, codes, "{bits:?} {len} {columns}");
                let some = columns / 3..columns;
                unpack_columns(bits, &packed, len, columns, some.clone(), &mut back);
                assert_eq!(back[..some.len() * len], codes[some.start * len..], "{bits:?} {len} {columns}");
            }
        }
    }
}
