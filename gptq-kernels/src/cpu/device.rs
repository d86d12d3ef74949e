//! Host memory as the memory of a device.

use std::ops::Range;

use crate::{Device, KernelError};

/// The CPU: float32 activations in host memory, work spread over the current rayon thread pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Slice<'a> = &'a [f32];
    type SliceMut<'a> = &'a mut [f32];

    /// The processor's name for itself, and the number of threads.
    fn model(&self) -> String {
        format!("{}, {} threads", processor(), rayon::current_num_threads())
    }

    fn alloc(&self, len: usize) -> Result<Vec<f32>, KernelError> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| KernelError::OutOfMemory { elements: len })?;
        buffer.resize(len, 0.0);
        Ok(buffer)
    }

    fn upload(&self, src: &[f32], dst: &mut [f32]) -> Result<(), KernelError> {
        self.download(src, dst)
    }

    fn download(&self, src: &[f32], dst: &mut [f32]) -> Result<(), KernelError> {
        if src.len() != dst.len() {
            return Err(KernelError::CopyLength { src: src.len(), dst: dst.len() });
        }
        dst.copy_from_slice(src);
        Ok(())
    }

    fn synchronize(&self) -> Result<(), KernelError> {
        Ok(())
    }

    fn slice(buffer: &Vec<f32>, range: Range<usize>) -> &[f32] {
        &buffer[range]
    }

    fn slice_mut(buffer: &mut Vec<f32>, range: Range<usize>) -> &mut [f32] {
        &mut buffer[range]
    }

    fn reborrow<'a>(slice: &'a mut &mut [f32]) -> &'a mut [f32] {
        slice
    }

    fn as_slice<'a>(slice: &'a &mut [f32]) -> &'a [f32] {
        slice
    }

    fn len(slice: &&[f32]) -> usize {
        slice.len()
    }

    fn len_mut(slice: &&mut [f32]) -> usize {
        slice.len()
    }

    fn buffer_len(buffer: &Vec<f32>) -> usize {
        buffer.len()
    }
}

#[cfg(target_arch = "x86_64")]
fn processor() -> String {
    use std::arch::x86_64::__cpuid;
    // The brand string is three answers of four registers of four bytes.
    const LEAVES: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
    // Newer compilers call it safe.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has this instruction.
    let leaf = |leaf| unsafe { __cpuid(leaf) };
    if leaf(0x8000_0000).eax < LEAVES[2] {
        return "x86-64".to_owned();
    }
    let registers = LEAVES.map(leaf).map(|answer| [answer.eax, answer.ebx, answer.ecx, answer.edx]);
    let bytes: Vec<u8> = registers.iter().flatten().flat_map(|register| register.to_le_bytes()).collect();
    let text = String::from_utf8_lossy(&bytes);
    text.trim_matches('\0').split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> String {
    std::env::consts::ARCH.to_owned()
}
