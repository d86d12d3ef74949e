// From H to the upper triangular U with H^-1 = U^T U, beside the matrix products.
//
// With J the reversal of rows, J H J = L L^T gives U = J L^-1 J. The matrix is gathered reversed, and what comes out is
// reversed again, so that the factorisation in between is an ordinary lower one with an inverse.
#pragma once

constexpr u32 LEAF = 64;

struct GatherArgs {
    const double* source;    // (n, n)
    const double* diagonal;  // (n), or null for the source's own
    const u32* order;        // (n)
    double* out;             // (n, n)
    u32 n, reversed, lower;
};

// out[i, j] = source[order[i], order[j]], another diagonal in its place; reversed, and zero above the diagonal.
extern "C" __global__ void __launch_bounds__(256) gather_matrix(const __grid_constant__ GatherArgs args) {
    const u32 column = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
    if (column >= args.n) return;
    const u32 last = args.n - 1;
    const u32 i = args.order[args.reversed ? last - row : row], j = args.order[args.reversed ? last - column : column];
    double value = 0.0;
    if (!args.lower || column <= row) {
        value = row == column && args.diagonal != nullptr ? args.diagonal[i] : args.source[(u64)i * args.n + j];
    }
    args.out[(u64)row * args.n + column] = value;
}

struct LeafArgs {
    double* a;    // (n, n), stride apart
    u64* status;  // index of the first bad pivot, and its value; all ones before
    u64 stride;
    u32 n, first;
};

// Replaces the lower triangle of one block, A = L L^T, by L^-1; one thread block. A thread has 16 elements of a row in
// registers: where step j has not come yet, of A; where it has been, of the inverse, to which the same elimination is
// applied. Step j takes L[i, j] times row j from row i > j, the row's element j being 1 of the identity before.
extern "C" __global__ void __launch_bounds__(256) factor_leaf(const __grid_constant__ LeafArgs args) {
    __shared__ double raw[LEAF], row[LEAF];
    const u32 n = args.n, i = threadIdx.x / 4, first = threadIdx.x % 4 * 16;
    if (args.status[0] != ~0ull) return;
    double m[16];
#pragma unroll
    for (u32 k = 0; k < 16; ++k) {
        // Beyond n an identity, which its own steps leave as it is.
        const bool inside = i < n && first + k <= i;
        m[k] = inside ? args.a[i * args.stride + first + k] : (i == first + k ? 1.0 : 0.0);
    }
    for (u32 part = 0; part < 4; ++part) {
#pragma unroll
        for (u32 k = 0; k < 16; ++k) {
            const u32 j = part * 16 + k;
            if (j >= n) break;
            // Column j below the diagonal and row j before it: the whole vector that this step works with.
            if (first == part * 16 && i >= j) raw[i] = m[k];
            if (i == j) {
#pragma unroll
                for (u32 c = 0; c < 16; ++c) {
                    if (first + c < j) raw[first + c] = m[c];
                }
            }
            __syncthreads();
            const double pivot = raw[j];
            if (!(pivot > 0.0) || !is_finite(pivot)) {
                if (threadIdx.x == 0) {
                    args.status[1] = (u64)__double_as_longlong(pivot);
                    args.status[0] = args.first + j;
                }
                return;
            }
            if (threadIdx.x < LEAF) row[threadIdx.x] = (threadIdx.x == j ? 1.0 : raw[threadIdx.x]) / sqrt(pivot);
            __syncthreads();
            if (i > j) {
                const double l = row[i];
                if (first == part * 16) m[k] = 0.0;
#pragma unroll
                for (u32 c = 0; c < 16; ++c) m[c] -= l * row[first + c];
            } else if (i == j) {
#pragma unroll
                for (u32 c = 0; c < 16; ++c) m[c] = first + c <= j ? row[first + c] : 0.0;
            }
        }
    }
#pragma unroll
    for (u32 k = 0; k < 16; ++k) {
        if (i < n && first + k < n) args.a[i * args.stride + first + k] = first + k <= i ? m[k] : 0.0;
    }
}

struct ReverseArgs {
    const double* a;  // (n, n) lower triangular
    float* single;    // (n, n) upper triangular
    double* full;     // the same in float64, or null
    u32 n;
};

// U = J a J.
extern "C" __global__ void __launch_bounds__(256) reverse_matrix(const __grid_constant__ ReverseArgs args) {
    const u32 column = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y, last = args.n - 1;
    if (column >= args.n) return;
    const double value = column < row ? 0.0 : args.a[(u64)(last - row) * args.n + (last - column)];
    const u64 at = (u64)row * args.n + column;
    args.single[at] = __double2float_rn(value);
    if (args.full != nullptr) args.full[at] = value;
}

struct TriangleArgs {
    double* a;      // (n, n)
    float* single;  // null, or where to round the matrix to instead
    double alpha;
    u32 n;
};

// a = alpha * triu(a, 1), or single = a.
extern "C" __global__ void __launch_bounds__(256) scale_triangle(const __grid_constant__ TriangleArgs args) {
    const u32 column = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
    if (column >= args.n) return;
    const u64 at = (u64)row * args.n + column;
    if (args.single != nullptr) {
        args.single[at] = __double2float_rn(args.a[at]);
    } else {
        args.a[at] = column > row ? __dmul_rn(args.alpha, args.a[at]) : 0.0;
    }
}
