// From packed codes to pairs of halves, each `code - zero` exactly: the left operand of `mma.m16n8k16`.
//
// A lane's share of 16 features x 16 input features is eight codes for operand registers a0..a3, two in each: the lower
// half of register i is in the lower 16 bits of a word and the upper half in the upper 16. Four bits: one word, register i
// at bit 4 i. Eight bits: two words, register i in word i / 2 at bit 8 (i % 2). a0 and a2 are of feature lane / 4, a1 and
// a3 of feature lane / 4 + 8, so that a fragment has two zeros.
#pragma once
#include "half.cuh"

// What turns the codes of one feature into `code - zero`.
struct Zero {
    u32 low, high;
};

// (a & MASK) ^ MAGIC in one instruction.
template <u32 MASK, u32 MAGIC>
DEVICE u32 and_xor(u32 a) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(a), "n"(MASK), "n"(MAGIC));
    return out;
}

template <class Half, u32 BITS>
struct Codes;

// 1024 + code in the lowest mantissa bits, 1024 + 16 code in the next: both exact, and so is what follows.
template <>
struct Codes<Fp16, 4> {
    static constexpr u32 WORDS = 1, MIDDLE = 8;
    static DEVICE Zero zero(u32 z) { return {0xE400E400u + z * 0x00010001u, 0xD400D400u + z * 0x00100010u}; }

    template <bool ASYM>
    static DEVICE void expand(u32 (&a)[4], const u32* words, const Zero (&z)[2]) {
        const u32 codes = words[0], upper = codes >> 8;
        a[0] = Fp16::add2(and_or<0x000F000Fu, 0x64006400u>(codes), z[0].low);
        a[1] = Fp16::fma2(and_or<0x00F000F0u, 0x64006400u>(codes), 0x2C002C00u, z[1].high);
        a[2] = Fp16::add2(and_or<0x000F000Fu, 0x64006400u>(upper), z[0].low);
        a[3] = Fp16::fma2(and_or<0x00F000F0u, 0x64006400u>(upper), 0x2C002C00u, z[1].high);
    }
};

// bfloat16 has room for one nibble below 128.
template <>
struct Codes<Bf16, 4> {
    static constexpr u32 WORDS = 1, MIDDLE = 8;
    static DEVICE Zero zero(u32 z) { return {0xC300C300u + z * 0x00010001u, 0}; }

    template <bool ASYM>
    static DEVICE void expand(u32 (&a)[4], const u32* words, const Zero (&z)[2]) {
        const u32 codes = words[0];
        a[0] = Bf16::add2(and_or<0x000F000Fu, 0x43004300u>(codes), z[0].low);
        a[1] = Bf16::add2(and_or<0x000F000Fu, 0x43004300u>(codes >> 4), z[1].low);
        a[2] = Bf16::add2(and_or<0x000F000Fu, 0x43004300u>(codes >> 8), z[0].low);
        a[3] = Bf16::add2(and_or<0x000F000Fu, 0x43004300u>(codes >> 12), z[1].low);
    }
};

// 1024 + code takes one byte permutation for two.
template <>
struct Codes<Fp16, 8> {
    static constexpr u32 WORDS = 2, MIDDLE = 128;
    static DEVICE Zero zero(u32 z) { return {0xE400E400u + z * 0x00010001u, 0}; }

    template <bool ASYM>
    static DEVICE void expand(u32 (&a)[4], const u32* words, const Zero (&z)[2]) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) a[i] = Fp16::add2(__byte_perm(words[i / 2], 0x64646464u, i % 2 ? 0x4341 : 0x4240), z[i % 2].low);
    }
};

// Below 128 there is room for seven bits: 128 + code % 128. What is added is -256 or, where the eighth bit is set, -128,
// and gives code - 128; another zero takes one more addition. Integers up to 256 are exact.
template <>
struct Codes<Bf16, 8> {
    static constexpr u32 WORDS = 2, MIDDLE = 128;
    static DEVICE Zero zero(u32 z) { return {(__float_as_uint(128.0f - (float)z) >> 16) * 0x00010001u, 0}; }

    template <bool ASYM>
    static DEVICE void expand(u32 (&a)[4], const u32* words, const Zero (&z)[2]) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 codes = words[i / 2] >> (i % 2 * 8);
            a[i] = Bf16::add2(and_or<0x007F007Fu, 0x43004300u>(codes), and_xor<0x00800080u, 0xC380C380u>(codes));
            if (ASYM) a[i] = Bf16::add2(a[i], z[i % 2].low);
        }
    }
};
