// The Gram matrix of all patches of a convolution on the CPU, the patches read from the input as
// they are multiplied; see patch_blocks.h.

#include <torch/csrc/stable/library.h>

#include "block_gram.h"
#include "patch_blocks.h"
#include "tensors.h"

namespace kfac_fast {
namespace {

void conv_patch_gram(const Tensor& x, const Tensor& plan, int64_t groups, bool bias, double alpha,
                     double beta, const Tensor& out) {
  PlanNumbers numbers(static_cast<const int64_t*>(plan.const_data_ptr()));
  const Axes<PatchAxis> axes = read_axes<PatchAxis>(numbers, x.dim() - 2);
  int64_t columns = x.size(1), rows = x.size(0);
  for (const PatchAxis& axis : axes) columns *= axis.taps, rows *= axis.outputs;
  const int64_t edge = columns / groups + bias;
  check_out("conv_patch_gram", x, out, groups * edge * edge);
  for_dtype("conv_patch_gram", x, [&]<typename In, typename T>() {
    const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta), edge};
    T* data = static_cast<T*>(out.mutable_data_ptr());
    if (columns > 0) {
      const InstructionSet set = instruction_set_in_use();
      const TileProduct<T>& product = tile_product<T>(set);
      const GramLayout layout(columns, groups, product.panel_width(), product.lanes);
      const ImageSource<In> source = image_of<In>(x);
      const PatchBlocks<In, T> blocks(source, axes, layout, set);
      BlockGram(blocks, layout, set, store, bias, data).run();
    }
    if (bias) store_count(store, rows, groups, data);
  });
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CPU, m) {
  m.impl("conv_patch_gram", TORCH_BOX(&conv_patch_gram));
}

}  // namespace
}  // namespace kfac_fast
