use std::{marker::PhantomData, ops::RangeInclusive};

use gptq_format::{Bits, PackedLinear};

use crate::{
    DenseType, DenseWeight, Device, Epilogue, ErrorBound, Fusion, KernelError, MatMut, MatRef, Prologue,
    Unsupported, Workspace,
    in_order::{self, InOrder},
};

/// What a linear layer is, as far as the choice of a kernel depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LinearSpec {
    /// Input features, K.
    pub in_features: usize,
    /// Output features, N.
    pub out_features: usize,
    /// How the weight is stored.
    pub weight: WeightFormat,
    /// Whether a bias is added.
    pub bias: bool,
    /// What becomes of `x`.
    pub prologue: Prologue,
    /// What becomes of the product.
    pub epilogue: Epilogue,
}

/// How a linear layer stores its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// One float a weight.
    Dense(DenseType),
    /// GPTQ codes, scales and zeros.
    Gptq {
        /// Width of a code.
        bits: Bits,
        /// Nominal group size; `in_features` for one group.
        group_size: usize,
        /// Every zero point is `2^(bits-1)`.
        sym: bool,
        /// `g_idx` is not `i / group_size`.
        act_order: bool,
    },
}

impl LinearSpec {
    /// Columns of `y`.
    pub fn y_features(&self) -> usize {
        match self.epilogue {
            Epilogue::Store | Epilogue::Add => self.out_features,
            Epilogue::SiluMul => self.out_features / 2,
        }
    }

    /// Compares `x` and `y` with the layer: the first thing that [`forward`](Linear::forward) does.
    ///
    /// Errors: [`KernelError::Shape`].
    pub fn check_operands<D: Device>(&self, x: &MatRef<'_, D>, y: &MatMut<'_, D>) -> Result<(), KernelError> {
        let shape = |argument, rows, cols, got_rows, got_cols| {
            Err(KernelError::Shape { argument, rows, cols, got_rows, got_cols })
        };
        if x.cols() != self.in_features {
            return shape("x", x.rows(), self.in_features, x.rows(), x.cols());
        }
        if y.cols() != self.y_features() || y.rows() != x.rows() {
            return shape("y", x.rows(), self.y_features(), y.rows(), y.cols());
        }
        Ok(())
    }

    /// An error unless the layer multiplies `x` as it is: what kernels without prologues ask in
    /// [`supports`](LinearKernel::supports).
    pub fn only_loads(&self) -> Result<(), Unsupported> {
        match self.prologue {
            Prologue::Load => Ok(()),
            prologue => Err(Unsupported::Prologue { prologue }),
        }
    }

    /// An error unless the layer multiplies and does nothing else: what kernels without prologues and epilogues ask in
    /// [`supports`](LinearKernel::supports).
    pub fn only_multiplies(&self) -> Result<(), Unsupported> {
        self.only_loads()?;
        match self.epilogue {
            Epilogue::Store => Ok(()),
            epilogue => Err(Unsupported::Epilogue { epilogue }),
        }
    }

    /// The same layer with another beginning and end.
    #[must_use]
    pub fn fused(self, fusion: &Fusion<'_>) -> Self {
        Self { prologue: fusion.prologue(), epilogue: fusion.epilogue, ..self }
    }

    /// The spec of a packed layer.
    pub fn of(weight: &PackedLinear) -> Self {
        Self {
            in_features: weight.in_features(),
            out_features: weight.out_features(),
            weight: WeightFormat::Gptq {
                bits: weight.bits(),
                group_size: weight.group_size(),
                sym: weight.is_symmetric(),
                act_order: weight.is_act_order(),
            },
            bias: weight.bias().is_some(),
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        }
    }

    /// The spec of a packed layer that is prepared [in order](LinearKernel::prepare_in_order): of one that is not
    /// act-ordered, if there is such an order.
    pub fn of_in_order(weight: &PackedLinear) -> Self {
        let mut spec = Self::of(weight);
        if let WeightFormat::Gptq { act_order, .. } = &mut spec.weight {
            *act_order = *act_order && weight.group_order().is_none();
        }
        spec
    }

    /// The spec of a layer that `kernel` is to prepare, if it supports that.
    #[cfg(feature = "cuda")]
    pub(crate) fn supported<D: Device>(
        kernel: &impl LinearKernel<D>,
        weight: &PackedLinear,
        fusion: &Fusion<'_>,
    ) -> Result<Self, KernelError> {
        let spec = Self::of(weight).fused(fusion);
        let unsupported = |reason| KernelError::Unsupported { kernel: kernel.name(), reason };
        kernel.supports(&spec).map_err(unsupported)?;
        Ok(spec)
    }

    /// The spec of a dense layer of a weight `(out_features, in_features)` on the device, if `kernel` supports that.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_resident<D: Device>(
        kernel: &impl LinearKernel<D>,
        weight: MatRef<'_, D>,
        dtype: DenseType,
        bias: Option<&[f32]>,
    ) -> Result<Self, KernelError> {
        let (out_features, in_features) = (weight.rows(), weight.cols());
        let length = |field, got| KernelError::WeightLength { field, in_features, out_features, got };
        if out_features == 0 || in_features == 0 {
            return Err(length("weight", 0));
        }
        if let Some(bias) = bias.filter(|bias| bias.len() != out_features) {
            return Err(length("bias", bias.len()));
        }
        let spec = Self {
            in_features,
            out_features,
            weight: WeightFormat::Dense(dtype),
            bias: bias.is_some(),
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        };
        let unsupported = |reason| KernelError::Unsupported { kernel: kernel.name(), reason };
        kernel.supports(&spec).map_err(unsupported)?;
        Ok(spec)
    }

    /// That `kernel` cannot do layers of this shape.
    #[cfg(feature = "cuda")]
    pub(crate) fn shape_unsupported_by(&self, kernel: &'static str) -> KernelError {
        let &Self { in_features, out_features, .. } = self;
        KernelError::Unsupported { kernel, reason: Unsupported::Shape { in_features, out_features } }
    }

    /// The spec of a dense layer.
    pub fn of_dense(weight: &DenseWeight<'_>) -> Self {
        Self {
            in_features: weight.in_features,
            out_features: weight.out_features,
            weight: WeightFormat::Dense(weight.data.dtype()),
            bias: weight.bias.is_some(),
            prologue: Prologue::Load,
            epilogue: Epilogue::Store,
        }
    }
}

/// A way to multiply by the weights of linear layers on a device. A value exists only where it may run: constructors probe the
/// machine and return an [`Unsupported`].
pub trait LinearKernel<D: Device>: Send + Sync {
    /// Stable name, `device-isa-arithmetic`: `cpu-avx512-f32`.
    fn name(&self) -> &'static str;

    /// What tells this version of the kernel from others, one word, for [costs](crate::CostTable) that were measured with
    /// another; `None` if nobody says.
    fn version(&self) -> Option<String> {
        None
    }

    /// Whether [`prepare`](Self::prepare), or for dense weights [`prepare_dense`](Self::prepare_dense), accepts such a
    /// layer.
    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported>;

    /// Repacks the weight into a layout of this kernel's own, which only the returned value can read.
    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<D>>, KernelError>;

    /// [`prepare`](Self::prepare) for a layer that does something before or after the product.
    ///
    /// Most kernels only multiply; that is what the default does. Errors: [`KernelError::Unsupported`], and
    /// [`KernelError::WeightLength`] for a norm that does not fit the layer.
    fn prepare_fused(
        &self,
        weight: &PackedLinear,
        fusion: &Fusion<'_>,
    ) -> Result<Box<dyn Linear<D>>, KernelError> {
        let unsupported = |reason| KernelError::Unsupported { kernel: self.name(), reason };
        LinearSpec::of(weight).fused(fusion).only_multiplies().map_err(unsupported)?;
        self.prepare(weight)
    }

    /// [`prepare_fused`](Self::prepare_fused) for a caller who can have `x` written in any order: the result says by
    /// [`Linear::input_order`] in which order it wants the columns of `x`, and runs as fast as a layer that is not
    /// act-ordered. Bringing `x` into order within the layer costs a tenth to a quarter of its time on a GPU; where
    /// `x` is written, an order costs little ([`Backend::order`](crate::Backend::order)), and nothing at all if `x` comes out of another
    /// linear layer, whose outputs are permuted once ([`PackedLinear::with_output_order`]).
    ///
    /// The default sorts the input features by group ([`PackedLinear::group_order`]). A layer that is not act-ordered, that
    /// normalises `x`, or whose groups are of irregular sizes, wants `x` as it is. Errors: those of `prepare_fused`.
    ///
    /// ```
    /// use gptq_format::PackedLinear;
    /// use gptq_kernels::{Fusion, KernelError, LinearKernel, LinearSpec, MatMut, MatRef, Workspace, cpu::{self, Cpu}, select};
    ///
    /// fn multiply(weight: &PackedLinear, x: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    ///     let kernels = cpu::kernels();
    ///     let (kernel, _) = select(&kernels, &LinearSpec::of_in_order(weight), None)?;
    ///     let layer = kernel.prepare_in_order(weight, &Fusion::default())?;
    ///     // Whatever makes x, once for each row, does this as it writes it.
    ///     let x: Vec<f32> = match layer.input_order() {
    ///         Some(order) => order.iter().map(|&column| x[column as usize]).collect(),
    ///         None => x.to_vec(),
    ///     };
    ///     let (x, y) = (MatRef::new(&x[..], 1, x.len())?, MatMut::new(&mut y[..], 1, weight.out_features())?);
    ///     layer.forward(x, y, &mut Workspace::new(&Cpu, layer.workspace_len(1))?)
    /// }
    /// # use gptq_format::{Bits, CodesRef};
    /// # // Eight inputs in two groups, by turns; W[0, i] = scale * (code - 8) = 1, 2, 1, 2, ...
    /// # let weight = PackedLinear::pack(&CodesRef {
    /// #     bits: Bits::B4, group_size: 4, in_features: 8, out_features: 1, codes: &[9; 8], zeros: &[8; 2],
    /// #     scales: &[1.0, 2.0], g_idx: &[0, 1, 0, 1, 0, 1, 0, 1], bias: None,
    /// # }).expect("a layer");
    /// # let mut y = [0.0];
    /// # multiply(&weight, &[1.0, 10.0, 1.0, 10.0, 1.0, 10.0, 1.0, 100.0], &mut y)?;
    /// # assert_eq!(y, [4.0 + 2.0 * 130.0]);
    /// # Ok::<(), KernelError>(())
    /// ```
    fn prepare_in_order(
        &self,
        weight: &PackedLinear,
        fusion: &Fusion<'_>,
    ) -> Result<Box<dyn Linear<D>>, KernelError> {
        match in_order::sorted(weight, fusion) {
            Some((sorted, order)) => Ok(Box::new(InOrder::new(self.prepare_fused(&sorted, fusion)?, order))),
            None => self.prepare_fused(weight, fusion),
        }
    }

    /// As much of `fusion` as this kernel does for the layer `spec`, with what it said of the parts that it does not: who
    /// asks for it runs the rest by itself.
    fn fusible<'a>(&self, spec: &LinearSpec, fusion: Fusion<'a>) -> (Fusion<'a>, Option<Unsupported>) {
        let mut refused = None;
        for part in fusion.parts() {
            match self.supports(&spec.clone().fused(&part)) {
                Ok(()) => return (part, refused),
                Err(reason) => refused = refused.or(Some(reason)),
            }
        }
        (Fusion::default(), refused)
    }

    /// Copies a dense weight into a layout of this kernel's own, in the type it has.
    ///
    /// Most kernels do packed weights only; that is what the default says.
    fn prepare_dense(&self, weight: &DenseWeight<'_>) -> Result<Box<dyn Linear<D>>, KernelError> {
        let _ = weight;
        Err(KernelError::Unsupported { kernel: self.name(), reason: Unsupported::WeightFormat })
    }

    /// [`prepare_dense`](Self::prepare_dense) of a weight (out_features, in_features) that is on the device already, in its
    /// element type. Makes a copy.
    fn prepare_resident(
        &self,
        weight: MatRef<'_, D>,
        bias: Option<&[f32]>,
    ) -> Result<Box<dyn Linear<D>>, KernelError> {
        let _ = (weight, bias);
        Err(KernelError::Unsupported { kernel: self.name(), reason: Unsupported::WeightFormat })
    }

    /// How far a result may be from the exact product, derived from this kernel's arithmetic. The
    /// [conformance battery](crate::conformance) holds the kernel to it.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound;
}

/// Memory of a layer, by its address on the layer's device, which nothing writes as long as the layer is there.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) address: u64,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) bytes: usize,
    pub(crate) layer: PhantomData<&'a ()>,
}

/// A linear layer that is ready to run: the [`Prologue`] of `x`, `y = x W^T + bias`, quantised or dense, then the
/// [`Epilogue`].
///
/// Row invariance: row `r` of `y` depends on row `r` of `x` alone, to the bit. The position of a row, the other rows and
/// the number of threads change nothing; nor does the number of rows in a call, as long as it stays in one
/// [`row_class`](Self::row_class).
pub trait Linear<D: Device>: Send + Sync {
    /// What the layer is.
    fn spec(&self) -> &LinearSpec;

    /// Name of the kernel that runs it.
    fn kernel(&self) -> &'static str;

    /// The numbers of rows around `rows` that are computed with the same arithmetic: a row has the same bits in calls of any
    /// number of rows in that range. All numbers, unless a kernel does many rows in another way than few.
    fn row_class(&self, rows: usize) -> RangeInclusive<usize> {
        let _ = rows;
        0..=usize::MAX
    }

    /// The order in which [`forward`](Self::forward) takes the columns of `x`, if the layer was prepared
    /// [in order](LinearKernel::prepare_in_order): column `i` of `x` is that of the checkpoint's input feature `order[i]`. `None` if it
    /// takes them as they are in the checkpoint.
    fn input_order(&self) -> Option<&[u32]> {
        None
    }

    /// Bytes of weight, scales and zeros that one forward pass has to read.
    fn weight_bytes(&self) -> usize;

    /// What of the weight a call of few rows reads first, for what runs ahead of it; `None` if that is of no use.
    fn read_first(&self) -> Option<Span<'_>> {
        None
    }

    /// Elements of scratch that [`forward`](Self::forward) needs for `rows` rows.
    fn workspace_len(&self, rows: usize) -> usize;

    /// `y (rows, y_features) = epilogue(prologue(x (rows, in_features)) W^T + bias)`. Allocates nothing and, on a GPU, does not wait.
    ///
    /// Errors: [`KernelError::Shape`] if `x` or `y` does not fit the layer, [`KernelError::Workspace`] if the scratch
    /// is too small. Nothing has been written then.
    fn forward(
        &self,
        x: MatRef<'_, D>,
        y: MatMut<'_, D>,
        workspace: &mut Workspace<D>,
    ) -> Result<(), KernelError>;
}
