#pragma once
// Systems of equations whose matrix is a Cholesky factor L or its transpose, by packed products.
//
// The unknowns X of L X = -B take the place of B from the first block of rows to the last, one
// vector's width of rows P at a time, with the blocks before it already in place:
//
//   X[P] = -L[P][P]^-1 (B[P] + L[P][before] X[before])
//
// so that products are added; two solves in a row give back the sign. For L^T the last block comes
// first. Several blocks, a chunk that stays in the nearest cache, are solved before what they give
// to all others is added.

#include <algorithm>
#include <cstdint>

#include "gram_layout.h"
#include "instruction_set.h"
#include "strided.h"
#include "tile_product.h"

namespace kfac_fast {

#define KFAC_FAST_BODY "triangular_solve_body.h"
#include "compile_for_instruction_sets.h"

template <typename T>
using TriangleInverse = void (*)(const T* square, int64_t stride, int64_t size, T* inverse);

template <typename T>
TriangleInverse<T> triangle_inverse(InstructionSet set) {
  return KFAC_FAST_FORM(set, invert_triangle<T>);
}

// With a factor of `size` rows, of which only the lower triangle is read.
template <typename T>
class TriangularSolve {
 public:
  TriangularSolve(InstructionSet set, int64_t size)
      : product_(tile_product<T>(set)),
        pack_(packing<T, T>(set)),
        invert_triangle_(triangle_inverse<T>(set)),
        store_square_(square_store<T>(set)),
        lanes_(product_.lanes),
        width_(product_.panel_width()),
        size_(size),
        panel_size_(size * width_ + 64 / static_cast<int64_t>(sizeof(T))),
        squares_size_(round_up(size, lanes_) * lanes_) {}

  // Numbers of memory for the packed factor, and for one panel's solve.
  int64_t packed_size() const { return 2 * (panels() * panel_size_ + squares_size_); }
  int64_t scratch_size() const { return lanes_ * width_; }

  // Packs the factor, and its transpose, which is the left operand of a solve with itself.
  template <typename Share>
  void pack(const Strided<T>& factor, T* packed, const Share& share) const {
    const Operands operands = operands_in(packed);
    const auto n = static_cast<double>(size_);
    share(panels(), n * n, [&](int64_t panel) {
      const int64_t first = panel * width_;
      const int64_t columns = std::min(width_, size_ - first);
      T* turned = operands.turned + panel * panel_size_;
      T* plain = operands.plain + panel * panel_size_ + first * width_;
      pack_columns(factor.from(first, 0).transposed(), first + columns, columns, turned);
      pack_columns(factor.from(first, first), size_ - first, columns, plain);
      for (int64_t i = 0; i < columns; i += lanes_) {
        T* square = operands.plain_squares + (first + i) * lanes_;
        T* square_turned = operands.turned_squares + (first + i) * lanes_;
        invert_triangle_(plain + i * width_ + i, width_, columns - i, square);
        store_square_(square, lanes_, lanes_, square_turned, lanes_);
      }
    });
  }

  // panel <- L^-T L^-1 panel, whose rows are as long as a full tile. It has whole tiles of rows.
  void operator()(T* packed, T* panel, int64_t columns, T* scratch) const {
    const Operands operands = operands_in(packed);
    solve<true>(operands.turned, operands.turned_squares, panel, columns, scratch);
    solve<false>(operands.plain, operands.plain_squares, panel, columns, scratch);
  }

 private:
  static constexpr int64_t chunk = 96;  // rows; whole panels of every instruction set

  struct Operands {
    T *turned, *plain, *turned_squares, *plain_squares;
  };

  int64_t panels() const { return divide_up(size_, width_); }

  Operands operands_in(T* packed) const {
    T* plain = packed + panels() * panel_size_;
    T* squares = plain + panels() * panel_size_;
    return {packed, plain, squares, squares + squares_size_};
  }

  void pack_columns(const Strided<T>& from, int64_t rows, int64_t columns, T* panel) const {
    pack_(from.data, from.row_stride, from.column_stride, rows, columns, width_, panel, width_, 0);
  }

  // The unknowns of the first rows come first, or those of the last.
  template <bool is_forward>
  void solve(const T* left, const T* squares, T* panel, int64_t columns, T* scratch) const {
    const int64_t chunks = divide_up(size_, chunk);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = (is_forward ? i : chunks - 1 - i) * chunk;
      const int64_t end = std::min(first + chunk, size_);
      const int64_t blocks = divide_up(end - first, lanes_);
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t row = first + (is_forward ? j : blocks - 1 - j) * lanes_;
        const int64_t rows = std::min(lanes_, end - row);
        if (is_forward) {
          add(left, first, row, row, rows, panel, columns);
        } else {
          add(left, row + rows, end, row, rows, panel, columns);
        }
        T* target = panel + row * width_;
        std::copy_n(target, rows * width_, scratch);
        multiply_panels(product_, {squares + row * lanes_, rows, lanes_, lanes_, 0}, rows,
                        {scratch, rows, width_, width_, 0}, columns, false, target, width_, false);
      }
      if (is_forward) {
        add(left, first, end, end, size_ - end, panel, columns);
      } else {
        add(left, first, end, 0, first, panel, columns);
      }
    }
  }

  // panel[row + r] += Σ_{first <= k < end} left[k][row + r] panel[k]
  void add(const T* left, int64_t first, int64_t end, int64_t row, int64_t rows, T* panel,
           int64_t columns) const {
    if (first == end || rows == 0) return;
    const Panels<T> operand{left + first * width_, end - first, width_, width_, panel_size_};
    const Panels<T> solved{panel + first * width_, end - first, width_, width_, 0};
    multiply_panels(product_, operand.from(row), rows, solved, columns, false, panel + row * width_,
                    width_, true);
  }

  const TileProduct<T>& product_;
  const Packing<T, T> pack_;
  const TriangleInverse<T> invert_triangle_;
  const SquareStore<T> store_square_;
  const int64_t lanes_, width_;
  const int64_t size_;
  const int64_t panel_size_;  // panels a power of two apart would displace each other
  const int64_t squares_size_;
};

}  // namespace kfac_fast
