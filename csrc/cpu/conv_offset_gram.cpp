// The Gram matrix of all patches of a convolution on the CPU by offset correlation; see
// offset_gram.h.

#include "block_gram.h"
#include "checks.h"
#include "offset_gram.h"
#include "operators.h"

namespace kfac_fast {
ConvKernel conv_offset_gram(const std::vector<int64_t>& plan, const std::vector<int64_t>& sizes,
                            int64_t groups) {
  PlanNumbers numbers(plan.data());
  const int64_t outputs = numbers.next();
  const auto axes = read_axes<OffsetAxis>(numbers, static_cast<int64_t>(sizes.size()));
  return [=](const Tensor& x, bool bias, double alpha, double beta, Result& out) {
    if (!images_pass(x, sizes, groups)) return false;
    int64_t edge = x.size(1) / groups;
    for (const OffsetAxis& axis : axes) edge *= axis.taps;
    edge += bias;
    if (!tensors_pass({&x}, {}, {}, out, stack_of_squares(groups, edge))) return false;
    for_dtype(x, [&]<typename In, typename T>() {
      const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta), edge};
      const ImageSource<In> source = image_of<In>(x);
      T* data = static_cast<T*>(out.data());
      if (source.channels > 0) {
        const int64_t input_bytes = x.numel() * static_cast<int64_t>(sizeof(In));
        const InstructionSet set = instruction_set_in_use();
        OffsetGram<In, T>(source, axes, groups, set, store, bias, input_bytes, data).run();
      }
      if (bias) store_count(store, source.examples * outputs, groups, data);
    });
    return true;
  };
}

}  // namespace kfac_fast
