// The column loop of one lazy block. See gptq-core's row_chunk.rs, whose arithmetic this is, in its order.
#pragma once

struct WeightArgs {
    const void* source;  // (rows, n), natural order, stride apart
    float* w;            // (rows, n), in the order of quantisation
    const u32* order;    // (n)
    u64* non_finite;     // least index, in (rows, n), of an element that is NaN or infinite
    u64 stride;
    u32 rows, n;
};

struct Single {
    static DEVICE float to_float(u32 bits) { return __uint_as_float(bits); }
    static DEVICE u32 from_float(float value) { return __float_as_uint(value); }
};

template <class Real, class Bits>
DEVICE void gather_weight(const WeightArgs& args) {
    const u32 column = blockIdx.x * 256 + threadIdx.x;
    if (column >= args.n) return;
    const u32 original = args.order[column];
    for (u32 row = blockIdx.y; row < args.rows; row += gridDim.y) {
        const float value = Real::to_float(((const Bits*)args.source)[row * args.stride + original]);
        if (!is_finite(value)) atomicMin(args.non_finite, (u64)row * args.n + original);
        args.w[(u64)row * args.n + column] = value;
    }
}
extern "C" __global__ void __launch_bounds__(256) gather_weight_f32(const __grid_constant__ WeightArgs args) {
    gather_weight<Single, u32>(args);
}
extern "C" __global__ void __launch_bounds__(256) gather_weight_f16(const __grid_constant__ WeightArgs args) {
    gather_weight<Fp16, u16>(args);
}
extern "C" __global__ void __launch_bounds__(256) gather_weight_bf16(const __grid_constant__ WeightArgs args) {
    gather_weight<Bf16, u16>(args);
}

struct ZeroArgs {
    float* w;              // (rows, n)
    const u32* positions;  // (count)
    u32 rows, n, count;
};

// Sets columns to zero.
extern "C" __global__ void __launch_bounds__(256) zero_columns(const __grid_constant__ ZeroArgs args) {
    for (u64 at = blockIdx.x * 256 + threadIdx.x; at < (u64)args.rows * args.count; at += gridDim.x * 256) {
        args.w[at / args.count * args.n + args.positions[at % args.count]] = 0.0f;
    }
}

constexpr u32 ROWS = 32, STEPS = 32, PADDED = 33;

struct ColumnsArgs {
    const float* w;       // (rows, n), in the order of quantisation
    const float* u;       // (n, n)
    const float* p;       // (n, n) of GPTAQ, or null
    const float* scales;  // (rows, group_count)
    const u8* zeros;      // (rows, group_count)
    const u32* groups;    // (n), by position
    const u32* order;     // (n)
    float* errors;        // (rows, width)
    float* block;         // (rows, width): the block's weights after its own updates, for GPTAQ
    u8* codes;            // (rows, n), natural order
    double* loss;         // (rows): sum of squared errors so far
    u32 rows, n, group_count, start, width;
    Rule rule;
};

// Rows of shared memory are 4 floats apart from a multiple of 32 banks where threads read along columns.
DEVICE u32 row_stride(u32 width) { return (width + 3) / 4 * 4 + 4; }

// One warp quantises STEPS columns of 32 rows, a row a lane, with the updates among them in registers.
template <bool GPTAQ>
DEVICE void quantize_steps(const ColumnsArgs& args, u32 count, float* tile, u32 tile_stride, const float* u, const float* p,
                           u32 u_stride, const float* scales, const float* zeros, float* errors, u8* codes, double& loss) {
    const u32 lane = threadIdx.x % 32;
    float x[STEPS];
#pragma unroll
    for (u32 k = 0; k < STEPS; ++k) x[k] = k < count ? tile[lane * tile_stride + k] : 0.0f;
#pragma unroll
    for (u32 j = 0; j < STEPS; ++j) {
        if (j >= count) break;
        const float scale = scales[j * PADDED + lane], zero = zeros[j * PADDED + lane], w = x[j];
        const float code = code_of(args.rule, w, scale, zero);
        const float q = __fmul_rn(scale, __fsub_rn(code, zero));
        const float e = __fdiv_rn(__fsub_rn(w, q), u[j * u_stride + j]);
        loss = __dadd_rn(loss, __dmul_rn((double)e, (double)e));
        errors[j * PADDED + lane] = e;
        codes[j * PADDED + lane] = (u8)code;
#pragma unroll
        for (u32 quad = j / 4; quad < STEPS / 4; ++quad) {
            const float4 us = *(const float4*)(u + j * u_stride + quad * 4);
            const float uk[4] = {us.x, us.y, us.z, us.w};
            float pk[4] = {};
            if (GPTAQ) {
                const float4 ps = *(const float4*)(p + j * u_stride + quad * 4);
                pk[0] = ps.x, pk[1] = ps.y, pk[2] = ps.z, pk[3] = ps.w;
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 k = quad * 4 + i;
                if (GPTAQ ? k < j : k <= j) continue;
                const float step = __fmul_rn(e, uk[i]);
                x[k] = __fsub_rn(x[k], GPTAQ ? __fsub_rn(step, __fmul_rn(w, pk[i])) : step);
            }
        }
        // GPTAQ's lazy update takes the column as it was, corrected; in the loop it is read before that.
        if (GPTAQ) errors[(STEPS + j) * PADDED + lane] = w;
    }
    if (GPTAQ) {
#pragma unroll
        for (u32 k = 0; k < STEPS; ++k) {
            if (k < count) tile[lane * tile_stride + k] = x[k];
        }
    }
}

// Applies the errors of STEPS columns to the columns of the block behind them, 8 at a time, each in the order of the steps.
template <bool GPTAQ>
DEVICE void update_block(u32 count, u32 columns, float* tile, u32 tile_stride, const float* u, const float* p, u32 u_stride,
                         const float* errors) {
    const u32 lane = threadIdx.x % 32;
    for (u32 first = threadIdx.x / 32 * 8; first < columns; first += blockDim.x / 32 * 8) {
        float x[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) x[i] = first + i < columns ? tile[lane * tile_stride + first + i] : 0.0f;
        for (u32 j = 0; j < count; ++j) {
            const float e = errors[j * PADDED + lane], w = GPTAQ ? errors[(STEPS + j) * PADDED + lane] : 0.0f;
#pragma unroll
            for (u32 quad = 0; quad < 2; ++quad) {
                const float4 us = *(const float4*)(u + j * u_stride + first + quad * 4);
                const float uk[4] = {us.x, us.y, us.z, us.w};
                float pk[4] = {};
                if (GPTAQ) {
                    const float4 ps = *(const float4*)(p + j * u_stride + first + quad * 4);
                    pk[0] = ps.x, pk[1] = ps.y, pk[2] = ps.z, pk[3] = ps.w;
                }
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const float step = __fmul_rn(e, uk[i]);
                    float& target = x[quad * 4 + i];
                    target = __fsub_rn(target, GPTAQ ? __fsub_rn(step, __fmul_rn(w, pk[i])) : step);
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            if (first + i < columns) tile[lane * tile_stride + first + i] = x[i];
        }
    }
}

// Shared memory: the block's weights, then STEPS rows of U and of P, scales, zeros, errors (and weights), codes.
template <bool GPTAQ>
DEVICE void quantize_columns(const ColumnsArgs& args) {
    extern __shared__ float4 quads[];
    const u32 width = args.width, u_stride = row_stride(width), tile_stride = width | 1;
    float* u = (float*)quads;
    float* p = u + STEPS * u_stride;
    float* tile = GPTAQ ? p + STEPS * u_stride : p;
    float* scales = tile + ROWS * tile_stride;
    float* zeros = scales + STEPS * PADDED;
    float* errors = zeros + STEPS * PADDED;
    u8* codes = (u8*)(errors + (GPTAQ ? 2 : 1) * STEPS * PADDED);

    const u32 thread = threadIdx.x, threads = blockDim.x, first_row = blockIdx.x * ROWS;
    const u32 rows = min(ROWS, args.rows - first_row);
    for (u32 at = thread; at < ROWS * width; at += threads) {
        const u32 r = at / width, c = at % width;
        tile[r * tile_stride + c] = r < rows ? args.w[(u64)(first_row + r) * args.n + args.start + c] : 0.0f;
    }
    double loss = thread < rows ? args.loss[first_row + thread] : 0.0;

    for (u32 first = 0; first < width; first += STEPS) {
        const u32 count = min(STEPS, width - first), column = args.start + first, columns = width - first;
        __syncthreads();
        for (u32 j = thread / 32; j < STEPS; j += threads / 32) {
            for (u32 c = thread % 32; c < u_stride; c += 32) {
                const bool inside = j < count && c < columns;
                const u64 at = (u64)(column + j) * args.n + column + c;
                u[j * u_stride + c] = inside ? args.u[at] : 0.0f;
                if (GPTAQ) p[j * u_stride + c] = inside ? args.p[at] : 0.0f;
            }
        }
        for (u32 at = thread; at < ROWS * STEPS; at += threads) {
            const u32 j = at % STEPS, r = at / STEPS;
            const bool inside = j < count && r < rows;
            const u64 grid = inside ? (u64)(first_row + r) * args.group_count + args.groups[column + j] : 0;
            scales[j * PADDED + r] = inside ? args.scales[grid] : 1.0f;
            zeros[j * PADDED + r] = inside ? (float)args.zeros[grid] : 0.0f;
        }
        __syncthreads();
        if (thread < 32) {
            quantize_steps<GPTAQ>(args, count, tile + first, tile_stride, u, p, u_stride, scales, zeros, errors, codes, loss);
        }
        __syncthreads();
        // Columns from STEPS on begin at a multiple of 4 floats.
        if (columns > STEPS) {
            update_block<GPTAQ>(count, columns - STEPS, tile + first + STEPS, tile_stride, u + STEPS, p + STEPS, u_stride,
                                errors);
        }
        for (u32 at = thread; at < ROWS * STEPS; at += threads) {
            const u32 j = at % STEPS, r = at / STEPS;
            if (j >= count || r >= rows) continue;
            const u64 row = first_row + r;
            args.errors[row * width + first + j] = errors[j * PADDED + r];
            args.codes[row * args.n + args.order[column + j]] = codes[j * PADDED + r];
        }
    }
    if (thread < rows) args.loss[first_row + thread] = loss;
    if (GPTAQ) {
        __syncthreads();
        for (u32 at = thread; at < rows * width; at += threads) {
            const u32 r = at / width, c = at % width;
            args.block[(u64)(first_row + r) * width + c] = tile[r * tile_stride + c];
        }
    }
}
extern "C" __global__ void __launch_bounds__(256) columns_gptq(const __grid_constant__ ColumnsArgs args) {
    quantize_columns<false>(args);
}
extern "C" __global__ void __launch_bounds__(256) columns_gptaq(const __grid_constant__ ColumnsArgs args) {
    quantize_columns<true>(args);
}
