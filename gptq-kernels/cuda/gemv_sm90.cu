// y = x W^T + bias, with its prologue and epilogue, for 4-bit weights and up to 8 rows of x, on Hopper.
//
// The weight is a matrix of units: 32 output features x 128 input features, one contiguous run of bytes each (layout in
// `unit.cuh`). The units of a stripe of 32 output features are divided into 16 parts, always the same ones; WARPS_K
// warps of a block take a part each, and the blocks of a cluster take the 16 / WARPS_K slices of the input features. A
// block has WARPS_N stripes in flight, and clusters walk over the stripes.
//
//     1  every warp starts the bulk copy of its first unit into a ring of its own: weights depend on no earlier kernel
//     2  wait for the kernel before this one, then every warp stages its part of x, or the block all of it (normalised if
//        the layer has that prologue, in another order if it is act-ordered)
//     3  unit by unit: codes to exact halves (code - zero), tensor core over one group, times the scale in float32
//     4  push the part's sums into the shared memory of the block that finishes these output features
//     5  finish these stripes: the bias, the 16 parts in order, the epilogue, round, store; where a block has all parts, one round
//        later, so that no warp waits for another
//
// No float atomics, and no order of addition that depends on timing, on the number of rows or on the shape of blocks and
// clusters: results repeat to the bit, and row r of y depends on row r of x alone.
#include "gemv_stage.cuh"
#include "unit.cuh"

// What becomes of the product p: y = p; y += p; y = silu(gate) * up, where 16 features of the units are 8 of gate and the
// same 8 of up.
constexpr u32 ADD = 1, SILU_MUL = 2;

constexpr u32 PARTS = 16;

DEVICE u32 part_start(u32 k_units, u32 part) { return k_units * part / PARTS; }

// g / (1 + exp(-g)), within a few units of float32.
DEVICE float silu(float gate) {
    float power, out;
    asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.4426950408889634f));
    asm("div.full.f32 %0, %1, %2;" : "=f"(out) : "f"(gate), "f"(1.0f + power));
    return out;
}

// `mbarrier_expect` and `bulk_copy` by one thread of the warp, whose arguments are the same in all of them. In one piece, so
// that the compiler knows of the one thread and needs no loop over the lanes.
DEVICE void bulk_copy_elected(u32 to_shared, const void* from_global, u32 bytes, u32 barrier) {
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xFFFFFFFF;\n"
        "@elected mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
        "@elected cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n"
        "}" ::"r"(to_shared), "l"(from_global), "r"(bytes), "r"(barrier) : "memory");
}

DEVICE void mbarrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// A lane's places in a unit.
template <u32 GROUPS>
struct Places {
    u32 codes, scales, zeros;
    DEVICE explicit Places(u32 lane)
        : codes((lane ^ lane / 8) * 16), scales(2048 + lane / 4 * 8), zeros(2048 + GROUPS * 64 + lane / 4 * (4 * zero_bytes(GROUPS))) {}
};

// What a lane has of a unit.
template <u32 GROUPS, bool ASYM>
struct Unit {
    uint4 codes[4]; // of the four fragments
    uint2 scales[GROUPS];
    u32 zeros[ASYM ? GROUPS : 1][2]; // bytes, or halves of words if a zero has two bytes

    DEVICE Unit(u32 unit, const Places<GROUPS>& places) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) codes[i] = load_shared_16(unit + places.codes + i * 512);
#pragma unroll
        for (u32 group = 0; group < GROUPS; ++group) {
            scales[group] = load_shared_8(unit + places.scales + group * 64);
            if (ASYM && zero_bytes(GROUPS) == 2) {
                const uint2 pair = load_shared_8(unit + places.zeros);
                zeros[group][0] = pair.x, zeros[group][1] = pair.y;
            } else if (ASYM) zeros[group][0] = load_shared_4(unit + places.zeros + group * 32);
        }
    }
};

// acc += unit * x / UNIT: `x` is the lane's place in the rows or columns of x, at the unit's first input feature.
template <class Half, u32 GROUPS, bool ASYM, bool COLUMNS>
DEVICE void multiply_unit(float (&acc)[2][4], const Unit<GROUPS, ASYM>& unit, u32 x) {
    constexpr u32 STEPS = 8 / GROUPS; // steps of 16 input features in a group
    float sum[2][4];
    Zero zero[2][2];
#pragma unroll
    for (u32 f = 0; f < 2; ++f) {
        const uint4 lower = COLUMNS ? load_transposed(x + f * 1024) : load_shared_16(x + f * 128);
        const uint4 upper = COLUMNS ? load_transposed(x + f * 1024 + 512) : load_shared_16(x + f * 128 + 64);
        const u32 b[8] = {lower.x, lower.y, lower.z, lower.w, upper.x, upper.y, upper.z, upper.w};
#pragma unroll
        for (u32 s = 0; s < 4; ++s) {
            const u32 step = f * 4 + s, group = step / STEPS;
            if (step % STEPS == 0) {
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
#pragma unroll
                    for (u32 u = 0; u < 2; ++u) {
                        const u32 byte = (h * 2 + u) * zero_bytes(GROUPS);
                        zero[h][u] = Codes<Half>::template zero<ASYM>(ASYM ? unit.zeros[group][byte / 4] : 0, byte % 4);
                    }
                    for (u32 e = 0; e < 4; ++e) sum[h][e] = 0.0f;
                }
            }
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                const uint4& codes = unit.codes[h * 2 + f];
                const u32 first = s % 2 ? codes.z : codes.x, second = s % 2 ? codes.w : codes.y;
                u32 a[4];
                Codes<Half>::expand(a[0], a[1], first >> (s / 2 * 8), zero[h]);
                Codes<Half>::expand(a[2], a[3], second >> (s / 2 * 8), zero[h]);
                Half::mma(sum[h], a, b[2 * s], b[2 * s + 1]);
            }
            if ((step + 1) % STEPS == 0) {
                const uint2 pair = unit.scales[group];
                const float scale[2][2] = {{Fp16::to_float((u16)pair.x), Fp16::to_float((u16)(pair.x >> 16))},
                                           {Fp16::to_float((u16)pair.y), Fp16::to_float((u16)(pair.y >> 16))}};
#pragma unroll
                for (u32 h = 0; h < 2; ++h)
#pragma unroll
                    for (u32 e = 0; e < 4; ++e) acc[h][e] += scale[h][e / 2] * sum[h][e];
            }
        }
    }
}

// BY_BLOCK: x may be normalised or brought into another order, by the whole block; COLUMNS: in the layout of columns.
template <class Half, u32 GROUPS, bool ASYM, u32 WARPS_N, u32 WARPS_K, u32 DEPTH, bool BY_BLOCK, bool COLUMNS>
DEVICE void gemv(const GemvArgs& args) {
    constexpr u32 WARPS = WARPS_N * WARPS_K, THREADS = WARPS * 32, SLICES = PARTS / WARPS_K;
    constexpr u32 FEATURES = WARPS_N * 32, OWNED = FEATURES / SLICES; // of a cluster; finished by one block of it
    constexpr u32 UNIT = unit_bytes(GROUPS, ASYM), RING = DEPTH * UNIT;
    // A round is finished while the next one is multiplied, unless the blocks of a cluster have to meet anyway.
    constexpr bool LATE = SLICES == 1;
    const u32 slots = args.slots; // of sums, 1 or 2
    extern __shared__ __align__(128) u8 shared_memory[];

    // `uniform` and `opaque` keep the compiler from deriving these anew in every iteration.
    const u32 shared = uniform(shared_address(shared_memory));
    const u32 lane = opaque(threadIdx.x % 32), warp = uniform(threadIdx.x / 32);
    const u32 warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
    const u32 slice = SLICES == 1 ? 0 : cluster_rank(), part = slice * WARPS_K + warp_k;
    const u32 first_unit = part_start(args.k_units, part), part_units = part_start(args.k_units, part + 1) - first_unit;
    const u32 stripes = (args.n + 31) / 32, stripe_step = gridDim.x / SLICES * WARPS_N;
    const u32 first_stripe = blockIdx.x / SLICES * WARPS_N;
    const u32 rounds = first_stripe < stripes ? (stripes - first_stripe + stripe_step - 1) / stripe_step : 0;

    // Shared memory: barriers, rings, x, sums, those of the norm, barriers of the sums; what columns of other blocks overwrite.
    const u32 barriers = shared + warp * DEPTH * 8;
    const u32 rings = shared + ring_offset(WARPS, DEPTH), ring = rings + warp * RING;
    const u32 x_first = part_start(args.k_units, slice * WARPS_K);
    const u32 x_width = (part_start(args.k_units, (slice + 1) * WARPS_K) - x_first) * 128;
    const u32 staged = rings + (WARPS * RING + 127) / 128 * 128;
    // Units of the widest slice, so that addresses are the same in all blocks of the cluster. Rows are 64 bytes apart in the
    // banks: two rows a phase, no conflict.
    const u32 x_units = SLICES == 1 ? args.k_units : (args.k_units + SLICES - 1) / SLICES + 1, x_stride = x_units * 256 + 64;
    const u32 x_bytes = COLUMNS ? x_units * 2048 : args.rows * x_stride, x_place = (first_unit - x_first) * (COLUMNS ? 2048 : 256);
    const u32 sums = staged + x_bytes, slot_bytes = PARTS * args.rows * OWNED * 4, norm_sums = sums + slots * slot_bytes;
    const u32 full = norm_sums + (BY_BLOCK ? args.rows * NORM_WARPS * 4 : 0), empty = full + 16; // of the slots
    const u32 spare = full + 32 + lane % 8 * 16 + warp * 128;

    // The stream of units: all of the part's in one stripe, then in the next stripe of this warp.
    const u8* source = args.units + ((u64)(first_stripe + warp_n) * args.k_units + first_unit) * UNIT;
    const u32 jump = uniform((stripe_step * args.k_units - part_units + 1) * UNIT);
    u32 left_in_stripe = part_units;
    u32 left = first_stripe + warp_n < stripes ? (stripes - first_stripe - warp_n + stripe_step - 1) / stripe_step * part_units : 0;
    const u32 ring_end = uniform(ring + RING);
    u32 unit = ring, barrier_at = barriers, parity = 0;
    auto fetch = [&] { // into the current slot
        if (left == 0) return;
        bulk_copy_elected(unit, source, UNIT, barrier_at);
        --left, --left_in_stripe;
        source += left_in_stripe == 0 ? jump : UNIT;
        if (left_in_stripe == 0) left_in_stripe = part_units;
    };
    auto advance = [&] {
        unit += UNIT, barrier_at += 8;
        if (unit == ring_end) unit = ring, barrier_at = barriers, parity ^= 1;
    };
    if (lane == 0) {
        for (u32 i = 0; i < DEPTH; ++i) mbarrier_init(barriers + i * 8, 1);
        if (LATE && warp == 0)
            for (u32 i = 0; i < 2; ++i) mbarrier_init(full + i * 8, THREADS), mbarrier_init(empty + i * 8, args.rows * 32);
        fence_mbarrier_init();
    }
    __syncwarp();
    // One unit now and the others behind x, which would have to wait for all of them: bulk copies are issued slowly.
    fetch(), advance();
    auto fill = [&] {
        __syncwarp();
#pragma unroll
        for (u32 i = 1; i < DEPTH; ++i) fetch(), advance();
        parity = 0; // the slots are full, but none has been waited for
        __syncwarp();
    };
    if (SLICES > 1) cluster_arrive();
    launch_dependents();
    Held held;
    if (BY_BLOCK) {
        held.fetch(args);
        if (args.padded) clear(staged, x_bytes), __syncthreads();
    }

    // Rows beyond the last repeat the last; their results are dropped.
    const u32 x_start = staged + x_place + (COLUMNS ? lane * 16 : min(lane / 4, args.rows - 1) * x_stride + lane % 4 * 16);
    const Places<GROUPS> places(lane);

    // A row of x is finished by one warp, one output a thread: by one of warps 0 to 7 and of 8 to 15 in turn, so that no warp has to
    // finish two rounds that follow each other.
    static_assert(OWNED == 32 && WARPS == 16, "");
    const u32 owned = slice * OWNED + lane;
    auto token_of = [&](u32 round) { return LATE ? (warp + round % 2 * 8) % 16 : warp; };
    // The slot of a round's sums, and how often it has been used before.
    auto slot_of = [&](u32 round) { return round & (slots - 1); };
    auto use_of = [&](u32 round) { return round >> (slots - 1); };
    u32 added = 0; // of bias in the upper half, of y in the lower
    // Fetches what the product is added to, ahead of its use.
    auto begin = [&](u32 stripe, u32 token) {
        const u32 feature = stripe * 32 + owned;
        if (token >= args.rows || feature >= args.n) return;
        added = args.bias != nullptr ? (u32)args.bias[feature] << 16 : 0;
        if (args.epilogue == ADD) added |= args.y[(u64)token * args.y_stride + feature];
    };
    // Adds the parts in `slot` of the stripes from `stripe` on that this block finishes.
    auto finish = [&](u32 stripe, u32 token, u32 slot) {
        if (token >= args.rows) return;
        const u32 feature = stripe * 32 + owned;
        float part_sum[PARTS];
#pragma unroll
        for (u32 p = 0; p < PARTS; ++p) part_sum[p] = load_shared_float(slot + ((p * args.rows + token) * OWNED + lane) * 4);
        float sum = Fp16::to_float((u16)(added >> 16)) + Half::to_float((u16)added);
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
    // When all parts of a round are there, which the warp's own next round has left time for.
    auto finish_late = [&](u32 round) {
        const u32 token = token_of(round), slot = slot_of(round);
        if (token >= args.rows) return;
        mbarrier_wait(full + slot * 8, use_of(round) % 2);
        __syncwarp();
        finish(first_stripe + round * stripe_step, token, sums + slot * slot_bytes);
        mbarrier_arrive(empty + slot * 8);
    };
    auto cluster_barrier = [&] { __syncwarp(), cluster_arrive(), cluster_wait(); };

    if (LATE) __syncthreads(); // the barriers of the sums have been made
    wait_for_dependencies();
    static_assert(THREADS == NORM_THREADS, "");
    const Stage stage = {staged, x_stride, x_first * 128, x_width, norm_sums};
    if (COLUMNS) stage_columns<Half>(args, fill, held, stage, spare);
    else if (!BY_BLOCK) stage_part(args, fill, staged + x_place, x_stride, first_unit * 128, part_units * 128, warp_n, WARPS_N);
    else if (args.rows == 1 || args.places != nullptr) stage_rows<Half>(args, fill, held, stage);
    else stage_normalised<Half>(args, fill, held, stage);
    if (WARPS_N > 1 || BY_BLOCK) __syncthreads();
    else __syncwarp();
    if (SLICES > 1) cluster_wait(); // all blocks have started

#pragma unroll 1
    for (u32 round = 0; round < rounds; ++round) {
        const u32 stripe = first_stripe + round * stripe_step, slot = slot_of(round);
        begin(stripe, token_of(round));
        float acc[2][4] = {};
        const u32 count = stripe + warp_n < stripes ? part_units : 0;
        u32 x_address = x_start;
#pragma unroll 1
        for (u32 i = count; i != 0; --i) {
            mbarrier_wait(barrier_at, parity);
            __syncwarp();
            const Unit<GROUPS, ASYM> held(unit, places);
            __syncwarp(); // all lanes have read the slot
            fetch();
            advance();
            multiply_unit<Half, GROUPS, ASYM, COLUMNS>(acc, held, x_address);
            x_address += COLUMNS ? 2048 : 256;
        }

        if (LATE) {
            if (round > 0) finish_late(round - 1);
            if (round >= slots) mbarrier_wait(empty + slot * 8, (use_of(round) - 1) % 2), __syncwarp();
        } else if (round > 0) {
            cluster_barrier(); // the sums of the round before have been added
        }
#pragma unroll
        for (u32 tile = 0; tile < 2; ++tile) {
#pragma unroll
            for (u32 upper = 0; upper < 2; ++upper) {
                const u32 feature = warp_n * 32 + tile * 16 + upper * 8 + lane / 4;
                const u32 local = sums + slot * slot_bytes + (part * args.rows * OWNED + feature % OWNED) * 4;
                const u32 address = SLICES == 1 ? local : remote_address(local, feature / OWNED);
#pragma unroll
                for (u32 odd = 0; odd < 2; ++odd) {
                    const u32 token = (lane % 4) * 2 + odd;
                    const float value = acc[tile][upper * 2 + odd] * Codes<Half>::UNIT;
                    if (SLICES == 1) store_shared_float_if(token < args.rows, address + token * OWNED * 4, value);
                    else remote_store_if(token < args.rows, address + token * OWNED * 4, value);
                }
            }
        }
        if (LATE) {
            mbarrier_arrive(full + slot * 8);
        } else {
            cluster_barrier();
            finish(stripe, token_of(round), sums);
        }
    }
    if (LATE && rounds > 0) finish_late(rounds - 1);
}

#ifndef PROTOTYPE
// One image holds one type of activations (IMAGE_HALF), group size (IMAGE_GROUPS in a unit) and kind of zero (IMAGE_ASYM), and
// layers whose x is as it is (IMAGE_BY_BLOCK false) or any others: what brings x to them is most of the code, takes the driver ten
// times as long to compile, and takes registers, which attention has to find beside a block that waits for it.
//
// `gemv_<WARPS_N>x<WARPS_K>_<DEPTH>`; `block_` and `columns_`, the latter for act-ordered layers and several rows. One block has the
// registers of a multiprocessor: two at a time, so that the next kernel could fill its rings early, leave a thread 64 of them and are slower.
#define GEMV(NAME, WARPS_N, WARPS_K, DEPTH, BY_BLOCK, COLUMNS) \
    extern "C" __global__ void __launch_bounds__(WARPS_N * WARPS_K * 32, 1) \
        NAME##_##WARPS_N##x##WARPS_K##_##DEPTH(const __grid_constant__ GemvArgs args) { \
        gemv<IMAGE_HALF, IMAGE_GROUPS, IMAGE_ASYM, WARPS_N, WARPS_K, DEPTH, BY_BLOCK, COLUMNS>(args); \
    }
#if IMAGE_BY_BLOCK
GEMV(block, 1, 16, 2, true, false)
GEMV(block, 2, 8, 2, true, false)
GEMV(columns, 1, 16, 2, true, true)
GEMV(columns, 2, 8, 2, true, true)
#else
GEMV(gemv, 1, 16, 2, false, false)
GEMV(gemv, 2, 8, 2, false, false)
#endif
#endif
