//! In which order a group of an act-ordered layer holds its input features.
//!
//! Inside a group the order is free. `cuda/gemv_stage.cuh` moves x into the order of the units by stores to shared memory, in
//! two ways, each of which wants what a warp stores at a time in different banks:
//!
//! - one row: a lane has the elements `8 l .. 8 l + 8` of 256 and stores element `j` of all lanes at a time, two bytes at twice the
//!   place. Its bank is the place without its lowest bit, modulo 32.
//! - several rows: of 32 elements, the eight `8 q + 2 j` and `8 q + 2 j + 1` are stored at a time, 16 bytes at the place's
//!   [`granule`]. Its eighth of the banks is the granule modulo 8.
//!
//! A place in a unit is `32 h + 8 t + 2 w + e`, its granule `32 h + 8 w + 2 t + e`. So a warp of the first way wants all
//! `(h % 2, t, w)`, eight columns of the second all `(t, e)`. Each bit of these is found by a split of all columns in halves
//! that is even in every set of columns that are stored together and in every run of the layer: a bipartite graph whose
//! edges are columns always has one, since columns that must differ, two and two in a set and two and two in a run, form
//! paths and even cycles.

use std::collections::HashMap;

/// Where the layout of columns has a place: a matrix of `ldmatrix` is eight granules in a row.
pub(super) fn granule(place: usize) -> usize {
    let (h, t, w, e) = (place / 32, place / 8 % 4, place / 2 % 4, place % 2);
    32 * h + 8 * w + 2 * t + e
}

/// A bit for every edge, with at most one more of one kind at each vertex; edges are pairs of a left and a right vertex.
fn halve(edges: &[(usize, usize)]) -> Vec<bool> {
    let partners = |vertex: fn(&(usize, usize)) -> usize| {
        let (mut partners, mut single) = (vec![None; edges.len()], HashMap::new());
        for (i, edge) in edges.iter().enumerate() {
            match single.remove(&vertex(edge)) {
                Some(other) => (partners[i], partners[other]) = (Some(other), Some(i)),
                None => {
                    single.insert(vertex(edge), i);
                }
            }
        }
        partners
    };
    let (left, right) = (partners(|edge| edge.0), partners(|edge| edge.1));
    let mut bits: Vec<Option<bool>> = vec![None; edges.len()];
    for start in 0..edges.len() {
        if bits[start].is_some() {
            continue;
        }
        bits[start] = Some(false);
        for mut next in [&left, &right] {
            let (mut edge, mut bit) = (start, false);
            while let Some(partner) = next[edge] {
                if bits[partner].is_some() {
                    break;
                }
                (edge, bit) = (partner, !bit);
                bits[edge] = Some(bit);
                next = if std::ptr::eq(next, &left) { &right } else { &left };
            }
        }
    }
    bits.into_iter().map(|bit| bit == Some(true)).collect()
}

/// The place of every column inside its run of `run` places, 32, 64 or 128; `runs[i]` is the run of column `i`, of which each
/// has at most as many columns.
pub(super) fn places_in_runs(runs: &[usize], run: usize) -> Vec<usize> {
    #[derive(Clone, Copy, Default)]
    struct Place {
        t: usize,
        e: usize,
        // The lower bit of h, then w.
        hw: usize,
        upper: usize,
    }
    let mut places = vec![Place::default(); runs.len()];
    let split = |places: &[Place], left: fn(usize, &Place) -> usize, right: fn(&Place) -> usize| {
        let edge = |(i, place)| (left(i, place), (runs[i] << 10) + right(place));
        halve(&places.iter().enumerate().map(edge).collect::<Vec<_>>())
    };
    // Columns that are stored at a time, 4 (of two times 4), 8 and 32.
    fn half(column: usize) -> usize {
        column / 32 * 8 + column % 8
    }
    fn eighth(column: usize) -> usize {
        column / 32 * 4 + column % 8 / 2
    }
    fn warp(column: usize) -> usize {
        column / 256 * 8 + column % 8
    }
    for _ in 0..2 {
        let bits = split(&places, |i, p| half(i) << 2 | p.t, |p| p.t);
        places.iter_mut().zip(bits).for_each(|(place, bit)| place.t = place.t << 1 | usize::from(bit));
    }
    let bits = split(&places, |i, p| eighth(i) << 2 | p.t, |p| p.t);
    places.iter_mut().zip(bits).for_each(|(place, bit)| place.e = usize::from(bit));
    // A run of 32 has one h, which the unit decides.
    for _ in 0..if run > 32 { 3 } else { 2 } {
        let bits = split(&places, |i, p| (warp(i) << 2 | p.t) << 3 | p.hw, |p| (p.t << 1 | p.e) << 3 | p.hw);
        places.iter_mut().zip(bits).for_each(|(place, bit)| place.hw = place.hw << 1 | usize::from(bit));
    }
    if run > 64 {
        let bits = split(&places, |i, _| i, |p| (p.t << 1 | p.e) << 3 | p.hw);
        places.iter_mut().zip(bits).for_each(|(place, bit)| place.upper = usize::from(bit));
    }
    places.iter().map(|p| 64 * p.upper + 32 * (p.hw >> 2) + 8 * p.t + 2 * (p.hw & 3) + p.e).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Columns of a layer in runs of `run` that are not regular, the last one not full.
    fn runs(columns: usize, run: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..columns).collect();
        let mut state = 1u64;
        for i in (1..columns).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            order.swap(i, (state >> 33) as usize % (i + 1));
        }
        let mut runs = vec![0; columns];
        order.into_iter().enumerate().for_each(|(i, column)| runs[column] = i / run);
        runs
    }

    #[test]
    fn places_are_different_and_inside_their_run() {
        for run in [32, 64, 128] {
            for columns in [1, 100, 256, 1000, 4096] {
                let runs = runs(columns, run);
                let places = places_in_runs(&runs, run);
                let mut all: Vec<_> = runs.iter().zip(&places).map(|(r, p)| (*r, *p)).collect();
                all.sort_unstable();
                all.dedup();
                assert_eq!(all.len(), columns);
                assert!(places.iter().all(|&place| place < run));
            }
        }
    }

    #[test]
    fn what_is_stored_at_a_time_is_in_different_banks() {
        for run in [64, 128] {
            let columns = 4096;
            let places = places_in_runs(&runs(columns, run), run);
            for start in (0..columns).step_by(256) {
                for j in 0..8 {
                    let mut banks: Vec<_> =
                        (0..32).map(|lane| places[start + 8 * lane + j] % 64 / 2).collect();
                    banks.sort_unstable();
                    banks.dedup();
                    assert_eq!(banks.len(), 32, "run {run}, columns from {start}, element {j}");
                }
            }
            for start in (0..columns).step_by(32) {
                for j in 0..4 {
                    let column = |i: usize| start + 8 * (i / 2) + 2 * j + i % 2;
                    let mut eighths: Vec<_> = (0..8).map(|i| granule(places[column(i)]) % 8).collect();
                    eighths.sort_unstable();
                    eighths.dedup();
                    assert_eq!(eighths.len(), 8, "run {run}, columns from {start}, matrix {j}");
                }
            }
        }
    }

    #[test]
    fn granules_are_a_permutation() {
        let mut granules: Vec<_> = (0..256).map(granule).collect();
        granules.sort_unstable();
        assert!(granules.into_iter().eq(0..256));
    }
}
