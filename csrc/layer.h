#pragma once

#include "strided.h"

namespace kfac_fast {

// A gradient, what is applied to it from its left and right, and the result, which is contiguous.
template <typename T>
struct Layer {
  int64_t rows, columns;  // of the gradient
  Strided<T> grad, left, right;
  T* out;
};

}  // namespace kfac_fast
