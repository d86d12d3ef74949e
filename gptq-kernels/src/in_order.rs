//! Act-ordered layers whose `x` comes in their own order: the same layer with its input features sorted by group, which is no
//! longer act-ordered.

use std::ops::RangeInclusive;

use gptq_format::PackedLinear;

use crate::{Device, Fusion, KernelError, Linear, LinearSpec, MatMut, MatRef, Span, Workspace};

/// The layer with its input features sorted by group, and their order; `None` if it takes them as they are. A norm adds up the
/// squares of `x` as it is, so that its layer does, too.
pub(crate) fn sorted(weight: &PackedLinear, fusion: &Fusion<'_>) -> Option<(PackedLinear, Vec<u32>)> {
    let order = match fusion.norm {
        None => weight.group_order()?,
        Some(_) => return None,
    };
    // A group order is a permutation of the layer's own inputs: a refusal would only mean that it takes them as they are.
    Some((weight.with_input_order(&order).ok()?, order))
}

/// A layer that was sorted.
pub(crate) struct InOrder<D: Device> {
    layer: Box<dyn Linear<D>>,
    order: Vec<u32>,
}

impl<D: Device> InOrder<D> {
    pub(crate) fn new(layer: Box<dyn Linear<D>>, order: Vec<u32>) -> Self {
        Self { layer, order }
    }
}

impl<D: Device> Linear<D> for InOrder<D> {
    fn spec(&self) -> &LinearSpec {
        self.layer.spec()
    }

    fn kernel(&self) -> &'static str {
        self.layer.kernel()
    }

    fn row_class(&self, rows: usize) -> RangeInclusive<usize> {
        self.layer.row_class(rows)
    }

    fn input_order(&self) -> Option<&[u32]> {
        Some(&self.order)
    }

    fn weight_bytes(&self) -> usize {
        self.layer.weight_bytes()
    }

    fn read_first(&self) -> Option<Span<'_>> {
        self.layer.read_first()
    }

    fn workspace_len(&self, rows: usize) -> usize {
        self.layer.workspace_len(rows)
    }

    fn forward(
        &self,
        x: MatRef<'_, D>,
        y: MatMut<'_, D>,
        workspace: &mut Workspace<D>,
    ) -> Result<(), KernelError> {
        self.layer.forward(x, y, workspace)
    }
}
