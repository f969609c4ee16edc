#pragma once
// Gram matrices on the CUDA cores: every product and sum in float32 (float64 for float64), rows of
// any strides. No torch headers, so that any nvcc compiles it and a C++ compiler can emulate it.
//
// A thread block sums a part of the rows of one tile of the lower triangle into a workspace; a
// second kernel adds the parts and writes the tile, its mirror image and the bias entries. No sum
// depends on the order in which thread blocks run.

#include <cstdint>

#include "triangle.cuh"
#include "value.cuh"

namespace kfac_fast {

constexpr int kGramThreads = 256;
constexpr int kGramDepth = 16;          // rows of x that a step multiplies
constexpr int kGramStepsPerChain = 32;  // then a float32 sum goes to a second accumulator
constexpr int kGramPatch = 32;          // side of what a block of the finishing kernel writes
constexpr int kGramMaxAxes = 16;

// A leading dimension of x [*, D] and of its mask [*], strides in elements.
struct GramAxis {
  int64_t size, stride, mask_stride;
};

template <typename In>
struct GramRows {
  const In* x;
  const bool* mask;  // null: every row counts
  int64_t width;     // columns of a group
  int64_t column_stride;
  bool lanes_along_rows = false;
  int64_t rows = 1;
  int axes = 0;
  GramAxis axis[kGramMaxAxes] = {};  // from the outermost

  // Adds the next dimension inwards; one that continues the even steps of the last joins it. False
  // if there is no room.
  bool add(GramAxis next) {
    rows *= next.size;
    if (next.size == 1) return true;
    const bool joins = axes && axis[axes - 1].stride == next.size * next.stride &&
                       axis[axes - 1].mask_stride == next.size * next.mask_stride;
    if (joins) {
      next.size *= axis[axes - 1].size;
    } else if (axes++ == kGramMaxAxes) {
      return false;
    }
    axis[axes - 1] = next;
    lanes_along_rows = next.stride < column_stride;
    return true;
  }
};

// Where the parts lie: sums of tiles [split, programs, tile, tile] and, with a bias, of columns
// [split, groups, width], and the numbers of counted rows [split].
template <typename Acc>
struct GramParts {
  Acc* tiles;
  bool bias = false;
  Acc* columns = nullptr;
  int64_t* counted = nullptr;
};

// Into how many parts to cut the rows, so that few tiles still fill the device evenly: the number
// with which the busiest of the `slots` thread blocks that it holds at once, and the finishing
// kernel, have the least to do. The costs of storing and of reading a tile are estimates, in steps.
inline int64_t gram_split(int64_t programs, int64_t rows, int64_t tile_bytes, int64_t slots) {
  constexpr int64_t max_split = 64, max_bytes = int64_t{1} << 28;
  constexpr int64_t steps_per_store = 4, reads_per_step = 32;
  const int64_t steps = (rows + kGramDepth - 1) / kGramDepth;
  const int64_t limit = min(min(max_split, steps), max_bytes / (programs * tile_bytes));
  int64_t best = 1, least = INT64_MAX;
  for (int64_t split = 1; split == 1 || split <= limit; ++split) {
    const int64_t waves = (programs * split + slots - 1) / slots;
    const int64_t cost =
        waves * ((steps + split - 1) / split + steps_per_store) + programs * split / reads_per_step;
    if (cost < least) least = cost, best = split;
  }
  return best;
}

// Offset of a row in x, or -1 if it does not exist or count.
template <typename In>
__device__ int64_t gram_row_offset(const GramRows<In>& in, int64_t row) {
  if (row >= in.rows) return -1;
  int64_t offset = 0, mask_offset = 0;
  for (int a = in.axes - 1; a >= 0; --a) {
    // The outermost index needs no division; evenly spaced rows have no other.
    const int64_t rest = a > 0 ? row / in.axis[a].size : 0;
    const int64_t index = row - rest * in.axis[a].size;
    offset += index * in.axis[a].stride;
    mask_offset += index * in.axis[a].mask_stride;
    row = rest;
  }
  return !in.mask || in.mask[mask_offset] ? offset : -1;
}

// One thread's entries of a [kGramDepth, tile] piece of x, on their way to shared memory.
template <typename In, typename Acc, int kTile>
struct GramPiece {
  static constexpr int kCount = kGramDepth * kTile / kGramThreads;
  // Padded, so that threads along the rows of x do not all store to one bank.
  using Shared = Acc[2][kGramDepth][kTile + 4];
  Acc value[kCount];

  struct Place {
    int row, column;
  };

  // Neighbouring threads take neighbouring elements of x.
  __device__ static Place place(bool lanes_along_rows, int i) {
    const int n = threadIdx.x + i * kGramThreads;
    return lanes_along_rows ? Place{n % kGramDepth, n / kGramDepth} : Place{n / kTile, n % kTile};
  }

  __device__ void load(const GramRows<In>& in, const In* x, const int64_t* row_offset,
                       int64_t first_column) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Place at = place(in.lanes_along_rows, i);
      const int64_t offset = row_offset[at.row], column = first_column + at.column;
      const bool exists = offset >= 0 && column < in.width;
      value[i] = exists ? value_of(x[offset + column * in.column_stride]) : Acc(0);
    }
  }

  __device__ void store(bool lanes_along_rows, Acc (*shared)[kTile + 4]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Place at = place(lanes_along_rows, i);
      shared[at.row][at.column] = value[i];
    }
  }
};

// A thread's kPer rows (columns) of a tile lie in strips of four, 16 strips apart, so that
// neighbouring threads read neighbouring words of shared memory.
__device__ inline int gram_strip(int lane, int i) { return i / 4 * 64 + lane * 4 + i % 4; }

// Sums a part of the rows of one tile; grid (programs, split), tiles of 16 kPer.
template <typename In, typename Acc, int kPer>
__global__ void __launch_bounds__(kGramThreads)
    gram_partial_kernel(GramRows<In> in, GramParts<Acc> parts, int64_t tiles,
                        int64_t steps_per_part) {
  constexpr int kTile = 16 * kPer;
  using Piece = GramPiece<In, Acc, kTile>;
  __shared__ typename Piece::Shared left, right;
  __shared__ int64_t row_offset[2][kGramDepth];
  const int thread = threadIdx.x, lane_row = thread / 16, lane_column = thread % 16;
  // Programs count the tiles of a group's lower triangle, then the next group's.
  const LowerTile tile = lower_tile(blockIdx.x % tiles);
  const int64_t group = blockIdx.x / tiles;
  const int64_t steps = (in.rows + kGramDepth - 1) / kGramDepth;
  const int64_t begin = blockIdx.y * steps_per_part;
  const int64_t end = min(steps, begin + steps_per_part);
  const In* x = in.x + group * in.width * in.column_stride;
  const bool sums_columns = parts.bias && tile.row == tile.column;

  Acc total[kPer][kPer] = {}, chain[kPer][kPer] = {}, column_sum = 0;
  int64_t counted = 0;
  Piece next_left, next_right;

  auto find_row = [&](int64_t step) {
    if (thread >= kGramDepth || step >= end) return int64_t{-1};
    const int64_t offset = gram_row_offset(in, step * kGramDepth + thread);
    counted += offset >= 0;
    return offset;
  };
  auto load = [&](int buffer) {
    next_left.load(in, x, row_offset[buffer], tile.row * int64_t{kTile});
    next_right.load(in, x, row_offset[buffer], tile.column * int64_t{kTile});
  };
  auto store = [&](int buffer) {
    next_left.store(in.lanes_along_rows, left[buffer]);
    next_right.store(in.lanes_along_rows, right[buffer]);
  };

  // While a step multiplies, the next one's entries and the rows of the one after it are on their
  // way.
  int64_t offset = find_row(begin);
  if (thread < kGramDepth) row_offset[0][thread] = offset;
  __syncthreads();
  load(0);
  store(0);
  offset = find_row(begin + 1);
  if (thread < kGramDepth) row_offset[1][thread] = offset;
  __syncthreads();
  for (int64_t step = begin; step < end; ++step) {
    const int now = (step - begin) % 2, next = 1 - now;
    load(next);
    offset = find_row(step + 2);
#pragma unroll
    for (int k = 0; k < kGramDepth; ++k) {
      Acc a[kPer], b[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        a[i] = left[now][k][gram_strip(lane_row, i)];
        b[i] = right[now][k][gram_strip(lane_column, i)];
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) chain[i][j] += a[i] * b[j];
      }
    }
    if (sums_columns && thread < kTile) {
      Acc sum = 0;
      for (int k = 0; k < kGramDepth; ++k) sum += right[now][k][thread];
      column_sum += sum;
    }
    if ((step - begin) % kGramStepsPerChain == kGramStepsPerChain - 1) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          total[i][j] += chain[i][j];
          chain[i][j] = 0;
        }
      }
    }
    store(next);
    if (thread < kGramDepth) row_offset[now][thread] = offset;
    __syncthreads();
  }

  Acc* part = parts.tiles + (blockIdx.y * int64_t{gridDim.x} + blockIdx.x) * kTile * kTile;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      part[gram_strip(lane_row, i) * kTile + gram_strip(lane_column, j)] =
          total[i][j] + chain[i][j];
    }
  }
  const int64_t column = tile.column * int64_t{kTile} + thread;
  if (sums_columns && thread < kTile && column < in.width) {
    const int64_t groups = gridDim.x / tiles;
    parts.columns[(blockIdx.y * groups + group) * in.width + column] = column_sum;
  }
  if (parts.bias && blockIdx.x == 0) {
    if (thread < kGramDepth) row_offset[0][thread] = counted;
    __syncthreads();
    if (thread == 0) {
      for (int k = 1; k < kGramDepth; ++k) counted += row_offset[0][k];
      parts.counted[blockIdx.y] = counted;
    }
  }
}

// out <- beta out + alpha sum of the parts; grid (programs, patches of a tile), block (32, 8).
template <typename Acc>
__global__ void gram_finish_kernel(GramParts<Acc> parts, Acc* out, Acc alpha, Acc beta,
                                   int64_t width, int64_t tiles, int tile_side, int64_t split) {
  __shared__ Acc patch[kGramPatch][kGramPatch + 1];
  const LowerTile tile = lower_tile(blockIdx.x % tiles);
  const int64_t group = blockIdx.x / tiles;
  const int patches = tile_side / kGramPatch;
  const int patch_row = blockIdx.y / patches * kGramPatch;
  const int patch_column = blockIdx.y % patches * kGramPatch;
  const int64_t first_row = tile.row * int64_t{tile_side} + patch_row;
  const int64_t first_column = tile.column * int64_t{tile_side} + patch_column;
  const int64_t edge = width + parts.bias;
  out += group * edge * edge;
  auto finish = [&](const auto* part, int64_t part_stride, Acc* target) {
    Acc sum = 0;
    for (int64_t s = 0; s < split; ++s) sum += static_cast<Acc>(part[s * part_stride]);
    Acc value = alpha * sum;
    if (beta != 0) value += beta * *target;
    *target = value;
    return value;
  };

  const int x = threadIdx.x;
  for (int y = threadIdx.y; y < kGramPatch; y += blockDim.y) {
    const int64_t row = first_row + y, column = first_column + x;
    if (row >= width || column > row) continue;
    const Acc* part = parts.tiles + blockIdx.x * int64_t{tile_side} * tile_side +
                      (patch_row + y) * tile_side + patch_column + x;
    patch[y][x] =
        finish(part, gridDim.x * int64_t{tile_side} * tile_side, out + row * edge + column);
  }
  __syncthreads();
  // The mirror image is copied, not computed, so that it has the same bits.
  for (int y = threadIdx.y; y < kGramPatch; y += blockDim.y) {
    const int64_t row = first_column + y, column = first_row + x;
    if (column < width && row < column) out[row * edge + column] = patch[x][y];
  }
  const bool diagonal = tile.row == tile.column && patch_row == 0 && threadIdx.y == 0;
  if (!parts.bias || !diagonal) return;
  const int64_t column = first_column + x;
  if (column < width) {
    out[column * edge + width] = finish(parts.columns + group * width + column,
                                        gridDim.x / tiles * width, out + width * edge + column);
  }
  if (column == 0) finish(parts.counted, 1, out + width * edge + width);
}

}  // namespace kfac_fast
