#pragma once
// The last step of a symmetric product: the sums of a tile of the lower triangle become entries of
// the matrix and of its mirror image, in one pass,
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
  T beta;        // 0: the matrix is not read
  int64_t edge;  // rows and columns of the matrix

  // Stores rows x columns sums, at most max_tile_edge columns, at matrix[row][column] and mirrored;
  // of a tile on the `diagonal` (row == column) entries above it are ignored.
  void operator()(const TileSums<T>& sums, int64_t rows, int64_t columns, bool diagonal, T* matrix,
                  int64_t row, int64_t column) const {
    constexpr int64_t height = 32;  // the mirror image is written by pairs of cache lines
    T values[height][max_tile_edge];
    for (int64_t top = 0; top < rows; top += height) {
      const int64_t count = std::min(height, rows - top);
      T* target = matrix + (row + top) * edge + column;
      T* mirror = matrix + column * edge + row + top;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t width = diagonal ? std::min(columns, top + r + 1) : columns;
        finish(sums.at(top + r, 0), width, target + r * edge, values[r]);
      }
      const int64_t left_of_diagonal = diagonal ? std::min(top, columns) : columns;
      transpose(values[0], max_tile_edge, count, left_of_diagonal, mirror, edge);
      for (int64_t c = left_of_diagonal; c < std::min(columns, top + count); ++c) {
        for (int64_t r = c - top; r < count; ++r) mirror[c * edge + r] = target[r * edge + c];
      }
    }
  }

  // The same of any number of columns.
  void wide(const TileSums<T>& sums, int64_t rows, int64_t columns, bool diagonal, T* matrix,
            int64_t row, int64_t column) const {
    for (int64_t c = 0; c < columns; c += max_tile_edge) {
      const int64_t width = std::min(max_tile_edge, columns - c);
      const int64_t above = diagonal ? c : 0;  // rows whose entries here lie above the diagonal
      const int64_t square = diagonal ? std::min(max_tile_edge, rows - above) : 0;
      if (diagonal)
        (*this)(sums.at(above, c), square, width, true, matrix, row + above, column + c);
      (*this)(sums.at(above + square, c), rows - above - square, width, false, matrix,
              row + above + square, column + c);
    }
  }

 private:
  // One row, to the matrix and to `values`.
  void finish(const TileSums<T>& sums, int64_t width, T* __restrict target,
              T* __restrict values) const {
    const T* sum = sums.data;
    if (sums.parts > 1) {
      for (int64_t c = 0; c < width; ++c) values[c] = sum[c] + sum[sums.distance + c];
      for (int64_t part = 2; part < sums.parts; ++part) {
        const T* more = sum + part * sums.distance;
        for (int64_t c = 0; c < width; ++c) values[c] += more[c];
      }
      sum = values;
    }
    if (beta == 0) {
      for (int64_t c = 0; c < width; ++c) target[c] = values[c] = alpha * sum[c];
    } else {
      for (int64_t c = 0; c < width; ++c) {
        target[c] = values[c] = alpha * sum[c] + beta * target[c];
      }
    }
  }
};

}  // namespace kfac_fast
