// kfac_fast_native::conv_window_sum on CUDA; the plan that it takes is built in kfac_fast/conv.py,
// the operator's checks are in kfac_fast/schema.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>
#include <vector>

#include "launch.h"
#include "window_sum.cuh"

namespace kfac_fast {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "conv_window_sum";
constexpr int kBlocksEach = 4;  // that an SM should have

struct Arguments {
  const Tensor& x;
  const Tensor& plan;
  const std::vector<int64_t>&cells, &taps;
  int64_t groups;
  bool bias;
  double alpha, beta;
  const Tensor& out;
};

template <typename In, typename Acc, int kVector>
void launch(const WindowInput<In>& in, const WindowTiling& tiling, const WindowOutput<Acc>& out,
            int most_bytes, cudaStream_t stream) {
  const auto kernel = window_sum_kernel<In, Acc, kVector>;
  constexpr int without_asking = 48 * 1024;
  if (tiling.bytes > without_asking) {  // always for as much: another thread may launch, too
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(kernel, attribute, most_bytes), kOp);
  }
  const dim3 block(tiling.lanes, tiling.walkers);
  kernel<<<tiling.blocks(), block, tiling.bytes, stream>>>(in, tiling, out);
  check(cudaGetLastError(), kOp);
}

template <typename In, typename Acc>
void launch(const WindowInput<In>& in, const WindowTiling& tiling, const WindowOutput<Acc>& out,
            int most_bytes, cudaStream_t stream) {
  switch (tiling.vector) {
    case 8:
      if constexpr (sizeof(In) == 2) launch<In, Acc, 8>(in, tiling, out, most_bytes, stream);
      return;
    case 4:
      if constexpr (sizeof(In) <= 4) launch<In, Acc, 4>(in, tiling, out, most_bytes, stream);
      return;
    case 2:
      return launch<In, Acc, 2>(in, tiling, out, most_bytes, stream);
    default:
      return launch<In, Acc, 1>(in, tiling, out, most_bytes, stream);
  }
}

template <typename Acc>
void finish(const WindowOutput<Acc>& out, const Arguments& a, int64_t parts, int32_t device,
            cudaStream_t stream) {
  constexpr int threads = 256;
  const int64_t most = kBlocksEach * multiprocessors(device, kOp);
  const int64_t blocks = std::min(parts_of(a.out.numel(), threads), most);
  window_finish_kernel<<<blocks, threads, 0, stream>>>(
      out, static_cast<const int64_t*>(a.plan.const_data_ptr()), a.x.size(0), parts);
  check(cudaGetLastError(), kOp);
}

template <typename In>
void run(const Arguments& a) {
  using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const int32_t device = a.x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  const int64_t axes = a.x.dim() - 2;
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < a.x.dim(); ++i) {
    sizes.push_back(a.x.size(i));
    strides.push_back(a.x.stride(i));
  }
  const WindowShape shape =
      window_shape(axes, sizes.data(), strides.data(), a.cells.data(), a.taps.data());
  WindowOutput<Acc> out{static_cast<Acc*>(a.out.mutable_data_ptr()), nullptr,
                        static_cast<Acc>(a.alpha), static_cast<Acc>(a.beta), a.groups};
  out.bias = a.bias;
  out.width = shape.channels / a.groups * shape.taps() + a.bias;
  if (shape.empty()) return finish(out, a, 0, device, stream);

  const WindowInput<In> in{static_cast<const In*>(a.x.const_data_ptr()),
                           static_cast<const int64_t*>(a.plan.const_data_ptr()), shape};
  const WindowLimits limits{sizeof(In), sizeof(Acc), kBlocksEach * multiprocessors(device, kOp),
                            device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, kOp)};
  const WindowTiling tiling = window_tiling(shape, reinterpret_cast<uintptr_t>(in.x), limits);
  STD_TORCH_CHECK(tiling.bytes <= limits.most_bytes, kOp, ": kernel_size must need at most the ",
                  limits.most_bytes, " bytes of shared memory that a block can have, got ",
                  tiling.bytes);
  std::vector<Tensor> workspace;
  if (tiling.parts() > 1) {
    const int64_t planes = shape.batch * shape.channels;
    out.parts = allocate<Acc>(a.out, tiling.parts() * planes * shape.taps(), workspace);
  }
  launch(in, tiling, out, static_cast<int>(limits.most_bytes), stream);
  if (out.parts) finish(out, a, tiling.parts(), device, stream);
}

void conv_window_sum(const Tensor& x, const Tensor& plan, std::vector<int64_t> cells,
                     std::vector<int64_t> taps, int64_t groups, bool bias, double alpha,
                     double beta, Tensor out) {
  if (out.numel() == 0) return;
  const Arguments arguments{x, plan, cells, taps, groups, bias, alpha, beta, out};
  for_dtype(kOp, x, [&]<typename In>() { run<In>(arguments); });
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CUDA, m) {
  m.impl("conv_window_sum", TORCH_BOX(&conv_window_sum));
}

}  // namespace
}  // namespace kfac_fast
