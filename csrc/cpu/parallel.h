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
  constexpr double operations_a_thread = 1e6;
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

// The same tasks in every round. Each worker begins a round with a stretch of its own, so that it
// reads and writes what it did in the last round or call, and then helps the others. A task may
// wait for tasks of earlier rounds: a worker leaves a round when all tasks of the round are drawn.
class Stretches {
 public:
  Stretches(int64_t tasks, int64_t workers) : stretches_(workers) {
    for (int64_t i = 0; i < workers; ++i) {
      stretches_[i].first = tasks * i / workers;
      stretches_[i].count = tasks * (i + 1) / workers - stretches_[i].first;
    }
  }

  // Calls run(task) for every task of the round that this worker gets; rounds follow each other.
  template <typename Run>
  void work(int64_t round, int64_t worker, const Run& run) {
    const auto workers = static_cast<int64_t>(stretches_.size());
    for (int64_t i = 0; i < workers; ++i) {
      Stretch& stretch = stretches_[(worker + i) % workers];
      const int64_t before = round * stretch.count, after = before + stretch.count;
      int64_t drawn = stretch.drawn;
      while (drawn < after) {  // a draw that fails reads what is drawn by now
        if (stretch.drawn.compare_exchange_weak(drawn, drawn + 1)) {
          run(stretch.first + drawn - before);
        }
      }
    }
  }

 private:
  struct alignas(64) Stretch {
    std::atomic<int64_t> drawn{0};  // in all rounds
    int64_t first;
    int64_t count;
  };
  std::vector<Stretch> stretches_;
};

// Calls first(task, worker) once for every one of `before` tasks and, when all are done,
// then(task, worker) for every one of `tasks`, by stretches. It is one parallel loop, because
// threads may take long to wake.
template <typename First, typename Then>
void for_each_task_after(int64_t before, int64_t tasks, int64_t workers, const First& first,
                         const Then& then) {
  std::atomic<int64_t> next{0};
  Progress done;
  Stretches stretches(tasks, workers);
  for_each_worker(workers, [&](int64_t worker) {
    for (int64_t task = next++; task < before; task = next++) {
      first(task, worker);
      done.advance();
    }
    done.wait_for(before);
    stretches.work(0, worker, [&](int64_t task) { then(task, worker); });
  });
}

// Calls run(task, worker) once for every task, by stretches.
template <typename Run>
void for_each_independent_task(int64_t tasks, int64_t workers, const Run& run) {
  Stretches stretches(tasks, workers);
  for_each_worker(workers, [&](int64_t worker) {
    stretches.work(0, worker, [&](int64_t task) { run(task, worker); });
  });
}

}  // namespace kfac_fast
