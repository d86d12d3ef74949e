// y = x / sqrt(mean(x^2) + eps) * weight of one row, by a block of NORM_THREADS: the order of additions that the norm of
// `ops.cu` has, for the linear layers that normalise their input, so that both give the same bits.
//
// Thread t has the elements 8 t .. 8 t + 8 of every 8 * NORM_THREADS, and adds their squares one after the other; then the
// lanes of a warp are added as a tree, and the warps in order.
#pragma once
#include "half.cuh"

constexpr u32 NORM_THREADS = 512, NORM_WARPS = NORM_THREADS / 32;

DEVICE void add_squares(float& sum, const float (&v)[8]) {
#pragma unroll
    for (u32 e = 0; e < 8; ++e) sum = __fmaf_rn(v[e], v[e], sum);
}

// The warp's, in every lane.
DEVICE float warp_total(float sum) {
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// What x is multiplied by, from the sums of the warps.
DEVICE float norm_scale(const float (&warps)[NORM_WARPS], u32 cols, float eps) {
    float total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < NORM_WARPS; ++i) total += warps[i];
    return 1.0f / sqrtf(total / (float)cols + eps);
}

DEVICE void normalise(float (&v)[8], const float (&weight)[8], float scale) {
#pragma unroll
    for (u32 e = 0; e < 8; ++e) v[e] = v[e] * scale * weight[e];
}
