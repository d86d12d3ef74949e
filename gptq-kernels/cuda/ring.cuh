// What `decode` of `attention.cu` is made of besides pages: pages on their way to a warp, and states merged in order.
#pragma once
#include "page.cuh"

struct Yes {
    static constexpr bool VALUE = true;
};
struct No {
    static constexpr bool VALUE = false;
};

DEVICE void store_shared_8(u32 address, const uint2& v) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

// What a warp of `decode` has of its pages in shared memory: `stages` halves of pages, keys and values in turn, page after page.
template <class Pages>
struct Ring {
    static constexpr u32 BYTES = Pages::KEY_BYTES;  // those of values are no more
    u32 stages, memory, barriers, lane;
    u32 to_use, to_fill;  // stage of the half that is used next, and of that which is fetched next
    u32 parity;

    DEVICE Ring(u32 stages, u32 memory, u32 barriers, u32 lane)
        : stages(stages), memory(memory), barriers(barriers), lane(lane), to_use(0), to_fill(0), parity(0) {
#if IMAGE_SM90
        if (lane == 0) {
            for (u32 i = 0; i < stages; ++i) mbarrier_init(barriers + i * 8, 1);
            fence_mbarrier_init();
        }
        __syncwarp();
#endif
    }

    // Starts to fetch a half, or nothing; every lane calls it, after all of them have used what was in the stage.
    DEVICE void fetch(bool there, bool values, const u8* from) {
        const u32 to = memory + to_fill * BYTES, bytes = values ? Pages::VALUE_BYTES : Pages::KEY_BYTES;
#if IMAGE_SM90
        if (there && lane == 0) {
            mbarrier_expect(barriers + to_fill * 8, bytes);
            bulk_copy(to, from, bytes, barriers + to_fill * 8);
        }
#else
        if (there) fetch_pieces(to, from, bytes, lane, 0, 1);
        commit_copies();
#endif
        to_fill = to_fill + 1 == stages ? 0 : to_fill + 1;
    }

    // The next half, when it is there.
    DEVICE u32 next() {
        const u32 at = memory + to_use * BYTES;
#if IMAGE_SM90
        mbarrier_wait(barriers + to_use * 8, parity);
#else
        if (stages == 1) wait_for_groups<0>();
        else if (stages == 2) wait_for_groups<1>();
        else if (stages == 3) wait_for_groups<2>();
        else wait_for_groups<3>();
#endif
        if (++to_use == stages) to_use = 0, parity ^= 1;
        return at;
    }
};

// A float in the shared memory of block `rank` of the cluster, where this block has it at `address`.
DEVICE float load_remote_float(u32 address, u32 rank) {
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(remote_address(address, rank)) : "memory");
    return v;
}

// Merges up to N states and sums in order with what came before them; `state(k)` and `part(k)` are called for k below `count`.
// All is read, and all exponentials are found, before the first sum.
template <u32 N, class S, class P>
DEVICE void merge_in_order(float& max, float& total, float& sum, u32 count, S state, P part) {
    float2 states[N];
    float parts[N], earlier[N], later[N];
#pragma unroll
    for (u32 k = 0; k < N; ++k)
        if (k < count) states[k] = state(k), parts[k] = part(k);
#pragma unroll
    for (u32 k = 0; k < N; ++k)
        if (k < count) merge_factors(max, states[k].x, earlier[k], later[k]);
#pragma unroll
    for (u32 k = 0; k < N; ++k) {
        if (k >= count) continue;
        total = merged(total, earlier[k], states[k].y, later[k]);
        sum = merged(sum, earlier[k], parts[k], later[k]);
    }
}
