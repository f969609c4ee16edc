#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace kfac_fast {

// target[c][r] = source[r][c]; rows are `stride` elements apart.
template <typename T>
void transpose(const T* source, int64_t source_stride, int64_t rows, int64_t columns, T* target,
               int64_t target_stride) {
  int64_t whole_rows = 0;
#if defined(__SSE__)
  if constexpr (std::is_same_v<T, float>) {
    whole_rows = rows / 4 * 4;
    const int64_t whole_columns = columns / 4 * 4;
    for (int64_t r = 0; r < whole_rows; r += 4) {
      const float* from = source + r * source_stride;
      for (int64_t c = 0; c < whole_columns; c += 4) {
        __m128 row0 = _mm_loadu_ps(from + c);
        __m128 row1 = _mm_loadu_ps(from + source_stride + c);
        __m128 row2 = _mm_loadu_ps(from + 2 * source_stride + c);
        __m128 row3 = _mm_loadu_ps(from + 3 * source_stride + c);
        _MM_TRANSPOSE4_PS(row0, row1, row2, row3);
        float* to = target + c * target_stride + r;
        _mm_storeu_ps(to, row0);
        _mm_storeu_ps(to + target_stride, row1);
        _mm_storeu_ps(to + 2 * target_stride, row2);
        _mm_storeu_ps(to + 3 * target_stride, row3);
      }
    }
    for (int64_t c = whole_columns; c < columns; ++c) {
      for (int64_t r = 0; r < whole_rows; ++r) {
        target[c * target_stride + r] = source[r * source_stride + c];
      }
    }
  }
#endif
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = whole_rows; r < rows; ++r) {
      target[c * target_stride + r] = source[r * source_stride + c];
    }
  }
}

}  // namespace kfac_fast
