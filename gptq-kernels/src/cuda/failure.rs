//! Failures of the driver, and of kernels that ran before they are told.

use std::{
    ffi::CStr,
    sync::{Mutex, PoisonError},
};

use cudarc::driver::{DriverError, sys};

use crate::KernelError;

/// The kernel that was launched last, by any thread: what is to blame, or came after it, if the GPU reports a failure later.
static LAST_LAUNCH: Mutex<&'static str> = Mutex::new("none");

/// Says that `kernel` is being launched.
pub(super) fn launching(kernel: &'static str) {
    // Of two that are launched at once either may be the last.
    if let Ok(mut last) = LAST_LAUNCH.try_lock() {
        *last = kernel;
    }
}

/// An error of the driver while `during` was being done. One of a kernel that ran before is told with the last kernel's name.
pub(super) fn gpu_error(during: &'static str, error: DriverError) -> KernelError {
    use sys::CUresult as E;
    let of_a_kernel = matches!(
        error.0,
        E::CUDA_ERROR_LAUNCH_FAILED
            | E::CUDA_ERROR_LAUNCH_TIMEOUT
            | E::CUDA_ERROR_ILLEGAL_ADDRESS
            | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | E::CUDA_ERROR_MISALIGNED_ADDRESS
            | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | E::CUDA_ERROR_INVALID_PC
            | E::CUDA_ERROR_HARDWARE_STACK_ERROR
            | E::CUDA_ERROR_ASSERT
    );
    let message = match of_a_kernel {
        true => {
            let last = *LAST_LAUNCH.lock().unwrap_or_else(PoisonError::into_inner);
            format!("{}; the last kernel launched is {last}", message(error))
        }
        false => message(error),
    };
    KernelError::Gpu { during, message }
}

/// What the driver calls an error, and how it explains it.
pub(super) fn message(error: DriverError) -> String {
    let text = |text: Result<&CStr, DriverError>| {
        text.map_or_else(|_| format!("error {}", error.0 as u32), |text| text.to_string_lossy().into_owned())
    };
    format!("{}, {}", text(error.error_name()), text(error.error_string()))
}
