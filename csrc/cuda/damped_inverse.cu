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

template <typename T>
void add(const Tensor& matrices, const Tensor& damping, const Tensor& out, InversePlan<T>& plan) {
  std::vector<int64_t> sizes, strides, damping_strides(matrices.dim() - 2, 0);
  for (int64_t d = 0; d < matrices.dim(); ++d) {
    sizes.push_back(matrices.size(d));
    strides.push_back(matrices.stride(d));
  }
  for (int64_t d = 0; d < damping.dim(); ++d) damping_strides[d] = damping.stride(d);
  plan.add({static_cast<const T*>(matrices.const_data_ptr()),
            static_cast<const T*>(damping.const_data_ptr()),
            static_cast<T*>(out.mutable_data_ptr()), matrices.dim() - 2, sizes.data(),
            strides.data(), damping_strides.data()});
}

template <typename T>
void run(const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
         const std::vector<Tensor>& out, const Tensor& info, const std::optional<Tensor>& logdet) {
  const int32_t device = info.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  InversePlan<T> plan;
  for (size_t i = 0; i < matrices.size(); ++i) {
    add<T>(matrices[i], damping[damping.size() == 1 ? 0 : i], out[i], plan);
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
