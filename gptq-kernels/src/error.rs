use crate::{Epilogue, LinearSpec, Prologue};

/// Why a kernel cannot run a layer, or cannot run on this machine at all.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// The CPU lacks an instruction set.
    #[error("the CPU lacks {feature}")]
    CpuFeature {
        /// Name of the feature, as `std::is_x86_feature_detected` spells it.
        feature: &'static str,
    },
    /// There is no CUDA driver on this machine.
    #[error("no CUDA driver (libcuda) on this machine")]
    NoDriver,
    /// There are fewer CUDA devices than that.
    #[error("no CUDA device {ordinal}; there are {devices}")]
    NoDevice {
        /// The device asked for.
        ordinal: usize,
        /// The devices there are.
        devices: usize,
    },
    /// The GPU is older than the kernel's instructions.
    #[error(
        "needs compute capability {}.{}, the device has {}.{}", needed.0, needed.1, got.0, got.1
    )]
    ComputeCapability {
        /// Major and minor that the kernel needs.
        needed: (u32, u32),
        /// Major and minor of the device.
        got: (u32, u32),
    },
    /// The driver is older than the PTX that ships with the kernel.
    #[error("the driver cannot load PTX image {image}: it needs a driver for CUDA 12.0 or later")]
    PtxTooNew {
        /// Name of the image.
        image: &'static str,
    },
    /// A library that the kernel calls is not installed, or not where the loader looks.
    #[error("the library {library} cannot be loaded")]
    Library {
        /// Its name, without prefix and suffix.
        library: &'static str,
    },
    /// The CUDA driver failed while the device was probed.
    #[error("{call}: {message}")]
    Driver {
        /// What was being done.
        call: &'static str,
        /// What the driver said.
        message: String,
    },
    /// The kernel does not do this width.
    #[error("{bits}-bit weights are not supported")]
    Bits {
        /// Width of the layer's codes.
        bits: u32,
    },
    /// The kernel does not do this group size.
    #[error("group_size {group_size} is not supported")]
    GroupSize {
        /// Nominal group size of the layer.
        group_size: usize,
    },
    /// Lazy blocks of this width do not fit in the device's shared memory, or are wider than any.
    #[error("block_size {block_size} is not supported")]
    BlockSize {
        /// Columns between two lazy updates.
        block_size: usize,
    },
    /// The kernel does not do this shape.
    #[error("in_features {in_features}, out_features {out_features} is not supported")]
    Shape {
        /// Input features.
        in_features: usize,
        /// Output features.
        out_features: usize,
    },
    /// The kernel takes other weights than these.
    #[error("weights of this format are not supported")]
    WeightFormat,
    /// The kernel does not end this way.
    #[error("epilogue {epilogue:?} is not supported for this layer")]
    Epilogue {
        /// What the layer does with its product.
        epilogue: Epilogue,
    },
    /// The kernel does not begin this way.
    #[error("prologue {prologue:?} is not supported for this layer")]
    Prologue {
        /// What the layer does with its input.
        prologue: Prologue,
    },
}

/// What can go wrong in preparing or running a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The kernel does not do such layers.
    #[error("kernel {kernel}: {reason}")]
    Unsupported {
        /// Name of the kernel.
        kernel: &'static str,
        /// Why not.
        reason: Unsupported,
    },
    /// No kernel of that name.
    #[error("no kernel is named {name:?}; there are {available:?}")]
    UnknownKernel {
        /// The name asked for.
        name: String,
        /// The names that exist on this machine.
        available: Vec<&'static str>,
    },
    /// No kernel of this device does such layers.
    #[error("no kernel supports {spec:?}: {reasons:?}")]
    NoKernel {
        /// The layer.
        spec: Box<LinearSpec>,
        /// What each kernel said.
        reasons: Vec<(&'static str, Unsupported)>,
    },
    /// Activations do not fit the layer.
    #[error("{argument} is {got_rows} x {got_cols}, the layer needs {rows} x {cols}")]
    Shape {
        /// `x` or `y`.
        argument: &'static str,
        /// Rows needed.
        rows: usize,
        /// Columns needed.
        cols: usize,
        /// Rows given.
        got_rows: usize,
        /// Columns given.
        got_cols: usize,
    },
    /// A matrix does not fit in its memory.
    #[error("a {rows} x {cols} matrix with row stride {row_stride} does not fit in {len} elements")]
    MatrixBounds {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Row stride in elements.
        row_stride: usize,
        /// Elements there are.
        len: usize,
    },
    /// The workspace is too small.
    #[error("workspace of {got} elements, {needed} are needed")]
    Workspace {
        /// Elements needed.
        needed: usize,
        /// Elements given.
        got: usize,
    },
    /// A dense weight, a bias or a norm has not as many elements as the layer's shape says, or none at all.
    #[error("{field} has {got} elements, the layer is {out_features} x {in_features}")]
    WeightLength {
        /// `weight`, `bias` or `norm`.
        field: &'static str,
        /// Input features.
        in_features: usize,
        /// Output features.
        out_features: usize,
        /// Elements given.
        got: usize,
    },
    /// Memory could not be had.
    #[error("no memory for {elements} elements")]
    OutOfMemory {
        /// Elements asked for.
        elements: usize,
    },
    /// Source and destination of a copy differ in length.
    #[error("copy of {src} elements into {dst}")]
    CopyLength {
        /// Elements of the source.
        src: usize,
        /// Elements of the destination.
        dst: usize,
    },
    /// A GPU could not load, launch or finish something. Errors of a kernel that has already been launched show up in a
    /// later call; the GPU's context stays unusable after them.
    #[error("{during}: {message}")]
    Gpu {
        /// The kernel or the driver's function.
        during: &'static str,
        /// What the driver said.
        message: String,
    },
    /// GPU memory could not be had.
    #[error("no GPU memory for {bytes} bytes; {free} of {total} are free")]
    OutOfGpuMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free.
        free: usize,
        /// Bytes there are.
        total: usize,
    },
    /// An index or extent is out of range.
    #[error("{what} {got}: must be below {limit}")]
    Argument {
        /// What the number is.
        what: &'static str,
        /// The number.
        got: usize,
        /// The first number that is too large.
        limit: usize,
    },
}
