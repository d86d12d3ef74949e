//! `cuda-exllama`: layers of up to 8 bits and few rows, on CUDA cores. The kernel is `cuda/exllama.cu`.
//!
//! Eight rows are done in one pass over the weight; more rows take more passes. Every row is computed with the same
//! arithmetic. Codes of 2 and 3 bits are stored in 4, codes of 5 to 7 in 8: as fast as these, and as large on the GPU.
//!
//! # How it came to be
//!
//! The only version so far. On an H200 (image for compute capability 8.0), 4096 x 4096, fp16, groups of 128, in a CUDA graph
//! over rotated weights, 1 / 2 / 4 / 8 rows take 6.7 / 6.7 / 9.2 / 16.8 us; act-order and 8 bits with one row 8.0 and 7.0. Expected
//! were 6 / 6 / 7 / 10: a thread needs 3.1 instructions a weight for one row and 10 for eight, but with one feature a thread
//! also a load from shared memory for four of them. 64 registers for one row (32 bytes spilled; 8 bits: one block a
//! multiprocessor), 100 for two, 128 for four and for eight (44 bytes spilled).

use std::marker::PhantomData;

use gptq_format::PackedLinear;
use half::f16;
use rayon::prelude::*;

use super::{
    CudaDevice, Element,
    driver::{Function, Launch, Resident},
    plain::output_bound,
    repack::{feature_at, places, stored},
    units::{MOST_FEATURES, NONE, Order, check_grouping},
};
use crate::{
    Epilogue, ErrorBound, Fusion, KernelError, Linear, LinearKernel, LinearSpec, MatMut, MatRef, Unsupported,
    WeightFormat, Workspace,
};

pub(super) const NAME: &str = "cuda-exllama";

/// As in `exllama.cu`.
const LANES: usize = 32;
const WARPS: usize = 16;
const DEPTH: usize = 128;
/// Rows of one pass that the variants of the kernel do.
const VARIANTS: [usize; 4] = [1, 2, 4, 8];

pub(super) struct Exllama<T: Element> {
    device: CudaDevice<T>,
}

impl<T: Element> Exllama<T> {
    pub(super) fn new(device: &CudaDevice<T>) -> Result<Self, Unsupported> {
        device.needs((8, 0))?;
        Ok(Self { device: device.clone() })
    }
}

/// A weight repacked for `exllama.cu`: units of 32 output features x 128 input features.
///
/// ```text
/// codes                words of 8 codes of 4 bits or 4 of 8, the first lowest; four words side by side for every feature
/// scales, per group    fp16, 32 of them
/// zeros, per group     one byte each, if the layer is asymmetric
/// ```
struct Units {
    /// `(tiles, k_units)` units.
    bytes: Vec<u8>,
    /// Scale groups in a unit: 1, 2 or 4.
    groups: usize,
    asym: bool,
    tiles: usize,
    k_units: usize,
    gather: Option<Vec<u16>>,
    /// In the order of the tiles, padded.
    bias: Option<Vec<f16>>,
}

impl Units {
    fn pack(weight: &PackedLinear, epilogue: Epilogue) -> Self {
        let (bits, asym) = stored(weight);
        let (inputs, outputs) = (weight.in_features(), weight.out_features());
        let order = Order::best(weight.g_idx(), asym);
        let (k_units, groups) = (order.columns.len() / DEPTH, DEPTH / order.run);
        let tiles = places(outputs, epilogue).div_ceil(LANES);
        let (codes, zeros, scales) = (weight.unpack_codes(), weight.unpack_zeros(), weight.scales());
        let feature = |packed| feature_at(packed, outputs, epilogue);
        let code_bytes = LANES * DEPTH * bits / 8;
        let unit = code_bytes + groups * LANES * if asym { 3 } else { 2 };
        let mut bytes = vec![0; tiles * k_units * unit];
        bytes.par_chunks_mut(unit).enumerate().for_each(|(at, bytes)| {
            let (tile, u) = (at / k_units, at % k_units);
            let (code_bytes, rest) = bytes.split_at_mut(code_bytes);
            let (scale_bytes, zero_bytes) = rest.split_at_mut(groups * LANES * 2);
            for lane in 0..LANES {
                let Some(feature) = feature(tile * LANES + lane) else { continue };
                for (i, &column) in order.columns[u * DEPTH..][..DEPTH].iter().enumerate() {
                    if column != NONE {
                        let bit = i * bits;
                        code_bytes[(bit / 128 * LANES + lane) * 16 + bit % 128 / 8] |=
                            codes[feature * inputs + column as usize] << (bit % 8);
                    }
                }
                for local in 0..groups {
                    let group = order.groups[u * groups + local] as usize * outputs + feature;
                    let place = local * LANES + lane;
                    scale_bytes[place * 2..][..2].copy_from_slice(&scales[group].to_le_bytes());
                    if asym {
                        zero_bytes[place] = zeros[group];
                    }
                }
            }
        });
        let bias = weight.bias().map(|bias| {
            (0..tiles * LANES).map(|packed| feature(packed).map_or(f16::ZERO, |f| bias[f])).collect()
        });
        Self { bytes, groups, asym, tiles, k_units, gather: order.gather(inputs), bias }
    }
}

/// `ExllamaArgs` of `exllama.cu`.
#[repr(C)]
struct Args {
    units: u64,
    x: u64,
    y: u64,
    bias: u64,
    gather: u64,
    x_stride: u64,
    y_stride: u64,
    rows: u32,
    n: u32,
    k: u32,
    k_units: u32,
    groups: u32,
    asym: u32,
    epilogue: u32,
    x_vectors: u32,
}

struct ExllamaLinear<T> {
    spec: LinearSpec,
    /// One for each of [`VARIANTS`].
    functions: Vec<Function>,
    units: Resident,
    gather: Resident,
    bias: Resident,
    tiles: usize,
    k_units: usize,
    groups: usize,
    asym: bool,
    element: PhantomData<T>,
}

impl<T: Element> LinearKernel<CudaDevice<T>> for Exllama<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> Option<String> {
        super::image::version(&["exllama"])
    }

    fn supports(&self, spec: &LinearSpec) -> Result<(), Unsupported> {
        let WeightFormat::Gptq { group_size, .. } = spec.weight else {
            return Err(Unsupported::WeightFormat);
        };
        spec.only_loads()?;
        // Columns are 16-bit numbers.
        check_grouping(spec, group_size, MOST_FEATURES)
    }

    fn prepare(&self, weight: &PackedLinear) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        self.prepare_fused(weight, &Fusion::default())
    }

    fn prepare_fused(
        &self,
        weight: &PackedLinear,
        fusion: &Fusion<'_>,
    ) -> Result<Box<dyn Linear<CudaDevice<T>>>, KernelError> {
        let spec = LinearSpec::supported(self, weight, fusion)?;
        let units = Units::pack(weight, fusion.epilogue);
        let image = format!("exllama-{}-{}", T::NAME, stored(weight).0);
        let most = self.device.shared_memory();
        let function = |rows| self.device.images().function(&image, &format!("exllama_{rows}"), most);
        let stream = self.device.stream();
        Ok(Box::new(ExllamaLinear {
            functions: VARIANTS.into_iter().map(function).collect::<Result<_, _>>()?,
            units: Resident::new(stream, &units.bytes)?,
            gather: Resident::new(stream, units.gather.as_deref().unwrap_or_default())?,
            bias: Resident::new::<f16>(stream, units.bias.as_deref().unwrap_or_default())?,
            tiles: units.tiles,
            k_units: units.k_units,
            groups: units.groups,
            asym: units.asym,
            spec,
            element: PhantomData::<T>,
        }))
    }

    /// `code - zero`, the power of two and its product with an activation are exact. A product passes one rounding in its
    /// fused multiply-add and one in every later one of its unit, at most 128, then one for each group that its warp
    /// has, in every sixteenth unit; then those of the 16 warps, the bias and what the epilogue adds.
    fn error_bound(&self, spec: &LinearSpec) -> ErrorBound {
        // Groups of any size, as `g_idx` may have them, are padded to multiples of 32.
        let groups = match spec.weight {
            WeightFormat::Gptq { group_size, .. } => spec.in_features.div_ceil(group_size),
            WeightFormat::Dense(_) => 0,
        };
        let units = (spec.in_features + groups * 31).div_ceil(DEPTH);
        output_bound::<T>(ErrorBound::float32(DEPTH + 4 * units.div_ceil(WARPS) + WARPS + 2))
    }
}

impl<T: Element> Linear<CudaDevice<T>> for ExllamaLinear<T> {
    fn spec(&self) -> &LinearSpec {
        &self.spec
    }

    fn kernel(&self) -> &'static str {
        NAME
    }

    fn weight_bytes(&self) -> usize {
        [&self.units, &self.gather, &self.bias].map(Resident::bytes).iter().sum()
    }

    fn workspace_len(&self, _: usize) -> usize {
        0
    }

    fn forward(
        &self,
        x: MatRef<'_, CudaDevice<T>>,
        y: MatMut<'_, CudaDevice<T>>,
        _: &mut Workspace<CudaDevice<T>>,
    ) -> Result<(), KernelError> {
        self.spec.check_operands(&x, &y)?;
        let (rows, x_stride, y_stride) = (x.rows(), x.row_stride(), y.row_stride());
        let (x, y) = (x.data(), y.into_data());
        let x_vectors = x.address().is_multiple_of(8) && (rows <= 1 || x_stride.is_multiple_of(4));
        let mut start = 0;
        while start < rows {
            let count = (rows - start).min(VARIANTS[VARIANTS.len() - 1]);
            let variant = VARIANTS.partition_point(|&most| most < count);
            let mut args = Args {
                units: self.units.address(),
                x: x.address() + (start * x_stride * size_of::<T>()) as u64,
                y: y.address() + (start * y_stride * size_of::<T>()) as u64,
                bias: self.bias.address(),
                gather: self.gather.address(),
                x_stride: x_stride as u64,
                y_stride: y_stride as u64,
                rows: count as u32,
                n: self.spec.y_features() as u32,
                k: self.spec.in_features as u32,
                k_units: self.k_units as u32,
                groups: self.groups as u32,
                asym: u32::from(self.asym),
                epilogue: match self.spec.epilogue {
                    Epilogue::Store => 0,
                    Epilogue::Add => 1,
                    Epilogue::SiluMul => 2,
                },
                x_vectors: u32::from(x_vectors),
            };
            let launch = Launch {
                grid: (self.tiles as u32, 1),
                threads: (LANES * WARPS) as u32,
                shared: WARPS * VARIANTS[variant] * (DEPTH + LANES) * size_of::<f32>(),
                cluster: 1,
                programmatic: false,
            };
            // SAFETY: `Args` is `ExllamaArgs`. units, gather and bias are the layer's own memory, of the sizes that
            // `Units` gives them; `check_operands` has compared x and y, of these rows, with the layer; all of them
            // outlive the stream's work, because the caller may not free what a stream uses and `Resident` waits. The
            // stream is that of y.
            unsafe { self.functions[variant].launch(NAME, launch, y.stream(), &mut args) }?;
            start += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_format::{Bits, CodesRef};

    #[test]
    fn units_hold_the_layer() {
        for bits in [Bits::B3, Bits::B4, Bits::B8] {
            let (inputs, outputs, groups) = (130, 33, 130usize.div_ceil(32));
            let most = usize::from(bits.max_code()) + 1;
            let codes: Vec<u8> = (0..inputs * outputs).map(|i| (i * 7 % most) as u8).collect();
            let zeros: Vec<u8> = (0..groups * outputs).map(|i| (i * 5 % most) as u8).collect();
            let scales: Vec<f32> = (0..groups * outputs).map(|i| 1.0 + i as f32 / 256.0).collect();
            let packed = PackedLinear::pack(&CodesRef {
                bits,
                group_size: 32,
                in_features: inputs,
                out_features: outputs,
                codes: &codes,
                zeros: &zeros,
                scales: &scales,
                g_idx: &(0..inputs as u32).map(|i| i / 32).collect::<Vec<_>>(),
                bias: None,
            })
            .unwrap();
            let units = Units::pack(&packed, Epilogue::Store);
            assert_eq!((units.groups, units.asym, units.tiles, units.k_units), (4, true, 2, 2));
            let stored = if bits == Bits::B8 { 8 } else { 4 };
            let code_bytes = LANES * DEPTH * stored / 8;
            let unit = code_bytes + 4 * LANES * 3;
            assert_eq!(units.bytes.len(), 4 * unit);
            // Feature 32, input features 128 and 129: second tile, second unit, lane 0, the first two codes.
            let last = &units.bytes[3 * unit..];
            let word = u32::from_le_bytes([last[0], last[1], last[2], last[3]]);
            assert_eq!(word & ((1 << stored) - 1), u32::from(codes[32 * inputs + 128]));
            assert_eq!(word >> stored & ((1 << stored) - 1), u32::from(codes[32 * inputs + 129]));
            // Their group is the first of the unit.
            assert_eq!(last[code_bytes..][..2], packed.scales()[4 * outputs + 32].to_le_bytes());
            assert_eq!(last[code_bytes + 4 * LANES * 2], packed.unpack_zeros()[4 * outputs + 32]);
        }
    }
}
