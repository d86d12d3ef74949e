//! The bit planes of `gptq_p`.
//!
//! Every 32 codes make `b` words, one plane after the other from the low bits to the high ones; in a plane of width `w`
//! word `i` holds codes `32 i / w ..`, each at `w j`. Widths that divide 32 are one plane, the same as the continuous
//! stream. Of the widths of [`Bits`] that leaves 3 = 2 + 1.

use crate::Bits;
use crate::bitstream::{RUN, pack_stream, unpack_stream};

/// Whether the planes of this width differ from the continuous stream.
pub(crate) fn differs(bits: Bits) -> bool {
    bits == Bits::B3
}

/// The three words of 32 codes of 3 bits, from planes to stream.
pub(crate) fn to_stream(planes: [u32; 3]) -> [u32; 3] {
    let mut codes = [0; RUN];
    for (k, code) in codes.iter_mut().enumerate() {
        let low = planes[k / 16] >> (2 * (k % 16)) & 3;
        let high = planes[2] >> k & 1;
        *code = (low | high << 2) as u8;
    }
    let mut stream = [0; 3];
    pack_stream(Bits::B3, &codes, &mut stream);
    stream
}

/// The inverse of [`to_stream`].
pub(crate) fn from_stream(stream: [u32; 3]) -> [u32; 3] {
    let mut codes = [0; RUN];
    unpack_stream(Bits::B3, &stream, &mut codes);
    let mut planes = [0; 3];
    for (k, &code) in codes.iter().enumerate() {
        let code = u32::from(code);
        planes[k / 16] |= (code & 3) << (2 * (k % 16));
        planes[2] |= (code >> 2) << k;
    }
    planes
}

/// Converts `qweight` of 3 bits, `(rows, columns)` with a multiple of three rows, in place.
pub(crate) fn convert_rows(words: &mut [u32], columns: usize, convert: fn([u32; 3]) -> [u32; 3]) {
    for run in words.chunks_exact_mut(3 * columns) {
        for column in 0..columns {
            let at = [column, column + columns, column + 2 * columns];
            let converted = convert(at.map(|at| run[at]));
            at.into_iter().zip(converted).for_each(|(at, word)| run[at] = word);
        }
    }
}

/// Converts `qzeros` of 3 bits, whose rows have a multiple of three words, in place.
pub(crate) fn convert_words(words: &mut [u32], convert: fn([u32; 3]) -> [u32; 3]) {
    for run in words.as_chunks_mut().0 {
        *run = convert(*run);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn planes_lie_where_the_format_says() {
        // Code 17 is 0b110: its low bits 10 are the second of word 1's fields, its high bit is bit 17 of word 2.
        let mut codes = [0; RUN];
        codes[17] = 0b110;
        let mut stream = [0; 3];
        pack_stream(Bits::B3, &codes, &mut stream);
        assert_eq!(from_stream(stream), [0, 0b10 << 2, 1 << 17]);
    }

    proptest! {
        #[test]
        fn conversion_is_its_own_inverse(words in any::<[u32; 3]>()) {
            prop_assert_eq!(from_stream(to_stream(words)), words);
            prop_assert_eq!(to_stream(from_stream(words)), words);
        }

        #[test]
        fn rows_and_words_agree(runs in prop::collection::vec(any::<[u32; 3]>(), 1..5)) {
            let mut words = runs.as_flattened().to_vec();
            convert_words(&mut words, from_stream);
            // The same runs as the columns of one matrix of three rows.
            let columns = runs.len();
            let mut rows: Vec<u32> = (0..3).flat_map(|row| runs.iter().map(move |run| run[row])).collect();
            convert_rows(&mut rows, columns, from_stream);
            for (at, &word) in words.iter().enumerate() {
                prop_assert_eq!(rows[at % 3 * columns + at / 3], word);
            }
        }
    }
}
