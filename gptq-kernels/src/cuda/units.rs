use std::ops::Range;

use gptq_format::{Bits, PackedLinear};
use half::f16;
use rayon::prelude::*;

use super::spread::{granule, places_in_runs};
use crate::{Epilogue, LinearSpec, Unsupported};

/// Output features of a unit.
pub(super) const STRIPE: usize = 32;
/// Input features of a unit.
pub(super) const DEPTH: usize = 128;
/// Bytes of codes in a unit.
const CODES: usize = STRIPE * DEPTH / 2;

/// A column of padding: it multiplies a zero instead of an element of `x`.
pub(super) const NONE: u16 = u16::MAX;
/// Most input features that [`Units`] can hold: columns are 16-bit numbers, one of them [`NONE`].
pub(super) const MOST_FEATURES: usize = NONE as usize;

/// A 4-bit weight repacked into units, as `cuda/unit.cuh` describes them.
#[derive(Debug)]
pub(super) struct Units {
    /// `(stripes, k_units)` units of [`unit_bytes`] bytes.
    pub(super) bytes: Vec<u8>,
    /// Scale groups in a unit: 1, 2 or 4.
    pub(super) groups: usize,
    /// Whether zeros are stored; otherwise all are 8.
    pub(super) asym: bool,
    /// Units along the input features.
    pub(super) k_units: usize,
    /// Output features, with the padding between gate and up.
    pub(super) rows: usize,
    /// Bias of the rows; empty if there is none.
    pub(super) bias: Vec<f16>,
    /// Column of `x` for every input feature of the units, [`NONE`] for padding; `None` if it is the identity.
    pub(super) gather: Option<Vec<u16>>,
}

/// What kernels that repack by group ask of a layer: groups that are not more padding than weight, at most `most_features`
/// inputs, and outputs that 32-bit positions reach.
pub(super) fn check_grouping(
    spec: &LinearSpec,
    group_size: usize,
    most_features: usize,
) -> Result<(), Unsupported> {
    let (in_features, out_features) = (spec.in_features, spec.out_features);
    if group_size < 32 && group_size < in_features {
        return Err(Unsupported::GroupSize { group_size });
    }
    if in_features > most_features || out_features >= 1 << 24 {
        return Err(Unsupported::Shape { in_features, out_features });
    }
    Ok(())
}

/// Bytes of a zero in a unit with that many groups (`cuda/unit.cuh`).
const fn zero_bytes(groups: usize) -> usize {
    if groups == 1 { 2 } else { 1 }
}

/// Bytes of a unit with that many groups.
pub(super) const fn unit_bytes(groups: usize, asym: bool) -> usize {
    CODES + groups * STRIPE * if asym { 2 + zero_bytes(groups) } else { 2 }
}

/// The order in which units hold the input features: sorted by group, every group padded to a multiple of `run`.
pub(super) struct Order {
    pub(super) run: usize,
    /// Input feature of every column; a multiple of [`DEPTH`] of them.
    pub(super) columns: Vec<u16>,
    /// Group of every `run` columns.
    pub(super) groups: Vec<u32>,
}

impl Order {
    fn new(g_idx: &[u32], run: usize) -> Self {
        let mut features: Vec<u16> = (0..g_idx.len() as u16).collect();
        features.sort_by_key(|&feature| g_idx[feature as usize]); // stable: in order inside a group
        let (mut columns, mut groups) = (Vec::with_capacity(features.len()), Vec::new());
        for members in features.chunk_by(|&a, &b| g_idx[a as usize] == g_idx[b as usize]) {
            columns.extend_from_slice(members);
            columns.resize(columns.len().next_multiple_of(run), NONE);
            groups.resize(columns.len() / run, g_idx[members[0] as usize]);
        }
        columns.resize(columns.len().next_multiple_of(DEPTH), NONE);
        groups.resize(columns.len() / run, 0);
        Self { run, columns, groups }
    }

    /// Of the runs that the kernels know, the one that makes the fewest bytes.
    pub(super) fn best(g_idx: &[u32], asym: bool) -> Self {
        let orders = [128, 64, 32].map(|run| Self::new(g_idx, run));
        let [first, rest @ ..] = orders;
        rest.into_iter()
            .fold(first, |best, next| if next.bytes(asym) < best.bytes(asym) { next } else { best })
    }

    /// The same with the columns of every run, where they are not in order, in the places that suit the kernel.
    fn spread(mut self, in_features: usize) -> Self {
        if self.is_identity(in_features) {
            return self;
        }
        let mut runs = vec![0; in_features];
        for (i, &column) in self.columns.iter().enumerate().filter(|&(_, &column)| column != NONE) {
            runs[column as usize] = i / self.run;
        }
        self.columns.fill(NONE);
        for (column, place) in places_in_runs(&runs, self.run).into_iter().enumerate() {
            self.columns[runs[column] * self.run + place] = column as u16;
        }
        self
    }

    /// Whether column `i` is feature `i`, and padding comes after the last feature alone.
    fn is_identity(&self, in_features: usize) -> bool {
        self.columns[..in_features].iter().zip(0..).all(|(&column, i)| column == i)
    }

    /// Bytes of one stripe.
    fn bytes(&self, asym: bool) -> usize {
        self.columns.len() / DEPTH * unit_bytes(DEPTH / self.run, asym)
    }

    /// `None` if column `i` is feature `i`, and padding comes after the last feature alone.
    pub(super) fn gather(&self, in_features: usize) -> Option<Vec<u16>> {
        (!self.is_identity(in_features)).then(|| self.columns.clone())
    }
}

/// Where units hold the output features: in order; or, for [`Epilogue::SiluMul`], 8 of gate and the same 8 of up in turn,
/// so that both factors of a product are found in one stripe.
struct RowOrder {
    outputs: usize,
    paired: bool,
}

impl RowOrder {
    fn new(outputs: usize, epilogue: Epilogue) -> Self {
        Self { outputs, paired: epilogue == Epilogue::SiluMul }
    }

    fn rows(&self) -> usize {
        if self.paired { 2 * (self.outputs / 2).next_multiple_of(8) } else { self.outputs }
    }

    /// Output feature of a row of the units; `None` for padding.
    fn feature(&self, row: usize) -> Option<usize> {
        if !self.paired {
            return Some(row).filter(|&row| row < self.outputs);
        }
        let (half, place) = (self.outputs / 2, row / 16 * 8 + row % 8);
        (place < half).then_some(if row % 16 < 8 { place } else { half + place })
    }

    /// Output features of 8 rows from a multiple of 8 on: they follow each other, and padding comes last.
    fn features(&self, row: usize) -> Range<usize> {
        let Some(first) = self.feature(row) else { return 0..0 };
        let end = if self.paired && first < self.outputs / 2 { self.outputs / 2 } else { self.outputs };
        first..(first + 8).min(end)
    }
}

impl Units {
    /// Repacks a 4-bit layer of at most [`MOST_FEATURES`] input features.
    pub(super) fn pack(weight: &PackedLinear, epilogue: Epilogue) -> Self {
        Self::in_order(weight, epilogue, Order::best(weight.g_idx(), !weight.is_symmetric()))
    }

    fn in_order(weight: &PackedLinear, epilogue: Epilogue, order: Order) -> Self {
        debug_assert!(weight.bits() == Bits::B4 && weight.in_features() <= MOST_FEATURES);
        let asym = !weight.is_symmetric();
        let (inputs, outputs) = (weight.in_features(), weight.out_features());
        let order = order.spread(inputs);
        let row_order = RowOrder::new(outputs, epilogue);
        let rows = row_order.rows();
        let k_units = order.columns.len() / DEPTH;
        let groups = DEPTH / order.run;
        let zeros = if asym { weight.unpack_zeros() } else { Vec::new() };
        let unit = unit_bytes(groups, asym);
        let mut bytes = vec![0; rows.div_ceil(STRIPE) * k_units * unit];
        bytes.par_chunks_mut(k_units * unit).enumerate().for_each(|(stripe, bytes)| {
            let feature = |row: usize| row_order.feature(stripe * STRIPE + row);
            let features: [_; STRIPE / 8] =
                std::array::from_fn(|i| row_order.features(stripe * STRIPE + 8 * i));
            for (u, unit) in bytes.chunks_mut(unit).enumerate() {
                let (words, rest) = unit.split_at_mut(CODES);
                let (scales, zero_points) = rest.split_at_mut(groups * STRIPE * 2);
                let tile = Tile::read(weight, &order.columns[u * DEPTH..][..DEPTH], &features);
                for (fragment, words) in words.chunks_mut(512).enumerate() {
                    for (slot, words) in words.chunks_mut(16).enumerate() {
                        words.copy_from_slice(&tile.lane(fragment, slot));
                    }
                }
                for (i, scale) in scales.chunks_mut(2).enumerate() {
                    let (group, row) = (order.groups[u * groups + i / STRIPE] as usize, lane_row(i % STRIPE));
                    if let Some(feature) = feature(row) {
                        scale.copy_from_slice(&weight.scales()[group * outputs + feature].to_le_bytes());
                        if asym {
                            zero_points[i * zero_bytes(groups)] = zeros[group * outputs + feature];
                        }
                    }
                }
            }
        });
        let bias = weight.bias().map_or_else(Vec::new, |bias| {
            (0..rows).map(|row| row_order.feature(row).map_or(f16::ZERO, |feature| bias[feature])).collect()
        });
        Self { bytes, groups, asym, k_units, rows, bias, gather: order.gather(inputs) }
    }
}

/// Columns of x that a block of `gemv_sm90.cu` stages at a time, `STEP` of `gemv_stage.cuh`.
const STEP: usize = 4096;

/// Where the columns of x go, in the order in which the kernel asks.
pub(super) struct Places {
    /// For the layout of rows: the place of each column.
    pub(super) rows: Vec<u16>,
    /// For the layout of columns: granules, of the columns that each lane of each warp gives the address of.
    pub(super) columns: Vec<u16>,
}

impl Places {
    /// Of a layer of `in_features` that gathers; `None` if places are not 16-bit numbers.
    pub(super) fn new(gather: &[u16], in_features: usize) -> Option<Self> {
        if gather.len() > NONE as usize {
            return None;
        }
        let len = in_features.next_multiple_of(STEP);
        let mut rows = vec![NONE; len];
        for (place, &column) in gather.iter().enumerate().filter(|&(_, &column)| column != NONE) {
            rows[column as usize] = place as u16;
        }
        let columns = (0..len)
            .map(|i| {
                let (warp, lane, block) = (i / 256, i / 8 % 32, i % 8);
                let (matrix, c) = (lane / 8, lane % 8);
                match rows[256 * warp + 32 * block + 8 * (c / 2) + 2 * matrix + c % 2] {
                    NONE => NONE,
                    place => granule(place as usize) as u16,
                }
            })
            .collect();
        Some(Self { rows, columns })
    }
}

/// Row of a stripe whose scale is at place `i`: four rows of a lane side by side.
fn lane_row(i: usize) -> usize {
    8 * (i % 4) + i / 4
}

/// The codes of a unit as words of 8 columns, for each of its rows.
struct Tile([[u32; STRIPE]; DEPTH / 8]);

impl Tile {
    /// Codes of the layer's columns `columns` and of four times up to 8 features.
    fn read(weight: &PackedLinear, columns: &[u16], features: &[Range<usize>; STRIPE / 8]) -> Self {
        let outputs = weight.out_features();
        let mut tile = [[0; STRIPE]; DEPTH / 8];
        for (words, columns) in tile.iter_mut().zip(columns.chunks(8)) {
            let first = columns[0] as usize;
            let as_stored =
                first.is_multiple_of(8) && columns.iter().zip(first..).all(|(&c, i)| c as usize == i);
            for (words, features) in words.chunks_mut(8).zip(features) {
                if as_stored {
                    let stored = &weight.qweight()[first / 8 * outputs..][features.clone()];
                    words[..stored.len()].copy_from_slice(stored);
                    continue;
                }
                for (place, &column) in columns.iter().enumerate().filter(|&(_, &column)| column != NONE) {
                    let (row, shift) = (column as usize / 8, column % 8 * 4);
                    let stored = &weight.qweight()[row * outputs..][features.clone()];
                    for (word, stored) in words.iter_mut().zip(stored) {
                        *word |= (stored >> shift & 15) << (4 * place);
                    }
                }
            }
        }
        Self(tile)
    }

    /// The four words of a lane in a fragment: what [`fragment_word`] gives for them, one code at a time.
    fn lane(&self, fragment: usize, slot: usize) -> [u8; 16] {
        let (half_rows, half_columns) = (fragment / 2, fragment % 2);
        // Slots of a fragment are permuted against conflicts of banks, as `cuda/unit.cuh` says.
        let lane = slot ^ (slot / 8);
        let (row, word) = (16 * half_rows + lane / 4, 8 * half_columns + lane % 4);
        let [a, b] = [row, row + 8].map(|row| self.0[word][row]);
        let [c, d] = [row, row + 8].map(|row| self.0[word + 4][row]);
        // Even columns of two rows side by side, and odd ones; byte `i` belongs to word `i` of the lane.
        let even = |a: u32, b: u32| (a & 0x0f0f_0f0f | (b & 0x0f0f_0f0f) << 4).to_le_bytes();
        let odd = |a: u32, b: u32| (a >> 4 & 0x0f0f_0f0f | b & 0xf0f0_f0f0).to_le_bytes();
        let parts = [even(a, b), even(c, d), odd(a, b), odd(c, d)];
        std::array::from_fn(|i| parts[i % 4][i / 4])
    }
}

/// Word `w` of the codes of a unit; `code(row, column)` gives those of the unit.
#[cfg(test)]
fn fragment_word(w: usize, code: impl Fn(usize, usize) -> u8) -> u32 {
    let (fragment, slot, i) = (w / 128, w / 4 % 32, w % 4);
    let (half_rows, half_columns) = (fragment / 2, fragment % 2);
    // Slots of a fragment are permuted against conflicts of banks, as `cuda/unit.cuh` says.
    let lane = slot ^ (slot / 8);
    let (r, t) = (lane / 4, lane % 4);
    let mut word = 0;
    for nibble in 0..4 {
        for odd in 0..2 {
            let row = 16 * half_rows + r + 8 * (nibble % 2);
            let column = 64 * half_columns + 32 * (nibble / 2) + 8 * t + 2 * i + odd;
            word |= u32::from(code(row, column)) << (4 * nibble + 16 * odd);
        }
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_format::CodesRef;

    #[test]
    fn every_code_of_a_unit_has_one_place() {
        let mut seen = vec![0; STRIPE * DEPTH];
        let place = std::cell::RefCell::new(&mut seen);
        for w in 0..CODES / 4 {
            fragment_word(w, |row, column| {
                place.borrow_mut()[row * DEPTH + column] += 1;
                0
            });
        }
        assert!(seen.iter().all(|&times| times == 1));
        let mut rows: Vec<_> = (0..STRIPE).map(lane_row).collect();
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..STRIPE));
    }

    #[test]
    fn gate_and_up_take_turns() {
        // 10 of gate, 10 of up: 16 places, then 16 of which 2 of each are used.
        let order = RowOrder::new(20, Epilogue::SiluMul);
        assert_eq!(order.rows(), 32);
        let features: Vec<_> = (0..33).map(|row| order.feature(row)).collect();
        let some = |range: std::ops::Range<usize>| range.map(Some).collect::<Vec<_>>();
        assert_eq!(features[..16], [some(0..8), some(10..18)].concat());
        assert_eq!(features[16..18], some(8..10));
        assert_eq!(features[24..26], some(18..20));
        assert_eq!(features.iter().flatten().count(), 20);
        let in_order = RowOrder::new(3, Epilogue::Add);
        assert_eq!((in_order.rows(), in_order.feature(2), in_order.feature(3)), (3, Some(2), None));
    }

    #[test]
    fn groups_are_padded_to_the_cheapest_run() {
        let in_order: Vec<u32> = (0..256).map(|i| i / 128).collect();
        let order = Order::best(&in_order, false);
        assert_eq!((order.run, order.columns.len(), order.gather(256)), (128, 256, None));

        let one_group_and_a_tail = vec![0; 200];
        let order = Order::best(&one_group_and_a_tail, false);
        assert_eq!((order.run, order.columns.len(), order.gather(200)), (128, 256, None));

        let act_order: Vec<u32> = (0..256).map(|i| i % 8).collect();
        let order = Order::best(&act_order, true);
        assert_eq!((order.run, order.columns.len()), (32, 256));
        assert_eq!(order.groups, (0..8).collect::<Vec<_>>());
        assert_eq!(order.columns[..3], [0, 8, 16]);
        assert!(order.gather(256).is_some());
    }

    #[test]
    fn lanes_are_words_code_by_code() {
        for (inputs, outputs, epilogue) in
            [(256usize, 64, Epilogue::Store), (200, 40, Epilogue::Add), (133, 52, Epilogue::SiluMul)]
        {
            for act_order in [false, true] {
                let groups = inputs.div_ceil(32);
                let codes: Vec<u8> = (0..inputs * outputs).map(|i| (i * i % 251 % 16) as u8).collect();
                let group = |i: usize| if act_order { i % groups } else { i / 32 } as u32;
                let packed = PackedLinear::pack(&CodesRef {
                    bits: Bits::B4,
                    group_size: 32,
                    in_features: inputs,
                    out_features: outputs,
                    codes: &codes,
                    zeros: &vec![8; groups * outputs],
                    scales: &vec![1.0; groups * outputs],
                    g_idx: &(0..inputs).map(group).collect::<Vec<_>>(),
                    bias: None,
                })
                .unwrap();
                let order = Order::best(packed.g_idx(), false);
                let rows = RowOrder::new(outputs, epilogue);
                for stripe in 0..rows.rows().div_ceil(STRIPE) {
                    let features = std::array::from_fn(|i| rows.features(stripe * STRIPE + 8 * i));
                    for columns in order.columns.chunks(DEPTH) {
                        let tile = Tile::read(&packed, columns, &features);
                        let code = |row: usize, column: usize| match (
                            rows.feature(stripe * STRIPE + row),
                            columns[column],
                        ) {
                            (Some(feature), column) if column != NONE => {
                                codes[feature * inputs + column as usize]
                            }
                            _ => 0,
                        };
                        for w in 0..CODES / 4 {
                            let lane = tile.lane(w / 128, w / 4 % 32);
                            assert_eq!(lane[w % 4 * 4..][..4], fragment_word(w, code).to_le_bytes());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn places_are_where_columns_are_gathered() {
        let g_idx: Vec<u32> = (0..300).map(|i| i * 7 % 3).collect();
        let order = Order::best(&g_idx, false).spread(300);
        let gather = order.gather(300).unwrap();
        for (i, &column) in gather.iter().enumerate().filter(|&(_, &column)| column != NONE) {
            assert_eq!(g_idx[column as usize], order.groups[i / order.run]);
        }
        let places = Places::new(&gather, 300).unwrap();
        assert!((0..300).all(|column| gather[places.rows[column] as usize] as usize == column));
        assert!(places.rows[300..].iter().all(|&place| place == NONE));
        // Lane 9 of the first warp gives the second column of the second matrix, of every block of 32.
        assert_eq!(places.columns[9 * 8] as usize, granule(places.rows[3] as usize));
        assert_eq!(places.columns[9 * 8 + 2] as usize, granule(places.rows[64 + 3] as usize));
        let mut all: Vec<_> = places.columns.iter().filter(|&&place| place != NONE).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 300);
    }

    #[test]
    fn units_hold_the_layer() {
        let (inputs, outputs, group_size) = (130, 33, 32);
        let groups = 130usize.div_ceil(32);
        let codes: Vec<u8> = (0..inputs * outputs).map(|i| (i * 7 % 16) as u8).collect();
        let zeros: Vec<u8> = (0..groups * outputs).map(|i| (i * 5 % 16) as u8).collect();
        let scales: Vec<f32> = (0..groups * outputs).map(|i| 1.0 + i as f32 / 256.0).collect();
        let g_idx: Vec<u32> = (0..inputs as u32).map(|i| i / 32).collect();
        let packed = PackedLinear::pack(&CodesRef {
            bits: Bits::B4,
            group_size,
            in_features: inputs,
            out_features: outputs,
            codes: &codes,
            zeros: &zeros,
            scales: &scales,
            g_idx: &g_idx,
            bias: None,
        })
        .unwrap();
        let units = Units::pack(&packed, Epilogue::Store);
        assert_eq!((units.groups, units.asym, units.k_units, &units.gather), (4, true, 2, &None));
        let unit = unit_bytes(4, true);
        assert_eq!(units.bytes.len(), 2 * 2 * unit);

        // Feature 32, input feature 129: second stripe, second unit, row 0, column 1. Slot 0, word 0, lowest nibble of the
        // upper half.
        let last = &units.bytes[3 * unit..];
        assert_eq!(last[2] & 15, codes[32 * inputs + 129]);
        // Its group is the first of the unit; its scale and zero are the first of the group.
        assert_eq!(last[CODES..CODES + 2], packed.scales()[4 * outputs + 32].to_le_bytes());
        assert_eq!(last[CODES + 4 * STRIPE * 2], zeros[32 * groups + 4]);
    }

    #[test]
    fn zeros_of_a_unit_with_one_group_are_words_of_two_bytes() {
        let (inputs, outputs) = (128, 32);
        let zeros: Vec<u8> = (0..outputs).map(|i| (i % 16) as u8).collect();
        let packed = PackedLinear::pack(&CodesRef {
            bits: Bits::B4,
            group_size: inputs,
            in_features: inputs,
            out_features: outputs,
            codes: &vec![0; inputs * outputs],
            zeros: &zeros,
            scales: &vec![1.0; outputs],
            g_idx: &vec![0; inputs],
            bias: None,
        })
        .unwrap();
        let units = Units::pack(&packed, Epilogue::Store);
        let got =
            units.bytes[CODES + STRIPE * 2..].chunks(2).map(|zero| u16::from_le_bytes([zero[0], zero[1]]));
        let expected = (0..STRIPE).map(|i| u16::from(zeros[lane_row(i)]));
        assert!(got.eq(expected), "{:?}", &units.bytes[CODES + STRIPE * 2..]);
        assert_eq!(units.bytes.len() % 64, 0);
    }
}
