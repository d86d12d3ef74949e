use super::{
    format::{Format, half_to_float},
    layout::{BLOCK, Line, Segment, TILE, TILES},
    simd::Simd,
};

/// One block of outputs for a few rows.
pub(super) struct DirectArgs<'a, const ROWS: usize> {
    pub(super) lines: &'a [Line],
    pub(super) segments: &'a [Segment],
    /// Rows of activations, in sorted order.
    pub(super) x: [&'a [f32]; ROWS],
    /// Sums so far, added to.
    pub(super) sums: &'a mut [[[f32; TILE]; TILES]; ROWS],
}

/// How many lines ahead of its use a word is asked for: 4 KiB. Hardware prefetchers stop at the end of each 4 KiB page.
const AHEAD: usize = 64;

/// Scales of tile `tile`, or ones.
#[inline(always)]
pub(super) fn scales<S: Simd, W: Format>(s: S, head: &[Line], tile: usize) -> S::F {
    if W::SCALED { half_to_float(s, s.load_words(&head[tile / 2]), tile % 2) } else { s.splat(1.0) }
}

/// Zero points of tile `tile`, if there are any.
#[inline(always)]
pub(super) fn zeros<S: Simd, W: Format>(s: S, head: &[Line], tile: usize) -> S::F {
    if W::ZEROS {
        let words = s.shift_right(s.load_words(&head[2]), 8 * tile as u32);
        s.to_float(s.and(words, s.splat_word(0xff)))
    } else {
        s.splat(0.0)
    }
}

/// Lines of a segment's header.
pub(super) const fn header<W: Format>() -> usize {
    2 * W::SCALED as usize + W::ZEROS as usize
}

/// Multiplies straight from the packed words, each decoded once and used for every row: for few rows, where reading the
/// weights is the work. `NT` tiles are in flight, to hide the latency of the additions.
#[inline(always)]
pub(super) fn run<S: Simd, W: Format, const ROWS: usize, const NT: usize>(s: S, args: DirectArgs<'_, ROWS>) {
    let DirectArgs { lines, segments, x, sums } = args;
    const { assert!(TILES.is_multiple_of(NT)) };
    for first in (0..TILES).step_by(NT) {
        let mut rest = lines;
        for segment in segments {
            let (head, tail) = rest.split_at(header::<W>());
            let (words, tail) = tail.split_at(segment.len.div_ceil(W::PER_WORD) * TILES);
            rest = tail;
            let (words, _) = words.as_chunks::<TILES>();
            let grid: [W::Grid<S>; NT] =
                std::array::from_fn(|t| W::grid(s, zeros::<S, W>(s, head, first + t)));
            let x: [&[f32]; ROWS] = x.map(|row| &row[segment.start..segment.start + segment.len]);
            let mut partial = [[s.splat(0.0); NT]; ROWS];
            let (whole, ragged) = words.split_at(segment.len / W::PER_WORD);
            for (r, row) in whole.iter().enumerate() {
                for t in first..first + NT {
                    s.prefetch(row.as_ptr().wrapping_add(AHEAD + t));
                }
                let w: [S::U; NT] = std::array::from_fn(|t| s.load_words(&row[first + t]));
                let x: [&[f32]; ROWS] = x.map(|row| &row[r * W::PER_WORD..][..W::PER_WORD]);
                for slot in 0..W::PER_WORD {
                    step::<S, W, ROWS, NT>(s, w, slot, grid, x.map(|row| row[slot]), &mut partial);
                }
            }
            if let [row] = ragged {
                let done = segment.len / W::PER_WORD * W::PER_WORD;
                let w: [S::U; NT] = std::array::from_fn(|t| s.load_words(&row[first + t]));
                for slot in 0..segment.len - done {
                    step::<S, W, ROWS, NT>(s, w, slot, grid, x.map(|row| row[done + slot]), &mut partial);
                }
            }
            for t in 0..NT {
                let scale = scales::<S, W>(s, head, first + t);
                for m in 0..ROWS {
                    let sum = s.load(&sums[m][first + t]);
                    s.store(s.mul_add(scale, partial[m][t], sum), &mut sums[m][first + t]);
                }
            }
        }
    }
    const { assert!(BLOCK == TILE * TILES) };
}

/// One input feature.
#[inline(always)]
fn step<S: Simd, W: Format, const ROWS: usize, const NT: usize>(
    s: S,
    words: [S::U; NT],
    slot: usize,
    grid: [W::Grid<S>; NT],
    x: [f32; ROWS],
    partial: &mut [[S::F; NT]; ROWS],
) {
    let x = x.map(|x| s.splat(x));
    for t in 0..NT {
        let weights = W::weights(s, words[t], slot, grid[t]);
        for m in 0..ROWS {
            partial[m][t] = s.mul_add(x[m], weights, partial[m][t]);
        }
    }
}
