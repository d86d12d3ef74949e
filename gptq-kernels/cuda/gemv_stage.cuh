// How `gemv_sm90.cu` brings x to shared memory: in order or into that of an act-ordered layer, as it is or normalised.
//
// x is staged in one of two layouts:
//
//     rows      a row after the other, each in the order of the units: operand B of `mma` is 16 bytes a lane
//     columns   16 bytes for every input feature, of which the eight tokens have two each: operand B is a transposed 8 x 8
//               matrix of `ldmatrix`. So a feature goes to another place in one piece, for all tokens; act-ordered layers
//               with several rows have this layout.
//
// The order of features in a group of an act-ordered layer is chosen so that what the lanes of a warp store at a time lies in
// different banks (`src/cuda/units.rs`).
#pragma once
#include "hopper.cuh"
#include "norm.cuh"

struct GemvArgs {
    const u8* units;      // (ceil(n / 32), k_units) units
    const u16* x;         // (rows, k), x_stride apart
    u16* y;               // (rows, columns), y_stride apart
    const u16* bias;      // (n), fp16, in the order of the units, or null
    const u16* places;    // (k, rounded up to STEP) where columns of x go, as `stage_rows` or `stage_columns` reads it; null for
                          // the identity
    const u16* norm;      // (k, rounded up to 8) weight of the norm that x goes through, or null
    u32 rows, n, k;
    u32 x_stride, y_stride;
    u32 k_units;
    u32 x_vectors;        // x and its rows are aligned to 16 bytes
    u32 padded;           // there are places without a column
    u32 columns;          // n, or half of the features without padding for SILU_MUL
    u32 epilogue;         // STORE, ADD or SILU_MUL
    u32 slots;            // for sums of rounds: 2 if they fit, otherwise and in clusters 1
    float eps;            // of the norm
};

DEVICE void store_shared_16(u32 address, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

DEVICE void store_shared_float(u32 address, float value) { store_shared_float_if(true, address, value); }

// Starts copying `count` halves of each row into shared memory, and writes zeros behind them up to `width`; thread `thread`
// of THREADS that do so.
template <u32 THREADS>
DEVICE void copy_rows(u32 to, u32 to_stride, const u16* from, u64 from_stride, u32 rows, u32 count, u32 width, bool vectors, u32 thread) {
    const u32 whole = vectors ? count / 8 * 8 : 0;
#pragma unroll 1
    for (u32 i = thread * 8; i < whole; i += THREADS * 8) {
#pragma unroll 4
        for (u32 row = 0; row < rows; ++row) copy_16(to + row * to_stride + i * 2, from + row * from_stride + i);
    }
#pragma unroll 1
    for (u32 i = whole + thread; i < width; i += THREADS) {
#pragma unroll 1
        for (u32 row = 0; row < rows; ++row)
            store_shared_2(to + row * to_stride + i * 2, i < count ? from[row * from_stride + i] : (u16)0);
    }
}

template <class Half>
DEVICE void to_floats(float (&v)[8], const uint4& x) {
    const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) v[2 * i] = Half::to_float((u16)words[i]), v[2 * i + 1] = Half::to_float((u16)(words[i] >> 16));
}

template <class Half>
DEVICE uint4 to_halves(const float (&v)[8]) {
    u32 words[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) words[i] = Half::from_float(v[2 * i]) | (u32)Half::from_float(v[2 * i + 1]) << 16;
    return {words[0], words[1], words[2], words[3]};
}

// Eight elements of a row from `i` on; zeros where there are none. VECTORS promises that all vectors are whole and aligned.
template <bool VECTORS>
DEVICE uint4 load_8(const GemvArgs& args, const u16* row, u32 i) {
    if (VECTORS) return i < args.k ? *(const uint4*)(row + i) : uint4{0, 0, 0, 0};
    auto element = [&](u32 e) { return i + e < args.k ? (u32)row[i + e] : 0u; };
    auto pair = [&](u32 e) { return element(e) | element(e + 1) << 16; };
    return {pair(0), pair(2), pair(4), pair(6)};
}

// Vectors of the norm's weight and of places that a thread has from before the wait for earlier kernels, at most; it loads the
// others when it needs them.
constexpr u32 HELD = 3;

constexpr u32 STEP = NORM_THREADS * 8;

// What does not depend on earlier kernels: of every vector i of the thread's.
struct Held {
    uint4 weight[HELD], places[HELD];

    DEVICE void fetch(const GemvArgs& args) {
#pragma unroll
        for (u32 h = 0; h < HELD; ++h) {
            const u32 i = h * STEP + threadIdx.x * 8;
            weight[h] = places[h] = {0, 0, 0, 0};
            if (h * STEP >= args.k) continue;
            if (args.norm != nullptr && i < args.k) weight[h] = *(const uint4*)(args.norm + i);
            if (args.places != nullptr) places[h] = *(const uint4*)(args.places + i);
        }
    }
};

// From the sums of squares of the warps.
DEVICE float scale_of_row(const GemvArgs& args, u32 sums) {
    float warps[NORM_WARPS];
#pragma unroll
    for (u32 i = 0; i < NORM_WARPS; i += 4) {
        const uint4 four = load_shared_16(sums + i * 4);
        warps[i] = __uint_as_float(four.x), warps[i + 1] = __uint_as_float(four.y);
        warps[i + 2] = __uint_as_float(four.z), warps[i + 3] = __uint_as_float(four.w);
    }
    return norm_scale(warps, args.k, args.eps);
}

template <class Half>
DEVICE uint4 normalised(const uint4& x, const uint4& weight, float scale) {
    float v[8], w[8];
    to_floats<Half>(v, x), to_floats<Half>(w, weight);
    normalise(v, w, scale);
    return to_halves<Half>(v);
}

// What these functions do `then`, when the first loads of x are on their way, is what must not be in front of them: more copies
// of weights.

// Where a block stages: `width` features from `first` on in the order of the units, at `to`.
struct Stage {
    u32 to, stride;     // of rows
    u32 first, width;
    u32 sums;           // room for NORM_WARPS floats a row
};

// Makes the places zero that no column goes to.
DEVICE void clear(u32 at, u32 bytes) {
    for (u32 i = threadIdx.x * 16; i < bytes; i += NORM_THREADS * 16) store_shared_16(at + i, {0, 0, 0, 0});
}

// Rows of x by the whole block, which has to meet before anybody reads them: one after the other, COUNT vectors of a thread
// through registers. Little code, since a block runs all of it once, with nothing of it in the instruction cache.
template <class Half, u32 COUNT, bool VECTORS, class Then>
DEVICE void stage_rows(const GemvArgs& args, Then then, const Held& held, const Stage& stage) {
    auto put = [&](u32 to, u32 i, const uint4& v, const uint4& places) {
        if (args.places == nullptr) {
            if (i < stage.width) store_shared_16(to + i * 2, v);
            return;
        }
        const u32 words[4] = {v.x, v.y, v.z, v.w}, pairs[4] = {places.x, places.y, places.z, places.w};
#pragma unroll
        for (u32 e = 0; e < 8; ++e) {
            const u32 place = (e % 2 ? pairs[e / 2] >> 16 : pairs[e / 2] & 0xFFFF) - stage.first;
            if (i + e < args.k && place < stage.width) store_shared_2(to + place * 2, (u16)(words[e / 2] >> (e % 2 * 16)));
        }
    };
    const u32 end = args.places == nullptr ? stage.width : args.k;
#pragma unroll 1
    for (u32 row = 0; row < args.rows; ++row) {
        const u16* x = args.x + (u64)row * args.x_stride;
        const u32 to = stage.to + row * stage.stride;
        uint4 v[COUNT];
#pragma unroll
        for (u32 h = 0; h < COUNT; ++h) v[h] = load_8<VECTORS>(args, x, h * STEP + threadIdx.x * 8);
        if (row == 0) then();
        float scale = 0.0f;
        if (args.norm != nullptr) {
            const u32 sums = stage.sums + row * NORM_WARPS * 4;
            float sum = 0.0f, floats[8];
#pragma unroll
            for (u32 h = 0; h < COUNT; ++h) {
                to_floats<Half>(floats, v[h]);
                add_squares(sum, floats);
            }
#pragma unroll 1
            for (u32 i = COUNT * STEP + threadIdx.x * 8; i < args.k; i += STEP) {
                to_floats<Half>(floats, load_8<VECTORS>(args, x, i));
                add_squares(sum, floats);
            }
            sum = warp_total(sum);
            if (threadIdx.x % 32 == 0) store_shared_float(sums + threadIdx.x / 32 * 4, sum);
            __syncthreads();
            scale = scale_of_row(args, sums);
        }
#pragma unroll
        for (u32 h = 0; h < COUNT; ++h) {
            const u32 i = h * STEP + threadIdx.x * 8;
            put(to, i, args.norm != nullptr ? normalised<Half>(v[h], held.weight[h], scale) : v[h], held.places[h]);
        }
#pragma unroll 1
        for (u32 i = COUNT * STEP + threadIdx.x * 8; i < end; i += STEP) {
            const bool there = i < args.k;
            const uint4 none = {0, 0, 0, 0};
            uint4 v = load_8<VECTORS>(args, x, i);
            if (args.norm != nullptr) v = normalised<Half>(v, there ? *(const uint4*)(args.norm + i) : none, scale);
            put(to, i, v, args.places != nullptr && there ? *(const uint4*)(args.places + i) : none);
        }
    }
}

// The same with as many registers as the length asks for.
template <class Half, class Then>
DEVICE void stage_rows(const GemvArgs& args, Then then, const Held& held, const Stage& stage) {
    if (!args.x_vectors || args.k % 8 != 0) stage_rows<Half, 1, false>(args, then, held, stage);
    else if (args.k <= STEP) stage_rows<Half, 1, true>(args, then, held, stage);
    else stage_rows<Half, HELD, true>(args, then, held, stage);
}

// Several rows in the order of x, normalised in shared memory.
template <class Half, class Then>
DEVICE void stage_normalised(const GemvArgs& args, Then then, const Held& held, const Stage& stage) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    copy_rows<NORM_THREADS>(stage.to, stage.stride, args.x, args.x_stride, args.rows, args.k, stage.width, args.x_vectors, threadIdx.x);
    then();
    wait_for_copies();
    // A thread normalises what it has copied itself, unless single elements went around.
    if (!args.x_vectors || args.k % 8 != 0) __syncthreads();
#pragma unroll 1
    for (u32 row = 0; row < args.rows; row += 2) {
        const u32 first = stage.to + row * stage.stride, second = row + 1 < args.rows ? first + stage.stride : first;
        float a = 0.0f, b = 0.0f, v[8];
#pragma unroll 1
        for (u32 i = threadIdx.x * 8; i < args.k; i += STEP) {
            to_floats<Half>(v, load_shared_16(first + i * 2));
            add_squares(a, v);
            to_floats<Half>(v, load_shared_16(second + i * 2));
            add_squares(b, v);
        }
        a = warp_total(a), b = warp_total(b);
        const u32 to = stage.sums + (row * NORM_WARPS + warp) * 4;
        if (lane == 0) {
            store_shared_float(to, a);
            if (row + 1 < args.rows) store_shared_float(to + NORM_WARPS * 4, b);
        }
    }
    __syncthreads();
    if (warp < args.rows) {
        const u32 own = stage.sums + warp * NORM_WARPS * 4;
        const float scale = scale_of_row(args, own);
        __syncwarp();
        if (lane == 0) store_shared_float(own, scale);
    }
    __syncthreads();
    auto finish = [&](u32 i, const uint4& weight) {
#pragma unroll 2
        for (u32 row = 0; row < args.rows; ++row) {
            const u32 place = stage.to + row * stage.stride + i * 2;
            const float scale = load_shared_float(stage.sums + row * NORM_WARPS * 4);
            store_shared_16(place, normalised<Half>(load_shared_16(place), weight, scale));
        }
    };
    if (threadIdx.x * 8 < args.k) finish(threadIdx.x * 8, held.weight[0]);
#pragma unroll 1
    for (u32 i = STEP + threadIdx.x * 8; i < args.k; i += STEP) finish(i, *(const uint4*)(args.norm + i));
}

// Four 8 x 8 matrices, of which lane l has row l / 4 and the columns 2 (l % 4) and the next, to shared memory, transposed:
// lane 8 m + c says where column c of matrix m goes.
DEVICE void store_transposed(u32 address, const uint4& m) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(m.x), "r"(m.y), "r"(m.z), "r"(m.w) : "memory");
}

DEVICE uint4 load_transposed(u32 address) {
    uint4 m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w) : "r"(address) : "memory");
    return m;
}

// Up to eight rows of whole, aligned vectors to the layout of columns, by the whole block. Warp w has the columns 256 w ..
// 256 w + 256 of every STEP, as in a norm; lane 4 r + q has those of token r, 8 q .. 8 q + 8 of every 32. `places` are those of
// the columns that a lane gives the address of, eight blocks of 32 at a time. A column that is another block's goes to
// `spare`.
template <class Half, class Then>
DEVICE void stage_columns(const GemvArgs& args, Then then, const Held& held, const Stage& stage, u32 spare) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = lane / 4;
    const u16* x = args.x + (u64)token * args.x_stride;
    const u32 start = warp * 256 + lane % 4 * 8;
    uint4 v[8];
    auto load = [&](u32 from) {
#pragma unroll
        for (u32 b = 0; b < 8; ++b) {
            const u32 i = from + b * 32;
            v[b] = token < args.rows && i < args.k ? *(const uint4*)(x + i) : uint4{0, 0, 0, 0};
        }
    };
    auto put = [&](const uint4& places) {
        const u32 pairs[4] = {places.x, places.y, places.z, places.w};
#pragma unroll
        for (u32 b = 0; b < 8; ++b) {
            const u32 place = (b % 2 ? pairs[b / 2] >> 16 : pairs[b / 2] & 0xFFFF) - stage.first;
            store_transposed(place < stage.width ? stage.to + place * 16 : spare, v[b]);
        }
    };
    load(start);
    then();
    if (args.norm != nullptr) {
        float sum[8] = {}, floats[8];
#pragma unroll 1
        for (u32 from = start;;) {
#pragma unroll
            for (u32 b = 0; b < 8; ++b) {
                to_floats<Half>(floats, v[b]);
                add_squares(sum[b], floats);
            }
            from += STEP;
            if (from - start >= args.k) break;
            load(from);
        }
        if (args.k > STEP) load(start);
        // The tree of `warp_total`, whose lane 4 b + q these eight columns are.
#pragma unroll
        for (u32 step = 4; step > 0; step /= 2)
#pragma unroll
            for (u32 b = 0; b < step; ++b) sum[b] += sum[b + step];
        sum[0] += __shfl_xor_sync(~0u, sum[0], 2);
        sum[0] += __shfl_xor_sync(~0u, sum[0], 1);
        const u32 sums = stage.sums + token * NORM_WARPS * 4;
        if (lane % 4 == 0 && token < args.rows) store_shared_float(sums + warp * 4, sum[0]);
        __syncthreads();
        const float scale = token < args.rows ? scale_of_row(args, sums) : 0.0f;
        auto normalise_held = [&](u32 from) {
#pragma unroll
            for (u32 b = 0; b < 8; ++b) {
                const u32 i = from + b * 32;
                if (i < args.k) v[b] = normalised<Half>(v[b], *(const uint4*)(args.norm + i), scale);
            }
        };
        normalise_held(start);
        put(held.places[0]);
#pragma unroll 1
        for (u32 from = start + STEP, i = STEP + threadIdx.x * 8; from - start < args.k; from += STEP, i += STEP) {
            load(from);
            normalise_held(from);
            put(*(const uint4*)(args.places + i));
        }
        return;
    }
    put(held.places[0]);
#pragma unroll
    for (u32 h = 1; h < HELD; ++h) {
        if (h * STEP >= args.k) return;
        load(start + h * STEP);
        put(held.places[h]);
    }
#pragma unroll 1
    for (u32 from = start + HELD * STEP, i = HELD * STEP + threadIdx.x * 8; from - start < args.k; from += STEP, i += STEP) {
        load(from);
        put(*(const uint4*)(args.places + i));
    }
}

// The part of x that a warp stages by itself, in the order of x, as it is: what it multiplies, or every `step`-th row of that.
template <class Then>
DEVICE void stage_part(const GemvArgs& args, Then then, u32 to, u32 stride, u32 first, u32 width, u32 row, u32 step) {
    const u32 count = first < args.k ? min(width, args.k - first) : 0;
    const u32 rows = row < args.rows ? (args.rows - row + step - 1) / step : 0;
    copy_rows<32>(to + row * stride, step * stride, args.x + (u64)row * args.x_stride + first, (u64)step * args.x_stride,
                  rows, count, width, args.x_vectors, threadIdx.x % 32);
    then();
    wait_for_copies();
}
