#pragma once
// What every launcher needs of CUDA and of torch's stable ABI.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

// Weak, because a torch without CUDA lacks it and would refuse the whole library.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace kfac_fast {

inline void check(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int32_t device, const char* op) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), op);
  return value;
}

inline int multiprocessors(int32_t device, const char* op) {
  return device_attribute(cudaDevAttrMultiProcessorCount, device, op);
}

// A function that launches kernels one after the other, with so many threads in a block.
inline auto launcher(int32_t device, int threads, const char* op) {
  return [=, stream = current_stream(device)](auto kernel, int blocks, const auto&... arguments) {
    kernel<<<blocks, threads, 0, stream>>>(arguments...);
    check(cudaGetLastError(), op);
  };
}

// Uninitialised memory from torch's caching allocator.
template <typename T>
T* allocate(const torch::stable::Tensor& like, int64_t count,
            std::vector<torch::stable::Tensor>& keep) {
  keep.push_back(torch::stable::new_empty(like, {count * int64_t{sizeof(T)}},
                                          torch::headeronly::ScalarType::Byte));
  return static_cast<T*>(keep.back().mutable_data_ptr());
}

// Calls run.operator()<In>() for the dtype of x, whose elements are In.
template <typename Run>
void for_dtype(const char* op, const torch::stable::Tensor& x, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run.template operator()<float>();
    case ScalarType::Double:
      return run.template operator()<double>();
    case ScalarType::BFloat16:
      return run.template operator()<__nv_bfloat16>();
    case ScalarType::Half:
      return run.template operator()<__half>();
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

}  // namespace kfac_fast
