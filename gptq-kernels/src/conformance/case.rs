use std::fmt;

use gptq_format::{Bits, CodesRef, PackedLinear};
use half::{bf16, f16};

use crate::{
    DenseData, DenseType, DenseWeight, Epilogue, Fusion, KernelError, LinearSpec, Prologue, RmsNorm,
    reference::Reference,
};

/// Of the norms of all cases.
pub(super) const EPS: f32 = 1e-5;

/// One layer of the battery, and how many rows it is run with.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
    /// What the weight is.
    pub weight: CaseWeight,
    /// Whether there is a bias.
    pub bias: bool,
    /// Rows of the largest call; smaller calls are made of parts of it.
    pub rows: usize,
    /// What becomes of the input.
    pub prologue: Prologue,
    /// What becomes of the product.
    pub epilogue: Epilogue,
}

/// The weight of a [`Case`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CaseWeight {
    /// GPTQ codes.
    Packed {
        /// Width of a code.
        bits: Bits,
        /// Group size, `None` for one group.
        group_size: Option<usize>,
        /// Whether every zero point is `2^(bits-1)`; otherwise they are random over all codes.
        sym: bool,
        /// Group of each feature.
        groups: Groups,
    },
    /// Floats.
    Dense(DenseType),
}

/// How features belong to groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Groups {
    /// `g_idx[i] = i / group_size`
    InOrder,
    /// Groups of `group_size` features anywhere, as `desc_act` makes them.
    ActOrder,
    /// Groups of any size, empty ones among them.
    Arbitrary,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.in_features, self.out_features)?;
        match self.weight {
            CaseWeight::Dense(dtype) => write!(f, " dense {dtype:?}")?,
            CaseWeight::Packed { bits, group_size, sym, groups } => {
                write!(f, " {}-bit {} ", bits.get(), if sym { "sym" } else { "asym" })?;
                match group_size {
                    Some(group_size) => write!(f, "g{group_size}")?,
                    None => write!(f, "one group")?,
                }
                match groups {
                    Groups::InOrder => {}
                    Groups::ActOrder => write!(f, " act-order")?,
                    Groups::Arbitrary => write!(f, " arbitrary g_idx")?,
                }
            }
        }
        write!(f, "{}", if self.bias { " bias" } else { "" })?;
        if self.prologue != Prologue::Load {
            write!(f, " {:?}", self.prologue)?;
        }
        match self.epilogue {
            Epilogue::Store => Ok(()),
            epilogue => write!(f, " {epilogue:?}"),
        }
    }
}

impl Case {
    /// Columns of `y`.
    pub fn y_features(&self) -> usize {
        match self.epilogue {
            Epilogue::Store | Epilogue::Add => self.out_features,
            Epilogue::SiluMul => self.out_features / 2,
        }
    }

    /// The battery: every width (5, 6 and 7 bits in few cases), zero-point convention, order and group size, on regular
    /// and odd shapes, with and without bias; larger layers; many rows; prologues and epilogues; and dense weights.
    pub fn all() -> Vec<Case> {
        let case = |in_features, out_features, weight, bias| Case {
            in_features,
            out_features,
            weight,
            bias,
            rows: 1,
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        };
        let mut cases = Vec::new();
        // Regular; in_features not a multiple of any group size, out_features of 8, 16, 32 or 64; and neither even.
        let shapes = [(256, 64, false), (200, 70, true), (203, 33, false)];
        let (common, rare): (Vec<_>, Vec<_>) = Bits::ALL.into_iter().partition(|bits| !bits.is_planar_only());
        for bits in common {
            for sym in [true, false] {
                for groups in [Groups::InOrder, Groups::ActOrder] {
                    for group_size in [Some(16), Some(32), Some(64), Some(128), None] {
                        let weight = CaseWeight::Packed { bits, group_size, sym, groups };
                        for (in_features, out_features, bias) in shapes {
                            cases.push(Case { rows: 33, ..case(in_features, out_features, weight, bias) });
                        }
                    }
                }
            }
            for sym in [true, false] {
                let weight = |group_size, groups| CaseWeight::Packed { bits, group_size, sym, groups };
                let fused = |epilogue, case| Case { epilogue, ..case };
                let normed = |case| Case { prologue: Prologue::RmsNorm, ..case };
                let case = |inputs, outputs, weight, bias, rows| Case {
                    rows,
                    ..case(inputs, outputs, weight, bias)
                };
                cases.extend([
                    fused(Epilogue::Add, case(256, 72, weight(Some(128), Groups::InOrder), true, 33)),
                    fused(Epilogue::Add, case(1100, 33, weight(Some(32), Groups::ActOrder), false, 9)),
                    fused(Epilogue::SiluMul, case(256, 128, weight(Some(128), Groups::InOrder), false, 33)),
                    fused(Epilogue::SiluMul, case(203, 70, weight(Some(32), Groups::ActOrder), true, 17)),
                    fused(Epilogue::SiluMul, case(1100, 74, weight(None, Groups::InOrder), false, 67)),
                    normed(case(256, 72, weight(Some(128), Groups::InOrder), true, 33)),
                    normed(case(4360, 33, weight(Some(128), Groups::InOrder), false, 9)),
                    normed(case(203, 33, weight(Some(64), Groups::InOrder), false, 17)),
                    normed(case(1104, 40, weight(Some(128), Groups::ActOrder), false, 9)),
                    normed(fused(
                        Epilogue::Add,
                        case(1100, 33, weight(Some(32), Groups::ActOrder), true, 17),
                    )),
                    normed(fused(Epilogue::SiluMul, case(256, 70, weight(None, Groups::InOrder), false, 33))),
                    case(8, 8, weight(Some(16), Groups::InOrder), true, 5),
                    case(1, 1, weight(None, Groups::InOrder), true, 3),
                    case(300, 40, weight(Some(32), Groups::Arbitrary), false, 17),
                    case(1100, 136, weight(Some(128), Groups::InOrder), true, 9),
                    case(1100, 48, weight(None, Groups::InOrder), false, 9),
                    case(256, 72, weight(Some(128), Groups::ActOrder), true, 131),
                ]);
            }
        }
        // Widths that only GPTQModel's planar files have: a kernel that takes them has repacked them to another width.
        for bits in rare {
            for (sym, groups) in [(true, Groups::InOrder), (false, Groups::ActOrder)] {
                let weight = CaseWeight::Packed { bits, group_size: Some(32), sym, groups };
                cases.push(Case { rows: 33, ..case(203, 70, weight, !sym) });
            }
        }
        for dtype in [DenseType::F32, DenseType::F16, DenseType::Bf16] {
            let weight = CaseWeight::Dense(dtype);
            for (in_features, out_features, bias, rows) in
                [(256, 64, true, 33), (203, 33, false, 33), (1, 1, true, 2), (300, 136, false, 131)]
            {
                cases.push(Case { rows, ..case(in_features, out_features, weight, bias) });
            }
        }
        cases
    }
}

/// The data of a case.
pub(super) struct Data {
    pub(super) weight: Weight,
    pub(super) spec: LinearSpec,
    pub(super) reference: Reference,
    /// `(rows, in_features)`
    pub(super) x: Vec<f32>,
    /// What [`Epilogue::Add`] adds to, `(rows, out_features)`; exact in half precision.
    pub(super) residual: Vec<f32>,
    /// Weight of [`Prologue::RmsNorm`], `(in_features)`; empty if there is none.
    pub(super) norm: Vec<f32>,
}

pub(super) enum Weight {
    Packed(Box<PackedLinear>),
    Dense { in_features: usize, out_features: usize, data: Floats, bias: Option<Vec<f32>> },
}

pub(super) enum Floats {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Weight {
    /// The dense weight, if it is one.
    pub(super) fn as_dense(&self) -> Option<DenseWeight<'_>> {
        let Weight::Dense { in_features, out_features, data, bias } = self else { return None };
        let data = match data {
            Floats::F32(data) => DenseData::F32(data),
            Floats::F16(data) => DenseData::F16(data),
            Floats::Bf16(data) => DenseData::Bf16(data),
        };
        let (in_features, out_features) = (*in_features, *out_features);
        Some(DenseWeight { in_features, out_features, data, bias: bias.as_deref() })
    }
}

impl Data {
    /// Makes the data of a case, the same in every run.
    pub(super) fn new(case: &Case) -> Result<Self, KernelError> {
        let mut random = Random(0x5eed);
        let &Case { in_features, out_features, weight, bias, rows, prologue, epilogue } = case;
        let bias = bias.then(|| (0..out_features).map(|_| random.symmetric()).collect::<Vec<_>>());
        let (weight, spec, reference) = match weight {
            CaseWeight::Packed { bits, group_size, sym, groups } => {
                let group_size = group_size.unwrap_or(in_features);
                let packed = packed(&mut random, case, bits, group_size, sym, groups, bias.as_deref());
                let reference = Reference::new(&packed);
                let spec = LinearSpec { prologue, epilogue, ..LinearSpec::of(&packed) };
                (Weight::Packed(Box::new(packed)), spec, reference)
            }
            CaseWeight::Dense(dtype) => {
                let values = (0..in_features * out_features).map(|_| random.symmetric());
                let data = match dtype {
                    DenseType::F32 => Floats::F32(values.collect()),
                    // Subnormal halves too: a tenth of the weights is shrunk by 2^-16.
                    DenseType::F16 => Floats::F16(
                        values
                            .enumerate()
                            .map(|(i, w)| f16::from_f32(if i % 10 == 3 { w / 65536.0 } else { w }))
                            .collect(),
                    ),
                    DenseType::Bf16 => Floats::Bf16(values.map(bf16::from_f32).collect()),
                };
                let weight = Weight::Dense { in_features, out_features, data, bias };
                let dense = weight.as_dense().expect("invariant: just made dense");
                let (spec, reference) = (LinearSpec::of_dense(&dense), Reference::dense(&dense)?);
                (weight, spec, reference)
            }
        };
        // Rows of different magnitude, and one of zeros: a kernel that mixes rows shows.
        let x = (0..rows)
            .flat_map(|row| {
                let size = if row == 1 { 0.0 } else { f32::powi(2.0, row as i32 % 6 - 3) };
                (0..in_features).map(move |_| size)
            })
            .map(|size| size * random.symmetric())
            .collect();
        let residual =
            (0..rows * out_features).map(|_| bf16::from_f32(random.symmetric()).to_f32()).collect();
        let norm = match prologue {
            Prologue::Load => Vec::new(),
            Prologue::RmsNorm => (0..in_features).map(|_| 1.0 + 0.5 * random.symmetric()).collect(),
        };
        Ok(Self { weight, spec, reference, x, residual, norm })
    }

    /// What the layer of `case` does besides multiplying.
    pub(super) fn fusion(&self, case: &Case) -> Fusion<'_> {
        let norm = RmsNorm { weight: &self.norm, eps: EPS };
        Fusion { norm: (case.prologue == Prologue::RmsNorm).then_some(norm), epilogue: case.epilogue }
    }
}

fn packed(
    random: &mut Random,
    case: &Case,
    bits: Bits,
    group_size: usize,
    sym: bool,
    groups: Groups,
    bias: Option<&[f32]>,
) -> PackedLinear {
    let (inputs, outputs) = (case.in_features, case.out_features);
    let count = inputs.div_ceil(group_size);
    let max = u32::from(bits.max_code());
    let codes: Vec<u8> = (0..inputs * outputs).map(|_| random.below(max + 1) as u8).collect();
    let zeros: Vec<u8> = (0..outputs * count)
        .map(|_| if sym { 1 << (bits.get() - 1) } else { random.below(max + 1) as u8 })
        .collect();
    // Products of two results are within half precision too if codes of 8 bits count no more than those of 4.
    let products = f32::powi(2.0, 4 - bits.get().max(4) as i32);
    // Between 2^-9 and 2^-5, now and then a subnormal half; so that results stay within half precision on a GPU.
    let scales: Vec<f32> = (0..outputs * count)
        .map(|i| {
            let scale =
                f32::powi(2.0, -(5 + random.below(4) as i32)) * (0.5 + 0.5 * random.symmetric().abs());
            let scale = if case.epilogue == Epilogue::SiluMul { scale * products } else { scale };
            if i % 13 == 5 { scale / 2048.0 } else { scale }
        })
        .collect();
    let mut g_idx: Vec<u32> = (0..inputs).map(|i| (i / group_size) as u32).collect();
    match groups {
        Groups::InOrder => {}
        Groups::ActOrder => {
            for i in (1..inputs).rev() {
                g_idx.swap(i, random.below(i as u32 + 1) as usize);
            }
        }
        Groups::Arbitrary => g_idx.fill_with(|| random.below(count as u32 / 2 + 1) * 2 % count as u32),
    }
    let codes = CodesRef {
        bits,
        group_size,
        in_features: inputs,
        out_features: outputs,
        codes: &codes,
        zeros: &zeros,
        scales: &scales,
        g_idx: &g_idx,
        bias,
    };
    PackedLinear::pack(&codes)
        .expect("invariant: codes and zeros are below 2^bits, g_idx below the group count")
}

/// A linear congruential generator: numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn below(&mut self, end: u32) -> u32 {
        ((u64::from(self.next()) * u64::from(end)) >> 32) as u32
    }

    /// Between -1 and 1.
    fn symmetric(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 31) as f32 - 1.0
    }
}
