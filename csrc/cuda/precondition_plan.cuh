#pragma once
// From a list of layers to the launches that precondition their gradients.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../layer.h"
#include "precondition.cuh"

namespace kfac_fast {

template <typename T>
class PreconditionPlan {
 public:
  // Of layers that are not empty.
  explicit PreconditionPlan(const std::vector<Layer<T>>& layers) {
    for (const Layer<T>& layer : layers) {
      const LayerRun<T> run{.grad = run_of(layer.grad),
                            .left = run_of(layer.left),
                            .right = run_of(layer.right),
                            .half = {},
                            .out = {layer.out},
                            .rows = static_cast<int32_t>(layer.rows),
                            .columns = static_cast<int32_t>(layer.columns)};
      if (runs_.empty() || !runs_.back().takes(run)) runs_.push_back(run);
    }
    // The longest sums first, so that none begins when the others are done.
    std::stable_sort(runs_.begin(), runs_.end(),
                     [](const auto& a, const auto& b) { return depth(a) > depth(b); });
  }

  // The tile that is done first if a step of one of twice the edge takes three times as long: it
  // has four times the products, but reads less of shared memory for each. A long sum takes its
  // time however many multiprocessors there are.
  int best_tile(int64_t multiprocessors) const {
    int best = 0;
    int64_t least = 0;
    for (int tile = 32, time = 1; tile <= kLargestTile; tile *= 2, time *= 3) {
      int64_t all = 0, longest = 0;
      for (const LayerRun<T>& run : runs_) {
        all += depth(run) * run.count * run.tiles(tile);
        longest = std::max(longest, depth(run));
      }
      const int64_t needed = time * std::max(all / multiprocessors, longest);
      if (!best || needed < least) best = tile, least = needed;
    }
    return best;
  }

  // Makes the table for tiles of this edge: 32, 64 or, in float32, 128.
  void finish(int tile) {
    tile_ = tile;
    for (LayerRun<T>& run : runs_) {
      run.before = tasks_;
      tasks_ += run.count * run.tiles(tile);
    }
  }

  int64_t table_rows() const { return runs_.size(); }

  // Bytes of workspace.
  int64_t workspace_size() const {
    int64_t size = table_size() + tasks_ * sizeof(double);
    for (const LayerRun<T>& run : runs_) size += run.count * matrix_size(run) * sizeof(T);
    return size;
  }

  // Calls launch(kernel, thread blocks, arguments...) for each kernel in turn.
  template <typename Launch>
  void run(void* workspace, T* inner, const Launch& launch) {
    auto* table = static_cast<LayerRun<T>*>(workspace);
    auto* products = reinterpret_cast<double*>(static_cast<char*>(workspace) + table_size());
    T* half = reinterpret_cast<T*>(products + tasks_);
    for (LayerRun<T>& run : runs_) {
      run.half = {half, matrix_size(run)};
      half += run.count * matrix_size(run);
    }
    upload_table(runs_, table, launch);
    const LayerTable<T> layers{table, products, static_cast<int>(runs_.size())};
    for (const bool is_last : {false, true}) {
      if (!tasks_) break;
      if (tile_ == 32) launch(precondition_product_kernel<T, 32>, tasks_, layers, is_last);
      if (tile_ == 64) launch(precondition_product_kernel<T, 64>, tasks_, layers, is_last);
      if constexpr (kLargestTile == 128) {
        if (tile_ == 128) launch(precondition_product_kernel<T, 128>, tasks_, layers, is_last);
      }
    }
    launch(inner_product_kernel<T>, 1, products, tasks_, inner);
  }

 private:
  static constexpr int kLargestTile = sizeof(T) == 4 ? 128 : 64;

  static StridedRun<T> run_of(const Strided<T>& matrix) {
    return {{matrix.data}, matrix.row_stride, matrix.column_stride};
  }

  // Of both sums together.
  static int64_t depth(const LayerRun<T>& run) { return run.rows + run.columns; }

  static int64_t matrix_size(const LayerRun<T>& run) { return int64_t{run.rows} * run.columns; }

  int64_t table_size() const { return runs_.size() * sizeof(LayerRun<T>); }

  std::vector<LayerRun<T>> runs_;
  int tile_ = 0, tasks_ = 0;
};

}  // namespace kfac_fast
