//! One battery of cases that every kernel of every device must pass.
//!
//! [`run`] prepares each [`Case`] with a kernel and checks, for every row of every call,
//!
//! - the error against the [float64 reference](crate::reference), in units of the bound that the kernel
//!   [states](crate::LinearKernel::error_bound) for its own arithmetic;
//! - that every element was written (outputs start as NaN) and nothing behind the rows (a strip of NaN must stay);
//! - that equal calls give equal bits, and that a row gives the same bits alone, in batches of 1, 2, 3, 5, 16 and all
//!   rows, at any place, and with 1 and 3 threads: in every [class of row counts](crate::Linear::row_class) by itself;
//! - that a [`Prologue`] begins and an [`Epilogue`] ends as it says;
//! - that operands of wrong shape and a workspace that is too small give their typed errors, and then nothing is written;
//! - that `supports` tells the truth, and the layer its name and spec.
//!
//! ```
//! use gptq_kernels::{conformance, cpu};
//!
//! let kernels = cpu::kernels();
//! let case = conformance::Case::all().swap_remove(1);
//! let report = conformance::run_cases(&cpu::Cpu, kernels[0].as_ref(), &[case]);
//! assert!(report.passed(), "{report}");
//! ```

mod case;
mod report;

pub use case::{Case, CaseWeight, Groups};
pub use report::{Defect, Failure, Report};

use std::ops::Range;

use case::{Data, Weight};

use crate::reference::{Exact, rms_norm};
use crate::{
    Device, Epilogue, ErrorBound, KernelError, Linear, LinearKernel, MatMut, MatRef, Prologue, Workspace,
};

/// A kernel whose stated relative error is larger than this proves nothing by keeping it: weights that are rounded to bfloat16
/// cost up to 2^-8, results another 2^-8.
pub const LOOSEST_BOUND: f64 = 1.0 / 96.0;

/// How much more a prologue may add: its result is rounded too.
const LOOSEST_PROLOGUE: f64 = LOOSEST_BOUND;

/// Half the distance of the subnormal numbers of fp16, the shortest type of activations.
const COARSEST_FLOOR: f64 = 1.0 / (1u64 << 25) as f64;

/// Elements behind each row of `y` that no kernel may touch.
const MARGIN: usize = 3;

/// Runs all cases.
pub fn run<D: Device>(device: &D, kernel: &dyn LinearKernel<D>) -> Report {
    run_cases(device, kernel, &Case::all())
}

/// Runs some cases.
pub fn run_cases<D: Device>(device: &D, kernel: &dyn LinearKernel<D>, cases: &[Case]) -> Report {
    let mut report =
        Report { kernel: kernel.name(), run: 0, skipped: Vec::new(), failures: Vec::new(), worst: 0.0 };
    for case in cases {
        let mut run = CaseRun { device, kernel, case, report: &mut report };
        if let Err(error) = run.case() {
            run.fail(case.rows, Defect::Error(error.to_string()));
        }
    }
    report
}

struct CaseRun<'a, D: Device> {
    device: &'a D,
    kernel: &'a dyn LinearKernel<D>,
    case: &'a Case,
    report: &'a mut Report,
}

/// The layer under test, with what it must compute.
struct Subject<'a, D: Device> {
    layer: &'a dyn Linear<D>,
    data: &'a Data,
    x: D::Buffer,
}

impl<D: Device> CaseRun<'_, D> {
    fn fail(&mut self, rows: usize, defect: Defect) {
        self.report.failures.push(Failure { case: self.case.clone(), rows, defect });
    }

    fn case(&mut self) -> Result<(), KernelError> {
        let rows = self.case.rows;
        let mut data = Data::new(self.case)?;
        let prepared = match &data.weight {
            Weight::Packed(packed) => self.kernel.prepare_fused(packed, &data.fusion(self.case)),
            dense @ Weight::Dense { .. } => match dense.as_dense() {
                Some(dense) => self.kernel.prepare_dense(&dense),
                None => return Ok(()),
            },
        };
        let layer = match (self.kernel.supports(&data.spec), prepared) {
            (Ok(()), Ok(layer)) => layer,
            (Err(reason), Err(KernelError::Unsupported { .. })) => {
                self.report.skipped.push((self.case.clone(), reason));
                return Ok(());
            }
            (supports, prepared) => {
                let prepared = prepared.map(|_| ());
                let text = format!("supports: {supports:?}, prepare: {prepared:?}");
                self.fail(rows, Defect::Contradiction(text));
                return Ok(());
            }
        };
        self.report.run += 1;
        if layer.spec() != &data.spec || layer.kernel() != self.kernel.name() {
            self.fail(rows, Defect::Mislabelled);
        }
        let bound = self.kernel.error_bound(&data.spec);
        let loose = bound.relative + bound.output;
        // The comparison is this way round so that a bound of NaN fails too.
        let loosest = match self.case.prologue {
            Prologue::Load => LOOSEST_BOUND,
            Prologue::RmsNorm => LOOSEST_BOUND + LOOSEST_PROLOGUE,
        };
        if !(loose <= loosest && bound.absolute <= f64::from(f32::EPSILON) && bound.floor <= COARSEST_FLOOR) {
            self.fail(rows, Defect::LooseBound(loose));
        }

        let mut x = self.device.alloc(data.x.len())?;
        self.device.upload(&data.x, D::slice_mut(&mut x, 0..data.x.len()))?;
        // What the device holds, after rounding to its element type, is what has to be multiplied.
        self.device.download(D::slice(&x, 0..data.x.len()), &mut data.x)?;
        if !data.norm.is_empty() {
            let mut norm = self.device.alloc(data.norm.len())?;
            self.device.upload(&data.norm, D::slice_mut(&mut norm, 0..data.norm.len()))?;
            self.device.download(D::slice(&norm, 0..data.norm.len()), &mut data.norm)?;
        }
        let subject = Subject { layer: layer.as_ref(), data: &data, x };

        for class in self.row_classes(&subject) {
            self.row_class(&subject, class)?;
        }
        self.call(&subject, 0, 0)?;
        self.bad_calls(&subject)
    }

    /// The classes of row counts up to the case's.
    fn row_classes(&mut self, subject: &Subject<'_, D>) -> Vec<Range<usize>> {
        let mut classes = Vec::new();
        let mut rows = self.case.rows;
        while rows > 0 {
            let class = subject.layer.row_class(rows);
            if !class.contains(&rows) {
                self.fail(rows, Defect::Contradiction(format!("{rows} rows are of class {class:?}")));
                break;
            }
            classes.push((*class.start()).max(1)..rows + 1);
            rows = class.start().saturating_sub(1);
        }
        classes
    }

    /// All checks of results, with numbers of rows in `class`.
    fn row_class(&mut self, subject: &Subject<'_, D>, class: Range<usize>) -> Result<(), KernelError> {
        let rows = class.end - 1;
        let whole = self.call(subject, 0, rows)?;
        self.exactness(subject, &whole);
        let again = self.call(subject, 0, rows)?;
        for row in differing(&whole, &again, self.case.y_features()) {
            self.fail(rows, Defect::NotRepeatable { row });
        }
        self.row_invariance(subject, &class, &whole)?;
        self.thread_invariance(subject, &class, &whole)
    }

    /// Runs rows `start .. start + rows`; returns `y`, and reports what was written where it must not be.
    fn call(&mut self, subject: &Subject<'_, D>, start: usize, rows: usize) -> Result<Vec<f32>, KernelError> {
        let (inputs, outputs) = (self.case.in_features, self.case.y_features());
        let stride = outputs + MARGIN;
        let mut y = vec![f32::NAN; rows * stride];
        if self.case.epilogue == Epilogue::Add {
            for (row, y) in y.chunks_mut(stride).enumerate() {
                y[..outputs].copy_from_slice(&subject.data.residual[(start + row) * outputs..][..outputs]);
            }
        }
        let mut buffer = self.device.alloc(y.len())?;
        self.device.upload(&y, D::slice_mut(&mut buffer, 0..y.len()))?;
        let mut workspace = Workspace::new(self.device, subject.layer.workspace_len(rows))?;
        subject.layer.forward(
            MatRef::new(D::slice(&subject.x, start * inputs..(start + rows) * inputs), rows, inputs)?,
            MatMut::with_stride(D::slice_mut(&mut buffer, 0..y.len()), rows, outputs, stride)?,
            &mut workspace,
        )?;
        self.device.download(D::slice(&buffer, 0..y.len()), &mut y)?;
        let mut packed = Vec::with_capacity(rows * outputs);
        for (row, y) in y.chunks(stride).enumerate() {
            let (y, margin) = y.split_at(outputs);
            if margin.iter().any(|value| !value.is_nan()) {
                self.fail(rows, Defect::Overrun { row });
            }
            if let Some(output) = y.iter().position(|value| value.is_nan()) {
                self.fail(rows, Defect::Unwritten { row, output });
            }
            packed.extend_from_slice(y);
        }
        Ok(packed)
    }

    fn exactness(&mut self, subject: &Subject<'_, D>, whole: &[f32]) {
        let outputs = self.case.y_features();
        let bound = self.kernel.error_bound(&subject.data.spec);
        for (row, y) in whole.chunks(outputs).enumerate() {
            let mut worst: Option<(f64, Defect)> = None;
            let x = self.multiplied(subject.data, row);
            for (output, &got) in y.iter().enumerate() {
                let (exact, allowed) = self.expected(subject.data, &bound, &x, row, output);
                let error = (f64::from(got) - exact).abs();
                let units = if error == 0.0 { 0.0 } else { error / allowed };
                if worst.as_ref().is_none_or(|(most, _)| units > *most) {
                    worst = Some((units, Defect::Inexact { row, output, got, exact, units }));
                }
            }
            if let Some((units, defect)) = worst {
                self.report.worst = self.report.worst.max(units);
                if units > 1.0 {
                    self.fail(self.case.rows, defect);
                }
            }
        }
    }

    /// What is multiplied in a row.
    fn multiplied(&self, data: &Data, row: usize) -> Vec<f64> {
        let x = &data.x[row * self.case.in_features..][..self.case.in_features];
        match self.case.prologue {
            Prologue::Load => x.iter().map(|&x| f64::from(x)).collect(),
            Prologue::RmsNorm => rms_norm(x, &data.norm, case::EPS),
        }
    }

    /// The exact value of an element, and how far from it a kernel with that bound may be; `x` is what is multiplied.
    fn expected(&self, data: &Data, bound: &ErrorBound, x: &[f64], row: usize, output: usize) -> (f64, f64) {
        let p = data.reference.element(x, output);
        match self.case.epilogue {
            Epilogue::Store => (p.y, bound.of(p.magnitude, p.y, p.weight_sum)),
            Epilogue::Add => {
                let before = f64::from(data.residual[row * self.case.out_features + output]);
                let y = before + p.y;
                (y, bound.of(p.magnitude + before.abs(), y, p.weight_sum))
            }
            Epilogue::SiluMul => {
                let up = data.reference.element(x, output + self.case.y_features());
                let silu = p.y / (1.0 + (-p.y).exp());
                // Errors of the products before the rounding of the result; the slope of silu is at most 1.1. Silu itself
                // in float32: the exponent is wrong by its own rounding, which is relative to |g|; the exponential, the
                // division and the product by some units.
                let inner = |p: &Exact| bound.relative * p.magnitude + bound.absolute * p.weight_sum;
                let (d_gate, d_up) = (inner(&p), inner(&up));
                let y = silu * up.y;
                let evaluation = y.abs() * (p.y.abs() + 8.0) * f64::from(f32::EPSILON);
                let propagated = 1.1 * d_gate * (up.y.abs() + d_up) + silu.abs() * d_up + evaluation;
                (y, propagated * (1.0 + bound.output) + bound.output * y.abs() + bound.floor)
            }
        }
    }

    /// Calls with parts of the rows, at changing places, and every row alone.
    fn row_invariance(
        &mut self,
        subject: &Subject<'_, D>,
        class: &Range<usize>,
        whole: &[f32],
    ) -> Result<(), KernelError> {
        let (all, outputs) = (class.end - 1, self.case.y_features());
        let parts = [2, 3, 5, 16, class.start].into_iter().filter(|&rows| rows < all);
        let parts = parts.flat_map(|rows| [(0, rows), (all - rows, rows), ((all - rows) / 2, rows)]);
        let alone = (0..all).step_by(all.div_ceil(33)).map(|row| (row, 1));
        for (start, rows) in parts.chain(alone).filter(|(_, rows)| class.contains(rows)) {
            let part = self.call(subject, start, rows)?;
            let batch = &whole[start * outputs..][..rows * outputs];
            for row in differing(batch, &part, outputs) {
                let at = row * outputs..(row + 1) * outputs;
                let pair = batch[at.clone()].iter().zip(&part[at]).enumerate();
                for (output, (&batch, &part)) in pair.filter(|(_, (a, b))| a.to_bits() != b.to_bits()).take(1)
                {
                    self.fail(rows, Defect::RowVariant { row, output, batch, part });
                }
            }
        }
        Ok(())
    }

    fn thread_invariance(
        &mut self,
        subject: &Subject<'_, D>,
        class: &Range<usize>,
        whole: &[f32],
    ) -> Result<(), KernelError> {
        let outputs = self.case.y_features();
        for threads in [1, 3] {
            let pool = match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
                Ok(pool) => pool,
                Err(error) => {
                    self.fail(self.case.rows, Defect::Error(format!("{threads} threads: {error}")));
                    continue;
                }
            };
            for rows in [class.start, class.end - 1] {
                let y = pool.install(|| self.call(subject, 0, rows))?;
                for row in differing(&whole[..rows * outputs], &y, outputs) {
                    self.fail(rows, Defect::ThreadVariant { row, threads });
                }
            }
        }
        Ok(())
    }

    /// Calls that must fail, and must not write.
    fn bad_calls(&mut self, subject: &Subject<'_, D>) -> Result<(), KernelError> {
        let (inputs, outputs) = (self.case.in_features, self.case.y_features());
        let rows = self.case.rows.min(2);
        let needed = subject.layer.workspace_len(rows);
        // What is wrong; rows and columns of x; of y; workspace
        let mut calls = vec![
            ("x has a column too few", (rows, inputs - 1), (rows, outputs), needed),
            ("y has a column too few", (rows, inputs), (rows, outputs - 1), needed),
            ("y has a column too many", (rows, inputs), (rows, outputs + 1), needed),
            ("y has a row too few", (rows, inputs), (rows - 1, outputs), needed),
            ("y has a row too many", (rows, inputs), (rows + 1, outputs), needed),
        ];
        if needed > 0 {
            calls.push(("the workspace is too small", (rows, inputs), (rows, outputs), needed - 1));
        }
        for (what, (x_rows, x_cols), (y_rows, y_cols), len) in calls {
            let mut y = vec![f32::NAN; y_rows * y_cols];
            let mut buffer = self.device.alloc(y.len())?;
            self.device.upload(&y, D::slice_mut(&mut buffer, 0..y.len()))?;
            let mut workspace = Workspace::new(self.device, len)?;
            let result = subject.layer.forward(
                MatRef::new(D::slice(&subject.x, 0..x_rows * x_cols), x_rows, x_cols)?,
                MatMut::new(D::slice_mut(&mut buffer, 0..y.len()), y_rows, y_cols)?,
                &mut workspace,
            );
            let right = match result {
                Err(KernelError::Workspace { needed: stated, got }) => {
                    len < needed && stated == needed && got == len
                }
                Err(KernelError::Shape { argument, .. }) => len == needed && what.starts_with(argument),
                Ok(()) | Err(_) => false,
            };
            if !right {
                self.fail(rows, Defect::Accepted(what));
            }
            self.device.download(D::slice(&buffer, 0..y.len()), &mut y)?;
            if y.iter().any(|value| !value.is_nan()) {
                self.fail(rows, Defect::WroteBeforeError(what));
            }
        }
        Ok(())
    }
}

/// Rows whose bits differ.
fn differing(a: &[f32], b: &[f32], cols: usize) -> Vec<usize> {
    let rows = a.chunks(cols).zip(b.chunks(cols)).enumerate();
    rows.filter(|(_, (a, b))| a.iter().zip(*b).any(|(a, b)| a.to_bits() != b.to_bits()))
        .map(|(row, _)| row)
        .collect()
}
