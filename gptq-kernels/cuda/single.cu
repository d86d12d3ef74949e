// A decoder in float32: what is not a matrix product of cuBLAS's. One row a block unless it says otherwise; sums are in an
// order that depends on the column alone, so that a row does not depend on what else is in a step.
#include "half.cuh"

#include "single_split.cuh"
#include "single_attention.cuh"

struct EmbedArgs {
    const float* table;  // (vocabulary, cols)
    const u32* tokens;   // (rows)
    float* y;
    u64 y_stride;
    u32 vocabulary, cols;
};

// y[r] = table[tokens[r]]; a token outside of the vocabulary gives NaN.
extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ EmbedArgs args) {
    const u32 token = args.tokens[blockIdx.x];
    const bool known = token < args.vocabulary;
    const float* from = args.table + (known ? (u64)token * args.cols : 0);
    float* to = args.y + blockIdx.x * args.y_stride;
    for (u32 i = threadIdx.x; i < args.cols; i += blockDim.x) to[i] = known ? from[i] : __uint_as_float(0x7FC00000);
}

struct NormArgs {
    float* x;
    const float* delta;   // or null
    const float* weight;  // (cols)
    float* y;
    u64 x_stride, delta_stride, y_stride;
    u32 cols;
    float eps;
};

// y = x / sqrt(mean(x^2) + eps) * weight, where x is the residual after `delta` has been added to it, if there is one.
extern "C" __global__ void __launch_bounds__(256) rms_norm(const __grid_constant__ NormArgs args) {
    __shared__ float sums[8];
    float* x = args.x + blockIdx.x * args.x_stride;
    float* y = args.y + blockIdx.x * args.y_stride;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < args.cols; i += 256) {
        float v = x[i];
        if (args.delta != nullptr) x[i] = v = v + args.delta[blockIdx.x * args.delta_stride + i];
        sum = __fmaf_rn(v, v, sum);
    }
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) total += sums[i];
    const float scale = 1.0f / sqrtf(total / (float)args.cols + args.eps);
    for (u32 i = threadIdx.x; i < args.cols; i += 256) y[i] = x[i] * scale * args.weight[i];
}

struct ElementArgs {
    const float* x;  // or indices of rows, for `gather`
    const u32* rows;
    float* y;
    u64 x_stride, y_stride;
    u32 cols;  // of y
};

// y += x; block (r, c) does 256 columns of row r.
extern "C" __global__ void __launch_bounds__(256) add(const __grid_constant__ ElementArgs args) {
    const u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i < args.cols) args.y[blockIdx.x * args.y_stride + i] += args.x[blockIdx.x * args.x_stride + i];
}

// y += x, one row for all rows.
extern "C" __global__ void __launch_bounds__(256) add_bias(const __grid_constant__ ElementArgs args) {
    const u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i < args.cols) args.y[blockIdx.x * args.y_stride + i] += args.x[i];
}

// y = silu(x[..cols]) * x[cols..]
extern "C" __global__ void __launch_bounds__(256) silu_mul(const __grid_constant__ ElementArgs args) {
    const u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i >= args.cols) return;
    const float* x = args.x + blockIdx.x * args.x_stride + i;
    const float gate = x[0];
    args.y[blockIdx.x * args.y_stride + i] = gate / (1.0f + expf(-gate)) * x[args.cols];
}

// y[i] = x[rows[i]]
extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ ElementArgs args) {
    const u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i < args.cols) {
        args.y[blockIdx.x * args.y_stride + i] = args.x[args.rows[blockIdx.x] * args.x_stride + i];
    }
}

struct RopeArgs {
    float* qkv;  // (rows, (heads + 2 kv_heads) * head_dim)
    float* keys;
    float* values;
    const u32* positions;   // (rows)
    const u32* page_bases;  // (rows)
    const u32* pages;
    const float* cos;  // (positions, head_dim / 2)
    const float* sin;
    u64 stride;
    u32 heads, kv_heads, head_dim;
};

// Rotates queries and keys in place and writes keys and values to their pages.
extern "C" __global__ void __launch_bounds__(256) rope_append(const __grid_constant__ RopeArgs args) {
    const u32 dim = args.head_dim, half = dim / 2, position = args.positions[blockIdx.x];
    float* row = args.qkv + blockIdx.x * args.stride;
    const u64 page = args.pages[args.page_bases[blockIdx.x] + position / PAGE_LEN];
    const u64 place = page * args.kv_heads * PAGE_LEN + position % PAGE_LEN;  // of the first head, in rows
    for (u32 i = threadIdx.x; i < (args.heads + args.kv_heads) * half; i += 256) {
        const u32 head = i / half, d = i % half;
        const float cos = args.cos[(u64)position * half + d], sin = args.sin[(u64)position * half + d];
        float* at = row + head * dim + d;
        const float a = at[0], b = at[half];
        const float first = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
        const float second = __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
        at[0] = first, at[half] = second;
        if (head >= args.heads) {
            float* key = args.keys + (place + (u64)(head - args.heads) * PAGE_LEN) * dim;
            key[d] = first, key[d + half] = second;
        }
    }
    const float* values = row + (args.heads + args.kv_heads) * dim;
    for (u32 i = threadIdx.x; i < args.kv_heads * dim; i += 256) {
        args.values[(place + (u64)(i / dim) * PAGE_LEN) * dim + i % dim] = values[i];
    }
}
