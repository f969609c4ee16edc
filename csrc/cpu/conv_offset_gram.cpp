// The Gram matrix of all patches of a convolution on the CPU by offset correlation; see
// offset_gram.h.

#include <torch/csrc/stable/library.h>

#include "block_gram.h"
#include "offset_gram.h"
#include "tensors.h"

namespace kfac_fast {
namespace {

void conv_offset_gram(const Tensor& x, const Tensor& plan, int64_t groups, bool bias, double alpha,
                      double beta, const Tensor& out) {
  PlanNumbers numbers(static_cast<const int64_t*>(plan.const_data_ptr()));
  const int64_t outputs = numbers.next();
  const Axes<OffsetAxis> axes = read_axes<OffsetAxis>(numbers, x.dim() - 2);
  int64_t edge = x.size(1) / groups;
  for (const OffsetAxis& axis : axes) edge *= axis.taps;
  edge += bias;
  check_out("conv_offset_gram", x, out, groups * edge * edge);
  for_dtype("conv_offset_gram", x, [&]<typename In, typename T>() {
    const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta), edge};
    const ImageSource<In> source = image_of<In>(x);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    if (source.channels > 0) {
      OffsetGram<In, T>(source, axes, groups, instruction_set_in_use(), store, bias, data).run();
    }
    if (bias) store_count(store, source.examples * outputs, groups, data);
  });
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CPU, m) {
  m.impl("conv_offset_gram", TORCH_BOX(&conv_offset_gram));
}

}  // namespace
}  // namespace kfac_fast
