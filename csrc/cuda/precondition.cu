// kfac_fast_native::precondition on CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../layer_lists.h"
#include "launch.h"
#include "precondition_plan.cuh"

namespace kfac_fast {
namespace {

using torch::stable::Tensor;

template <typename T>
void run(const std::vector<Layer<T>>& layers, const Tensor& inner) {
  constexpr char op[] = "precondition";
  const int32_t device = inner.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  PreconditionPlan<T> plan(layers);
  plan.finish(plan.best_tile(multiprocessors(device, op)));
  std::vector<Tensor> workspace;
  plan.run(allocate<char>(inner, plan.workspace_size(), workspace),
           static_cast<T*>(inner.mutable_data_ptr()), launcher(device, kTaskThreads, op));
}

bool precondition(std::vector<Tensor> grads, std::vector<Tensor> input_sides,
                  std::vector<Tensor> gradient_sides, std::vector<Tensor> out,
                  const Tensor& inner) {
  if (!layer_lists_pass(grads, input_sides, gradient_sides, out, inner, inner.get_device_index())) {
    return false;
  }
  if (inner.scalar_type() == ScalarType::Double) {
    run(layers_of<double>(grads, input_sides, gradient_sides, out), inner);
  } else {
    run(layers_of<float>(grads, input_sides, gradient_sides, out), inner);
  }
  return true;
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CUDA, m) {
  m.impl("precondition", TORCH_BOX(&precondition));
}

}  // namespace
}  // namespace kfac_fast
