//! Sums outer products of calibration inputs: float32 products in short runs, float64 sums of the runs.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::{Hessian, check_finite};
use crate::error::GptqError;
use crate::panel::{COLS, LANES, Lane, Real, Tile};

/// Tokens gathered before they are added to the sums.
const CHUNK: usize = 1024;

/// Tokens whose products are summed in float32.
const RUN: usize = 1;

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
/// Products of up to 256 consecutive tokens are summed in float32, these sums in float64: an element `H_ij` is
/// off by at most `256 eps32 * 2/n sum_t |x_ti x_tj|`, eps32 = 2^-24, whatever the number of tokens. Tokens are
/// buffered, so that the result depends on their order alone, neither on how the caller splits them into batches nor on the
/// number of threads. Memory: 8 in_features^2 bytes, and 12 KiB * in_features while a full buffer is added; twice as much
/// with reference inputs.
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
        let mut matrix = self.sum;
        for row in 0..self.in_features {
            for column in 0..row {
                let value = f64::from(matrix[[row, column]] as f32 * scale as f32);
                matrix[[row, column]] = value;
                matrix[[column, row]] = value;
            }
            matrix[[row, row]] = f64::from(matrix[[row, row]] as f32 * scale as f32);
        }
        check_finite(matrix.view())?;
        let cross = self.cross_sum.map(|cross| cross * scale);
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
            // A sum of absolute values is finite only if all of them are; it may overflow, so look before accusing.
            if values.iter().map(|x| x.abs()).sum::<f32>().is_finite() {
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
        let mut token = Vec::with_capacity(self.in_features);
        for (index, row) in inputs.outer_iter().enumerate() {
            token.clear();
            token.extend(row.iter());
            if let Some(reference) = &reference {
                self.pending_difference.extend(reference.row(index).iter().zip(&token).map(|(r, x)| r - x));
            }
            self.push_row(&token);
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
        let wide = pack(
            &self.pending,
            self.in_features,
            |token: &[f32]| {
                let mut lane = Lane::ZERO;
                lane.0[..token.len()].copy_from_slice(token);
                lane
            },
            LANES,
        );
        let narrow = |values: &[f32]| {
            pack(
                values,
                self.in_features,
                |token: &[f32]| {
                    let mut lane = [0.0; COLS];
                    lane[..token.len()].copy_from_slice(token);
                    lane
                },
                COLS,
            )
        };
        let tokens = self.pending.len() / self.in_features;
        add_products(&mut self.sum, &narrow(&self.pending), &wide, tokens, true);
        if let Some(cross) = &mut self.cross_sum {
            add_products(cross, &narrow(&self.pending_difference), &wide, tokens, false);
        }
        self.pending.clear();
        self.pending_difference.clear();
    }
}

/// Packs tokens into panels of `width` features: for each panel all tokens, for each token the panel's features.
fn pack<P: Send>(
    values: &[f32],
    in_features: usize,
    lane: impl Fn(&[f32]) -> P + Sync,
    width: usize,
) -> Vec<P> {
    (0..in_features.div_ceil(width))
        .into_par_iter()
        .flat_map_iter(|panel| {
            let features = panel * width..in_features.min((panel + 1) * width);
            let lane = &lane;
            values.chunks_exact(in_features).map(move |token| lane(&token[features.clone()]))
        })
        .collect()
}

/// `sum[i, j] += sum over tokens of rows[i] * columns[j]`, all `j` or only `j <= i`.
fn add_products(
    sum: &mut Array2<f64>,
    rows: &[[f32; COLS]],
    columns: &[Lane<f32>],
    tokens: usize,
    lower_triangle: bool,
) {
    let features = sum.ncols();
    let slabs = sum.as_slice_mut().expect("invariant: made by Array2::zeros").par_chunks_mut(SLAB * features);
    let rows = rows.par_chunks(SLAB / COLS * tokens);
    // Long rows of the triangle first, so that no thread is left with the largest task at the end.
    slabs.zip(rows).enumerate().rev().for_each(|(slab, (sum, rows))| {
        let mut tile: Tile<f32> = [Lane::ZERO; COLS];
        for (panel, columns) in columns.chunks_exact(tokens).enumerate() {
            let first_column = panel * LANES;
            if lower_triangle && first_column >= (slab + 1) * SLAB {
                break;
            }
            let width = LANES.min(features - first_column);
            for start in (0..tokens).step_by(RUN) {
                let run = start..tokens.min(start + RUN);
                for (rows, sum) in rows.chunks_exact(tokens).zip(sum.chunks_mut(COLS * features)) {
                    f32::multiply(&columns[run.clone()], &rows[run.clone()], &mut tile);
                    for (sum, products) in sum.chunks_exact_mut(features).zip(&tile) {
                        for (sum, &product) in sum[first_column..][..width].iter_mut().zip(&products.0) {
                            *sum += f64::from(product);
                        }
                    }
                }
            }
        }
    });
}
