// y = x W^T + bias for float weights: up to 8 rows of x in one pass over the weight.
//
// Where weights and activations are of one type, tensor cores multiply. A lane loads 8 weights that lie side by side in
// each of two rows of W, and 8 activations at the same place: those are the operands of two `mma` if its 16 columns
// are the weights' own in another order, which a sum does not mind, and so nothing is ever rearranged. The 8 columns of
// the result are 8 rows of x, all computed alike. Warps take turns along a row of W, 128 bytes each, and their sums are
// added in order. A block has a range of output features, all blocks as many, and takes them 16 at a time; weights are
// fetched ahead by asynchronous copies, 512 bytes of a row by a warp, that go on from one 16 to the next.
//
// Weights of another type are multiplied one by one, exactly as they are: a warp has two features, a lane every 32nd input.
#include "half.cuh"

struct DenseArgs {
    const u8* weight;   // (n, k_stride), rows padded with zeros to a multiple of 64
    const float* bias;  // (n), or null
    const u16* x;       // (rows, k), x_stride apart
    u16* y;             // (rows, n), y_stride apart
    u64 x_stride, y_stride;
    u32 rows, n, k, k_stride;
    u32 x_vectors;  // whether rows of x begin at multiples of 16 bytes
};

// y = sums + bias, of sums in float32.
struct BiasArgs {
    const float* sums;  // (rows, n)
    const float* bias;  // (n)
    u16* y;             // (rows, n), y_stride apart
    u64 y_stride;
    u32 rows, n;
};

constexpr u32 WARPS = 8, FEATURES = 16, ROWS = 8, STEP = 64;

// Stages of weights in shared memory.
#if __CUDA_ARCH__ >= 900
constexpr u32 STAGES = 6;
#else
constexpr u32 STAGES = 4;
#endif

struct Fp32 {
    static DEVICE float to_float(u32 bits) { return __uint_as_float(bits); }
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

DEVICE void copy_16(u32 to_shared, const u8* from_global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from_global) : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all but the last COUNT groups of the thread's copies are there.
template <u32 COUNT>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

DEVICE uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

// From sm_90 on a kernel may begin while the one before it ends. Weights are never written, so they need not wait.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void wait_for_dependencies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// x[at .. at + 8], zeros from `end` on.
DEVICE uint4 load_x(const u16* x, u32 at, u32 end, bool vectors) {
    if (vectors && at + 8 <= end) return *(const uint4*)(x + at);
    u32 pairs[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 k = at + 2 * i;
        pairs[i] = (k < end ? x[k] : 0) | (u32)(k + 1 < end ? x[k + 1] : 0) << 16;
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Adds the products of 32 columns of two rows of W to the sums of this lane.
template <class Half>
DEVICE void add_products(float (&sum)[4], uint4 upper, uint4 lower, uint4 x) {
    Half::mma(sum, {upper.x, lower.x, upper.y, lower.y}, x.x, x.y);
    Half::mma(sum, {upper.z, lower.z, upper.w, lower.w}, x.z, x.w);
}

// Bytes of a row of W in a stage, and how far rows are apart there, so that no two lanes of a load meet in a bank.
constexpr u32 STAGE_ROW = WARPS * STEP * 2, STAGE_PITCH = STAGE_ROW + 64, STAGE = FEATURES * STAGE_PITCH;

// Where the block's copies have come to: columns of 16 output features, then of the next 16.
struct Cursor {
    u32 feature, at;

    // Begins to copy 1 KB of every row to `stage`, 512 bytes of a row at a time, and goes on.
    DEVICE void fetch(const DenseArgs& args, u32 stage, u32 end) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_bytes = args.k_stride * 2;
        if (feature < end) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 row = warp * 2 + i;
                const u8* from = args.weight + (u64)(feature + row) * row_bytes + at + lane * 16;
                const u32 to = stage + row * STAGE_PITCH + lane * 16;
                if (feature + row < end) {
                    if (at + lane * 16 < row_bytes) copy_16(to, from);
                    if (at + lane * 16 + 512 < row_bytes) copy_16(to + 512, from + 512);
                }
            }
            at += STAGE_ROW;
            if (at >= row_bytes) {
                at = 0;
                feature += FEATURES;
            }
        }
        commit_copies();
    }
};

// The block's output features from `begin` to `end`, for `rows` rows of x from `first_row` on.
template <class Half>
DEVICE void multiply_tensor(const DenseArgs& args, u32 begin, u32 end, u32 first_row, u32 rows) {
    extern __shared__ uint4 ring[];
    __shared__ float sums[2][WARPS][ROWS][FEATURES];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 stages = shared_address(ring), place = g * STAGE_PITCH + warp * STEP * 2 + t * 16;
    const u32 steps = args.k_stride / STEP;

    Cursor ahead = {begin, 0};
    launch_dependents();
#pragma unroll
    for (u32 stage = 0; stage < STAGES - 1; ++stage) ahead.fetch(args, stages + stage * STAGE, end);
    wait_for_dependencies();

    const u16* x = args.x + (first_row + min(g, rows - 1)) * args.x_stride;
    const bool used = g < rows, vectors = args.x_vectors != 0;
    u32 stage = 0, parity = 0;
    for (u32 feature = begin; feature < end; feature += FEATURES, parity ^= 1) {
        float sum[2][4] = {};
        for (u32 first = 0; first < steps; first += WARPS) {
            const u32 step = first + warp, k = step * STEP + t * 8;
            uint4 x0 = {}, x1 = {};
            if (used) {
                x0 = load_x(x, k, args.k, vectors);
                x1 = load_x(x, k + 32, args.k, vectors);
            }
            wait_for_copies<STAGES - 2>();
            // All copies of this stage are there, and all warps have left the one before it, which is filled again.
            __syncthreads();
            ahead.fetch(args, stages + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE, end);
            if (step < steps) {
                const u32 from = stages + stage * STAGE + place;
                add_products<Half>(sum[0], load_shared(from), load_shared(from + 8 * STAGE_PITCH), x0);
                add_products<Half>(sum[1], load_shared(from + 64), load_shared(from + 8 * STAGE_PITCH + 64), x1);
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) sums[parity][warp][2 * t + i % 2][g + i / 2 * 8] = sum[0][i] + sum[1][i];
        // One barrier is enough: sums of the next 16 features go to the other half.
        __syncthreads();
        const u32 f = threadIdx.x % FEATURES, row = threadIdx.x / FEATURES;
        if (row < rows && feature + f < end) {
            float total = 0;
#pragma unroll
            for (u32 w = 0; w < WARPS; ++w) total += sums[parity][w][row][f];
            if (args.bias != nullptr) total += args.bias[feature + f];
            args.y[(first_row + row) * args.y_stride + feature + f] = Half::from_float(total);
        }
    }
}

template <class Half, class Weight, class Bits>
DEVICE void multiply_one_by_one(const DenseArgs& args, u32 begin, u32 end, u32 first_row, u32 rows) {
    launch_dependents();
    wait_for_dependencies();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 feature = begin + warp; feature < end; feature += WARPS) {
        const Bits* weight = (const Bits*)args.weight + (u64)feature * args.k_stride;
        float sum[ROWS] = {};
#pragma unroll 4
        for (u32 k = lane; k < args.k; k += 32) {
            const float w = Weight::to_float(weight[k]);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                if (r < rows) sum[r] = fmaf(w, Half::to_float(args.x[(first_row + r) * args.x_stride + k]), sum[r]);
            }
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            for (u32 distance = 16; distance > 0; distance /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], distance);
            if (lane == 0 && r < rows) {
                const float bias = args.bias != nullptr ? args.bias[feature] : 0.0f;
                args.y[(first_row + r) * args.y_stride + feature] = Half::from_float(sum[r] + bias);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) dense(const __grid_constant__ DenseArgs args) {
    // Blocks of the same output features are neighbours, so that the cache can serve all but one.
    const u32 begin = (u64)args.n * blockIdx.y / gridDim.y, end = (u64)args.n * (blockIdx.y + 1) / gridDim.y;
    const u32 first_row = blockIdx.x * ROWS, rows = min(ROWS, args.rows - first_row);
    if constexpr (same<IMAGE_HALF, IMAGE_WEIGHT>) {
        multiply_tensor<IMAGE_HALF>(args, begin, end, first_row, rows);
    } else {
        multiply_one_by_one<IMAGE_HALF, IMAGE_WEIGHT, IMAGE_WEIGHT_BITS>(args, begin, end, first_row, rows);
    }
}

extern "C" __global__ void __launch_bounds__(256) add_bias(const __grid_constant__ BiasArgs args) {
    const u32 feature = blockIdx.x * 256 + threadIdx.x;
    if (feature >= args.n) return;
    const float bias = args.bias[feature];
    for (u64 row = blockIdx.y; row < args.rows; row += gridDim.y) {
        args.y[row * args.y_stride + feature] = IMAGE_HALF::from_float(args.sums[row * args.n + feature] + bias);
    }
}
