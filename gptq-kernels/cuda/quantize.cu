// Quantising: Hessian, factorisation, column loop, packing. Everything that is not a matrix product of cuBLAS's.
//
// Arithmetic that decides codes is float32 with one rounding per operation, never contracted, as gptq-core's: the
// intrinsics with _rn see to that. No reduction depends on the order in which blocks run.
#include "half.cuh"

#include "quantize_hessian.cuh"
#include "quantize_factor.cuh"
#include "quantize_grid.cuh"
#include "quantize_columns.cuh"
#include "quantize_update.cuh"
#include "quantize_result.cuh"
