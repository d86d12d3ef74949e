#include "hopper.cuh"
#include "unit.cuh"

struct WgmmaArgs {
    const u8* units; const u16* x; u16* y; const u16* bias; const u16* gather;
    u32 rows, n, k, x_stride, y_stride, k_units, x_vectors;
};

template <u32 N> struct Wg;
template <> struct Wg<16> {
    static DEVICE void mma_f16(float (&d)[8], const u32 (&a)[4], u64 b, u32 keep) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0;\n}"
            : "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3]),"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7])
            : "r"(a[0]),"r"(a[1]),"r"(a[2]),"r"(a[3]),"l"(b),"r"(keep));
    }
};
template <> struct Wg<64> {
    static DEVICE void mma_f16(float (&d)[32], const u32 (&a)[4], u64 b, u32 keep) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
            : "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3]),"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7]),
              "+f"(d[8]),"+f"(d[9]),"+f"(d[10]),"+f"(d[11]),"+f"(d[12]),"+f"(d[13]),"+f"(d[14]),"+f"(d[15]),
              "+f"(d[16]),"+f"(d[17]),"+f"(d[18]),"+f"(d[19]),"+f"(d[20]),"+f"(d[21]),"+f"(d[22]),"+f"(d[23]),
              "+f"(d[24]),"+f"(d[25]),"+f"(d[26]),"+f"(d[27]),"+f"(d[28]),"+f"(d[29]),"+f"(d[30]),"+f"(d[31])
            : "r"(a[0]),"r"(a[1]),"r"(a[2]),"r"(a[3]),"l"(b),"r"(keep));
    }
};
DEVICE void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void wg_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
DEVICE void named_barrier(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void store_shared_16(u32 a, u32 x, u32 y, u32 z, u32 w) { asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(x), "r"(y), "r"(z), "r"(w) : "memory"); }

// N tokens; GROUPS_OF_WARPS warpgroups of 64 features; SLICES blocks in a cluster divide the input features
template <class Half, u32 N, bool ASYM, u32 WGS, u32 SLICES, u32 DEPTH>
DEVICE void wgmma_linear(const WgmmaArgs& args) {
    constexpr u32 THREADS = WGS * 128, FEATURES = WGS * 64, OWNED = FEATURES / SLICES, UNIT = unit_bytes(1, ASYM);
    constexpr u32 D = N / 2;
    extern __shared__ __align__(128) u8 shared_memory[];
    const u32 shared = uniform(shared_address(shared_memory));
    const u32 lane = opaque(threadIdx.x % 32), warp = uniform(threadIdx.x / 32), wg = warp / 4;
    const u32 slice = SLICES == 1 ? 0 : cluster_rank(), block = blockIdx.x / SLICES;
    const u32 first = args.k_units * slice / SLICES, count = args.k_units * (slice + 1) / SLICES - first;
    const u32 stripes = (args.n + 31) / 32, stripe = block * (WGS * 2) + wg * 2;
    const u32 have = stripe >= stripes ? 0 : min(2u, stripes - stripe); // stripes of this warpgroup
    const u32 barriers = shared + wg * (DEPTH * 8);
    const u32 rings = shared + 128, ring = rings + wg * (DEPTH * 2 * UNIT);
    const u32 staged = rings + (WGS * DEPTH * 2 * UNIT + 127) / 128 * 128;
    const u32 widest = (args.k_units + SLICES - 1) / SLICES;
    const u32 sums = staged + widest * 128 * N * 2;
    const bool leader = threadIdx.x % 128 == 0;

    const u8* source = args.units + ((u64)stripe * args.k_units + first) * UNIT;
    auto fetch = [&](u32 i, u32 slot) {
        if (leader && i < count && have > 0) {
            mbarrier_expect(barriers + slot * 8, have * UNIT);
            bulk_copy(ring + slot * 2 * UNIT, source + (u64)i * UNIT, UNIT, barriers + slot * 8);
            if (have > 1) bulk_copy(ring + slot * 2 * UNIT + UNIT, source + ((u64)args.k_units + i) * UNIT, UNIT, barriers + slot * 8);
        }
    };
    if (leader) {
        for (u32 i = 0; i < DEPTH; ++i) mbarrier_init(barriers + i * 8, 1);
        fence_mbarrier_init();
        for (u32 i = 0; i < DEPTH; ++i) fetch(i, i);
    }
    __syncwarp();
    if (SLICES > 1) cluster_arrive();
    launch_dependents();
    wait_for_dependencies();

    // x: blocks of 32 columns, of which core matrix d holds dword d of every 16 bytes
    for (u32 i = threadIdx.x; i < count * 4 * N; i += THREADS) {
        const u32 token = i % N, kb = i / N, column = (first * 4 + kb) * 32;
        uint4 p[4];
        const u16* from = args.x + (u64)token * args.x_stride + column;
#pragma unroll
        for (u32 t = 0; t < 4; ++t) {
            if (token < args.rows && args.x_vectors && column + t * 8 + 8 <= args.k) p[t] = *(const uint4*)(from + t * 8);
            else {
                u32 w[4];
                for (u32 j = 0; j < 4; ++j) {
                    const u32 c = column + t * 8 + j * 2;
                    w[j] = (token < args.rows && c < args.k ? from[t * 8 + j * 2] : 0) | (token < args.rows && c + 1 < args.k ? (u32)from[t * 8 + j * 2 + 1] << 16 : 0);
                }
                p[t] = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
        const u32 to = staged + (kb * 4 * (N / 8) + token / 8) * 128 + token % 8 * 16;
        store_shared_16(to, p[0].x, p[1].x, p[2].x, p[3].x);
        store_shared_16(to + (N / 8) * 128, p[0].y, p[1].y, p[2].y, p[3].y);
        store_shared_16(to + (N / 8) * 256, p[0].z, p[1].z, p[2].z, p[3].z);
        store_shared_16(to + (N / 8) * 384, p[0].w, p[1].w, p[2].w, p[3].w);
    }
    fence_mbarrier_init(); // generic writes before the tensor core's reads
    __syncthreads();

    float acc[D] = {}, sum[D];
    const u64 descriptor = (u64)((N / 8) * 128 / 16) << 16 | (u64)(128 / 16) << 32;
    const u32 half = warp % 2, mine = (warp / 2) % 2;
    u32 slot = 0, parity = 0;
    for (u32 i = 0; i < count; ++i) {
        const u32 unit = ring + slot * 2 * UNIT + mine * UNIT;
        if (have > 0) mbarrier_wait(barriers + slot * 8, parity);
        const uint4 c0 = load_shared_16(unit + half * 1024 + lane * 16), c1 = load_shared_16(unit + half * 1024 + 512 + lane * 16);
        const u32 pair = load_shared_4(unit + 2048 + (lane / 4) * 8 + half * 4);
        u32 z = 0x0808;
        if (ASYM) z = load_shared_2(unit + 2048 + 64 + (lane / 4) * 4 + half * 2);
        named_barrier(1 + wg, 128);
        fetch(i + DEPTH, slot);
        __syncwarp();
        if (++slot == DEPTH) slot = 0, parity ^= 1;
        const Zero zero[2] = {Dequantizer<Half>::zero(z & 0xFF), Dequantizer<Half>::zero(z >> 8 & 0xFF)};
        u32 a[8][4];
        const u32 words[8] = {c0.x, c0.y, c0.z, c0.w, c1.x, c1.y, c1.z, c1.w};
#pragma unroll
        for (u32 s = 0; s < 8; ++s) Dequantizer<Half>::expand(a[s], words[s], zero);
        wg_fence();
#pragma unroll
        for (u32 s = 0; s < 8; ++s) {
            const u32 at = staged + ((i * 16 + s / 2 * 4 + s % 2 * 2) * (N / 8)) * 128;
            Wg<N>::mma_f16(sum, a[s], descriptor | (at >> 4 & 0x3FFF), s > 0);
        }
        wg_commit();
        wg_wait();
        const float s0 = Fp16::to_float((u16)pair), s1 = Fp16::to_float((u16)(pair >> 16));
#pragma unroll
        for (u32 e = 0; e < D; ++e) acc[e] += (e / 2 % 2 ? s1 : s0) * sum[e];
    }

    if (SLICES > 1) cluster_wait();
    // sums[slice][feature][token], two tokens at a time
    const u32 row0 = wg * 64 + (warp % 4) * 16 + lane / 4;
#pragma unroll
    for (u32 upper = 0; upper < 2; ++upper) {
        const u32 row = row0 + upper * 8;
        const u32 local = sums + ((slice * OWNED + row % OWNED) * (N + 2) + (lane % 4) * 2) * 4;
        const u32 to = SLICES == 1 ? local : remote_address(local, row / OWNED);
#pragma unroll
        for (u32 t = 0; t < N / 8; ++t) {
            if (SLICES == 1) asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + t * 32), "f"(acc[t * 4 + upper * 2]), "f"(acc[t * 4 + upper * 2 + 1]) : "memory");
            else asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to + t * 32), "f"(acc[t * 4 + upper * 2]), "f"(acc[t * 4 + upper * 2 + 1]) : "memory");
        }
    }
    if (SLICES > 1) { cluster_arrive(); cluster_wait(); } else __syncthreads();
    for (u32 i = threadIdx.x; i < args.rows * OWNED; i += THREADS) {
        const u32 token = i / OWNED, own = i % OWNED, feature = block * FEATURES + slice * OWNED + own;
        if (feature < args.n) {
            float total = args.bias != nullptr ? Fp16::to_float(args.bias[feature]) : 0.0f;
#pragma unroll
            for (u32 p = 0; p < SLICES; ++p) total += load_shared_float(sums + ((p * OWNED + own) * (N + 2) + token) * 4);
            args.y[(u64)token * args.y_stride + feature] = Half::from_float(total);
        }
    }
}
