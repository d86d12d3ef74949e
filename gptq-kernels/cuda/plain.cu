// y = x W^T + bias for every layer that the format knows, as directly as it can be written.
//
// One thread sums one output feature over every eighth block of 32 input features, for up to ROWS rows of x. A weight is
// scale * (code - zero), exact in float32 (11 bits times 8), so each step rounds once, in the fused multiply-add. Warps
// read consecutive output features, hence consecutive words of `qweight`. The eight partial sums of an output are added
// in order. Nothing depends on the other rows.
#include "half.cuh"

struct PlainArgs {
    const u32* qweight;  // (ceil(k * BITS / 32), n)
    const u32* qzeros;   // (groups, zero_words)
    const u16* scales;   // (groups, n), fp16
    const u32* g_idx;    // (k)
    const u16* bias;     // (n), fp16, or null
    const u16* x;        // (rows, k), x_stride apart
    u16* y;              // (rows, n), y_stride apart
    u64 x_stride, y_stride;
    u32 rows, n, k, zero_words;
};

constexpr u32 LANES = 32, SLICES = 8, ROWS = 4;

// The code at bit `at` of a run of words `stride` apart. The word behind the last is only read if a code reaches into it.
template <u32 BITS>
DEVICE u32 code_at(const u32* words, u64 stride, u32 at) {
    const u32 shift = at % 32;
    u32 code = words[at / 32 * stride] >> shift;
    if (shift + BITS > 32) code |= words[(at / 32 + 1) * stride] << (32 - shift);
    return code & ((1u << BITS) - 1);
}

template <class Half, u32 BITS>
DEVICE void multiply(const PlainArgs& args) {
    const u32 lane = threadIdx.x % LANES, slice = threadIdx.x / LANES;
    const u32 feature = blockIdx.x * LANES + lane;
    const u32 first_row = blockIdx.y * ROWS, rows = min(ROWS, args.rows - first_row);
    float sum[ROWS] = {};

    if (feature < args.n) {
        u32 group = ~0u;
        float scale = 0.0f;
        i32 zero = 0;
        for (u32 block = slice * 32; block < args.k; block += SLICES * 32) {
            const u32* words = args.qweight + (u64)(block / 32) * BITS * args.n + feature;
            const u32 count = min(32u, args.k - block);
#pragma unroll 8
            for (u32 i = 0; i < count; ++i) {
                const u32 g = args.g_idx[block + i];
                if (g != group) {
                    group = g;
                    scale = Fp16::to_float(args.scales[(u64)g * args.n + feature]);
                    zero = (i32)code_at<BITS>(args.qzeros + (u64)g * args.zero_words, 1, feature * BITS);
                }
                const float weight = scale * (float)((i32)code_at<BITS>(words, args.n, i * BITS) - zero);
#pragma unroll
                for (u32 r = 0; r < ROWS; ++r) {
                    if (r < rows) sum[r] = fmaf(Half::to_float(args.x[(first_row + r) * args.x_stride + block + i]), weight, sum[r]);
                }
            }
        }
    }

    __shared__ float sums[SLICES][ROWS][LANES];
    for (u32 r = 0; r < ROWS; ++r) sums[slice][r][lane] = sum[r];
    __syncthreads();
    if (slice < rows && feature < args.n) {
        float total = args.bias != nullptr ? Fp16::to_float(args.bias[feature]) : 0.0f;
        for (u32 s = 0; s < SLICES; ++s) total += sums[s][slice][lane];
        args.y[(first_row + slice) * args.y_stride + feature] = Half::from_float(total);
    }
}

extern "C" __global__ void __launch_bounds__(256) plain(const __grid_constant__ PlainArgs args) {
    multiply<IMAGE_HALF, IMAGE_BITS>(args);
}
