// Many rows: blocks of WARPGROUPS x 64 output features and N tokens that walk over tiles.
//
// A weight is rounded to a half after it has been multiplied by its scale, as when a layer is dequantised: so one set of sums
// runs through all groups, the tensor core never waits for a group's end, and 256 tokens fit the registers. To stay clear of
// subnormal halves and of overflow, scales are multiplied by a power of two, and sums by its reciprocal.
#pragma once
#include "wgmma_args.cuh"

// The transposes of four 8 x 8 matrices of halves, of which lane l holds elements 2 (l % 4) + {0, 1} of row l / 4, are stored
// with lane l giving the address of row l % 8 of matrix l / 8.
DEVICE void store_transposes(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// And back.
DEVICE uint4 load_transposes(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

DEVICE void store_shared_16(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Waits for `threads` threads, a multiple of 32, at barrier `name`.
DEVICE void named_barrier(u32 name, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// Counts this thread in there, and does not wait.
DEVICE void named_barrier_arrive(u32 name, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// Eight halves of row `to`, of which `count` exist.
DEVICE uint4 load_some(const u16* from, u32 count, bool whole) {
    if (whole && count == 8) return *(const uint4*)from;
    u32 v[4] = {};
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        if (i < count) v[i / 2] |= (u32)from[i] << i % 2 * 16;
    return {v[0], v[1], v[2], v[3]};
}

DEVICE void store_some(u16* to, uint4 value, u32 count, bool whole) {
    if (whole && count == 8) {
        *(uint4*)to = value;
        return;
    }
    const u32 v[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        if (i < count) to[i] = (u16)(v[i / 2] >> i % 2 * 16);
}

// The scale of a feature, times a power of two. `times` rounds once, like a weight that is dequantised to a half.
template <class Half>
struct Scale;

template <>
struct Scale<Fp16> {
    u32 pair;
    DEVICE Scale() {}
    DEVICE Scale(u32 bits, u32 factor) { pair = Fp16::fma2(bits * 0x00010001u, factor, 0x80008000u); }
    DEVICE u32 times(u32 value) const { return Fp16::fma2(value, pair, 0x80008000u); }
};

// A scale has more bits than bfloat16: it is the sum of two, its upper eight bits and the three that are left.
template <>
struct Scale<Bf16> {
    u32 high, low;
    DEVICE Scale() {}
    DEVICE Scale(u32 bits, u32) {
        const float value = Fp16::to_float((u16)bits), upper = __uint_as_float(__float_as_uint(value) & 0xFFFF0000u);
        high = __byte_perm(__float_as_uint(upper), 0, 0x3232), low = __byte_perm(__float_as_uint(value - upper), 0, 0x3232);
    }
    DEVICE u32 times(u32 value) const { return Bf16::fma2(value, high, Bf16::fma2(value, low, 0x80008000u)); }
};

template <class Half>
DEVICE u32 pack(float low, float high) { return (u32)Half::from_float(low) | (u32)Half::from_float(high) << 16; }

// What a warpgroup does at the end of a tile: `acc` begins with its 64 features from `feature` on and N tokens from `token` on.
// They go through 64 x N halves at `stage`, so that y is written in whole lines.
template <class Half, u32 N>
DEVICE void finish_tile(const WgmmaArgs& args, u32 stage, u32 feature, u32 token, float* acc, u32 lane, u32 warp, u32 name) {
    const bool paired = args.epilogue == SILU_MUL;
    // Places of 8 features of a token: 8 of them, or 4 for SILU_MUL, permuted against conflicts of banks.
    const u32 places = paired ? 4 : 8, row_bytes = places * 16;
    auto at = [&](u32 row, u32 place) { return stage + row * row_bytes + (place ^ (paired ? row / 2 % 4 : row % 8)) * 16; };
    const u32 thread = warp * 32 + lane, own_place = thread % places, rows_at_once = 128 / places;
    const u32 column = (paired ? feature / 2 : feature) + own_place * 8;
    const u32 count = min(args.columns > column ? args.columns - column : 0, 8);
    const bool whole = args.y_vectors;
    u16* const y = args.y + column;
    if (args.epilogue == ADD) {
#pragma unroll 4
        for (u32 row = thread / places; row < N; row += rows_at_once) {
            uint4 before = {};
            if (token + row < args.rows) before = load_some(y + (u64)(token + row) * args.y_stride, count, whole);
            store_shared_16(at(row, own_place), before);
        }
        named_barrier(name, 128);
    }
    const float factor = args.sum_factor * Expander<Half>::UNIT;
    const u32 lower = feature + warp * 16 + lane / 4, upper = lower + 8;
    const float low_bias = args.bias != nullptr && lower < args.n ? Fp16::to_float(args.bias[lower]) : 0.0f;
    const float high_bias = args.bias != nullptr && upper < args.n ? Fp16::to_float(args.bias[upper]) : 0.0f;
    // Of 16 tokens, or 32 for SILU_MUL, at a time.
    if (paired) {
#pragma unroll
        for (u32 i = 0; i < N / 32; ++i) {
            u32 v[4];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                float* const e = acc + i * 16 + j * 4;
                float out[2];
#pragma unroll
                for (u32 c = 0; c < 2; ++c) out[c] = silu(e[c] * factor + low_bias) * (e[2 + c] * factor + high_bias);
                v[j] = pack<Half>(out[0], out[1]);
            }
            store_transposes(at(i * 32 + lane, warp), v[0], v[1], v[2], v[3]);
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < N / 16; ++i) {
            float* const e = acc + i * 8;
            const u32 address = at(i * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
#pragma unroll
            for (u32 c = 0; c < 8; ++c) e[c] = e[c] * factor + (c / 2 % 2 ? high_bias : low_bias);
            if (args.epilogue == ADD) {
                const uint4 before = load_transposes(address);
                const u32 b[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
                for (u32 c = 0; c < 8; ++c) e[c] += Half::to_float((u16)(b[c / 2] >> c % 2 * 16));
                __syncwarp();
            }
            store_transposes(address, pack<Half>(e[0], e[1]), pack<Half>(e[2], e[3]), pack<Half>(e[4], e[5]), pack<Half>(e[6], e[7]));
        }
    }
    named_barrier(name, 128);
#pragma unroll 4
    for (u32 row = thread / places; row < N; row += rows_at_once)
        if (token + row < args.rows) store_some(y + (u64)(token + row) * args.y_stride, load_shared_16(at(row, own_place)), count, whole);
}

// What a block does of a tile: units `first` to `end`. It goes on from sums of the block before it if `first` is not 0, and
// leaves sums to the next block if `end` is not the last unit.
struct Piece {
    u32 tile, first, end;
};

// The pieces of a block, in their order. First come `whole` tiles of its own, the same for all blocks, so that those which share
// x read it at the same time. The units of the other tiles, one tile after the other, are divided equally: each block gets a
// tile's worth or more, so that no tile has more than two pieces. The beginning of a tile comes before, the end of another
// after what the block has between them: sums are there by the time they are needed.
struct Pieces {
    u32 count, whole, blocks, k_units, low, high;

    DEVICE Pieces(const WgmmaArgs& args, u32 tiles) : blocks(gridDim.x), k_units(args.k_units), low(0), high(0) {
        if (args.partials == nullptr) {
            count = whole = (tiles - blockIdx.x + blocks - 1) / blocks;
            return;
        }
        whole = args.whole;
        const u32 units = (tiles - whole * blocks) * k_units;
        low = blockIdx.x * units / blocks, high = (blockIdx.x + 1) * units / blocks;
        count = whole + (high + k_units - 1) / k_units - low / k_units;
    }

    DEVICE Piece get(u32 i) const {
        if (i < whole) return {blockIdx.x + i * blocks, 0, k_units};
        const u32 from_last = count - 1 - i, tile = low / k_units + from_last, shared = whole * blocks;
        return {shared + tile, from_last == 0 ? low % k_units : 0, min(high - tile * k_units, k_units)};
    }
};

DEVICE void store_release(u64* to, u64 value) { asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory"); }

DEVICE u64 load_acquire(const u64* from) {
    u64 v;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return v;
}

// Through L2: what another block has written, or will read.
DEVICE void store_global_floats(float* to, const float* v) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// Without a branch, because the compiler would not let `wgmma` overlap with anything after one.
DEVICE void load_global_floats_or_zeros(const float* from, float* v, bool load) {
    v[0] = v[1] = v[2] = v[3] = 0.0f;
    asm volatile(
        "{\n"
        ".reg .pred load;\n"
        "setp.ne.u32 load, %5, 0;\n"
        "@load ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
        "}" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3]) : "l"(from), "r"((u32)load) : "memory");
}

// SHARED lets two blocks share a tile: one leaves its sums, the other one goes on from them, which gives the same bits.
template <class Half, u32 GROUPS, bool ASYM, u32 N, u32 WARPGROUPS, u32 REGISTERS, bool SHARED>
DEVICE void wgmma_many(const TensorMap& x, const WgmmaArgs& args) {
    constexpr u32 UNIT = unit_bytes(GROUPS, ASYM), STRIPES = WARPGROUPS * 2, X_BYTES = N * 256;
    constexpr u32 STAGE = X_BYTES + (STRIPES * UNIT + 1023) / 1024 * 1024;
    // A batch of steps of 16 input features is expanded while the one before is multiplied.
    constexpr u32 BATCH = GROUPS == 4 ? 2 : 4, BATCHES = 8 / BATCH, PER_GROUP = BATCHES / GROUPS, R = N / 2;
    constexpr u32 CONSUMERS = WARPGROUPS * 4;
    // Barriers of the consumers and a warp that tells other blocks of sums, and waits for theirs.
    constexpr u32 LEFT = 5, THERE = 6, WITH_TELLER = CONSUMERS * 32 + 32;
    extern __shared__ __align__(1024) u8 shared_memory[];

    const u32 ring = uniform(shared_address(shared_memory));
    const u32 lane = opaque(threadIdx.x % 32), warp = uniform(threadIdx.x / 32);
    const u32 barriers = ring + args.stages * STAGE; // of each stage: full, empty
    const u32 stripes = (args.n + 31) / 32, tiles = (stripes + STRIPES - 1) / STRIPES * args.token_tiles;
    const Pieces pieces(args, tiles);

    if (threadIdx.x == CONSUMERS * 32) {
#pragma unroll 1
        for (u32 i = 0; i < args.stages; ++i) {
            mbarrier_init(barriers + i * 16, 1);
            mbarrier_init(barriers + i * 16 + 8, CONSUMERS * 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    launch_dependents();

    if (warp >= CONSUMERS) {
        set_registers_down<24>();
        if (warp == CONSUMERS) {
            u32 stage = 0, parity = 1;
#pragma unroll 1
            for (u32 index = 0; index < pieces.count; ++index) {
                const Piece piece = pieces.get(index);
                const u32 stripe = piece.tile / args.token_tiles * STRIPES, token = piece.tile % args.token_tiles * N;
                const u32 have = min(STRIPES, stripes - stripe);
#pragma unroll 1
                for (u32 i = piece.first; i < piece.end; ++i) {
                    const u32 at = ring + stage * STAGE, full = barriers + stage * 16;
                    mbarrier_wait(full + 8, parity);
                    if (lane == 0) mbarrier_expect(full, X_BYTES + have * UNIT);
                    __syncwarp();
                    if (lane < have)
                        bulk_copy(at + X_BYTES + lane * UNIT, args.units + ((u64)(stripe + lane) * args.k_units + i) * UNIT, UNIT, full);
                    if (index == 0 && i == piece.first) wait_for_dependencies();
                    if (lane < 2) tensor_copy(at + lane * (N * 128), x, i * 128 + lane * 64, token, full);
                    if (++stage == args.stages) stage = 0, parity ^= 1;
                }
            }
        }
        if (SHARED && warp == CONSUMERS + 1) {
#pragma unroll 1
            for (u32 index = 0; index < pieces.count; ++index) {
                const Piece piece = pieces.get(index);
                u64* const own = args.arrivals + blockIdx.x;
                if (piece.end < args.k_units) {
                    named_barrier(LEFT, WITH_TELLER);
                    __threadfence();
                    if (lane == 0) store_release(own, args.ticket);
                }
                if (piece.first > 0) {
                    // Blocks start in the order of their numbers, and none waits before it has left its own sums.
                    while (load_acquire(own - 1) != args.ticket) {}
                    __syncwarp();
                    if (lane == 0) *(own - 1) = 0; // for the next launch with this ticket, in a graph
                    named_barrier(THERE, WITH_TELLER);
                }
            }
        }
        return;
    }

    set_registers_up<REGISTERS>();
    const u32 half = warp % 2, own = X_BYTES + (warp / 4 * 2 + warp % 4 / 2) * UNIT;
    const u32 slot = (lane % 8 * 4 + (lane / 8 ^ lane % 8 / 2)) * 16;
    const u32 own_codes = opaque(own + half * 1024 + slot), own_scales = opaque(own + 2048 + lane / 4 * 8 + half * 4);
    constexpr u32 ZERO = zero_bytes(GROUPS);
    const u32 own_zeros = ZERO == 2 ? own_scales + 64 : opaque(own + 2048 + GROUPS * 64 + lane / 4 * 4 + half * 2);
    float acc[R];
    u32 a[2][BATCH][4];
    uint4 codes;
    Scale<Half> scale[2];
    Zero zero[2];
    // Batch `j` of the unit in the stage at `at`.
    auto expand = [&](u32 at, u32 j, u32 (&out)[BATCH][4]) {
        const u32 group = j / PER_GROUP;
        if (BATCH == 4 || j % 2 == 0) codes = load_matrices(at + own_codes + j * BATCH / 4 * 512);
        if (j % PER_GROUP == 0) {
            const u32 at_zeros = at + own_zeros + group * 32;
            const u32 z = !ASYM ? 0 : ZERO == 2 ? load_shared_4(at_zeros) : load_shared_2(at_zeros);
            zero[0] = Expander<Half>::template zero<ASYM>(z, 0), zero[1] = Expander<Half>::template zero<ASYM>(z, ZERO);
            const u32 packed = load_shared_4(at + own_scales + group * 64);
            scale[0] = Scale<Half>(packed & 0xFFFF, args.scale_factor), scale[1] = Scale<Half>(packed >> 16, args.scale_factor);
        }
#pragma unroll
        for (u32 s = 0; s < BATCH; ++s) {
            const u32 step = (j * BATCH + s) % 4, by = step / 2 * 8;
            Expander<Half>::expand(out[s][0], out[s][1], (step % 2 ? codes.z : codes.x) >> by, zero);
            Expander<Half>::expand(out[s][2], out[s][3], (step % 2 ? codes.w : codes.y) >> by, zero);
#pragma unroll
            for (u32 i = 0; i < 4; ++i) out[s][i] = scale[i % 2].times(out[s][i]);
        }
    };

    u32 stage = 0, parity = 0;
#pragma unroll 1
    for (u32 index = 0; index < pieces.count; ++index) {
        const Piece piece = pieces.get(index);
        float* const place = args.partials + (u64)blockIdx.x * (CONSUMERS * 32 * R) + threadIdx.x * 4;
        const bool resumed = SHARED && piece.first > 0;
        if (resumed) named_barrier(THERE, WITH_TELLER);
#pragma unroll
        for (u32 e = 0; e < R; e += 4) {
            if (SHARED) load_global_floats_or_zeros(place - CONSUMERS * 32 * R + e * (CONSUMERS * 32), acc + e, resumed);
            else acc[e] = acc[e + 1] = acc[e + 2] = acc[e + 3] = 0.0f;
        }
        mbarrier_wait(barriers + stage * 16, parity);
        expand(ring + stage * STAGE, 0, a[0]);
        u32 empty = 0, at = 0;
#pragma unroll 1
        for (u32 i = piece.first; i < piece.end; ++i) {
            const u32 before = empty;
            at = ring + stage * STAGE, empty = barriers + stage * 16 + 8;
            const u64 operand = swizzled_operand(at);
            if (++stage == args.stages) stage = 0, parity ^= 1;
#pragma unroll
            for (u32 b = 0; b < BATCHES; ++b) {
                const bool last = b + 1 == BATCHES;
                wgmma_fence();
#pragma unroll
                for (u32 s = 0; s < BATCH; ++s) {
                    const u32 step = b * BATCH + s; // 32 bytes of a row
                    Wgmma<N>::run(Half(), acc, a[b % 2][s], operand + (step / 4) * (N * 128 / 16) + step % 4 * 2, 1);
                }
                wgmma_commit();
                wgmma_wait<1>();
                if (b == 0 && i > piece.first) mbarrier_arrive(before);
                if (!last) expand(at, b + 1, a[(b + 1) % 2]);
                else if (i + 1 < piece.end) {
                    mbarrier_wait(barriers + stage * 16, parity);
                    expand(ring + stage * STAGE, 0, a[0]);
                }
            }
        }
        wgmma_wait<0>();
        wgmma_settle(acc);
        if (SHARED && piece.end < args.k_units) {
            mbarrier_arrive(empty);
#pragma unroll
            for (u32 e = 0; e < R; e += 4) store_global_floats(place + e * (CONSUMERS * 32), acc + e);
            named_barrier_arrive(LEFT, WITH_TELLER);
            continue;
        }
        // The last stage's x has been read by all, and is the place for what y gets.
        named_barrier(1, CONSUMERS * 32);
        const u32 feature = (piece.tile / args.token_tiles * WARPGROUPS + warp / 4) * 64;
        constexpr u32 PASSES = (WARPGROUPS + 1) / 2, PASS = N / PASSES;
        const u32 token = piece.tile % args.token_tiles * N, corner = at + warp / 4 * (PASS * 128);
#pragma unroll 1
        for (u32 pass = 0; pass < PASSES; ++pass) {
            if (pass > 0) named_barrier(2 + warp / 4, 128);
            finish_tile<Half, PASS>(args, corner, feature, token + pass * PASS, acc, lane, warp % 4, 2 + warp / 4);
#pragma unroll
            for (u32 e = 0; e + PASS / 2 < R; ++e) acc[e] = acc[e + PASS / 2];
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        mbarrier_arrive(empty);
    }
}
