// The Gram matrix of all patches of a convolution on the CPU, the patches read from the input as
// they are multiplied; see patch_blocks.h.

#include "block_gram.h"
#include "checks.h"
#include "operators.h"
#include "patch_blocks.h"

namespace kfac_fast {
ConvKernel conv_patch_gram(const std::vector<int64_t>& plan, const std::vector<int64_t>& sizes,
                           int64_t groups) {
  PlanNumbers numbers(plan.data());
  const auto axes = read_axes<PatchAxis>(numbers, static_cast<int64_t>(sizes.size()));
  return [=](const Tensor& x, bool bias, double alpha, double beta, Result& out) {
    if (!images_pass(x, sizes, groups)) return false;
    int64_t columns = x.size(1), rows = x.size(0);
    for (const PatchAxis& axis : axes) columns *= axis.taps, rows *= axis.outputs;
    const int64_t edge = columns / groups + bias;
    if (!tensors_pass({&x}, {}, {}, out, stack_of_squares(groups, edge))) return false;
    for_dtype(x, [&]<typename In, typename T>() {
      const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta), edge};
      T* data = static_cast<T*>(out.data());
      if (columns > 0) {
        const InstructionSet set = instruction_set_in_use();
        const TileProduct<T>& product = tile_product<T>(set);
        for_parts_of_groups(groups, columns / groups, [&](int64_t first, int64_t count) {
          const GramLayout layout(count * (columns / groups), count, product.panel_width(),
                                  product.lanes);
          ImageSource<In> source = image_of<In>(x);
          source.channels = source.channels / groups * count;
          source.data += first * (source.channels / count) * source.channel_stride;
          const PatchBlocks<In, T> blocks(source, axes, layout, set);
          BlockGram(blocks, layout, set, store, bias, data + first * store.edge * store.edge).run();
        });
      }
      if (bias) store_count(store, rows, groups, data);
    });
    return true;
  };
}

}  // namespace kfac_fast
