#pragma once

#include <cstdint>

namespace kfac_fast {

// A matrix anywhere in memory.
template <typename T>
struct Strided {
  const T* data;
  int64_t row_stride, column_stride;

  Strided transposed() const { return {data, column_stride, row_stride}; }
  Strided from(int64_t row, int64_t column) const {
    return {data + row * row_stride + column * column_stride, row_stride, column_stride};
  }
};

}  // namespace kfac_fast
