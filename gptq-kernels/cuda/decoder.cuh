// What the operations of a decoder share: dependent launch where there is one, and rows of halves as floats.
//
// IMAGE_SM90 is 1 in images for sm_90 and later. Kernels of other images start when the one before has ended.
#pragma once
#include "hopper.cuh"

// Lets the next kernel of the stream start; it still waits for this one's results.
DEVICE void release_next() {
#if IMAGE_SM90
    launch_dependents();
#endif
}

// Returns when all that earlier kernels of the stream have written can be seen.
DEVICE void await_previous() {
#if IMAGE_SM90
    wait_for_dependencies();
#endif
}

// Two floats, rounded to nearest even, as one register.
template <class Half>
DEVICE u32 pack(float low, float high);

template <>
DEVICE u32 pack<Fp16>(float low, float high) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

template <>
DEVICE u32 pack<Bf16>(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

template <class Half>
DEVICE void unpack(float (&v)[8], const uint4& raw) {
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        v[2 * i] = Half::to_float((u16)words[i]);
        v[2 * i + 1] = Half::to_float((u16)(words[i] >> 16));
    }
}

// Eight elements of a row, of which `left` exist; the rest are zero. `vectors` promises an alignment of 16 bytes.
template <class Half>
DEVICE void load_8(float (&v)[8], const u16* from, u32 left, bool vectors) {
    if (vectors && left >= 8) {
        unpack<Half>(v, *(const uint4*)from);
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) v[i] = i < left ? Half::to_float(from[i]) : 0.0f;
    }
}

template <class Half>
DEVICE void store_8(u16* to, const float (&v)[8], u32 left, bool vectors) {
    if (vectors && left >= 8) {
        *(uint4*)to = {pack<Half>(v[0], v[1]), pack<Half>(v[2], v[3]), pack<Half>(v[4], v[5]), pack<Half>(v[6], v[7])};
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            if (i < left) to[i] = Half::from_float(v[i]);
    }
}

// The rotation of one pair of features. Each product and the sum are rounded, so that every kernel gives the same bits.
DEVICE void rotate(float& a, float& b, float cos, float sin) {
    const float first = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
    b = __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
    a = first;
}

// Tokens of one page. A page of one head is the keys and the values of 64 tokens, P features each with P the padded
// head_dim, in the order in which the lanes of a warp use them (`page.cuh` says what for): pieces of 8 elements, piece i of
// lane l at 8 (32 i + l). With c = l / 4 and t = l % 4:
//
//     keys,   piece nt * (P / 32) + j:  key 32 (nt / 4) + 8 (c / 2) + 2 (nt % 4) + c % 2, features 32 j + 8 t .. + 8
//     values, piece 2 n + h:            feature 8 n + c, keys 32 h + 8 t .. + 8
constexpr u32 PAGE_LEN = 64;

// Where feature d of key `slot` is.
DEVICE u32 key_place(u32 slot, u32 d, u32 padded) {
    const u32 nt = slot / 32 * 4 + slot % 8 / 2, c = slot % 32 / 8 * 2 + slot % 2;
    return ((nt * (padded / 32) + d / 32) * 32 + 4 * c + d % 32 / 8) * 8 + d % 8;
}

DEVICE u32 value_place(u32 slot, u32 d) {
    return ((d / 8 * 2 + slot / 32) * 32 + d % 8 * 4 + slot % 32 / 8) * 8 + slot % 8;
}

// Rows of one tile of a step.
constexpr u32 TILE_ROWS = 64;

// Consecutive rows of one sequence.
struct Tile {
    u32 row, rows;
    u32 position;   // of the first row
    u32 page_base;  // where the sequence's pages begin among the pages of the step
};

// What the rotation and storing of keys and values is given, here and in `bytes.cuh`.
struct RopeArgs {
    u16* qkv;                // (rows, (heads + 2 kv_heads) * head_dim)
    const u64* store;        // addresses of the layer's keys and values
    const u32* positions;    // (rows)
    const u32* page_bases;   // (rows)
    const u32* pages;
    const Tile* tiles;
    const float* cos;        // (positions, head_dim / 2)
    const float* sin;
    u64 stride;
    u32 rows, heads, kv_heads, head_dim, padded;
};
