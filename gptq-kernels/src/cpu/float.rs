use gptq_format::PackedLinear;

use super::{
    Cpu,
    columns::{Columns, Rows, for_each_range},
    direct::DirectArgs,
    format::{Bf16, Bytes, F16, F32, Format, Narrow},
    layout::{BLOCK, Encoding, Packed, SEGMENT, TILE, TILES, Width},
    panel::{PanelArgs, PanelRow, UnpackArgs},
    simd::Simd,
};
use crate::{
    DenseData, DenseType, DenseWeight, ErrorBound, KernelError, Linear, LinearKernel, LinearSpec, MatMut,
    MatRef, Unsupported, WeightFormat, Workspace,
};

/// Up to here each weight is decoded in registers, per four rows; beyond, a segment at a time into a panel.
const DIRECT_ROWS: usize = 4;
/// Rows that share one decoding of the weights into a panel. Their sums, 24 KiB, stay on the stack.
const PANEL_ROWS: usize = 96;

/// Float32 arithmetic on the instruction set `S`.
///
/// For one output, over the segments of its input features (at most 128 features of one group, in sorted order):
///
/// ```text
/// y = bias;  for each segment { p = 0;  for i { p = x_i * (code_i - zero) + p };  y = scale * p + y }
/// ```
///
/// with fused operations where the instruction set has them, and scale 1 for dense weights. `code - zero` is exact, so
/// the only errors are those of the sums: a product passes through at most 128 operations of its segment and one for
/// each segment, every one rounding once (twice where not fused).
#[derive(Clone, Copy, Debug)]
pub(super) struct FloatKernel<S>(pub(super) S);

impl<S: Simd> LinearKernel<Cpu> for FloatKernel<S> {
    fn name(&self) -> &'static str {
        S::NAME
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        spec.only_multiplies()
    }

    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        let bias = weight.bias().map(|bias| bias.iter().map(|b| b.to_f32()).collect());
        Ok(Box::new(FloatLinear {
            s: self.0,
            spec: LinearSpec::of(weight),
            packed: Packed::new(weight)?,
            bias,
        }))
    }

    fn prepare_dense(&self, weight: &DenseWeight<'_>) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        weight.validate()?;
        let (spec, bias) = (LinearSpec::of_dense(weight), weight.bias.map(<[f32]>::to_vec));
        Ok(Box::new(FloatLinear { s: self.0, spec, packed: Packed::dense(weight)?, bias }))
    }

    fn prepare_resident(
        &self,
        weight: MatRef<'_, Cpu>,
        bias: Option<&[f32]>,
    ) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        let (out_features, in_features, stride) = (weight.rows(), weight.cols(), weight.row_stride());
        let gathered: Vec<f32>;
        let data = if stride == in_features {
            &weight.data()[..out_features * in_features]
        } else {
            gathered = weight.data().chunks(stride).flat_map(|row| &row[..in_features]).copied().collect();
            &gathered
        };
        self.prepare_dense(&DenseWeight { in_features, out_features, data: DenseData::F32(data), bias })
    }

    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        ErrorBound::float32(S::ROUNDINGS * (SEGMENT.min(spec.in_features) + most_segments(spec)))
    }
}

/// An upper bound of the number of segments, whatever `g_idx` is: every group adds at most one that is not full.
pub(super) fn most_segments(spec: &LinearSpec) -> usize {
    let groups = match spec.weight {
        WeightFormat::Dense(_) => 1,
        WeightFormat::Gptq { group_size, .. } => spec.in_features.div_ceil(group_size),
    };
    spec.in_features / SEGMENT + groups
}

struct FloatLinear<S> {
    s: S,
    spec: LinearSpec,
    packed: Packed,
    bias: Option<Vec<f32>>,
}

impl<S: Simd> Linear<Cpu> for FloatLinear<S> {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        S::NAME
    }

    fn weight_bytes(&self) -> usize {
        self.packed.bytes()
    }

    fn workspace_len(&self, rows: usize) -> usize {
        if self.packed.order.is_some() { rows * self.spec.in_features } else { 0 }
    }

    fn forward(
        &self,
        x: MatRef<'_, Cpu>,
        y: MatMut<'_, Cpu>,
        workspace: &mut Workspace<Cpu>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
        let scratch = workspace.take(self.workspace_len(x.rows()))?;
        let x = match &self.packed.order {
            None => Rows::new(x),
            Some(order) => Rows::new(x).gather(order, scratch),
        };
        match self.packed.encoding {
            Encoding::Codes { width: Width::Two, zeros: false } => self.multiply::<Narrow<2, false>>(x, y),
            Encoding::Codes { width: Width::Two, zeros: true } => self.multiply::<Narrow<2, true>>(x, y),
            Encoding::Codes { width: Width::Three, zeros: false } => self.multiply::<Narrow<3, false>>(x, y),
            Encoding::Codes { width: Width::Three, zeros: true } => self.multiply::<Narrow<3, true>>(x, y),
            Encoding::Codes { width: Width::Four, zeros: false } => self.multiply::<Narrow<4, false>>(x, y),
            Encoding::Codes { width: Width::Four, zeros: true } => self.multiply::<Narrow<4, true>>(x, y),
            Encoding::Codes { width: Width::Byte, zeros: false } => self.multiply::<Bytes<false>>(x, y),
            Encoding::Codes { width: Width::Byte, zeros: true } => self.multiply::<Bytes<true>>(x, y),
            Encoding::Dense(DenseType::Bf16) => self.multiply::<Bf16>(x, y),
            Encoding::Dense(DenseType::F16) => self.multiply::<F16>(x, y),
            Encoding::Dense(DenseType::F32) => self.multiply::<F32>(x, y),
        }
        Ok(())
    }
}

impl<S: Simd> FloatLinear<S> {
    fn multiply<W: Format>(&self, x: Rows<'_>, y: MatMut<'_, Cpu>) {
        if x.rows() <= DIRECT_ROWS {
            for_each_range(Columns::new(y), BLOCK, 1, &|first, columns| {
                each_block(first, columns, BLOCK, |block, columns| self.direct_block::<W>(block, x, columns));
            });
        } else {
            for_each_range(Columns::new(y), BLOCK, 1, &|first, columns| {
                let mut scratch = PanelScratch::new();
                each_block(first, columns, BLOCK, |block, columns| {
                    self.panel_block::<W>(block, x, columns, &mut scratch);
                });
            });
        }
    }

    fn direct_block<W: Format>(&self, block: usize, x: Rows<'_>, mut y: Columns<'_>) {
        let mut row = 0;
        while row < x.rows() {
            row += match x.rows() - row {
                1 => self.direct_rows::<W, 1>(block, row, x, &mut y),
                2 | 3 => self.direct_rows::<W, 2>(block, row, x, &mut y),
                _ => self.direct_rows::<W, 4>(block, row, x, &mut y),
            };
        }
    }

    fn direct_rows<W: Format, const ROWS: usize>(
        &self,
        block: usize,
        row: usize,
        x: Rows<'_>,
        y: &mut Columns<'_>,
    ) -> usize {
        let mut sums = [bias_of(self.bias.as_deref(), block); ROWS];
        self.s.direct::<W, ROWS>(DirectArgs {
            lines: self.packed.block(block),
            segments: &self.packed.segments,
            x: std::array::from_fn(|m| x.row(row + m)),
            sums: &mut sums,
        });
        for (m, sums) in sums.iter().enumerate() {
            write(y.row(row + m), sums);
        }
        ROWS
    }

    fn panel_block<W: Format>(
        &self,
        block: usize,
        x: Rows<'_>,
        mut y: Columns<'_>,
        scratch: &mut PanelScratch,
    ) {
        for row in (0..x.rows()).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(x.rows() - row);
            let sums = &mut scratch.sums[..rows];
            sums.fill(bias_of(self.bias.as_deref(), block));
            let mut rest = self.packed.block(block);
            for segment in &self.packed.segments {
                let header = self.packed.encoding.header();
                let (lines, tail) = rest.split_at(header + segment.len.div_ceil(W::PER_WORD) * TILES);
                rest = tail;
                let panel = &mut scratch.panel[..segment.len];
                let scales = &mut scratch.scales;
                self.s.unpack::<W>(UnpackArgs { lines, panel, scales });
                let x_of = |m: usize| &x.row(row + m)[segment.start..][..segment.len];
                let mut m = 0;
                while m < rows {
                    m += match rows - m {
                        1 => self.panel_rows::<1>(panel, scales, m, x_of, sums),
                        2 | 3 => self.panel_rows::<2>(panel, scales, m, x_of, sums),
                        4 | 5 => self.panel_rows::<4>(panel, scales, m, x_of, sums),
                        _ => self.panel_rows::<6>(panel, scales, m, x_of, sums),
                    };
                }
            }
            for (m, sums) in sums.iter().enumerate() {
                write(y.row(row + m), sums);
            }
        }
    }

    #[inline(always)]
    fn panel_rows<'x, const ROWS: usize>(
        &self,
        panel: &[PanelRow],
        scales: &PanelRow,
        m: usize,
        x_of: impl Fn(usize) -> &'x [f32],
        sums: &mut [PanelRow],
    ) -> usize {
        if let Some(sums) = sums[m..].first_chunk_mut::<ROWS>() {
            let x = std::array::from_fn(|i| x_of(m + i));
            self.s.panel::<ROWS>(PanelArgs { panel, scales, x, sums });
        }
        ROWS
    }
}

/// The bias of a block's outputs, where every sum starts.
pub(super) fn bias_of(bias: Option<&[f32]>, block: usize) -> PanelRow {
    let mut sums = [[0.0; TILE]; TILES];
    if let Some(bias) = bias {
        let bias = &bias[block * BLOCK..];
        let len = bias.len().min(BLOCK);
        sums.as_flattened_mut()[..len].copy_from_slice(&bias[..len]);
    }
    sums
}

/// Decoded weights and sums of one task, on its stack.
struct PanelScratch {
    panel: [PanelRow; SEGMENT],
    sums: [PanelRow; PANEL_ROWS],
    scales: PanelRow,
}

impl PanelScratch {
    fn new() -> Self {
        const ZERO: PanelRow = [[0.0; TILE]; TILES];
        Self { panel: [ZERO; SEGMENT], sums: [ZERO; PANEL_ROWS], scales: ZERO }
    }
}

/// Calls `work` with the first block of every `width` columns of a range that starts at block `first`.
pub(super) fn each_block(
    first: usize,
    columns: Columns<'_>,
    width: usize,
    mut work: impl FnMut(usize, Columns<'_>),
) {
    let (mut rest, mut block) = (columns, first);
    while rest.cols() > 0 {
        let here = rest.cols().min(width);
        let (columns, tail) = rest.split_at(here);
        work(block, columns);
        (block, rest) = (block + here.div_ceil(BLOCK), tail);
    }
}

/// Writes the sums of a block, of which the last may have fewer outputs than sums.
pub(super) fn write(y: &mut [f32], sums: &PanelRow) {
    y.copy_from_slice(&sums.as_flattened()[..y.len()]);
}
