mod cost;
mod file;
mod measure;

use std::fmt;

use crate::{Device, KernelError, LinearKernel, LinearSpec, Unsupported};

pub use cost::{CostPoint, CostTable, Workload};
pub use file::CostError;
pub use measure::{Measurement, cached_costs};

/// Which kernel runs a layer, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// The layer.
    pub spec: LinearSpec,
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Why this one.
    pub reason: Reason,
    /// The other kernels, in the order of preference.
    pub others: Vec<(&'static str, PassedOver)>,
}

/// Why a kernel was taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reason {
    /// It was asked for by name.
    Named,
    /// It is the first that can do the layer; no costs were given.
    First,
    /// It is the first that can do the layer; the costs that were given know no such layer.
    Unmeasured,
    /// It costs least.
    Cheapest {
        /// Microseconds for the whole workload.
        microseconds: f64,
    },
}

/// Why a kernel was not taken.
#[derive(Clone, Debug, PartialEq)]
pub enum PassedOver {
    /// It cannot do the layer.
    Unsupported(Unsupported),
    /// It can, and comes later in the order of preference.
    Later,
    /// It can, and costs more.
    Slower {
        /// Microseconds for the whole workload.
        microseconds: f64,
    },
    /// It can, and its cost is not known.
    Unmeasured,
    /// It can, and another was asked for by name.
    NotNamed,
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.kernel)?;
        match self.reason {
            Reason::Named => write!(f, "asked for by name)")?,
            Reason::First => write!(f, "first that supports the layer)")?,
            Reason::Unmeasured => write!(f, "first that supports the layer; no costs of such layers)")?,
            Reason::Cheapest { microseconds } => write!(f, "{microseconds:.1} us)")?,
        }
        for (name, reason) in &self.others {
            match reason {
                PassedOver::Unsupported(reason) => write!(f, "; not {name}: {reason}")?,
                PassedOver::Later => write!(f, "; {name} comes later")?,
                PassedOver::Slower { microseconds } => write!(f, "; {name} {microseconds:.1} us")?,
                PassedOver::Unmeasured => write!(f, "; {name} has no costs")?,
                PassedOver::NotNamed => write!(f, "; {name} is possible")?,
            }
        }
        Ok(())
    }
}

/// Chooses kernels for layers: by name, by cost, or by order.
///
/// ```
/// use gptq_kernels::{Device, CostTable, DenseType, Epilogue, LinearSpec, Prologue, Selector, WeightFormat, Workload, cpu};
///
/// # fn main() -> Result<(), gptq_kernels::KernelError> {
/// let spec = LinearSpec {
///     in_features: 64,
///     out_features: 64,
///     weight: WeightFormat::Dense(DenseType::F32),
///     bias: false,
///     prologue: Prologue::Load,
///     epilogue: Epilogue::Store,
/// };
/// let kernels = cpu::kernels();
/// // Costs of this machine: shipped, or measured here for the layers at hand.
/// let mut costs = CostTable::new(&cpu::Cpu.model());
/// costs.measure(&cpu::Cpu, &kernels, &spec, &[1, 16])?;
/// // A prompt of 16 tokens, then 8 tokens one by one.
/// let selector = Selector::new().costs(&costs).workload(Workload::generation(16, 8));
/// let (kernel, why) = selector.select(&kernels, &spec)?;
/// println!("{}: {why}", kernel.name());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Selector<'a> {
    name: Option<&'a str>,
    costs: Option<&'a CostTable>,
    workload: Workload,
}

impl<'a> Selector<'a> {
    /// Takes the first kernel that can do a layer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the kernel of that name and no other; `None` leaves the choice.
    #[must_use]
    pub fn named(self, name: Option<&'a str>) -> Self {
        Self { name, ..self }
    }

    /// Takes the cheapest kernel by this table. A kernel that the table does not know comes after all that it knows; if
    /// it knows none, the first kernel is taken.
    #[must_use]
    pub fn costs(self, costs: &'a CostTable) -> Self {
        Self { costs: Some(costs), ..self }
    }

    /// What the layer will have to do; one row a call, unless said otherwise. Only costs make a difference of it.
    #[must_use]
    pub fn workload(self, workload: Workload) -> Self {
        Self { workload, ..self }
    }

    /// The kernel for a layer, of `kernels` in the order of preference, with the reasons, which are also logged as a
    /// `tracing` event of level debug.
    ///
    /// Errors: [`KernelError::UnknownKernel`], [`KernelError::Unsupported`] if the named kernel cannot do the layer
    /// (another is never taken in its place), [`KernelError::NoKernel`] with what each kernel said.
    pub fn select<'k, D: Device>(
        &self,
        kernels: &'k [Box<dyn LinearKernel<D>>],
        spec: &LinearSpec,
    ) -> Result<(&'k dyn LinearKernel<D>, Selection), KernelError> {
        let (kernel, reason) = match self.name {
            Some(name) => (self.by_name(kernels, spec, name)?, Reason::Named),
            None => self.by_cost(kernels, spec)?,
        };
        let others = kernels.iter().filter(|other| other.name() != kernel.name());
        let others =
            others.map(|other| (other.name(), self.passed_over(other.as_ref(), spec, reason))).collect();
        let selection = Selection { spec: spec.clone(), kernel: kernel.name(), reason, others };
        tracing::debug!(kernel = selection.kernel, ?spec, "{selection}");
        Ok((kernel, selection))
    }

    fn by_name<'k, D: Device>(
        &self,
        kernels: &'k [Box<dyn LinearKernel<D>>],
        spec: &LinearSpec,
        name: &str,
    ) -> Result<&'k dyn LinearKernel<D>, KernelError> {
        let Some(kernel) = kernels.iter().find(|kernel| kernel.name() == name) else {
            let available = kernels.iter().map(|kernel| kernel.name()).collect();
            return Err(KernelError::UnknownKernel { name: name.to_owned(), available });
        };
        let unsupported = |reason| KernelError::Unsupported { kernel: kernel.name(), reason };
        kernel.supports(spec).map_err(unsupported)?;
        Ok(kernel.as_ref())
    }

    fn by_cost<'k, D: Device>(
        &self,
        kernels: &'k [Box<dyn LinearKernel<D>>],
        spec: &LinearSpec,
    ) -> Result<(&'k dyn LinearKernel<D>, Reason), KernelError> {
        let mut reasons = Vec::new();
        let mut first = None;
        let mut cheapest: Option<(f64, &'k dyn LinearKernel<D>)> = None;
        for kernel in kernels {
            match kernel.supports(spec) {
                Ok(()) => {
                    first = first.or(Some(kernel.as_ref()));
                    if let Some(cost) = self.cost(kernel.name(), spec)
                        && cheapest.is_none_or(|(least, _)| cost < least)
                    {
                        cheapest = Some((cost, kernel.as_ref()));
                    }
                }
                Err(reason) => reasons.push((kernel.name(), reason)),
            }
        }
        match (cheapest, first) {
            (Some((microseconds, kernel)), _) => Ok((kernel, Reason::Cheapest { microseconds })),
            (None, Some(kernel)) if self.costs.is_some() => Ok((kernel, Reason::Unmeasured)),
            (None, Some(kernel)) => Ok((kernel, Reason::First)),
            (None, None) => Err(KernelError::NoKernel { spec: Box::new(spec.clone()), reasons }),
        }
    }

    fn cost(&self, kernel: &str, spec: &LinearSpec) -> Option<f64> {
        self.costs?.estimate(kernel, spec, &self.workload)
    }

    fn passed_over<D: Device>(
        &self,
        kernel: &dyn LinearKernel<D>,
        spec: &LinearSpec,
        reason: Reason,
    ) -> PassedOver {
        if let Err(reason) = kernel.supports(spec) {
            return PassedOver::Unsupported(reason);
        }
        match (reason, self.cost(kernel.name(), spec)) {
            (Reason::Named, _) => PassedOver::NotNamed,
            (Reason::Cheapest { .. }, Some(microseconds)) => PassedOver::Slower { microseconds },
            (Reason::Cheapest { .. }, None) => PassedOver::Unmeasured,
            (Reason::First | Reason::Unmeasured, _) => PassedOver::Later,
        }
    }
}

/// Chooses a kernel for a layer: of those that support it, the first; or the one called `name`. Short for a [`Selector`]
/// without costs.
///
/// `kernels` are in the order of preference, fastest first at one row, as [`cpu::kernels`](crate::cpu::kernels) lists them
/// by measurement; put a kernel of your own wherever it belongs.
///
/// Errors: those of [`Selector::select`].
pub fn select<'k, D: Device>(
    kernels: &'k [Box<dyn LinearKernel<D>>],
    spec: &LinearSpec,
    name: Option<&str>,
) -> Result<(&'k dyn LinearKernel<D>, Selection), KernelError> {
    Selector::new().named(name).select(kernels, spec)
}

#[cfg(test)]
mod tests;
