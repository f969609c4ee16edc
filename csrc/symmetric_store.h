#pragma once
// The last step of a symmetric product: sums of one tile of the lower triangle become entries of the
// matrix and of its mirror image, in one pass,
//
//   out[i][j], out[j][i] <- beta · out[i][j] + alpha · sum[i][j]        i >= j

#include <algorithm>
#include <cstdint>

#include "transpose.h"

namespace kfac_fast {

constexpr int64_t max_tile_edge = 96;

// Where a tile's sums lie: several partial sums of the same tile are added in order.
template <typename T>
struct TileSums {
  const T* data;
  int64_t stride;    // between rows
  int64_t parts;     // partial sums
  int64_t distance;  // between the same entry of two parts

  TileSums at(int64_t row, int64_t column) const {
    return {data + row * stride + column, stride, parts, distance};
  }
};

template <typename T>
struct SymmetricStore {
  T alpha;
  T beta;  // 0: the matrix is not read
  int64_t edge;

  // Stores rows x columns sums (at most max_tile_edge columns) at matrix[row][column] and mirrored;
  // with `lower`, the tile lies on the diagonal (row == column) and entries above it are ignored.
  void operator()(const TileSums<T>& sums, int64_t rows, int64_t columns, bool lower, T* matrix,
                  int64_t row, int64_t column) const {
    constexpr int64_t height = 16;  // floats of a cache line: the mirror image is written by lines
    T values[height][max_tile_edge];
    for (int64_t top = 0; top < rows; top += height) {
      const int64_t count = std::min(height, rows - top);
      const int64_t full = lower ? std::min(top, columns) : columns;  // columns below the diagonal
      for (int64_t r = 0; r < count; ++r) {
        const int64_t width = lower ? std::min(columns, top + r + 1) : columns;
        finish(sums.at(top + r, 0), width, matrix + (row + top + r) * edge + column, values[r]);
      }
      T* mirror = matrix + column * edge + row + top;
      transpose(values[0], max_tile_edge, count, full, mirror, edge);
      for (int64_t c = full; c < std::min(columns, top + count); ++c) {
        for (int64_t r = c - top; r < count; ++r) mirror[c * edge + r] = values[r][c];
      }
    }
  }

 private:
  void finish(const TileSums<T>& sums, int64_t width, T* target, T* values) const {
    std::copy_n(sums.data, width, values);
    for (int64_t part = 1; part < sums.parts; ++part) {
      const T* more = sums.data + part * sums.distance;
      for (int64_t c = 0; c < width; ++c) values[c] += more[c];
    }
    if (beta == 0) {
      for (int64_t c = 0; c < width; ++c) values[c] *= alpha;
    } else {
      for (int64_t c = 0; c < width; ++c) values[c] = alpha * values[c] + beta * target[c];
    }
    std::copy_n(values, width, target);
  }
};

}  // namespace kfac_fast
