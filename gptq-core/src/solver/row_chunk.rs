//! The column loop for up to 64 rows, which depend on nothing but themselves and the factor.

use pulp::{Arch, Simd, WithSimd};

use crate::error::GptqError;
use crate::grid::{Grid, GridRule};
use crate::order::ColumnOrder;
use crate::panel::{COLS, LANES, Lane, Real, Tile};
use crate::upper::UpperBlock;

/// What all rows share.
pub(super) struct Plan<'a> {
    pub(super) rule: GridRule,
    pub(super) group_size: Option<usize>,
    /// Set all grids before the first column.
    pub(super) static_groups: bool,
    pub(super) order: &'a ColumnOrder,
    pub(super) dead_columns: &'a [usize],
    /// U in lazy blocks; none rounds to nearest.
    pub(super) upper: &'a [UpperBlock],
    /// GPTAQ's P in the same blocks.
    pub(super) correction: Option<&'a [UpperBlock]>,
}

/// Up to 64 rows of the weight and of the results, row-major.
pub(super) struct RowChunk<'a> {
    pub(super) first_row: usize,
    pub(super) weight: &'a [f32],
    pub(super) codes: &'a mut [u8],
    pub(super) scales: &'a mut [f32],
    pub(super) zeros: &'a mut [u8],
}

impl RowChunk<'_> {
    /// Quantises the rows and returns their loss.
    pub(super) fn quantize(self, plan: &Plan<'_>) -> Result<f64, GptqError> {
        let columns = plan.order.column.len();
        let rows = self.weight.len() / columns;
        let state = Arch::new().dispatch(Solve { plan, weight: self.weight, rows });
        let groups = state.grids.len();
        for row in 0..rows {
            let codes = &mut self.codes[row * columns..][..columns];
            for (&column, lane) in plan.order.column.iter().zip(&state.codes) {
                codes[column] = lane[row];
            }
            for (group, grid) in state.grids.iter().enumerate() {
                let scale = grid.scale.0[row];
                if !scale.is_finite() {
                    return Err(GptqError::NonFiniteScale { row: self.first_row + row, group, scale });
                }
                self.scales[row * groups + group] = scale;
                self.zeros[row * groups + group] = grid.zero.0[row] as u8;
            }
        }
        let loss = state.loss[..rows].iter().sum::<f64>() / 2.0;
        if loss.is_finite() {
            Ok(loss)
        } else {
            Err(GptqError::NonFiniteLoss { first_row: self.first_row, loss })
        }
    }
}

/// The work on one chunk, compiled for each instruction set.
struct Solve<'a> {
    plan: &'a Plan<'a>,
    weight: &'a [f32],
    rows: usize,
}

impl WithSimd for Solve<'_> {
    type Output = State;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> State {
        let Self { plan, weight, rows } = self;
        let mut state = State::new(plan, weight, rows);
        for (index, block) in plan.upper.iter().enumerate() {
            state.block(simd, plan, block, plan.correction.map(|blocks| &blocks[index]));
        }
        if plan.upper.is_empty() {
            state.round_to_nearest(plan);
        }
        state
    }
}

/// The rows in columns of 64, in the order of quantisation.
struct State {
    /// The weight with the updates of all finished blocks.
    weight: Vec<Lane<f32>>,
    /// By group, as scales are stored.
    grids: Vec<Grid>,
    codes: Vec<[u8; LANES]>,
    /// `sum ((w - q) / U_cc)^2`.
    loss: [f64; LANES],
    /// The current block's weight.
    block: Vec<Lane<f32>>,
    /// The current block's errors.
    errors: Vec<Lane<f32>>,
}

impl State {
    #[inline(always)]
    fn new(plan: &Plan<'_>, rows_major: &[f32], rows: usize) -> Self {
        let order = plan.order;
        let columns = order.column.len();
        let mut weight = vec![Lane::ZERO; columns];
        for (lane, &column) in weight.iter_mut().zip(&order.column) {
            for (row, x) in lane.0[..rows].iter_mut().enumerate() {
                *x = rows_major[row * columns + column];
            }
        }
        let groups = plan.group_size.map_or(1, |group_size| columns.div_ceil(group_size));
        let mut grids = vec![Grid::UNSET; groups];
        if plan.group_size.is_none() {
            // From the weight as given, dead columns included: all references fit this grid first.
            grids[0] = Grid::fit(&plan.rule, weight.iter());
        }
        let mut position = vec![0; columns];
        for (p, &column) in order.column.iter().enumerate() {
            position[column] = p;
        }
        for &column in plan.dead_columns {
            weight[position[column]] = Lane::ZERO;
        }
        if let Some(group_size) = plan.group_size
            && plan.static_groups
        {
            for (grid, members) in grids.iter_mut().zip(position.chunks(group_size)) {
                *grid = Grid::fit(&plan.rule, members.iter().map(|&p| &weight[p]));
            }
        }
        Self {
            weight,
            grids,
            codes: vec![[0; LANES]; columns],
            loss: [0.0; LANES],
            block: Vec::new(),
            errors: Vec::new(),
        }
    }

    /// Quantises the columns of one block and updates those behind it.
    #[inline(always)]
    fn block<S: Simd>(
        &mut self,
        simd: S,
        plan: &Plan<'_>,
        upper: &UpperBlock,
        correction: Option<&UpperBlock>,
    ) {
        let (start, width) = (upper.start, upper.width);
        self.block.clear();
        self.block.extend_from_slice(&self.weight[start..start + width]);
        self.errors.clear();
        self.errors.resize(width, Lane::ZERO);
        for j in 0..width {
            let column = start + j;
            let group = plan.order.group[column];
            if let Some(group_size) = plan.group_size
                && !plan.static_groups
                && column.is_multiple_of(group_size)
            {
                // From the weight as it stood at the block's start: a quirk of all references, and theirs to keep.
                let end = self.weight.len().min(column + group_size);
                self.grids[group] = Grid::fit(&plan.rule, self.weight[column..end].iter());
            }
            self.column(plan, j, column, group, upper, correction);
        }
        self.update_behind(simd, upper, correction);
    }

    /// Quantises one column and spreads its error over the rest of the block.
    #[inline(always)]
    fn column(
        &mut self,
        plan: &Plan<'_>,
        j: usize,
        column: usize,
        group: usize,
        upper: &UpperBlock,
        correction: Option<&UpperBlock>,
    ) {
        let row = upper.diagonal_row(j);
        let diagonal = row[0];
        let grid = &self.grids[group];
        let w = self.block[j];
        let error = &mut self.errors[j];
        for r in 0..LANES {
            let (scale, zero) = (grid.scale.0[r], grid.zero.0[r]);
            let code = plan.rule.code(w.0[r], scale, zero);
            let e = (w.0[r] - scale * (code - zero)) / diagonal;
            error.0[r] = e;
            self.codes[column][r] = code as u8;
            self.loss[r] += f64::from(e) * f64::from(e);
        }
        match correction {
            None => {
                for (target, &u) in self.block[j + 1..].iter_mut().zip(&row[1..]) {
                    for (x, &e) in target.0.iter_mut().zip(&error.0) {
                        *x -= e * u;
                    }
                }
            }
            Some(correction) => {
                // From the column itself on: its updated weight takes part in the lazy update below.
                for ((target, &u), &p) in self.block[j..].iter_mut().zip(row).zip(correction.diagonal_row(j))
                {
                    for ((x, &e), &w) in target.0.iter_mut().zip(&error.0).zip(&w.0) {
                        *x -= e * u - w * p;
                    }
                }
            }
        }
    }

    /// The lazy update: `W[:, e:] -= E U[a:e, e:]`, and with GPTAQ `- W_block P[a:e, e:]` inside the bracket.
    #[inline(always)]
    fn update_behind<S: Simd>(&mut self, simd: S, upper: &UpperBlock, correction: Option<&UpperBlock>) {
        let behind = &mut self.weight[upper.start + upper.width..];
        let mut tile: Tile<f32> = [Lane::ZERO; COLS];
        let mut correction_tile: Tile<f32> = [Lane::ZERO; COLS];
        let mut corrections = correction.map(UpperBlock::right_panels);
        for (targets, panel) in behind.chunks_mut(COLS).zip(upper.right_panels()) {
            f32::multiply(simd, &self.errors, panel, &mut tile);
            if let Some(panel) = corrections.as_mut().and_then(Iterator::next) {
                f32::multiply(simd, &self.block, panel, &mut correction_tile);
                for (product, correction) in tile.iter_mut().zip(&correction_tile) {
                    for (x, c) in product.0.iter_mut().zip(&correction.0) {
                        *x -= c;
                    }
                }
            }
            for (target, product) in targets.iter_mut().zip(&tile) {
                for (x, p) in target.0.iter_mut().zip(&product.0) {
                    *x -= p;
                }
            }
        }
    }

    /// Every column on its group's grid, without updates.
    #[inline(always)]
    fn round_to_nearest(&mut self, plan: &Plan<'_>) {
        for ((codes, w), &group) in self.codes.iter_mut().zip(&self.weight).zip(&plan.order.group) {
            let grid = &self.grids[group];
            for (r, code) in codes.iter_mut().enumerate() {
                *code = plan.rule.code(w.0[r], grid.scale.0[r], grid.zero.0[r]) as u8;
            }
        }
    }
}
