//! Every kernel of this machine passes the battery.

use gptq_kernels::{
    conformance,
    cpu::{self, Cpu},
};

#[test]
fn every_kernel_passes_the_battery() {
    let mut failed = Vec::new();
    for kernel in cpu::kernels() {
        let report = conformance::run(&Cpu, kernel.as_ref());
        println!("{}", report.to_string().lines().next().unwrap_or_default());
        if !report.passed() {
            failed.push(report.to_string());
        }
    }
    for (kernel, reason) in cpu::unavailable() {
        println!("{kernel}: not run, {reason}");
    }
    assert!(failed.is_empty(), "{}", failed.concat());
}

#[test]
fn the_reference_is_always_there_and_last() {
    let kernels = cpu::kernels();
    assert_eq!(kernels.last().map(|kernel| kernel.name()), Some("cpu-reference-f64"));
    assert!(kernels.iter().any(|kernel| kernel.name() == "cpu-portable-f32"));
}
