#pragma once
// The rows of a tensor [*, D] with any strides, walked in stretches of evenly spaced rows.
//
// Rows that a mask does not count are left out, not multiplied by zero: what they hold (infinities,
// NaN) must not reach a sum.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kfac_fast {

// One leading dimension of the rows and of their mask, strides in elements.
struct Axis {
  int64_t size;
  int64_t stride;
  int64_t mask_stride;
};

template <typename In>
class RowSource {
 public:
  // `axes` from the outermost; `mask` may be null.
  RowSource(const In* data, int64_t column_stride, const bool* mask, const std::vector<Axis>& axes)
      : data_(data), column_stride_(column_stride), mask_(mask) {
    for (const Axis& axis : axes) {
      rows_ *= axis.size;
      if (axis.size != 1) merge(axis);
    }
    if (axes_.empty()) axes_.push_back({1, 0, 0});
  }

  const In* data() const { return data_; }
  int64_t rows() const { return rows_; }
  int64_t column_stride() const { return column_stride_; }

  RowSource from_column(int64_t column) const {
    RowSource part = *this;
    part.data_ += column * column_stride_;
    return part;
  }

  // The distance of neighbouring rows where all rows count and are evenly spaced, else 0.
  int64_t even_row_stride() const { return axes_.size() == 1 && !mask_ ? axes_[0].stride : 0; }

  // Calls visit(first, row_stride, count) for every stretch of rows in [begin, end) that are
  // neighbours, count and are evenly spaced.
  template <typename Visit>
  void for_each_stretch(int64_t begin, int64_t end, const Visit& visit) const {
    if (const int64_t stride = even_row_stride()) {  // as mostly: no divisions
      if (begin < end) visit(data_ + begin * stride, stride, end - begin);
      return;
    }
    const Axis& inner = axes_.back();
    while (begin < end) {
      auto [offset, mask_offset, left] = locate(begin);
      const int64_t count = std::min(end - begin, left);
      if (!mask_) {
        visit(data_ + offset, inner.stride, count);
      } else {
        for_each_counted(data_ + offset, mask_ + mask_offset, count, visit);
      }
      begin += count;
    }
  }

  int64_t counted(int64_t begin, int64_t end) const {
    if (!mask_) return end - begin;
    int64_t total = 0;
    for_each_stretch(begin, end, [&](const In*, int64_t, int64_t count) { total += count; });
    return total;
  }

 private:
  struct Location {
    int64_t offset;
    int64_t mask_offset;
    int64_t left;  // rows until the innermost axis ends
  };

  // Adjacent axes that step evenly become one: fewer, longer stretches.
  void merge(const Axis& axis) {
    if (!axes_.empty()) {
      Axis& outer = axes_.back();
      if (outer.stride == axis.size * axis.stride &&
          outer.mask_stride == axis.size * axis.mask_stride) {
        outer = {outer.size * axis.size, axis.stride, axis.mask_stride};
        return;
      }
    }
    axes_.push_back(axis);
  }

  Location locate(int64_t row) const {
    Location location{0, 0, axes_.back().size - row % axes_.back().size};
    for (auto axis = axes_.rbegin(); axis != axes_.rend(); ++axis) {
      const int64_t index = row % axis->size;
      location.offset += index * axis->stride;
      location.mask_offset += index * axis->mask_stride;
      row /= axis->size;
    }
    return location;
  }

  template <typename Visit>
  void for_each_counted(const In* first, const bool* mask, int64_t count,
                        const Visit& visit) const {
    const Axis& inner = axes_.back();
    for (int64_t begin = 0, end; begin < count; begin = end) {
      const bool counts = mask[begin * inner.mask_stride];
      for (end = begin + 1; end < count && mask[end * inner.mask_stride] == counts;) ++end;
      if (counts) visit(first + begin * inner.stride, inner.stride, end - begin);
    }
  }

  const In* data_;
  int64_t column_stride_;
  const bool* mask_;
  int64_t rows_ = 1;
  std::vector<Axis> axes_;
};

}  // namespace kfac_fast
