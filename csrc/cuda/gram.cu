// kfac_fast_native::gram on CUDA; the operator's schema and checks are in kfac_fast/schema.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "gram.cuh"
#include "launch.h"

namespace kfac_fast {
namespace {

using torch::stable::Tensor;

struct Arguments {
  const Tensor& x;
  const std::optional<Tensor>& mask;
  int64_t groups;
  bool bias;
  double alpha, beta;
  const Tensor& out;
};

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

  const int64_t tiles = lower_tiles(in.width, tile), programs = a.groups * tiles;
  const int64_t split =
      gram_split(programs, in.rows, tile * tile * sizeof(Acc), multiprocessors(device, "gram"));
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
  check(cudaGetLastError(), "gram");
  constexpr int patches = tile / kGramPatch * (tile / kGramPatch);
  gram_finish_kernel<<<dim3(programs, patches), dim3(kGramPatch, 8), 0, stream>>>(
      parts, static_cast<Acc*>(a.out.mutable_data_ptr()), static_cast<Acc>(a.alpha),
      static_cast<Acc>(a.beta), in.width, tiles, tile, split);
  check(cudaGetLastError(), "gram");
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
  for_dtype("gram", x, [&]<typename In>() { run<In>(arguments); });
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CUDA, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace
}  // namespace kfac_fast
