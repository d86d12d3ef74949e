use gptq_kernels::{
    Unsupported,
    cuda::{Activation, CudaDevice},
};

/// The first GPU, or `None` with a printed reason.
pub(crate) fn gpu<T: Activation>() -> Option<CudaDevice<T>> {
    match CudaDevice::new(0) {
        Ok(device) => Some(device),
        Err(reason @ (Unsupported::NoDriver | Unsupported::NoDevice { .. })) => {
            println!("skipped: {reason}");
            None
        }
        Err(reason) => panic!("there is a GPU, but {reason}"),
    }
}
