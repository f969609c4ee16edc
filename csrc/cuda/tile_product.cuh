#pragma once
// Products of two tiles in shared memory, kept in the registers of 8 warps.

namespace kfac_fast {

// sum[i][j] += Σ_k left[k][kRows warp + i] right[k][lane + 32 j]
template <typename T, int kDepth, int kLeft, int kRight, int kRows, int kColumns>
__device__ void multiply_tiles(const T (&left)[kDepth][kLeft], const T (&right)[kDepth][kRight],
                               T (&sum)[kRows][kColumns]) {
  const int row = threadIdx.x / 32 * kRows, lane = threadIdx.x % 32;
#pragma unroll 16
  for (int k = 0; k < kDepth; ++k) {
    T a[kRows], b[kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) a[i] = left[k][row + i];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) b[j] = right[k][lane + 32 * j];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] += a[i] * b[j];
    }
  }
}

}  // namespace kfac_fast
