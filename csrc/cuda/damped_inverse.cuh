#pragma once
// Inverses of damped symmetric matrices of mixed sizes. No torch headers, so that any nvcc compiles
// it and a C++ compiler can emulate it.
//
// A small matrix is swept in the registers of one thread block, a pivot at a time. A large one is
// swept in its result, a block of pivots at a time: csrc/block_sweep.h has the equations and the
// signs, which are the same here. Each phase sweeps one block of every matrix that has one left, in
// three launches: the diagonal block, its panels, and the rest of the lower triangle. No sum
// depends on the order in which thread blocks run.

#include <cmath>
#include <cstdint>

#include "inverse_table.cuh"
#include "tile_product.cuh"

namespace kfac_fast {

constexpr int kInverseSmall = 128;  // rows of the largest matrix that fits into registers
constexpr int kInverseDepth = 16;   // rows of V that a step of an update multiplies

// The task of this thread block.
template <typename T>
__device__ InverseTask<T> inverse_task(const InverseTable<T>& table, InverseTasks kind) {
  const TaskPlace place = find_task(table.runs, table.count, [&](const InverseRun<T>& run) {
    return TaskCount{run.before[kind], inverse_tasks<T>(kind, run.size, table.tile)};
  });
  return {table.runs[place.row], place.index, place.part};
}

// Small squares, one to a thread block

__device__ inline float inverse_root(float v) {
  const float root = rsqrt(v);  // to two units of the last place
  return fma(root / 2, fma(-v * root, root, 1.f), root);
}
__device__ inline double inverse_root(double v) { return 1 / sqrt(v); }

// A symmetric matrix, all of it, in the registers of 16 x 16 threads.
template <typename T, int kPer>
struct InverseSquare {
  // A thread's rows and columns lie in strips, so that it reads vectors from shared memory.
  static constexpr int kStrip = kPer % 4 ? 2 : 4, kSide = 16 * kPer;
  T entry[kPer][kPer];

  __device__ static int place(int lane, int i) {
    return i / kStrip * (16 * kStrip) + lane * kStrip + i % kStrip;
  }

  // Takes `size` rows up to the diagonal from read(row, column); zero beyond. What lies above the
  // diagonal is not read before a sweep has written it.
  template <typename Read>
  __device__ void load(int size, const Read& read) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int row = place(threadIdx.x / 16, i);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int column = place(threadIdx.x % 16, j);
        const bool below = j / kStrip <= i / kStrip && column <= row;
        entry[i][j] = below && row < size ? read(row, column) : T(0);
      }
    }
  }

  // Calls write(row, column, entry) up to `size`.
  template <typename Write>
  __device__ void store(int size, const Write& write) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int row = place(threadIdx.x / 16, i);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int column = place(threadIdx.x % 16, j);
        if (row < size && column < size) write(row, column, entry[i][j]);
      }
    }
  }

  // Sweeps the first `size` pivots of -A one after the other; what lies beyond must be zero.
  // Returns the first that is not positive and finite, or `size`. Calls visit(k, pivot, scale,
  // column) with scale = pivot^-1/2 and the column k of the matrix, of which the pivots before k
  // are swept.
  //
  // Entries that mirror each other are products of the same numbers, so that they have the same
  // bits.
  template <typename Visit>
  __device__ int sweep(int size, const Visit& visit) {
    alignas(16) __shared__ T columns[2][kSide];
    const int lane_row = threadIdx.x / 16, lane_column = threadIdx.x % 16;
#pragma unroll
    for (int strip = 0; strip < kPer; strip += kStrip) {
      for (int lane = 0; lane < 16; ++lane) {
#pragma unroll
        for (int at = strip; at < strip + kStrip; ++at) {
          const int k = place(lane, at);
          if (k >= size) return size;
          T* column = columns[at % 2];
          if (lane_column == lane) {
#pragma unroll
            for (int i = 0; i < kPer; ++i) column[place(lane_row, i)] = entry[i][at];
          }
          __syncthreads();
          const T pivot = -column[k];
          if (!(pivot > 0 && pivot < T(INFINITY))) return k;
          const T scale = inverse_root(pivot);
          visit(k, pivot, scale, column);
          T rows[kPer], others[kPer];  // V = L^-1 U
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
            rows[i] = -scale * column[place(lane_row, i)];
            others[i] = -scale * column[place(lane_column, i)];
          }
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
#pragma unroll
            for (int j = 0; j < kPer; ++j) {
              entry[i][j] = fma(rows[i], others[j], entry[i][j]);
            }
          }
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
            if (lane_row == lane) entry[at][i] = -scale * others[i];
            if (lane_column == lane) entry[i][at] = -scale * rows[i];
          }
          if (lane_row == lane && lane_column == lane) entry[at][at] = scale * scale;
        }
      }
    }
    return size;
  }
};

// Matrices of at most 16 kPer rows.
template <typename T, int kPer>
__global__ void __launch_bounds__(kTaskThreads, sizeof(T) * kPer <= 32 ? 2 : 1)
    inverse_small_kernel(InverseTable<T> table) {
  const InverseTask<T> task = inverse_task(table, kMatrices);
  const int thread = threadIdx.x, size = task.run.size;
  InverseSquare<T, kPer> square;
  square.load(size, task.negated());
  double own_pivot = 1;
  const int done = square.sweep(size, [&](int k, T pivot, T, const T*) {
    if (thread == k) own_pivot = pivot;
  });
  const bool failed = done < size;
  T* out = task.out();
  if (failed) {
    for (int i = thread; i < size * size; i += kTaskThreads) out[i] = T(NAN);
  } else {
    square.store(size, [&](int row, int column, T value) { out[row * size + column] = value; });
  }
  if (thread == 0) table.info[task.place()] = failed ? done + 1 : 0;
  if (!table.logdet) return;
  const double logdet = sum_of_threads(log(own_pivot));
  if (thread == 0) table.logdet[task.place()] = failed ? T(NAN) : T(logdet);
}

// Large matrices

// out <- -(A + damping I) in and below the diagonal.
template <typename T>
__global__ void __launch_bounds__(kTaskThreads, 2) inverse_load_kernel(InverseTable<T> table) {
  const InverseTask<T> task = inverse_task(table, kTiles);
  const LowerTile tile = lower_tile(task.part);
  const DampedNegated<T> negated = task.negated();
  const int size = task.run.size, first_row = tile.row * table.tile;
  const int first_column = tile.column * table.tile, last_row = min(first_row + table.tile, size);
  for (int row = first_row + threadIdx.x / 32; row < last_row; row += kTaskThreads / 32) {
    const int last_column = min(first_column + table.tile - 1, row);
    for (int column = first_column + threadIdx.x % 32; column <= last_column; column += 32) {
      task.out()[int64_t{row} * size + column] = negated(row, column);
    }
  }
  if (task.part == 0 && threadIdx.x == 0) table.info[task.place()] = 0;
}

// The inverse of a diagonal block in its place, and of its Cholesky factor in the workspace: row k
// of L^-1 is what the sweep divides by the root of pivot k.
template <typename T>
__global__ void __launch_bounds__(kTaskThreads, 2)
    inverse_diagonal_kernel(InverseTable<T> table, int phase) {
  constexpr int kBlock = kInverseBlock<T>;
  const InverseTask<T> task = inverse_task(table, kMatrices);
  if (table.info[task.place()]) return;
  const int thread = threadIdx.x, size = task.run.size, first = phase * kBlock;
  const int count = min(kBlock, size - first);
  const InverseWorkspace<T> workspace = task.workspace();
  T* corner = task.out() + int64_t{first} * size + first;
  InverseSquare<T, kBlock / 16> square;
  square.load(count, [&](int row, int column) { return corner[int64_t{row} * size + column]; });
  auto keep = [&](int k, T y) {
    if (thread >= kBlock) return;
    workspace.factor[k * kBlock + thread] = y;
    workspace.turned[thread * kBlock + k] = y;
  };
  double own_pivot = 1;
  const int done = square.sweep(count, [&](int k, T pivot, T scale, const T* column) {
    if (thread == k) own_pivot = pivot;
    if (thread < kBlock)
      keep(k, thread < k ? -scale * column[thread] : thread == k ? -scale : T(0));
  });
  if (done < count) {
    if (thread > 0) return;
    table.info[task.place()] = first + done + 1;
    if (table.logdet) table.logdet[task.place()] = T(NAN);
    return;
  }
  for (int k = count; k < kBlock; ++k) keep(k, 0);
  square.store(count, [&](int row, int column, T value) {
    if (column <= row) corner[int64_t{row} * size + column] = value;
  });
  if (!table.logdet) return;
  double logdet = sum_of_threads(log(own_pivot));
  if (thread > 0) return;
  if (phase > 0) logdet += *workspace.logdet;
  *workspace.logdet = logdet;
  if (first + count == size) table.logdet[task.place()] = T(logdet);
}

// A block of columns of U = A[P], where P are the pivots of the phase: V = L^-1 U into the
// workspace, zero in the columns P themselves, and W = L^-T V into the place of U.
template <typename T>
__global__ void __launch_bounds__(kTaskThreads, 2)
    inverse_panel_kernel(InverseTable<T> table, int phase) {
  constexpr int kBlock = kInverseBlock<T>, kRows = kBlock / 8, kColumns = kBlock / 32;
  alignas(16) __shared__ T factor[kBlock][kBlock];
  __shared__ T panel[kBlock][kBlock + 1];  // padded, for it is turned on its way
  const InverseTask<T> task = inverse_task(table, kPanels);
  if (table.info[task.place()]) return;
  const int size = task.run.size, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const InverseWorkspace<T> workspace = task.workspace();
  T* v = workspace.panel + task.part * kBlock;
  // The lower triangle holds the columns after P as rows.
  const bool turned = task.part > phase;
  const int first_row = (turned ? task.part : phase) * kBlock;
  const int first_column = (turned ? phase : task.part) * kBlock;
  T* out = task.out();

  T sum[kRows][kColumns] = {};
  // Calls visit(y, x) of the entries of a block, neighbouring x by neighbouring threads.
  auto each = [&](const auto& visit) {
    for (int y = warp; y < kBlock; y += kTaskThreads / 32) {
      for (int x = lane; x < kBlock; x += 32) visit(y, x);
    }
  };
  auto store_sums = [&](const auto& visit) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        visit(warp * kRows + i, lane + 32 * j, sum[i][j]);
        sum[i][j] = 0;
      }
    }
  };
  if (task.part == phase) {
    return each([&](int y, int x) { v[y * workspace.width + x] = 0; });
  }
  each([&](int y, int x) {
    const int64_t row = first_row + y, column = first_column + x;
    const T value = row < size && column < size ? out[row * size + column] : T(0);
    (turned ? panel[x][y] : panel[y][x]) = value;
    factor[y][x] = workspace.turned[y * kBlock + x];
  });
  __syncthreads();
  multiply_tiles(factor, panel, sum);
  __syncthreads();
  store_sums([&](int y, int x, T value) { panel[y][x] = v[y * workspace.width + x] = value; });
  each([&](int y, int x) { factor[y][x] = workspace.factor[y * kBlock + x]; });
  __syncthreads();
  multiply_tiles(factor, panel, sum);
  __syncthreads();
  store_sums([&](int y, int x, T value) { panel[y][x] = value; });
  __syncthreads();
  each([&](int y, int x) {
    const int64_t row = first_row + y, column = first_column + x;
    if (row < size && column < size) out[row * size + column] = turned ? panel[x][y] : panel[y][x];
  });
}

// What a thread moves at once.
template <typename T>
struct alignas(16) InverseVector {
  static constexpr int kCount = 16 / sizeof(T);
  T value[kCount];
};

// A tile of out += V^T V.
template <typename T, int kTile>
__global__ void __launch_bounds__(kTaskThreads, 2)
    inverse_update_kernel(InverseTable<T> table, int phase) {
  using Vector = InverseVector<T>;
  constexpr int kBlock = kInverseBlock<T>, kRows = kTile / 8, kColumns = kTile / 32;
  constexpr int kRowVectors = kTile / Vector::kCount;
  constexpr int kRowsTogether = kTaskThreads / kRowVectors;
  constexpr int kVectors = kInverseDepth / kRowsTogether;  // of a thread
  alignas(16) __shared__ T left[2][kInverseDepth][kTile], right[2][kInverseDepth][kTile];
  const InverseTask<T> task = inverse_task(table, kTiles);
  if (table.info[task.place()]) return;
  const LowerTile tile = lower_tile(task.part);
  // All of such a tile lies in the rows or columns of the phase, where V is zero.
  if (kTile == kBlock && (tile.row == phase || tile.column == phase)) return;
  const int thread = threadIdx.x, size = task.run.size;
  const InverseWorkspace<T> workspace = task.workspace();
  // The thread's first vectors; its others lie kTaskThreads vectors further.
  const int row = thread / kRowVectors, column = thread % kRowVectors * Vector::kCount;
  const T* v = workspace.panel + row * workspace.width + tile.row * kTile + column;
  const int to_right = (tile.column - tile.row) * kTile;

  Vector next_left[kVectors], next_right[kVectors];
  auto load = [&] {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      next_left[i] = *reinterpret_cast<const Vector*>(v);
      next_right[i] = *reinterpret_cast<const Vector*>(v + to_right);
      v += kRowsTogether * workspace.width;
    }
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = row + i * kRowsTogether;
      *reinterpret_cast<Vector*>(&left[buffer][at][column]) = next_left[i];
      *reinterpret_cast<Vector*>(&right[buffer][at][column]) = next_right[i];
    }
  };

  // While a step multiplies, the next one's entries are on their way.
  constexpr int kSteps = kBlock / kInverseDepth;
  T sum[kRows][kColumns] = {};
  load();
  store(0);
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) load();
    __syncthreads();
    multiply_tiles(left[step % 2], right[step % 2], sum);
    if (step + 1 < kSteps) store((step + 1) % 2);
  }

  // The loads of a few rows are under way together.
  constexpr int kTogether = 4;
  const int first_row = tile.row * kTile + thread / 32 * kRows;
  const int first_column = tile.column * kTile + thread % 32;
  T* out = task.out() + int64_t{first_row} * size + first_column;
#pragma unroll
  for (int first = 0; first < kRows; first += kTogether) {
    T old[kTogether][kColumns];
    auto each = [&](const auto& visit) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int out_row = first_row + first + i, out_column = first_column + 32 * j;
          if (out_row >= size || out_column > out_row) continue;
          visit(out[int64_t{first + i} * size + 32 * j], old[i][j], sum[first + i][j]);
        }
      }
    };
    each([](T& entry, T& before, T) { before = entry; });
    each([](T& entry, T before, T products) { entry = before + products; });
  }
}

// The mirror image of the lower triangle, or NaN where a pivot was not positive.
template <typename T>
__global__ void __launch_bounds__(kTaskThreads, 2) inverse_finish_kernel(InverseTable<T> table) {
  constexpr int kPatch = 32;
  __shared__ T patch[kPatch][kPatch + 1];
  const InverseTask<T> task = inverse_task(table, kTiles);
  const LowerTile tile = lower_tile(task.part);
  const int64_t size = task.run.size;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = table.tile / kPatch;
  const bool failed = table.info[task.place()] != 0;
  T* out = task.out();
  for (int p = 0; p < side * side; ++p) {
    const int64_t first_row = tile.row * table.tile + p / side * kPatch;
    const int64_t first_column = tile.column * table.tile + p % side * kPatch;
    for (int y = warp; y < kPatch; y += kTaskThreads / 32) {
      const int64_t row = first_row + y, column = first_column + lane;
      if (row >= size || column > row) continue;
      T& entry = out[row * size + column];
      if (failed) entry = T(NAN);
      patch[y][lane] = entry;
    }
    __syncthreads();
    for (int y = warp; y < kPatch; y += kTaskThreads / 32) {
      const int64_t row = first_column + y, column = first_row + lane;
      if (column < size && row < column) out[row * size + column] = patch[lane][y];
    }
    __syncthreads();
  }
}

}  // namespace kfac_fast
