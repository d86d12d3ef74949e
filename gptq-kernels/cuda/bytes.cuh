// Pages whose keys and values are bytes, with a scale for each token and head.
//
// With m the largest magnitude of a head's key (after its rotation) or value as it would have been stored in halves, the
// scale is m / 127 and a feature x is the code q = round(x 127 / m) to the nearest even, both quotients and the product
// in float32; heads with m < 2^-100 are zero. What is read is q times the scale, at most (1/2 + 127 * 3 * 2^-24) scales
// from x. A code lies in memory as q + 128, so that padding may be any byte, and a byte is never a NaN.
//
// Nothing else is rounded. Codes become halves exactly, keys' scales multiply the scores and values' scales the weights,
// which are then halves in units of a power of two near the largest of the query's weights in the page. That unit depends
// on the keys that the query sees alone; halves of fp16 have room for all of them, also where activations are of bf16.
//
// The keys of a page and head are its codes, the scales of the keys and those of the values, the values are codes. Codes lie
// in pieces of 16 bytes as in `decoder.cuh`; piece i of lane l is at 16 (32 i + l), and with c = l / 4 and t = l % 4:
//
//     keys,   piece g * (P / 32) + j:  keys 32 (g / 2) + 8 (c / 2) + 4 (g % 2) + c % 2 and the second after it,
//                                      features 32 j + 8 t .. + 8 of each
//     values, piece n:                 feature 8 n + c, keys 8 t .. + 8 and 32 + 8 t .. + 8
#pragma once
#include "page.cuh"

DEVICE void store_shared_1(u32 address, u32 value) { asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(value) : "memory"); }

DEVICE u32 load_shared_1(u32 address) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

// Eight codes as exact halves.
template <class Half>
DEVICE uint4 expand(u32 first, u32 second);

// A byte u in the mantissa of 1024 is 1024 + u.
template <>
DEVICE uint4 expand<Fp16>(u32 first, u32 second) {
    auto pair = [](u32 word, u32 which) { return Fp16::add2(__byte_perm(word, 0x64646464, which), 0xE480E480); };
    return {pair(first, 0x4140), pair(first, 0x4342), pair(second, 0x4140), pair(second, 0x4342)};
}

// The mantissa of 128 takes seven bits of the byte; 128 or, where the eighth is not set, 256 is subtracted.
template <>
DEVICE uint4 expand<Bf16>(u32 first, u32 second) {
    auto pair = [](u32 word, u32 which) {
        const u32 bytes = __byte_perm(word, 0, which);
        return Bf16::fma2((~bytes & 0x00800080) | 0x43004300, 0xBF80BF80, (bytes & 0x007F007F) | 0x43004300);
    };
    return {pair(first, 0x4140), pair(first, 0x4342), pair(second, 0x4140), pair(second, 0x4342)};
}

struct Grid {
    float scale, inverse;
};

// The grid of a head whose largest magnitude has these bits, without sign. They order as the numbers do, NaN above all.
template <class Half>
DEVICE Grid grid_of(u32 largest) {
    const float most = Half::to_float((u16)largest);
    if (most < 7.888609052210118e-31f) return {0.0f, 0.0f};
    return {__fdiv_rn(most, 127.0f), __fdiv_rn(127.0f, most)};
}

template <class Half>
DEVICE u32 code_of(u16 x, const Grid& grid) {
    return (u32)(max(-127, min(127, __float2int_rn(__fmul_rn(Half::to_float(x), grid.inverse)))) + 128);
}

template <class H, u32 PADDED>
struct BytePages {
    using Half = H;
    using Weight = Fp16;
    static constexpr bool BYTES = true;
    static constexpr u32 P = PADDED, CODES = PAGE_LEN * P;
    static constexpr u32 KEY_SCALES = CODES, VALUE_SCALES = CODES + PAGE_LEN * 4;  // both behind the keys
    static constexpr u32 KEY_BYTES = CODES + 2 * PAGE_LEN * 4, VALUE_BYTES = CODES;

    static DEVICE u32 key_at(u32 slot, u32 d) {
        const u32 nt = slot / 32 * 4 + slot % 8 / 2, c = slot % 32 / 8 * 2 + slot % 2;
        return ((nt / 2 * (P / 32) + d / 32) * 32 + 4 * c + d % 32 / 8) * 16 + nt % 2 * 8 + d % 8;
    }
    static DEVICE u32 value_at(u32 slot, u32 d) {
        return (d / 8 * 32 + d % 8 * 4 + slot % 32 / 8) * 16 + slot / 32 * 8 + slot % 8;
    }

    static DEVICE void load_keys(uint4 (&k)[8], u32 keys, u32 lane, u32 j) {
#pragma unroll
        for (u32 g = 0; g < 4; ++g) {
            const uint4 raw = load_shared_16(keys + ((g * (P / 32) + j) * 32 + lane) * 16);
            k[2 * g] = expand<Half>(raw.x, raw.y), k[2 * g + 1] = expand<Half>(raw.z, raw.w);
        }
    }

    static DEVICE void load_values(uint4 (&v)[2], u32 values, u32 lane, u32 n) {
        const uint4 raw = load_shared_16(values + (n * 32 + lane) * 16);
        v[0] = expand<Weight>(raw.x, raw.y), v[1] = expand<Weight>(raw.z, raw.w);
    }

    // Scales of the lane's 16 keys.
    static DEVICE void load_scales(float (&scales)[16], u32 at, u32 lane) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const uint4 raw = load_shared_16(at + (i / 2 * 32 + lane % 4 * 8 + i % 2 * 4) * 4);
            scales[4 * i] = __uint_as_float(raw.x), scales[4 * i + 1] = __uint_as_float(raw.y);
            scales[4 * i + 2] = __uint_as_float(raw.z), scales[4 * i + 3] = __uint_as_float(raw.w);
        }
    }

    static DEVICE void score_factors(float (&factors)[16], u32 keys, u32 lane, float scale) {
        load_scales(factors, keys + KEY_SCALES, lane);
#pragma unroll
        for (u32 i = 0; i < 16; ++i) factors[i] = __fmul_rn(factors[i], scale);
    }

    static DEVICE void round_weights(u32 (&weights)[4][4], float (&unit)[2], float (&s)[8][4], u32 keys, u32 lane) {
        float scales[16], most[2] = {0.0f, 0.0f}, inverse[2];
        load_scales(scales, keys + VALUE_SCALES, lane);
#pragma unroll
        for (u32 nt = 0; nt < 8; ++nt) {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                s[nt][e] = __fmul_rn(s[nt][e], scales[nt / 4 * 8 + nt % 4 * 2 + e % 2]);
                most[e / 2] = fmaxf(most[e / 2], s[nt][e]);
            }
        }
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], 1));
            most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], 2));
            // The power of two below, and its inverse.
            const u32 exponent = __float_as_uint(most[h]) & 0x7F800000;
            unit[h] = __uint_as_float(exponent), inverse[h] = __uint_as_float(0x7F000000 - exponent);
        }
#pragma unroll
        for (u32 nt = 0; nt < 8; ++nt)
#pragma unroll
            for (u32 h = 0; h < 2; ++h)
                weights[nt / 2][nt % 2 * 2 + h] = pack<Weight>(__fmul_rn(s[nt][2 * h], inverse[h]), __fmul_rn(s[nt][2 * h + 1], inverse[h]));
    }

    static DEVICE float in_units(float sum, float unit) { return __fmul_rn(sum, unit); }

    // Zeros the scales of values from `end` on: their weight is zero, but they may be anything. A thread has fetched what it
    // writes: piece CODES / 16 + 16 + i of a block of 128 threads.
    static DEVICE void clear(u32 keys, u32 lane, u32 first, u32 step, u32 end) {
        static_assert(CODES / 16 % 128 == 0, "scales are fetched by the first warp");
        if (first != 0 || lane < 16) return;
        for (u32 e = 0; e < 4; ++e)
            if ((lane - 16) * 4 + e >= end) store_shared_4(keys + VALUE_SCALES + ((lane - 16) * 4 + e) * 4, 0);
    }

    // Codes and scales of a new key and value, P halves each in shared memory, to shared memory: codes of both, scales of both; and to
    // their page, unless `key` is null. All of the four warps call it, two for each.
    static DEVICE void quantize_new(u32 halves, u32 to, u8* key, u8* value, u32 slot, u32 lane, u32 warp) {
        const u32 which = warp / 2;
        u16 x[P / 32];
        u32 largest = 0;
#pragma unroll
        for (u32 i = 0; i < P / 32; ++i) {
            x[i] = (u16)load_shared_2(halves + (which * P + i * 32 + lane) * 2);
            largest = max(largest, (u32)x[i] & 0x7FFF);
        }
        const Grid grid = grid_of<Half>(__reduce_max_sync(~0u, largest));
#pragma unroll
        for (u32 i = 0; i < P / 32; ++i) {
            if (i % 2 != warp % 2) continue;
            const u32 d = i * 32 + lane, code = code_of<Half>(x[i], grid);
            store_shared_1(to + which * P + d, code);
            if (key != nullptr) (which == 0 ? key + key_at(slot, d) : value + value_at(slot, d))[0] = (u8)code;
        }
        if (warp % 2 != 0 || lane != 0) return;
        store_shared_float_if(true, to + (2 * P + which * 4), grid.scale);
        if (key != nullptr) *(float*)(key + KEY_SCALES + (which * PAGE_LEN + slot) * 4) = grid.scale;
    }

    // Puts the new key, and both scales, into a page in shared memory. What is behind the new token gets a scale of zero.
    static DEVICE void insert_key(u32 keys, u32 from, u32 slot, u32 lane) {
        if (lane / 8 == slot / 8 % 4 && lane / 4 % 2 == slot % 2) {
#pragma unroll
            for (u32 j = 0; j < P / 32; ++j) {
                const u32 at = from + 32 * j + lane % 4 * 8;
                store_shared_4(keys + key_at(slot, 32 * j + lane % 4 * 8), load_shared_4(at));
                store_shared_4(keys + key_at(slot, 32 * j + lane % 4 * 8) + 4, load_shared_4(at + 4));
            }
        }
        for (u32 key = lane; key < PAGE_LEN; key += 32) {
            if (key < slot) continue;
            store_shared_float_if(key == slot, keys + KEY_SCALES + key * 4, load_shared_float(from + 2 * P));
            store_shared_float_if(true, keys + VALUE_SCALES + key * 4, key == slot ? load_shared_float(from + 2 * P + 4) : 0.0f);
        }
    }

    // Puts the new value into the lane's own pieces.
    static DEVICE void insert_value(u32 values, u32 from, u32 slot, u32 lane) {
        if (lane % 4 != slot % 32 / 8) return;
#pragma unroll
        for (u32 n = 0; n < P / 8; ++n)
            store_shared_1(values + value_at(slot, 8 * n + lane / 4), load_shared_1(from + P + 8 * n + lane / 4));
    }
};

// Rotates queries and keys in place and writes keys and values to their pages. The first `rows` blocks take a row each, a warp
// a head; after them come blocks that do the values of one tile and head.
template <class Pages>
DEVICE void store_bytes(const RopeArgs& args) {
    using Half = typename Pages::Half;
    constexpr u32 P = Pages::P, STEPS = (P / 2 + 31) / 32;
    __shared__ Grid grids[TILE_ROWS];
    release_next();
    await_previous();
    const u32 half = args.head_dim / 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    auto scales_of = [&](u8* keys) { return (float*)(keys + Pages::KEY_SCALES); };
    if (blockIdx.x < args.rows) {
        u16* row = args.qkv + blockIdx.x * args.stride;
        const u32 position = args.positions[blockIdx.x], slot = position % PAGE_LEN;
        const u32 page = args.pages[args.page_bases[blockIdx.x] + position / PAGE_LEN];
        for (u32 head = warp; head < args.heads + args.kv_heads; head += warps) {
            u16 lower[STEPS], upper[STEPS];
            u32 largest = 0;
#pragma unroll
            for (u32 k = 0; k < STEPS; ++k) {
                const u32 d = k * 32 + lane;
                if (d >= half) continue;
                u16* at = row + head * args.head_dim + d;
                float a = Half::to_float(at[0]), b = Half::to_float(at[half]);
                rotate(a, b, args.cos[(u64)position * half + d], args.sin[(u64)position * half + d]);
                lower[k] = Half::from_float(a), upper[k] = Half::from_float(b);
                at[0] = lower[k], at[half] = upper[k];
                largest = max(largest, max((u32)lower[k] & 0x7FFF, (u32)upper[k] & 0x7FFF));
            }
            if (head < args.heads) continue;
            u8* key = (u8*)args.store[0] + (u64)(page * args.kv_heads + head - args.heads) * Pages::KEY_BYTES;
            const Grid grid = grid_of<Half>(__reduce_max_sync(~0u, largest));
#pragma unroll
            for (u32 k = 0; k < STEPS; ++k) {
                const u32 d = k * 32 + lane;
                if (d >= half) continue;
                key[Pages::key_at(slot, d)] = (u8)code_of<Half>(lower[k], grid);
                key[Pages::key_at(slot, d + half)] = (u8)code_of<Half>(upper[k], grid);
            }
            if (lane == 0) scales_of(key)[slot] = grid.scale;
        }
        return;
    }
    const u32 job = blockIdx.x - args.rows, head = job % args.kv_heads;
    const Tile tile = args.tiles[job / args.kv_heads];
    const u16* values = args.qkv + tile.row * args.stride + (args.heads + args.kv_heads + head) * args.head_dim;
    auto place_of = [&](u32 position) { return (u64)args.pages[tile.page_base + position / PAGE_LEN] * args.kv_heads + head; };
    for (u32 r = warp; r < tile.rows; r += warps) {
        u32 largest = 0;
#pragma unroll
        for (u32 d = lane; d < P; d += 32)
            if (d < args.head_dim) largest = max(largest, (u32)values[r * args.stride + d] & 0x7FFF);
        const Grid grid = grid_of<Half>(__reduce_max_sync(~0u, largest));
        if (lane != 0) continue;
        const u32 position = tile.position + r;
        grids[r] = grid;
        scales_of((u8*)args.store[0] + place_of(position) * Pages::KEY_BYTES)[PAGE_LEN + position % PAGE_LEN] = grid.scale;
    }
    __syncthreads();
    // Eight positions at a time, aligned to eight: one store if they are all of the tile.
    const u32 first = tile.position / 8, groups = (tile.position + tile.rows + 7) / 8 - first;
    for (u32 i = threadIdx.x; i < groups * args.head_dim; i += blockDim.x) {
        const u32 d = i % args.head_dim, position = (first + i / args.head_dim) * 8;
        u8* to = (u8*)args.store[1] + place_of(position) * Pages::VALUE_BYTES + Pages::value_at(position % PAGE_LEN, d);
        u32 codes[8];
        bool whole = true;
#pragma unroll
        for (u32 e = 0; e < 8; ++e) {
            const u32 row = position + e - tile.position;  // wraps around for positions before the tile
            const bool there = row < tile.rows;
            codes[e] = there ? code_of<Half>(values[row * args.stride + d], grids[row]) : 0;
            whole &= there;
        }
        if (whole) {
            *(uint2*)to = {codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24, codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24};
        } else {
#pragma unroll
            for (u32 e = 0; e < 8; ++e)
                if (position + e - tile.position < tile.rows) to[e] = (u8)codes[e];
        }
    }
}
