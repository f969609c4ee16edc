#pragma once
// The patches of a convolution as rows in blocks that fit in cache: gathered from the input into
// panels when they are multiplied, never stored as a whole. Hands out blocks as RowBlocks does.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_plan.h"
#include "gram_layout.h"
#include "image_source.h"
#include "row_blocks.h"
#include "tile_product.h"

namespace kfac_fast {

template <typename In, typename T>
class PatchBlocks {
 public:
  PatchBlocks(const ImageSource<In>& source, const Axes<PatchAxis>& axes, const GramLayout& layout,
              InstructionSet set)
      : source_(source),
        axes_(axes),
        layout_(layout),
        product_(tile_product<T>(set)),
        store_square_(square_store<T>(set)),
        positions_(axes[0].outputs * axes[1].outputs * axes[2].outputs),
        total_(source.examples * positions_),
        rows_(std::clamp<int64_t>(total_, 1, longest)),
        count_(std::max<int64_t>(1, divide_up(total_, rows_))) {
    input_bytes_ = source.examples * source.channels * sizeof(In);
    for (const PatchAxis& axis : axes) input_bytes_ *= axis.pixels();
    for (int64_t channel = 0; channel < source.channels; ++channel) {
      for (int64_t z = 0; z < axes[0].taps; ++z) {
        for (int64_t y = 0; y < axes[1].taps; ++y) {
          for (int64_t x = 0; x < axes[2].taps; ++x) {
            columns_.push_back({channel * source.channel_stride, z, y, x});
          }
        }
      }
    }
  }

  int64_t rows() const { return total_; }
  int64_t input_bytes() const { return input_bytes_; }
  int64_t count() const { return count_; }
  int64_t packed_size() const { return layout_.panels() * panel_size(); }

  Block<T> load(int64_t index, T* memory) const { return pack(index, 0, layout_.panels(), memory); }

  // Packs the panels [first_panel, last_panel) of a block to their places in `memory`.
  Block<T> pack(int64_t index, int64_t first_panel, int64_t last_panel, T* memory) const {
    const int64_t width = layout_.panel_width;
    const int64_t begin = index * rows_, end = std::min(begin + rows_, total_);
    for (int64_t row = begin, next; row < end; row = next) {
      const Stretch stretch = stretch_at(row);
      next = std::min({end, row + stretch.left, row + product_.lanes});
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        pack_panel(stretch, next - row, panel,
                   memory + panel * panel_size() + (row - begin) * width);
      }
    }
    return {{memory, end - begin, width, width, panel_size()},
            layout_.strip_panels() * panel_size()};
  }

 private:
  static constexpr int64_t longest = 128;  // as in row_blocks.h
  static constexpr int64_t widest_vector = 16;

  struct Column {
    int64_t offset;  // of its channel
    int64_t z, y, x;
  };

  // Where a row lies, and how many follow it along x.
  struct Stretch {
    const In* example;
    int64_t z, y, x;
    int64_t left;
  };

  int64_t panel_size() const { return rows_ * layout_.panel_width + 64 / sizeof(T); }

  Stretch stretch_at(int64_t row) const {
    const int64_t x = row % axes_[2].outputs;
    const int64_t y = row / axes_[2].outputs % axes_[1].outputs;
    const int64_t z = row % positions_ / (axes_[2].outputs * axes_[1].outputs);
    return {source_.at(row / positions_, 0), z, y, x, axes_[2].outputs - x};
  }

  // Squares of as many columns as a vector holds are read along the rows and stored transposed.
  void pack_panel(const Stretch& stretch, int64_t rows, int64_t panel, T* target) const {
    T square[widest_vector * widest_vector];
    const int64_t lanes = product_.lanes;
    const int64_t first = layout_.first_column(panel), last = layout_.end_column(panel);
    for (int64_t column = first; column < last; column += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        T* line = square + lane * lanes;
        if (column + lane < last) {
          read(columns_[column + lane], stretch, rows, line);
        } else {
          std::fill_n(line, rows, T{0});
        }
      }
      store_square_(square, lanes, rows, target + column - first, layout_.panel_width);
    }
  }

  // What one tap reads of one channel at `rows` output positions along x.
  void read(const Column& column, const Stretch& stretch, int64_t rows, T* line) const {
    const int64_t z = axes_[0].pixel(column.z, stretch.z);
    const int64_t y = axes_[1].pixel(column.y, stretch.y);
    if (z < 0 || y < 0) {
      std::fill_n(line, rows, T{0});
      return;
    }
    const In* image =
        stretch.example + column.offset + z * source_.strides[0] + y * source_.strides[1];
    const int64_t stride = source_.strides[2];
    const int64_t place = column.x * axes_[2].outputs + stretch.x;
    const int64_t* pixel = &axes_[2].reads[place];
    if (stride == 1 && axes_[2].ahead[place] >= rows) {
      const In* from = image + *pixel;
      for (int64_t i = 0; i < rows; ++i) line[i] = static_cast<T>(from[i]);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        line[i] = pixel[i] < 0 ? T{0} : static_cast<T>(image[pixel[i] * stride]);
      }
    }
  }

  const ImageSource<In>& source_;
  const Axes<PatchAxis>& axes_;
  const GramLayout& layout_;
  const TileProduct<T>& product_;
  const SquareStore<T> store_square_;
  const int64_t positions_;
  const int64_t total_;
  const int64_t rows_;
  const int64_t count_;
  int64_t input_bytes_;
  std::vector<Column> columns_;
};

}  // namespace kfac_fast
