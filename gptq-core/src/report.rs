//! What a layer's quantisation has to tell.

use std::time::Duration;

use crate::error::NotPositiveDefinite;

/// How the codes came about.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// GPTQ (arXiv:2210.17323).
    Gptq,
    /// GPTQ with asymmetric calibration (arXiv:2504.02692).
    Gptaq,
    /// Round to nearest, as asked for.
    Rtn,
    /// Round to nearest because no damping made the Hessian positive definite, as
    /// [`OnFailure::Rtn`](crate::OnFailure::Rtn) allows.
    RtnFallback(NotPositiveDefinite),
}

/// The diagonal that was added to the Hessian.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DampReport {
    /// Share of the mean diagonal really used.
    pub percent: f64,
    /// By how many steps of `damp_auto_increment` it lies above what was asked for.
    pub raised: u32,
    /// Added to every diagonal element before damping because no damping below 1 sufficed without; normally 0.
    pub floor: f64,
}

/// Wall-clock time per phase. A prepared Hessian's share counts in full for each weight that uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PhaseTimes {
    /// Dead columns, ordering, permuting, damping.
    pub prepare: Duration,
    /// Factorisation, every attempt included.
    pub factorize: Duration,
    /// The column loop.
    pub solve: Duration,
}

/// The account of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReport {
    /// How the codes came about.
    pub method: Method,
    /// `sum (w - q)^2 / (2 U_cc^2)` over all columns and rows. Without GPTAQ this is `tr(D H D^T) / 2` with `D` the
    /// quantisation error and `H` the damped Hessian: the squared output error, averaged over samples, plus the damping's
    /// share. `None` for round to nearest, which sees no Hessian.
    pub loss: Option<f64>,
    /// The damping really used; `None` for round to nearest.
    pub damp: Option<DampReport>,
    /// Input features that no calibration token excited; GPTQ sets their weights to zero. Ascending.
    pub dead_columns: Vec<usize>,
    /// Calibration samples behind the Hessian; 0 for round to nearest.
    pub samples: u64,
    /// Where the time went.
    pub times: PhaseTimes,
}
