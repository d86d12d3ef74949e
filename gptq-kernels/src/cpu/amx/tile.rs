use std::{
    arch::{
        asm,
        x86_64::{__cpuid_count, _MM_HINT_T0, _mm_prefetch},
    },
    marker::PhantomData,
    sync::OnceLock,
};

use crate::{
    Unsupported,
    cpu::{
        avx512::Avx512,
        layout::{Line, TILE, TILES},
    },
};

/// Most rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Input features of one tile multiplication: 32 bfloat16 numbers fill a row of 64 bytes.
pub(super) const STEP: usize = 32;
/// Parts of an activation.
pub(super) const PARTS: usize = 3;

/// Pairs of neighbouring weights as bfloat16 for the outputs of a block.
pub(super) type PairRow = [Line; TILES];
/// A tile of results: rows of activations x outputs.
pub(super) type Sums = [[f32; TILE]; TILE_ROWS];

/// Tile registers with bfloat16 multiplication, and AVX-512F and BW beside them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amx(Avx512);

impl Amx {
    /// Asks the CPU and the operating system, once per process.
    ///
    /// Errors: [`Unsupported::CpuFeature`].
    pub(super) fn new() -> Result<Self, Unsupported> {
        static PROBED: OnceLock<Result<Amx, Unsupported>> = OnceLock::new();
        PROBED.get_or_init(probe).clone()
    }

    /// The vector instructions.
    pub(super) fn vectors(self) -> Avx512 {
        self.0
    }

    /// Configures this thread's tiles for activations of `rows` <= 16 rows.
    pub(super) fn configure(self, rows: usize) -> Tiles {
        assert!((1..=TILE_ROWS).contains(&rows), "{rows} rows in a tile");
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..7].fill(rows as u8);
        config.rows[7] = TILE_ROWS as u8;
        // SAFETY: AMX-TILE exists and the kernel lets this process use it (`probe`); `config` is 64 bytes with palette 1,
        // at most 16 rows and 64 bytes a row, so the instruction cannot fault. The compiler uses no tile register.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags));
        }
        Tiles { rows, thread: PhantomData }
    }
}

/// Operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

fn probe() -> Result<Amx, Unsupported> {
    let vectors = Avx512::new()?;
    if !is_x86_feature_detected!("avx512bw") {
        return Err(Unsupported::CpuFeature { feature: "avx512bw" });
    }
    // Structured extended features, EDX: bit 22 is AMX-BF16, bit 24 AMX-TILE.
    let edx = __cpuid_count(7, 0).edx;
    for (bit, feature) in [(24, "amx-tile"), (22, "amx-bf16")] {
        if edx & 1 << bit == 0 {
            return Err(Unsupported::CpuFeature { feature });
        }
    }
    if !allowed() {
        return Err(Unsupported::CpuFeature { feature: "permission of the operating system for amx-tile" });
    }
    Ok(Amx(vectors))
}

/// Asks Linux for permission to use tile data, which it gives per process (`ARCH_REQ_XCOMP_PERM`, since 5.16).
#[cfg(target_os = "linux")]
fn allowed() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: the x86-64 system call convention: number in rax, arguments in rdi and rsi, rcx and r11 are overwritten. This
    // call takes no pointers and only lets the process use more of the register state; an old kernel returns an error.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM,
             in("rsi") XFEATURE_XTILEDATA, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> bool {
    false
}

/// The configured tiles of this thread, released on drop.
///
/// Registers: `tmm0` to `tmm3` are sums; the others hold activations and, from `tmm7` down, weights.
pub(super) struct Tiles {
    rows: usize,
    /// Tiles belong to a thread.
    thread: PhantomData<*const ()>,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: this value exists only on a thread whose tiles `configure` has set up.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Zeros tile `T`.
macro_rules! zero {
    ($tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nostack, nomem, preserves_flags))
    };
}

/// Loads tile `T` from rows that are `$stride` bytes apart.
macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        asm!(concat!("tileloadd tmm", $tile, ", [{from} + {stride}]"), from = in(reg) $from,
             stride = in(reg) $stride, options(nostack, readonly, preserves_flags))
    };
}

/// Stores tile `T` to rows of 64 bytes.
macro_rules! store {
    ($tile:literal, $to:expr) => {
        asm!(concat!("tilestored [{to} + {stride}], tmm", $tile), to = in(reg) $to, stride = in(reg) 64usize,
             options(nostack, preserves_flags))
    };
}

/// Adds the product of activations and weights to sums.
macro_rules! dot {
    ($sums:literal, $activations:literal, $weights:literal) => {
        asm!(
            concat!("tdpbf16ps tmm", $sums, ", tmm", $activations, ", tmm", $weights),
            options(nostack, nomem, preserves_flags)
        )
    };
}

impl Tiles {
    /// Sets the sums to zero.
    pub(super) fn clear(&self) {
        // SAFETY: tiles 0 to 3 are configured.
        unsafe {
            zero!(0);
            zero!(1);
            zero!(2);
            zero!(3);
        }
    }

    /// Adds one step of one tile of activations times the four tiles of a block: `a` holds `rows` lines of activations for
    /// each part, `b` 16 rows of weights. `next`, the activations that will be needed next, is asked for meanwhile.
    #[inline(always)]
    pub(super) fn step(&self, a: &[[u32; 16]], b: &[PairRow], next: &[[u32; 16]]) {
        assert!(a.len() >= PARTS * self.rows && b.len() >= TILE_ROWS);
        const WEIGHTS: usize = size_of::<PairRow>();
        let part = self.rows * 64;
        for line in next {
            // SAFETY: prefetching has no effect on memory, and SSE belongs to x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
        let (a, b) = (a.as_ptr().cast::<u8>(), b.as_ptr().cast::<Line>());
        // SAFETY: tiles are configured: 0 to 6 with `rows` rows, 7 with 16, all with 64 bytes a row. This reads 3 * rows lines
        // of `a`, and lines 0 to 3 of 16 rows of `b`, of which the assertion says that they exist. The compiler keeps no
        // value in tile registers, and volatile assembly stays in order.
        unsafe {
            load!(4, a, 64usize);
            load!(5, a.add(part), 64usize);
            load!(6, a.add(2 * part), 64usize);
            load!(7, b, WEIGHTS);
            dot!(0, 4, 7);
            dot!(0, 5, 7);
            dot!(0, 6, 7);
            load!(7, b.add(1), WEIGHTS);
            dot!(1, 4, 7);
            dot!(1, 5, 7);
            dot!(1, 6, 7);
            load!(7, b.add(2), WEIGHTS);
            dot!(2, 4, 7);
            dot!(2, 5, 7);
            dot!(2, 6, 7);
            load!(7, b.add(3), WEIGHTS);
            dot!(3, 4, 7);
            dot!(3, 5, 7);
            dot!(3, 6, 7);
        }
    }

    /// Stores the sums: `sums[tile][row][output]`.
    pub(super) fn store(&self, sums: &mut [Sums; 4]) {
        // SAFETY: tiles 0 to 3 are configured, with at most 16 rows of 64 bytes; `sums` has room for 16 rows a tile.
        unsafe {
            store!(0, sums[0].as_mut_ptr());
            store!(1, sums[1].as_mut_ptr());
            store!(2, sums[2].as_mut_ptr());
            store!(3, sums[3].as_mut_ptr());
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::amx::decode;

    /// Finite floats of all kinds of size, the same in every run.
    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let size = f32::powi(2.0, (state >> 8 & 15) as i32 - 8);
                (state as i32 >> 8) as f32 / 8_388_608.0 * size
            })
            .collect()
    }

    fn pair(even: f32, odd: f32) -> u32 {
        u32::from(bf16::from_f32(even).to_bits()) | u32::from(bf16::from_f32(odd).to_bits()) << 16
    }

    fn halves(word: u32) -> [f32; 2] {
        [word << 16, word & 0xffff_0000].map(f32::from_bits)
    }

    /// The arithmetic that the kernel's error bound is derived from is what the hardware does, bit for bit.
    #[test]
    fn a_step_rounds_as_documented() {
        let Ok(amx) = Amx::new() else {
            println!("not run: no AMX");
            return;
        };
        for rows in [1, 5, TILE_ROWS] {
            let x = values(PARTS * rows * STEP, 1);
            let w = values(STEP * 64, 2);
            let a: Vec<[u32; 16]> =
                x.chunks(STEP).map(|x| std::array::from_fn(|n| pair(x[2 * n], x[2 * n + 1]))).collect();
            let b: Vec<PairRow> = (0..TILE_ROWS)
                .map(|p| {
                    std::array::from_fn(|t| {
                        Line(std::array::from_fn(|n| {
                            let o = t * TILE + n;
                            pair(w[2 * p * 64 + o], w[(2 * p + 1) * 64 + o])
                        }))
                    })
                })
                .collect();
            let mut sums = [[[0.0; TILE]; TILE_ROWS]; 4];
            let tiles = amx.configure(rows);
            tiles.clear();
            tiles.step(&a, &b, &[]);
            tiles.step(&a, &b, &a);
            tiles.store(&mut sums);
            for (t, sums) in sums.iter().enumerate() {
                for (row, sums) in sums[..rows].iter().enumerate() {
                    for (n, &got) in sums.iter().enumerate() {
                        let mut want = 0.0f32;
                        for part in (0..PARTS).chain(0..PARTS) {
                            let mut chains = [0.0f32; 2];
                            for p in 0..TILE_ROWS {
                                let x = halves(a[part * rows + row][p]);
                                let w = halves(b[p][t].0[n]);
                                chains = std::array::from_fn(|i| x[i].mul_add(w[i], chains[i]));
                            }
                            want += chains[0] + chains[1];
                        }
                        assert_eq!(
                            got.to_bits(),
                            want.to_bits(),
                            "row {row} of {rows}, tile {t}, output {n}"
                        );
                    }
                }
            }
        }
    }

    /// Three parts are the activation, exactly, and of its sign: no magnitude is added that the bound does not count.
    #[test]
    fn parts_add_up_to_the_activation() {
        let Ok(amx) = Amx::new() else {
            println!("not run: no AMX");
            return;
        };
        let mut x = values(30, 3);
        x.extend([f32::MAX, -1.0 - f32::EPSILON]);
        let x: [f32; 32] = x.try_into().unwrap();
        let (mut first, mut second, mut third) = ([0; 16], [0; 16], [0; 16]);
        decode::split(amx, &x, [&mut first, &mut second, &mut third]);
        for (i, &x) in x.iter().enumerate() {
            let parts = [first, second, third].map(|part| halves(part[i / 2])[i % 2]);
            assert_eq!(parts.iter().map(|&part| f64::from(part)).sum::<f64>(), f64::from(x));
            assert!(parts.iter().all(|part| part * x.signum() >= 0.0), "{parts:?} of {x}");
        }
    }
}
