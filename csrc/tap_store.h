#pragma once
// From the sums of a tile's cells to the entries of the Gram matrix of patches: those of a pair of
// taps are the sums of the cells that make up its window (docs/math.md, section 3),
//
//   out[i · taps + left][j · taps + right] <- Σ_cell sums[cell][i][j]     channels i >= j
//
// or, where each channel is a group, out[i][left][right] <- Σ_cell sums[cell][i].

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "gram_layout.h"
#include "scratch.h"
#include "symmetric_store.h"
#include "tile_product.h"

namespace kfac_fast {

#define KFAC_FAST_BODY "tap_store_body.h"
#include "compile_for_instruction_sets.h"

template <typename T>
using AddCells = void (*)(const T* sums, const int64_t* cell, const int64_t* last, int64_t distance,
                          int64_t width, T* total);

template <typename T>
AddCells<T> add_cells(InstructionSet set) {
  return KFAC_FAST_FORM(set, add_cells<T>);
}

// How the sums of a tile lie: edge columns of all rows for every cell, or of the diagonal as one
// row if each channel is a group; then for a bias one row for every cell of the pixels themselves.
struct CellSums {
  int64_t count = 0;
  int64_t size = 0;  // of a cell
  int64_t edge = 0;
  int64_t still_first = 0;  // of the pixels themselves

  int64_t bias(int64_t cell) const { return count * size + (cell - still_first) * edge; }
};

// The cells of the window of the pair (left, right) are those from begin[left · taps + right] on to
// the next one's.
struct TapWindows {
  int64_t taps = 1;
  std::vector<int64_t> begin{}, cells{};
};

template <typename T>
class TapStore {
 public:
  TapStore(const GramLayout& layout, const SymmetricStore<T>& store, const CellSums& cells,
           const TapWindows& windows, bool bias, T* out)
      : layout_(layout),
        lanes_(tile_product<T>(store.set).lanes),
        store_square_(square_store<T>(store.set)),
        add_cells_(add_cells<T>(store.set)),
        store_(store),
        cells_(cells),
        windows_(windows),
        bias_(bias),
        out_(out) {}

  int64_t matrix_size() const { return store_.edge * store_.edge; }

  // Channels whose rows of the result are stored together: few, but whole cache lines of the mirror
  // image if that takes no more than 256 rows; all of a tile if each is a group.
  int64_t channels_together() const {
    if (layout_.group_columns == 1) return lanes_;
    const int64_t few = std::max<int64_t>(1, 32 / taps());
    const int64_t even = line / std::gcd(line, taps());
    return even * taps() <= 256 ? round_up(few, even) : few;
  }

  // Stores the entries of the channels [begin, end) of a tile, counted from its first row.
  void rows(const Tile& tile, const T* sums, int64_t begin, int64_t end) const {
    const int64_t features = layout_.group_columns;
    if (features == 1) return depthwise(tile, sums, end);
    const int64_t block = columns_together();
    const int64_t entries = channels_together() * taps() * block * taps();
    const auto values = make_scratch<T>(entries + lanes_);  // see gather
    for (int64_t first = begin, last; first < end; first = last) {
      // Rows of one group: strips of several groups have one tile, on the diagonal.
      const int64_t group_end = (tile.row + first) / features * features + features - tile.row;
      last = std::min({first + channels_together(), end, group_end});
      const bool whole = features == layout_.strip_columns;
      const int64_t from = whole ? 0 : group_end - features;
      const int64_t below = tile.on_diagonal() ? first : layout_.columns_of(tile, cells_.edge);
      for (int64_t c = from, next; c < below; c = next) {
        next = std::min(c + block, below);
        store_block(tile, sums, first, last, c, next, false, values.get());
      }
      if (tile.on_diagonal()) store_block(tile, sums, first, last, first, last, true, values.get());
      if (tile.on_diagonal() && bias_) store_bias(tile, sums, first, last, values.get());
    }
  }

 private:
  static constexpr int64_t line = 64 / sizeof(T);  // numbers in a cache line, or the widest vector

  int64_t taps() const { return windows_.taps; }

  // Channels whose columns are stored together: whole cache lines, and no more than 96 KB of
  // entries if the taps are few.
  int64_t columns_together() const {
    constexpr int64_t entries = (96 << 10) / sizeof(T);
    const int64_t columns = entries / (channels_together() * taps() * taps());
    return std::max(line, columns / line * line);
  }

  T* matrix_of(const Tile& tile, int64_t channel) const {
    const int64_t group = (tile.strip * layout_.strip_columns + channel) / layout_.group_columns;
    return out_ + group * matrix_size();
  }

  // Entries of the channels [first, last) by [from, to) of a tile, for all pairs of taps. The lines
  // they are stored to are asked for a row, and some of the mirror image's, at a time: the matrix
  // is in no cache.
  void store_block(const Tile& tile, const T* sums, int64_t first, int64_t last, int64_t from,
                   int64_t to, bool diagonal, T* values) const {
    const int64_t features = layout_.group_columns, count = taps();
    const int64_t height = (last - first) * count, width = (to - from) * count;
    const int64_t row = (tile.row + first) % features * count;
    const int64_t column = (tile.column + from) % features * count;
    T* matrix = matrix_of(tile, tile.row + first);
    for (int64_t i = 0; i < height; ++i) {
      store_.prefetch(matrix, row + i, column, width);
      for (int64_t j = i; j < width && !diagonal; j += height) {
        store_.prefetch(matrix, column + j, row, height);
      }
      gather(sums + (first + i / count) * cells_.edge, i % count, from, to, values + i * width,
             count);
    }
    store_.wide({values, width, 1, 0}, height, width, diagonal, matrix, row, column);
  }

  // target[c · stride + right] = the sum of the entry from + c of the cells of (left, right)'s
  // window. Squares of taps by channels are transposed; what they write beyond the last tap is
  // overwritten by the next channel's first taps or the next row's, which come later, or lies in
  // the lanes behind the last row.
  void gather(const T* sums, int64_t left, int64_t from, int64_t to, T* target,
              int64_t stride) const {
    const int64_t count = taps();
    alignas(64) T square[line * line];
    for (int64_t c = from; c < to; c += lanes_, target += lanes_ * stride) {
      const int64_t width = std::min(lanes_, to - c);
      for (int64_t right = (count - 1) / lanes_ * lanes_; right >= 0; right -= lanes_) {
        for (int64_t tap = right; tap < std::min(right + lanes_, count); ++tap) {
          sum_window(sums + c, cells_.size, left * count + tap, width,
                     square + (tap - right) * lanes_);
        }
        store_square_(square, lanes_, width, target + right, stride);
      }
    }
  }

  // total[c] = the sum of the entry c of the cells of a pair's window, which lie `distance` apart.
  void sum_window(const T* sums, int64_t distance, int64_t pair, int64_t width, T* total) const {
    const int64_t* cells = windows_.cells.data();
    add_cells_(sums, cells + windows_.begin[pair], cells + windows_.begin[pair + 1], distance,
               width, total);
  }

  void store_bias(const Tile& tile, const T* sums, int64_t first, int64_t last, T* values) const {
    const int64_t features = layout_.group_columns, count = taps();
    for (int64_t i = 0; i < (last - first) * count; ++i) {
      sum_window(sums + cells_.bias(0) + first + i / count, cells_.edge, i % count * (count + 1), 1,
                 values + i);
    }
    store_.wide({values, 0, 1, 0}, 1, (last - first) * count, false,
                matrix_of(tile, tile.row + first), features * count,
                (tile.row + first) % features * count);
  }

  // Groups of one channel, the first `width` of a tile.
  void depthwise(const Tile& tile, const T* sums, int64_t width) const {
    const int64_t count = taps(), stride = count * count + lanes_;
    const auto values = make_scratch<T>(width * stride);
    for (int64_t left = 0; left < count; ++left) {
      gather(sums, left, 0, width, &values[left * count], stride);
    }
    for (int64_t c = 0; c < width; ++c) {
      const TileSums<T> own{&values[c * stride], count, 1, 0};
      store_.wide(own, count, count, true, matrix_of(tile, c), 0, 0);
      if (bias_) store_bias(tile, sums, c, c + 1, &values[c * stride]);
    }
  }

  const GramLayout& layout_;
  const int64_t lanes_;
  const SquareStore<T> store_square_;
  const AddCells<T> add_cells_;
  const SymmetricStore<T>& store_;
  const CellSums& cells_;
  const TapWindows& windows_;
  const bool bias_;
  T* const out_;
};

}  // namespace kfac_fast
