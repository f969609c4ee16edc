#pragma once
// A tensor [N, C, *spatial] of any strides, seen with three spatial axes.

#include <array>
#include <cstdint>

#include "conv_plan.h"

namespace kfac_fast {

template <typename In>
struct ImageSource {
  const In* data;
  int64_t examples;
  int64_t channels;
  int64_t example_stride;
  int64_t channel_stride;
  std::array<int64_t, spatial_axes> strides;  // 0 where there is no such axis

  const In* at(int64_t example, int64_t channel) const {
    return data + example * example_stride + channel * channel_stride;
  }

  // After the last element of images of this size.
  const In* end(const std::array<int64_t, spatial_axes>& size) const {
    if (examples == 0 || channels == 0) return data;
    const In* last = at(examples - 1, channels - 1);
    for (int64_t i = 0; i < spatial_axes; ++i) last += (size[i] - 1) * strides[i];
    return last + 1;
  }
};

}  // namespace kfac_fast
