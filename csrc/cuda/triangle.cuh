#pragma once
// The square tiles of a lower triangle, counted row by row.

#include <cstdint>

namespace kfac_fast {

struct LowerTile {
  int row, column;  // in tiles
};

__host__ __device__ inline int64_t lower_tiles(int64_t width, int tile) {
  const int64_t side = (width + tile - 1) / tile;
  return side > 1 ? side * (side + 1) / 2 : 1;
}

__device__ inline LowerTile lower_tile(int64_t t) {
  int64_t row = static_cast<int64_t>((sqrt(8.0 * t + 1) - 1) / 2);
  if (row * (row + 1) / 2 > t) --row;
  if ((row + 1) * (row + 2) / 2 <= t) ++row;
  return {static_cast<int>(row), static_cast<int>(t - row * (row + 1) / 2)};
}

}  // namespace kfac_fast
