use gptq_format::{Bits, PackedLinear};

use super::*;
use crate::{Epilogue, ErrorBound, Linear, Prologue, WeightFormat, cpu::Cpu};

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
        prologue: Prologue::Load,
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
        vec![("narrow", PassedOver::Unsupported(Unsupported::Bits { bits: 4 })), ("slow", PassedOver::Later)]
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
    assert_eq!(selection.reason, Reason::Named);
    assert!(selection.others.contains(&("fast", PassedOver::NotNamed)));
}

#[test]
fn a_named_kernel_is_never_replaced() {
    let kernels = kernels();
    assert!(matches!(
        select(&kernels, &spec(), Some("narrow")),
        Err(KernelError::Unsupported { kernel: "narrow", reason: Unsupported::Bits { bits: 4 } })
    ));
    let Err(KernelError::UnknownKernel { name, available }) = select(&kernels, &spec(), Some("best")) else {
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

fn costs(points: &[(&str, usize, f64)]) -> CostTable {
    let mut table = CostTable::new("test");
    for &(kernel, rows, microseconds) in points {
        let LinearSpec { in_features, out_features, weight, .. } = spec();
        table.insert(CostPoint {
            kernel: kernel.to_owned(),
            in_features,
            out_features,
            weight,
            rows,
            microseconds,
        });
    }
    table
}

#[test]
fn the_cheapest_for_the_workload_is_taken() {
    let kernels = kernels();
    let table = costs(&[("fast", 1, 5.0), ("fast", 512, 900.0), ("slow", 1, 7.0), ("slow", 512, 300.0)]);
    let choose =
        |workload| Selector::new().costs(&table).workload(workload).select(&kernels, &spec()).unwrap();
    let (kernel, selection) = choose(Workload::rows(1));
    assert_eq!((kernel.name(), selection.reason), ("fast", Reason::Cheapest { microseconds: 5.0 }));
    assert!(selection.others.contains(&("slow", PassedOver::Slower { microseconds: 7.0 })));
    assert_eq!(choose(Workload::rows(512)).0.name(), "slow");
    // 300 us are worth 150 tokens.
    assert_eq!(choose(Workload::generation(512, 250)).0.name(), "slow");
    assert_eq!(choose(Workload::generation(512, 350)).0.name(), "fast");
    assert_eq!(
        choose(Workload::generation(512, 100)).1.to_string(),
        "slow (1000.0 us); not narrow: 4-bit weights are not supported; fast 1400.0 us"
    );
}

#[test]
fn without_costs_the_order_counts_and_it_is_said() {
    let kernels = kernels();
    let only_slow = costs(&[("slow", 1, 7.0)]);
    let (kernel, selection) = Selector::new().costs(&only_slow).select(&kernels, &spec()).unwrap();
    assert_eq!(kernel.name(), "slow");
    assert!(selection.others.contains(&("fast", PassedOver::Unmeasured)));
    let none = costs(&[]);
    let (kernel, selection) = Selector::new().costs(&none).select(&kernels, &spec()).unwrap();
    assert_eq!((kernel.name(), selection.reason), ("fast", Reason::Unmeasured));
    // A name beats costs.
    let (kernel, _) =
        Selector::new().costs(&only_slow).named(Some("fast")).select(&kernels, &spec()).unwrap();
    assert_eq!(kernel.name(), "fast");
}
