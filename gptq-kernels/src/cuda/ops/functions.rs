use std::sync::{Mutex, OnceLock};

use super::kv::{DIMS, PageBytes};
use crate::{
    KernelError, KvFormat,
    cuda::{
        CudaDevice, Element,
        driver::{Function, Launch},
        images::get_or_load,
        pinned::Readback,
    },
};

/// Padded heads up to which there is `attention_decode`: its threads have a pair of features each, half of them of the new key and
/// half of the new value.
pub(super) const MOST_DECODE_DIM: usize = 128;

/// The decoder's kernels of one device, loaded when first used.
#[derive(Default)]
pub(in crate::cuda) struct Operations {
    rows: OnceLock<RowKernels>,
    /// For each format of keys and values.
    attention: [[OnceLock<AttentionKernels>; DIMS.len()]; 2],
    /// What `argmax` reads back through.
    pub(super) readback: Mutex<Option<Readback>>,
}

/// `ops.cu`
pub(super) struct RowKernels {
    pub(super) embed: Function,
    pub(super) rms_norm: Function,
    pub(super) add_rms_norm: Function,
    pub(super) rms_norm_ordered: Function,
    pub(super) add_rms_norm_ordered: Function,
    pub(super) reorder: Function,
    pub(super) add: Function,
    pub(super) silu_mul: Function,
    pub(super) gather: Function,
    pub(super) draw_greedy: Function,
    pub(super) draw_sampled: Function,
    pub(super) rope_append: Function,
}

/// `attention.cu`
pub(super) struct AttentionKernels {
    pub(super) prefill: Function,
    pub(super) prefill_shared: usize,
    /// Pages in shared memory.
    pub(super) stages: u32,
    /// May use all shared memory that a block can have; none for heads above [`MOST_DECODE_DIM`].
    pub(super) decode: Option<Function>,
    /// What stores keys and values as bytes.
    pub(super) append_bytes: Option<Function>,
}

impl<T: Element> CudaDevice<T> {
    pub(super) fn hopper(&self) -> bool {
        self.compute_capability() >= (9, 0)
    }

    fn image(&self, stem: &str) -> Result<String, KernelError> {
        self.needs((8, 0))
            .map_err(|reason| KernelError::Unsupported { kernel: "decoder operations", reason })?;
        Ok(format!("{stem}-{}", if self.hopper() { "sm90" } else { "sm80" }))
    }

    pub(super) fn row_kernels(&self) -> Result<&RowKernels, KernelError> {
        get_or_load(&self.operations().rows, || {
            let image = self.image(&format!("ops-{}", T::NAME))?;
            let load = |entry| self.images().function(&image, entry, 0);
            let load_for_rows = |entry| self.images().function(&image, entry, self.block_memory());
            Ok(RowKernels {
                embed: load("embed")?,
                rms_norm: load("rms_norm")?,
                add_rms_norm: load("add_rms_norm")?,
                rms_norm_ordered: load_for_rows("rms_norm_ordered")?,
                add_rms_norm_ordered: load_for_rows("add_rms_norm_ordered")?,
                reorder: load_for_rows("reorder")?,
                add: load("add")?,
                silu_mul: load("silu_mul")?,
                gather: load("gather")?,
                draw_greedy: load("draw_greedy")?,
                draw_sampled: load("draw_sampled")?,
                rope_append: load("rope_append")?,
            })
        })
    }

    /// Whether there is `attention_decode` for padded heads of that size and that format: bytes are decoded by `attention_prefill` on
    /// GPUs before Hopper.
    pub(super) fn decodes(&self, dim: usize, format: KvFormat) -> bool {
        dim <= MOST_DECODE_DIM && (format == KvFormat::Activations || self.hopper())
    }

    /// The attention kernels for heads of that size and keys and values of that format.
    ///
    /// Errors: [`KernelError::Argument`] if it is above 256.
    pub(super) fn attention_kernels(
        &self,
        head_dim: usize,
        format: KvFormat,
    ) -> Result<&AttentionKernels, KernelError> {
        let most = DIMS[DIMS.len() - 1];
        let index = DIMS.into_iter().position(|dim| head_dim <= dim);
        let too_large = KernelError::Argument { what: "head_dim", got: head_dim, limit: most + 1 };
        let index = index.ok_or(too_large)?;
        get_or_load(&self.operations().attention[usize::from(format == KvFormat::Int8)][index], || {
            let (dim, most) = (DIMS[index], self.shared_memory());
            let (prefill, decode) = match format {
                KvFormat::Activations => {
                    let image = self.image(&format!("attention-{}-{dim}", T::NAME))?;
                    (image.clone(), image)
                }
                KvFormat::Int8 => {
                    (format!("attention8-{}-{dim}", T::NAME), format!("decode8-{}-{dim}-sm90", T::NAME))
                }
            };
            // As `attention.cu` lays it out: queries, sums, and pages of keys and values.
            let PageBytes { keys, values } = PageBytes::new(format, dim);
            let page = keys + values;
            let fixed = 4 * 16 * dim * 2 + dim / 8 * 128 * 16;
            let stages = if fixed + 2 * page <= most { 2 } else { 1 };
            let prefill_shared = fixed + stages * page;
            let load = |image: &str, entry, shared| self.images().function(image, entry, shared);
            let decodes = self.decodes(dim, format);
            Ok(AttentionKernels {
                prefill: load(&prefill, "attention_prefill", prefill_shared)?,
                prefill_shared,
                stages: stages as u32,
                decode: decodes
                    .then(|| load(&decode, "attention_decode", self.block_memory()))
                    .transpose()?,
                append_bytes: match format {
                    KvFormat::Activations => None,
                    KvFormat::Int8 => Some(load(&prefill, "append_bytes", 0)?),
                },
            })
        })
    }

    /// Shared memory that a block can have besides the little of its own: of the decoding kernel, or for a row that changes its
    /// order.
    pub(super) fn block_memory(&self) -> usize {
        self.shared_memory().saturating_sub(256)
    }

    /// A launch of blocks that wait for the kernel before them by themselves where they can.
    pub(super) fn shape(&self, grid: (u32, u32), threads: u32, shared: usize) -> Launch {
        Launch { grid, threads, shared, cluster: 1, programmatic: self.hopper() }
    }
}
