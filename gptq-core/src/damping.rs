//! How much must be added to the diagonal before the Hessian can be factorised.

use crate::config::GptqConfig;
use crate::error::NotPositiveDefinite;
use crate::report::DampReport;

/// Diagonal floors tried when no damping below 1 suffices: `1e-6 * 10^(k - 1)` of the largest diagonal element.
const FLOORS: i32 = 6;

/// No damping sufficed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DampingFailure {
    /// The largest damping tried.
    pub last_damp: f64,
    /// What the factorisation met at it.
    pub source: NotPositiveDefinite,
}

/// Factorises with the smallest damping of the grid `d, d + increment, ... < 1` that suffices; if none does, with the
/// smallest diagonal floor with which one does.
///
/// `diagonal` is the Hessian's, dead columns already set to 1. `attempt` factorises the Hessian with the diagonal that it
/// is given in place of its own, in the same order; an error of its own, beside a matrix that is not positive definite,
/// ends the search. This is what [`Gptq::prepare`](crate::Gptq::prepare) does, for those who factorise elsewhere.
///
/// A larger damping keeps a matrix positive definite, so the grid is bisected, with the outcome of a linear walk.
///
/// # Errors
/// The outer error is `attempt`'s own; the inner one says that no damping sufficed.
pub fn factorize_damped<F, E>(
    config: &GptqConfig,
    diagonal: &[f64],
    mut attempt: impl FnMut(&[f64]) -> Result<Result<F, NotPositiveDefinite>, E>,
) -> Result<Result<(F, DampReport), DampingFailure>, E> {
    let mut grid = vec![config.damp_percent()];
    if config.damp_auto_increment() > 0.0 {
        // Summed step by step, as the references do, so that the grid has the same values.
        let mut damp = config.damp_percent() + config.damp_auto_increment();
        while damp < 1.0 {
            grid.push(damp);
            damp += config.damp_auto_increment();
        }
    }
    let largest = diagonal.iter().fold(0.0f64, |largest, d| largest.max(d.abs()));
    let floors = if config.damp_auto_increment() > 0.0 { FLOORS } else { 0 };
    let mut failure = None;
    for floor_step in 0..=floors {
        let floor = if floor_step == 0 { 0.0 } else { largest * 1e-6 * 10f64.powi(floor_step - 1) };
        match smallest(&grid, |damp| attempt(&damped(diagonal, damp, floor)))? {
            Ok((factor, raised)) => {
                let percent = grid[raised];
                let report = DampReport { percent, raised: raised as u32, floor };
                if report.raised > 0 || report.floor > 0.0 {
                    tracing::warn!(
                        asked = config.damp_percent(),
                        used = percent,
                        raised,
                        floor,
                        "Hessian was not positive definite: damping raised"
                    );
                }
                return Ok(Ok((factor, report)));
            }
            Err(source) => failure = Some(source),
        }
    }
    let source = failure.expect("invariant: the loop ran at least once and only failures reach this line");
    Ok(Err(DampingFailure { last_damp: grid[grid.len() - 1], source }))
}

/// The first index of `grid` whose damping suffices, and the factor with it.
fn smallest<F, E>(
    grid: &[f64],
    mut attempt: impl FnMut(f64) -> Result<Result<F, NotPositiveDefinite>, E>,
) -> Result<Result<(F, usize), NotPositiveDefinite>, E> {
    let first_failure = match attempt(grid[0])? {
        Ok(factor) => return Ok(Ok((factor, 0))),
        Err(failure) => failure,
    };
    let (mut fails, mut suffices) = (0, grid.len() - 1);
    if suffices == 0 {
        return Ok(Err(first_failure));
    }
    // Only the newest factor is kept: memory is worth more here than one more factorisation in a rare case.
    let mut newest = match attempt(grid[suffices])? {
        Ok(factor) => Some((factor, suffices)),
        Err(failure) => return Ok(Err(failure)),
    };
    while suffices - fails > 1 {
        newest = None;
        let middle = fails.midpoint(suffices);
        match attempt(grid[middle])? {
            Ok(factor) => {
                suffices = middle;
                newest = Some((factor, middle));
            }
            Err(_) => fails = middle,
        }
    }
    match newest {
        Some((factor, index)) if index == suffices => Ok(Ok((factor, index))),
        _ => Ok(attempt(grid[suffices])?.map(|factor| (factor, suffices))),
    }
}

/// The diagonal with `floor`, and `damp` times its mean, added to it.
fn damped(diagonal: &[f64], damp: f64, floor: f64) -> Vec<f64> {
    let floored = |d: &f64| (d + floor).max(floor);
    let mean = diagonal.iter().map(floored).sum::<f64>() / diagonal.len() as f64;
    diagonal.iter().map(|d| floored(d) + damp * mean).collect()
}
