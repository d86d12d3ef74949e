use std::fmt;

use super::Case;
use crate::Unsupported;

/// What the battery found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Cases that were run.
    pub run: usize,
    /// Cases that the kernel says it does not support, and why.
    pub skipped: Vec<(Case, Unsupported)>,
    /// Everything that is wrong.
    pub failures: Vec<Failure>,
    /// The largest error seen, in units of the kernel's own error bound: at most 1 if the kernel keeps it.
    pub worst: f64,
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The layer.
    pub case: Case,
    /// Rows of the call.
    pub rows: usize,
    /// What is wrong.
    pub defect: Defect,
}

/// In what way a kernel is wrong. Rows are those of the call, outputs are columns of `y`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Defect {
    /// A row has an error beyond the bound; its worst element.
    Inexact {
        /// Row.
        row: usize,
        /// Output.
        output: usize,
        /// What the kernel computed.
        got: f32,
        /// What the reference computed.
        exact: f64,
        /// The error in units of the bound.
        units: f64,
    },
    /// A row has an element that was not written, or is NaN.
    Unwritten {
        /// Row.
        row: usize,
        /// The first such output.
        output: usize,
    },
    /// Memory behind the columns of a row, or behind the last row, was written.
    Overrun {
        /// Row.
        row: usize,
    },
    /// A row differs between two equal calls.
    NotRepeatable {
        /// Row.
        row: usize,
    },
    /// A row depends on what other rows are in the call, or where it stands.
    RowVariant {
        /// Row.
        row: usize,
        /// The first output that differs.
        output: usize,
        /// Value in the largest call.
        batch: f32,
        /// Value in this call.
        part: f32,
    },
    /// A row depends on the number of threads.
    ThreadVariant {
        /// Row.
        row: usize,
        /// Threads of the call.
        threads: usize,
    },
    /// A call that must fail succeeded, or failed with another error; what was wrong with the call.
    Accepted(&'static str),
    /// A call that failed had written to `y`.
    WroteBeforeError(&'static str),
    /// `spec` or `kernel` of the prepared layer is not that of the weight and the kernel.
    Mislabelled,
    /// `supports` and `prepare` contradict each other.
    Contradiction(String),
    /// The stated bound is so loose that it would hide mistakes; its relative part.
    LooseBound(f64),
    /// An error where none should be.
    Error(String),
}

impl Report {
    /// Whether the kernel did every case that it supports, and there were some.
    pub fn passed(&self) -> bool {
        self.failures.is_empty() && self.run > 0
    }
}

impl fmt::Display for Report {
    /// A summary, then every failing row, those of one call on one line if they fail in the same way.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} cases run, {} not supported, {} failures, worst error {:.3} of the bound",
            self.kernel,
            self.run,
            self.skipped.len(),
            self.failures.len(),
            self.worst
        )?;
        let mut rest = &self.failures[..];
        while let Some((first, tail)) = rest.split_first() {
            let same = |other: &&Failure| {
                other.case == first.case
                    && other.rows == first.rows
                    && std::mem::discriminant(&other.defect) == std::mem::discriminant(&first.defect)
            };
            let more = tail.iter().take_while(same).count();
            write!(f, "  {}, {} rows: {:?}", first.case, first.rows, first.defect)?;
            if more > 0 {
                write!(f, ", and rows")?;
                tail[..more].iter().filter_map(|f| f.defect.row()).try_for_each(|row| write!(f, " {row}"))?;
            }
            writeln!(f)?;
            rest = &tail[more..];
        }
        Ok(())
    }
}

impl Defect {
    fn row(&self) -> Option<usize> {
        match *self {
            Self::Inexact { row, .. }
            | Self::Unwritten { row, .. }
            | Self::Overrun { row }
            | Self::NotRepeatable { row }
            | Self::RowVariant { row, .. }
            | Self::ThreadVariant { row, .. } => Some(row),
            _ => None,
        }
    }
}
