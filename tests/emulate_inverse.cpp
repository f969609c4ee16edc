// csrc/cuda/inverse_plan.cuh and the kernels on the CPU, for tests/test_inverse_cuda.py, which
// compiles this file with `-include emulate_cuda.h`.
#include "../csrc/cuda/inverse_plan.cuh"
#include "emulate_lists.h"

using namespace kfac_fast;

namespace {

struct Stack {
  const void *matrices, *damping;
  void* out;
  int64_t batch_dims;
  const int64_t *sizes, *strides, *damping_strides;
};

struct Arguments {
  const Stack* stacks;
  int64_t count;
  int32_t* info;
  void* logdet;
  int64_t multiprocessors, descending;
};

template <typename T>
void run(const Arguments& a, Launches& launches) {
  InversePlan<T> plan;
  for (const Stack& s : std::vector<Stack>(a.stacks, a.stacks + a.count)) {
    plan.add({static_cast<const T*>(s.matrices), static_cast<const T*>(s.damping),
              static_cast<T*>(s.out), s.batch_dims, s.sizes, s.strides, s.damping_strides});
  }
  plan.finish(a.multiprocessors);
  launches = run_plan(plan, a.descending, a.info, static_cast<T*>(a.logdet));
}

}  // namespace

extern "C" {

void inverse_float(const Arguments* a, Launches* launches) { run<float>(*a, *launches); }
void inverse_double(const Arguments* a, Launches* launches) { run<double>(*a, *launches); }
}
