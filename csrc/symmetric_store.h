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

// The functions of one instruction set, for T = float or double.
template <typename T>
struct SymmetricStoreFunctions {
  using Multiply = void (*)(const Panels<T>& strip, int64_t begin, int64_t end, const T* right,
                            T alpha, T beta, T* target, T* mirror, int64_t edge);

  void (*store)(const TileSums<T>& sums, int64_t rows, int64_t columns, bool diagonal, T alpha,
                T beta, T* target, T* mirror, int64_t edge, bool past_caches);
  void (*multiply_rows)(const Panels<T>& panels, int64_t row, int64_t rows, int64_t columns,
                        T alpha, T* target, const T* end, int64_t edge, bool past_caches);
  void (*multiply_symmetric_past_caches)(const Panels<T>& strip, int64_t begin, int64_t end,
                                         const T* right, int64_t columns, T alpha, T* target,
                                         T* mirror, int64_t edge);
  Multiply multiply_symmetric[3];  // [vectors - 1]
};

#define KFAC_FAST_BODY "symmetric_store_body.h"
#include "compile_for_instruction_sets.h"

template <typename T>
const SymmetricStoreFunctions<T>& symmetric_store_functions(InstructionSet set) {
  return KFAC_FAST_FORM(set, symmetric_store_functions<T>);
}

// Compiled once, in symmetric_store.cpp.
extern template const SymmetricStoreFunctions<float>& symmetric_store_functions(InstructionSet set);
extern template const SymmetricStoreFunctions<double>& symmetric_store_functions(
    InstructionSet set);

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
    const bool past = past_caches() && aligned(target) && aligned(mirror);
    functions().store(sums, rows, columns, diagonal, alpha, beta, target, mirror, edge, past);
    if (past) finish_stores();
  }

  // Asks for the cache lines of `count` entries of a row of the matrix, to be stored soon, unless
  // that goes past the caches. Always inlined: compilers drop calls that only prefetch.
  __attribute__((always_inline)) void prefetch(const T* matrix, int64_t row, int64_t column,
                                               int64_t count) const {
    if (past_caches()) return;
    constexpr int64_t entries = line / static_cast<int64_t>(sizeof(T));
    const T* target = matrix + row * edge + column;
    for (int64_t c = 0; c < count; c += entries) __builtin_prefetch(target + c, 1);
    __builtin_prefetch(target + count - 1, 1);
  }

  // Stores any number of columns.
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

  // Stores a tile of the products of the strip's columns with each other without keeping their
  // sums: best for few k. On the diagonal squares a panel wide are multiplied in both triangles.
  // False, and nothing done, where that is not possible.
  bool multiply(const Panels<T>& strip, int64_t row, int64_t rows, int64_t column, int64_t columns,
                T* matrix) const {
    const bool past = past_caches() && aligned(matrix);
    const int64_t lanes = tile_product<T>(set).lanes, height = past ? lanes : lanes / 2;
    const bool diagonal = row == column;
    if (diagonal && beta != 0) return false;  // squares are stored without being read
    if (rows % height != 0 || columns % lanes != 0) return false;
    for (int64_t c = column; c < column + columns; c += strip.width) {
      const int64_t width = std::min(strip.width, column + columns - c);
      T *target = matrix + c, *mirror = matrix + c * edge;
      if (diagonal) multiply_rows(strip.from(c), 0, width, width, mirror + c, mirror + c, past);
      const int64_t begin = diagonal ? c + width : row, end = row + rows;
      if (past) {
        functions().multiply_symmetric_past_caches(strip, begin, end, strip.at(c), width, alpha,
                                                   target, mirror, edge);
      } else {
        functions().multiply_symmetric[width / lanes - 1](strip, begin, end, strip.at(c), alpha,
                                                          beta, target, mirror, edge);
      }
    }
    if (past) finish_stores();
    return true;
  }

  // Stores rows of the whole matrix, both triangles, as products of the panels' columns: twice the
  // products, but the lines are written in order. Needs beta == 0, a `row` where a full tile
  // product begins, and panels as wide as one where there are as many columns.
  void multiply_all(const Panels<T>& panels, int64_t row, int64_t rows, int64_t columns,
                    T* matrix) const {
    const bool past = past_caches() && aligned(matrix);
    T* target = matrix + row * edge;
    // Where no gap lies between the rows, vectors may reach over what this call stores later.
    const T* end = columns == edge ? target + rows * edge : target;
    multiply_rows(panels, row, rows, columns, target, end, past);
    if (past) finish_stores();
  }

  // A matrix that no cache holds is not read into one to be written, if its rows are aligned. It
  // takes vectors as long as a line: stores of halves past the caches were slower than the reading.
  bool past_caches() const {
    constexpr int64_t large = 8 << 20;
    const int64_t row_bytes = edge * static_cast<int64_t>(sizeof(T));
    return set == InstructionSet::avx512 && beta == 0 && row_bytes % line == 0 &&
           edge * row_bytes >= large;
  }

 private:
  static constexpr int64_t line = 64;  // bytes

  const SymmetricStoreFunctions<T>& functions() const { return symmetric_store_functions<T>(set); }

  static bool aligned(const T* entry) { return reinterpret_cast<uintptr_t>(entry) % line == 0; }

  // After stores past the caches, before this thread says that it is done.
  static void finish_stores() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
  }

  void multiply_rows(const Panels<T>& panels, int64_t row, int64_t rows, int64_t columns, T* target,
                     const T* end, bool past) const {
    functions().multiply_rows(panels, row, rows, columns, alpha, target, end, edge, past);
  }
};

}  // namespace kfac_fast
