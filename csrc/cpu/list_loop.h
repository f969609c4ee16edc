#pragma once
// A loop over jobs of very different sizes, for operators on lists.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "gram_layout.h"
#include "in_order.h"
#include "parallel.h"
#include "scratch.h"

namespace kfac_fast {

// A loop that all threads share, in place of InOrder.
struct InParallel {
  static constexpr bool is_parallel = true;

  template <typename Run>
  void operator()(int64_t passes, double products, const Run& run) const {
    for_each_task(passes, worker_count(passes, products),
                  [&](int64_t pass, int64_t) { run(pass); });
  }
};

// A job's multiply-adds, and its numbers of scratch memory if one thread has it and if all share
// it.
struct Job {
  double work;
  int64_t scratch;
  int64_t scratch_to_share;
};

// The work of the busiest thread if each takes the next of these jobs when it is done.
inline double busiest_thread(const std::vector<Job>& jobs, const std::vector<int64_t>& order,
                             size_t first, size_t threads) {
  std::vector<double> busy(threads);
  for (size_t i = first; i < order.size(); ++i) {
    *std::min_element(busy.begin(), busy.end()) += jobs[order[i]].work;
  }
  return *std::max_element(busy.begin(), busy.end());
}

// How many of the jobs, the largest first, all threads should share one after another before each
// takes others for itself: that is `speedup` times faster than a thread alone.
inline size_t jobs_to_share(const std::vector<Job>& jobs, const std::vector<int64_t>& order,
                            size_t threads, double speedup) {
  constexpr double work_to_share = 5e7, balanced = 1.03;
  size_t shared = 0;
  double together = 0, left = 0, best = busiest_thread(jobs, order, 0, threads);
  for (const Job& job : jobs) left += job.work;
  for (size_t i = 0; i < order.size() && jobs[order[i]].work >= work_to_share; ++i) {
    // No more can be gained if all that is left were in balance.
    if ((together + left / static_cast<double>(threads)) * balanced >= best) break;
    together += jobs[order[i]].work / speedup;
    left -= jobs[order[i]].work;
    const double whole = together + busiest_thread(jobs, order, i + 1, threads);
    if (whole * balanced < best) {
      best = whole;
      shared = i + 1;
    }
  }
  return shared;
}

// Calls run(job, scratch, share) for every job, the largest first, so that no thread begins a long
// one when the others are done. All threads share as many of the largest as it takes that the rest
// keeps all of them busy; some small ones together are one task.
template <typename T, typename Run>
void for_each_job(const std::vector<Job>& jobs, const Run& run,
                  double speedup = torch::stable::get_num_threads()) {
  constexpr double work_a_task = 1e5;
  std::vector<int64_t> order(jobs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return jobs[a].work > jobs[b].work; });
  const auto threads = static_cast<size_t>(torch::stable::get_num_threads());
  const size_t shared = threads > 1 ? jobs_to_share(jobs, order, threads, speedup) : 0;
  int64_t scratch_to_share = 0;
  for (size_t i = 0; i < shared; ++i) {
    scratch_to_share = std::max(scratch_to_share, jobs[order[i]].scratch_to_share);
  }
  if (shared > 0) {  // new memory for each of them would be new pages each time
    const auto scratch = make_scratch<T>(scratch_to_share);
    for (size_t i = 0; i < shared; ++i) run(order[i], scratch.get(), InParallel{});
  }
  std::vector<size_t> begin{shared};
  int64_t scratch_size = 0;
  double gathered = 0, left = 0;
  for (size_t i = shared; i < order.size(); ++i) {
    scratch_size = std::max(scratch_size, jobs[order[i]].scratch);
    gathered += jobs[order[i]].work;
    left += jobs[order[i]].work;
    if (gathered >= work_a_task || i + 1 == order.size()) {
      begin.push_back(i + 1);
      gathered = 0;
    }
  }
  scratch_size = round_up(scratch_size, 64 / static_cast<int64_t>(sizeof(T)));
  const auto tasks = static_cast<int64_t>(begin.size()) - 1;
  const int64_t workers = worker_count(tasks, left);
  const auto scratch = make_scratch<T>(workers * scratch_size);
  for_each_task(tasks, workers, [&](int64_t task, int64_t worker) {
    for (size_t i = begin[task]; i < begin[task + 1]; ++i) {
      run(order[i], &scratch[worker * scratch_size], InOrder{});
    }
  });
}

}  // namespace kfac_fast
