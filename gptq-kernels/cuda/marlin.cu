// y = x W^T + bias for 4- and 8-bit weights and any number of rows, by the tensor cores of sm_80 and later.
//
// The weight is a matrix of units, 128 output features x 128 input features, one contiguous run of bytes each (layout in
// `marlin_tiles.rs`). A block of 16 warps has a tile of one or two units' output features and of TOKENS rows of x at a
// time, and goes along the input features:
//
//     1  cp.async brings the units after next, and the columns of x for them, into a ring in shared memory
//     2  a warp expands the codes of 32 features and 64 input features to halves, code - zero, exactly
//     3  tensor core over these 64 (or one group, if it is shorter) for eight rows after the other, times the scale in
//        float32, added to the rows' sums
//     4  at the end of the tile, the halves of units that two warps have are added, then the parts that other blocks have,
//        then the bias; the epilogue; round, store
//
// Units are numbered along the input features, then from tile to tile, and each of `parts` blocks takes an equal share
// of the numbers, wherever tiles begin or end. Parts of a tile go to the workspace; the block that is last to arrive adds
// them, from the first to the last, so that the result does not depend on who that is. Blocks for other rows divide the
// units in the same way.
#include "ampere.cuh"
#include "codes.cuh"

struct MarlinArgs {
    const u8* units;   // (tiles of 128, k_units) units
    const u16* x;      // (rows, k), x_stride apart; 16-byte aligned and k a multiple of 8, unless gathered
    u16* y;            // (rows, n), y_stride apart
    const u16* bias;   // in the order of the units, fp16, or null; for whole tiles of any size
    float* partials;   // (token_blocks, partial_places) sums of a tile
    u64* arrivals;     // (token_blocks, tiles)
    u64 ticket;        // of this launch; the lowest byte is 0
    u64 x_stride, y_stride;
    u32 rows, n, k;
    u32 unit_rows;     // tiles of 128 features
    u32 tiles, k_units;
    u32 parts, share, larger; // parts below `larger` have share + 1 units, the others share
    u32 token_blocks, partial_places;
    u32 groups;        // in a unit
    u32 stages;        // of the ring
    u32 epilogue;
    u32 y_vectors;     // y and its rows are aligned to 16 bytes
    u32 gathered;      // x is not in order, not aligned, or k is no multiple of 8; for up to 16 rows
    const u16* gather; // (k_units * 128) column of x, or NONE for a zero; null for the identity
};

constexpr u32 DEPTH = 128, NONE = 0xFFFF, MOST_STAGES = 6;
constexpr u32 ADD = 1, SILU_MUL = 2; // otherwise, only store

// Waits until all but the last `stages - 2` units of the ring have arrived.
DEVICE void wait_for_stage(u32 stages) {
    if (stages <= 2) wait_for_copies<0>();
    else if (stages == 3) wait_for_copies<1>();
    else if (stages == 4) wait_for_copies<2>();
    else if (stages == 5) wait_for_copies<3>();
    else wait_for_copies<4>();
}

DEVICE float silu(float gate) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(gate * -1.4426950408889634f));
    return gate / (1.0f + e);
}

// How many have arrived at a counter in this launch. It may hold anything before the first: the workspace belongs to the
// caller, and others have written to it. A ticket is a larger number than the bits of any two floats, but for NaNs
// that arithmetic never yields.
DEVICE u32 arrive(u64* counter, u64 ticket) {
    atomicMax(counter, ticket);
    return (u32)(atomicAdd(counter, 1ull) - ticket);
}

template <class Half, u32 BITS, bool SHORT_GROUPS, bool ASYM, u32 TILES, u32 WARPS_N, u32 WARPS_T, u32 WARPS_K>
struct Marlin {
    static constexpr u32 WARPS = WARPS_N * WARPS_T * WARPS_K, THREADS = WARPS * 32;
    using Code = Codes<Half, BITS>;
    static constexpr u32 FEATURES = WARPS_N * 32, UNITS = FEATURES / 128, TOKENS = WARPS_T * TILES * 8;
    static constexpr u32 CODES = 128 * DEPTH * BITS / 8; // bytes of a unit
    static constexpr u32 HALVES = 2 / WARPS_K;                  // of a unit, for a warp
    static constexpr u32 BATCH = TILES < 4 ? TILES : TILES / 2; // tiles of eight rows in the tensor core at once
    static_assert(TILES / BATCH * HALVES * 2 % 2 == 0, "a unit begins with the first buffer");
    // Whether a warp reads the beginning of the next unit before it is done with one. That takes one unit of the ring, which
    // few rows need for weights on their way.
    static constexpr bool AHEAD = TILES >= 8;
    static constexpr u32 OWN = 2 / WARPS_K; // fragments of 16 features that a warp finishes
    static constexpr u32 SUMS = FEATURES * TOKENS;
    // A warp's corner of shared memory at the end of a tile: 8 rows of sums, 4 words apart in the banks.
    static constexpr u32 CORNER_ROW = OWN * 64 + 16, CORNER = 8 * CORNER_ROW;

    const MarlinArgs& args;
    u32 lane, warp, warp_n, warp_t, warp_k, unit_bytes;
    u32 words[2][BITS];  // codes of 16 features each
    u32 b[2][BATCH][4];
    float acc[2][TILES][4]; // 16 features each, eight rows each

    // Starts reading what a warp needs first of its half of a unit: codes of 64 input features, and rows of x.
    DEVICE void begin(u32 stage, u32 half) {
        read_codes(stage, half);
        read_x(stage, half, 0, 0, b[0]);
    }

    DEVICE void read_codes(u32 stage, u32 half) {
        const u32 from = stage + warp_n / 4 * unit_bytes + (warp_n % 4 * 2 + half) * (32 * 64 * BITS / 8) + lane * 16;
#pragma unroll
        for (u32 f = 0; f < 2; ++f)
#pragma unroll
            for (u32 i = 0; i < BITS / 4; ++i) {
                const uint4 v = load_shared_16(from + (f * (BITS / 4) + i) * 512);
                words[f][i * 4] = v.x, words[f][i * 4 + 1] = v.y, words[f][i * 4 + 2] = v.z, words[f][i * 4 + 3] = v.w;
            }
    }

    // 32 input features of some tiles of eight rows.
    DEVICE void read_x(u32 stage, u32 half, u32 pair, u32 first, u32 (&to)[BATCH][4]) {
        const u32 from = stage + UNITS * unit_bytes + (warp_t * TILES * 8 + lane % 8) * (DEPTH * 2) + half * 128 + (((lane / 8) ^ (lane % 8)) * 16 ^ pair * 64);
#pragma unroll
        for (u32 t = 0; t < BATCH; ++t) load_matrices(to[t], from + (first + t) * (8 * DEPTH * 2));
    }

    // Adds the warp's part of a unit times x. What is read from shared memory is read one batch of rows before its use, from
    // `next` too if that is not 0.
    DEVICE void multiply(u32 stage, u32 next, u32 groups) {
        float sum[TILES][2][4] = {};
        u32 turn = 0;
#pragma unroll
        for (u32 h = 0; h < HALVES; ++h) {
            const u32 half = HALVES == 2 ? h : warp_k;
#pragma unroll
            for (u32 pair = 0; pair < 2; ++pair) {
                const u32 group = SHORT_GROUPS ? half * 2 + pair : groups == 2 ? half : 0;
                const u32 grid = stage + warp_n / 4 * unit_bytes + CODES, place = (group * 4 + warp_n % 4) * 8 + lane / 4;
                const u32 zeros = ASYM ? load_shared_4(grid + groups * 256 + place * 4) : 0;
                u32 a[2][2][4];
#pragma unroll
                for (u32 f = 0; f < 2; ++f) {
                    Zero zero[2];
#pragma unroll
                    for (u32 u = 0; u < 2; ++u) zero[u] = Code::zero(ASYM ? zeros >> (f * 16 + u * 8) & 0xFF : Code::MIDDLE);
#pragma unroll
                    for (u32 s = 0; s < 2; ++s) Code::template expand<ASYM>(a[s][f], words[f] + (pair * 2 + s) * Code::WORDS, zero);
                }
                if (pair == 1 && h + 1 < HALVES) read_codes(stage, 1);
                if (pair == 1 && h + 1 == HALVES && next != 0) read_codes(next, HALVES == 2 ? 0 : warp_k);
#pragma unroll
                for (u32 first = 0; first < TILES; first += BATCH, turn ^= 1) {
                    if (first + BATCH < TILES) read_x(stage, half, pair, first + BATCH, b[turn ^ 1]);
                    else if (pair == 0) read_x(stage, half, 1, 0, b[turn ^ 1]);
                    else if (h + 1 < HALVES) read_x(stage, 1, 0, 0, b[turn ^ 1]);
                    else if (next != 0) read_x(next, HALVES == 2 ? 0 : warp_k, 0, 0, b[turn ^ 1]);
#pragma unroll
                    for (u32 s = 0; s < 2; ++s)
#pragma unroll
                        for (u32 t = 0; t < BATCH; ++t)
#pragma unroll
                            for (u32 f = 0; f < 2; ++f) Half::mma(sum[first + t][f], a[s][f], b[turn][t][s * 2], b[turn][t][s * 2 + 1]);
                }
                if (!SHORT_GROUPS && (pair == 0 || (h + 1 < HALVES && groups == 1))) continue;
                const uint2 packed = load_shared_8(grid + place * 8);
                const float scale[2][2] = {{Fp16::to_float((u16)packed.x), Fp16::to_float((u16)(packed.x >> 16))},
                                           {Fp16::to_float((u16)packed.y), Fp16::to_float((u16)(packed.y >> 16))}};
#pragma unroll
                for (u32 t = 0; t < TILES; ++t)
#pragma unroll
                    for (u32 f = 0; f < 2; ++f)
#pragma unroll
                        for (u32 e = 0; e < 4; ++e) acc[f][t][e] += scale[f][e / 2] * sum[t][f][e], sum[t][f][e] = 0.0f;
            }
        }
    }

    DEVICE void clear() {
#pragma unroll
        for (u32 f = 0; f < 2; ++f)
#pragma unroll
            for (u32 t = 0; t < TILES; ++t)
#pragma unroll
                for (u32 e = 0; e < 4; ++e) acc[f][t][e] = 0.0f;
    }

    // The sums of both warps with the same features: 16 of the 32 for each.
    DEVICE void add_halves(float (&own)[OWN][TILES][4], u32 corners) {
        if (WARPS_K == 1) {
#pragma unroll
            for (u32 f = 0; f < OWN; ++f)
#pragma unroll
                for (u32 t = 0; t < TILES; ++t)
#pragma unroll
                    for (u32 e = 0; e < 4; ++e) own[f][t][e] = acc[f][t][e];
            return;
        }
        const u32 mine = corners + warp * CORNER + lane * 16, other = mine + (warp_k ? -(WARPS / 2) : WARPS / 2) * CORNER;
#pragma unroll
        for (u32 t = 0; t < TILES; ++t) {
            float give[4];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) give[e] = warp_k ? acc[0][t][e] : acc[1][t][e], own[0][t][e] = warp_k ? acc[1][t][e] : acc[0][t][e];
            store_shared_floats(mine, give[0], give[1], give[2], give[3]);
            barrier(1 + warp % (WARPS / 2), 64);
            const float4 v = load_shared_floats(other);
            own[0][t][0] += v.x, own[0][t][1] += v.y, own[0][t][2] += v.z, own[0][t][3] += v.w;
            barrier(1 + warp % (WARPS / 2), 64);
        }
    }

    DEVICE u32 first_unit(u32 part) { return part * args.share + min(part, args.larger); }

    DEVICE u32 part_of(u32 unit) {
        const u32 in_larger = args.larger * (args.share + 1);
        return unit < in_larger ? unit / (args.share + 1) : args.larger + (unit - in_larger) / args.share;
    }

    // Adds the parts of the tile that blocks `first` to `last` have; false in all blocks but one, which has the whole sum.
    DEVICE bool add_parts(float (&own)[OWN][TILES][4], u32 tile, u32 part, u32 token_block, u32 first, u32 last, u32 flag) {
        constexpr u32 VECTORS = OWN * TILES, BATCH = VECTORS < 8 ? 8 / VECTORS : 1;
        float* sums = args.partials + (u64)token_block * args.partial_places * SUMS + threadIdx.x * 4;
        // From one part of a tile to the next, either the block goes up by one or the tile does. If there are more tiles
        // than blocks, only a block's first and last are parts.
        auto place = [&](u32 part) {
            const u32 index = args.tiles <= args.parts ? part + tile : part * 2 + (first_unit(part) < tile * args.k_units);
            return sums + (u64)index * SUMS;
        };
        float* mine = place(part);
#pragma unroll
        for (u32 f = 0; f < OWN; ++f)
#pragma unroll
            for (u32 t = 0; t < TILES; ++t)
                store_global_floats(mine + (f * TILES + t) * (THREADS * 4), own[f][t][0], own[f][t][1], own[f][t][2], own[f][t][3]);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            u64* counter = args.arrivals + token_block * args.tiles + tile;
            const bool complete = arrive(counter, args.ticket) == last - first;
            if (complete) *counter = 0; // for the next launch with this ticket, in a graph
            __threadfence();
            store_shared_float(flag, complete ? 1.0f : 0.0f);
        }
        __syncthreads();
        if (load_shared_floats(flag).x == 0.0f) return false;
#pragma unroll
        for (u32 f = 0; f < OWN; ++f)
#pragma unroll
            for (u32 t = 0; t < TILES; ++t)
#pragma unroll
                for (u32 e = 0; e < 4; ++e) own[f][t][e] = 0.0f;
#pragma unroll 1
        for (u32 p = first; p <= last; p += BATCH) {
            float4 v[BATCH][VECTORS];
#pragma unroll
            for (u32 b = 0; b < BATCH; ++b) {
                const float* from = place(min(p + b, last));
#pragma unroll
                for (u32 i = 0; i < VECTORS; ++i) v[b][i] = load_global_floats(from + i * (THREADS * 4));
            }
#pragma unroll
            for (u32 b = 0; b < BATCH; ++b) {
                if (p + b <= last) {
#pragma unroll
                    for (u32 i = 0; i < VECTORS; ++i) {
                        float(&sum)[4] = own[i / TILES][i % TILES];
                        sum[0] += v[b][i].x, sum[1] += v[b][i].y, sum[2] += v[b][i].z, sum[3] += v[b][i].w;
                    }
                }
            }
        }
        return true;
    }

    // Bias, epilogue, rounding, through the warp's corner so that a lane has neighbours.
    DEVICE void finish(float (&own)[OWN][TILES][4], u32 tile, u32 first_row, u32 corners) {
        const u32 corner = corners + warp * CORNER;
        const u32 packed = tile * FEATURES + warp_n * 32 + warp_k * 16;
        if (args.bias != nullptr) {
#pragma unroll
            for (u32 i = 0; i < OWN * 2; ++i) {
                const float bias = Fp16::to_float(args.bias[packed + i * 8 + lane / 4]);
#pragma unroll
                for (u32 t = 0; t < TILES; ++t) own[i / 2][t][i % 2 * 2] += bias, own[i / 2][t][i % 2 * 2 + 1] += bias;
            }
        }
        const bool fused = args.epilogue == SILU_MUL;
        if (fused) {
#pragma unroll
            for (u32 f = 0; f < OWN; ++f)
#pragma unroll
                for (u32 t = 0; t < TILES; ++t)
#pragma unroll
                    for (u32 e = 0; e < 2; ++e) own[f][t][e] = silu(own[f][t][e]) * own[f][t][2 + e];
        }
        // Every lane has eight neighbours of one row; half of the lanes, if the epilogue has halved them.
        const u32 pieces = fused ? OWN : 2 * OWN, feature = (fused ? packed / 2 : packed) + lane % 4 * 8;
        first_row += warp_t * (TILES * 8);
#pragma unroll
        for (u32 t = 0; t < TILES; ++t) {
            if (first_row + t * 8 >= args.rows) break;
#pragma unroll
            for (u32 f = 0; f < OWN; ++f)
#pragma unroll
                for (u32 e = 0; e < 4; ++e) {
                    const u32 column = fused ? f * 8 : f * 16 + e / 2 * 8;
                    if (e < 2 || !fused) store_shared_float(corner + (lane % 4 * 2 + e % 2) * CORNER_ROW + (column + lane / 4) * 4, own[f][t][e]);
                }
            __syncwarp();
            const u32 row = first_row + t * 8 + lane / 4;
            if (lane % 4 < pieces && row < args.rows) {
                const u32 at = corner + lane / 4 * CORNER_ROW + lane % 4 * 32;
                const float4 a = load_shared_floats(at), b = load_shared_floats(at + 16);
                store(args.y + row * args.y_stride + feature, feature, {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w});
            }
            __syncwarp();
        }
    }

    struct Eight {
        float value[8];
    };

    // Eight neighbouring outputs, as far as there are so many.
    DEVICE void store(u16* y, u32 feature, Eight sum) {
        if (args.y_vectors && feature + 8 <= args.n) {
            if (args.epilogue == ADD) {
                const uint4 v = *(const uint4*)y;
                const u32 old[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (u32 i = 0; i < 8; ++i) sum.value[i] += Half::to_float((u16)(old[i / 2] >> (i % 2 * 16)));
            }
            u32 out[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) out[i] = Half::from_float(sum.value[2 * i]) | (u32)Half::from_float(sum.value[2 * i + 1]) << 16;
            *(uint4*)y = make_uint4(out[0], out[1], out[2], out[3]);
            return;
        }
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            if (feature + i < args.n) y[i] = Half::from_float(args.epilogue == ADD ? sum.value[i] + Half::to_float(y[i]) : sum.value[i]);
        }
    }

    DEVICE void run() {
        extern __shared__ __align__(128) u8 shared_memory[];
        const u32 shared = shared_address(shared_memory);
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        warp_n = warp % WARPS_N, warp_t = warp / WARPS_N % WARPS_T, warp_k = warp / (WARPS_N * WARPS_T);
        const u32 groups = SHORT_GROUPS ? 4 : args.groups, k_units = args.k_units, stages = args.stages;
        unit_bytes = CODES + groups * (ASYM ? 384 : 256);
        const u32 stage_bytes = UNITS * unit_bytes + TOKENS * DEPTH * 2;
        const u32 corners = shared + stages * stage_bytes;
        const u32 token_block = blockIdx.x % args.token_blocks, part = blockIdx.x / args.token_blocks;
        const u32 first_row = token_block * TOKENS;
        u32 unit = first_unit(part);
        const u32 end = first_unit(part + 1);
        u32 tile = unit / k_units, k = unit % k_units;

        constexpr bool GATHERS = TOKENS <= 16;
        const bool gathered = GATHERS && args.gathered;

        // What to fetch next: a place in the units, and one in x. All that can be is derived but once in a tile.
        u32 left = end - unit, fetch_left = k_units - k, fetch_tile = tile, fetch_to = shared;
        const u64 row_bytes = (u64)k_units * unit_bytes;
        const u8* source = args.units + ((u64)tile * UNITS * k_units + k) * unit_bytes + threadIdx.x * 16;
        // Scales and zeros are fetched by other threads for each unit.
        const u32 rest = threadIdx.x % (THREADS / UNITS) * 16, rest_unit = threadIdx.x / (THREADS / UNITS);
        const i32 rest_from = (i32)(CODES + rest) - (i32)(threadIdx.x * 16);
        const u32 rest_place = rest_unit * unit_bytes + CODES + rest;
        const u32 x_row = threadIdx.x / 16, x_place = UNITS * unit_bytes + x_row * (DEPTH * 2) + ((threadIdx.x % 16) ^ (x_row % 8)) * 16;
        const u16* x_source = args.x + (first_row + x_row) * args.x_stride + k * DEPTH + threadIdx.x % 16 * 8;
        i32 x_left = (i32)((args.k - k * DEPTH) * 2 - threadIdx.x % 16 * 16); // bytes in the row
        // The last tile may have but one unit of two.
        u64 next_row = tile * UNITS + 1 < args.unit_rows ? row_bytes : 0;
        auto fetch = [&] {
            if (left > 0) {
#pragma unroll
                for (u32 u = 0; u < UNITS; ++u)
#pragma unroll
                    for (u32 i = 0; i < CODES; i += THREADS * 16) copy_16(fetch_to + u * unit_bytes + threadIdx.x * 16 + i, source + u * next_row + i);
                if (rest < unit_bytes - CODES) copy_16(fetch_to + rest_place, source + rest_unit * next_row + rest_from);
                constexpr u32 ROWS = THREADS / 16;
                if (gathered) { // by `pick`
                } else if (TOKENS >= ROWS || threadIdx.x < TOKENS * 16) {
#pragma unroll
                    for (u32 row = 0; row < TOKENS; row += ROWS) {
                        const bool inside = x_left > 0 && first_row + x_row + row < args.rows;
                        copy_16_or_zeros(fetch_to + x_place + row * (DEPTH * 2), inside ? x_source + row * args.x_stride : args.x, inside);
                    }
                }
                --left;
                source += unit_bytes, x_source += DEPTH, x_left -= DEPTH * 2;
                if (--fetch_left == 0) {
                    fetch_left = k_units, ++fetch_tile;
                    source += (UNITS - 1) * row_bytes, x_source -= k_units * DEPTH, x_left += k_units * DEPTH * 2;
                    next_row = fetch_tile * UNITS + 1 < args.unit_rows ? row_bytes : 0;
                }
            }
            commit_copies();
            fetch_to += stage_bytes;
            if (fetch_to == corners) fetch_to = shared;
        };
        for (u32 i = 0; i + 1 < stages; ++i) fetch();

        // Gathered columns take two loads, one after the other, and a store: two columns of one row in eight for a
        // thread. The places are read two units ahead of the columns' use, the columns one.
        constexpr u32 PICKS = GATHERS ? TOKENS / 8 : 1;
        const u32 pick_row = threadIdx.x / 64, pick_pair = threadIdx.x % 64;
        const u32 pick_place = UNITS * unit_bytes + pick_row * (DEPTH * 2) + ((pick_pair / 4) ^ pick_row) * 16 + pick_pair % 4 * 4;
        u32 picked[PICKS] = {}, columns = 0, pick_k = k, pick_left = end - unit, pick_to = shared + pick_place, picked_to = 0;
        auto find = [&]() -> u32 { // two columns of the next unit
            const u32 at = pick_k * DEPTH + pick_pair * 2;
            u32 pair = NONE << 16 | NONE;
            if (pick_left > 0 && pick_row < args.rows) pair = args.gather != nullptr ? *(const u32*)(args.gather + at) : (at < args.k ? at : NONE) | (at + 1 < args.k ? at + 1 : NONE) << 16;
            if (++pick_k == k_units) pick_k = 0;
            if (pick_left > 0) --pick_left;
            return pair;
        };
        auto pick = [&](u32 (&value)[PICKS], u32 pair) {
#pragma unroll
            for (u32 i = 0; i < PICKS; ++i) {
                const u16* x = args.x + (pick_row + i * 8) * args.x_stride;
                const bool inside = pick_row + i * 8 < args.rows;
                const u32 lower = pair & 0xFFFF, upper = pair >> 16;
                value[i] = (inside && lower != NONE ? x[lower] : 0) | (inside && upper != NONE ? (u32)x[upper] << 16 : 0);
            }
        };
        auto put = [&](u32 to, const u32 (&value)[PICKS]) {
#pragma unroll
            for (u32 i = 0; i < PICKS; ++i) store_shared_4(to + i * (8 * DEPTH * 2), value[i]);
        };
        if (gathered) {
            u32 found[MOST_STAGES - 1], first[MOST_STAGES - 1][PICKS];
#pragma unroll
            for (u32 i = 0; i < MOST_STAGES - 1; ++i) found[i] = i + 1 < stages ? find() : NONE << 16 | NONE;
            columns = find();
#pragma unroll
            for (u32 i = 0; i < MOST_STAGES - 1; ++i) pick(first[i], found[i]);
#pragma unroll
            for (u32 i = 0; i < MOST_STAGES - 1; ++i)
                if (i + 1 < stages) put(pick_to, first[i]), pick_to += stage_bytes;
        }

        clear();
        u32 stage = shared;
        const bool ahead = AHEAD && stages > 2;
        if (ahead) {
            wait_for_stage(stages);
            __syncthreads();
            begin(stage, HALVES == 2 ? 0 : warp_k);
        }
#pragma unroll 1
        for (; unit < end; ++unit) {
            wait_for_stage(stages - ahead);
            __syncthreads();
            fetch(); // into the slot of the unit before this one
            if (!ahead) begin(stage, HALVES == 2 ? 0 : warp_k);
            if (gathered) {
                if (picked_to != 0) put(picked_to, picked);
                pick(picked, columns);
                picked_to = pick_to;
                columns = find();
                pick_to = pick_to + stage_bytes >= corners ? shared + pick_place : pick_to + stage_bytes;
            }
            const u32 next = stage + stage_bytes == corners ? shared : stage + stage_bytes;
            multiply(stage, ahead && unit + 1 < end ? next : 0, groups);
            stage = next;
            if (++k == k_units || unit + 1 == end) {
                float own[OWN][TILES][4];
                add_halves(own, corners);
                const u32 first = part_of(tile * k_units), last = part_of(tile * k_units + k_units - 1);
                if (first == last || add_parts(own, tile, part, token_block, first, last, corners + WARPS * CORNER))
                    finish(own, tile, first_row, corners);
                clear();
                k = 0, ++tile;
            }
        }
        wait_for_copies<0>();
    }
};

// Rows of x in the order of the units, with zeros where there is no column, aligned. A block does a row, which it first
// brings to shared memory, if there is room: scattered reads of global memory take longer.
struct ArrangeArgs {
    const u16* x;         // (rows, k), x_stride apart
    u16* out;             // (rows, width)
    const u16* gather;    // (width) column of x, or NONE for a zero; null for the identity
    u64 x_stride;
    u32 k, width;         // width is a multiple of 8
    u32 x_vectors;        // x and its rows are aligned to 16 bytes
    u32 staged;           // there is shared memory for a row
};

constexpr u32 ARRANGING = 512;

extern "C" __global__ void __launch_bounds__(ARRANGING) arrange(const __grid_constant__ ArrangeArgs args) {
    extern __shared__ __align__(128) u8 shared_memory[];
    const u16* x = args.x + blockIdx.x * args.x_stride;
    if (args.staged) {
        u16* row = (u16*)shared_memory;
        const u32 vectors = args.x_vectors ? args.k / 8 : 0;
#pragma unroll 2
        for (u32 i = threadIdx.x; i < vectors; i += ARRANGING) ((uint4*)row)[i] = ((const uint4*)x)[i];
        for (u32 i = vectors * 8 + threadIdx.x; i < args.k; i += ARRANGING) row[i] = x[i];
        __syncthreads();
        x = row;
    }
#pragma unroll 1
    for (u32 first = threadIdx.x * 8; first < args.width; first += ARRANGING * 8) {
        u32 columns[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) columns[i] = first + i < args.k ? first + i : NONE;
        if (args.gather != nullptr) {
            const uint4 v = *(const uint4*)(args.gather + first);
            const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (u32 i = 0; i < 8; ++i) columns[i] = pairs[i / 2] >> (i % 2 * 16) & 0xFFFF;
        }
        u32 value[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) value[i] = columns[i] == NONE ? 0 : x[columns[i]];
        *(uint4*)(args.out + (u64)blockIdx.x * args.width + first) =
            make_uint4(value[0] | value[1] << 16, value[2] | value[3] << 16, value[4] | value[5] << 16, value[6] | value[7] << 16);
    }
}

#ifndef PROTOTYPE
// One image holds one type of activations (IMAGE_HALF), width (IMAGE_BITS), whether groups are shorter than 64 (IMAGE_SHORT)
// and kind of zero (IMAGE_ASYM).
//
// `marlin_<features>x<rows>`, of a tile.
#define MARLIN(FEATURES, ROWS, TILES, WARPS_N, WARPS_T, WARPS_K) \
    extern "C" __global__ void __launch_bounds__(WARPS_N * WARPS_T * WARPS_K * 32, 1) marlin_##FEATURES##x##ROWS(const __grid_constant__ MarlinArgs args) { \
        Marlin<IMAGE_HALF, IMAGE_BITS, IMAGE_SHORT, IMAGE_ASYM, TILES, WARPS_N, WARPS_T, WARPS_K>{args}.run(); \
    }
MARLIN(256, 8, 1, 8, 1, 2)
MARLIN(256, 16, 2, 8, 1, 2)
MARLIN(256, 32, 4, 8, 1, 2)
MARLIN(128, 64, 8, 4, 1, 2)
MARLIN(256, 64, 8, 8, 1, 1)
#endif
