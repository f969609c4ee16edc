#pragma once
// Gradients of mixed shapes multiplied from both sides, P = G V A, and Σ ⟨V, P⟩. No torch headers,
// so that any nvcc compiles it and a C++ compiler can emulate it.
//
// A launch forms H = G V of all layers and another one P = H A, a tile in each thread block. Each
// block of the second adds up the products of its tile with V's, and one more adds up these sums.

#include <cstdint>

#include "../strided.h"
#include "task_table.cuh"
#include "tile_product.cuh"

namespace kfac_fast {

// Matrices with any strides, alike and evenly apart.
template <typename T>
struct StridedRun {
  Spaced<const T> matrices;
  int64_t row_stride, column_stride;

  __device__ Strided<T> operator[](int64_t index) const {
    return {matrices[index], row_stride, column_stride};
  }

  bool takes(const StridedRun& next, int count) {
    return next.row_stride == row_stride && next.column_stride == column_stride &&
           matrices.takes(next.matrices, count);
  }
};

// Layers of one shape.
template <typename T>
struct LayerRun {
  StridedRun<T> grad, left, right;
  Spaced<T> half, out;  // H and P, contiguous matrices
  int32_t rows, columns;
  int32_t count = 1;
  int32_t before = 0;  // tasks of the runs before it

  // Adds the next layer of the list if it continues the run.
  bool takes(const LayerRun& next) {
    return next.rows == rows && next.columns == columns && grad.takes(next.grad, count) &&
           left.takes(next.left, count) && right.takes(next.right, count) &&
           out.takes(next.out, count) && ++count;
  }

  __host__ __device__ int tiles(int tile) const {
    return ((rows + tile - 1) / tile) * ((columns + tile - 1) / tile);
  }
};

template <typename T>
struct LayerTable {
  const LayerRun<T>* runs;
  double* products;  // ⟨V, P⟩ of each tile
  int count;         // of runs
};

// Columns of a left operand's rows, or rows of a right one's columns: the `depth` that is summed
// over and the `side` that stays. As much of it as a step multiplies is on its way from memory to
// shared memory in the registers of all threads, neighbouring threads along the shorter stride.
template <typename T, int kTile>
class OperandStrip {
 public:
  static constexpr int kDepth = kTile * sizeof(T) > 256 ? 8 : 16;  // as the registers allow
  // The padding spreads stores along the depth over the banks and keeps vectors aligned.
  using Shared = T[kDepth][kTile + 16 / sizeof(T)];

  // `side` of it lie within the matrix from `data` on.
  __device__ OperandStrip(const T* data, int depth, int64_t depth_stride, int side,
                          int64_t side_stride) {
    const bool along_depth = depth_stride < side_stride;
    const int thread = threadIdx.x, length = along_depth ? kDepth : kTile;
    const int along = thread % length, across = thread / length;
    depth_step_ = along_depth ? 0 : kTaskThreads / kTile;
    side_step_ = along_depth ? kTaskThreads / kDepth : 0;
    depth_ = along_depth ? along : across;
    side_ = along_depth ? across : along;
    data_ = data + depth_ * depth_stride + side_ * side_stride;
    step_ = depth_step_ * depth_stride + side_step_ * side_stride;
    advance_ = kDepth * depth_stride;
    depth_left_ = depth - depth_;
    side_left_ = side - side_;
  }

  // The next step's entries; zero beyond the matrix.
  __device__ void load() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool inside = i * depth_step_ < depth_left_ && i * side_step_ < side_left_;
      next_[i] = inside ? data_[i * step_] : T(0);
    }
    data_ += advance_;
    depth_left_ -= kDepth;
  }

  __device__ void store(Shared& shared) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      shared[depth_ + i * depth_step_][side_ + i * side_step_] = next_[i];
    }
  }

 private:
  static constexpr int kCount = kDepth * kTile / kTaskThreads;  // of a thread

  const T* data_;
  int64_t step_, advance_;
  int depth_, side_, depth_step_, side_step_, depth_left_, side_left_;
  T next_[kCount];
};

// A tile of H = G V, or of P = H A and its share of the inner product.
template <typename T, int kTile>
__global__ void __launch_bounds__(kTaskThreads, 2)
    precondition_product_kernel(LayerTable<T> table, bool is_last) {
  using Strip = OperandStrip<T, kTile>;
  constexpr int kRows = kTile / 8, kColumns = kTile / 32;
  alignas(16) __shared__ typename Strip::Shared left[2], right[2];
  const TaskPlace task = find_task(table.runs, table.count, [](const LayerRun<T>& run) {
    return TaskCount{run.before, run.tiles(kTile)};
  });
  const LayerRun<T>& run = table.runs[task.row];
  const int rows = run.rows, columns = run.columns, depth = is_last ? columns : rows;
  const int tiles_across = (columns + kTile - 1) / kTile;
  const int tile_row = task.part / tiles_across * kTile;
  const int tile_column = task.part % tiles_across * kTile;

  const Strided<T> grad = run.grad[task.index];
  const Strided<T> from =
      is_last ? Strided<T>{run.half[task.index], columns, 1} : run.left[task.index];
  const Strided<T> to = is_last ? run.right[task.index] : grad;
  Strip left_strip(from.data + tile_row * from.row_stride, depth, from.column_stride,
                   rows - tile_row, from.row_stride);
  Strip right_strip(to.data + tile_column * to.column_stride, depth, to.row_stride,
                    columns - tile_column, to.column_stride);

  // While a step multiplies, the next one's entries are on their way.
  T sum[kRows][kColumns] = {};
  const int steps = (depth + Strip::kDepth - 1) / Strip::kDepth;
  left_strip.load(), right_strip.load();
  for (int step = 0; step < steps; ++step) {
    left_strip.store(left[step % 2]), right_strip.store(right[step % 2]);
    if (step + 1 < steps) left_strip.load(), right_strip.load();
    __syncthreads();
    multiply_tiles(left[step % 2], right[step % 2], sum);
  }

  // Pointers that move, because so many addresses would not fit into registers.
  const int first_row = tile_row + threadIdx.x / 32 * kRows;
  const int first_column = tile_column + threadIdx.x % 32;
  T* out = (is_last ? run.out : run.half)[task.index] + int64_t{first_row} * columns + first_column;
  const T* v = grad.data + first_row * grad.row_stride + first_column * grad.column_stride;
  T product = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (first_row + i >= rows || first_column + 32 * j >= columns) continue;
      out[32 * j] = sum[i][j];
      if (is_last) product += sum[i][j] * v[32 * j * grad.column_stride];
    }
    out += columns, v += grad.row_stride;
  }
  if (!is_last) return;
  const double products = sum_of_threads(product);
  if (threadIdx.x == 0) table.products[blockIdx.x] = products;
}

template <typename T>
__global__ void __launch_bounds__(kTaskThreads)
    inner_product_kernel(const double* products, int count, T* inner) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kTaskThreads) sum += products[i];
  sum = sum_of_threads(sum);
  if (threadIdx.x == 0) *inner = T(sum);
}

}  // namespace kfac_fast
