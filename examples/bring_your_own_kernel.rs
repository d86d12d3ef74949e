//! A kernel of your own, held to the same contract as those of the library.
//!
//! The kernel below keeps a 4-bit layer as it is packed and decodes one output at a time. It says what it can do
//! (`supports`) and how exact it is (`error_bound`); the conformance battery then checks both claims, row by row, and
//! `select` takes it into the list beside the others.

use std::process::ExitCode;

use clap::Parser;
use gptq_examples::failure::{Failure, run};
use gptq_format::{Bits, PackedLinear};
use gptq_kernels::{
    Epilogue, ErrorBound, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Prologue,
    Unsupported, WeightFormat, Workspace, conformance,
    cpu::{self, Cpu},
    select,
};

/// Runs a kernel written in this file through the conformance battery, and lets `select` choose it.
#[derive(Parser)]
#[command(version)]
struct Args {}

const NAME: &str = "cpu-mine-f32";

/// The kernel: what can be prepared, and how exact the result is.
struct Mine;

/// A layer it has prepared.
struct MyLinear {
    spec: LinearSpec,
    weight: PackedLinear,
    zeros: Vec<u8>,
}

impl LinearKernel<Cpu> for Mine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        spec.only_multiplies()?;
        match spec.weight {
            WeightFormat::Gptq { bits: Bits::B4, .. } => Ok(()),
            WeightFormat::Gptq { bits, .. } => Err(Unsupported::Bits { bits: bits.get() }),
            WeightFormat::Dense(_) => Err(Unsupported::WeightFormat),
        }
    }

    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
        let spec = LinearSpec::of(weight);
        self.supports(&spec).map_err(|reason| KernelError::Unsupported { kernel: NAME, reason })?;
        Ok(Box::new(MyLinear { spec, zeros: weight.unpack_zeros(), weight: weight.clone() }))
    }

    /// One rounding where a weight meets its activation, and one for each addition that the product goes through: at most
    /// `in_features`, the bias among them. (`scale * (code - zero)` is exact in float32.)
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        ErrorBound::float32(1 + spec.in_features)
    }
}

impl MyLinear {
    /// One output for one row: a sum in the order of the features, whatever else is in the call. That is what makes the
    /// layer row invariant.
    fn element(&self, x: &[f32], o: usize) -> f32 {
        let outputs = self.spec.out_features;
        let mut sum = self.weight.bias().map_or(0.0, |bias| bias[o].to_f32());
        for (i, (&x, &group)) in x.iter().zip(self.weight.g_idx()).enumerate() {
            // Eight codes a word, packed along the input features.
            let code = self.weight.qweight()[i / 8 * outputs + o] >> (4 * (i % 8)) & 15;
            let at = group as usize * outputs + o;
            let w = self.weight.scales()[at].to_f32() * (code as f32 - f32::from(self.zeros[at]));
            sum += x * w;
        }
        sum
    }
}

impl Linear<Cpu> for MyLinear {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    fn weight_bytes(&self) -> usize {
        size_of_val(self.weight.qweight()) + size_of_val(self.weight.scales()) + self.zeros.len()
    }

    fn workspace_len(&self, _rows: usize) -> usize {
        0
    }

    fn forward(
        &self,
        x: MatRef<'_, Cpu>,
        mut y: MatMut<'_, Cpu>,
        _: &mut Workspace<Cpu>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
        let stride = y.row_stride();
        for (row, y) in y.data().chunks_mut(stride.max(1)).take(x.rows()).enumerate() {
            let x = &x.data()[row * x.row_stride()..][..self.spec.in_features];
            for (o, y) in y[..self.spec.out_features].iter_mut().enumerate() {
                *y = self.element(x, o);
            }
        }
        Ok(())
    }
}

#[allow(clippy::print_stdout, reason = "results go to stdout")]
fn body(_: Args) -> Result<(), Failure> {
    // The battery prints a summary line, and below it every failing row. Try it: leave out the bias, say, or `g_idx`.
    let report = conformance::run(&Cpu, &Mine);
    print!("{report}");
    if !report.passed() {
        return Err(format!("{NAME} has {} defects", report.failures.len()).into());
    }

    // Kernels are listed in the order of preference; this one stands in front, so that it is taken wherever it can be.
    let mut kernels = cpu::kernels();
    kernels.insert(0, Box::new(Mine));
    for bits in [Bits::B4, Bits::B8] {
        let weight = WeightFormat::Gptq { bits, group_size: 128, sym: true, act_order: false };
        let spec = LinearSpec {
            in_features: 256,
            out_features: 256,
            weight,
            bias: false,
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        };
        let (_, selection) = select(&kernels, &spec, None)?;
        println!("{} bits: {selection}", bits.get());
    }
    Ok(())
}

fn main() -> ExitCode {
    run(body)
}
