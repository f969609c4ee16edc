#pragma once
// The rows of X in blocks that fit in cache, each cut into strips and panels (gram_layout.h,
// tile_product.h): packed, or where they lie.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "gram_layout.h"
#include "row_source.h"
#include "tile_product.h"

namespace kfac_fast {

// A block of rows of all strips.
template <typename T>
struct Block {
  Panels<T> first_strip;
  int64_t strip_distance;

  Panels<T> strip(int64_t index) const {
    Panels<T> panels = first_strip;
    panels.data += index * strip_distance;
    return panels;
  }
};

template <typename In, typename T>
class RowBlocks {
 public:
  RowBlocks(const RowSource<In>& source, const GramLayout& layout, const Packing<In, T>& packing)
      : source_(source),
        layout_(layout),
        pack_rows_(packing),
        rows_(std::clamp<int64_t>(source.rows(), 1, longest)),
        count_(std::max<int64_t>(1, divide_up(source.rows(), rows_))) {}

  int64_t rows() const { return source_.rows(); }
  int64_t input_bytes() const { return rows() * layout_.columns * sizeof(In); }

  // Blocks; one without rows if there are no rows.
  int64_t count() const { return count_; }

  // Numbers that a packed block takes.
  int64_t packed_size() const { return layout_.panels() * panel_size(); }

  // A block, packed into `memory` unless it can be read in place.
  Block<T> load(int64_t index, T* memory) const {
    if constexpr (std::is_same_v<In, T>) {
      if (readable_in_place(index)) {
        const int64_t stride = source_.even_row_stride();
        const int64_t width = layout_.panel_width;
        const T* data = source_.data() + index * rows_ * stride;
        return {{data, rows_, stride, width, width}, layout_.strip_columns};
      }
    }
    return pack(index, 0, layout_.panels(), memory);
  }

  // Packs the panels [first_panel, last_panel) of a block to their places in `memory`.
  Block<T> pack(int64_t index, int64_t first_panel, int64_t last_panel, T* memory) const {
    constexpr int64_t piece = 32;  // rows that stay in cache from one strip to the next
    const int64_t width = layout_.panel_width;
    const int64_t begin = index * rows_;
    const int64_t end = std::min(begin + rows_, source_.rows());
    int64_t depth = 0;
    source_.for_each_stretch(begin, end, [&](const In* rows, int64_t row_stride, int64_t count) {
      for (int64_t r = 0; r < count; r += piece) {
        const int64_t height = std::min(piece, count - r);
        pack_piece(rows + r * row_stride, row_stride, height, first_panel, last_panel,
                   memory + depth * width);
        depth += height;
      }
    });
    return {{memory, depth, width, width, panel_size()}, layout_.strip_panels() * panel_size()};
  }

 private:
  // Enough rows that the sums are read and written seldom; few enough that a panel of the block, 24
  // KB at most, stays in the nearest cache, and that the sums of a block, added to the others' only
  // at its end, are rounded few times.
  static constexpr int64_t longest = 128;

  // One cache line more than the rows: panels a power of two apart would displace each other.
  int64_t panel_size() const { return rows_ * layout_.panel_width + 64 / sizeof(T); }

  // Rows that lie close together can be multiplied where they are, if the last lanes of their last
  // vectors do not reach beyond the end of X.
  bool readable_in_place(int64_t index) const {
    constexpr int64_t longest_row = 512 / sizeof(T);
    const int64_t stride = source_.even_row_stride();
    if (source_.column_stride() != 1 || stride < layout_.columns || stride > longest_row) {
      return false;
    }
    const int64_t rows_after = source_.rows() - (index + 1) * rows_;
    const int64_t last_width = layout_.width(layout_.strips() - 1);
    const int64_t reach = round_up(last_width, layout_.lanes) - last_width;
    return rows_after >= 0 && rows_after * stride >= reach;
  }

  void pack_piece(const In* rows, int64_t row_stride, int64_t count, int64_t first_panel,
                  int64_t last_panel, T* memory) const {
    const int64_t column_stride = source_.column_stride();
    for (int64_t panel = first_panel, next; panel < last_panel; panel = next) {
      next = layout_.end_of_run(panel, last_panel);
      const int64_t column = layout_.first_column(panel);
      const int64_t columns = layout_.end_column(next - 1) - column;
      pack_rows_(rows + column * column_stride, row_stride, column_stride, count, columns,
                 layout_.columns_a_panel(), memory + panel * panel_size(), layout_.panel_width,
                 panel_size());
    }
  }

  const RowSource<In>& source_;
  const GramLayout& layout_;
  const Packing<In, T> pack_rows_;
  const int64_t rows_;
  const int64_t count_;
};

}  // namespace kfac_fast
