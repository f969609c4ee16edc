#pragma once
// Whether matrices are symmetric up to rounding:
//
//   |A[i][j] - A[j][i]| <= scale[i] · scale[j],   scale[i]^2 = sqrt(eps) · (A[i][i] + damping)
//
// The errors that a Cholesky factorisation makes by itself are in proportion to the same roots of
// diagonal entries (Demmel; Higham 2002, theorem 10.5). Differences that are not finite pass: what
// is not finite in the lower triangle fails at its pivot.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "gram_layout.h"
#include "instruction_set.h"
#include "strided.h"
#include "tile_product.h"

namespace kfac_fast {

#define KFAC_FAST_BODY "symmetry_body.h"
#include "compile_for_instruction_sets.h"

template <typename T>
using SquareDiffers = bool (*)(const T* square, const T* mirrored, int64_t stride,
                               const T* row_scales, const T* column_scales);

template <typename T>
SquareDiffers<T> square_differs(InstructionSet set) {
  return KFAC_FAST_FORM(set, square_differs<T>);
}

template <typename T>
class Symmetry {
 public:
  explicit Symmetry(InstructionSet set)
      : lanes_(tile_product<T>(set).lanes), differs_(square_differs<T>(set)) {}

  static constexpr int64_t strip = 32;  // rows that are compared together

  int64_t scales_size(int64_t size) const { return round_up(size, lanes_); }

  void find_scales(const Strided<T>& a, int64_t size, T damping, T* scales) const {
    const T relative = std::sqrt(std::numeric_limits<T>::epsilon());
    for (int64_t i = 0; i < size; ++i) {
      scales[i] = std::sqrt((*a.from(i, i).data + damping) * relative);
    }
    std::fill(scales + size, scales + scales_size(size), T{0});
  }

  // Whether `strip` rows from `top` on are, up to the diagonal, as their mirror images.
  bool holds(Strided<T> a, int64_t size, int64_t top, const T* scales) const {
    if (a.column_stride != 1) a = a.transposed();  // of which the same holds
    const int64_t bottom = std::min(top + strip, size);
    for (int64_t left = 0; left < bottom; left += strip) {
      for (int64_t r = top; r < bottom; r += lanes_) {
        const int64_t end = std::min(left + strip, r + 1);
        for (int64_t c = left; c < end; c += lanes_) {
          if (differ(a, size, r, c, scales)) return false;
        }
      }
    }
    return true;
  }

 private:
  // Whether the squares at [r][c] and [c][r] do; what reaches beyond the matrix, or lies apart, is
  // copied.
  bool differ(const Strided<T>& a, int64_t size, int64_t r, int64_t c, const T* scales) const {
    const Strided<T> square = a.from(r, c), mirrored = a.from(c, r);
    if (a.column_stride == 1 && r + lanes_ <= size) {
      return differs_(square.data, mirrored.data, a.row_stride, scales + r, scales + c);
    }
    const int64_t rows = std::min(lanes_, size - r), columns = std::min(lanes_, size - c);
    T copies[2][max_lanes * max_lanes] = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        copies[0][i * lanes_ + j] = *square.from(i, j).data;
        copies[1][j * lanes_ + i] = *mirrored.from(j, i).data;
      }
    }
    return differs_(copies[0], copies[1], lanes_, scales + r, scales + c);
  }

  static constexpr int64_t max_lanes = 64 / sizeof(T);

  const int64_t lanes_;
  const SquareDiffers<T> differs_;
};

}  // namespace kfac_fast
