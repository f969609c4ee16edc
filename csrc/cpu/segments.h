#pragma once
// The rows that belong to each segment.

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

namespace kfac_fast {

struct Segments {
  std::vector<int64_t> begin;  // [count + 1], into rows
  std::vector<int64_t> rows;   // those of each segment in order

  // `ids` names the segment of every row.
  Segments(const Tensor& ids, int64_t count, const char* op) : begin(count + 1), rows(ids.size(0)) {
    const auto* data = static_cast<const int64_t*>(ids.const_data_ptr());
    const auto id_of = [&](int64_t row) { return data[row * ids.stride(0)]; };
    const auto total = static_cast<int64_t>(rows.size());
    for (int64_t row = 0; row < total; ++row) {
      const int64_t id = id_of(row);
      if (id < 0 || id >= count) {
        throw std::invalid_argument(std::string(op) + ": segments must be in [0, " +
                                    std::to_string(count) + "), got " + std::to_string(id));
      }
      ++begin[id + 1];
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t row = 0; row < total; ++row) rows[next[id_of(row)]++] = row;
  }
};

}  // namespace kfac_fast
