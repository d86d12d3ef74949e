// The grid of one group of one row: scale and zero. See gptq-core's grid.rs, whose arithmetic this is.
#pragma once

struct Rule {
    float max_code;
    u32 sym;
};

DEVICE float code_of(const Rule& rule, float w, float scale, float zero) {
    return fminf(fmaxf(__fadd_rn(rintf(__fdiv_rn(w, scale)), zero), 0.0f), rule.max_code);
}

DEVICE float scale_of(const Rule& rule, float lo, float hi) {
    const float scale = __fdiv_rn(__fsub_rn(hi, lo), rule.max_code);
    return scale == 0.0f ? 1.17549435e-38f : scale;
}

DEVICE float zero_of(const Rule& rule, float lo, float scale) {
    if (rule.sym) return (rule.max_code + 1.0f) / 2.0f;
    return fminf(fmaxf(rintf(__fdiv_rn(-lo, scale)), 0.0f), rule.max_code);
}

struct GridArgs {
    const float* w;      // (rows, n), in the order of quantisation
    const u32* members;  // position of every natural column, or null: the columns as they lie
    const u32* groups;   // (n): where the grid of a group that starts at a position is put
    float* scales;       // (rows, group_count)
    u8* zeros;
    u32 rows, n, group_count;
    u32 first, group_size;  // the groups are first.., first + group_size.., one for each y of the launch
    double exponent;        // of the search; 0 for none
    Rule rule;
};

// Least and greatest weight of a group, zero included, over a warp.
DEVICE void range_of(const GridArgs& args, const float* w, u32 start, u32 end, float& lo, float& hi) {
    lo = hi = 0.0f;
    for (u32 k = start + threadIdx.x % 32; k < end; k += 32) {
        const float x = w[args.members != nullptr ? args.members[k] : k];
        lo = fminf(lo, x);
        hi = fmaxf(hi, x);
    }
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) {
        lo = fminf(lo, __shfl_xor_sync(~0u, lo, step));
        hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, step));
    }
    if (args.rule.sym) {
        hi = fmaxf(hi, fabsf(lo));
        if (lo < 0.0f) lo = -hi;
    }
    if (lo == 0.0f && hi == 0.0f) {
        lo = -1.0f;
        hi = 1.0f;
    }
}

DEVICE void store_grid(const GridArgs& args, u32 row, u32 start, float scale, float zero) {
    const u64 at = (u64)row * args.group_count + args.groups[start];
    args.scales[at] = scale;
    args.zeros[at] = (u8)zero;
}

// The full range. One warp a row and group, 8 rows a block.
extern "C" __global__ void __launch_bounds__(256) fit_grid(const __grid_constant__ GridArgs args) {
    const u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    const u32 start = args.first + blockIdx.y * args.group_size, end = min(args.n, start + args.group_size);
    if (row >= args.rows || start >= args.n) return;
    float lo, hi;
    range_of(args, args.w + (u64)row * args.n, start, end, lo, hi);
    if (threadIdx.x % 32 == 0) {
        const float scale = scale_of(args.rule, lo, hi);
        store_grid(args, row, start, scale, zero_of(args.rule, lo, scale));
    }
}

// x^exponent: gptq-core's `power`, operation for operation.
DEVICE double power(float x, double exponent) {
    const double magic = 6755399441055744.0;
    const u64 sqrt_half = 0x3FE6A09E667F3BCDull;
    const u64 bits = (u64)__double_as_longlong((double)x);
    const u64 power_of_two = (u64)((long long)(bits - sqrt_half) >> 52);
    const double m = __longlong_as_double((long long)(bits - (power_of_two << 52)));
    const double k =
        __dsub_rn(__longlong_as_double((long long)((u64)__double_as_longlong(magic) + power_of_two)), magic);
    const double t = __ddiv_rn(__dsub_rn(m, 1.0), __dadd_rn(m, 1.0));
    const double t2 = __dmul_rn(t, t);
    double series = __dadd_rn(1.0 / 9.0, __ddiv_rn(t2, 11.0));
    series = __dadd_rn(1.0 / 7.0, __dmul_rn(t2, series));
    series = __dadd_rn(1.0 / 5.0, __dmul_rn(t2, series));
    series = __dadd_rn(1.0 / 3.0, __dmul_rn(t2, series));
    series = __dadd_rn(1.0, __dmul_rn(t2, series));
    const double log2 = __dadd_rn(k, __dmul_rn(__dmul_rn(2.0 * 1.4426950408889634, t), series));
    const double y = fmin(fmax(__dmul_rn(exponent, log2), -1022.0), 1023.0);
    const double shifted = __dadd_rn(y, magic);
    const double z = __dmul_rn(__dsub_rn(y, __dsub_rn(shifted, magic)), 0.6931471805599453);
    double exp = __dadd_rn(1.0, __dmul_rn(z, 1.0 / 9.0));
    exp = __dadd_rn(1.0, __dmul_rn(__dmul_rn(z, 1.0 / 8.0), exp));
    exp = __dadd_rn(1.0, __dmul_rn(__dmul_rn(z, 1.0 / 7.0), exp));
    exp = __dadd_rn(1.0, __dmul_rn(__dmul_rn(z, 1.0 / 6.0), exp));
    exp = __dadd_rn(1.0, __dmul_rn(__dmul_rn(z, 1.0 / 5.0), exp));
    exp = __dadd_rn(1.0, __dmul_rn(__dmul_rn(z, 1.0 / 4.0), exp));
    exp = __dadd_rn(1.0, __dmul_rn(__dmul_rn(z, 1.0 / 3.0), exp));
    exp = __dadd_rn(1.0, __dmul_rn(__dmul_rn(z, 1.0 / 2.0), exp));
    exp = __dadd_rn(1.0, __dmul_rn(z, exp));
    const u64 scale = 0x3FF0000000000000ull + ((u64)__double_as_longlong(shifted) << 52);
    return __dmul_rn(exp, __longlong_as_double((long long)scale));
}

constexpr u32 SEARCH_STEPS = 80, SEARCH_ROWS = 2, STAGED = 128;

// The search: a thread for each of 80 ranges of each of 2 rows, every one of which sums its error in the order of the
// columns; then the first of the least errors.
extern "C" __global__ void __launch_bounds__(SEARCH_STEPS* SEARCH_ROWS) search_grid(const __grid_constant__ GridArgs args) {
    __shared__ float weights[SEARCH_ROWS][STAGED];
    __shared__ float range[SEARCH_ROWS][2];
    __shared__ double errors[SEARCH_ROWS][2 * SEARCH_STEPS];
    const u32 thread = threadIdx.x, warp = thread / 32;
    const u32 first_row = blockIdx.x * SEARCH_ROWS;
    const u32 start = args.first + blockIdx.y * args.group_size, end = min(args.n, start + args.group_size);
    if (start >= args.n) return;
    if (warp < SEARCH_ROWS) {
        float lo, hi;
        range_of(args, args.w + (u64)min(first_row + warp, args.rows - 1) * args.n, start, end, lo, hi);
        if (thread % 32 == 0) {
            range[warp][0] = lo;
            range[warp][1] = hi;
        }
    }
    __syncthreads();
    const u32 local = thread / SEARCH_STEPS, step = thread % SEARCH_STEPS;
    const float shrink = __double2float_rn(__dsub_rn(1.0, __ddiv_rn((double)step, 100.0)));
    const float lo = __fmul_rn(shrink, range[local][0]), hi = __fmul_rn(shrink, range[local][1]);
    const float scale = scale_of(args.rule, lo, hi), zero = zero_of(args.rule, lo, scale);
    // A 2-bit asymmetric grid has so few points that the other integer next to the ideal zero is worth a try.
    const bool try_other = !args.rule.sym && args.rule.max_code == 3.0f;
    const float ideal = __fdiv_rn(-lo, scale);
    const float floor_zero = fminf(fmaxf(floorf(ideal), 0.0f), args.rule.max_code);
    const float ceil_zero = fminf(fmaxf(ceilf(ideal), 0.0f), args.rule.max_code);
    const float other = zero == floor_zero ? ceil_zero : floor_zero;
    double error = 0.0, other_error = 0.0;
    for (u32 staged = start; staged < end; staged += STAGED) {
        const u32 count = min(STAGED, end - staged);
        __syncthreads();
        for (u32 at = thread; at < SEARCH_ROWS * STAGED; at += SEARCH_STEPS * SEARCH_ROWS) {
            const u32 r = at / STAGED, k = staged + at % STAGED;
            const float* w = args.w + (u64)min(first_row + r, args.rows - 1) * args.n;
            if (k < end) weights[r][at % STAGED] = w[args.members != nullptr ? args.members[k] : k];
        }
        __syncthreads();
        for (u32 k = 0; k < count; ++k) {
            const float w = weights[local][k];
            const float q = __fmul_rn(scale, __fsub_rn(code_of(args.rule, w, scale, zero), zero));
            error = __dadd_rn(error, power(fabsf(__fsub_rn(q, w)), args.exponent));
            if (try_other) {
                const float p = __fmul_rn(scale, __fsub_rn(code_of(args.rule, w, scale, other), other));
                other_error = __dadd_rn(other_error, power(fabsf(__fsub_rn(p, w)), args.exponent));
            }
        }
    }
    errors[local][2 * step] = error;
    errors[local][2 * step + 1] = try_other ? other_error : __longlong_as_double(0x7FF0000000000000ll);
    __syncthreads();
    if (step == 0 && first_row + local < args.rows) {
        // Not smaller than infinity, NaN included, leaves the full range.
        u32 best = 0;
        double least = __longlong_as_double(0x7FF0000000000000ll);
        for (u32 at = 0; at < 2 * SEARCH_STEPS; ++at) {
            if (errors[local][at] < least) {
                least = errors[local][at];
                best = at;
            }
        }
        errors[local][0] = (double)best;
    }
    __syncthreads();
    const u32 best = (u32)errors[local][0];
    if (step == best / 2 && first_row + local < args.rows) {
        store_grid(args, first_row + local, start, scale, best % 2 == 0 ? zero : other);
    }
}
