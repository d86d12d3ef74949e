// The arguments of the kernels of `wgmma_sm90.cu`.
#pragma once
#include "unit.cuh"
#include "wgmma.cuh"

// Apart from the tensor map of x, (rows, k) in boxes of N x 64, swizzled by 128 bytes: its address is taken, and what lies in
// one structure with it would be read by generic loads.
struct WgmmaArgs {
    const u8* units;  // (ceil(n / 32), k_units) units
    u16* y;           // (rows, columns), y_stride apart
    const u16* bias;  // (n), fp16, in the order of the units, or null
    float* partials;  // of `wgmma_many`: (blocks, tile) sums of tiles that two blocks share, or null if none do
    u64* arrivals;    // (blocks) `ticket` as soon as a block's sums are there
    u64 ticket;       // of this launch
    u32 rows, n;
    u32 k_units;
    u32 y_stride;
    u32 columns;      // n, or half of the features without padding for SILU_MUL
    u32 epilogue;     // STORE, ADD or SILU_MUL
    u32 token_tiles;
    u32 stages;       // of the ring
    u32 y_pairs;      // y and its rows are aligned to two halves
    u32 y_vectors;    // and to eight
    u32 scale_factor; // of `wgmma_many`, a power of two that scales are multiplied by in fp16, twice
    float sum_factor; // its reciprocal
    u32 whole;        // tiles of each block before the shared ones
};

constexpr u32 ADD = 1, SILU_MUL = 2;

// g / (1 + exp(-g)), within a few units of float32.
DEVICE float silu(float gate) {
    float power, out;
    asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.4426950408889634f));
    asm("div.full.f32 %0, %1, %2;" : "=f"(out) : "f"(gate), "f"(1.0f + power));
    return out;
}
