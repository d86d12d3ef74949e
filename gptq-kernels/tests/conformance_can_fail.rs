//! The battery finds what is wrong with kernels that are wrong on purpose.

use std::{
    ops::RangeInclusive,
    sync::atomic::{AtomicUsize, Ordering},
};

use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::{
    Epilogue, ErrorBound, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Prologue,
    Unsupported, Workspace,
    conformance::{self, Case, CaseWeight, Defect, Groups, Report},
    cpu::{self, Cpu},
    reference::ReferenceKernel,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    ZeroOffByOne,
    ZeroOffByOneInLastOutput,
    IgnoresOrder,
    SkipsBias,
    RoundsToHalf,
    Nondeterministic,
    SumsByBatch,
    DependsOnThreads,
    LeavesLastColumn,
    LeavesLastRow,
    WritesBehindRow,
    AcceptsSmallWorkspace,
    AcceptsWrongShape,
    WritesBeforeChecking,
    ClaimsAnything,
    Mislabels,
    RefusesWhatItSupports,
    StoresInsteadOfAdding,
    LoadsInsteadOfNormalising,
    SumsByDeclaredClass,
    WrongInTheClassOfFewRows,
    MisstatesClass,
}

/// The portable kernel with one fault.
struct Faulty {
    fault: Fault,
    right: Box<dyn LinearKernel<Cpu>>,
}

struct FaultyLinear {
    fault: Fault,
    spec: LinearSpec,
    right: Box<dyn Linear<Cpu>>,
    calls: AtomicUsize,
}

impl Faulty {
    fn new(fault: Fault) -> Self {
        let right = cpu::kernels().into_iter().find(|kernel| kernel.name() == "cpu-portable-f32");
        let right = right.expect("every machine has the portable kernel");
        Self { fault, right }
    }
}

impl LinearKernel<Cpu> for Faulty {
    fn name(&self) -> &'static str {
        "cpu-portable-f32"
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        if self.fault == Fault::StoresInsteadOfAdding && spec.epilogue == Epilogue::Add {
            return Ok(());
        }
        if self.fault == Fault::LoadsInsteadOfNormalising && spec.epilogue == Epilogue::Store {
            return Ok(());
        }
        self.right.supports(spec)
    }

    fn prepare_fused(
        &self,
        w: &PackedLinear,
        fusion: &Fusion<'_>,
    ) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        let spec = LinearSpec::of(w).fused(fusion);
        self.supports(&spec).map_err(|reason| KernelError::Unsupported { kernel: self.name(), reason })?;
        let right = self.prepare(w)?;
        Ok(Box::new(FaultyLinear { fault: self.fault, spec, right, calls: AtomicUsize::new(0) }))
    }

    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        match self.fault {
            Fault::ClaimsAnything => ErrorBound { relative: 1.0, ..self.right.error_bound(spec) },
            _ => self.right.error_bound(spec),
        }
    }

    fn prepare(&self, w: &PackedLinear) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        if self.fault == Fault::RefusesWhatItSupports {
            return Err(KernelError::Unsupported { kernel: self.name(), reason: Unsupported::WeightFormat });
        }
        let (groups, outputs) = (w.groups(), w.out_features());
        let codes = w.unpack_codes();
        let bias: Option<Vec<f32>> = w.bias().map(|bias| bias.iter().map(|b| b.to_f32()).collect());
        let transposed = |o: usize, g: usize| g * outputs + o;
        let mut zeros: Vec<u8> = Vec::new();
        let mut scales: Vec<f32> = Vec::new();
        for o in 0..outputs {
            for g in 0..groups {
                zeros.push(w.unpack_zeros()[transposed(o, g)]);
                scales.push(w.scales()[transposed(o, g)].to_f32());
            }
        }
        let mut g_idx = w.g_idx().to_vec();
        match self.fault {
            Fault::ZeroOffByOne => zeros.iter_mut().for_each(|zero| *zero ^= 1),
            Fault::ZeroOffByOneInLastOutput => {
                if let Some(zero) = zeros.last_mut() {
                    *zero ^= 1;
                }
            }
            Fault::IgnoresOrder => {
                g_idx = (0..w.in_features() as u32).map(|i| i / w.group_size() as u32).collect()
            }
            _ => {}
        }
        let wrong = PackedLinear::pack(&CodesRef {
            bits: w.bits(),
            group_size: w.group_size(),
            in_features: w.in_features(),
            out_features: outputs,
            codes: &codes,
            zeros: &zeros,
            scales: &scales,
            g_idx: &g_idx,
            bias: if self.fault == Fault::SkipsBias { None } else { bias.as_deref() },
        })
        .expect("changed zeros are still below 2^bits");
        Ok(Box::new(FaultyLinear {
            fault: self.fault,
            spec: LinearSpec::of(w),
            right: self.right.prepare(&wrong)?,
            calls: AtomicUsize::new(0),
        }))
    }
}

impl Linear<Cpu> for FaultyLinear {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        if self.fault == Fault::Mislabels { "cpu-other" } else { "cpu-portable-f32" }
    }

    fn weight_bytes(&self) -> usize {
        self.right.weight_bytes()
    }

    fn row_class(&self, rows: usize) -> RangeInclusive<usize> {
        match self.fault {
            Fault::SumsByDeclaredClass | Fault::WrongInTheClassOfFewRows if rows <= 2 => 0..=2,
            Fault::SumsByDeclaredClass | Fault::WrongInTheClassOfFewRows => 3..=usize::MAX,
            Fault::MisstatesClass => 1..=2,
            _ => self.right.row_class(rows),
        }
    }

    fn workspace_len(&self, rows: usize) -> usize {
        self.right.workspace_len(rows)
    }

    fn forward(
        &self,
        x: MatRef<'_, Cpu>,
        mut y: MatMut<'_, Cpu>,
        workspace: &mut Workspace<Cpu>,
    ) -> Result<(), KernelError> {
        let (rows, cols, stride) = (y.rows(), y.cols(), y.row_stride());
        let calls = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.fault == Fault::WritesBeforeChecking && rows > 0 {
            y.data()[0] = 1.0;
        }
        if self.fault == Fault::AcceptsWrongShape && (y.cols() != self.spec.out_features || x.rows() != rows)
        {
            return Ok(());
        }
        if self.fault == Fault::AcceptsSmallWorkspace && workspace.len() < self.workspace_len(rows) {
            return Ok(());
        }
        // What lies where a faulty kernel does not write.
        let last = (rows > 0).then(|| match self.fault {
            Fault::LeavesLastColumn => Some((0..rows).map(|row| row * stride + cols - 1).collect::<Vec<_>>()),
            Fault::LeavesLastRow => Some(((rows - 1) * stride..(rows - 1) * stride + cols).collect()),
            _ => None,
        });
        let saved: Vec<(usize, f32)> =
            last.flatten().into_iter().flatten().map(|at| (at, y.data()[at])).collect();
        self.right.forward(x, y.reborrow(), workspace)?;
        let data = y.data();
        for (at, value) in saved {
            data[at] = value;
        }
        let up = |value: &mut f32| *value = value.next_up();
        match self.fault {
            Fault::RoundsToHalf => {
                for row in 0..rows {
                    for value in &mut data[row * stride..row * stride + cols] {
                        *value = f32::from_bits(value.to_bits() & 0xffff_e000);
                    }
                }
            }
            Fault::Nondeterministic if calls % 2 == 1 && rows > 0 => up(&mut data[0]),
            Fault::WrongInTheClassOfFewRows if rows == 2 => data[0] += 1.0,
            Fault::SumsByDeclaredClass if rows > 2 => (0..rows).for_each(|row| up(&mut data[row * stride])),
            Fault::SumsByBatch if rows > 2 => up(&mut data[2 * stride]),
            Fault::DependsOnThreads if rayon::current_num_threads() == 3 && rows > 0 => up(&mut data[0]),
            Fault::WritesBehindRow if rows > 0 => data[cols] = 0.0,
            _ => {}
        }
        Ok(())
    }
}

/// Cases that suffice to show every fault: bias, act-order, asymmetric, more than two rows.
fn cases() -> Vec<Case> {
    let weight = |group_size, sym, groups| CaseWeight::Packed { bits: Bits::B4, group_size, sym, groups };
    let case = |weight, bias, epilogue| Case {
        in_features: 200,
        out_features: 70,
        weight,
        bias,
        rows: 17,
        prologue: Prologue::Load,
        epilogue,
    };
    let in_order = weight(Some(128), true, Groups::InOrder);
    vec![
        case(weight(Some(32), false, Groups::ActOrder), true, Epilogue::Store),
        case(in_order, false, Epilogue::Store),
        case(in_order, false, Epilogue::Add),
        case(weight(Some(32), false, Groups::InOrder), true, Epilogue::SiluMul),
        Case { prologue: Prologue::RmsNorm, ..case(in_order, true, Epilogue::Store) },
    ]
}

fn report(fault: Fault) -> Report {
    conformance::run_cases(&Cpu, &Faulty::new(fault), &cases())
}

/// The battery must fail, and every defect it reports for the first case must be of the kind that `expected` matches.
fn finds(fault: Fault, expected: impl Fn(&Defect) -> bool) {
    let report = report(fault);
    assert!(!report.passed(), "{fault:?} went unnoticed");
    assert!(
        report.failures.iter().any(|failure| expected(&failure.defect)),
        "{fault:?} was taken for something else: {report}"
    );
}

#[test]
fn the_kernel_without_fault_passes() {
    let report = report(Fault::None);
    assert!(report.passed(), "{report}");
    assert_eq!((report.run, report.skipped.len()), (2, 3));
}

#[test]
fn a_kernel_that_does_everything_passes() {
    let report = conformance::run_cases(&Cpu, &ReferenceKernel, &cases());
    assert!(report.passed(), "{report}");
    assert_eq!(report.run, 5);
}

#[test]
fn wrong_numbers() {
    for fault in [
        Fault::ZeroOffByOne,
        Fault::ZeroOffByOneInLastOutput,
        Fault::IgnoresOrder,
        Fault::SkipsBias,
        Fault::RoundsToHalf,
    ] {
        finds(fault, |defect| matches!(defect, Defect::Inexact { .. }));
    }
}

#[test]
fn an_error_in_one_output_names_it() {
    finds(Fault::ZeroOffByOneInLastOutput, |defect| matches!(defect, Defect::Inexact { output: 69, .. }));
}

#[test]
fn results_that_change() {
    finds(Fault::Nondeterministic, |defect| matches!(defect, Defect::NotRepeatable { row: 0 }));
    finds(Fault::SumsByBatch, |defect| matches!(defect, Defect::RowVariant { .. }));
    finds(Fault::DependsOnThreads, |defect| matches!(defect, Defect::ThreadVariant { row: 0, threads: 3 }));
}

#[test]
fn classes_of_row_counts() {
    let report = report(Fault::SumsByDeclaredClass);
    assert!(report.passed(), "{report}");
    finds(Fault::WrongInTheClassOfFewRows, |defect| matches!(defect, Defect::Inexact { row: 0, .. }));
    finds(Fault::MisstatesClass, |defect| matches!(defect, Defect::Contradiction(_)));
}

#[test]
fn wrong_beginnings_and_ends() {
    finds(Fault::StoresInsteadOfAdding, |defect| matches!(defect, Defect::Inexact { .. }));
    finds(Fault::LoadsInsteadOfNormalising, |defect| matches!(defect, Defect::Inexact { .. }));
}

#[test]
fn wrong_writes() {
    finds(Fault::LeavesLastColumn, |defect| matches!(defect, Defect::Unwritten { output: 69, .. }));
    finds(Fault::LeavesLastRow, |defect| matches!(defect, Defect::Unwritten { row: 16, output: 0 }));
    finds(Fault::WritesBehindRow, |defect| matches!(defect, Defect::Overrun { row: 0 }));
}

#[test]
fn bad_calls_that_are_accepted() {
    finds(Fault::AcceptsSmallWorkspace, |defect| *defect == Defect::Accepted("the workspace is too small"));
    finds(Fault::AcceptsWrongShape, |defect| *defect == Defect::Accepted("y has a row too few"));
    finds(Fault::WritesBeforeChecking, |defect| matches!(defect, Defect::WroteBeforeError(_)));
}

#[test]
fn false_claims() {
    finds(Fault::ClaimsAnything, |defect| *defect == Defect::LooseBound(1.0));
    finds(Fault::Mislabels, |defect| *defect == Defect::Mislabelled);
    finds(Fault::RefusesWhatItSupports, |defect| matches!(defect, Defect::Contradiction(_)));
}

#[test]
fn every_failing_row_is_listed() {
    let report = report(Fault::SkipsBias);
    let rows: Vec<usize> = report
        .failures
        .iter()
        .filter_map(|failure| match failure.defect {
            Defect::Inexact { row, .. } => Some(row),
            _ => None,
        })
        .collect();
    // A missing bias is wrong in every row, that of zeros among them.
    assert_eq!(rows, (0..17).collect::<Vec<_>>());
    assert!(report.to_string().contains("rows 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"), "{report}");
}

#[test]
fn a_kernel_that_supports_nothing_has_not_passed() {
    let report = conformance::run_cases(&Cpu, &Faulty::new(Fault::None), &[]);
    assert!(!report.passed());
}
