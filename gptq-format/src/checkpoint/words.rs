//! Packed words of 8, 16 and 64 bits (`pack_dtype`) as the 32-bit words of the canonical layout.
//!
//! Codes whose width divides a word's never lie across two words, so little-endian words of any size are the same stream
//! of bytes.

use crate::{Bits, Dtype};

/// Bits of a word of packed codes, by the tensor's type.
pub(super) fn word_bits(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::I8
        | Dtype::U8
        | Dtype::I16
        | Dtype::U16
        | Dtype::I32
        | Dtype::U32
        | Dtype::I64
        | Dtype::U64 => Some(dtype.bits()),
        _ => None,
    }
}

/// Words that hold `len` codes.
pub(super) fn words(bits: Bits, word_bits: usize, len: usize) -> usize {
    (len * bits.get() as usize).div_ceil(word_bits)
}

/// Whether `words` words hold `len` codes: exactly, or in words of 32 bits padded to whole runs of 32 codes.
pub(super) fn fit(bits: Bits, word_bits: usize, words: usize, len: usize) -> bool {
    let padded = word_bits == 32 && words == len.div_ceil(32) * bits.get() as usize;
    len > 0 && (words == self::words(bits, word_bits, len) || padded)
}

/// A row of words as 32-bit words, filled up with zeros.
pub(super) fn of_row(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(4).map(word).collect()
}

/// A matrix `(rows, columns)`, packed along its columns, with 32-bit words: `(ceil(rows * word_bits / 32), columns)`.
pub(super) fn of_columns(bytes: &[u8], word_bits: usize, columns: usize) -> Vec<u32> {
    let size = word_bits / 8;
    let rows = bytes.len() / (size * columns);
    let mut packed = vec![0; (rows * size).div_ceil(4) * columns];
    for (row, words) in bytes.chunks_exact(size * columns).enumerate() {
        for (column, bytes) in words.chunks_exact(size).enumerate() {
            for (part, bytes) in bytes.chunks(4).enumerate() {
                let at = row * size + 4 * part;
                packed[at / 4 * columns + column] |= word(bytes) << (8 * (at % 4));
            }
        }
    }
    packed
}

/// Adds one to every field of words of `word_bits` bits, carrying from field to field but not from word to word.
pub(super) fn add_ones(bits: Bits, word_bits: usize, bytes: &mut [u8]) {
    let one = u64::MAX / u64::from(bits.max_code());
    for word in bytes.chunks_exact_mut(word_bits / 8) {
        let mut wide = [0; 8];
        wide[..word.len()].copy_from_slice(word);
        let sum = u64::from_le_bytes(wide).wrapping_add(one).to_le_bytes();
        word.copy_from_slice(&sum[..word.len()]);
    }
}

/// Up to four bytes, little-endian.
fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_of_any_word_are_one_stream() {
        let bytes: Vec<u8> = (1..=24).collect();
        let expected: Vec<u32> =
            bytes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(of_row(&bytes), expected);
        assert_eq!(of_row(&bytes[..5]), [0x0403_0201, 5]);
        for word_bits in [8, 16, 32, 64] {
            // One column: the stream itself. Two columns: every word twice.
            assert_eq!(of_columns(&bytes, word_bits, 1), expected, "{word_bits}");
            let twice: Vec<u8> = bytes.chunks(word_bits / 8).flat_map(|word| [word, word].concat()).collect();
            let columns = of_columns(&twice, word_bits, 2);
            assert!(columns.chunks(2).zip(&expected).all(|(both, word)| both == [*word; 2]), "{word_bits}");
        }
        assert_eq!(of_columns(&bytes[..3], 8, 1), [0x0003_0201]);
        assert_eq!(of_columns(&bytes[..6], 16, 3), [0x0201, 0x0403, 0x0605]);
    }

    #[test]
    fn ones_are_added_word_by_word() {
        // Zero points 0 and 0 minus one each, borrowed from the whole byte; the next byte must not feel the carry.
        let mut bytes = [0u8.wrapping_sub(0x11), 0x77];
        add_ones(Bits::B4, 8, &mut bytes);
        assert_eq!(bytes, [0, 0x88]);
        let mut bytes = 0u64.wrapping_sub(0x1111_1111_1111_1111).to_le_bytes();
        add_ones(Bits::B4, 64, &mut bytes);
        assert_eq!(bytes, [0; 8]);
    }

    #[test]
    fn what_fits() {
        assert!(fit(Bits::B4, 64, 2, 17) && !fit(Bits::B4, 64, 2, 16) && !fit(Bits::B4, 64, 2, 33));
        assert!(fit(Bits::B3, 32, 4, 40) && fit(Bits::B3, 32, 6, 40) && !fit(Bits::B3, 32, 5, 40));
        assert!(!fit(Bits::B8, 8, 0, 0));
    }
}
