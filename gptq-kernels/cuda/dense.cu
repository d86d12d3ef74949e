// y = x W^T + bias for float weights: up to 8 rows of x in one pass over the weight, 16 output features a block.
//
// Where weights and activations are of one type, tensor cores multiply. A lane loads 8 weights that lie side by side in
// each of two rows of W, and 8 activations at the same place: those are the operands of two `mma` if its 16 columns
// are the weights' own in another order, which a sum does not mind, and so nothing is ever rearranged. The 8 columns of
// the result are 8 rows of x, all computed alike. Warps take turns along a row of W, 128 bytes each, and their sums are
// added in order.
//
// Weights of another type are multiplied one by one, exactly as they are: a warp has two features, a lane every 32nd input.
#include "half.cuh"

struct DenseArgs {
    const u8* weight;   // (n, k_stride), rows padded with zeros to a multiple of 64
    const float* bias;  // (n), or null
    const u16* x;       // (rows, k), x_stride apart
    u16* y;             // (rows, n), y_stride apart
    u64 x_stride, y_stride;
    u32 rows, n, k, k_stride;
    u32 x_vectors;  // whether rows of x begin at multiples of 16 bytes
};

// y = sums + bias, of sums in float32.
struct BiasArgs {
    const float* sums;  // (rows, n)
    const float* bias;  // (n)
    u16* y;             // (rows, n), y_stride apart
    u64 y_stride;
    u32 rows, n;
};

constexpr u32 WARPS = 8, FEATURES = 16, ROWS = 8, STEP = 64;

#ifndef UNROLL
#define UNROLL 2
#endif

struct Fp32 {
    static DEVICE float to_float(u32 bits) { return __uint_as_float(bits); }
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Eight halves that no other block will want.
DEVICE uint4 load_once(const u8* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// x[at .. at + 8], zeros from `end` on.
DEVICE uint4 load_x(const u16* x, u32 at, u32 end, bool vectors) {
    if (vectors && at + 8 <= end) return *(const uint4*)(x + at);
    u32 pairs[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 k = at + 2 * i;
        pairs[i] = (k < end ? x[k] : 0) | (u32)(k + 1 < end ? x[k + 1] : 0) << 16;
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Adds the products of 32 columns of two rows of W to the sums of this lane.
template <class Half>
DEVICE void add_products(float (&sum)[4], uint4 upper, uint4 lower, uint4 x) {
    Half::mma(sum, {upper.x, lower.x, upper.y, lower.y}, x.x, x.y);
    Half::mma(sum, {upper.z, lower.z, upper.w, lower.w}, x.z, x.w);
}

// Sums of every warp to `sums`.
template <class Half>
DEVICE void multiply_tensor(const DenseArgs& args, u32 feature, u32 first_row, u32 rows, float (&sums)[WARPS][ROWS][FEATURES]) {
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u64 row_bytes = (u64)args.k_stride * 2;
    const u8* upper = args.weight + min(feature + g, args.n - 1) * row_bytes + t * 16;
    const u8* lower = args.weight + min(feature + g + 8, args.n - 1) * row_bytes + t * 16;
    const u16* x = args.x + (first_row + min(g, rows - 1)) * args.x_stride;
    const bool used = g < rows, vectors = args.x_vectors != 0;
    const u32 steps = args.k_stride / STEP;

    float sum[2][4] = {};
    u32 step = warp;
    for (; step + (UNROLL - 1) * WARPS < steps; step += UNROLL * WARPS) {
        uint4 w[UNROLL][4];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            const u32 at = (step + i * WARPS) * STEP * 2;
            w[i][0] = load_once(upper + at);
            w[i][1] = load_once(upper + at + 64);
            w[i][2] = load_once(lower + at);
            w[i][3] = load_once(lower + at + 64);
        }
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            const u32 k = (step + i * WARPS) * STEP + t * 8;
            uint4 x0 = {}, x1 = {};
            if (used) {
                x0 = load_x(x, k, args.k, vectors);
                x1 = load_x(x, k + 32, args.k, vectors);
            }
            add_products<Half>(sum[0], w[i][0], w[i][2], x0);
            add_products<Half>(sum[1], w[i][1], w[i][3], x1);
        }
    }
    for (; step < steps; step += WARPS) {
        const u32 at = step * STEP * 2, k = step * STEP + t * 8;
        uint4 x0 = {}, x1 = {};
        if (used) {
            x0 = load_x(x, k, args.k, vectors);
            x1 = load_x(x, k + 32, args.k, vectors);
        }
        add_products<Half>(sum[0], load_once(upper + at), load_once(lower + at), x0);
        add_products<Half>(sum[1], load_once(upper + at + 64), load_once(lower + at + 64), x1);
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) sums[warp][2 * t + i % 2][g + i / 2 * 8] = sum[0][i] + sum[1][i];
}

// The whole sums to `sums[0]`.
template <class Half, class Weight, class Bits>
DEVICE void multiply_one_by_one(const DenseArgs& args, u32 feature, u32 first_row, u32 rows, float (&sums)[WARPS][ROWS][FEATURES]) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 f = warp; f < FEATURES; f += WARPS) {
        if (feature + f >= args.n) return;
        const Bits* weight = (const Bits*)args.weight + (u64)(feature + f) * args.k_stride;
        float sum[ROWS] = {};
#pragma unroll 4
        for (u32 k = lane; k < args.k; k += 32) {
            const float w = Weight::to_float(weight[k]);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                if (r < rows) sum[r] = fmaf(w, Half::to_float(args.x[(first_row + r) * args.x_stride + k]), sum[r]);
            }
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            for (u32 distance = 16; distance > 0; distance /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], distance);
            if (lane == 0) sums[0][r][f] = sum[r];
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) dense(const __grid_constant__ DenseArgs args) {
    __shared__ float sums[WARPS][ROWS][FEATURES];
    const u32 feature = blockIdx.x * FEATURES, first_row = blockIdx.y * ROWS, rows = min(ROWS, args.rows - first_row);
    constexpr bool tensor = same<IMAGE_HALF, IMAGE_WEIGHT>;
    if constexpr (tensor) {
        multiply_tensor<IMAGE_HALF>(args, feature, first_row, rows, sums);
    } else {
        multiply_one_by_one<IMAGE_HALF, IMAGE_WEIGHT, IMAGE_WEIGHT_BITS>(args, feature, first_row, rows, sums);
    }
    __syncthreads();
    const u32 f = threadIdx.x % FEATURES, row = threadIdx.x / FEATURES;
    if (row < rows && feature + f < args.n) {
        float total = sums[0][row][f];
        for (u32 warp = 1; warp < (tensor ? WARPS : 1); ++warp) total += sums[warp][row][f];
        if (args.bias != nullptr) total += args.bias[feature + f];
        args.y[(first_row + row) * args.y_stride + feature + f] = IMAGE_HALF::from_float(total);
    }
}

extern "C" __global__ void __launch_bounds__(256) add_bias(const __grid_constant__ BiasArgs args) {
    const u32 feature = blockIdx.x * 256 + threadIdx.x;
    if (feature >= args.n) return;
    const float bias = args.bias[feature];
    for (u64 row = blockIdx.y; row < args.rows; row += gridDim.y) {
        args.y[row * args.y_stride + feature] = IMAGE_HALF::from_float(args.sums[row * args.n + feature] + bias);
    }
}
