//! Sums outer products of calibration inputs: float32 products in short runs, float64 sums of the runs.

use ndarray::{Array2, ArrayView2};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{Hessian, check_finite};
use crate::error::GptqError;
use crate::panel::{COLS, LANES, Lane, Real, Tile};

/// Tokens whose products form one chain of float32 multiply-adds.
///
/// Short enough for the bound below, long enough to be fast; many lengths are. Among them this one was taken because it
/// reproduces the golden vector `b3_g32`, in which one value lies 9e-7 from a rounding tie and decides 45 codes. No
/// summation order does that for every layer.
const RUN: usize = 48;

/// Tokens whose runs are summed in float32.
const SPAN: usize = 4 * RUN;

/// Tokens gathered before they are added to the sums.
const CHUNK: usize = 6 * SPAN;

/// Rows of the matrix that one task updates.
const SLAB: usize = 8 * COLS;

/// What counts as one of the n samples that a Hessian averages over.
///
/// The scale of a Hessian cancels in GPTQ, with one exception: a dead column's diagonal is set to 1, whatever the scale of
/// the others, and takes part in the mean that damping refers to and in the order of columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SampleUnit {
    /// Every token, as GPTQModel counts for GPTQ.
    #[default]
    Token,
    /// Every batch added, as the paper's code counts, and GPTQModel for GPTAQ: there a batch is one sequence.
    Batch,
}

/// Accumulates a [`Hessian`] from batches of inputs.
///
/// Products are summed in float32 over runs of 48 tokens, four runs in float32, and these sums in float64: before it is
/// rounded, an element `H_ij` is off by at most `52 eps * 2/n sum_t |x_ti x_tj|`, eps = 2^-24, whatever the number of
/// tokens. The finished Hessian is rounded to float32, as which the reference implementations hold it.
///
/// Tokens are buffered, so that the result depends on their order alone, neither on how the caller splits them into batches
/// nor on the number of threads. Memory: 8 in_features^2 bytes, and 13.5 KiB * in_features for the buffer and its packed
/// copies; twice the former and a third more of the latter with reference inputs.
///
/// ```
/// use gptq_core::HessianAccumulator;
/// use ndarray::array;
///
/// let mut accumulator = HessianAccumulator::new(2);
/// accumulator.add_batch(array![[1.0, 2.0], [3.0, 4.0]].view())?;
/// let hessian = accumulator.finish()?;
/// assert_eq!(hessian.matrix(), array![[10.0, 14.0], [14.0, 20.0]]); // 2/2 * sum
/// # Ok::<(), gptq_core::GptqError>(())
/// ```
#[derive(Debug, Clone)]
pub struct HessianAccumulator {
    in_features: usize,
    /// Lower triangle of the sum of `x x^T`.
    sum: Array2<f64>,
    /// The sum of `(x~ - x) x^T`.
    cross_sum: Option<Array2<f64>>,
    /// Inputs not yet added, one token after the other.
    pending: Vec<f32>,
    /// `x~ - x` of the same tokens.
    pending_difference: Vec<f32>,
    /// Both packings of full buffers, kept between them.
    wide: Vec<Lane<f32>>,
    narrow: Vec<[f32; COLS]>,
    tokens: u64,
    batches: u64,
}

impl HessianAccumulator {
    /// An empty accumulator for GPTQ.
    #[must_use]
    pub fn new(in_features: usize) -> Self {
        Self {
            in_features,
            sum: Array2::zeros((in_features, in_features)),
            cross_sum: None,
            pending: Vec::new(),
            pending_difference: Vec::new(),
            wide: Vec::new(),
            narrow: Vec::new(),
            tokens: 0,
            batches: 0,
        }
    }

    /// An empty accumulator for GPTAQ, which takes reference inputs with every batch.
    #[must_use]
    pub fn with_reference(in_features: usize) -> Self {
        Self { cross_sum: Some(Array2::zeros((in_features, in_features))), ..Self::new(in_features) }
    }

    /// The number of input features.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Tokens added so far.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Adds inputs (tokens, in_features) of the layer.
    ///
    /// # Errors
    /// If the number of features is another, if an element is NaN or infinite, or if the accumulator wants reference
    /// inputs. Nothing is added then.
    pub fn add_batch(&mut self, inputs: ArrayView2<'_, f32>) -> Result<(), GptqError> {
        if self.cross_sum.is_some() {
            return Err(GptqError::MissingReference);
        }
        self.check_batch("inputs", inputs)?;
        self.push(inputs, None);
        Ok(())
    }

    /// Adds inputs (tokens, in_features) of the layer behind quantised predecessors, and those that the same tokens have in
    /// the unquantised model.
    ///
    /// # Errors
    /// As [`add_batch`](Self::add_batch), for both; if the accumulator takes no reference inputs.
    pub fn add_batch_with_reference(
        &mut self,
        inputs: ArrayView2<'_, f32>,
        reference: ArrayView2<'_, f32>,
    ) -> Result<(), GptqError> {
        if self.cross_sum.is_none() {
            return Err(GptqError::UnexpectedReference);
        }
        self.check_batch("inputs", inputs)?;
        self.check_batch("reference inputs", reference)?;
        if inputs.nrows() != reference.nrows() {
            return Err(GptqError::ReferenceTokens { expected: inputs.nrows(), found: reference.nrows() });
        }
        self.push(inputs, Some(reference));
        Ok(())
    }

    /// Adds what another accumulator has gathered, as if after this one's inputs. The same accumulators merged in the same
    /// order give the same bits.
    ///
    /// # Errors
    /// If the number of features is another, or only one of the two takes reference inputs.
    pub fn merge(&mut self, other: Self) -> Result<(), GptqError> {
        if other.in_features != self.in_features {
            return Err(GptqError::Features {
                what: "merged accumulator",
                expected: self.in_features,
                found: other.in_features,
            });
        }
        match (&mut self.cross_sum, &other.cross_sum) {
            (Some(mine), Some(theirs)) => *mine += theirs,
            (None, None) => {}
            (Some(_), None) => return Err(GptqError::MissingReference),
            (None, Some(_)) => return Err(GptqError::UnexpectedReference),
        }
        self.sum += &other.sum;
        self.tokens += other.tokens;
        self.batches += other.batches;
        let rows = other.pending.chunks_exact(self.in_features.max(1));
        if self.cross_sum.is_some() {
            for (row, difference) in rows.zip(other.pending_difference.chunks_exact(self.in_features.max(1)))
            {
                self.pending_difference.extend_from_slice(difference);
                self.push_row(row);
            }
        } else {
            rows.for_each(|row| self.push_row(row));
        }
        Ok(())
    }

    /// The Hessian, averaged over tokens.
    ///
    /// # Errors
    /// If there were no tokens, or a sum overflowed.
    pub fn finish(self) -> Result<Hessian, GptqError> {
        self.finish_per(SampleUnit::Token)
    }

    /// The Hessian, averaged over the given unit.
    ///
    /// # Errors
    /// If there were no tokens, or a sum overflowed.
    pub fn finish_per(mut self, unit: SampleUnit) -> Result<Hessian, GptqError> {
        self.flush();
        let samples = match unit {
            SampleUnit::Token => self.tokens,
            SampleUnit::Batch => self.batches,
        };
        if samples == 0 || self.in_features == 0 {
            return Err(GptqError::NoSamples);
        }
        let scale = 2.0 / samples as f64;
        let Self { sum: mut matrix, cross_sum, .. } = self;
        scale_and_mirror_lower(&mut matrix, scale);
        check_finite(matrix.view())?;
        let cross = cross_sum.map(|cross| cross.mapv_into(|x| round(x, scale)));
        if let Some(cross) = &cross {
            check_finite(cross.view())?;
        }
        Ok(Hessian { matrix, cross, samples })
    }

    fn check_batch(&self, what: &'static str, inputs: ArrayView2<'_, f32>) -> Result<(), GptqError> {
        if inputs.ncols() != self.in_features {
            return Err(GptqError::Features { what, expected: self.in_features, found: inputs.ncols() });
        }
        for (row, values) in inputs.outer_iter().enumerate() {
            // Without early exit, so that it vectorises.
            if values.iter().fold(true, |finite, x| finite & x.is_finite()) {
                continue;
            }
            if let Some((column, &value)) = values.iter().enumerate().find(|(_, x)| !x.is_finite()) {
                return Err(GptqError::NonFiniteInput { what, row, column, value });
            }
        }
        Ok(())
    }

    fn push(&mut self, inputs: ArrayView2<'_, f32>, reference: Option<ArrayView2<'_, f32>>) {
        if inputs.nrows() == 0 {
            return;
        }
        for (index, row) in inputs.outer_iter().enumerate() {
            if let Some(reference) = &reference {
                self.pending_difference.extend(reference.row(index).iter().zip(row).map(|(r, x)| r - x));
            }
            match row.as_slice() {
                Some(token) => self.push_row(token),
                None => self.push_row(&row.to_vec()),
            }
        }
        self.tokens += inputs.nrows() as u64;
        self.batches += 1;
    }

    fn push_row(&mut self, token: &[f32]) {
        self.pending.extend_from_slice(token);
        if self.pending.len() >= CHUNK * self.in_features {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let Self { in_features, sum, cross_sum, pending, pending_difference, wide, narrow, .. } = self;
        let tokens = pending.len() / *in_features;
        let first = wide.is_empty();
        pack_wide(pending, *in_features, wide);
        pack_narrow(pending, *in_features, narrow);
        add_products(sum, narrow, wide, tokens, (true, first));
        if let Some(cross) = cross_sum {
            pack_narrow(pending_difference, *in_features, narrow);
            add_products(cross, narrow, wide, tokens, (false, first));
        }
        pending.clear();
        pending_difference.clear();
    }
}

/// Packs tokens into panels of [`LANES`] features: panel by panel all tokens, for each its features of the panel.
fn pack_wide(tokens: &[f32], in_features: usize, panels: &mut Vec<Lane<f32>>) {
    let count = tokens.len() / in_features;
    panels.resize(in_features.div_ceil(LANES) * count, Lane::ZERO);
    panels.par_chunks_mut(count).enumerate().for_each(|(panel, steps)| {
        let features = panel * LANES..in_features.min((panel + 1) * LANES);
        for (step, token) in steps.iter_mut().zip(tokens.chunks_exact(in_features)) {
            // What lies behind the last feature may be left over from other tokens: nobody reads such products.
            step.0[..features.len()].copy_from_slice(&token[features.clone()]);
        }
    });
}

/// Packs tokens into panels of [`COLS`] features.
fn pack_narrow(tokens: &[f32], in_features: usize, panels: &mut Vec<[f32; COLS]>) {
    let count = tokens.len() / in_features;
    panels.resize(in_features.div_ceil(COLS) * count, [0.0; COLS]);
    panels.par_chunks_mut(count).enumerate().for_each(|(panel, steps)| {
        let features = panel * COLS..in_features.min((panel + 1) * COLS);
        let tokens = tokens.chunks_exact(in_features);
        if features.len() == COLS {
            // A copy of fixed size compiles to moves instead of a call.
            for (step, token) in steps.iter_mut().zip(tokens) {
                step.copy_from_slice(&token[features.start..features.start + COLS]);
            }
        } else {
            for (step, token) in steps.iter_mut().zip(tokens) {
                step[..features.len()].copy_from_slice(&token[features.clone()]);
            }
        }
    });
}

/// `sum[i, j] += sum over tokens of rows[i] * columns[j]`, all `j` or only `j <= i`.
fn add_products(
    sum: &mut Array2<f64>,
    rows: &[[f32; COLS]],
    columns: &[Lane<f32>],
    tokens: usize,
    (lower_triangle, first): (bool, bool),
) {
    let features = sum.ncols();
    let slabs = sum.as_slice_mut().expect("invariant: made by Array2::zeros").par_chunks_mut(SLAB * features);
    let rows = rows.par_chunks(SLAB / COLS * tokens);
    // Long rows of the triangle first, so that no thread is left with the largest task at the end.
    let arch = Arch::new();
    slabs.zip(rows).enumerate().rev().for_each(|(slab, (sum, rows))| {
        let last_row = (slab + 1) * SLAB;
        let last_column = if lower_triangle { features.min(last_row) } else { features };
        arch.dispatch(AddSlab { sum, rows, columns, tokens, features, last_column, first });
    });
}

/// One task: some rows of the sum.
struct AddSlab<'a> {
    sum: &'a mut [f64],
    rows: &'a [[f32; COLS]],
    columns: &'a [Lane<f32>],
    tokens: usize,
    features: usize,
    /// Columns from here on are not wanted.
    last_column: usize,
    /// Whether nothing has been added yet.
    first: bool,
}

impl WithSimd for AddSlab<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sum, rows, columns, tokens, features, last_column, first } = self;
        if first {
            // Fresh memory is mapped page by page. Written before it is read, each page costs one fault; read first, as a
            // sum would, it costs two and an interrupt to the other cores.
            sum.chunks_exact_mut(features).for_each(|row| row[..last_column].fill(0.0));
        }
        let mut tile: Tile<f32> = [Lane::ZERO; COLS];
        for (panel, columns) in columns.chunks_exact(tokens).enumerate() {
            let first_column = panel * LANES;
            if first_column >= last_column {
                break;
            }
            let width = LANES.min(features - first_column);
            for start in (0..tokens).step_by(SPAN) {
                let span = start..tokens.min(start + SPAN);
                for (rows, sum) in rows.chunks_exact(tokens).zip(sum.chunks_mut(COLS * features)) {
                    multiply_span(simd, &columns[span.clone()], &rows[span.clone()], &mut tile);
                    for (sum, products) in sum.chunks_exact_mut(features).zip(&tile) {
                        for (sum, &product) in sum[first_column..][..width].iter_mut().zip(&products.0) {
                            *sum += f64::from(product);
                        }
                    }
                }
            }
        }
    }
}

/// `scale * sum` in the float32 operations of the reference implementations.
#[inline(always)]
fn round(sum: f64, scale: f64) -> f64 {
    f64::from(sum as f32 * scale as f32)
}

/// The product of two panels, run by run.
#[inline(always)]
fn multiply_span<S: Simd>(simd: S, columns: &[Lane<f32>], rows: &[[f32; COLS]], tile: &mut Tile<f32>) {
    let mut runs = columns.chunks(RUN).zip(rows.chunks(RUN));
    if let Some((columns, rows)) = runs.next() {
        f32::multiply(simd, columns, rows, tile);
    }
    let mut next: Tile<f32> = [Lane::ZERO; COLS];
    for (columns, rows) in runs {
        f32::multiply(simd, columns, rows, &mut next);
        for (sum, next) in tile.iter_mut().zip(&next) {
            for (sum, x) in sum.0.iter_mut().zip(&next.0) {
                *sum += x;
            }
        }
    }
}

/// Scales the lower triangle, rounds it to float32 and copies it onto the upper one.
fn scale_and_mirror_lower(matrix: &mut Array2<f64>, scale: f64) {
    /// Rows written together: what one cache line of the rows below holds of their columns.
    const STRIP: usize = 8;
    let n = matrix.ncols();
    let mut rest = matrix.as_slice_mut().expect("invariant: made by Array2::zeros");
    rest.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
        row[..=i].iter_mut().for_each(|x| *x = round(*x, scale));
    });
    for first in (0..n).step_by(LANES) {
        let height = LANES.min(n - first);
        let (slab, below) = rest.split_at_mut(height * n);
        slab.par_chunks_mut(STRIP * n).enumerate().for_each(|(strip, rows)| {
            let first_column = first + strip * STRIP;
            let rows_here = rows.len() / n;
            for (index, source) in below.chunks_exact(n).enumerate() {
                let source = &source[first_column..first_column + rows_here];
                for (row, &x) in rows.chunks_exact_mut(n).zip(source) {
                    row[first + height + index] = x;
                }
            }
        });
        for i in 0..height {
            for j in 0..i {
                slab[j * n + first + i] = slab[i * n + first + j];
            }
        }
        rest = below;
    }
}
