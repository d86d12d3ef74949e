// Causal attention in float32, without tensor cores: a block does the queries of a tile of 64 rows for one head, page by page
// of 64 keys, with the softmax online.
//
// A page adds to a query what it adds whatever the other rows of the tile are: pages begin at multiples of 64 positions, and one
// that a query cannot see leaves its sums as they are. So a query's bits depend on its own sequence alone.
//
// A thread has rows ty + 8 i and keys tx + 16 j of the scores, and rows ty + 8 i and features 4 tx + 64 j of the output. Per
// four features of the scores it reads 8 + 4 vectors of 16 bytes for 128 multiply-adds: 16 cycles of shared memory for 32 of
// arithmetic. Rows in shared memory are 4 floats longer than a multiple of 32, so that neighbours lie in other banks.
#pragma once

constexpr u32 PAGE_LEN = 64, TILE_ROWS = 64, ATTENTION_THREADS = 128;

struct Tile {
    u32 row, rows;
    u32 position;   // of the first row
    u32 page_base;  // where the sequence's pages begin among the pages of the step
};

struct AttentionArgs {
    const float* qkv;  // (rows, (heads + 2 kv_heads) * head_dim)
    const float* keys;
    const float* values;
    float* y;  // (rows, heads * head_dim)
    const Tile* tiles;
    const u32* pages;
    u64 stride, y_stride;
    u32 heads, kv_heads, head_dim;
    u32 window;   // 0 for none
    u32 vectors;  // whether all rows are aligned to 16 bytes
    float scale;
};

// Rows of `dim` floats to rows of DIM + 4 in shared memory; zeros beyond.
template <u32 DIM>
DEVICE void load_rows(float* to, const float* from, u64 stride, u32 rows, u32 dim, float scale, bool vectors) {
#pragma unroll 8
    for (u32 at = threadIdx.x; at < 64 * (DIM / 4); at += ATTENTION_THREADS) {
        const u32 r = at / (DIM / 4), c = at % (DIM / 4) * 4;
        const float* source = from + r * stride + c;
        float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
        if (r < rows && vectors) {
            if (c < dim) v = *(const float4*)source;
            v.x *= scale, v.y *= scale, v.z *= scale, v.w *= scale;
        } else if (r < rows) {
            if (c < dim) v.x = source[0] * scale;
            if (c + 1 < dim) v.y = source[1] * scale;
            if (c + 2 < dim) v.z = source[2] * scale;
            if (c + 3 < dim) v.w = source[3] * scale;
        }
        *(float4*)(to + r * (DIM + 4) + c) = v;
    }
}

DEVICE void add_product(float& sum, const float4& a, const float4& b) {
    sum = __fmaf_rn(a.x, b.x, sum);
    sum = __fmaf_rn(a.y, b.y, sum);
    sum = __fmaf_rn(a.z, b.z, sum);
    sum = __fmaf_rn(a.w, b.w, sum);
}

template <u32 DIM>
DEVICE void attention(const AttentionArgs& args) {
    constexpr u32 STRIDE = DIM + 4, P_STRIDE = PAGE_LEN + 4, PARTS = DIM / 64;
    constexpr float NONE = -3.0e38f;
    extern __shared__ float4 quads[];
    float* q = (float*)quads;
    float* page_rows = q + TILE_ROWS * STRIDE;  // keys, then values
    float* p = page_rows + PAGE_LEN * STRIDE;

    const Tile tile = args.tiles[blockIdx.x];
    const u32 head = blockIdx.y, dim = args.head_dim, kv_head = head / (args.heads / args.kv_heads);
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    load_rows<DIM>(q, args.qkv + tile.row * args.stride + head * dim, args.stride, tile.rows, dim, args.scale,
                   args.vectors);

    float4 out[8][PARTS];
    float most[8], sum[8];
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        most[i] = NONE, sum[i] = 0.0f;
#pragma unroll
        for (u32 j = 0; j < PARTS; ++j) out[i][j] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    const u32 end = tile.position + tile.rows;
    const u32 begin = args.window != 0 && tile.position >= args.window ? tile.position - args.window + 1 : 0;
    for (u32 first = begin / PAGE_LEN * PAGE_LEN; first < end; first += PAGE_LEN) {
        const u64 page = args.pages[tile.page_base + first / PAGE_LEN];
        const u64 place = (page * args.kv_heads + kv_head) * PAGE_LEN * dim;
        const u32 count = min(PAGE_LEN, end - first);
        __syncthreads();
        load_rows<DIM>(page_rows, args.keys + place, dim, count, dim, 1.0f, args.vectors);
        __syncthreads();
        float s[8][4] = {};
#pragma unroll 2
        for (u32 d = 0; d < DIM; d += 4) {
            float4 k[4];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) k[j] = *(const float4*)(page_rows + (tx + 16 * j) * STRIDE + d);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                const float4 x = *(const float4*)(q + (ty + 8 * i) * STRIDE + d);
#pragma unroll
                for (u32 j = 0; j < 4; ++j) add_product(s[i][j], x, k[j]);
            }
        }
        __syncthreads();
        load_rows<DIM>(page_rows, args.values + place, dim, count, dim, 1.0f, args.vectors);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const u32 position = tile.position + ty + 8 * i;
            bool seen[4];
            float largest = NONE;
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32 key = first + tx + 16 * j;
                seen[j] = key <= position && (args.window == 0 || key + args.window > position);
                if (seen[j]) largest = fmaxf(largest, s[i][j]);
            }
#pragma unroll
            for (u32 step = 8; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
            const float now = fmaxf(most[i], largest), fade = expf(most[i] - now);
            float added = 0.0f;
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const float weight = seen[j] ? expf(s[i][j] - now) : 0.0f;
                p[(ty + 8 * i) * P_STRIDE + tx + 16 * j] = weight;
                added += weight;
            }
#pragma unroll
            for (u32 step = 8; step > 0; step /= 2) added += __shfl_xor_sync(~0u, added, step);
            sum[i] = __fmaf_rn(sum[i], fade, added);
            most[i] = now;
#pragma unroll
            for (u32 j = 0; j < PARTS; ++j) {
                out[i][j].x *= fade, out[i][j].y *= fade, out[i][j].z *= fade, out[i][j].w *= fade;
            }
        }
        __syncthreads();
#pragma unroll 2
        for (u32 key = 0; key < PAGE_LEN; key += 4) {
            float4 weights[8];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) weights[i] = *(const float4*)(p + (ty + 8 * i) * P_STRIDE + key);
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
#pragma unroll
                for (u32 j = 0; j < PARTS; ++j) {
                    const float4 v = *(const float4*)(page_rows + (key + k) * STRIDE + 4 * tx + 64 * j);
#pragma unroll
                    for (u32 i = 0; i < 8; ++i) {
                        const float weight = k == 0 ? weights[i].x : k == 1 ? weights[i].y : k == 2 ? weights[i].z : weights[i].w;
                        out[i][j].x = __fmaf_rn(weight, v.x, out[i][j].x);
                        out[i][j].y = __fmaf_rn(weight, v.y, out[i][j].y);
                        out[i][j].z = __fmaf_rn(weight, v.z, out[i][j].z);
                        out[i][j].w = __fmaf_rn(weight, v.w, out[i][j].w);
                    }
                }
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        const u32 r = ty + 8 * i;
        if (r >= tile.rows) continue;
        float* y = args.y + (tile.row + r) * args.y_stride + head * dim;
        const float scale = 1.0f / sum[i];
#pragma unroll
        for (u32 j = 0; j < PARTS; ++j) {
            const u32 d = 4 * tx + 64 * j;
            if (d < dim) y[d] = out[i][j].x * scale;
            if (d + 1 < dim) y[d + 1] = out[i][j].y * scale;
            if (d + 2 < dim) y[d + 2] = out[i][j].z * scale;
            if (d + 3 < dim) y[d + 3] = out[i][j].w * scale;
        }
    }
}

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_64(const __grid_constant__ AttentionArgs args) {
    attention<64>(args);
}
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_128(const __grid_constant__ AttentionArgs args) {
    attention<128>(args);
}
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) attention_256(const __grid_constant__ AttentionArgs args) {
    attention<256>(args);
}
