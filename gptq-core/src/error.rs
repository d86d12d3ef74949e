//! What can go wrong, and the data that tells where.

/// A [`GptqConfig`](crate::GptqConfig) that cannot be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Codes of this width are not defined.
    #[error("bits must be 2, 3, 4 or 8, not {bits}")]
    Bits {
        /// The width asked for.
        bits: u32,
    },
    /// Groups must be a positive multiple of 8 columns, or `None` for one group per row.
    #[error("group_size must be a positive multiple of 8 (or None for one group), not {group_size}")]
    GroupSize {
        /// The group size asked for.
        group_size: usize,
    },
    /// The share of the mean diagonal that is added to the diagonal must lie in `[0, 1)`.
    #[error("damp_percent must be in [0, 1), not {damp_percent}")]
    DampPercent {
        /// The share asked for.
        damp_percent: f64,
    },
    /// The step by which a failed damping is raised must lie in `[0, 1)`.
    #[error("damp_auto_increment must be in [0, 1), not {damp_auto_increment}")]
    DampAutoIncrement {
        /// The step asked for.
        damp_auto_increment: f64,
    },
    /// The exponent of the grid search's error norm must be positive and finite.
    #[error("mse must be a positive finite exponent (2.4 is usual), not {mse}")]
    Mse {
        /// The exponent asked for.
        mse: f32,
    },
    /// The strength of GPTAQ's correction must be finite and not negative.
    #[error("gptaq alpha must be finite and at least 0, not {alpha}")]
    GptaqAlpha {
        /// The strength asked for.
        alpha: f32,
    },
    /// Lazy updates need blocks of at least one column.
    #[error("block_size must be at least 1")]
    BlockSize,
    /// `desc_act` and `act_group_aware` are two orders of the same columns.
    #[error("desc_act and act_group_aware exclude each other")]
    TwoOrders,
}

/// A Cholesky factorisation met a pivot that is not positive.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("matrix is not positive definite: pivot {index} is {pivot:e}")]
pub struct NotPositiveDefinite {
    /// Row and column of the failing pivot, in the matrix as it was given.
    pub index: usize,
    /// The pivot's value; NaN where a factoriser does not tell.
    pub pivot: f64,
}

/// Any failure of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GptqError {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A weight with no rows or no columns.
    #[error("weight of shape ({rows}, {columns}) has no elements")]
    EmptyWeight {
        /// out_features.
        rows: usize,
        /// in_features.
        columns: usize,
    },
    /// The number of columns is not the one expected.
    #[error("{what} has {found} features where {expected} were expected")]
    Features {
        /// Which argument it was.
        what: &'static str,
        /// in_features expected.
        expected: usize,
        /// in_features found.
        found: usize,
    },
    /// Inputs and reference inputs must be the same tokens.
    #[error("{found} reference tokens for {expected} input tokens")]
    ReferenceTokens {
        /// Rows of the inputs.
        expected: usize,
        /// Rows of the reference inputs.
        found: usize,
    },
    /// GPTAQ needs the inputs of the unquantised model next to those of the quantised one.
    #[error(
        "GPTAQ needs reference inputs: use HessianAccumulator::with_reference and add_batch_with_reference"
    )]
    MissingReference,
    /// Reference inputs were given to an accumulator (or merged into one) that keeps none.
    #[error("this accumulator keeps no reference inputs: make it with HessianAccumulator::with_reference")]
    UnexpectedReference,
    /// NaN or infinity in the weight.
    #[error("weight[{row}, {column}] is {value}")]
    NonFiniteWeight {
        /// Output feature.
        row: usize,
        /// Input feature.
        column: usize,
        /// The value found.
        value: f32,
    },
    /// NaN or infinity in calibration inputs.
    #[error("{what}[{row}, {column}] is {value}")]
    NonFiniteInput {
        /// Which argument it was.
        what: &'static str,
        /// Token within the batch.
        row: usize,
        /// Input feature.
        column: usize,
        /// The value found.
        value: f32,
    },
    /// A Hessian was asked for before any token had been seen.
    #[error("no calibration samples")]
    NoSamples,
    /// The Hessian has a NaN or infinite element: inputs near the limits of float32 overflow when squared.
    #[error("Hessian[{row}, {column}] is {value}")]
    NonFiniteHessian {
        /// Row.
        row: usize,
        /// Column.
        column: usize,
        /// The value found.
        value: f64,
    },
    /// A Hessian that is not square or not symmetric.
    #[error("Hessian[{row}, {column}] differs from its mirror image, or is a negative diagonal element")]
    NotSymmetric {
        /// Row.
        row: usize,
        /// Column.
        column: usize,
    },
    /// No damping made the Hessian positive definite.
    #[error(
        "no damping up to {last_damp} of the mean diagonal makes the Hessian positive definite ({source})"
    )]
    NotPositiveDefinite {
        /// The largest damping tried.
        last_damp: f64,
        /// What the factorisation met at it.
        source: NotPositiveDefinite,
    },
    /// Group scales overflowed or the updates diverged, so that the codes would mean nothing.
    #[error("the scale of row {row}, group {group} is {scale}")]
    NonFiniteScale {
        /// Output feature.
        row: usize,
        /// Group of input features.
        group: usize,
        /// The value found.
        scale: f32,
    },
    /// Updates diverged, so that the codes would mean nothing.
    #[error("the loss of rows {first_row}.. is {loss}")]
    NonFiniteLoss {
        /// First row of the batch of rows that diverged.
        first_row: usize,
        /// Its loss.
        loss: f64,
    },
}
