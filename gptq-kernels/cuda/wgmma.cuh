// The instructions of sm_90a: `wgmma`, tensor maps, register hand-over; one small function each.
#pragma once
#include "unit.cuh"

// Codes as operand A of `wgmma`.
template <class Half>
struct Expander : Codes<Half> {};

// In units of one, which takes fewer registers and leaves room for scales: from 1024 + code in the lowest bits of a mantissa, or
// 1024 + 16 code in the next.
template <>
struct Expander<Fp16> {
    static constexpr float UNIT = 1.0f;

    template <bool ASYM>
    static DEVICE Zero zero(u32 zeros, u32 which) {
        if (!ASYM) return {0xE408E408u, 0xD480D480u};
        const u32 low = __byte_perm(zeros, 0xE4, 0x4040 + which * 0x0101);
        return {low, Fp16::add2(low, 0x63806380u)};
    }

    static DEVICE void expand(u32& a, u32& b, u32 codes, const Zero (&z)[2]) {
        a = Fp16::add2(and_or<0x000F000Fu, 0x64006400u>(codes), z[0].low);
        b = Fp16::fma2(and_or<0x00F000F0u, 0x64006400u>(codes), 0x2C002C00u, z[1].high);
    }
};

// A tensor map of the driver.
struct alignas(64) TensorMap {
    u64 words[16];
};

// Asynchronous copy of the map's box at (column, row) that completes on `barrier`. What is outside the tensor is zero.
DEVICE void tensor_copy(u32 to_shared, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to_shared), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Every lane that has read arrives, although one after a `__syncwarp` would do: racecheck does not follow the order from the
// other lanes through that one.
DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// That the block runs, without order of memory.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when all but the PENDING latest groups have been done.
template <u32 PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of `d` across this place: it does not know that `wgmma` writes later.
template <u32 COUNT>
DEVICE void wgmma_settle(float (&d)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operand B, K-major in rows of 128 bytes that are swizzled: eight rows are 1024 bytes.
DEVICE u64 swizzled_operand(u32 shared) { return 1ull << 62 | (u64)(1024 / 16) << 32 | 1ull << 16 | (u64)(shared >> 4); }

template <u32 COUNT>
DEVICE void set_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <u32 COUNT>
DEVICE void set_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Four 8 x 8 matrices of halves: lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 (l % 4) + {0, 1}
// of row l / 4 of each.
DEVICE uint4 load_matrices(u32 address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

// The transpose of an 8 x 8 matrix of halves, of which lane l holds elements 2 (l % 4) + {0, 1} of row l / 4.
DEVICE u32 transpose(u32 pair) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

DEVICE void remote_store_16(u32 address, float a, float b, float c, float d) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// d (64 x N, float32) += a (64 x 16, of which each of four warps has 16 rows) * b (16 x N), or = if `keep` is 0.
template <u32 N>
struct Wgmma;

#define WGMMA(N, TYPE, D, A, B, KEEP, ...)                                                                            \
    asm volatile("{\n"                                                                                                \
                 ".reg .pred keep;\n"                                                                                 \
                 "setp.ne.b32 keep, " KEEP ", 0;\n"                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" D "}, {" A "}, " B ", keep, 1, 1, 0;\n" \
                 "}"                                                                                                  \
                 : __VA_ARGS__                                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep))
#define D8(I) "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3]), "+f"(d[I + 4]), "+f"(d[I + 5]), "+f"(d[I + 6]), "+f"(d[I + 7])
#define D64(I) D8(I), D8(I + 8), D8(I + 16), D8(I + 24), D8(I + 32), D8(I + 40), D8(I + 48), D8(I + 56)
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", " "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 ", " "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

template <>
struct Wgmma<16> {
    static DEVICE void run(Fp16, float (&d)[8], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("16", "f16", NAMES_8, "%8, %9, %10, %11", "%12", "%13", D8(0));
    }
    static DEVICE void run(Bf16, float (&d)[8], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("16", "bf16", NAMES_8, "%8, %9, %10, %11", "%12", "%13", D8(0));
    }
};

template <>
struct Wgmma<32> {
    static DEVICE void run(Fp16, float (&d)[16], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("32", "f16", NAMES_16, "%16, %17, %18, %19", "%20", "%21", D8(0), D8(8));
    }
    static DEVICE void run(Bf16, float (&d)[16], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("32", "bf16", NAMES_16, "%16, %17, %18, %19", "%20", "%21", D8(0), D8(8));
    }
};

template <>
struct Wgmma<64> {
    static DEVICE void run(Fp16, float (&d)[32], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("64", "f16", NAMES_32, "%32, %33, %34, %35", "%36", "%37", D8(0), D8(8), D8(16), D8(24));
    }
    static DEVICE void run(Bf16, float (&d)[32], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("64", "bf16", NAMES_32, "%32, %33, %34, %35", "%36", "%37", D8(0), D8(8), D8(16), D8(24));
    }
};

template <>
struct Wgmma<128> {
    static DEVICE void run(Fp16, float (&d)[64], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("128", "f16", NAMES_64, "%64, %65, %66, %67", "%68", "%69", D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56));
    }
    static DEVICE void run(Bf16, float (&d)[64], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("128", "bf16", NAMES_64, "%64, %65, %66, %67", "%68", "%69", D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56));
    }
};

template <>
struct Wgmma<256> {
    static DEVICE void run(Fp16, float (&d)[128], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("256", "f16", NAMES_128, "%128, %129, %130, %131", "%132", "%133", D64(0), D64(64));
    }
    static DEVICE void run(Bf16, float (&d)[128], const u32 (&a)[4], u64 b, u32 keep) {
        WGMMA("256", "bf16", NAMES_128, "%128, %129, %130, %131", "%132", "%133", D64(0), D64(64));
    }
};
