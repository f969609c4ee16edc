#pragma once
// The matrices of a list as the kernels of inverses see them: a table in device memory, each row a
// run of matrices that lie evenly apart.

#include <cstdint>

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
  const T* matrices;
  const T* damping;
  T* out;  // contiguous matrices
  int64_t row_stride, column_stride;
  int32_t size;
  int32_t first;  // place among all matrices of the list
  int32_t count = 1;
  int32_t before[kInverseTaskKinds] = {};  // tasks of the runs before it
  int64_t matrix_stride = 0, damping_stride = 0, out_stride = 0;
  T* workspace = nullptr;  // of a large matrix

  // Adds the next matrix of the list if it continues the run.
  bool takes(const InverseRun& next) {
    const bool alike =
        next.size == size && next.row_stride == row_stride && next.column_stride == column_stride;
    if (!alike) return false;
    const int64_t matrix_step = elements(matrices, next.matrices);
    const int64_t damping_step = elements(damping, next.damping);
    const int64_t out_step = elements(out, next.out);
    if (count == 1) {
      matrix_stride = matrix_step, damping_stride = damping_step, out_stride = out_step;
    } else if (matrix_step != count * matrix_stride || damping_step != count * damping_stride ||
               out_step != count * out_stride) {
      return false;
    }
    ++count;
    return true;
  }

 private:
  // Integers, because the pointers may be of different arrays.
  static int64_t elements(const T* from, const T* to) {
    const auto bytes = reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from);
    return bytes / static_cast<intptr_t>(sizeof(T));
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
  __device__ T* out() const { return run.out + index * run.out_stride; }
  __device__ InverseWorkspace<T> workspace() const {
    return {run.workspace + index * InverseWorkspace<T>::elements(run.size), run.size};
  }
  __device__ DampedNegated<T> negated() const {
    return {run.matrices + index * run.matrix_stride, run.row_stride, run.column_stride,
            run.damping[index * run.damping_stride]};
  }
};

// Rows of the table on their way to the device as parameters of a kernel, of which 4 KB fit. So
// nothing waits for a copy, and a captured graph reads no memory of the host.
template <typename T>
struct InverseUpload {
  static constexpr int kRuns = 40;
  InverseRun<T> runs[kRuns];
};

}  // namespace kfac_fast
