use super::{
    direct::{header, scales, zeros},
    format::Format,
    layout::{Line, TILE, TILES},
    simd::Simd,
};

/// Decoded weights of one input feature for the outputs of a block.
pub(super) type PanelRow = [[f32; TILE]; TILES];

/// A segment to decode.
pub(super) struct UnpackArgs<'a> {
    /// Header and words.
    pub(super) lines: &'a [Line],
    /// One row for each feature of the segment.
    pub(super) panel: &'a mut [PanelRow],
    /// Scales of the block.
    pub(super) scales: &'a mut PanelRow,
}

/// Decodes a segment, for use by many rows.
#[inline(always)]
pub(super) fn unpack<S: Simd, W: Format>(s: S, args: UnpackArgs<'_>) {
    let UnpackArgs { lines, panel, scales: out } = args;
    let (head, words) = lines.split_at(header::<W>());
    let (words, _) = words.as_chunks::<TILES>();
    let grid: [W::Grid<S>; TILES] = std::array::from_fn(|t| W::grid(s, zeros::<S, W>(s, head, t)));
    for (t, out) in out.iter_mut().enumerate() {
        s.store(scales::<S, W>(s, head, t), out);
    }
    // Whole words first: their count of features is a constant, so that the loop over them can be unrolled.
    let mut whole = panel.chunks_exact_mut(W::PER_WORD);
    for (features, row) in whole.by_ref().zip(words) {
        let w: [S::U; TILES] = std::array::from_fn(|t| s.load_words(&row[t]));
        for (slot, feature) in features.iter_mut().enumerate().take(W::PER_WORD) {
            for t in 0..TILES {
                s.store(W::weights(s, w[t], slot, grid[t]), &mut feature[t]);
            }
        }
    }
    let ragged = whole.into_remainder();
    if let Some(row) = words.last() {
        for (slot, feature) in ragged.iter_mut().enumerate() {
            for (t, out) in feature.iter_mut().enumerate() {
                s.store(W::weights(s, s.load_words(&row[t]), slot, grid[t]), out);
            }
        }
    }
}

/// A decoded segment for a few rows.
pub(super) struct PanelArgs<'a, const ROWS: usize> {
    /// Decoded weights, one row a feature.
    pub(super) panel: &'a [PanelRow],
    pub(super) scales: &'a PanelRow,
    /// The activations of these features.
    pub(super) x: [&'a [f32]; ROWS],
    /// Sums so far, added to.
    pub(super) sums: &'a mut [PanelRow; ROWS],
}

/// Multiplies a decoded segment, `ROWS x NT` registers of sums at a time. For every output this makes the same operations
/// in the same order as [`direct::run`](super::direct::run).
#[inline(always)]
pub(super) fn run<S: Simd, const ROWS: usize, const NT: usize>(s: S, args: PanelArgs<'_, ROWS>) {
    let PanelArgs { panel, scales, x, sums } = args;
    let x = x.map(|row| &row[..panel.len()]);
    for first in (0..TILES).step_by(NT) {
        let mut partial = [[s.splat(0.0); NT]; ROWS];
        for (k, row) in panel.iter().enumerate() {
            let weights: [S::F; NT] = std::array::from_fn(|t| s.load(&row[first + t]));
            for m in 0..ROWS {
                let x = s.splat(x[m][k]);
                for t in 0..NT {
                    partial[m][t] = s.mul_add(x, weights[t], partial[m][t]);
                }
            }
        }
        for t in 0..NT {
            let scale = s.load(&scales[first + t]);
            for m in 0..ROWS {
                let sum = s.load(&sums[m][first + t]);
                s.store(s.mul_add(scale, partial[m][t], sum), &mut sums[m][first + t]);
            }
        }
    }
}
