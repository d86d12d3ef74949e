// Attention over one page: 64 keys of one head, and 16 queries of a warp.
//
// Softmax is done anew in every page; what pages give is merged in order of their positions, first the four pages of a
// chunk, then the chunks. That order depends on positions alone, so that it does not matter to a bit which warp, block or
// kernel computes a page, nor what other queries there are: a page that a query does not see changes nothing exactly.
//
// Keys and values lie in pieces of 16 bytes, one for each lane, in the order in which lanes use them (`decoder.cuh`), in the
// store and in shared memory. The products are m16n8k16; their inner index is permuted so that a lane's operands for two
// steps are one piece. With t = l % 4 and c = l / 4, score s[nt][e] belongs to key 32 (nt / 4) + 8 t + 2 (nt % 4) + e % 2 and query c + 8 (e / 2), and scores become the
// other product's operand where they are.
#pragma once
#include "decoder.cuh"

constexpr u32 CHUNK_PAGES = 4;
constexpr u32 QUERIES = 16;

#define NEGATIVE_INFINITY __uint_as_float(0xFF800000)

DEVICE float exp2_fast(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// Starts fetching pieces `first`, `first + step` ... of `bytes`, a piece being 16 bytes for each lane.
DEVICE void fetch_pieces(u32 to, const u8* from, u32 bytes, u32 lane, u32 first, u32 step) {
#pragma unroll 4
    for (u32 i = first * 32 + lane; i < bytes / 16; i += step * 32) copy_16(to + i * 16, from + i * 16);
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <u32 PENDING>
DEVICE void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE void store_shared_16(u32 address, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Pages whose keys and values are halves. `BytePages` (`bytes.cuh`) has the same names; that file says what differs.
template <class H, u32 PADDED>
struct HalfPages {
    using Half = H;
    using Weight = H;  // what weights of values are rounded to
    static constexpr bool BYTES = false;
    static constexpr u32 P = PADDED, KEY_BYTES = PAGE_LEN * P * 2, VALUE_BYTES = KEY_BYTES, PIECES = KEY_BYTES / 512;

    // What of a key is fed to the tensor core for features 32 j and on, of the eight groups of keys.
    static DEVICE void load_keys(uint4 (&k)[8], u32 keys, u32 lane, u32 j) {
#pragma unroll
        for (u32 nt = 0; nt < 8; ++nt) k[nt] = load_shared_16(keys + ((nt * (P / 32) + j) * 32 + lane) * 16);
    }

    // The same of values, for features 8 n and on.
    static DEVICE void load_values(uint4 (&v)[2], u32 values, u32 lane, u32 n) {
#pragma unroll
        for (u32 h = 0; h < 2; ++h) v[h] = load_shared_16(values + ((2 * n + h) * 32 + lane) * 16);
    }

    // What the scores of the lane's keys are multiplied with: key 32 h + 8 t + i at 8 h + i.
    static DEVICE void score_factors(float (&factors)[16], u32 keys, u32 lane, float scale) {
#pragma unroll
        for (u32 i = 0; i < 16; ++i) factors[i] = scale;
    }

    // Numerators of the softmax as the operand of the second product, whose results are in units of `unit`.
    static DEVICE void round_weights(u32 (&weights)[4][4], float (&unit)[2], const float (&s)[8][4], u32 keys, u32 lane) {
#pragma unroll
        for (u32 nt = 0; nt < 8; ++nt)
#pragma unroll
            for (u32 h = 0; h < 2; ++h) weights[nt / 2][nt % 2 * 2 + h] = pack<Half>(s[nt][2 * h], s[nt][2 * h + 1]);
    }

    static DEVICE float in_units(float sum, float unit) { return sum; }

    // Zeros the values of keys from `end` on in the lane's own pieces: their weight is zero, but they may hold anything.
    static DEVICE void clear(u32 keys, u32 lane, u32 first, u32 step, u32 end) {
        const u32 values = keys + KEY_BYTES;
#pragma unroll 1
        for (u32 i = first; i < PIECES; i += step) {
            const u32 key = 32 * (i % 2) + lane % 4 * 8;
            if (key + 8 <= end) continue;
            const u32 left = end > key ? end - key : 0, at = values + (i * 32 + lane) * 16;
            for (u32 e = left; e < 8; ++e) store_shared_2(at + e * 2, 0);
        }
    }
};

// Softmax state of the two queries of a lane, c and c + 8.
struct State {
    float max[2], sum[2];
};

DEVICE State empty_state() { return {{NEGATIVE_INFINITY, NEGATIVE_INFINITY}, {0.0f, 0.0f}}; }

// Factors of two states that are merged, the earlier and the later; `max` becomes the common maximum.
DEVICE void merge_factors(float& max, float later, float& earlier_factor, float& later_factor) {
    const float common = fmaxf(max, later), safe = common == NEGATIVE_INFINITY ? 0.0f : common;
    earlier_factor = exp2_fast(max - safe), later_factor = exp2_fast(later - safe);
    max = common;
}

DEVICE float merged(float earlier, float earlier_factor, float later, float later_factor) {
    return __fmaf_rn(later, later_factor, __fmul_rn(earlier, earlier_factor));
}

// Fragments of 16 queries, from rows of P elements in shared memory that are `stride` bytes apart.
template <u32 P>
DEVICE void load_queries(u32 (&q)[P / 16][4], u32 queries, u32 stride, u32 lane) {
#pragma unroll
    for (u32 j = 0; j < P / 32; ++j) {
        const u32 at = queries + lane / 4 * stride + (32 * j + lane % 4 * 8) * 2;
        const uint4 a = load_shared_16(at), b = load_shared_16(at + 8 * stride);
        q[2 * j][0] = a.x, q[2 * j][1] = b.x, q[2 * j][2] = a.y, q[2 * j][3] = b.y;
        q[2 * j + 1][0] = a.z, q[2 * j + 1][1] = b.z, q[2 * j + 1][2] = a.w, q[2 * j + 1][3] = b.w;
    }
}

// Numerators of the softmax over the page as the operand of the second product, and the units of its results for both queries
// of the lane. `first` and `end` say which keys of the page they see. `scale` includes log2(e).
template <class Pages>
DEVICE State page_weights(u32 (&weights)[4][4], float (&unit)[2], const u32 (&q)[Pages::P / 16][4], u32 keys, u32 lane, float scale,
                          const i32 (&first)[2], const i32 (&end)[2]) {
    using Half = typename Pages::Half;
    float s[8][4];
#pragma unroll
    for (u32 nt = 0; nt < 8; ++nt)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) s[nt][e] = 0.0f;
    // Products that follow each other are of different sums: one that has to wait for the one before takes four times as long.
#pragma unroll
    for (u32 j = 0; j < Pages::P / 32; ++j) {
        uint4 k[8];
        Pages::load_keys(k, keys, lane, j);
#pragma unroll
        for (u32 nt = 0; nt < 8; ++nt) Half::mma(s[nt], q[2 * j], k[nt].x, k[nt].y);
#pragma unroll
        for (u32 nt = 0; nt < 8; ++nt) Half::mma(s[nt], q[2 * j + 1], k[nt].z, k[nt].w);
    }
    float factors[16];
    Pages::score_factors(factors, keys, lane, scale);
    State state = empty_state();
#pragma unroll
    for (u32 nt = 0; nt < 8; ++nt) {
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            const i32 key = 32 * (nt / 4) + lane % 4 * 8 + 2 * (nt % 4) + e % 2;
            const bool seen = key >= first[e / 2] && key < end[e / 2];
            s[nt][e] = seen ? __fmul_rn(s[nt][e], factors[nt / 4 * 8 + nt % 4 * 2 + e % 2]) : NEGATIVE_INFINITY;
            state.max[e / 2] = fmaxf(state.max[e / 2], s[nt][e]);
        }
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        state.max[h] = fmaxf(state.max[h], __shfl_xor_sync(~0u, state.max[h], 1));
        state.max[h] = fmaxf(state.max[h], __shfl_xor_sync(~0u, state.max[h], 2));
    }
    const float safe[2] = {state.max[0] == NEGATIVE_INFINITY ? 0.0f : state.max[0],
                           state.max[1] == NEGATIVE_INFINITY ? 0.0f : state.max[1]};
#pragma unroll
    for (u32 nt = 0; nt < 8; ++nt) {
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            s[nt][e] = exp2_fast(__fsub_rn(s[nt][e], safe[e / 2]));
            state.sum[e / 2] = __fadd_rn(state.sum[e / 2], s[nt][e]);
        }
    }
    Pages::round_weights(weights, unit, s, keys, lane);
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        state.sum[h] = __fadd_rn(state.sum[h], __shfl_xor_sync(~0u, state.sum[h], 1));
        state.sum[h] = __fadd_rn(state.sum[h], __shfl_xor_sync(~0u, state.sum[h], 2));
    }
    return state;
}

// Features 8 n .. 8 n + 8 of the weighted sum: those of query c in [0], [1], of query c + 8 in [2], [3].
template <class Pages>
DEVICE void page_sum(float (&sum)[4], const u32 (&weights)[4][4], u32 values, u32 lane, u32 n) {
    using Weight = typename Pages::Weight;
    uint4 v[2];
    Pages::load_values(v, values, lane, n);
#pragma unroll
    for (u32 e = 0; e < 4; ++e) sum[e] = 0.0f;
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        Weight::mma(sum, weights[2 * h], v[h].x, v[h].y);
        Weight::mma(sum, weights[2 * h + 1], v[h].z, v[h].w);
    }
}

// What of the values of a page is older than the new token, and where the new one belongs, for the pieces of one lane.
struct NewValue {
    u32 keep[2][4], insert[2][4];
    u32 shift;
};

// Of the page of the new token: values behind it count as zero, whatever they are. A slot behind the page changes nothing.
DEVICE NewValue new_value_at(u32 slot, u32 lane) {
    NewValue out;
    out.shift = slot % 2 * 16;
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
#pragma unroll
        for (u32 w = 0; w < 4; ++w) {
            const u32 key = 32 * h + lane % 4 * 8 + 2 * w;
            out.keep[h][w] = (key < slot ? 0x0000FFFFu : 0) | (key + 1 < slot ? 0xFFFF0000u : 0);
            out.insert[h][w] = key == slot / 2 * 2 ? 0xFFFFu << out.shift : 0;
        }
    }
    return out;
}

// `page_sum` for N eights of features from `n` on. In the page of the new token, if its pages are of halves, `value(n)` is its value.
template <class Pages, u32 N, bool NEWEST, class F>
DEVICE void page_sums(float (&sum)[N][4], const u32 (&weights)[4][4], u32 values, u32 lane, u32 n, const NewValue& at, F value) {
    using Weight = typename Pages::Weight;
    uint4 v[N][2];
    u32 bits[N];
#pragma unroll
    for (u32 k = 0; k < N; ++k) {
        Pages::load_values(v[k], values, lane, n + k);
        if (NEWEST) bits[k] = value(n + k) << at.shift;
#pragma unroll
        for (u32 e = 0; e < 4; ++e) sum[k][e] = 0.0f;
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        if (NEWEST) {
#pragma unroll
            for (u32 k = 0; k < N; ++k) {
                v[k][h].x = (v[k][h].x & at.keep[h][0]) | (bits[k] & at.insert[h][0]);
                v[k][h].y = (v[k][h].y & at.keep[h][1]) | (bits[k] & at.insert[h][1]);
                v[k][h].z = (v[k][h].z & at.keep[h][2]) | (bits[k] & at.insert[h][2]);
                v[k][h].w = (v[k][h].w & at.keep[h][3]) | (bits[k] & at.insert[h][3]);
            }
        }
#pragma unroll
        for (u32 k = 0; k < N; ++k) Weight::mma(sum[k], weights[2 * h], v[k][h].x, v[k][h].y);
#pragma unroll
        for (u32 k = 0; k < N; ++k) Weight::mma(sum[k], weights[2 * h + 1], v[k][h].z, v[k][h].w);
    }
}
