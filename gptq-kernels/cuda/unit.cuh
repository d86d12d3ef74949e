// The unit of repacked 4-bit weights: 32 output features x 128 input features, and what multiplies by one.
//
//     bytes 0..2048        codes, as four fragments (feature half h, input half f) of 16 x 64, at (h * 2 + f) * 512
//     then, per group      32 scales, fp16: feature 8 * j + r at (r * 4 + j) * 2
//     then, per group      32 zeros in the same order, if the layer is asymmetric: of one byte each, or of two if there is one group,
//                          so that units begin at multiples of 64 bytes. From others memory is slower by more than that costs
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

__host__ __device__ constexpr u32 zero_bytes(u32 groups) { return groups == 1 ? 2 : 1; }
__host__ __device__ constexpr u32 unit_bytes(u32 groups, bool asym) { return 2048 + groups * (64 + (asym ? 32 * zero_bytes(groups) : 0)); }

// Where the rings start: behind the `depth` barriers of each warp.
__host__ __device__ constexpr u32 ring_offset(u32 warps, u32 depth) { return (warps * depth * 8 + 127) / 128 * 128; }

// What turns the codes of a feature into `code - zero`: added to the codes in lower halves of bytes, and to those in upper ones.
struct Zero {
    u32 low, high;
};

// Codes become halves that are `code - zero` times 1 / UNIT, exactly, in two instructions each. The lower code of a byte is put into
// the lowest bits of a mantissa. The upper one stands there as a very small number already, the two lowest exponents being one
// linear range: code * 2^-20 of fp16, code * 2^-129 of bfloat16, which has no other bits for it and would have to be shifted
// otherwise. UNIT is what the largest factor leaves of that.
template <class Half>
struct Codes;

template <u32 MAGIC, u32 LOW_FACTOR, u32 LOW_ZERO, u32 MAGIC_PART, u32 HIGH_FACTOR, u32 HIGH_EIGHT, class Half>
struct CodesOf {
    // Of byte `which` of `zeros`; 8 if symmetric.
    template <bool ASYM>
    static DEVICE Zero zero(u32 zeros, u32 which) {
        if (!ASYM) return {(LOW_ZERO << 8 | 8) * 0x00010001u, HIGH_EIGHT};
        const u32 low = __byte_perm(zeros, LOW_ZERO, 0x4040 + which * 0x0101);
        return {low, Half::add2(low, MAGIC_PART)};
    }

    // The codes in the lowest byte of each half of `codes`, of features r and r + 8.
    static DEVICE void expand(u32& a, u32& b, u32 codes, const Zero (&z)[2]) {
        a = Half::fma2(and_or<0x000F000Fu, MAGIC>(codes), LOW_FACTOR, z[0].low);
        b = Half::fma2(codes & 0x00F000F0u, HIGH_FACTOR, z[1].high);
    }
};

// (1024 + code) / 32 - (1024 + zero) / 32, whose upper byte is 0xD0, and code * 2^-20 * 2^15 - zero / 32.
template <>
struct Codes<Fp16> : CodesOf<0x64006400u, 0x28002800u, 0xD0, 0x50005000u, 0x78007800u, 0xB400B400u, Fp16> {
    static constexpr float UNIT = 32.0f;
};

// (128 + code) / 4 - (128 + zero) / 4, and code * 2^-129 * 2^127 - zero / 4.
template <>
struct Codes<Bf16> : CodesOf<0x43004300u, 0x3E803E80u, 0xC2, 0x42004200u, 0x7F007F00u, 0xC000C000u, Bf16> {
    static constexpr float UNIT = 4.0f;
};
