// y = x W^T + bias for 4- and 8-bit weights and up to ROWS rows of x, on CUDA cores alone.
//
// The weight is a matrix of units, 32 output features x 128 input features, one contiguous run of bytes each (layout in
// `exllama.rs`). A block has the units of 32 output features, one for each lane; its 16 warps take every sixteenth unit:
//
//     1  load the codes of the unit after this one, and x for it
//     2  x of this unit goes to the warp's own shared memory, as float32, where all lanes read it
//     3  codes to float32, code - zero, exactly; one fused multiply-add for each row; the scale, once a group
//     4  at the end, the 16 sums are added in order, then the bias; the epilogue; round, store
//
// Codes are in an order that makes them cheap to expand: a code is cut out and made the mantissa of 2^23 + 16^j code in
// one instruction, and one subtraction makes 16^j (code - zero) of that, exactly. x has been divided by 16^j.
#include "half.cuh"

struct ExllamaArgs {
    const u8* units;      // (tiles, k_units) units
    const u16* x;         // (rows, k), x_stride apart
    u16* y;               // (rows, n), y_stride apart
    const u16* bias;      // (tiles * 32) in the order of the units, fp16, or null
    const u16* gather;    // (k_units * 128) column of x, or NONE for a zero; null for the identity
    u64 x_stride, y_stride;
    u32 rows, n, k, k_units;
    u32 groups;           // in a unit
    u32 asym;             // whether units have zeros
    u32 epilogue;
    u32 x_vectors;        // x and its rows are aligned to 8 bytes
};

constexpr u32 LANES = 32, WARPS = 16, DEPTH = 128, NONE = 0xFFFF;
constexpr u32 ADD = 1, SILU_MUL = 2; // otherwise, only store

DEVICE float silu(float gate) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(gate * -1.4426950408889634f));
    return gate / (1.0f + e);
}

// Weights are read once.
DEVICE uint4 load_stream(const u8* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// 2^23, as bits and as a number: the first float32 whose mantissa counts ones.
constexpr u32 MAGIC = 0x4B000000u;
constexpr float ONES = 8388608.0f;

template <u32 BITS>
struct Word;

// Five nibbles fit a mantissa; the other three come after a shift.
template <>
struct Word<4> {
    static constexpr u32 CODES = 8, PLACES = 5;
    static DEVICE float power(u32 i) { return (float)(1u << (4 * (i % 5))); }
    static DEVICE float place(u32 i) { return 1.0f / power(i); }

    static DEVICE void expand(float (&w)[8], u32 word, const float (&zero)[5]) {
        const u32 upper = word >> 20;
        w[0] = __uint_as_float(and_or<0xFu, MAGIC>(word)) - zero[0];
        w[1] = __uint_as_float(and_or<0xF0u, MAGIC>(word)) - zero[1];
        w[2] = __uint_as_float(and_or<0xF00u, MAGIC>(word)) - zero[2];
        w[3] = __uint_as_float(and_or<0xF000u, MAGIC>(word)) - zero[3];
        w[4] = __uint_as_float(and_or<0xF0000u, MAGIC>(word)) - zero[4];
        w[5] = __uint_as_float(and_or<0xFu, MAGIC>(upper)) - zero[0];
        w[6] = __uint_as_float(and_or<0xF0u, MAGIC>(upper)) - zero[1];
        w[7] = __uint_as_float(and_or<0xF00u, MAGIC>(upper)) - zero[2];
    }
};

template <>
struct Word<8> {
    static constexpr u32 CODES = 4, PLACES = 1;
    static DEVICE float power(u32) { return 1.0f; }
    static DEVICE float place(u32) { return 1.0f; }

    static DEVICE void expand(float (&w)[4], u32 word, const float (&zero)[1]) {
        w[0] = __uint_as_float(__byte_perm(word, MAGIC, 0x7650)) - zero[0];
        w[1] = __uint_as_float(__byte_perm(word, MAGIC, 0x7651)) - zero[0];
        w[2] = __uint_as_float(__byte_perm(word, MAGIC, 0x7652)) - zero[0];
        w[3] = __uint_as_float(__byte_perm(word, MAGIC, 0x7653)) - zero[0];
    }
};

template <class Half, u32 BITS, u32 ROWS>
struct Exllama {
    static constexpr u32 CODES = LANES * DEPTH * BITS / 8, LOADS = BITS; // 16 bytes a lane
    static constexpr u32 LOADS_32 = BITS / 4;                              // of 32 input features

    const ExllamaArgs& args;
    u32 lane, unit_bytes;

    // What a lane has of a unit.
    struct Part {
        uint4 codes[LOADS];
        u16 scale[4];
        u8 zero[4];
        u32 x[ROWS][2];
    };

    DEVICE void load(Part& part, const u8* tile, u32 unit) {
        const u8* from = tile + (u64)unit * unit_bytes;
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) part.codes[i] = load_stream(from + (i * LANES + lane) * 16);
#pragma unroll
        for (u32 g = 0; g < 4; ++g) {
            if (g >= args.groups) break;
            part.scale[g] = *(const u16*)(from + CODES + (g * LANES + lane) * 2);
            part.zero[g] = args.asym ? from[CODES + (args.groups * 2 + g) * LANES + lane] : 1u << (BITS - 1);
        }
        const u32 first = unit * DEPTH + lane * 4;
        const bool inside = first + 4 <= args.k;
        if (args.gather == nullptr && args.x_vectors && inside) {
#pragma unroll
            for (u32 row = 0; row < ROWS; ++row) {
                if (row >= args.rows) break;
                const uint2 v = *(const uint2*)(args.x + row * args.x_stride + first);
                part.x[row][0] = v.x, part.x[row][1] = v.y;
            }
            return;
        }
        u32 columns[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) columns[i] = first + i < args.k ? first + i : NONE;
        if (args.gather != nullptr) {
            const uint2 v = *(const uint2*)(args.gather + first);
            columns[0] = v.x & 0xFFFF, columns[1] = v.x >> 16, columns[2] = v.y & 0xFFFF, columns[3] = v.y >> 16;
        }
#pragma unroll
        for (u32 row = 0; row < ROWS; ++row) {
            if (row >= args.rows) break;
            const u16* x = args.x + row * args.x_stride;
            u32 value[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) value[i] = columns[i] == NONE ? 0 : x[columns[i]];
            part.x[row][0] = value[0] | value[1] << 16, part.x[row][1] = value[2] | value[3] << 16;
        }
    }

    DEVICE void run() {
        extern __shared__ __align__(16) float shared_memory[]; // (WARPS, ROWS, DEPTH) x, then (WARPS, ROWS, LANES) sums
        lane = threadIdx.x % LANES;
        const u32 warp = threadIdx.x / LANES;
        unit_bytes = CODES + args.groups * (args.asym ? 3 : 2) * LANES;
        const u8* tile = args.units + (u64)blockIdx.x * args.k_units * unit_bytes;
        float* staged = shared_memory + warp * (ROWS * DEPTH);

        float place[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) place[i] = lane % 2 && BITS == 4 ? Word<BITS>::place(4 + i) : Word<BITS>::place(i);
        float acc[ROWS] = {};
        Part next;
        if (warp < args.k_units) load(next, tile, warp);
#pragma unroll 1
        for (u32 unit = warp; unit < args.k_units; unit += WARPS) {
            const Part part = next;
            __syncwarp();
#pragma unroll
            for (u32 row = 0; row < ROWS; ++row) {
                if (row >= args.rows) break;
                *(float4*)(staged + row * DEPTH + lane * 4) =
                    make_float4(Half::to_float((u16)part.x[row][0]) * place[0], Half::to_float((u16)(part.x[row][0] >> 16)) * place[1],
                                Half::to_float((u16)part.x[row][1]) * place[2], Half::to_float((u16)(part.x[row][1] >> 16)) * place[3]);
            }
            __syncwarp();
            if (unit + WARPS < args.k_units) load(next, tile, unit + WARPS);

            float sum[ROWS] = {}, scale = 0.0f, zero[Word<BITS>::PLACES];
            u32 group = 0;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) { // 32 input features
                if (i == 0 || args.groups == 4 || (args.groups == 2 && i == 2)) {
                    const u32 code = group == 0 ? part.zero[0] : group == 1 ? part.zero[1] : group == 2 ? part.zero[2] : part.zero[3];
                    scale = Fp16::to_float(group == 0 ? part.scale[0] : group == 1 ? part.scale[1] : group == 2 ? part.scale[2] : part.scale[3]);
                    ++group;
#pragma unroll
                    for (u32 p = 0; p < Word<BITS>::PLACES; ++p) zero[p] = fmaf((float)code, Word<BITS>::power(p), ONES);
                }
#pragma unroll
                for (u32 l = 0; l < LOADS_32; ++l) {
                    const uint4 v = part.codes[i * LOADS_32 + l];
                    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (u32 w = 0; w < 4; ++w) {
                        constexpr u32 COUNT = Word<BITS>::CODES;
                        float weight[COUNT];
                        Word<BITS>::expand(weight, words[w], zero);
#pragma unroll
                        for (u32 row = 0; row < ROWS; ++row) {
#pragma unroll
                            for (u32 c = 0; c < COUNT; c += 4) {
                                const float4 x = *(const float4*)(staged + row * DEPTH + i * 32 + (l * 4 + w) * COUNT + c);
                                sum[row] = fmaf(x.x, weight[c], sum[row]);
                                sum[row] = fmaf(x.y, weight[c + 1], sum[row]);
                                sum[row] = fmaf(x.z, weight[c + 2], sum[row]);
                                sum[row] = fmaf(x.w, weight[c + 3], sum[row]);
                            }
                        }
                    }
                }
                if (i == 3 || args.groups == 4 || (args.groups == 2 && i == 1)) {
#pragma unroll
                    for (u32 row = 0; row < ROWS; ++row) acc[row] = fmaf(scale, sum[row], acc[row]), sum[row] = 0.0f;
                }
            }
        }

        float* sums = shared_memory + WARPS * ROWS * DEPTH;
#pragma unroll
        for (u32 row = 0; row < ROWS; ++row) sums[(warp * ROWS + row) * LANES + lane] = acc[row];
        __syncthreads();
        const u32 row = warp;
        if (row >= min(ROWS, args.rows)) return;
        const u32 packed = blockIdx.x * LANES + lane;
        float total = args.bias != nullptr ? Fp16::to_float(args.bias[packed]) : 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; ++w) total += sums[(w * ROWS + row) * LANES + lane];
        u16* y = args.y + row * args.y_stride;
        if (args.epilogue == SILU_MUL) { // lanes 8 to 15 have what lanes 0 to 7 multiply by, and so on
            const float up = __shfl_down_sync(~0u, total, 8);
            const u32 feature = blockIdx.x * 16 + lane / 16 * 8 + lane % 8;
            if (lane % 16 < 8 && feature < args.n) y[feature] = Half::from_float(silu(total) * up);
        } else if (packed < args.n) {
            y[packed] = Half::from_float(args.epilogue == ADD ? total + Half::to_float(y[packed]) : total);
        }
    }
};

#ifndef PROTOTYPE
// One image holds one type of activations (IMAGE_HALF) and width (IMAGE_BITS). BLOCKS is how many blocks fit the registers.
#define EXLLAMA(ROWS, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(LANES * WARPS, BLOCKS) exllama_##ROWS(const __grid_constant__ ExllamaArgs args) { \
        Exllama<IMAGE_HALF, IMAGE_BITS, ROWS>{args}.run(); \
    }
EXLLAMA(1, IMAGE_BITS == 4 ? 2 : 1)
EXLLAMA(2, 1)
EXLLAMA(4, 1)
EXLLAMA(8, 1)
#endif
