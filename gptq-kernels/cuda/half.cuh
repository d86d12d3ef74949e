// Half-precision arithmetic without CUDA's headers: a 16-bit float is its bits, a pair of them is one 32-bit register.
//
// `Fp16` and `Bf16` are the two activation types. Each offers the same names, so that a kernel is a template over them.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// (a & MASK) | MAGIC in one instruction.
template <u32 MASK, u32 MAGIC>
DEVICE u32 and_or(u32 a) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "n"(MASK), "n"(MAGIC));
    return out;
}

DEVICE u32 rotate_right(u32 a, u32 by) { return __funnelshift_r(a, a, by); }

struct Fp16 {
    static DEVICE float to_float(u16 bits) {
        float out;
        asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
        return out;
    }

    // Rounds to nearest even; overflow gives infinity.
    static DEVICE u16 from_float(float value) {
        u16 out;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
        return out;
    }

    static DEVICE u32 fma2(u32 a, u32 b, u32 c) {
        u32 out;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
        return out;
    }

    static DEVICE u32 add2(u32 a, u32 b) {
        u32 out;
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
        return out;
    }

    // d += a (16 x 16, row) * b (16 x 8, column), float32 accumulation.
    static DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct Bf16 {
    static DEVICE float to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

    static DEVICE u16 from_float(float value) {
        u16 out;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
        return out;
    }

    static DEVICE u32 fma2(u32 a, u32 b, u32 c) {
        u32 out;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
        return out;
    }

    static DEVICE u32 add2(u32 a, u32 b) { return fma2(a, 0x3F803F80u, b); }

    static DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
