#pragma once
// Tables of matrices of mixed sizes, so that one launch serves a list. A row of a table is a run of
// matrices of one size that lie evenly apart; a launch has thread blocks for the tasks of all rows,
// one after the other.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kfac_fast {

constexpr int kTaskThreads = 256;

// What lies evenly apart: the matrices of a run, or numbers.
template <typename T>
struct Spaced {
  T* first;
  int64_t step = 0;  // in elements

  __device__ T* operator[](int64_t index) const { return first + index * step; }

  // Whether the next goes on after the `count` that are there; the second sets the step.
  bool takes(const Spaced& next, int count) {
    // Integers, because the pointers may be of different arrays.
    const auto bytes = reinterpret_cast<intptr_t>(next.first) - reinterpret_cast<intptr_t>(first);
    const int64_t distance = bytes / static_cast<intptr_t>(sizeof(T));
    if (count == 1) step = distance;
    return distance == count * step;
  }
};

// How many tasks of a launch the rows before one have, and each of its matrices.
struct TaskCount {
  int before, each;
};

struct TaskPlace {
  int row;    // of the table
  int index;  // of the matrix in the run
  int part;   // of the matrix' tasks
};

// The task of this thread block; every thread looks at other rows. A row has a `count` of matrices,
// and tasks(row) are its TaskCount.
template <typename Run, typename Tasks>
__device__ TaskPlace find_task(const Run* runs, int rows, const Tasks& tasks) {
  __shared__ int found;
  const int task = blockIdx.x;
  for (int i = threadIdx.x; i < rows; i += kTaskThreads) {
    const TaskCount of_run = tasks(runs[i]);
    if (of_run.before <= task && task < of_run.before + runs[i].count * of_run.each) found = i;
  }
  __syncthreads();
  const TaskCount of_run = tasks(runs[found]);
  const int within = task - of_run.before;
  return {found, within / of_run.each, within % of_run.each};
}

// The sum over all threads, for thread 0, in an order that is always the same.
__device__ inline double sum_of_threads(double value) {
  __shared__ double sums[kTaskThreads];
  const int thread = threadIdx.x;
  sums[thread] = value;
  for (int half = kTaskThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  return sums[thread];
}

// Rows of a table on their way to the device as parameters of a kernel, of which 4 KB fit. So
// nothing waits for a copy, and a captured graph reads no memory of the host.
template <typename Run>
struct TableUpload {
  static constexpr int kRuns = 4000 / sizeof(Run);
  Run runs[kRuns];
};

template <typename Run>
__global__ void table_upload_kernel(const __grid_constant__ TableUpload<Run> upload, int count,
                                    Run* runs) {
  const int i = threadIdx.x;
  if (i < count) runs[i] = upload.runs[i];
}

template <typename Run, typename Launch>
void upload_table(const std::vector<Run>& runs, Run* table, const Launch& launch) {
  constexpr size_t most = TableUpload<Run>::kRuns;
  for (size_t first = 0; first < runs.size(); first += most) {
    const size_t count = std::min(most, runs.size() - first);
    TableUpload<Run> part;
    std::copy_n(runs.begin() + first, count, part.runs);
    launch(table_upload_kernel<Run>, 1, part, static_cast<int>(count), table + first);
  }
}

}  // namespace kfac_fast
