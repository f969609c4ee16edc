#pragma once
// The last step of a symmetric product: the sums of a tile of the lower triangle become entries of
// the matrix and of its mirror image, in one pass,
//
//   out[i][j], out[j][i] <- beta · out[i][j] + alpha · sum[i][j]        i >= j

#include <algorithm>
#include <cstdint>

#include "instruction_set.h"
#include "tile_product.h"

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

#define KFAC_FAST_BODY "symmetric_store_body.h"
#include "compile_for_instruction_sets.h"

template <typename T>
struct SymmetricStore {
  T alpha;
  T beta;        // 0: the matrix is not read
  int64_t edge;  // rows and columns of the matrix
  InstructionSet set = instruction_set_in_use();

  // Stores rows x columns sums, at most max_tile_edge columns, at matrix[row][column] and mirrored;
  // of a tile on the `diagonal` (row == column) entries above it are ignored.
  void operator()(const TileSums<T>& sums, int64_t rows, int64_t columns, bool diagonal, T* matrix,
                  int64_t row, int64_t column) const {
    T* target = matrix + row * edge + column;
    T* mirror = matrix + column * edge + row;
    auto store = portable::store_symmetric<T>;
#if defined(__x86_64__)
    if (set == InstructionSet::avx512) store = avx512::store_symmetric<T>;
    if (set == InstructionSet::avx2) store = avx2::store_symmetric<T>;
#endif
    // A matrix that no cache holds is not read into one to be written, if its rows are aligned.
    constexpr int64_t large = 8 << 20, line = 64;
    const int64_t row_bytes = edge * static_cast<int64_t>(sizeof(T));
    const bool aligned = row_bytes % line == 0 && reinterpret_cast<uintptr_t>(target) % line == 0 &&
                         reinterpret_cast<uintptr_t>(mirror) % line == 0;
    const bool past_caches = beta == 0 && aligned && edge * row_bytes >= large;
    store(sums, rows, columns, diagonal, alpha, beta, target, mirror, edge, past_caches);
  }

  // The same of any number of columns.
  void wide(const TileSums<T>& sums, int64_t rows, int64_t columns, bool diagonal, T* matrix,
            int64_t row, int64_t column) const {
    for (int64_t c = 0; c < columns; c += max_tile_edge) {
      const int64_t width = std::min(max_tile_edge, columns - c);
      const int64_t above = diagonal ? c : 0;  // rows whose entries here lie above the diagonal
      const int64_t square = diagonal ? std::min(max_tile_edge, rows - above) : 0;
      if (diagonal) {
        (*this)(sums.at(above, c), square, width, true, matrix, row + above, column + c);
      }
      (*this)(sums.at(above + square, c), rows - above - square, width, false, matrix,
              row + above + square, column + c);
    }
  }
};

}  // namespace kfac_fast
