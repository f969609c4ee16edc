#pragma once
// The matrices of a list as the kernels of inverses see them: a table in device memory, each row a
// run of matrices that lie evenly apart.

#include <cstdint>

#include "task_table.cuh"
#include "triangle.cuh"

namespace kfac_fast {

// Rows of the blocks that a large matrix is swept by.
template <typename T>
constexpr int kInverseBlock = sizeof(T) == 4 ? 64 : 32;

// What a launch has thread blocks for: matrices, their blocks of columns, the tiles of their lower
// triangles.
enum InverseTasks { kMatrices, kPanels, kTiles };
constexpr int kInverseTaskKinds = 3;

// How many tasks of a kind a matrix is.
template <typename T>
__host__ __device__ int inverse_tasks(InverseTasks kind, int64_t size, int tile) {
  constexpr int block = kInverseBlock<T>;
  if (kind == kPanels) return static_cast<int>((size + block - 1) / block);
  return kind == kTiles ? static_cast<int>(lower_tiles(size, tile)) : 1;
}

// Matrices of one size; strides in elements.
template <typename T>
struct InverseRun {
  Spaced<const T> matrices, damping;
  Spaced<T> out;  // contiguous matrices
  int64_t row_stride, column_stride;
  int32_t size;
  int32_t first;  // place among all matrices of the list
  int32_t count = 1;
  int32_t before[kInverseTaskKinds] = {};  // tasks of the runs before it
  T* workspace = nullptr;                  // of a large matrix

  // Adds the next matrix of the list if it continues the run.
  bool takes(const InverseRun& next) {
    return next.size == size && next.row_stride == row_stride &&
           next.column_stride == column_stride && matrices.takes(next.matrices, count) &&
           damping.takes(next.damping, count) && out.takes(next.out, count) && ++count;
  }
};

template <typename T>
struct InverseTable {
  const InverseRun<T>* runs;
  int32_t* info;
  T* logdet;  // or null
  int count;  // of runs
  int tile;   // edge of a task of kTiles
};

// What a large matrix needs beside its result while it is swept.
template <typename T>
struct InverseWorkspace {
  static constexpr int kBlock = kInverseBlock<T>, kLargestTile = 128;

  double* logdet;  // of the blocks that were swept
  T* factor;       // Y = -L^-1 of the last of them, [block, block]
  T* turned;       // Y^T
  T* panel;        // V = L^-1 U, [block, width]
  int64_t width;   // whole tiles

  __device__ InverseWorkspace(T* memory, int64_t size)
      : logdet(reinterpret_cast<double*>(memory)),
        factor(memory + kHead),
        turned(factor + kBlock * kBlock),
        panel(turned + kBlock * kBlock),
        width(width_of(size)) {}

  __host__ __device__ static int64_t elements(int64_t size) {
    return kHead + kBlock * (2 * kBlock + width_of(size));
  }

 private:
  static constexpr int kHead = 16 / sizeof(T);  // leaves the rest aligned for vectors

  __host__ __device__ static int64_t width_of(int64_t size) {
    return (size + kLargestTile - 1) / kLargestTile * kLargestTile;
  }
};

// Entries of -(A + damping I).
template <typename T>
struct DampedNegated {
  const T* matrix;
  int64_t row_stride, column_stride;
  T damping;

  __device__ T operator()(int row, int column) const {
    const T value = -matrix[row * row_stride + column * column_stride];
    return row == column ? value - damping : value;
  }
};

// What a thread block works on.
template <typename T>
struct InverseTask {
  InverseRun<T> run;
  int64_t index;  // of the matrix in the run
  int part;       // of the matrix' tasks

  __device__ int64_t place() const { return run.first + index; }
  __device__ T* out() const { return run.out[index]; }
  __device__ InverseWorkspace<T> workspace() const {
    return {run.workspace + index * InverseWorkspace<T>::elements(run.size), run.size};
  }
  __device__ DampedNegated<T> negated() const {
    return {run.matrices[index], run.row_stride, run.column_stride, *run.damping[index]};
  }
};

}  // namespace kfac_fast
