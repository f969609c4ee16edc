#pragma once
// The inner loops of the CPU kernels: tiles of sums over the rows of packed matrices,
//
//   sum[r][c] (+)= Σ_k left[k][r] · right[k][c]
//
// where a tile's sums stay in registers while k runs. Row k of the left operand gives scalars, row
// k of the right one vectors:
//
//                              right: row k -> | vector 0 | vector 1 | vector 2 |
//                                              +----------+----------+----------+
//       left: row k -> | scalar 0 |            |   sums   |   sums   |   sums   |
//                      | scalar 1 |            |   sums   |   sums   |   sums   |
//                      |   ...    |            |   ...    |          |          |
//
//   instruction set     sums of a full tile (float)     vector registers
//   avx512              8 rows x 3 vectors of 16        32
//   avx2                4 rows x 3 vectors of 8         16
//   portable            2 rows x 3 vectors of 4         16
//
// Both operands are read row by row, so the same packed copy of X serves X^T X on both sides, and
// rows of X that lie side by side in memory need no copy at all. A packed block of rows is cut into
// panels as wide as a full tile; the rows of one panel follow each other without a gap:
//
//       columns:  | 0 .. W-1 | W .. 2W-1 | ...            panel 0: row 0 | row 1 | row 2 | ...
//       row 0     |          |           |       ->       panel 1: row 0 | row 1 | row 2 | ...
//       row 1     |          |           |                ...
//
// Fewer rows or vectors, at the diagonal and at ragged edges, are variants of their own, so that
// tiles which are mostly outside of the matrix cost little. The lanes outside may hold anything,
// since no sum mixes lanes, but the memory that they are loaded from must exist.
//
// Where a right operand is one vector wide, spread products multiply several of them, which lie
// apart, with one left operand; of the sums that lanewise products form, both operands being one
// vector, only c = r are there.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "instruction_set.h"
#include "narrow_float.h"

namespace kfac_fast {

#define KFAC_FAST_BODY "tile_product_body.h"
#include "compile_for_instruction_sets.h"

// The tile products of one instruction set for T = float or double.
template <typename T>
struct TileProduct {
  static constexpr int vectors = 3;
  using Function = void (*)(const T* left, int64_t left_stride, const T* right,
                            int64_t right_stride, int64_t depth, T* sum, int64_t sum_stride,
                            bool accumulate);

  using Spread = void (*)(const T* left, int64_t left_stride, const T* right, int64_t right_stride,
                          int64_t vector_stride, int64_t depth, T* const* sums, int64_t sum_stride);
  using Lanewise = void (*)(const T* left, int64_t left_stride, const T* right,
                            int64_t right_stride, int64_t vector_stride, int64_t depth,
                            T* const* sums);

  int64_t rows;   // of a full tile, a power of two
  int64_t lanes;  // of a vector, a multiple of rows
  // [log2 of the rows][vectors - 1]
  Function variants[4][vectors];
  Spread spread_variants[4][vectors];
  Lanewise lanewise[vectors];  // [vectors - 1]

  int64_t panel_width() const { return vectors * lanes; }

  // The smallest tile that covers this many rows and columns, at most those of a full tile.
  Function covering(int64_t row_count, int64_t column_count) const {
    return variants[size_class(row_count)][(column_count - 1) / lanes];
  }
  Spread spread(int64_t row_count, int64_t vector_count) const {
    return spread_variants[size_class(row_count)][vector_count - 1];
  }

 private:
  static int size_class(int64_t row_count) {
    return std::bit_width(static_cast<uint64_t>(row_count - 1));
  }
};

// Packing of rows of type In into panels of T.
template <typename In, typename T>
struct Packing {
  void (*adjacent)(const In* source, int64_t row_stride, int64_t rows, int64_t columns,
                   int64_t columns_a_panel, T* panel, int64_t panel_stride, int64_t panel_distance);
  void (*strided)(const In* source, int64_t row_stride, int64_t column_stride, int64_t rows,
                  int64_t columns, int64_t columns_a_panel, T* panel, int64_t panel_stride,
                  int64_t panel_distance);

  // Cuts `columns` columns into panels of columns_a_panel, which lie panel_distance apart, the rows
  // of each panel_stride apart, and fills each up with zeros to the end of its last vector.
  void operator()(const In* source, int64_t row_stride, int64_t column_stride, int64_t rows,
                  int64_t columns, int64_t columns_a_panel, T* panel, int64_t panel_stride,
                  int64_t panel_distance) const {
    if (column_stride == 1) {
      adjacent(source, row_stride, rows, columns, columns_a_panel, panel, panel_stride,
               panel_distance);
    } else {
      strided(source, row_stride, column_stride, rows, columns, columns_a_panel, panel,
              panel_stride, panel_distance);
    }
  }
};

// What follows the product are template arguments that come before the rows.
#define KFAC_FAST_TILES(set, product, rows, ...)        \
  {set::product<T, __VA_ARGS__ __VA_OPT__(, ) rows, 1>, \
   set::product<T, __VA_ARGS__ __VA_OPT__(, ) rows, 2>, \
   set::product<T, __VA_ARGS__ __VA_OPT__(, ) rows, 3>}
#define KFAC_FAST_LANEWISE(set) \
  {set::lanewise_product<T, 1>, set::lanewise_product<T, 2>, set::lanewise_product<T, 3>}
#define KFAC_FAST_TILES_OF_2(set, product, ...) \
  {KFAC_FAST_TILES(set, product, 1, __VA_ARGS__), KFAC_FAST_TILES(set, product, 2, __VA_ARGS__)}
#define KFAC_FAST_TILES_OF_4(set, product, ...)                                                  \
  {KFAC_FAST_TILES(set, product, 1, __VA_ARGS__), KFAC_FAST_TILES(set, product, 2, __VA_ARGS__), \
   KFAC_FAST_TILES(set, product, 4, __VA_ARGS__)}
#define KFAC_FAST_TILES_OF_8(set, product, ...)                                                  \
  {KFAC_FAST_TILES(set, product, 1, __VA_ARGS__), KFAC_FAST_TILES(set, product, 2, __VA_ARGS__), \
   KFAC_FAST_TILES(set, product, 4, __VA_ARGS__), KFAC_FAST_TILES(set, product, 8, __VA_ARGS__)}

// With `continued`, a tile's sums that accumulate start from the old ones. Where these and the new
// products are large and nearly cancel, as in eliminations, what is left would otherwise have lost
// what a sum of all the products was rounded by; sums of many tiles are the more accurate for it
// that each starts from zero.
template <typename T, bool continued = false>
const TileProduct<T>& tile_product(InstructionSet set) {
  constexpr int64_t size = sizeof(T);
  static constexpr TileProduct<T> on_portable{
      2, 16 / size, KFAC_FAST_TILES_OF_2(portable, tile_product, continued),
      KFAC_FAST_TILES_OF_2(portable, spread_product), KFAC_FAST_LANEWISE(portable)};
#if defined(__x86_64__)
  static constexpr TileProduct<T> on_avx2{
      4, 32 / size, KFAC_FAST_TILES_OF_4(avx2, tile_product, continued),
      KFAC_FAST_TILES_OF_4(avx2, spread_product), KFAC_FAST_LANEWISE(avx2)};
  static constexpr TileProduct<T> on_avx512{
      8, 64 / size, KFAC_FAST_TILES_OF_8(avx512, tile_product, continued),
      KFAC_FAST_TILES_OF_8(avx512, spread_product), KFAC_FAST_LANEWISE(avx512)};
  if (set == InstructionSet::avx512) return on_avx512;
  if (set == InstructionSet::avx2) return on_avx2;
#endif
  return on_portable;
}

#undef KFAC_FAST_LANEWISE
#undef KFAC_FAST_TILES_OF_8
#undef KFAC_FAST_TILES_OF_4
#undef KFAC_FAST_TILES_OF_2
#undef KFAC_FAST_TILES

template <typename In, typename T>
Packing<In, T> packing(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) {
    return {avx512::pack_adjacent<In, T>, avx512::pack_strided<In, T>};
  }
  if (set == InstructionSet::avx2) {
    return {avx2::pack_adjacent<In, T>, avx2::pack_strided<In, T>};
  }
#endif
  return {portable::pack_adjacent<In, T>, portable::pack_strided<In, T>};
}

// Compiled once, in tile_product.cpp.
extern template const TileProduct<float>& tile_product<float>(InstructionSet set);
extern template const TileProduct<float>& tile_product<float, true>(InstructionSet set);
extern template const TileProduct<double>& tile_product<double>(InstructionSet set);
extern template const TileProduct<double>& tile_product<double, true>(InstructionSet set);
extern template Packing<float, float> packing(InstructionSet set);
extern template Packing<double, double> packing(InstructionSet set);
extern template Packing<BFloat16, float> packing(InstructionSet set);
extern template Packing<Half, float> packing(InstructionSet set);

// See store_transposed.
template <typename T>
using SquareStore = void (*)(const T* square, int64_t square_stride, int64_t count, T* target,
                             int64_t target_stride);

template <typename T>
SquareStore<T> square_store(InstructionSet set) {
  return KFAC_FAST_FORM(set, store_transposed<T>);
}

// See store_and_multiply.
template <typename T>
using PanelStore = double (*)(const T* panel, const T* other, int64_t panel_stride, int64_t rows,
                              int64_t columns, T* target, int64_t target_stride);

template <typename T>
PanelStore<T> panel_store(InstructionSet set) {
  return KFAC_FAST_FORM(set, store_and_multiply<T>);
}

// A block of `depth` rows cut into panels, packed or in place (then distance == width: the panels
// lie side by side in every row).
template <typename T>
struct Panels {
  const T* data;
  int64_t depth;
  int64_t row_stride;  // between the rows of one panel
  int64_t width;
  int64_t distance;  // between the first elements of two panels

  const T* at(int64_t column) const { return data + column / width * distance + column % width; }

  // The panels from `column` on, which begins one.
  Panels from(int64_t column) const { return {at(column), depth, row_stride, width, distance}; }
};

// sum[r][c] (+)= Σ_k left[k][r] · right[k][c] for rows x columns sums; with `lower`, entries c > r
// may be left out. The last rows come first: below a diagonal they are the longest, and what is
// read in place, for the first time, is best read from end to end. The `zeros` rows from
// `first_zero` on, of whole tiles, whose left operand is zero, are left out; they may lie outside.
template <typename T>
void multiply_panels(const TileProduct<T>& product, const Panels<T>& left, int64_t rows,
                     const Panels<T>& right, int64_t columns, bool lower, T* sum,
                     int64_t sum_stride, bool accumulate, int64_t first_zero = 0,
                     int64_t zeros = 0) {
  const int64_t last_tile = (rows - 1) / product.rows * product.rows;
  for (int64_t c = 0; c < columns; c += right.width) {
    const int64_t panel_columns = std::min(right.width, columns - c);
    for (int64_t r = last_tile; r >= (lower ? c : 0); r -= product.rows) {
      if (first_zero <= r && r < first_zero + zeros) continue;
      const int64_t row_count = std::min(product.rows, rows - r);
      const int64_t column_count =
          lower ? std::min(panel_columns, r + row_count - c) : panel_columns;
      const auto tile = product.covering(row_count, column_count);
      tile(left.at(r), left.row_stride, right.at(c), right.row_stride, right.depth,
           sum + r * sum_stride + c, sum_stride, accumulate);
    }
  }
}

// sums[v][r][c] += Σ_k left[k][r] · right[k][v · vector_stride + c] for `rows` rows r and a vector
// of columns c: products of one left operand, as narrow as a vector, with several right ones.
template <typename T>
void multiply_spread(const TileProduct<T>& product, const Panels<T>& left, int64_t rows,
                     const Panels<T>& right, int64_t vectors, int64_t vector_stride, T* const* sums,
                     int64_t sum_stride) {
  for (int64_t r = 0; r < rows; r += product.rows) {
    T* own[TileProduct<T>::vectors];
    for (int64_t v = 0; v < vectors; ++v) own[v] = sums[v] + r * sum_stride;
    product.spread(std::min(product.rows, rows - r), vectors)(
        left.at(r), left.row_stride, right.data, right.row_stride, vector_stride, right.depth, own,
        sum_stride);
  }
}

// sum[c] (+)= Σ_k right[k][c]: tile products with rows of ones.
template <typename T>
void sum_panels(const TileProduct<T>& product, const Panels<T>& right, int64_t columns, T* sum,
                bool accumulate) {
  static constexpr T one = 1;
  for (int64_t c = 0; c < columns; c += right.width) {
    const auto tile = product.covering(1, std::min(right.width, columns - c));
    tile(&one, 0, right.at(c), right.row_stride, right.depth, sum + c, 0, accumulate);
  }
}

}  // namespace kfac_fast
