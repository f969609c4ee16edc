// kfac_fast_native::gram on CUDA; the operator's schema and checks are in kfac_fast/schema.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "gram.cuh"

// Weak, because a torch without CUDA lacks it and would refuse the whole library.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace kfac_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Arguments {
  const Tensor& x;
  const std::optional<Tensor>& mask;
  int64_t groups;
  bool bias;
  double alpha, beta;
  const Tensor& out;
};

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "gram: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int multiprocessors(int32_t device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Uninitialised memory from torch's caching allocator.
template <typename T>
T* allocate(const Tensor& like, int64_t count, std::vector<Tensor>& keep) {
  keep.push_back(torch::stable::new_empty(like, {count * int64_t{sizeof(T)}}, ScalarType::Byte));
  return static_cast<T*>(keep.back().mutable_data_ptr());
}

template <typename In>
GramRows<In> rows_of(const Arguments& a) {
  const int64_t leading = a.x.dim() - 1;
  GramRows<In> in{static_cast<const In*>(a.x.const_data_ptr()),
                  a.mask ? static_cast<const bool*>(a.mask->const_data_ptr()) : nullptr,
                  a.x.size(leading) / a.groups, a.x.stride(leading)};
  for (int64_t i = 0; i < leading; ++i) {
    const GramAxis axis{a.x.size(i), a.x.stride(i), a.mask ? a.mask->stride(i) : 0};
    STD_TORCH_CHECK(in.add(axis), "gram: x must have at most ", kGramMaxAxes,
                    " leading dimensions that are not evenly spaced rows, got ", leading);
  }
  return in;
}

template <typename In, typename Acc, int kPer>
void launch(const Arguments& a, const GramRows<In>& in) {
  constexpr int tile = 16 * kPer;
  const int32_t device = a.x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  const int64_t tiles = gram_tiles(in.width, tile), programs = a.groups * tiles;
  const int64_t split =
      gram_split(programs, in.rows, tile * tile * sizeof(Acc), multiprocessors(device));
  const int64_t steps = (in.rows + kGramDepth - 1) / kGramDepth;
  std::vector<Tensor> workspace;
  GramParts<Acc> parts{allocate<Acc>(a.out, split * programs * tile * tile, workspace)};
  parts.bias = a.bias;
  if (parts.bias) {
    parts.columns = allocate<Acc>(a.out, split * a.groups * in.width, workspace);
    parts.counted = allocate<int64_t>(a.out, split, workspace);
  }
  gram_partial_kernel<In, Acc, kPer><<<dim3(programs, split), kGramThreads, 0, stream>>>(
      in, parts, tiles, (steps + split - 1) / split);
  check(cudaGetLastError());
  constexpr int patches = tile / kGramPatch * (tile / kGramPatch);
  gram_finish_kernel<<<dim3(programs, patches), dim3(kGramPatch, 8), 0, stream>>>(
      parts, static_cast<Acc*>(a.out.mutable_data_ptr()), static_cast<Acc>(a.alpha),
      static_cast<Acc>(a.beta), in.width, tiles, tile, split);
  check(cudaGetLastError());
}

template <typename In>
void run(const Arguments& a) {
  const GramRows<In> in = rows_of<In>(a);
  if constexpr (std::is_same_v<In, double>) {
    launch<In, double, 4>(a, in);
  } else if (in.width > 64) {
    launch<In, float, 8>(a, in);
  } else {
    launch<In, float, 4>(a, in);
  }
}

void gram(const Tensor& x, const std::optional<Tensor>& mask, int64_t groups, bool bias,
          double alpha, double beta, Tensor out) {
  if (out.numel() == 0) return;
  const Arguments arguments{x, mask, groups, bias, alpha, beta, out};
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run<float>(arguments);
    case ScalarType::Double:
      return run<double>(arguments);
    case ScalarType::BFloat16:
      return run<__nv_bfloat16>(arguments);
    case ScalarType::Half:
      return run<__half>(arguments);
    default:
      STD_TORCH_CHECK(false, "gram: x must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CUDA, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace
}  // namespace kfac_fast
