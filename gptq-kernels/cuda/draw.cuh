// Tokens drawn from rows of logits. The law is that of `src/draw.rs`, to the bit: whatever is added up there is an integer, and
// what is rounded is rounded here by the same operations. The likeliest token is found by one block a row, others by a team of
// blocks, a cluster where there are clusters: by bisection, pass by pass over the row.
#pragma once
#include "decoder.cuh"

constexpr u32 DRAW_THREADS = 1024, DRAW_WARPS = DRAW_THREADS / 32;

// Threads of a block of a team, and blocks of a team.
constexpr u32 TEAM_THREADS = IMAGE_SM90 ? 512 : 1024, TEAM_WARPS = TEAM_THREADS / 32, TEAM_BLOCKS = IMAGE_SM90 ? 8 : 1;

// A row that no token can be drawn from. As a token of the next step it is in no vocabulary.
constexpr u32 NONE = 0xFFFFFFFF;

// Marks a token that is read from among those that were drawn.
constexpr u32 DRAWN = 0x80000000;

struct DrawParameters {
    float rate;  // log2(e) / temperature; 0 takes the likeliest token
    u32 top_k;   // 0 for all
    double top_p;
    u64 least, random;
};

struct DrawArgs {
    const u16* x;  // (rows, cols)
    u32* out;      // (rows)
    const DrawParameters* draws;
    u32* host[2];  // (rows), for even and odd numbers; all from here on are null if the token is for nobody else
    u32* numbers;  // (rows)
    u32* positions;
    Tile* tiles;
    u32* tokens;
    u64 x_stride;
    u32 cols, vectors;
    u32 advances;  // the step becomes the next one
};

// By one thread, after `await_previous`.
DEVICE void deliver(const DrawArgs& args, u32 row, u32 token) {
    args.out[row] = token;
    if (args.numbers == nullptr) return;
    const u32 number = args.numbers[row];
    args.host[number % 2][row] = token;
    if (!args.advances) return;
    args.numbers[row] = number + 1;
    args.positions[row] += 1;
    args.tiles[row].position += 1;
    args.tokens[row] = token & ~DRAWN;
}

struct Best {
    float value;
    u32 index;  // NONE: none yet
    bool nan;
};

DEVICE void improve(Best& best, float value, u32 index, bool nan) {
    best.nan |= nan;
    const bool better = index != NONE && (best.index == NONE || value > best.value || (value == best.value && index < best.index));
    if (better) best.value = value, best.index = index;
}

// The first of the largest logits; threads of the first warp know it.
template <class Half>
DEVICE Best find_best(const DrawArgs& args) {
    const u16* x = args.x + blockIdx.x * args.x_stride;
    Best best = {0.0f, NONE, false};
#pragma unroll 4
    for (u32 i = threadIdx.x * 8; i < args.cols; i += DRAW_THREADS * 8) {
        float v[8];
        load_8<Half>(v, x + i, args.cols - i, args.vectors);
        const u32 count = min(8u, args.cols - i);
#pragma unroll
        for (u32 e = 0; e < 8; ++e)
            if (e < count) improve(best, v[e], i + e, v[e] != v[e]);
    }
    auto across = [&] {
#pragma unroll
        for (u32 step = 16; step > 0; step /= 2) {
            const float value = __shfl_xor_sync(~0u, best.value, step);
            const u32 index = __shfl_xor_sync(~0u, best.index, step);
            improve(best, value, index, __shfl_xor_sync(~0u, (u32)best.nan, step));
        }
    };
    __shared__ Best warps[DRAW_WARPS];
    across();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x < 32) {
        best = warps[threadIdx.x];
        across();
    }
    return best;
}

template <class Half>
DEVICE void draw_greedy(const DrawArgs& args) {
    release_next();
    await_previous();
    const Best best = find_best<Half>(args);
    if (threadIdx.x == 0) deliver(args, blockIdx.x, best.nan ? NONE : best.index);
}

// A block's place in its team. Every thread of the team calls what its functions are.
struct Team {
    u32 row, rank, parity;

    DEVICE Team() : row(blockIdx.x / TEAM_BLOCKS), rank(blockIdx.x % TEAM_BLOCKS), parity(0) {}

    DEVICE u32 thread() const { return rank * TEAM_THREADS + threadIdx.x; }

    // Waits for the team. What its blocks have pushed can be seen.
    DEVICE void wait() {
#if IMAGE_SM90
        cluster_arrive();
        cluster_wait();
#else
        __syncthreads();
#endif
        parity ^= 1;
    }

    // Writes to where block `to` has `slot`.
    DEVICE void push(u64* slot, u64 value, u32 to) {
#if IMAGE_SM90
        asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote_address(shared_address(slot), to)), "l"(value) : "memory");
#else
        *slot = value;
#endif
    }

    // Replaces each value by its sum over the team, or by the maximum. A slot is written again after the next but one `wait`, when
    // all have read it.
    template <u32 N, bool SUM>
    DEVICE void reduce(u64 (&values)[N]) {
        __shared__ u64 of_warps[N][TEAM_WARPS], of_blocks[2][N][TEAM_BLOCKS];
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            const u64 value = across_warp<SUM>(values[n]);
            if (lane == 0) of_warps[n][warp] = value;
        }
        __syncthreads();
        if (warp == 0) {
#pragma unroll
            for (u32 n = 0; n < N; ++n) {
                const u64 value = across_warp<SUM>(lane < TEAM_WARPS ? of_warps[n][lane] : 0);
                if (lane < TEAM_BLOCKS) push(&of_blocks[parity][n][rank], value, lane);
            }
        }
        const u32 now = parity;
        wait();
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            values[n] = 0;
#pragma unroll
            for (u32 i = 0; i < TEAM_BLOCKS; ++i) {
                const u64 other = of_blocks[now][n][i];
                values[n] = SUM ? values[n] + other : max(values[n], other);
            }
        }
    }

    DEVICE u64 sum(u64 value) {
        u64 values[1] = {value};
        reduce<1, true>(values);
        return values[0];
    }

    // The sum over the team; `before` becomes the sum over the threads before this one.
    DEVICE u64 scan(u64 value, u64& before) {
        __shared__ u64 of_warps[TEAM_WARPS], of_blocks[2][TEAM_BLOCKS];
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        u64 own = value;
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            const u64 other = __shfl_up_sync(~0u, own, step);
            if (lane >= step) own += other;
        }
        if (lane == 31) of_warps[warp] = own;
        __syncthreads();
        u64 block = 0;
        before = own - value;
#pragma unroll
        for (u32 i = 0; i < TEAM_WARPS; ++i) {
            if (i == warp) before += block;
            block += of_warps[i];
        }
        if (threadIdx.x < TEAM_BLOCKS) push(&of_blocks[parity][rank], block, threadIdx.x);
        const u32 now = parity;
        wait();
        u64 total = 0;
#pragma unroll
        for (u32 i = 0; i < TEAM_BLOCKS; ++i) {
            if (i == rank) before += total;
            total += of_blocks[now][i];
        }
        return total;
    }

    template <bool SUM>
    static DEVICE u64 across_warp(u64 value) {
        if (SUM) {
            // In limbs whose sums have room in 32 bits.
            const u32 limb = (1u << 22) - 1;
            const u32 low = __reduce_add_sync(~0u, (u32)value & limb), middle = __reduce_add_sync(~0u, (u32)(value >> 22) & limb);
            return low + ((u64)middle << 22) + ((u64)__reduce_add_sync(~0u, (u32)(value >> 44)) << 44);
        }
        const u32 high = __reduce_max_sync(~0u, (u32)(value >> 32));
        return (u64)high << 32 | __reduce_max_sync(~0u, (u32)(value >> 32) == high ? (u32)value : 0);
    }
};

// What a token weighs whose logit is `distance` below the largest.
DEVICE u64 weight_of(float distance, float rate) {
    const float e = __fmul_rn(distance, rate);
    if (e != e) return 1ull << 40;
    if (e >= 41.0f) return 0;
    const float i = floorf(__fadd_rn(e, 0.5f)), f = __fsub_rn(e, i);
    float power = 1.540353e-4f;
    power = __fadd_rn(__fmul_rn(power, f), -1.3333558e-3f);
    power = __fadd_rn(__fmul_rn(power, f), 9.618129e-3f);
    power = __fadd_rn(__fmul_rn(power, f), -5.5504109e-2f);
    power = __fadd_rn(__fmul_rn(power, f), 2.4022651e-1f);
    power = __fadd_rn(__fmul_rn(power, f), -6.9314718e-1f);
    power = __fadd_rn(__fmul_rn(power, f), 1.0f);
    return __float2ull_rz(__fmul_rn(power, __uint_as_float((127 + 40 - (u32)i) << 23)));
}

// Bits of a logit as a number of the same order; both zeros are equal.
DEVICE u32 key_of_logit(u16 bits) {
    const u32 v = bits == 0x8000 ? 0 : bits;
    return v & 0x8000 ? ~v & 0xFFFF : v | 0x8000;
}

DEVICE u16 logit_of_key(u32 key) { return (u16)(key & 0x8000 ? key & 0x7FFF : ~key & 0xFFFF); }

// Calls f(i, bits) for the thread's share of the logits.
template <class F>
DEVICE void for_each_logit(const DrawArgs& args, const Team& team, F f) {
    const u16* x = args.x + team.row * args.x_stride;
    for (u32 i = team.thread() * 8; i < args.cols; i += TEAM_BLOCKS * TEAM_THREADS * 8) {
        u16 bits[8];
        if (args.vectors && args.cols - i >= 8) {
            const uint4 raw = *(const uint4*)(x + i);
            const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (u32 e = 0; e < 8; ++e) bits[e] = (u16)(words[e / 2] >> (e % 2 * 16));
        } else {
#pragma unroll
            for (u32 e = 0; e < 8; ++e) bits[e] = i + e < args.cols ? x[i + e] : (u16)0;
        }
#pragma unroll
        for (u32 e = 0; e < 8; ++e)
            if (i + e < args.cols) f(i + e, bits[e]);
    }
}

// The largest key at which the measures of all keys from it on reach `needed`, two bits at a time; `above` becomes the sum
// of those above it.
template <class F>
DEVICE u32 select_key(const DrawArgs& args, Team& team, u64 needed, u64& above, F measure) {
    u32 key = 0;
    above = 0;
#pragma unroll 1
    for (i32 shift = 14; shift >= 0; shift -= 2) {
        u64 sums[3] = {0, 0, 0};
        for_each_logit(args, team, [&](u32, u16 bits) {
            const u32 own = key_of_logit(bits);
            if (own < (key | 1u << shift)) return;
            const u64 m = measure(own, bits);
#pragma unroll
            for (u32 c = 0; c < 3; ++c)
                if (own >= (key | (c + 1) << shift)) sums[c] += m;
        });
        team.reduce<3, true>(sums);
        u32 chosen = 0;
#pragma unroll
        for (u32 c = 0; c < 3; ++c) {
            if (sums[c] >= needed) chosen = c + 1;
            else if (chosen == c) above = sums[c];
        }
        key |= chosen << shift;
    }
    return key;
}

template <class Half>
DEVICE void draw_sampled(const DrawArgs& args) {
    release_next();
    Team team;
    // Nothing is pushed to a block that has not begun.
    team.wait();
    await_previous();
    // The first of the largest logits, and whether one is NaN: all bits are set then.
    u64 best[1] = {0};
    for_each_logit(args, team, [&](u32 i, u16 bits) {
        const float v = Half::to_float(bits);
        best[0] = max(best[0], v != v ? ~0ull : (u64)key_of_logit(bits) << 32 | (u32)~i);
    });
    team.reduce<1, false>(best);
    const bool nan = best[0] == ~0ull;
    const float largest = Half::to_float(logit_of_key((u32)(best[0] >> 32)));
    const DrawParameters draw = args.draws[team.row];
    if (draw.rate == 0.0f || nan || largest == __uint_as_float(0x7F800000)) {
        if (team.thread() == 0) deliver(args, team.row, nan || draw.rate != 0.0f ? NONE : ~(u32)best[0]);
        return;
    }
    auto weight = [&](u16 bits) { return weight_of(__fsub_rn(largest, Half::to_float(bits)), draw.rate); };

    // Kept are keys above `lowest`, and the first `ties` that are equal to it.
    u32 lowest = 0, ties = args.cols;
    const bool ranked = (draw.top_k != 0 && draw.top_k < args.cols) || draw.top_p < 1.0;
    if (draw.top_k != 0 && draw.top_k < args.cols) {
        u64 above;
        lowest = select_key(args, team, draw.top_k, above, [](u32, u16) { return (u64)1; });
        ties = draw.top_k - (u32)above;
    }
    if (draw.top_p < 1.0) {
        u64 sums[2] = {0, 0};
        for_each_logit(args, team, [&](u32, u16 bits) {
            const u32 key = key_of_logit(bits);
            if (key > lowest) sums[0] += weight(bits);
            if (key == lowest) sums[1] += 1;
        });
        team.reduce<2, true>(sums);
        const u64 above = sums[0], tie_weight = weight(logit_of_key(lowest));
        const u64 sum = above + tie_weight * min((u64)ties, sums[1]);
        const u64 needed = __double2ull_ru(__dmul_rn(__ull2double_rn(sum), draw.top_p));
        if (above >= needed) {
            u64 over;
            const u32 limit = lowest;
            lowest = select_key(args, team, needed, over, [&](u32 key, u16 bits) { return key > limit ? weight(bits) : (u64)0; });
            const u64 each = weight(logit_of_key(lowest));
            ties = (u32)min((u64)args.cols, (needed - over + each - 1) / each);
        } else if (tie_weight > 0) {
            ties = (u32)min((u64)ties, (needed - above + tie_weight - 1) / tie_weight);
        }
    }

    // From here on a thread has logits that lie side by side.
    const u16* x = args.x + team.row * args.x_stride;
    const u32 share = (args.cols + TEAM_BLOCKS * TEAM_THREADS - 1) / (TEAM_BLOCKS * TEAM_THREADS);
    const u32 first = min(args.cols, team.thread() * share), end = min(args.cols, first + share);
    u64 ties_before = 0;
    if (ranked) {
        u64 own = 0;
        for (u32 i = first; i < end; ++i) own += key_of_logit(x[i]) == lowest;
        team.scan(own, ties_before);
    }
    // Weights that are kept, in order.
    auto walk = [&](auto f) {
        u64 tie = ties_before;
        for (u32 i = first; i < end; ++i) {
            const u16 bits = x[i];
            const u32 key = key_of_logit(bits);
            if (ranked && (key < lowest || (key == lowest && tie++ >= ties))) continue;
            const u64 w = weight(bits);
            if (w >= draw.least) f(i, w);
        }
    };
    u64 own = 0, before;
    walk([&](u32, u64 w) { own += w; });
    const u64 target = __umul64hi(draw.random, team.scan(own, before));
    if (target < before || target - before >= own) return;
    u64 running = before;
    u32 token = NONE;
    walk([&](u32 i, u64 w) {
        running += w;
        if (token == NONE && running > target) token = i;
    });
    deliver(args, team.row, token);
}
