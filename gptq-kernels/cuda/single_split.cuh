// float32 numbers as sums of two halves, so that tensor cores can multiply them.
//
// x = high + low / 2^11, both rounded to fp16: 22 significant bits, because what `high` leaves is at most 2^-11 of it. Low
// parts are stored 2^11 times as large, where small numbers lose nothing below fp16's smallest. Beyond fp16's largest number a
// part is infinite, and so becomes every sum with it.
#pragma once

struct SplitArgs {
    const void* from;  // (rows, cols), from_stride apart
    u16* high;         // (height, width), stride apart; what is outside of `from` is zero
    u16* low;
    u16* again;        // a second copy of `high`, or null
    u64 from_stride, stride;
    float scale;  // a power of two, by which numbers are multiplied first
    u32 rows, cols, height, width;
};

struct Fp32 {
    static DEVICE float to_float(u32 bits) { return __uint_as_float(bits); }
};

constexpr float LOW = 2048.0f;

// A thread does 4 columns; width is a multiple of 8 and all of the result is aligned to 8 bytes.
template <class Real, class Bits>
DEVICE void split(const SplitArgs& args) {
    const u32 column = (blockIdx.x * 256 + threadIdx.x) * 4;
    if (column >= args.width) return;
    for (u32 row = blockIdx.y; row < args.height; row += gridDim.y) {
        const Bits* from = (const Bits*)args.from + row * args.from_stride + column;
        u16 high[4], low[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const float x = row < args.rows && column + i < args.cols ? Real::to_float(from[i]) * args.scale : 0.0f;
            high[i] = Fp16::from_float(x);
            low[i] = Fp16::from_float(__fmul_rn(__fsub_rn(x, Fp16::to_float(high[i])), LOW));
        }
        const u64 at = row * args.stride + column;
        const uint2 highs = {high[0] | (u32)high[1] << 16, high[2] | (u32)high[3] << 16};
        *(uint2*)(args.high + at) = highs;
        *(uint2*)(args.low + at) = {low[0] | (u32)low[1] << 16, low[2] | (u32)low[3] << 16};
        if (args.again != nullptr) *(uint2*)(args.again + at) = highs;
    }
}
extern "C" __global__ void __launch_bounds__(256) split_f32(const __grid_constant__ SplitArgs args) {
    split<Fp32, u32>(args);
}
extern "C" __global__ void __launch_bounds__(256) split_f16(const __grid_constant__ SplitArgs args) {
    split<Fp16, u16>(args);
}
extern "C" __global__ void __launch_bounds__(256) split_bf16(const __grid_constant__ SplitArgs args) {
    split<Bf16, u16>(args);
}
