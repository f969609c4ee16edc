#pragma once
// From a list of matrices to the launches that invert them.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "damped_inverse.cuh"

namespace kfac_fast {

// A stacked batch [*, n, n] of matrices, its damping [*] or [] and its result [*, n, n], which is
// contiguous; strides in elements.
template <typename T>
struct InverseStack {
  const T* matrices;
  const T* damping;
  T* out;
  int64_t batch_dims;
  const int64_t *sizes, *strides;
  const int64_t* damping_strides;
};

template <typename T>
class InversePlan {
 public:
  // Adds the next matrices of the list.
  void add(const InverseStack<T>& stack) {
    const int64_t dims = stack.batch_dims, size = stack.sizes[dims];
    int64_t count = 1;
    for (int64_t d = 0; d < dims; ++d) count *= stack.sizes[d];
    for (int64_t n = 0; n < count; ++n) {
      InverseRun<T> run{{stack.matrices},    {stack.damping},         {stack.out + n * size * size},
                        stack.strides[dims], stack.strides[dims + 1], static_cast<int32_t>(size),
                        matrices_++};
      for (int64_t d = dims - 1, rest = n; d >= 0; rest /= stack.sizes[d--]) {
        const int64_t index = rest % stack.sizes[d];
        run.matrices.first += index * stack.strides[d];
        run.damping.first += index * stack.damping_strides[d];
      }
      if (runs_.empty() || !runs_.back().takes(run)) runs_.push_back(run);
    }
  }

  // Makes the table of all that was added.
  void finish(int64_t multiprocessors) {
    std::stable_sort(runs_.begin(), runs_.end(),
                     [](const InverseRun<T>& a, const auto& b) { return a.size > b.size; });
    tile_ = kSmallTile;
    if (sizeof(T) == 4 && tiles(kLargeTile) >= multiprocessors) tile_ = kLargeTile;
    for (size_t i = 1; i < runs_.size(); ++i) {
      InverseRun<T>& run = runs_[i];
      for (const InverseTasks kind : {kMatrices, kPanels, kTiles}) {
        const bool goes_on = side(run) == side(runs_[i - 1]);
        run.before[kind] = goes_on ? after(runs_[i - 1], kind) : 0;
      }
    }
  }

  int64_t table_rows() const { return runs_.size(); }

  // Bytes of workspace.
  int64_t workspace_size() const {
    int64_t size = table_size();
    for (const InverseRun<T>& run : runs_) size += sizeof(T) * workspace_of(run);
    return size;
  }

  // Calls launch(kernel, thread blocks, arguments...) for each kernel in turn.
  template <typename Launch>
  void run(void* workspace, int32_t* info, T* logdet, const Launch& launch) {
    auto* table = static_cast<InverseRun<T>*>(workspace);
    upload(table, launch);
    for (size_t first = 0, last = 0; first < runs_.size(); first = last) {
      const int rows = side(runs_[first]);
      while (last < runs_.size() && side(runs_[last]) == rows) ++last;
      const int count = static_cast<int>(last - first);
      const InverseTable<T> part{table + first, info, logdet, count, tile_};
      const int matrices = after(runs_[last - 1], kMatrices);
      switch (rows) {
        case 32:
          launch(inverse_small_kernel<T, 2>, matrices, part);
          break;
        case 64:
          launch(inverse_small_kernel<T, 4>, matrices, part);
          break;
        case 96:
          launch(inverse_small_kernel<T, 6>, matrices, part);
          break;
        case 128:
          launch(inverse_small_kernel<T, 8>, matrices, part);
          break;
        default:
          sweep(part, launch);
      }
    }
  }

 private:
  static constexpr int kSmallTile = 64, kLargeTile = 128;

  // Rows of the kernel that serves the run, 0 for the blocked ones.
  static int side(const InverseRun<T>& run) {
    return run.size > kInverseSmall ? 0 : (run.size + 31) / 32 * 32;
  }

  static int64_t workspace_of(const InverseRun<T>& run) {
    return side(run) ? 0 : run.count * InverseWorkspace<T>::elements(run.size);
  }

  // Whole vectors, for what follows.
  int64_t table_size() const { return (runs_.size() * sizeof(InverseRun<T>) + 15) / 16 * 16; }

  int64_t tiles(int tile) const {
    int64_t sum = 0;
    for (const InverseRun<T>& run : runs_) {
      if (!side(run)) sum += run.count * lower_tiles(run.size, tile);
    }
    return sum;
  }

  // Tasks of the runs up to this one.
  int after(const InverseRun<T>& run, InverseTasks kind) const {
    return run.before[kind] + run.count * inverse_tasks<T>(kind, run.size, tile_);
  }

  template <typename Launch>
  void upload(InverseRun<T>* table, const Launch& launch) {
    T* workspace = reinterpret_cast<T*>(reinterpret_cast<char*>(table) + table_size());
    for (InverseRun<T>& run : runs_) {
      run.workspace = workspace;
      workspace += workspace_of(run);
    }
    upload_table(runs_, table, launch);
  }

  // The large matrices lie first in the table, the largest before the others: those with blocks
  // left are always its beginning.
  template <typename Launch>
  void sweep(InverseTable<T> table, const Launch& launch) {
    const InverseRun<T>& last = runs_[table.count - 1];
    const int tiles = after(last, kTiles);
    const InverseTable<T> all = table;
    launch(inverse_load_kernel<T>, tiles, all);
    for (int phase = 0;; ++phase) {
      while (table.count && runs_[table.count - 1].size <= phase * kInverseBlock<T>) --table.count;
      if (!table.count) break;
      const InverseRun<T>& smallest = runs_[table.count - 1];
      launch(inverse_diagonal_kernel<T>, after(smallest, kMatrices), table, phase);
      launch(inverse_panel_kernel<T>, after(smallest, kPanels), table, phase);
      const int updates = after(smallest, kTiles);
      if (tile_ == kSmallTile) launch(inverse_update_kernel<T, kSmallTile>, updates, table, phase);
      if constexpr (sizeof(T) == 4) {
        if (tile_ == kLargeTile)
          launch(inverse_update_kernel<T, kLargeTile>, updates, table, phase);
      }
    }
    launch(inverse_finish_kernel<T>, tiles, all);
  }

  std::vector<InverseRun<T>> runs_;
  int32_t matrices_ = 0;
  int tile_ = kSmallTile;
};

}  // namespace kfac_fast
