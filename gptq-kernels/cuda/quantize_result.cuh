// What is made of the codes: weights again, and the packed layout.
#pragma once

struct DequantizeArgs {
    const u8* codes;      // (rows, n)
    const float* scales;  // (rows, group_count)
    const u8* zeros;      // (rows, group_count)
    const u32* g_idx;     // (n)
    void* out;            // (rows, n), stride apart
    u64 stride;
    u32 rows, n, group_count;
};

template <class Real, class Bits>
DEVICE void dequantize(const DequantizeArgs& args) {
    const u32 column = blockIdx.x * 256 + threadIdx.x;
    if (column >= args.n) return;
    const u32 group = args.g_idx[column];
    for (u32 row = blockIdx.y; row < args.rows; row += gridDim.y) {
        const u64 grid = (u64)row * args.group_count + group;
        const float level = (float)args.codes[(u64)row * args.n + column] - (float)args.zeros[grid];
        ((Bits*)args.out)[row * args.stride + column] = Real::from_float(__fmul_rn(args.scales[grid], level));
    }
}
extern "C" __global__ void __launch_bounds__(256) dequantize_f16(const __grid_constant__ DequantizeArgs args) {
    dequantize<Fp16, u16>(args);
}
extern "C" __global__ void __launch_bounds__(256) dequantize_bf16(const __grid_constant__ DequantizeArgs args) {
    dequantize<Bf16, u16>(args);
}
extern "C" __global__ void __launch_bounds__(256) dequantize_f32(const __grid_constant__ DequantizeArgs args) {
    dequantize<Single, u32>(args);
}

struct PackArgs {
    const u8* codes;      // (rows, n)
    const float* scales;  // (rows, group_count)
    const u8* zeros;      // (rows, group_count)
    u32* qweight;         // (ceil(n * bits / 32), rows)
    u32* qzeros;          // (group_count, zero_words)
    u16* half_scales;     // (group_count, rows)
    u32 rows, n, group_count, zero_words, bits;
};

// Codes along the input dimension. A thread packs 32 codes of a row into `bits` words; y goes over the runs of 32.
extern "C" __global__ void __launch_bounds__(256) pack_codes(const __grid_constant__ PackArgs args) {
    const u32 row = blockIdx.x * 256 + threadIdx.x, first = blockIdx.y * 32;
    if (row >= args.rows) return;
    const u8* codes = args.codes + (u64)row * args.n + first;
    const u32 count = min(32u, args.n - first), words = (args.n * args.bits + 31) / 32;
    u64 gathered = 0;
    u32 filled = 0, word = first / 32 * args.bits;
    for (u32 i = 0; i < count; ++i) {
        gathered |= (u64)codes[i] << filled;
        filled += args.bits;
        if (filled >= 32) {
            args.qweight[(u64)word++ * args.rows + row] = (u32)gathered;
            gathered >>= 32;
            filled -= 32;
        }
    }
    if (filled > 0 && word < words) args.qweight[(u64)word * args.rows + row] = (u32)gathered;
}

// Scales and zeros; y goes over the groups. A thread rounds one scale; every 32nd packs 32 zeros into `bits` words.
extern "C" __global__ void __launch_bounds__(256) pack_grids(const __grid_constant__ PackArgs args) {
    const u32 row = blockIdx.x * 256 + threadIdx.x, group = blockIdx.y;
    if (row >= args.rows) return;
    args.half_scales[(u64)group * args.rows + row] = Fp16::from_float(args.scales[(u64)row * args.group_count + group]);
    if (row % 32 != 0) return;
    const u32 count = min(32u, args.rows - row);
    u64 gathered = 0;
    u32 filled = 0, word = row / 32 * args.bits;
    for (u32 i = 0; i < count; ++i) {
        gathered |= (u64)args.zeros[(u64)(row + i) * args.group_count + group] << filled;
        filled += args.bits;
        if (filled >= 32) {
            args.qzeros[(u64)group * args.zero_words + word++] = (u32)gathered;
            gathered >>= 32;
            filled -= 32;
        }
    }
    if (filled > 0 && word < args.zero_words) args.qzeros[(u64)group * args.zero_words + word] = (u32)gathered;
}
