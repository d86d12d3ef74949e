//! GPTQ itself: prepare the Hessian, then run the column loop for each weight that shares it.

mod row_chunk;

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use ndarray::linalg::general_mat_mul;
use ndarray::parallel::prelude::*;
use ndarray::{Array2, ArrayView2, Axis, Zip};
use rayon::prelude::*;

use crate::config::{GptqConfig, OnFailure};
use crate::damping::{DampingFailure, factorize_damped};
use crate::error::{GptqError, NotPositiveDefinite};
use crate::factorize::{BlockedCholesky, Factorize};
use crate::grid::GridRule;
use crate::hessian::Hessian;
use crate::order::ColumnOrder;
use crate::panel::LANES;
use crate::quantized::QuantizedWeight;
use crate::report::{DampReport, LayerReport, Method, PhaseTimes};
use crate::upper::{UpperBlock, pack_upper};
use row_chunk::{Plan, RowChunk};

/// The GPTQ quantiser.
///
/// ```
/// use gptq_core::{Gptq, GptqConfig, HessianAccumulator};
/// use ndarray::Array2;
///
/// let weight = Array2::from_shape_fn((4, 16), |(o, i)| ((o * 7 + i * 3) % 11) as f32 - 5.0);
/// let inputs = Array2::from_shape_fn((64, 16), |(t, i)| ((t * 5 + i * i) % 13) as f32 / 13.0);
/// let mut accumulator = HessianAccumulator::new(16);
/// accumulator.add_batch(inputs.view())?;
/// let gptq = Gptq::new(GptqConfig::builder().group_size(Some(8)).build()?);
/// let quantized = gptq.quantize(weight.view(), accumulator.finish()?)?;
/// assert_eq!(quantized.codes.dim(), (4, 16));
/// assert_eq!(quantized.scales.dim(), (4, 2));
/// # Ok::<(), gptq_core::GptqError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Gptq<F: Factorize = BlockedCholesky> {
    config: GptqConfig,
    factorizer: F,
}

impl Gptq {
    /// A quantiser with the pure Rust factorisation.
    #[must_use]
    pub fn new(config: GptqConfig) -> Self {
        Self::with_factorizer(config, BlockedCholesky)
    }
}

impl<F: Factorize> Gptq<F> {
    /// A quantiser with a factorisation of the caller's choice.
    #[must_use]
    pub fn with_factorizer(config: GptqConfig, factorizer: F) -> Self {
        Self { config, factorizer }
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &GptqConfig {
        &self.config
    }

    /// Quantises `weight` (out_features, in_features) under the Hessian of its inputs.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare) and [`PreparedHessian::quantize`].
    pub fn quantize(
        &self,
        weight: ArrayView2<'_, f32>,
        hessian: Hessian,
    ) -> Result<QuantizedWeight, GptqError> {
        // Before the costly part, so that bad weights are told at once.
        check_weight(weight)?;
        check_features(weight, hessian.in_features())?;
        self.prepare(hessian)?.quantize(weight)
    }

    /// Orders and factorises a Hessian once for all weights that share it, such as those of the query, key and value
    /// projections.
    ///
    /// # Errors
    /// If no damping makes it positive definite, unless [`OnFailure::Rtn`] is set; if GPTAQ is on and the Hessian has no
    /// cross moment.
    pub fn prepare(&self, hessian: Hessian) -> Result<PreparedHessian, GptqError> {
        self.prepare_shared(&hessian)
    }

    /// [`prepare`](Self::prepare) for a Hessian that is still needed, such as by weights with other settings.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn prepare_shared(&self, hessian: &Hessian) -> Result<PreparedHessian, GptqError> {
        let started = Instant::now();
        if self.config.gptaq().is_some() && hessian.cross().is_none() {
            return Err(GptqError::MissingReference);
        }
        let matrix = hessian.matrix();
        let mut diagonal = matrix.diag().to_vec();
        let mut dead_columns = Vec::new();
        for (column, d) in diagonal.iter_mut().enumerate() {
            if *d == 0.0 {
                *d = 1.0;
                dead_columns.push(column);
            }
        }
        let order = ColumnOrder::new(&self.config, &diagonal);
        let ordered = Instant::now();
        let attempt = |diagonal: &[f64]| -> Result<_, Infallible> {
            Ok(self.factorizer.inverse_cholesky(ordered_with(matrix, &order, diagonal)))
        };
        let Ok(factorized) = factorize_damped(&self.config, &diagonal, attempt);
        let factorize = ordered.elapsed();
        let block_size = self.config.block_size().get();
        let factor = match factorized {
            Ok((upper, damp)) => {
                let correction = match (self.config.gptaq(), hessian.cross()) {
                    (Some(alpha), Some(cross)) => {
                        let p = correction(alpha, cross, &order, &upper);
                        Some(pack_upper(p.view(), block_size))
                    }
                    _ => None,
                };
                Ok(Factor { upper: pack_upper(upper.view(), block_size), correction, damp })
            }
            Err(DampingFailure { last_damp, source }) => match self.config.on_failure() {
                OnFailure::Error => return Err(GptqError::NotPositiveDefinite { last_damp, source }),
                OnFailure::Rtn => {
                    tracing::warn!(last_damp, %source, "no damping helps: falling back to round to nearest");
                    Err(source)
                }
            },
        };
        let prepare = started.elapsed().saturating_sub(factorize);
        Ok(PreparedHessian {
            config: self.config.clone(),
            order,
            dead_columns,
            factor: factor.map(Arc::new),
            samples: hessian.samples(),
            times: PhaseTimes { prepare, factorize, solve: Duration::ZERO },
        })
    }
}

/// What the column loop needs of a Hessian, and the settings it was prepared under.
#[derive(Debug, Clone)]
pub struct PreparedHessian {
    config: GptqConfig,
    order: ColumnOrder,
    dead_columns: Vec<usize>,
    factor: Result<Arc<Factor>, NotPositiveDefinite>,
    samples: u64,
    times: PhaseTimes,
}

#[derive(Debug, Clone)]
struct Factor {
    upper: Vec<UpperBlock>,
    /// GPTAQ's P.
    correction: Option<Vec<UpperBlock>>,
    damp: DampReport,
}

impl PreparedHessian {
    /// The number of input features.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.order.column.len()
    }

    /// The same factorisation for other settings of the grids: bits, group size, symmetry, search. `None` if `config` needs
    /// another factorisation, because its damping, block size, order of columns or GPTAQ strength is another.
    ///
    /// What it quantises is to the bit what [`Gptq::prepare`] with `config` gives.
    #[must_use]
    pub fn for_settings(&self, config: &GptqConfig) -> Option<Self> {
        let own = &self.config;
        let same_order = config.desc_act() == own.desc_act()
            && config.act_group_aware() == own.act_group_aware()
            // The group-aware order is one of groups.
            && (!own.act_group_aware() || config.group_size() == own.group_size());
        let same_factor = config.damp_percent() == own.damp_percent()
            && config.damp_auto_increment() == own.damp_auto_increment()
            && config.block_size() == own.block_size()
            && config.gptaq() == own.gptaq()
            && config.on_failure() == own.on_failure();
        (same_order && same_factor).then(|| Self {
            config: config.clone(),
            order: self.order.regrouped(config),
            ..self.clone()
        })
    }

    /// Quantises `weight` (out_features, in_features).
    ///
    /// # Errors
    /// If the shape does not fit, an element is NaN or infinite, or scales or updates overflow.
    pub fn quantize(&self, weight: ArrayView2<'_, f32>) -> Result<QuantizedWeight, GptqError> {
        check_weight(weight)?;
        check_features(weight, self.in_features())?;
        let factor = match &self.factor {
            Ok(factor) => factor,
            Err(source) => {
                let mut quantized = rtn(weight, &self.config)?;
                let report = &mut quantized.report;
                report.method = Method::RtnFallback(*source);
                report.samples = self.samples;
                report.times = PhaseTimes { solve: report.times.solve, ..self.times };
                return Ok(quantized);
            }
        };
        let plan = Plan {
            rule: GridRule::new(&self.config),
            group_size: self.config.group_size().map(|g| g.get()),
            static_groups: self.config.static_groups(),
            order: &self.order,
            dead_columns: &self.dead_columns,
            upper: &factor.upper,
            correction: factor.correction.as_deref(),
        };
        let report = LayerReport {
            method: if factor.correction.is_some() { Method::Gptaq } else { Method::Gptq },
            loss: None,
            damp: Some(factor.damp),
            dead_columns: self.dead_columns.clone(),
            samples: self.samples,
            times: self.times,
        };
        let (mut quantized, loss) = run(weight, &self.config, &plan, report)?;
        quantized.report.loss = Some(loss);
        Ok(quantized)
    }
}

/// Rounds `weight` (out_features, in_features) to nearest, each group on the grid of its own weights: the baseline.
///
/// Uses `bits`, `group_size`, `sym` and `mse` of the settings.
///
/// # Errors
/// If the weight is empty, has a NaN or infinite element, or a range that overflows float32.
pub fn rtn(weight: ArrayView2<'_, f32>, config: &GptqConfig) -> Result<QuantizedWeight, GptqError> {
    check_weight(weight)?;
    let columns = weight.ncols();
    let group_size = config.group_size().map_or(columns, |g| g.get());
    let order =
        ColumnOrder { column: (0..columns).collect(), group: (0..columns).map(|i| i / group_size).collect() };
    let plan = Plan {
        rule: GridRule::new(config),
        group_size: config.group_size().map(|g| g.get()),
        static_groups: true,
        order: &order,
        dead_columns: &[],
        upper: &[],
        correction: None,
    };
    let report = LayerReport {
        method: Method::Rtn,
        loss: None,
        damp: None,
        dead_columns: Vec::new(),
        samples: 0,
        times: PhaseTimes::default(),
    };
    run(weight, config, &plan, report).map(|(quantized, _)| quantized)
}

/// Runs the column loop over all rows, 64 at a time; the result and its loss.
fn run(
    weight: ArrayView2<'_, f32>,
    config: &GptqConfig,
    plan: &Plan<'_>,
    mut report: LayerReport,
) -> Result<(QuantizedWeight, f64), GptqError> {
    let started = Instant::now();
    let (rows, columns) = weight.dim();
    let groups = config.groups(columns);
    let weight = weight.as_standard_layout();
    let weight = weight.as_slice().expect("invariant: standard layout");
    let mut codes = vec![0; rows * columns];
    let mut scales = vec![0.0; rows * groups];
    let mut zeros = vec![0; rows * groups];
    let losses = weight
        .par_chunks(LANES * columns)
        .zip(codes.par_chunks_mut(LANES * columns))
        .zip(scales.par_chunks_mut(LANES * groups).zip(zeros.par_chunks_mut(LANES * groups)))
        .enumerate()
        .map(|(index, ((weight, codes), (scales, zeros)))| {
            let chunk = RowChunk { first_row: index * LANES, weight, codes, scales, zeros };
            chunk.quantize(plan)
        })
        .collect::<Result<Vec<f64>, GptqError>>()?;
    report.times.solve = started.elapsed();
    let shaped = "invariant: allocated with this many elements";
    let quantized = QuantizedWeight {
        codes: Array2::from_shape_vec((rows, columns), codes).expect(shaped),
        scales: Array2::from_shape_vec((rows, groups), scales).expect(shaped),
        zeros: Array2::from_shape_vec((rows, groups), zeros).expect(shaped),
        g_idx: plan.order.g_idx(),
        report,
    };
    Ok((quantized, losses.iter().sum()))
}

/// The matrix in the order of quantisation, with another diagonal, given in the original order.
fn ordered_with(matrix: ArrayView2<'_, f64>, order: &ColumnOrder, diagonal: &[f64]) -> Array2<f64> {
    let mut ordered = Array2::zeros(matrix.raw_dim());
    Zip::indexed(ordered.axis_iter_mut(Axis(0))).par_for_each(|position, mut row| {
        let column = order.column[position];
        let source = matrix.row(column);
        for (x, &other) in row.iter_mut().zip(&order.column) {
            *x = source[other];
        }
        row[position] = diagonal[column];
    });
    ordered
}

/// GPTAQ's `P = alpha * triu(D U^T, 1) * U`.
fn correction(
    alpha: f32,
    cross: ArrayView2<'_, f64>,
    order: &ColumnOrder,
    upper: &Array2<f64>,
) -> Array2<f64> {
    let mut product = if order.is_natural() {
        multiply(cross, upper.t())
    } else {
        let ordered =
            Array2::from_shape_fn(cross.raw_dim(), |(i, j)| cross[[order.column[i], order.column[j]]]);
        multiply(ordered.view(), upper.t())
    };
    for ((i, j), x) in product.indexed_iter_mut() {
        *x = if j > i { f64::from(alpha) * *x } else { 0.0 };
    }
    multiply(product.view(), upper.view())
}

/// `a b`, rows in parallel.
fn multiply(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Array2<f64> {
    /// Rows per task.
    const ROWS: usize = 64;
    let mut product = Array2::zeros((a.nrows(), b.ncols()));
    product
        .axis_chunks_iter_mut(Axis(0), ROWS)
        .into_par_iter()
        .zip(a.axis_chunks_iter(Axis(0), ROWS))
        .for_each(|(mut product, rows)| general_mat_mul(1.0, &rows, &b, 0.0, &mut product));
    product
}

fn check_weight(weight: ArrayView2<'_, f32>) -> Result<(), GptqError> {
    let (rows, columns) = weight.dim();
    if rows == 0 || columns == 0 {
        return Err(GptqError::EmptyWeight { rows, columns });
    }
    match weight.indexed_iter().find(|(_, value)| !value.is_finite()) {
        Some(((row, column), &value)) => Err(GptqError::NonFiniteWeight { row, column, value }),
        None => Ok(()),
    }
}

fn check_features(weight: ArrayView2<'_, f32>, expected: usize) -> Result<(), GptqError> {
    let found = weight.ncols();
    if found == expected { Ok(()) } else { Err(GptqError::Features { what: "weight", expected, found }) }
}
