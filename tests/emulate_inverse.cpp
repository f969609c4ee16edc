// csrc/cuda/inverse_plan.cuh and the kernels on the CPU, for tests/test_inverse_cuda.py, which
// compiles this file with `-include emulate_cuda.h`.
#include "../csrc/cuda/inverse_plan.cuh"

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

// What the plan made of the list; bytes < 0 if something was written beyond the workspace.
struct Launches {
  int64_t table_rows, launches, thread_blocks, bytes;
};

template <typename T>
void run(const Arguments& a, Launches& launches) {
  InversePlan<T> plan;
  for (const Stack& s : std::vector<Stack>(a.stacks, a.stacks + a.count)) {
    plan.add({static_cast<const T*>(s.matrices), static_cast<const T*>(s.damping),
              static_cast<T*>(s.out), s.batch_dims, s.sizes, s.strides, s.damping_strides});
  }
  plan.finish(a.multiprocessors);
  constexpr int64_t beyond = 1 << 12;
  launches = {plan.table_rows(), 0, 0, plan.workspace_size()};
  std::vector<char> workspace(launches.bytes + beyond, ~char{0});  // NaN
  plan.run(workspace.data(), a.info, static_cast<T*>(a.logdet),
           [&](auto kernel, int blocks, const auto&... arguments) {
             const dim3 grid{static_cast<unsigned>(blocks)};
             ++launches.launches, launches.thread_blocks += blocks;
             Emulator::instance().run(grid, {kInverseThreads}, a.descending,
                                      [&] { kernel(arguments...); });
           });
  const bool inside = std::all_of(workspace.end() - beyond, workspace.end(),
                                  [](char byte) { return byte == ~char{0}; });
  if (!inside) launches.bytes = -1;
}

}  // namespace

extern "C" {

void inverse_float(const Arguments* a, Launches* launches) { run<float>(*a, *launches); }
void inverse_double(const Arguments* a, Launches* launches) { run<double>(*a, *launches); }
}
