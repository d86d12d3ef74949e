//! `--device` of the examples: a job that runs on any backend, and the backend that the command line asks for.

use clap::{Args, ValueEnum};
use gptq_kernels::{KvFormat, cpu::Cpu, quantize::QuantizeBackend};

use crate::{failure::Failure, host_memory};

/// Where a model runs.
#[derive(Args, Clone, Copy, Debug)]
pub struct DeviceArgs {
    /// Where the model runs; cuda needs an example built with `--features cuda`, and a GPU
    #[arg(long, value_enum, default_value_t = Place::Cpu, value_name = "DEVICE")]
    pub device: Place,
    /// Type of activations and caches on a GPU; the CPU has float32. With fp32 a GPU is as exact, and slower [default: fp16;
    /// fp32 for quantising]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub activations: Option<Activations>,
}

/// `--kv` of the examples that have a cache.
#[derive(Args, Clone, Copy, Debug)]
pub struct KvArgs {
    /// What keys and values are kept as
    #[arg(long, value_enum, default_value_t = Kv::Activations, value_name = "TYPE")]
    pub kv: Kv,
}

/// Types of keys and values in a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kv {
    /// That of the activations.
    Activations,
    /// A byte, with a scale for each token and head: about half of the memory.
    Int8,
}

impl From<KvArgs> for KvFormat {
    fn from(args: KvArgs) -> Self {
        match args.kv {
            Kv::Activations => Self::Activations,
            Kv::Int8 => Self::Int8,
        }
    }
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Place {
    /// This machine's processor.
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
}

/// Types of activations on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    /// IEEE half.
    Fp16,
    /// bfloat16.
    Bf16,
    /// IEEE single.
    Fp32,
}

/// What an example does, on any device.
pub trait Job {
    /// Activations on a GPU, unless the command line says which.
    const ACTIVATIONS: Activations = Activations::Fp16;

    /// Does it.
    fn run<D: QuantizeBackend>(&self, device: D, machine: &Machine) -> Result<(), Failure>;
}

/// What only the kind of device knows.
pub struct Machine {
    used: Box<dyn Fn() -> Option<u64>>,
    /// Whether the device is a GPU.
    pub gpu: bool,
}

impl Machine {
    /// Bytes of memory that the model takes: of this process on the CPU, on a GPU what has been taken since the device was
    /// opened. `None` where the system does not tell.
    pub fn used_bytes(&self) -> Option<u64> {
        (self.used)()
    }
}

impl DeviceArgs {
    /// Runs the job on the device.
    pub fn run(&self, job: &impl Job) -> Result<(), Failure> {
        match self.device {
            Place::Cpu => job.run(Cpu, &Machine { used: Box::new(host_memory::resident), gpu: false }),
            Place::Cuda => self.run_on_gpu(job),
        }
    }

    #[cfg(feature = "cuda")]
    fn run_on_gpu<J: Job>(&self, job: &J) -> Result<(), Failure> {
        use gptq_kernels::cuda::{Activation, CudaDevice};

        fn on<T: Activation>(job: &impl Job) -> Result<(), Failure>
        where
            CudaDevice<T>: QuantizeBackend,
        {
            let device = CudaDevice::<T>::new(0)?;
            let context = std::sync::Arc::clone(device.stream().context());
            let free = move || context.mem_get_info().ok().map(|(free, _)| free as u64);
            let before = free();
            let used = move || Some(before?.saturating_sub(free()?));
            job.run(device, &Machine { used: Box::new(used), gpu: true })
        }
        match self.activations.unwrap_or(J::ACTIVATIONS) {
            Activations::Fp16 => on::<half::f16>(job),
            Activations::Bf16 => on::<half::bf16>(job),
            Activations::Fp32 => on::<f32>(job),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn run_on_gpu(&self, _: &impl Job) -> Result<(), Failure> {
        Err("--device cuda: this example was built without it; build with --features cuda".into())
    }
}
