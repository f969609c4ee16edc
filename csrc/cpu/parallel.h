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

// Calls run(worker) for every worker, at the same time if there are as many threads.
template <typename Run>
void for_each_worker(int64_t workers, const Run& run) {
  if (workers == 1) return run(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) run(worker);
  });
}

// Calls run(task, worker) once for every task. The workers draw tasks in order from one counter, so
// a core that is slowed down does fewer of them; two calls at the same time differ in `worker`.
template <typename Run>
void for_each_task(int64_t tasks, int64_t workers, const Run& run) {
  std::atomic<int64_t> next{0};
  for_each_worker(workers, [&](int64_t worker) {
    for (int64_t task = next++; task < tasks; task = next++) run(task, worker);
  });
}

// Tasks that do not wait for each other. Each worker begins with a stretch of its own, so that in
// every call it reads and writes where it did in the last, and then helps the others.
class Stretches {
 public:
  Stretches(int64_t tasks, int64_t workers) : stretches_(workers) {
    for (int64_t i = 0; i < workers; ++i) {
      stretches_[i].next = tasks * i / workers;
      stretches_[i].end = tasks * (i + 1) / workers;
    }
  }

  // Calls run(task) for every task that this worker gets.
  template <typename Run>
  void work(int64_t worker, const Run& run) {
    const auto workers = static_cast<int64_t>(stretches_.size());
    for (int64_t i = 0; i < workers; ++i) {
      Stretch& stretch = stretches_[(worker + i) % workers];
      for (int64_t task = stretch.next++; task < stretch.end; task = stretch.next++) run(task);
    }
  }

 private:
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Stretch> stretches_;
};

// Calls run(task, worker) once for every task, by stretches.
template <typename Run>
void for_each_independent_task(int64_t tasks, int64_t workers, const Run& run) {
  Stretches stretches(tasks, workers);
  for_each_worker(workers, [&](int64_t worker) {
    stretches.work(worker, [&](int64_t task) { run(task, worker); });
  });
}

}  // namespace kfac_fast
