#pragma once

#include <cstdint>

namespace kfac_fast {

// target[c][r] = source[r][c]. Every row of the target is finished before the next, so that its
// cache line is written once even where the rows lie a power of two apart and displace each other.
template <typename T>
inline void transpose(const T* source, int64_t source_stride, int64_t rows, int64_t columns,
                      T* target, int64_t target_stride) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      target[c * target_stride + r] = source[r * source_stride + c];
    }
  }
}

}  // namespace kfac_fast
