#pragma once
// The rows of a tensor one by one, each with its entries side by side.

#include <cstdint>

#include "tensor_lists.h"
#include "tensors.h"

namespace kfac_fast {

// The first dimensions, `leading` of them, count the rows; the others are a row's entries.
template <typename In>
class ContiguousRows {
 public:
  ContiguousRows(const Tensor& x, int64_t leading) : x_(x), leading_(leading) {
    int64_t step = 1;
    for (int64_t d = x.dim() - 1; d >= leading; --d) {
      in_place_ = in_place_ && (x.size(d) == 1 || x.stride(d) == step);
      step *= x.size(d);
    }
    int64_t rows = 1;
    for (int64_t d = leading - 1; d >= 0; --d) {
      if (x.size(d) == 1) continue;
      if (rows == 1) row_stride_ = x.stride(d);
      evenly_spaced_ = evenly_spaced_ && x.stride(d) == rows * row_stride_;
      rows *= x.size(d);
    }
  }

  bool in_place() const { return in_place_; }

  // Copied to `room` if need be.
  const In* at(int64_t row, In* room) const {
    const In* data = static_cast<const In*>(x_.const_data_ptr());
    return from(evenly_spaced_ ? data + row * row_stride_ : entry_of<In>(x_, leading_, row), room);
  }

  // Of two leading dimensions.
  const In* at(int64_t i, int64_t j, In* room) const {
    const In* data = static_cast<const In*>(x_.const_data_ptr());
    return from(data + i * x_.stride(0) + j * x_.stride(1), room);
  }

 private:
  const In* from(const In* first, In* room) const {
    if (in_place_) return first;
    copy(first, leading_, room);
    return room;
  }

  In* copy(const In* from, int64_t d, In* to) const {
    const int64_t size = x_.size(d), stride = x_.stride(d);
    if (d == x_.dim() - 1) {
      for (int64_t i = 0; i < size; ++i) *to++ = from[i * stride];
      return to;
    }
    for (int64_t i = 0; i < size; ++i) to = copy(from + i * stride, d + 1, to);
    return to;
  }

  const Tensor& x_;
  const int64_t leading_;
  bool in_place_ = true, evenly_spaced_ = true;
  int64_t row_stride_ = 0;
};

}  // namespace kfac_fast
