// The lazy update of the columns behind a block: W -= E U, and with GPTAQ W -= E U - B P.
//
// A product of its own instead of cuBLAS's, because every sum here is one chain of fused multiply-adds in the order of the
// block's columns, as gptq-core's is: so both arrive at the same bits.
#pragma once

constexpr u32 UPDATE = 128, DEPTH = 16, UPDATE_STRIDE = UPDATE + 4;

struct UpdateArgs {
    float* w;         // (rows, n), from column `behind` on
    const float* e;   // (rows, width)
    const float* u;   // (width, n), from column `behind` on
    const float* b;   // (rows, width), the block's weights, or null
    const float* p;   // (width, n), as u
    u32 rows, n, width, columns, aligned;
};

struct UpdateTiles {
    float left[2][DEPTH][UPDATE_STRIDE];
    float right[2][DEPTH][UPDATE_STRIDE];
};

// sums = left (UPDATE rows) * right (UPDATE columns), 8 x 8 of them a thread: two quads of rows by two of columns.
DEVICE void product(const UpdateArgs& args, const float* left, const float* right, u32 first_row, u32 first_column,
                    UpdateTiles& tiles, float (&sums)[8][8]) {
    const u32 thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
#pragma unroll
        for (u32 j = 0; j < 8; ++j) sums[i][j] = 0.0f;
    }
    float next_left[8], next_right[8];
    // Steps beyond the width are zeros: they add 0 to a sum, which leaves its bits.
    const auto load = [&](u32 step) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const u32 row = first_row + ty + i * 16, k = step + tx;
            next_left[i] = row < args.rows && k < args.width ? left[(u64)row * args.width + k] : 0.0f;
            const u32 deep = step + thread / UPDATE + i * 2, column = first_column + thread % UPDATE;
            next_right[i] = deep < args.width && column < args.columns ? right[(u64)deep * args.n + column] : 0.0f;
        }
    };
    const auto store = [&](u32 buffer) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            tiles.left[buffer][tx][ty + i * 16] = next_left[i];
            tiles.right[buffer][thread / UPDATE + i * 2][thread % UPDATE] = next_right[i];
        }
    };
    load(0);
    store(0);
    __syncthreads();
    for (u32 step = 0; step < args.width; step += DEPTH) {
        const u32 buffer = step / DEPTH % 2;
        const bool more = step + DEPTH < args.width;
        if (more) load(step + DEPTH);
#pragma unroll
        for (u32 k = 0; k < DEPTH; ++k) {
            float a[8], b[8];
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const float4 quad = *(const float4*)&tiles.left[buffer][k][half * 64 + ty * 4];
                a[half * 4] = quad.x, a[half * 4 + 1] = quad.y, a[half * 4 + 2] = quad.z, a[half * 4 + 3] = quad.w;
                const float4 other = *(const float4*)&tiles.right[buffer][k][half * 64 + tx * 4];
                b[half * 4] = other.x, b[half * 4 + 1] = other.y, b[half * 4 + 2] = other.z, b[half * 4 + 3] = other.w;
            }
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
#pragma unroll
                for (u32 j = 0; j < 8; ++j) sums[i][j] = __fmaf_rn(a[i], b[j], sums[i][j]);
            }
        }
        if (more) store(1 - buffer);
        __syncthreads();
    }
}

template <bool GPTAQ>
DEVICE void update(const UpdateArgs& args) {
    __shared__ __align__(16) UpdateTiles tiles;
    const u32 first_row = blockIdx.x * UPDATE, first_column = blockIdx.y * UPDATE;
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sums[8][8];
    product(args, args.e, args.u, first_row, first_column, tiles, sums);
    if (GPTAQ) {
        float corrections[8][8];
        product(args, args.b, args.p, first_row, first_column, tiles, corrections);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
#pragma unroll
            for (u32 j = 0; j < 8; ++j) sums[i][j] = __fsub_rn(sums[i][j], corrections[i][j]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        const u32 row = first_row + i / 4 * 64 + ty * 4 + i % 4;
        if (row >= args.rows) continue;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 column = first_column + half * 64 + tx * 4;
            float* w = args.w + (u64)row * args.n + column;
            const float(&s)[8] = sums[i];
            if (args.aligned && column + 4 <= args.columns) {
                float4 quad = *(const float4*)w;
                quad.x = __fsub_rn(quad.x, s[half * 4]);
                quad.y = __fsub_rn(quad.y, s[half * 4 + 1]);
                quad.z = __fsub_rn(quad.z, s[half * 4 + 2]);
                quad.w = __fsub_rn(quad.w, s[half * 4 + 3]);
                *(float4*)w = quad;
            } else {
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    if (column + j < args.columns) w[j] = __fsub_rn(w[j], s[half * 4 + j]);
                }
            }
        }
    }
}
extern "C" __global__ void __launch_bounds__(256, 2) update_gptq(const __grid_constant__ UpdateArgs args) {
    update<false>(args);
}
extern "C" __global__ void __launch_bounds__(256) update_gptaq(const __grid_constant__ UpdateArgs args) {
    update<true>(args);
}
