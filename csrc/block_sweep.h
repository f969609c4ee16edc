#pragma once
// The inverse of a symmetric positive definite matrix by sweeps of blocks of pivots.
//
// Sweeping a block P of rows and columns of the symmetric matrix A makes it
//
//   A[i][j] - A[i][P] A[P][P]^-1 A[P][j]   |   A[i][P] A[P][P]^-1
//   ---------------------------------------+----------------------      i, j outside of P
//   A[P][P]^-1 A[P][j]                     |   -A[P][P]^-1
//
// and after every block was swept, -A^-1. What a sweep finds in its block is the Schur complement
// of the blocks before, so the pivots are the squares of the Cholesky factor's diagonal: their
// product is the determinant, and the first that is not positive tells which leading minor is not.
//
// Only the lower triangle is kept. A sweep costs one product of the panels
//
//   U[k][i] = A[P_k][i],   W[k][i] = -(A[P][P]^-1 U)[k][i]
//
// which are zero for i in P: A += W^T U. The block itself is inverted by sweeps of smaller blocks,
// and a block as wide as a vector in registers.

#include <algorithm>
#include <array>
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
using SquareSweep = int64_t (*)(T* square, int64_t stride, T* pivots);

template <typename T>
SquareSweep<T> square_sweep(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return avx512::sweep_square<T>;
  if (set == InstructionSet::avx2) return avx2::sweep_square<T>;
#endif
  return portable::sweep_square<T>;
}

// Sweeps matrices of up to `size` rows, which must be a multiple of a vector's lanes.
template <typename T>
class BlockSweep {
 public:
  BlockSweep(InstructionSet set, int64_t size)
      : product_(tile_product<T>(set)),
        sweep_square_(square_sweep<T>(set)),
        store_square_(square_store<T>(set)),
        lanes_(product_.lanes),
        width_(product_.panel_width()) {
    for (; size > lanes_; size = levels_[depth_++].block) levels_[depth_] = level(size);
  }

  // Rows of a matrix lie this far apart: an odd number of lines, so that those under each other do
  // not displace each other from the caches.
  int64_t row_stride(int64_t size) const { return size + (size / lanes_ % 2 == 0 ? lanes_ : 0); }

  // Numbers of scratch memory.
  int64_t scratch_size() const {
    int64_t size = lanes_;
    for (int64_t i = 0; i < depth_; ++i) size += levels_[i].scratch;
    return size;
  }

  // A <- -A^-1, in and below the blocks on the diagonal. Returns the first pivot that is not
  // positive and finite, or `size`; adds the logarithms of those before to `logdet`. `share` runs
  // loops whose passes may go to several threads: share(passes, multiply-adds, run).
  template <typename Share>
  int64_t operator()(T* a, int64_t size, T* scratch, double& logdet, const Share& share) const {
    return sweep(0, a, row_stride(size), size, scratch, logdet, share);
  }

 private:
  struct Level {
    int64_t size = 0, block = 0;
    int64_t panel_size = 0;  // of a panel of U or W
    int64_t scratch = 0;
  };

  // Blocks that are small beside the matrix cost little on top of the n^3 / 2 multiply-adds of its
  // updates; larger ones leave tiles longer in registers.
  int64_t block_of(int64_t size) const {
    const int64_t fitting = size <= 128 ? 0 : size <= 640 ? 32 : size <= 1536 ? 64 : 128;
    return std::max(fitting, lanes_);
  }

  Level level(int64_t size) const {
    Level level{size, block_of(size), 0, 0};
    level.panel_size = level.block * width_ + lanes_;
    const int64_t panels = divide_up(size, width_);
    level.scratch = 2 * panels * level.panel_size + level.block * row_stride(level.block);
    return level;
  }

  template <typename Share>
  int64_t sweep(int64_t depth, T* a, int64_t stride, int64_t size, T* scratch, double& logdet,
                const Share& share) const {
    if (size <= lanes_) return sweep_vector(a, stride, scratch, logdet);
    const Level& level = levels_[depth];
    T* u = scratch;
    T* w = u + divide_up(level.size, width_) * level.panel_size;
    T* block = w + divide_up(level.size, width_) * level.panel_size;
    T* rest = scratch + level.scratch;
    for (int64_t first = 0; first < size; first += level.block) {
      const int64_t count = std::min(level.block, size - first);
      const int64_t block_stride = row_stride(count);
      T* corner = a + first * stride + first;
      copy_rows(corner, stride, count, block, block_stride);
      const int64_t done = sweep(depth + 1, block, block_stride, count, rest, logdet, InOrder{});
      if (done < count) return first + done;
      mirror(block, block_stride, count);
      const Panels<T> left{block, count, block_stride, block_stride, block_stride};
      const Panels<T> right{u, count, width_, width_, level.panel_size};
      const double products = static_cast<double>(count) * size;
      share(divide_up(size, width_), products * count, [&](int64_t panel) {
        const int64_t column = panel * width_;
        const int64_t columns = std::min(width_, size - column);
        T* w_panel = w + panel * level.panel_size;
        read_panel(a, stride, first, count, column, columns, u + panel * level.panel_size);
        multiply_panels(product_, left, count, right.from(column), columns, false, w_panel, width_,
                        false);
        write_panel(w_panel, first, count, column, columns, a, stride);
      });
      copy_rows(block, block_stride, count, corner, stride);
      update(a, stride, size, {w, count, width_, width_, level.panel_size}, right, share);
    }
    return size;
  }

  // A += W^T U in and below the diagonal, by tiles that leave the panels in the caches.
  template <typename Share>
  void update(T* a, int64_t stride, int64_t size, const Panels<T>& w, const Panels<T>& u,
              const Share& share) const {
    const int64_t edge = 4 * width_;
    const int64_t side = divide_up(size, edge);
    const double products = static_cast<double>(u.depth) * size * size / 2;
    share(side * (side + 1) / 2, products, [&](int64_t tile) {
      int64_t r = side - 1;  // the longest rows first
      while (tile > r) tile -= r-- + 1;
      const int64_t row = r * edge, column = tile * edge;
      multiply_panels(product_, w.from(row), std::min(edge, size - row), u.from(column),
                      std::min(edge, size - column), row == column, a + row * stride + column,
                      stride, true);
    });
  }

  int64_t sweep_vector(T* a, int64_t stride, T* pivots, double& logdet) const {
    mirror(a, stride, lanes_);
    const int64_t done = sweep_square_(a, stride, pivots);
    for (int64_t k = 0; k < done; ++k) logdet += std::log(static_cast<double>(pivots[k]));
    return done;
  }

  static void copy_rows(const T* from, int64_t from_stride, int64_t size, T* to,
                        int64_t to_stride) {
    for (int64_t r = 0; r < size; ++r)
      std::copy_n(from + r * from_stride, size, to + r * to_stride);
  }

  static void mirror(T* a, int64_t stride, int64_t size) {
    for (int64_t r = 1; r < size; ++r) {
      for (int64_t c = 0; c < r; ++c) a[c * stride + r] = a[r * stride + c];
    }
  }

  // u[k][i] = A[first + k][column + i], zero inside of the block.
  void read_panel(const T* a, int64_t stride, int64_t first, int64_t count, int64_t column,
                  int64_t columns, T* u) const {
    for (int64_t i = column; i < column + columns; i += lanes_) {
      T* target = u + i - column;
      for (int64_t k = 0; k < count; k += lanes_) {
        if (i >= first + count) {
          store_square_(a + i * stride + first + k, stride, lanes_, target + k * width_, width_);
          continue;
        }
        for (int64_t r = k; r < k + lanes_; ++r) {
          if (i < first) {
            std::copy_n(a + (first + r) * stride + i, lanes_, target + r * width_);
          } else {
            std::fill_n(target + r * width_, lanes_, T{0});
          }
        }
      }
    }
  }

  // A[first + k][column + i] = -w[k][i] outside of the block.
  void write_panel(const T* w, int64_t first, int64_t count, int64_t column, int64_t columns, T* a,
                   int64_t stride) const {
    for (int64_t i = column; i < column + columns; i += lanes_) {
      const T* source = w + i - column;
      for (int64_t k = 0; k < count; k += lanes_) {
        if (i >= first + count) {
          T* target = a + i * stride + first + k;
          store_square_(source + k * width_, width_, lanes_, target, stride);
          for (int64_t r = 0; r < lanes_; ++r) negate(target + r * stride);
        } else if (i < first) {
          for (int64_t r = k; r < k + lanes_; ++r) {
            T* target = a + (first + r) * stride + i;
            std::copy_n(source + r * width_, lanes_, target);
            negate(target);
          }
        }
      }
    }
  }

  void negate(T* values) const {
    for (int64_t c = 0; c < lanes_; ++c) values[c] = -values[c];
  }

  const TileProduct<T>& product_;
  const SquareSweep<T> sweep_square_;
  const SquareStore<T> store_square_;
  const int64_t lanes_, width_;
  std::array<Level, 4> levels_;
  int64_t depth_ = 0;
};

}  // namespace kfac_fast
