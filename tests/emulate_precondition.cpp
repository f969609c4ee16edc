// csrc/cuda/precondition_plan.cuh and the kernels on the CPU, for tests/test_precondition_cuda.py,
// which compiles this file with `-include emulate_cuda.h`.
#include "../csrc/cuda/precondition_plan.cuh"
#include "emulate_lists.h"

using namespace kfac_fast;

namespace {

struct Arguments {
  const void* layers;
  int64_t count, multiprocessors, tile, descending;  // tile 0: the best one
  void* inner;
};

template <typename T>
void run(const Arguments& a, Launches& launches) {
  const auto* layers = static_cast<const Layer<T>*>(a.layers);
  PreconditionPlan<T> plan(std::vector<Layer<T>>(layers, layers + a.count));
  plan.finish(a.tile ? static_cast<int>(a.tile) : plan.best_tile(a.multiprocessors));
  launches = run_plan(plan, a.descending, static_cast<T*>(a.inner));
}

}  // namespace

extern "C" {

void precondition_float(const Arguments* a, Launches* launches) { run<float>(*a, *launches); }
void precondition_double(const Arguments* a, Launches* launches) { run<double>(*a, *launches); }
}
