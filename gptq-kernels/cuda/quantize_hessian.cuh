// Sums of calibration inputs.
#pragma once

constexpr u32 TILE = 32;

struct AddSpanArgs {
    double* sum;        // (n, n)
    const float* part;  // (n, n)
    u32 n, lower, first;
};

// sum += part, on the lower triangle (row >= column) or everywhere. A block has TILE x TILE elements, 4 rows a pass.
extern "C" __global__ void __launch_bounds__(256) add_span(const __grid_constant__ AddSpanArgs args) {
    const u32 column = blockIdx.x * TILE + threadIdx.x % TILE;
    if ((args.lower && blockIdx.x > blockIdx.y) || column >= args.n) return;
    for (u32 r = threadIdx.x / TILE; r < TILE; r += 8) {
        const u32 row = blockIdx.y * TILE + r;
        if (row >= args.n) return;
        const u64 at = (u64)row * args.n + column;
        args.sum[at] = (args.first ? 0.0 : args.sum[at]) + (double)args.part[at];
    }
}

struct FinishArgs {
    double* sum;       // (n, n)
    double* diagonal;  // (n), or null
    u64* non_finite;   // least index of an element that is NaN or infinite
    double scale;
    u32 n, lower;
};

DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }
DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// Scales, and rounds to float32, as which the references hold a Hessian; mirrors the lower triangle if that is all there is.
extern "C" __global__ void __launch_bounds__(256) finish_sum(const __grid_constant__ FinishArgs args) {
    __shared__ double tile[TILE][TILE + 1];
    if (args.lower && blockIdx.x > blockIdx.y) return;
    const u32 lane = threadIdx.x % TILE, column = blockIdx.x * TILE + lane;
    for (u32 r = threadIdx.x / TILE; r < TILE; r += 8) {
        const u32 row = blockIdx.y * TILE + r;
        if (row >= args.n || column >= args.n || (args.lower && column > row)) continue;
        const u64 at = (u64)row * args.n + column;
        const double value = (double)__double2float_rn(__dmul_rn(args.sum[at], args.scale));
        if (!is_finite(value)) atomicMin(args.non_finite, args.lower ? (u64)column * args.n + row : at);
        args.sum[at] = value;
        if (row == column && args.diagonal != nullptr) args.diagonal[row] = value;
        tile[r][lane] = value;
    }
    __syncthreads();
    if (!args.lower) return;
    const u32 mirrored = blockIdx.y * TILE + lane;
    for (u32 r = threadIdx.x / TILE; r < TILE; r += 8) {
        const u32 row = blockIdx.x * TILE + r;
        if (row < args.n && mirrored < args.n && row < mirrored) args.sum[(u64)row * args.n + mirrored] = tile[lane][r];
    }
}

struct SquaresArgs {
    const float* x;  // (rows, n), stride apart
    double* sums;    // (n)
    u64 stride;
    u32 rows, n;
};

// Adds the columns' sums of squares, exact but for float64's roundings. A block has 32 columns and 8 rows a pass.
extern "C" __global__ void __launch_bounds__(256) add_squares(const __grid_constant__ SquaresArgs args) {
    __shared__ double sums[8][32];
    const u32 lane = threadIdx.x % 32, first = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    double sum = 0.0;
    if (column < args.n) {
#pragma unroll 4
        for (u32 row = first; row < args.rows; row += 8) {
            const double x = args.x[row * args.stride + column];
            sum += x * x;
        }
    }
    sums[first][lane] = sum;
    __syncthreads();
    if (first != 0 || column >= args.n) return;
    for (u32 i = 1; i < 8; ++i) sum += sums[i][lane];
    args.sums[column] += sum;
}

struct DiagonalArgs {
    double* sum;             // (n, n)
    const double* diagonal;  // (n)
    u32 n;
};

extern "C" __global__ void __launch_bounds__(256) set_diagonal(const __grid_constant__ DiagonalArgs args) {
    const u64 i = blockIdx.x * 256 + threadIdx.x;
    if (i < args.n) args.sum[i * args.n + i] = args.diagonal[i];
}

struct DifferenceArgs {
    const void* x;          // (rows, n), x_stride apart
    const void* reference;  // (rows, n), reference_stride apart
    u16* high;             // (rows, n), stride apart
    u16* low;
    u64 x_stride, reference_stride, stride;
    u32 rows, n;
};

// reference - x as a sum of two halves, which hold its float32 value to some 2^-22 of itself.
template <class Half>
DEVICE void difference(const DifferenceArgs& args) {
    const u32 column = blockIdx.x * 256 + threadIdx.x;
    if (column >= args.n) return;
    for (u32 row = blockIdx.y; row < args.rows; row += gridDim.y) {
        const float d = __fsub_rn(Half::to_float(((const u16*)args.reference)[row * args.reference_stride + column]),
                                  Half::to_float(((const u16*)args.x)[row * args.x_stride + column]));
        const u16 high = Half::from_float(d);
        args.high[row * args.stride + column] = high;
        args.low[row * args.stride + column] = Half::from_float(__fsub_rn(d, Half::to_float(high)));
    }
}
extern "C" __global__ void __launch_bounds__(256) difference_f16(const __grid_constant__ DifferenceArgs args) {
    difference<Fp16>(args);
}
extern "C" __global__ void __launch_bounds__(256) difference_bf16(const __grid_constant__ DifferenceArgs args) {
    difference<Bf16>(args);
}

struct DifferenceF32Args {
    const float* x;          // (rows, n), x_stride apart
    const float* reference;  // (rows, n), reference_stride apart
    float* out;              // (rows, n), stride apart
    u64 x_stride, reference_stride, stride;
    u32 rows, n;
};

extern "C" __global__ void __launch_bounds__(256) difference_f32(const __grid_constant__ DifferenceF32Args args) {
    const u32 column = blockIdx.x * 256 + threadIdx.x;
    if (column >= args.n) return;
    for (u32 row = blockIdx.y; row < args.rows; row += gridDim.y) {
        args.out[row * args.stride + column] =
            __fsub_rn(args.reference[row * args.reference_stride + column], args.x[row * args.x_stride + column]);
    }
}
