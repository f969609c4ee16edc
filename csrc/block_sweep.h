#pragma once
// The inverse of a symmetric positive definite matrix by sweeps of blocks of pivots, and its
// Cholesky factor.
//
// Sweeping a block P of rows and columns of the symmetric matrix A makes it
//
//   A[i][j] - A[i][P] A[P][P]^-1 A[P][j]   |   A[i][P] A[P][P]^-1
//   ---------------------------------------+----------------------      i, j outside of P
//   A[P][P]^-1 A[P][j]                     |   -A[P][P]^-1
//
// and after every block was swept, -A^-1. What a sweep finds in its block is the Schur complement
// of the blocks before, L L^T. A product with its inverse would lose the digits that its condition
// number takes from it, twice over, so what is subtracted comes from L as in a Cholesky
// factorisation: with
//
//   U[k][i] = A[P_k][i],   V = L^-1 U,   W = L^-T V
//
// which are zero for i in P, A[i][j] loses (V^T V)[i][j] and A[P_k][i] becomes W[k][i]. V and W
// come from products with L^-1 or, where the block is a vector wide, as in small matrices, by
// substitution, which loses no digits to the condition of L and takes no longer. Pivots, the
// squares of L's diagonal, are those of the whole matrix' Cholesky factor: their product is the
// determinant, and the first that is not positive tells which leading minor is not.
//
// Where the matrix has a large mean, the first pivots subtract nearly all of it. There products are
// added to the matrix one by one, not their sum, whose rounding errors would be those of the mean.
// Each addition rounds, too: small matrices are updated so by every block, large ones, to which
// the many later blocks would add errors that grow with their size, by the first one only, and the
// largest, whose blocks are the widest, by none.
//
// Signs: the matrix is kept as -A, in its lower triangle, so that products are added; L^-1 as
// Y = -L^-1, which comes in pairs. L^-1 itself is found by the same steps with blocks as wide as a
// vector, each of which eliminates itself from the rows below it only.
//
// Without W, and with the block eliminated from the rows below it only, the same steps leave the
// Cholesky factor: L in the block's own rows and columns, V^T below them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "gram_layout.h"
#include "in_order.h"
#include "instruction_set.h"
#include "scratch.h"
#include "tile_product.h"

namespace kfac_fast {

#define KFAC_FAST_BODY "block_sweep_body.h"
#include "compile_for_instruction_sets.h"

template <typename T>
using VectorCopy = void (*)(const T* from, int64_t from_stride, int64_t count, T* to,
                            int64_t to_stride);

template <typename T>
VectorCopy<T> vector_copy(InstructionSet set) {
  return KFAC_FAST_FORM(set, copy_vectors<T>);
}

template <typename T>
using SquareInverse = int64_t (*)(T* square, int64_t stride, T* turned, int64_t pivots);

template <typename T>
SquareInverse<T> square_inverse(InstructionSet set) {
  return KFAC_FAST_FORM(set, invert_square<T>);
}

template <typename T>
using SquareSolve = void (*)(const T* turned, T* u, T* v, int64_t stride, int64_t columns,
                             int64_t own, int64_t pivots, bool both);

template <typename T>
SquareSolve<T> square_solve(InstructionSet set) {
  return KFAC_FAST_FORM(set, solve_square<T>);
}

enum class Sweep { inverse, cholesky };

// For matrices of `rows` rows, which go on as a negated identity up to whole vectors.
template <typename T>
class BlockSweep {
 public:
  BlockSweep(InstructionSet set, Sweep sweep, int64_t rows)
      : product_(tile_product<T>(set)),
        copy_vectors_(vector_copy<T>(set)),
        invert_square_(square_inverse<T>(set)),
        solve_square_(square_solve<T>(set)),
        store_square_(square_store<T>(set)),
        lanes_(product_.lanes),
        width_(product_.panel_width()),
        inverts_(sweep == Sweep::inverse),
        rows_(rows),
        size_(round_up(rows, lanes_)),
        // Blocks that are small beside the matrix cost little on top of the n^3 / 2 multiply-adds
        // of its updates; larger ones leave tiles longer in registers.
        block_(std::max(lanes_, size_ <= 128    ? lanes_
                                : size_ <= 640  ? int64_t{32}
                                : size_ <= 1536 ? int64_t{64}
                                                : int64_t{128})),
        panel_size_(block_ * width_ + lanes_),
        continued_(block_ <= 64 ? tile_product<T, true>(set) : product_) {}

  int64_t size() const { return size_; }  // in whole vectors

  // Rows of a matrix lie this far apart: an odd number of vectors, so that those under each other
  // do not displace each other from the caches.
  int64_t row_stride() const { return row_stride(size_); }

  // Numbers of scratch memory.
  int64_t scratch_size() const {
    const int64_t panels = divide_up(size_, width_) + divide_up(block_, width_);
    return 2 * panels * panel_size_ + 2 * block_ * row_stride(block_) + 2 * lanes_ * lanes_;
  }

  // a <- A^-1, or A's Cholesky factor, where a = -A, in and below the diagonal; squares of whole
  // vectors on the diagonal of an inverse have both of their triangles. Returns the first
  // pivot that is not positive and finite, or `size`; adds the logarithms of those before to
  // `logdet`, unless it is null. `share` runs loops whose passes may go to several threads; see
  // InOrder.
  template <typename Share>
  int64_t operator()(T* a, T* scratch, double* logdet, const Share& share) const {
    const int64_t stride = row_stride(), block_stride = row_stride(block_);
    T* y = scratch;
    T* y_turned = y + block_ * block_stride;
    T* u = y_turned + block_ * block_stride;
    T* v = u + divide_up(size_, width_) * panel_size_;
    T* rest = v + divide_up(size_, width_) * panel_size_;
    for (int64_t first = 0; first < size_; first += block_) {
      const int64_t count = std::min(block_, size_ - first);
      const int64_t pivots = std::min(count, rows_ - first);
      T* corner = a + first * stride + first;
      for (int64_t r = 0; r < count; ++r) {
        std::copy_n(corner + r * stride, count, y + r * block_stride);
      }
      const int64_t done = invert_factor(y, block_stride, count, pivots, rest, logdet,
                                         inverts_ ? nullptr : corner, stride);
      if (done < count) return first + done;
      if (inverts_) {
        const Panels<T> factor{y, count, block_stride, width_, width_};
        multiply_panels(product_, factor, count, factor, count, true, corner, stride, false);
      }
      const int64_t begin = inverts_ ? 0 : first + count;  // of the rows that it is eliminated from
      const int64_t left = size_ - begin;
      if (left == 0 || count == size_) break;
      if (count > lanes_) turn(y, block_stride, count, y_turned, block_stride);
      const double products = static_cast<double>(count * count) * static_cast<double>(left);
      share(divide_up(left, width_), products, [&](int64_t panel) {
        const int64_t column = begin + panel * width_;
        const int64_t columns = std::min(width_, size_ - column);
        T* u_panel = u + panel * panel_size_;
        T* v_panel = v + panel * panel_size_;
        read_panel(a, stride, first, count, column, columns, u_panel);
        if (count == lanes_) {
          solve_square_(factor_turned(rest), u_panel, v_panel, width_, columns, first - column,
                        pivots, inverts_);
        } else {
          multiply_upper(y_turned, block_stride, count, u_panel, columns, v_panel);
          if (inverts_) multiply_lower(y, block_stride, count, v_panel, columns, u_panel);
        }
        write_panel(inverts_ ? u_panel : v_panel, first, count, column, columns, a, stride);
      });
      const bool one_by_one = first == 0 || size_ <= most_continued;
      update(one_by_one ? continued_ : product_, a + begin * stride + begin, stride, rows_ - begin,
             {v, pivots, width_, width_, panel_size_}, first - begin, count, share);
    }
    return size_;
  }

 private:
  int64_t row_stride(int64_t size) const { return size + (size / lanes_ % 2 == 0 ? lanes_ : 0); }

  // Where invert_factor() leaves the last square's L^T in its scratch memory.
  T* factor_turned(T* scratch) const { return scratch + lanes_ * lanes_; }

  // y <- -L^-1 where y = -L L^T in and below the diagonal, above which it becomes zero, with a
  // negated identity after `pivots` rows; `factor` <- L, unless it is null. Returns as operator().
  int64_t invert_factor(T* y, int64_t stride, int64_t size, int64_t pivots, T* scratch,
                        double* logdet, T* factor, int64_t factor_stride) const {
    T* square_turned = scratch;
    T* factor_turned = this->factor_turned(scratch);
    T* u = factor_turned + lanes_ * lanes_;
    T* v = u + divide_up(size, width_) * panel_size_;
    for (int64_t first = 0; first < size; first += lanes_) {
      T* square = y + first * stride + first;
      const int64_t done =
          invert_square_(square, stride, factor_turned, std::min(lanes_, pivots - first));
      if (logdet) {
        for (int64_t k = 0; k < done; ++k) {
          *logdet += 2 * std::log(static_cast<double>(factor_turned[k * lanes_ + k]));
        }
      }
      if (done < lanes_) return first + done;
      if (factor) {
        T* place = factor + first * factor_stride + first;
        store_square_(factor_turned, lanes_, lanes_, place, factor_stride);
      }
      if (size == lanes_) return size;
      turn(square, stride, lanes_, square_turned, lanes_);
      for (int64_t column = 0; column < size; column += width_) {
        const int64_t columns = std::min(width_, size - column);
        T* u_panel = u + column / width_ * panel_size_;
        T* v_panel = v + column / width_ * panel_size_;
        read_panel(y, stride, first, lanes_, column, columns, u_panel);
        multiply_upper(square_turned, lanes_, lanes_, u_panel, columns, v_panel);
        // The block's own columns meet an identity, whose product is the square.
        if (column <= first && first < column + columns) {
          copy_vectors_(square, stride, lanes_, v_panel + first - column, width_);
        }
        if (factor) {
          const int64_t skipped = std::max(first + lanes_ - column, int64_t{0});
          for (int64_t i = skipped; i < columns; i += lanes_) {
            T* place = factor + (column + i) * factor_stride + first;
            store_square_(v_panel + i, width_, lanes_, place, factor_stride);
          }
        }
        if (column < first) {  // what lies beyond the diagonal is made zero below
          const int64_t vectors = std::min(columns, first - column);
          for (int64_t i = 0; i < vectors; i += lanes_) {
            copy_vectors_(v_panel + i, width_, lanes_, y + first * stride + column + i, stride);
          }
        }
      }
      for (int64_t r = first; r < first + lanes_; ++r) {
        std::fill(y + r * stride + first + lanes_, y + r * stride + size, T{0});
      }
      for (int64_t r = first + lanes_; r < size; ++r) {
        std::fill_n(y + r * stride + first, lanes_, T{0});
      }
      const Panels<T> panels{v, lanes_, width_, width_, panel_size_};
      for (int64_t c = 0; c < size; c += width_) {
        for (int64_t r = std::max(c / product_.rows * product_.rows, first + lanes_); r < size;
             r += product_.rows) {
          const auto tile = continued_.covering(
              product_.rows, std::min({width_, size - c, r + product_.rows - c}));
          tile(panels.at(r), width_, panels.at(c), width_, lanes_, y + r * stride + c, stride,
               true);
        }
      }
    }
    return size;
  }

  // sums[k][i] = Σ_{j <= k} left[j][k] right[j][i]
  void multiply_upper(const T* left, int64_t stride, int64_t count, const T* right, int64_t columns,
                      T* sums) const {
    for (int64_t r = 0; r < count; r += product_.rows) {
      product_.covering(product_.rows, columns)(left + r, stride, right, width_, r + product_.rows,
                                                sums + r * width_, width_, false);
    }
  }

  // sums[k][i] = Σ_{j >= k} left[j][k] right[j][i]
  void multiply_lower(const T* left, int64_t stride, int64_t count, const T* right, int64_t columns,
                      T* sums) const {
    for (int64_t r = 0; r < count; r += product_.rows) {
      product_.covering(product_.rows, columns)(left + r * stride + r, stride, right + r * width_,
                                                width_, count - r, sums + r * width_, width_,
                                                false);
    }
  }

  // a += V^T V in and below the diagonal, by tiles that leave the panels in the caches. The `zeros`
  // columns of V from `first_zero` on are zero, if there are such.
  template <typename Share>
  void update(const TileProduct<T>& product, T* a, int64_t stride, int64_t size, const Panels<T>& v,
              int64_t first_zero, int64_t zeros, const Share& share) const {
    const int64_t edge = 4 * width_;
    const int64_t side = divide_up(size, edge);
    const auto products = static_cast<double>(v.depth) * static_cast<double>(size * size / 2);
    share(side * (side + 1) / 2, products, [&](int64_t tile) {
      int64_t r = side - 1;  // the longest rows first
      while (tile > r) tile -= r-- + 1;
      const int64_t row = r * edge, column = tile * edge;
      multiply_panels(product, v.from(row), std::min(edge, size - row), v.from(column),
                      std::min(edge, size - column), row == column, a + row * stride + column,
                      stride, true, first_zero - row, zeros);
    });
  }

  // turned[c][r] = a[r][c]
  void turn(const T* a, int64_t stride, int64_t size, T* turned, int64_t turned_stride) const {
    for (int64_t r = 0; r < size; r += lanes_) {
      for (int64_t c = 0; c < size; c += lanes_) {
        store_square_(a + r * stride + c, stride, lanes_, turned + c * turned_stride + r,
                      turned_stride);
      }
    }
  }

  // u[k][i] = a[first + k][column + i], zero inside of the block.
  void read_panel(const T* a, int64_t stride, int64_t first, int64_t count, int64_t column,
                  int64_t columns, T* u) const {
    for (int64_t i = column; i < column + columns; i += lanes_) {
      T* target = u + i - column;
      if (i < first) {
        copy_vectors_(a + first * stride + i, stride, count, target, width_);
      } else if (i < first + count) {
        static constexpr T zeros[64 / sizeof(T)] = {};
        copy_vectors_(zeros, 0, count, target, width_);
      } else {
        for (int64_t k = 0; k < count; k += lanes_) {
          store_square_(a + i * stride + first + k, stride, lanes_, target + k * width_, width_);
        }
      }
    }
  }

  // a[first + k][column + i] = w[k][i] outside of the block.
  void write_panel(const T* w, int64_t first, int64_t count, int64_t column, int64_t columns, T* a,
                   int64_t stride) const {
    for (int64_t i = column; i < column + columns; i += lanes_) {
      const T* source = w + i - column;
      if (i < first) {
        copy_vectors_(source, width_, count, a + first * stride + i, stride);
      } else if (i >= first + count) {
        for (int64_t k = 0; k < count; k += lanes_) {
          store_square_(source + k * width_, width_, lanes_, a + i * stride + first + k, stride);
        }
      }
    }
  }

  static constexpr int64_t most_continued = 128;

  const TileProduct<T>& product_;
  const VectorCopy<T> copy_vectors_;
  const SquareInverse<T> invert_square_;
  const SquareSolve<T> solve_square_;
  const SquareStore<T> store_square_;
  const int64_t lanes_, width_;
  const bool inverts_;
  const int64_t rows_, size_, block_;
  const int64_t panel_size_;         // of U, V or W
  const TileProduct<T>& continued_;  // unless blocks are too wide
};

}  // namespace kfac_fast
