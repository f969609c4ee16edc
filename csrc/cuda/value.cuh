#pragma once
// Elements of a tensor as the numbers that kernels sum: float32, or float64 for float64.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace kfac_fast {

__device__ inline float value_of(float v) { return v; }
__device__ inline double value_of(double v) { return v; }
__device__ inline float value_of(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float value_of(__half v) { return __half2float(v); }

}  // namespace kfac_fast
