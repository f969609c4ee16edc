// kfac_fast_native::damped_inverse on CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../tensor_lists.h"
#include "inverse_plan.cuh"
#include "launch.h"

namespace kfac_fast {
namespace {

using torch::stable::Tensor;

// Adds a stack, whose dampings are those of a joint tensor from its place on or a tensor's own.
template <typename T>
void add(const Tensor& matrices, const Tensor& damping, std::optional<int64_t> place,
         const Tensor& out, InversePlan<T>& plan) {
  const int64_t batch_dims = matrices.dim() - 2;
  std::vector<int64_t> sizes, strides, damping_strides(batch_dims, 0);
  for (int64_t d = 0; d < matrices.dim(); ++d) {
    sizes.push_back(matrices.size(d));
    strides.push_back(matrices.stride(d));
  }
  const T* first = static_cast<const T*>(damping.const_data_ptr());
  if (place) {
    int64_t step = damping.stride(0);
    first += *place * step;
    for (int64_t d = batch_dims - 1; d >= 0; step *= sizes[d--]) damping_strides[d] = step;
  } else {
    for (int64_t d = 0; d < damping.dim(); ++d) damping_strides[d] = damping.stride(d);
  }
  plan.add({static_cast<const T*>(matrices.const_data_ptr()), first,
            static_cast<T*>(out.mutable_data_ptr()), batch_dims, sizes.data(), strides.data(),
            damping_strides.data()});
}

template <typename T>
void run(const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
         const std::vector<Tensor>& out, const Tensor& info, const std::optional<Tensor>& logdet) {
  const int32_t device = info.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  InversePlan<T> plan;
  std::optional<int64_t> place;
  if (is_joint(damping, info.numel())) place = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    add<T>(matrices[i], damping[damping.size() == 1 ? 0 : i], place, out[i], plan);
    if (place) *place += stack_size(matrices[i], matrices[i].dim() - 2);
  }
  plan.finish(multiprocessors(device, "damped_inverse"));
  std::vector<Tensor> workspace;
  plan.run(allocate<char>(info, plan.workspace_size(), workspace),
           static_cast<int32_t*>(info.mutable_data_ptr()),
           logdet ? static_cast<T*>(logdet->mutable_data_ptr()) : nullptr,
           launcher(device, kTaskThreads, "damped_inverse"));
}

bool damped_inverse(std::vector<Tensor> matrices, std::vector<Tensor> damping,
                    std::vector<Tensor> out, const Tensor& info,
                    const std::optional<Tensor>& logdet) {
  if (matrices.empty()) return false;
  const int32_t device = matrices[0].get_device_index();
  if (!damped_lists_pass(matrices, damping, out, info, logdet, device)) return false;
  if (info.numel() == 0) return true;
  if (matrices[0].scalar_type() == ScalarType::Double) {
    run<double>(matrices, damping, out, info, logdet);
  } else {
    run<float>(matrices, damping, out, info, logdet);
  }
  return true;
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CUDA, m) {
  m.impl("damped_inverse", TORCH_BOX(&damped_inverse));
}

}  // namespace
}  // namespace kfac_fast
