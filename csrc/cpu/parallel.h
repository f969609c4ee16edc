#pragma once
// Parallel loops over tasks of unequal length, on torch's threads (torch.set_num_threads holds).

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace kfac_fast {

// Threads worth using: each should have some tens of microseconds of multiply-adds, since waking
// one takes several, and many more on a busy machine.
inline int64_t worker_count(int64_t tasks, double operations) {
  constexpr double operations_a_thread = 3e6;
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(operations / operations_a_thread, 1,
                             std::clamp<int64_t>(tasks, 1, threads));
}

// How far some tasks have come, for other tasks that need their results. A task may only wait for
// tasks that are drawn before it: then they are done or under way, and nobody waits in a circle.
class Progress {
 public:
  void advance() { done_.fetch_add(1, std::memory_order_release); }
  void wait_for(int64_t count) const {
    while (done_.load(std::memory_order_acquire) < count) std::this_thread::yield();
  }

 private:
  std::atomic<int64_t> done_{0};
};

// Calls run(task, worker) once for every task. The workers draw tasks in order from one counter, so
// a core that is slowed down does fewer of them; two calls at the same time differ in `worker`.
template <typename Run>
void for_each_task(int64_t tasks, int64_t workers, const Run& run) {
  if (workers == 1) {
    for (int64_t task = 0; task < tasks; ++task) run(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < tasks; task = next++) run(task, worker);
    }
  });
}

// The same for tasks that do not wait for each other, in no order: each worker begins with a
// stretch of its own, so that it reads on where it has read before, and then helps the others.
template <typename Run>
void for_each_independent_task(int64_t tasks, int64_t workers, const Run& run) {
  if (workers == 1) return for_each_task(tasks, workers, run);
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Stretch> stretches(workers);
  for (int64_t i = 0; i < workers; ++i) {
    stretches[i].next = tasks * i / workers;
    stretches[i].end = tasks * (i + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = 0; i < workers; ++i) {
        Stretch& stretch = stretches[(worker + i) % workers];
        for (int64_t task = stretch.next++; task < stretch.end; task = stretch.next++) {
          run(task, worker);
        }
      }
    }
  });
}

}  // namespace kfac_fast
