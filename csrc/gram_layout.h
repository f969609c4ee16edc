#pragma once
// How the columns of a Gram matrix are cut:
//
//   strip   columns whose products are taken together: one group, or as many neighbouring groups as
//           fit in a vector (of their products only the blocks on the diagonal are stored)
//   panel   columns of a strip as wide as a full tile product, see tile_product.h
//   tile    a square of the lower triangle of a strip: the unit of parallel work

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kfac_fast {

inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

struct Tile {
  int64_t strip;
  int64_t row;  // first row and column inside the strip
  int64_t column;

  bool on_diagonal() const { return row == column; }
};

class GramLayout {
 public:
  const int64_t columns;  // at least 1
  const int64_t group_columns;
  const int64_t strip_columns;
  const int64_t lanes;  // of a vector
  const int64_t panel_width;

  GramLayout(int64_t columns, int64_t groups, int64_t widest_panel, int64_t lanes)
      : columns(columns),
        group_columns(columns / groups),
        strip_columns(group_columns * std::clamp<int64_t>(lanes / group_columns, 1, groups)),
        lanes(lanes),
        panel_width(std::min(widest_panel, round_up(strip_columns, lanes))) {}

  int64_t strips() const { return divide_up(columns, strip_columns); }
  int64_t strip_panels() const { return divide_up(strip_columns, panel_width); }
  int64_t panels() const { return strips() * strip_panels(); }
  int64_t columns_a_panel() const { return std::min(strip_columns, panel_width); }

  // Columns of a strip; the last one may hold fewer groups.
  int64_t width(int64_t strip) const {
    return std::min(strip_columns, columns - strip * strip_columns);
  }

  // Rows and columns of a tile as wide as `edge`, less at the end of its strip.
  int64_t rows_of(const Tile& tile, int64_t edge) const {
    return std::min(edge, width(tile.strip) - tile.row);
  }
  int64_t columns_of(const Tile& tile, int64_t edge) const {
    return std::min(edge, width(tile.strip) - tile.column);
  }

  int64_t first_column(int64_t panel) const {
    return panel / strip_panels() * strip_columns + panel % strip_panels() * panel_width;
  }

  int64_t end_column(int64_t panel) const {
    const int64_t strip = panel / strip_panels();
    return std::min(first_column(panel) + panel_width, strip * strip_columns + width(strip));
  }

  // The end of the run of panels from `panel` on, at most `last`, of which all but the final one
  // have columns_a_panel() columns.
  int64_t end_of_run(int64_t panel, int64_t last) const {
    if (strip_panels() == 1) return last;
    return std::min(last, (panel / strip_panels() + 1) * strip_panels());
  }

  // Tiles of this edge, a multiple of panel_width, row by row: neighbours share operands and lines.
  std::vector<Tile> tiles(int64_t edge) const {
    const int64_t side = divide_up(strip_columns, edge);
    std::vector<Tile> tiles;
    tiles.reserve(strips() * side * (side + 1) / 2);
    for (int64_t strip = 0; strip < strips(); ++strip) {
      for (int64_t row = 0; row < width(strip); row += edge) {
        for (int64_t column = 0; column <= row; column += edge) {
          tiles.push_back({strip, row, column});
        }
      }
    }
    return tiles;
  }
};

}  // namespace kfac_fast
