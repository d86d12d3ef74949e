//! The bit planes of `gptq_p`.
//!
//! Every 32 codes make `b` words, one plane after the other from the low bits to the high ones; in a plane of width `w`
//! word `i` holds codes `32 i / w ..`, each at `w j`. Widths that divide 32 are one plane, the same as the continuous
//! stream; 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1.

use crate::Bits;
use crate::bitstream::{RUN, pack_stream, unpack_stream};

/// Words of a run of the widest codes that have several planes.
const MOST_WORDS: usize = 7;

/// Whether the planes of this width differ from the continuous stream.
pub(crate) fn differs(bits: Bits) -> bool {
    !32u32.is_multiple_of(bits.get())
}

/// Widths of the planes, from the low bits to the high ones.
fn planes(bits: Bits) -> &'static [u32] {
    match bits {
        Bits::B2 => &[2],
        Bits::B3 => &[2, 1],
        Bits::B4 => &[4],
        Bits::B5 => &[4, 1],
        Bits::B6 => &[4, 2],
        Bits::B7 => &[4, 2, 1],
        Bits::B8 => &[8],
    }
}

/// Which way words are converted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Direction {
    ToStream,
    FromStream,
}

/// Converts the words of 32 codes, `words.len() == bits`, in place.
fn convert(bits: Bits, words: &mut [u32], direction: Direction) {
    let mut codes = [0; RUN];
    match direction {
        Direction::ToStream => {
            for_each_plane(bits, words, |words, width, low| match width {
                1 => gather::<1>(words, low, &mut codes),
                2 => gather::<2>(words, low, &mut codes),
                4 => gather::<4>(words, low, &mut codes),
                _ => gather::<8>(words, low, &mut codes),
            });
            pack_stream(bits, &codes, words);
        }
        Direction::FromStream => {
            unpack_stream(bits, words, &mut codes);
            for_each_plane(bits, words, |words, width, low| match width {
                1 => scatter::<1>(words, low, &codes),
                2 => scatter::<2>(words, low, &codes),
                4 => scatter::<4>(words, low, &codes),
                _ => scatter::<8>(words, low, &codes),
            });
        }
    }
}

/// Calls `visit` with each plane's words, its width and its lowest bit in a code.
fn for_each_plane(bits: Bits, words: &mut [u32], mut visit: impl FnMut(&mut [u32], u32, u32)) {
    let (mut rest, mut low) = (words, 0);
    for &width in planes(bits) {
        let (plane, tail) = rest.split_at_mut(width as usize);
        visit(plane, width, low);
        (rest, low) = (tail, low + width);
    }
}

/// Adds a plane of width `W` to the codes. The width is a constant, so that the loop unrolls to shifts by constants.
fn gather<const W: u32>(words: &[u32], low: u32, codes: &mut [u8; RUN]) {
    for (codes, &word) in codes.chunks_exact_mut(RUN / W as usize).zip(words) {
        for (j, code) in codes.iter_mut().enumerate() {
            *code |= ((word >> (W * j as u32) & ((1 << W) - 1)) << low) as u8;
        }
    }
}

/// The inverse of [`gather`].
fn scatter<const W: u32>(words: &mut [u32], low: u32, codes: &[u8; RUN]) {
    for (codes, word) in codes.chunks_exact(RUN / W as usize).zip(words) {
        let fields = codes.iter().enumerate();
        *word = fields
            .fold(0, |word, (j, &code)| word | (u32::from(code) >> low & ((1 << W) - 1)) << (W * j as u32));
    }
}

/// Converts `qweight`, `(rows, columns)` with a multiple of `bits` rows, in place.
pub(crate) fn convert_rows(bits: Bits, words: &mut [u32], columns: usize, direction: Direction) {
    let height = bits.get() as usize;
    for run in words.chunks_exact_mut(height * columns) {
        for column in 0..columns {
            let mut buffer = [0; MOST_WORDS];
            let buffer = &mut buffer[..height];
            for (row, word) in buffer.iter_mut().enumerate() {
                *word = run[row * columns + column];
            }
            convert(bits, buffer, direction);
            for (row, word) in buffer.iter().enumerate() {
                run[row * columns + column] = *word;
            }
        }
    }
}

/// Converts `qzeros`, whose rows have a multiple of `bits` words, in place.
pub(crate) fn convert_words(bits: Bits, words: &mut [u32], direction: Direction) {
    for run in words.chunks_exact_mut(bits.get() as usize) {
        convert(bits, run, direction);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEVERAL_PLANES: [Bits; 4] = [Bits::B3, Bits::B5, Bits::B6, Bits::B7];

    fn planes_of(bits: Bits, codes: &[u8; RUN]) -> Vec<u32> {
        let mut words = vec![0; bits.get() as usize];
        pack_stream(bits, codes, &mut words);
        convert(bits, &mut words, Direction::FromStream);
        words
    }

    #[test]
    fn planes_lie_where_the_format_says() {
        let mut codes = [0; RUN];
        // Its low bits 10 are the second of word 1's fields, its high bit is bit 17 of word 2.
        codes[17] = 0b110;
        assert_eq!(planes_of(Bits::B3, &codes), [0, 0b10 << 2, 1 << 17]);
        // Low four bits 0101 are the second field of word 2; then comes the plane of the rest.
        codes[17] = 0b1_0101;
        assert_eq!(planes_of(Bits::B5, &codes), [0, 0, 0b0101 << 4, 0, 1 << 17]);
        codes[17] = 0b10_0101;
        assert_eq!(planes_of(Bits::B6, &codes), [0, 0, 0b0101 << 4, 0, 0, 0b10 << 2]);
        codes[17] = 0b110_0101;
        assert_eq!(planes_of(Bits::B7, &codes), [0, 0, 0b0101 << 4, 0, 0, 0b10 << 2, 1 << 17]);
    }

    #[test]
    fn a_width_of_one_plane_is_the_stream() {
        for bits in Bits::ALL {
            assert_eq!(planes(bits).iter().sum::<u32>(), bits.get());
            assert_eq!(planes(bits).len() == 1, !differs(bits), "{bits:?}");
        }
        let codes = std::array::from_fn(|k| (k * 7 % 256) as u8);
        let mut words = [0; 8];
        pack_stream(Bits::B8, &codes, &mut words);
        assert_eq!(planes_of(Bits::B8, &codes), words);
    }

    proptest! {
        #[test]
        fn conversion_is_its_own_inverse(words in any::<[u32; 7]>()) {
            for bits in SEVERAL_PLANES {
                let words = &words[..bits.get() as usize];
                let mut there = words.to_vec();
                convert(bits, &mut there, Direction::FromStream);
                convert(bits, &mut there, Direction::ToStream);
                prop_assert_eq!(&there, words);
                convert(bits, &mut there, Direction::ToStream);
                convert(bits, &mut there, Direction::FromStream);
                prop_assert_eq!(&there, words);
            }
        }

        #[test]
        fn rows_and_words_agree(runs in prop::collection::vec(any::<[u32; 7]>(), 1..5)) {
            for bits in SEVERAL_PLANES {
                let height = bits.get() as usize;
                let mut words: Vec<u32> = runs.iter().flat_map(|run| &run[..height]).copied().collect();
                // The same runs as the columns of one matrix.
                let columns = runs.len();
                let mut rows: Vec<u32> =
                    (0..height).flat_map(|row| runs.iter().map(move |run| run[row])).collect();
                convert_words(bits, &mut words, Direction::FromStream);
                convert_rows(bits, &mut rows, columns, Direction::FromStream);
                for (at, &word) in words.iter().enumerate() {
                    prop_assert_eq!(rows[at % height * columns + at / height], word);
                }
            }
        }
    }
}
