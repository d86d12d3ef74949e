// y = x W^T + bias for 4-bit weights and up to 16 rows of x, on Hopper.
//
// The weight is a matrix of units: 32 output features x 128 input features, one contiguous run of bytes each (layout in
// `unit.cuh`). The units of a stripe of 32 output features are divided into 16 parts, always the same ones; WARPS_K
// warps of a block take a part each, and the blocks of a cluster take the 16 / WARPS_K slices of the input features. A
// block has WARPS_N stripes in flight, and clusters walk over the stripes.
//
//     1  every warp starts bulk copies of its first units into a ring of its own: weights depend on no earlier kernel
//     2  wait for the kernel before this one, then stage the slice of x (gathered if the layer is act-ordered)
//     3  unit by unit: codes to exact halves (code - zero), tensor core over one group, times the scale in float32
//     4  push the part's sums into the shared memory of the block that finishes these output features
//     5  finish these stripes: the bias, the 16 parts in order, the epilogue, round, store
//
// No float atomics, and no order of addition that depends on timing, on the number of rows or on the shape of blocks and
// clusters: results repeat to the bit, and row r of y depends on row r of x alone.
#include "hopper.cuh"
#include "unit.cuh"

struct GemvArgs {
    const u8* units;      // (ceil(n / 32), k_units) units
    const u16* x;         // (rows, k), x_stride apart
    u16* y;               // (rows, columns), y_stride apart
    const u16* bias;      // (n), fp16, in the order of the units, or null
    const u16* gather;    // (k_units * 128) column of x, or NONE for a zero; null for the identity
    u32 rows, n, k;
    u32 x_stride, y_stride;
    u32 k_units;
    u32 x_vectors;        // x and its rows are aligned to 16 bytes
    u32 raw_rows;         // rows that are gathered at a time
    u32 columns;          // n, or half of the features without padding for SILU_MUL
    u32 epilogue;         // STORE, ADD or SILU_MUL
    u32 launch_at;        // units that a warp has yet to fetch when the next kernel may start
};

// What becomes of the product p: y = p; y += p; y = silu(gate) * up, where 16 features of the units are 8 of gate and the
// same 8 of up.
constexpr u32 ADD = 1, SILU_MUL = 2;

constexpr u32 PARTS = 16;

DEVICE u32 part_start(u32 k_units, u32 part) { return k_units * part / PARTS; }

constexpr u32 NONE = 0xFFFF;

// g / (1 + exp(-g)), within a few units of float32.
DEVICE float silu(float gate) {
    float power, out;
    asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.4426950408889634f));
    asm("div.full.f32 %0, %1, %2;" : "=f"(out) : "f"(gate), "f"(1.0f + power));
    return out;
}

// Starts copying `count` halves of each row into shared memory, and writes zeros behind them up to `width`.
template <u32 THREADS>
DEVICE void copy_rows(u32 to, u32 to_stride, const u16* from, u32 from_stride, u32 rows, u32 count, u32 width, bool vectors) {
    const u32 whole = vectors ? count / 8 * 8 : 0;
#pragma unroll 1
    for (u32 i = threadIdx.x * 8; i < whole; i += THREADS * 8) {
#pragma unroll 4
        for (u32 row = 0; row < rows; ++row) copy_16(to + row * to_stride + i * 2, from + (u64)row * from_stride + i);
    }
#pragma unroll 1
    for (u32 i = whole + threadIdx.x; i < width; i += THREADS) {
#pragma unroll 1
        for (u32 row = 0; row < rows; ++row)
            store_shared_2(to + row * to_stride + i * 2, i < count ? from[(u64)row * from_stride + i] : (u16)0);
    }
}

// Fills the rows of x, `stride` bytes apart, with columns `first .. first + width` in the order of the units. If that is
// not the order of x, whole rows go to `raw` first, `raw_rows` at a time, and are picked from there: scattered reads of
// global memory would take longer than all the rest.
template <u32 THREADS>
DEVICE void stage_x(const GemvArgs& args, u32 staged, u32 stride, u32 first, u32 width, u32 index, u32 raw) {
    if (args.gather == nullptr) {
        const u32 count = first < args.k ? min(width, args.k - first) : 0;
        copy_rows<THREADS>(staged, stride, args.x + first, args.x_stride, args.rows, count, width, args.x_vectors);
        wait_for_copies();
        return;
    }
    const u32 raw_stride = (args.k * 2 + 15) / 16 * 16;
#pragma unroll 1
    for (u32 start = 0; start < args.rows; start += args.raw_rows) {
        const u32 rows = min(args.raw_rows, args.rows - start);
        if (start > 0) __syncthreads();
        copy_rows<THREADS>(raw, raw_stride, args.x + (u64)start * args.x_stride, args.x_stride, rows, args.k, args.k, args.x_vectors);
        wait_for_copies();
        __syncthreads();
#pragma unroll 1
        for (u32 i = threadIdx.x * 2; i < width; i += THREADS * 2) {
            const u32 columns = load_shared_4(index + i * 2), lower = columns & 0xFFFF, upper = columns >> 16;
#pragma unroll 4
            for (u32 row = 0; row < rows; ++row) {
                const u32 from = raw + row * raw_stride;
                const u32 pair = (lower == NONE ? 0 : load_shared_2(from + lower * 2)) |
                                 (upper == NONE ? 0 : load_shared_2(from + upper * 2)) << 16;
                store_shared_4(staged + (start + row) * stride + i * 2, pair);
            }
        }
    }
}

template <class Half, u32 N_TILES, u32 GROUPS, bool ASYM, u32 WARPS_N, u32 WARPS_K, u32 DEPTH>
DEVICE void gemv(const GemvArgs& args) {
    constexpr u32 WARPS = WARPS_N * WARPS_K, THREADS = WARPS * 32, SLICES = PARTS / WARPS_K;
    constexpr u32 FEATURES = WARPS_N * 32, OWNED = FEATURES / SLICES; // of a cluster; finished by one block of it
    constexpr u32 UNIT = unit_bytes(GROUPS, ASYM), RING = DEPTH * UNIT;
    extern __shared__ __align__(128) u8 shared_memory[];

    // `uniform` and `opaque` keep the compiler from deriving these anew in every iteration.
    const u32 shared = uniform(shared_address(shared_memory));
    const u32 lane = opaque(threadIdx.x % 32), warp = uniform(threadIdx.x / 32);
    const u32 warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
    const u32 slice = SLICES == 1 ? 0 : cluster_rank(), part = slice * WARPS_K + warp_k;
    const u32 first_unit = part_start(args.k_units, part), part_units = part_start(args.k_units, part + 1) - first_unit;
    const u32 stripes = (args.n + 31) / 32, stripe_step = gridDim.x / SLICES * WARPS_N;
    const u32 first_stripe = blockIdx.x / SLICES * WARPS_N;
    const i32 rounds = first_stripe < stripes ? (stripes - first_stripe + stripe_step - 1) / stripe_step : 0;

    // Shared memory: barriers, rings, x, sums; columns to gather and rows to gather them from.
    const u32 barriers = shared + warp * (DEPTH * 8);
    const u32 rings = shared + ring_offset(WARPS, DEPTH), ring = rings + warp * RING;
    const u32 x_first = part_start(args.k_units, slice * WARPS_K);
    const u32 x_width = (part_start(args.k_units, (slice + 1) * WARPS_K) - x_first) * 128;
    const u32 staged = rings + (WARPS * RING + 127) / 128 * 128;
    // Rows 64 bytes apart in the banks: two rows a phase, no conflict. The same in all blocks of the cluster.
    const u32 x_stride = ((args.k_units + SLICES - 1) / SLICES + 1) * 256 + 64;
    const u32 sums = staged + args.rows * x_stride, sums_bytes = PARTS * args.rows * OWNED * 4;
    const u32 index = sums + sums_bytes, raw = index + x_width * 2;

    // The stream of units: all of the part's in one stripe, then in the next stripe of this warp.
    const u8* source = args.units + ((u64)(first_stripe + warp_n) * args.k_units + first_unit) * UNIT;
    const u64 stripe_jump = ((u64)stripe_step * args.k_units - part_units) * UNIT;
    u32 left_in_stripe = part_units;
    u32 left = first_stripe + warp_n < stripes ? (stripes - first_stripe - warp_n + stripe_step - 1) / stripe_step * part_units : 0;
    u32 slot = 0, parity = 0;
    auto fetch = [&] { // into the current slot
        if (left == 0) return;
        if (lane == 0) {
            mbarrier_expect(barriers + slot * 8, UNIT);
            bulk_copy(ring + slot * UNIT, source, UNIT, barriers + slot * 8);
        }
        if (--left == args.launch_at) launch_dependents();
        source += UNIT;
        if (--left_in_stripe == 0) left_in_stripe = part_units, source += stripe_jump;
    };
    auto advance = [&] {
        if (++slot == DEPTH) slot = 0, parity ^= 1;
    };
    if (lane == 0) {
        for (u32 i = 0; i < DEPTH; ++i) mbarrier_init(barriers + i * 8, 1);
        fence_mbarrier_init();
    }
    for (u32 i = 0; i < DEPTH; ++i) fetch(), advance();
    parity = 0;
    __syncwarp();
    if (SLICES > 1) cluster_arrive();
    if (left <= args.launch_at) launch_dependents();
    if (args.gather != nullptr) copy_rows<THREADS>(index, 0, args.gather + x_first * 128, 0, 1, x_width, x_width, true);

    // Rows beyond the last repeat the last; their results are dropped.
    u32 x_start[N_TILES];
    for (u32 t = 0; t < N_TILES; ++t) {
        const u32 row = min(t * 8 + lane / 4, args.rows - 1);
        x_start[t] = staged + row * x_stride + (lane % 4) * 16 + (first_unit - x_first) * 256;
    }

    // At most one output a thread, and one row of x a warp.
    static_assert(OWNED == 32 && 8 * OWNED <= THREADS, "");
    const u32 token = threadIdx.x / OWNED, owned = slice * OWNED + threadIdx.x % OWNED;
    const bool finishes = threadIdx.x < args.rows * OWNED;
    u16 bias = 0, before = 0;
    // Fetches what the product is added to, ahead of its use.
    auto begin = [&](u32 stripe) {
        const u32 feature = stripe * 32 + owned;
        if (!finishes || feature >= args.n) return;
        if (args.bias != nullptr) bias = args.bias[feature];
        if (args.epilogue == ADD) before = args.y[(u64)token * args.y_stride + feature];
    };
    // Adds the parts of the stripes from `stripe` on that this block finishes.
    auto finish = [&](u32 stripe) {
        if (!finishes) return;
        const u32 feature = stripe * 32 + owned;
        float part_sum[PARTS];
#pragma unroll
        for (u32 p = 0; p < PARTS; ++p) part_sum[p] = load_shared_float(sums + (p * args.rows * OWNED + threadIdx.x) * 4);
        float sum = Fp16::to_float(bias) + Half::to_float(before);
#pragma unroll
        for (u32 p = 0; p < PARTS; ++p) sum += part_sum[p];
        u32 column = feature;
        if (args.epilogue == SILU_MUL) {
            const float up = __shfl_xor_sync(~0u, sum, 8);
            sum = silu(sum) * up;
            column = feature % 16 < 8 ? feature / 16 * 8 + feature % 8 : ~0u;
        }
        if (column < args.columns) args.y[(u64)token * args.y_stride + column] = Half::from_float(sum);
    };
    // Of the block, or of the cluster.
    auto barrier = [&] {
        if (SLICES > 1) __syncwarp(), cluster_arrive(), cluster_wait();
        else __syncthreads();
    };

    // Round -1 is a rehearsal: it computes nothing of use, from whatever is where x and the sums will be, but brings the
    // instructions into the cache while the kernel before this one still runs.
#pragma unroll 1
    for (i32 round = -1; round < rounds; ++round) {
        const u32 stripe = first_stripe + round * stripe_step;
        if (round == 0) {
            wait_for_dependencies();
            stage_x<THREADS>(args, staged, x_stride, x_first * 128, x_width, index, raw);
            __syncthreads();
            if (SLICES > 1) cluster_wait(); // all blocks have started
        }
        if (round >= 0) begin(stripe);
        float acc[2][N_TILES][4] = {};
        const u32 count = round < 0 ? 1 : stripe + warp_n < stripes ? part_units : 0;
        u32 x_address[N_TILES];
        for (u32 t = 0; t < N_TILES; ++t) x_address[t] = x_start[t];
#pragma unroll 1
        for (u32 i = 0; i < count; ++i) {
            if (round >= 0) mbarrier_wait(barriers + slot * 8, parity);
            multiply_unit<Half, N_TILES, GROUPS, ASYM>(acc, round < 0 ? staged : ring + slot * UNIT, x_address, lane);
            if (round < 0) break;
            __syncwarp();
            fetch();
            advance();
            for (u32 t = 0; t < N_TILES; ++t) x_address[t] += 256;
        }

        if (round > 0) barrier(); // the sums of the round before have been added
        const u32 tokens = round < 0 ? 0 : args.rows;
#pragma unroll
        for (u32 tile = 0; tile < 2; ++tile) {
#pragma unroll
            for (u32 upper = 0; upper < 2; ++upper) {
                const u32 feature = warp_n * 32 + tile * 16 + upper * 8 + lane / 4;
                const u32 local = sums + (part * args.rows * OWNED + feature % OWNED) * 4;
                const u32 address = SLICES == 1 ? local : remote_address(local, feature / OWNED);
#pragma unroll
                for (u32 t = 0; t < N_TILES; ++t) {
#pragma unroll
                    for (u32 odd = 0; odd < 2; ++odd) {
                        const u32 token = t * 8 + (lane % 4) * 2 + odd;
                        const float value = acc[tile][t][upper * 2 + odd];
                        if (SLICES == 1) store_shared_float_if(token < tokens, address + token * OWNED * 4, value);
                        else remote_store_if(token < tokens, address + token * OWNED * 4, value);
                    }
                }
            }
        }
        if (round < 0) __syncthreads();
        else barrier();
        finish(round < 0 ? ~0u / 64 : stripe); // in the rehearsal, of stripes that do not exist
    }
}

#ifndef PROTOTYPE
// One image holds one type of activations (IMAGE_HALF), group size (IMAGE_GROUPS in a unit) and kind of zero (IMAGE_ASYM).
//
// `gemv_<token tiles>_<WARPS_N>x<WARPS_K>_<DEPTH>`; BLOCKS is how many blocks of it fit the registers of a multiprocessor.
#define GEMV(TILES, WARPS_N, WARPS_K, DEPTH, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(WARPS_N * WARPS_K * 32, BLOCKS) \
        gemv_##TILES##_##WARPS_N##x##WARPS_K##_##DEPTH(const __grid_constant__ GemvArgs args) { \
        gemv<IMAGE_HALF, TILES, IMAGE_GROUPS, IMAGE_ASYM, WARPS_N, WARPS_K, DEPTH>(args); \
    }
GEMV(1, 1, 16, 2, 2)
GEMV(1, 1, 16, 3, 2)
GEMV(1, 2, 8, 2, 2)
#endif
