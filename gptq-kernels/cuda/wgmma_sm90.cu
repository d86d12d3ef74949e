// y = epilogue(x W^T + bias) for 4-bit weights and more than eight rows of x, on Hopper.
//
// This is for up to some hundred rows; more are for `wgmma_many.cuh`.
//
// The weight is the matrix of units of `unit.cuh`. A block has WARPGROUPS warpgroups, each of which takes HALVES x 64 output
// features as the rows of `wgmma`, and N tokens as its columns; the blocks of a cluster take slices of the input features.
// Blocks walk over (feature tile, token tile) pairs.
//
//     1  one warp starts bulk copies of the first units into a ring: weights depend on no earlier kernel
//     2  it waits for the kernel before this one and adds the same input features of x, through a tensor map that swizzles
//     3  warpgroups: codes to exact halves (code - zero) in registers, tensor core over one group while the next codes are
//        expanded, times the scale in float32
//     4  the sums of the slices are pushed to the blocks of the cluster in pieces of 16 features x 8 tokens, and added
//     5  the bias, the epilogue, round, transpose so that output features are neighbours, store
//
// No float atomics, and no order of addition that depends on timing, on the number of blocks or on other rows: results
// repeat to the bit, and row r of y depends on row r of x and on the number of slices alone.
#include "wgmma_many.cuh"

// Units that a block asks for before the kernel before this one has finished. More take the memory from that one.
constexpr u32 AHEAD = 2;

// Codes in units of one are faster for few tokens, by up to 2 %, those of `unit.cuh` for 64, by as much, and for asymmetric layers.
template <class Half, bool ONE>
struct FewCodes : Codes<Half> {};
template <class Half>
struct FewCodes<Half, true> : Expander<Half> {};

// Pieces of a result: 16 features of the units from `feature` on, 8 tokens from `token` on. Lane l = 4 r + t has features r
// and r + 8, tokens 2 t and 2 t + 1: `v` is (r, 2 t), (r, 2 t + 1), (r + 8, 2 t), (r + 8, 2 t + 1), in units of `unit`. Several at a time, so that
// their latencies overlap.
template <class Half, u32 COUNT>
DEVICE void finish(const WgmmaArgs& args, float unit, const u32 (&feature)[COUNT], const u32 (&token)[COUNT], float (&v)[COUNT][4], u32 lane) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
        for (u32 e = 0; e < 4; ++e) v[i][e] *= unit;
    if (args.bias != nullptr) {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            const u32 lower = feature[i] + lane / 4, upper = lower + 8;
            const float a = lower < args.n ? Fp16::to_float(args.bias[lower]) : 0.0f;
            const float b = upper < args.n ? Fp16::to_float(args.bias[upper]) : 0.0f;
            v[i][0] += a, v[i][1] += a, v[i][2] += b, v[i][3] += b;
        }
    }
    // After a transpose, lane l has token l / 4 and columns 2 (l % 4) + {0, 1} of each half of the piece.
    const bool paired = args.epilogue == SILU_MUL;
    u16* to[COUNT];
    bool first[COUNT][2], both[COUNT][2]; // whether the first and both of the two columns exist
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        const u32 row = token[i] + lane / 4, column = (paired ? feature[i] / 2 : feature[i]) + lane % 4 * 2;
        to[i] = args.y + (u64)row * args.y_stride + column;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            first[i][half] = row < args.rows && column + half * 8 < args.columns && !(paired && half == 1);
            both[i][half] = first[i][half] && column + half * 8 + 1 < args.columns;
        }
    }
    if (args.epilogue == ADD) {
        u32 before[COUNT][2];
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u16* const from = to[i] + half * 8;
                before[i][half] = 0;
                if (args.y_pairs && both[i][half]) before[i][half] = *(const u32*)from;
                else {
                    if (first[i][half]) before[i][half] = from[0];
                    if (both[i][half]) before[i][half] |= (u32)from[1] << 16;
                }
            }
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 pair = transpose(before[i][half]);
                v[i][half * 2] += Half::to_float((u16)pair), v[i][half * 2 + 1] += Half::to_float((u16)(pair >> 16));
            }
    }
    if (paired) {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) v[i][0] = silu(v[i][0]) * v[i][2], v[i][1] = silu(v[i][1]) * v[i][3];
    }
    u32 pair[COUNT][2];
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            pair[i][half] = transpose((u32)Half::from_float(v[i][half * 2]) | (u32)Half::from_float(v[i][half * 2 + 1]) << 16);
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u16* const at = to[i] + half * 8;
            if (args.y_pairs && both[i][half]) *(u32*)at = pair[i][half];
            else {
                if (first[i][half]) at[0] = (u16)pair[i][half];
                if (both[i][half]) at[1] = (u16)(pair[i][half] >> 16);
            }
        }
}

// SUMS 2 lets the tensor core begin a group while the last one's sums are scaled. REUSE puts the slices' sums where the ring
// was. REGISTERS, if not 0, is what a warpgroup takes from the warps that only copy.
template <class Half, u32 GROUPS, bool ASYM, u32 N, u32 HALVES, u32 WARPGROUPS, u32 SUMS, bool REUSE, u32 REGISTERS, u32 STEPS_AT_ONCE>
DEVICE void wgmma_linear(const TensorMap& x, const WgmmaArgs& args) {
    constexpr u32 UNIT = unit_bytes(GROUPS, ASYM), STRIPES = WARPGROUPS * HALVES * 2, X_BYTES = N * 256;
    constexpr u32 STAGE = X_BYTES + (STRIPES * UNIT + 1023) / 1024 * 1024;
    // A batch of steps of 16 input features is expanded while the one before is multiplied.
    constexpr u32 BATCH = GROUPS == 4 ? 2 : STEPS_AT_ONCE, BATCHES = 8 / BATCH, PER_GROUP = BATCHES / GROUPS, R = N / 2;
    using Few = FewCodes<Half, !ASYM && N < 64>;
    constexpr u32 PIECES = HALVES * WARPGROUPS * 4 * (N / 8), CONSUMERS = WARPGROUPS * 4;
    extern __shared__ __align__(1024) u8 shared_memory[];

    // `uniform` and `opaque` keep the compiler from deriving these anew in every iteration.
    const u32 ring = uniform(shared_address(shared_memory));
    const u32 lane = opaque(threadIdx.x % 32), warp = uniform(threadIdx.x / 32);
    const u32 barriers = ring + args.stages * STAGE; // of each stage: full, empty
    const u32 sums = REUSE ? ring : barriers + 128;
    const u32 slices = cluster_size(), slice = cluster_rank();
    const u32 first = args.k_units * slice / slices, count = args.k_units * (slice + 1) / slices - first;
    const u32 stripes = (args.n + 31) / 32, tiles = (stripes + STRIPES - 1) / STRIPES * args.token_tiles;
    const u32 first_tile = blockIdx.x / slices, tile_step = gridDim.x / slices;

    if (threadIdx.x == CONSUMERS * 32) {
        for (u32 i = 0; i < args.stages; ++i) {
            mbarrier_init(barriers + i * 16, 1);
            mbarrier_init(barriers + i * 16 + 8, CONSUMERS * 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (slices > 1) cluster_arrive_relaxed();
    launch_dependents();

    if (warp >= CONSUMERS) {
        if (REGISTERS > 0) set_registers_down<24>();
        if (warp == CONSUMERS) {
            auto copy_units = [&](u32 stage, u32 stripe, u32 unit) {
                const u32 have = min(STRIPES, stripes - stripe);
                if (lane == 0) mbarrier_expect(barriers + stage * 16, X_BYTES + have * UNIT);
                __syncwarp();
                if (lane < have) {
                    const u8* from = args.units + ((u64)(stripe + lane) * args.k_units + unit) * UNIT;
                    bulk_copy(ring + stage * STAGE + X_BYTES + lane * UNIT, from, UNIT, barriers + stage * 16);
                }
            };
            const u32 ahead = min(min(args.stages, AHEAD), count);
#pragma unroll 1
            for (u32 i = 0; i < ahead; ++i) copy_units(i, first_tile / args.token_tiles * STRIPES, first + i);
            wait_for_dependencies();
            u32 stage = 0, parity = 1;
#pragma unroll 1
            for (u32 tile = first_tile; tile < tiles; tile += tile_step) {
                const u32 stripe = tile / args.token_tiles * STRIPES, token = tile % args.token_tiles * N;
#pragma unroll 1
                for (u32 i = 0; i < count; ++i) {
                    if (tile != first_tile || i >= ahead) {
                        mbarrier_wait(barriers + stage * 16 + 8, parity);
                        copy_units(stage, stripe, first + i);
                    }
                    if (lane < 2)
                        tensor_copy(ring + stage * STAGE + lane * (N * 128), x, (first + i) * 128 + lane * 64, token, barriers + stage * 16);
                    if (++stage == args.stages) stage = 0, parity ^= 1;
                }
            }
        }
        __syncwarp();
        if (slices > 1) {
            cluster_wait();
            if (REUSE) cluster_arrive(), cluster_wait();
            cluster_arrive();
            cluster_wait();
        }
        return;
    }

    if (REGISTERS > 0) set_registers_up<REGISTERS>();
    // Of four warps, two take the halves of one stripe, two those of the next.
    const u32 half = warp % 2, own = X_BYTES + (warp / 4 * HALVES * 2 + warp % 4 / 2) * UNIT;
    const u32 slot = (lane % 8 * 4 + (lane / 8 ^ lane % 8 / 2)) * 16;
    const u32 own_codes = opaque(own + half * 1024 + slot), own_scales = opaque(own + 2048 + lane / 4 * 8 + half * 4);
    constexpr u32 ZERO = zero_bytes(GROUPS);
    const u32 own_zeros = ZERO == 2 ? own_scales + 64 : opaque(own + 2048 + GROUPS * 64 + lane / 4 * 4 + half * 2);
    float acc[HALVES][R], sum[SUMS][R], scale[2];
    u32 a[2][BATCH][4];
    uint4 codes;
    u32 z = 0; // bytes of the group's zeros
    Zero zero[2];
    auto load_zeros = [&](u32 at, u32 h, u32 group) {
        const u32 at_zeros = at + own_zeros + h * 2 * UNIT + group * 32;
        z = !ASYM ? 0 : ZERO == 2 ? load_shared_4(at_zeros) : load_shared_2(at_zeros);
    };
    // Batch `j` of the unit of feature half `h` in the stage at `at`.
    auto expand = [&](u32 at, u32 h, u32 j, u32 (&out)[BATCH][4]) {
        if (BATCH == 4 || j % 2 == 0) codes = load_matrices(at + own_codes + h * 2 * UNIT + j * BATCH / 4 * 512);
        // Kept for a group. Where that costs the order of instructions more, the bytes are, which the compiler must not take for the same.
        if (N == 64 || j % PER_GROUP == 0) {
            if (ASYM && N == 64) asm volatile("" : "+r"(z));
            zero[0] = Few::template zero<ASYM>(z, 0), zero[1] = Few::template zero<ASYM>(z, ZERO);
        }
#pragma unroll
        for (u32 s = 0; s < BATCH; ++s) {
            const u32 step = (j * BATCH + s) % 4, by = step / 2 * 8;
            Few::expand(out[s][0], out[s][1], (step % 2 ? codes.z : codes.x) >> by, zero);
            Few::expand(out[s][2], out[s][3], (step % 2 ? codes.w : codes.y) >> by, zero);
        }
    };
    auto add = [&](float (&to)[R], float (&from)[R]) {
        wgmma_settle(from);
#pragma unroll
        for (u32 e = 0; e < R; ++e) to[e] += scale[e / 2 % 2] * from[e];
    };

    u32 stage = 0, parity = 0;
#pragma unroll 1
    for (u32 tile = first_tile; tile < tiles; tile += tile_step) {
#pragma unroll
        for (u32 h = 0; h < HALVES; ++h)
            for (u32 e = 0; e < R; ++e) acc[h][e] = 0.0f;
#pragma unroll
        for (u32 s = 0; s < SUMS; ++s)
            for (u32 e = 0; e < R; ++e) sum[s][e] = 0.0f;
        mbarrier_wait(barriers + stage * 16, parity);
        load_zeros(ring + stage * STAGE, 0, 0);
        expand(ring + stage * STAGE, 0, 0, a[0]);
        u32 empty = 0;
#pragma unroll 1
        for (u32 i = 0; i < count; ++i) {
            const u32 at = ring + stage * STAGE, before = empty;
            empty = barriers + stage * 16 + 8;
            const u64 operand = swizzled_operand(at);
            if (++stage == args.stages) stage = 0, parity ^= 1;
#pragma unroll
            for (u32 b = 0; b < HALVES * BATCHES; ++b) {
                const u32 h = b / BATCHES, j = b % BATCHES, group = b / PER_GROUP, which = SUMS == 1 ? 0 : group % 2;
                const bool opens = b % PER_GROUP == 0, closes = (b + 1) % PER_GROUP == 0, last = b + 1 == HALVES * BATCHES;
                if (SUMS == 1 || b == 0) wgmma_settle(sum[which]);
                wgmma_fence();
#pragma unroll
                for (u32 s = 0; s < BATCH; ++s) {
                    const u32 step = j * BATCH + s; // 32 bytes of a row
                    Wgmma<N>::run(Half(), sum[which], a[b % 2][s], operand + (step / 4) * (N * 128 / 16) + step % 4 * 2, !(opens && s == 0));
                }
                wgmma_commit();
                if (!last && closes) load_zeros(at, (b + 1) / BATCHES, (b + 1) % BATCHES / PER_GROUP);
                wgmma_wait<1>();
                // Late, so that the tensor core has work meanwhile.
                if (b == 0 && i > 0) mbarrier_arrive(before);
                if (SUMS == 2 && opens && b > 0) add(acc[(b - 1) / BATCHES], sum[which ^ 1]);
                if (opens) {
                    const u32 pair = load_shared_4(at + own_scales + h * 2 * UNIT + group % GROUPS * 64);
                    scale[0] = Fp16::to_float((u16)pair), scale[1] = Fp16::to_float((u16)(pair >> 16));
                }
                if (!last) expand(at, (b + 1) / BATCHES, (b + 1) % BATCHES, a[(b + 1) % 2]);
                else if (i + 1 < count) {
                    mbarrier_wait(barriers + stage * 16, parity);
                    load_zeros(ring + stage * STAGE, 0, 0);
                    expand(ring + stage * STAGE, 0, 0, a[0]);
                }
                if (SUMS == 1 ? closes : last) {
                    wgmma_wait<0>();
                    add(acc[h], sum[which]);
                }
            }
        }

        mbarrier_arrive(empty);
        const u32 feature = tile / args.token_tiles * (STRIPES * 32), token = tile % args.token_tiles * N;
        auto piece_feature = [&](u32 of_warp, u32 h) { return feature + (of_warp / 4 * HALVES + h) * 64 + of_warp % 4 * 16; };
        // Pieces at `acc[0]` and on; then the others take their place, which makes a loop of what would be much code.
        constexpr u32 AT_ONCE = R < 16 ? R / 4 : 4;
        auto rotate = [&] {
#pragma unroll
            for (u32 e = 0; e + AT_ONCE * 4 < HALVES * R; ++e) acc[e / R][e % R] = acc[(e + AT_ONCE * 4) / R][(e + AT_ONCE * 4) % R];
        };
        if (slices == 1) {
#pragma unroll 1
            for (u32 start = 0; start < HALVES * N / 8; start += AT_ONCE) {
                u32 of[AT_ONCE], at[AT_ONCE];
                float v[AT_ONCE][4];
#pragma unroll
                for (u32 t = 0; t < AT_ONCE; ++t) {
                    of[t] = piece_feature(warp, start / (N / 8)), at[t] = token + (start % (N / 8) + t) * 8;
                    for (u32 e = 0; e < 4; ++e) v[t][e] = acc[0][t * 4 + e];
                }
                finish<Half>(args, Few::UNIT, of, at, v, lane);
                rotate();
            }
            continue;
        }
        // A cluster has one tile. Its pieces go round the blocks.
        const u32 most = (PIECES + slices - 1) / slices;
        __syncwarp();
        cluster_wait(); // all blocks have started
        if (REUSE) cluster_arrive(), cluster_wait(); // and none needs its ring any more
        u32 index = warp * HALVES * (N / 8) / slices, rank = warp * HALVES * (N / 8) % slices;
#pragma unroll 1
        for (u32 start = 0; start < HALVES * N / 8; start += AT_ONCE) {
#pragma unroll
            for (u32 t = 0; t < AT_ONCE; ++t) {
                const u32 to = remote_address(sums + (slice * most + index) * 512 + lane * 16, rank);
                remote_store_16(to, acc[0][t * 4], acc[0][t * 4 + 1], acc[0][t * 4 + 2], acc[0][t * 4 + 3]);
                if (++rank == slices) rank = 0, ++index;
            }
            rotate();
        }
        __syncwarp();
        cluster_arrive();
        cluster_wait();
#pragma unroll 1
        for (u32 start = warp; start * slices + slice < PIECES; start += CONSUMERS * AT_ONCE) {
            u32 of[AT_ONCE], at[AT_ONCE];
            float v[AT_ONCE][4] = {};
#pragma unroll
            for (u32 t = 0; t < AT_ONCE; ++t) {
                const u32 piece = (start + t * CONSUMERS) * slices + slice, of_warp = piece / (N / 8);
                of[t] = piece_feature(of_warp / HALVES, of_warp % HALVES);
                at[t] = piece < PIECES ? token + piece % (N / 8) * 8 : args.rows;
            }
#pragma unroll 1
            for (u32 s = 0; s < slices; ++s) {
#pragma unroll
                for (u32 t = 0; t < AT_ONCE; ++t) {
                    // Beyond the last piece, the last one's; nothing is stored then.
                    const u32 from = min(start + t * CONSUMERS, most - 1);
                    const uint4 part = load_shared_16(sums + (s * most + from) * 512 + lane * 16);
                    v[t][0] += __uint_as_float(part.x), v[t][1] += __uint_as_float(part.y);
                    v[t][2] += __uint_as_float(part.z), v[t][3] += __uint_as_float(part.w);
                }
            }
            finish<Half>(args, Few::UNIT, of, at, v, lane);
        }
    }
}

struct OrderArgs {
    const u16* x;       // (rows, k), x_stride apart
    u16* ordered;       // (gridDim.x, width)
    const u16* gather;  // (width) column of x, or NONE for a zero; null for the identity, with zeros behind k
    u32 k, width;
    u32 x_stride;
    u32 x_vectors;      // x and its rows are aligned to 16 bytes
};

// Row blockIdx.x of x in the order of the units; gridDim.y blocks share its columns. The row goes to shared memory and is
// picked from there.
DEVICE void order_row(const OrderArgs& args) {
    extern __shared__ __align__(1024) u8 shared_memory[];
    const u32 row = shared_address(shared_memory), step = blockDim.x;
    const u32 share = (args.width / 8 + gridDim.y - 1) / gridDim.y * 8, start = share * blockIdx.y, end = min(start + share, args.width);
    // Eight columns at a time; the first ones are known before x is.
    const u32 first = start + threadIdx.x * 8;
    uint4 columns = {};
    if (args.gather != nullptr && first < end) columns = *(const uint4*)(args.gather + first);
    launch_dependents();
    wait_for_dependencies();
    const u16* from = args.x + (u64)blockIdx.x * args.x_stride;
    const u32 whole = args.x_vectors ? args.k / 8 * 8 : 0;
    for (u32 i = threadIdx.x * 8; i < whole; i += step * 8) copy_16(row + i * 2, from + i);
    for (u32 i = whole + threadIdx.x; i < args.k; i += step) store_shared_2(row + i * 2, from[i]);
    wait_for_copies();
    __syncthreads();
    auto pick = [&](u32 column) { return column < args.k ? load_shared_2(row + column * 2) : 0; };
    auto pick_2 = [&](u32 pair) { return pick(pair & 0xFFFF) | pick(pair >> 16) << 16; };
    for (u32 i = first; i < end; i += step * 8) {
        if (args.gather == nullptr) {
            const u32 two = i | (i + 1) << 16;
            columns = {two, two + 0x00020002u, two + 0x00040004u, two + 0x00060006u};
        } else if (i != first) columns = *(const uint4*)(args.gather + i);
        const uint4 picked = {pick_2(columns.x), pick_2(columns.y), pick_2(columns.z), pick_2(columns.w)};
        *(uint4*)(args.ordered + (u64)blockIdx.x * args.width + i) = picked;
    }
}

#ifndef PROTOTYPE
// One image holds one type of activations (IMAGE_HALF), group size (IMAGE_GROUPS in a unit) and kind of zero (IMAGE_ASYM).
//
// `wgmma_<N>_<WARPGROUPS>x<HALVES>`; BLOCKS is how many blocks of it fit the registers of a multiprocessor.
#define WGMMA_LINEAR(N, WARPGROUPS, HALVES, THREADS, BLOCKS, SUMS, REUSE, REGISTERS, STEPS)                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        wgmma_##N##_##WARPGROUPS##x##HALVES(const __grid_constant__ TensorMap x, const __grid_constant__ WgmmaArgs args) { \
        wgmma_linear<IMAGE_HALF, IMAGE_GROUPS, IMAGE_ASYM, N, HALVES, WARPGROUPS, SUMS, REUSE, REGISTERS, STEPS>(x, args); \
    }
WGMMA_LINEAR(16, 2, 1, 288, 3, 1, false, 0, 4)
WGMMA_LINEAR(16, 2, 2, 288, 2, 1, false, 0, 4)
WGMMA_LINEAR(32, 2, 1, 288, 2, 1, false, 0, 4)
WGMMA_LINEAR(64, 3, 1, 416, 1, 1, false, 0, 4)
WGMMA_LINEAR(64, 2, 2, 384, 1, 2, false, 240, 4)
WGMMA_LINEAR(128, 2, 1, 384, 1, 1, true, 240, 4)
// `wgmma_many_<N>_<WARPGROUPS>`
#define WGMMA_MANY(N, WARPGROUPS, REGISTERS)                                                                            \
    extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1)                                            \
        wgmma_many_##N##_##WARPGROUPS(const __grid_constant__ TensorMap x, const __grid_constant__ WgmmaArgs args) {    \
        wgmma_many<IMAGE_HALF, IMAGE_GROUPS, IMAGE_ASYM, N, WARPGROUPS, REGISTERS, N == 256>(x, args);                  \
    }
WGMMA_MANY(256, 2, 240)
WGMMA_MANY(128, 2, 240)
WGMMA_MANY(128, 3, 160)
extern "C" __global__ void __launch_bounds__(256) order(const __grid_constant__ OrderArgs args) { order_row(args); }
#endif
