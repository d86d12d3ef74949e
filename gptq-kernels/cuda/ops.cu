// The small operations of a decoder, one row a block unless it says otherwise. Sums are in float32 in an order that
// depends on the column alone; each element is rounded once, when it is stored.
//
// Images for sm_90 start before the kernel in front of them has ended; what that kernel does not write (weights, tables)
// is fetched ahead of the wait.
#include "draw.cuh"

// y[r] = table[tokens[r]]; a token outside of the vocabulary gives NaN.
struct EmbedArgs {
    const u16* table;   // (vocabulary, cols)
    const u32* tokens;  // (rows)
    const u32* drawn;
    u16* y;
    u64 y_stride;
    u32 vocabulary, cols, vectors;
};

template <class Half>
DEVICE void embed(const EmbedArgs& args) {
    release_next();
    await_previous();
    u32 token = args.tokens[blockIdx.x];
    if (token & DRAWN) token = args.drawn[token & ~DRAWN];
    const u16* from = args.table + (u64)token * args.cols;
    u16* to = args.y + blockIdx.x * args.y_stride;
    for (u32 i = threadIdx.x * 8; i < args.cols; i += blockDim.x * 8) {
        float v[8];
        for (u32 e = 0; e < 8; ++e) v[e] = __uint_as_float(0x7FC00000);
        if (token < args.vocabulary) load_8<Half>(v, from + i, args.cols - i, args.vectors);
        store_8<Half>(to + i, v, args.cols - i, args.vectors);
    }
}

constexpr u32 NORM_THREADS = 512, HELD = 2;

// y = x / sqrt(mean(x^2) + eps) * weight, where x is the residual after `delta` has been added to it, if there is one.
// Where y has an order of its own, its column i, and the weight's, is of column order[i] of x.
struct NormArgs {
    u16* x;
    const u16* delta;   // or null
    const u16* weight;  // (cols)
    const u32* order;   // (cols), padded to a multiple of 8; or null
    u16* y;
    const u8* ahead;    // what the kernel behind this one reads first
    u64 x_stride, delta_stride, y_stride;
    u32 cols, vectors;
    u32 rows;
    u32 ahead_bytes;    // a multiple of 16
    float eps;
};

// Brings the part of `ahead` that is this block's, of those behind the blocks of rows, to the second cache: the memory has nothing to
// do while a row is normalised. No kernel writes it, so that nothing has to be waited for. sm_90 has one instruction for it.
DEVICE void fetch_ahead(const NormArgs& args) {
#if IMAGE_SM90
    constexpr u32 WARP_BYTES = 2048;
    const u32 from = ((blockIdx.x - args.rows) * (NORM_THREADS / 32) + threadIdx.x / 32) * WARP_BYTES;
    if (threadIdx.x % 32 != 0 || from >= args.ahead_bytes) return;
    const u32 bytes = min(WARP_BYTES, args.ahead_bytes - from);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(args.ahead + from), "r"(bytes) : "memory");
#endif
}

DEVICE float block_sum(float value) {
    __shared__ float sums[NORM_THREADS / 32];
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < NORM_THREADS / 32; ++i) total += sums[i];
    return total;
}

// Eight columns of an order.
struct Columns {
    u32 at[8];
};

DEVICE Columns load_columns(const u32* order) {
    const uint4 low = ((const uint4*)order)[0], high = ((const uint4*)order)[1];
    return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

// Where y has its own order, the row goes through shared memory, which has room for it in multiples of 8 columns. Its
// squares are added as they lie in x all the same, so that every element has the bits that it has in order.
template <class Half, bool ADD, bool ORDERED>
DEVICE void norm(const NormArgs& args) {
    extern __shared__ __align__(16) u16 row[];
    release_next();
    if (blockIdx.x >= args.rows) return fetch_ahead(args);
    u16* x = args.x + blockIdx.x * args.x_stride;
    u16* y = args.y + blockIdx.x * args.y_stride;
    const u16* delta = args.delta + (ADD ? blockIdx.x * args.delta_stride : 0);
    // Thread t has elements 8 t .. 8 t + 8 of every 8 * NORM_THREADS; the first ones stay in registers.
    float held[HELD][8], weight[HELD][8];
    Columns columns[HELD];
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 i = (k * NORM_THREADS + threadIdx.x) * 8;
        if (i >= args.cols) continue;
        load_8<Half>(weight[k], args.weight + i, args.cols - i, args.vectors);
        if (ORDERED) columns[k] = load_columns(args.order + i);
    }
    await_previous();
    float sum = 0.0f;
    auto fetch = [&](float (&v)[8], u32 i) {
        load_8<Half>(v, x + i, args.cols - i, args.vectors);
        if (ADD) {
            float d[8];
            load_8<Half>(d, delta + i, args.cols - i, args.vectors);
#pragma unroll
            for (u32 e = 0; e < 8; ++e) v[e] = Half::to_float(Half::from_float(v[e] + d[e]));
            store_8<Half>(x + i, v, args.cols - i, args.vectors);
        }
        if (ORDERED) store_8<Half>(row + i, v, 8, true);
#pragma unroll
        for (u32 e = 0; e < 8; ++e) sum = __fmaf_rn(v[e], v[e], sum);
    };
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 i = (k * NORM_THREADS + threadIdx.x) * 8;
        if (i < args.cols) fetch(held[k], i);
    }
    for (u32 i = (HELD * NORM_THREADS + threadIdx.x) * 8; i < args.cols; i += NORM_THREADS * 8) {
        float v[8];
        fetch(v, i);
    }
    // Behind it, the row is in shared memory.
    const float scale = 1.0f / sqrtf(block_sum(sum) / (float)args.cols + args.eps);
    auto pick = [&](float (&v)[8], const Columns& columns) {
#pragma unroll
        for (u32 e = 0; e < 8; ++e) v[e] = Half::to_float(row[columns.at[e]]);
    };
    auto finish = [&](float (&v)[8], const float (&w)[8], u32 i) {
#pragma unroll
        for (u32 e = 0; e < 8; ++e) v[e] = v[e] * scale * w[e];
        store_8<Half>(y + i, v, args.cols - i, args.vectors);
    };
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 i = (k * NORM_THREADS + threadIdx.x) * 8;
        if (i >= args.cols) continue;
        if (ORDERED) pick(held[k], columns[k]);
        finish(held[k], weight[k], i);
    }
    for (u32 i = (HELD * NORM_THREADS + threadIdx.x) * 8; i < args.cols; i += NORM_THREADS * 8) {
        float v[8], w[8];
        if (ORDERED) pick(v, load_columns(args.order + i));
        else load_8<Half>(v, x + i, args.cols - i, args.vectors);
        load_8<Half>(w, args.weight + i, args.cols - i, args.vectors);
        finish(v, w, i);
    }
}

// y[r, i] = y[r, order[i]], through shared memory, which has room for a row in multiples of 8 columns.
struct ReorderArgs {
    const u32* order;  // (cols), padded to a multiple of 8
    u16* y;
    u64 y_stride;
    u32 cols, vectors;
};

DEVICE void reorder_columns(const ReorderArgs& args) {
    extern __shared__ __align__(16) u16 row[];
    release_next();
    u16* y = args.y + blockIdx.x * args.y_stride;
    await_previous();
#pragma unroll 1
    for (u32 i = threadIdx.x * 8; i < args.cols; i += NORM_THREADS * 8) {
        if (args.vectors && args.cols - i >= 8) *(uint4*)(row + i) = *(const uint4*)(y + i);
        else for (u32 k = i; k < args.cols && k < i + 8; ++k) row[k] = y[k];
    }
    __syncthreads();
#pragma unroll 1
    for (u32 i = threadIdx.x * 8; i < args.cols; i += NORM_THREADS * 8) {
        if (args.vectors && args.cols - i >= 8) {
            const Columns columns = load_columns(args.order + i);
            u32 pairs[4];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) pairs[e] = row[columns.at[2 * e]] | (u32)row[columns.at[2 * e + 1]] << 16;
            *(uint4*)(y + i) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        } else {
            for (u32 k = i; k < args.cols && k < i + 8; ++k) y[k] = row[args.order[k]];
        }
    }
}

// Element by element; block (r, c) does 8 * blockDim.x columns of row r.
struct ElementArgs {
    const u16* x;
    u16* y;
    u64 x_stride, y_stride;
    u32 cols, vectors;  // columns of y
};

template <class Half>
DEVICE void add(const ElementArgs& args) {
    release_next();
    await_previous();
    const u32 i = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (i >= args.cols) return;
    u16* y = args.y + blockIdx.x * args.y_stride + i;
    float a[8], b[8];
    load_8<Half>(a, args.x + blockIdx.x * args.x_stride + i, args.cols - i, args.vectors);
    load_8<Half>(b, y, args.cols - i, args.vectors);
#pragma unroll
    for (u32 e = 0; e < 8; ++e) b[e] += a[e];
    store_8<Half>(y, b, args.cols - i, args.vectors);
}

// y = silu(x[..cols]) * x[cols..]
template <class Half>
DEVICE void silu_mul(const ElementArgs& args) {
    release_next();
    await_previous();
    const u32 i = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (i >= args.cols) return;
    const u16* x = args.x + blockIdx.x * args.x_stride + i;
    float gate[8], up[8];
    load_8<Half>(gate, x, args.cols - i, args.vectors);
    load_8<Half>(up, x + args.cols, args.cols - i, args.vectors && args.cols % 8 == 0);
#pragma unroll
    for (u32 e = 0; e < 8; ++e) gate[e] = gate[e] / (1.0f + __expf(-gate[e])) * up[e];
    store_8<Half>(args.y + blockIdx.x * args.y_stride + i, gate, args.cols - i, args.vectors);
}

// y[i] = x[rows[i]]
struct GatherArgs {
    const u16* x;
    const u32* rows;
    u16* y;
    u64 x_stride, y_stride;
    u32 cols;
};

DEVICE void gather_rows(const GatherArgs& args) {
    release_next();
    await_previous();
    const u16* from = args.x + args.rows[blockIdx.x] * args.x_stride;
    u16* to = args.y + blockIdx.x * args.y_stride;
    for (u32 i = threadIdx.x; i < args.cols; i += blockDim.x) to[i] = from[i];
}

// Rotates queries and keys in place and writes keys and values to their pages. The first `rows` blocks take a row each;
// after them come blocks that transpose the values of one tile and head.
template <class Half>
DEVICE void rope_append(const RopeArgs& args) {
    release_next();
    await_previous();
    const u32 half = args.head_dim / 2;
    if (blockIdx.x < args.rows) {
        u16* row = args.qkv + blockIdx.x * args.stride;
        const u32 position = args.positions[blockIdx.x];
        const u32 page = args.pages[args.page_bases[blockIdx.x] + position / PAGE_LEN];
        u16* keys = (u16*)args.store[0] + (u64)page * args.kv_heads * PAGE_LEN * args.padded;
        for (u32 i = threadIdx.x; i < (args.heads + args.kv_heads) * half; i += blockDim.x) {
            const u32 head = i / half, d = i % half;
            u16* at = row + head * args.head_dim + d;
            float a = Half::to_float(at[0]), b = Half::to_float(at[half]);
            rotate(a, b, args.cos[(u64)position * half + d], args.sin[(u64)position * half + d]);
            const u16 first = Half::from_float(a), second = Half::from_float(b);
            at[0] = first, at[half] = second;
            if (head >= args.heads) {
                u16* key = keys + (u64)(head - args.heads) * PAGE_LEN * args.padded;
                key[key_place(position % PAGE_LEN, d, args.padded)] = first;
                key[key_place(position % PAGE_LEN, d + half, args.padded)] = second;
            }
        }
        return;
    }
    const u32 job = blockIdx.x - args.rows, head = job % args.kv_heads;
    const Tile tile = args.tiles[job / args.kv_heads];
    const u16* values = args.qkv + tile.row * args.stride + (args.heads + args.kv_heads + head) * args.head_dim;
    // Eight positions at a time, aligned to eight: a piece of the page, and one store if they are all of the tile.
    const u32 first = tile.position / 8, groups = (tile.position + tile.rows + 7) / 8 - first;
    for (u32 i = threadIdx.x; i < groups * args.head_dim; i += blockDim.x) {
        const u32 d = i % args.head_dim, position = (first + i / args.head_dim) * 8;
        const u32 page = args.pages[tile.page_base + position / PAGE_LEN];
        u16* to = (u16*)args.store[1] + (u64)(page * args.kv_heads + head) * args.padded * PAGE_LEN + value_place(position % PAGE_LEN, d);
        u16 v[8];
        bool whole = true;
#pragma unroll
        for (u32 e = 0; e < 8; ++e) {
            const u32 row = position + e - tile.position;  // wraps around for positions before the tile
            const bool there = row < tile.rows;
            v[e] = there ? values[row * args.stride + d] : (u16)0;
            whole &= there;
        }
        if (whole) {
            *(uint4*)to = {v[0] | (u32)v[1] << 16, v[2] | (u32)v[3] << 16, v[4] | (u32)v[5] << 16, v[6] | (u32)v[7] << 16};
        } else {
#pragma unroll
            for (u32 e = 0; e < 8; ++e)
                if (position + e - tile.position < tile.rows) to[e] = v[e];
        }
    }
}

#define OP(THREADS, NAME, ARGS, CALL) \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ ARGS args) { CALL(args); }
OP(512, embed, EmbedArgs, embed<IMAGE_HALF>)
OP(NORM_THREADS, rms_norm, NormArgs, (norm<IMAGE_HALF, false, false>))
OP(NORM_THREADS, add_rms_norm, NormArgs, (norm<IMAGE_HALF, true, false>))
OP(NORM_THREADS, rms_norm_ordered, NormArgs, (norm<IMAGE_HALF, false, true>))
OP(NORM_THREADS, add_rms_norm_ordered, NormArgs, (norm<IMAGE_HALF, true, true>))
OP(NORM_THREADS, reorder, ReorderArgs, reorder_columns)
OP(256, add, ElementArgs, add<IMAGE_HALF>)
OP(256, silu_mul, ElementArgs, silu_mul<IMAGE_HALF>)
OP(512, gather, GatherArgs, gather_rows)
OP(DRAW_THREADS, draw_greedy, DrawArgs, draw_greedy<IMAGE_HALF>)
OP(TEAM_THREADS, draw_sampled, DrawArgs, draw_sampled<IMAGE_HALF>)
OP(256, rope_append, RopeArgs, rope_append<IMAGE_HALF>)
