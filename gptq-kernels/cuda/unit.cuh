// The unit of repacked 4-bit weights: 32 output features x 128 input features, and what multiplies by one.
//
//     bytes 0..2048        codes, as four fragments (feature half h, input half f) of 16 x 64, at (h * 2 + f) * 512
//     then, per group      32 scales, fp16: feature 8 * j + r at (r * 4 + j) * 2
//     then, per group      32 zeros, one byte each, in the same order, if the layer is asymmetric
//
// A group here is 128, 64 or 32 input features; larger ones repeat their scale in every unit. A fragment is 32 slots of 16
// bytes, those of lanes l = 4 r + t at l ^ (l / 8). Word i of a slot holds eight codes: of features r and r + 8, of the
// input features 8 t + 2 i + {0, 1} and 32 more than these. Its nibbles, from the lowest: feature r, r + 8, and the same 32
// input features on; of the even input feature in bits 0..16, of the odd one in bits 16..32. So two ways to read a fragment
// are without bank conflicts and without moving a bit afterwards:
//
//     16 bytes a lane         operand A of `mma` in its own order of input features, in which operand B is 16 consecutive
//                             bytes of x: step s takes the words 2 (s % 2) and the next, their lower or upper half s / 2
//     four 8 x 8 matrices     operand A of `wgmma` in the natural order of input features: matrix t is what lanes of that t
//                             hold, and step s takes the matrices 2 (s % 2) and the next, their lower or upper half s / 2
#pragma once
#include "hopper.cuh"

__host__ __device__ constexpr u32 unit_bytes(u32 groups, bool asym) { return 2048 + groups * (asym ? 96 : 64); }

// Where the rings start: behind the `depth` barriers of each warp.
__host__ __device__ constexpr u32 ring_offset(u32 warps, u32 depth) { return (warps * depth * 8 + 127) / 128 * 128; }

// What turns the nibbles of a row into `code - zero`: added to 1024 + code, or to 64 + code.
struct Zero {
    u32 low, high;
};

template <class Half>
struct Dequantizer;

// 1024 + code in the lowest mantissa bits, 1024 + 16 code in the next: both exact, and so is what follows.
template <>
struct Dequantizer<Fp16> {
    static DEVICE Zero zero(u32 z) { return {0xE400E400u + z * 0x00010001u, 0xD400D400u + z * 0x00100010u}; }

    // The codes in the lowest byte of each half of `codes`, of features r and r + 8.
    static DEVICE void expand(u32& a, u32& b, u32 codes, const Zero (&z)[2]) {
        a = Fp16::add2(and_or<0x000F000Fu, 0x64006400u>(codes), z[0].low);
        b = Fp16::fma2(and_or<0x00F000F0u, 0x64006400u>(codes), 0x2C002C00u, z[1].high);
    }
};

// bfloat16 has room for one nibble below 128.
template <>
struct Dequantizer<Bf16> {
    static DEVICE Zero zero(u32 z) { return {0xC300C300u + z * 0x00010001u, 0}; }

    static DEVICE void expand(u32& a, u32& b, u32 codes, const Zero (&z)[2]) {
        a = Bf16::add2(and_or<0x000F000Fu, 0x43004300u>(codes), z[0].low);
        b = Bf16::add2(and_or<0x000F000Fu, 0x43004300u>(codes >> 4), z[1].low);
    }
};
