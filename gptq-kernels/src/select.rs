use std::fmt;

use crate::{Device, KernelError, LinearKernel, LinearSpec, Unsupported};

/// Which kernel runs a layer, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// The layer.
    pub spec: LinearSpec,
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Whether it was asked for by name.
    pub by_name: bool,
    /// The other kernels, in the order of preference.
    pub others: Vec<(&'static str, PassedOver)>,
}

/// Why a kernel was not taken.
#[derive(Clone, Debug, PartialEq)]
pub enum PassedOver {
    /// It cannot do the layer.
    Unsupported(Unsupported),
    /// It can, and comes later in the order of preference.
    Later,
    /// It can, and another was asked for by name.
    NotNamed,
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = if self.by_name { "asked for by name" } else { "first that supports the layer" };
        write!(f, "{} ({why})", self.kernel)?;
        for (name, reason) in &self.others {
            match reason {
                PassedOver::Unsupported(reason) => write!(f, "; not {name}: {reason}")?,
                PassedOver::Later => write!(f, "; {name} comes later")?,
                PassedOver::NotNamed => write!(f, "; {name} is possible")?,
            }
        }
        Ok(())
    }
}

/// Chooses a kernel for a layer: of those that support it, the first; or the one called `name`.
///
/// `kernels` are in the order of preference, fastest first, as [`cpu::kernels`](crate::cpu::kernels) lists them by
/// measurement; put a kernel of your own wherever it belongs. The choice is returned with its reasons, and logged as a
/// `tracing` event of level debug.
///
/// Errors: [`KernelError::UnknownKernel`], [`KernelError::Unsupported`] if the named kernel cannot do the layer (another
/// is never taken in its place), [`KernelError::NoKernel`] with what each kernel said.
pub fn select<'k, D: Device>(
    kernels: &'k [Box<dyn LinearKernel<D>>],
    spec: &LinearSpec,
    name: Option<&str>,
) -> Result<(&'k dyn LinearKernel<D>, Selection), KernelError> {
    if let Some(name) = name
        && !kernels.iter().any(|kernel| kernel.name() == name)
    {
        let available = kernels.iter().map(|kernel| kernel.name()).collect();
        return Err(KernelError::UnknownKernel { name: name.to_owned(), available });
    }
    let mut chosen: Option<&'k dyn LinearKernel<D>> = None;
    let mut others = Vec::with_capacity(kernels.len());
    for kernel in kernels {
        let named = name.is_none_or(|name| name == kernel.name());
        match kernel.supports(spec) {
            Ok(()) if named && chosen.is_none() => chosen = Some(kernel.as_ref()),
            Ok(()) if named => others.push((kernel.name(), PassedOver::Later)),
            Ok(()) => others.push((kernel.name(), PassedOver::NotNamed)),
            Err(reason) if named && name.is_some() => {
                return Err(KernelError::Unsupported { kernel: kernel.name(), reason });
            }
            Err(reason) => others.push((kernel.name(), PassedOver::Unsupported(reason))),
        }
    }
    let Some(kernel) = chosen else {
        let reasons = others
            .into_iter()
            .filter_map(|(name, why)| match why {
                PassedOver::Unsupported(reason) => Some((name, reason)),
                PassedOver::Later | PassedOver::NotNamed => None,
            })
            .collect();
        return Err(KernelError::NoKernel { spec: Box::new(spec.clone()), reasons });
    };
    let selection = Selection { spec: spec.clone(), kernel: kernel.name(), by_name: name.is_some(), others };
    tracing::debug!(kernel = selection.kernel, ?spec, "{selection}");
    Ok((kernel, selection))
}

#[cfg(test)]
mod tests {
    use gptq_format::{Bits, PackedLinear};

    use super::*;
    use crate::{Epilogue, ErrorBound, Linear, WeightFormat, cpu::Cpu};

    struct Fake(&'static str, Option<Unsupported>);

    impl LinearKernel<Cpu> for Fake {
        fn name(&self) -> &'static str {
            self.0
        }
        fn supports(&self, _: &LinearSpec) -> Result<(), Unsupported> {
            self.1.clone().map_or(Ok(()), Err)
        }
        fn prepare(&self, _: &PackedLinear) -> Result<Box<dyn Linear<Cpu>>, KernelError> {
            Err(KernelError::Unsupported { kernel: self.0, reason: Unsupported::WeightFormat })
        }
        fn error_bound(&self, _: &LinearSpec) -> ErrorBound {
            ErrorBound::float32(1)
        }
    }

    fn spec() -> LinearSpec {
        LinearSpec {
            in_features: 64,
            out_features: 8,
            weight: WeightFormat::Gptq { bits: Bits::B4, group_size: 32, sym: true, act_order: false },
            bias: false,
            epilogue: Epilogue::Store,
        }
    }

    fn kernels() -> Vec<Box<dyn LinearKernel<Cpu>>> {
        vec![
            Box::new(Fake("narrow", Some(Unsupported::Bits { bits: 4 }))),
            Box::new(Fake("fast", None)),
            Box::new(Fake("slow", None)),
        ]
    }

    #[test]
    fn takes_the_first_that_can_and_says_why() {
        let kernels = kernels();
        let (kernel, selection) = select(&kernels, &spec(), None).unwrap();
        assert_eq!(kernel.name(), "fast");
        assert_eq!(
            selection.others,
            vec![
                ("narrow", PassedOver::Unsupported(Unsupported::Bits { bits: 4 })),
                ("slow", PassedOver::Later)
            ]
        );
        assert_eq!(
            selection.to_string(),
            "fast (first that supports the layer); not narrow: 4-bit weights are not supported; slow comes later"
        );
    }

    #[test]
    fn a_name_overrides_the_order() {
        let kernels = kernels();
        let (kernel, selection) = select(&kernels, &spec(), Some("slow")).unwrap();
        assert_eq!(kernel.name(), "slow");
        assert!(selection.by_name);
        assert!(selection.others.contains(&("fast", PassedOver::NotNamed)));
    }

    #[test]
    fn a_named_kernel_is_never_replaced() {
        let kernels = kernels();
        assert!(matches!(
            select(&kernels, &spec(), Some("narrow")),
            Err(KernelError::Unsupported { kernel: "narrow", reason: Unsupported::Bits { bits: 4 } })
        ));
        let Err(KernelError::UnknownKernel { name, available }) = select(&kernels, &spec(), Some("best"))
        else {
            panic!("an unknown name must be an error")
        };
        assert_eq!(name, "best");
        assert_eq!(available, ["narrow", "fast", "slow"]);
    }

    #[test]
    fn no_kernel_lists_every_reason() {
        let kernels: Vec<Box<dyn LinearKernel<Cpu>>> =
            vec![Box::new(Fake("narrow", Some(Unsupported::Bits { bits: 4 })))];
        let Err(KernelError::NoKernel { reasons, .. }) = select(&kernels, &spec(), None) else {
            panic!("no kernel supports the layer")
        };
        assert_eq!(reasons, vec![("narrow", Unsupported::Bits { bits: 4 })]);
    }
}
