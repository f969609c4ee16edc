#pragma once
// What the operators that precondition the gradients of all layers share on the CPU: a gradient in
// panels, and the store of a result with its inner product.

#include <vector>

#include "gram_layout.h"
#include "instruction_set.h"
#include "layer_lists.h"
#include "list_loop.h"
#include "operators.h"
#include "tile_product.h"

namespace kfac_fast {

// A layer's panels. A panel holds rows of whole vectors, and as many as whole vectors would have,
// so that it can be transposed by squares; and panels a power of two apart would displace each
// other.
template <typename T>
class LayerPanels {
 protected:
  LayerPanels(InstructionSet set, const Layer<T>& layer)
      : layer_(layer),
        product_(tile_product<T>(set)),
        pack_(packing<T, T>(set)),
        store_(panel_store<T>(set)),
        width_(product_.panel_width()) {}

  int64_t panels(int64_t columns) const { return divide_up(columns, width_); }
  int64_t panel_size(int64_t rows) const {
    return round_up(rows, product_.lanes) * width_ + 64 / static_cast<int64_t>(sizeof(T));
  }
  int64_t columns_of(int64_t panel, int64_t columns) const {
    return std::min(width_, columns - panel * width_);
  }

  Job job(int64_t scratch, int64_t scratch_to_share) const {
    const auto m = static_cast<double>(layer_.rows), k = static_cast<double>(layer_.columns);
    return {(m + 24) * (k + 24) * (m + k + 24), scratch, scratch_to_share};
  }

  // Packs the panels [panel, last) of the columns, `distance` apart.
  void pack(const Strided<T>& from, int64_t rows, int64_t columns, int64_t panel, int64_t last,
            T* packed, int64_t distance) const {
    pack_(from.data + panel * width_ * from.column_stride, from.row_stride, from.column_stride,
          rows, std::min(last * width_, columns) - panel * width_, width_, packed, width_,
          distance);
  }

  void pack(const Strided<T>& from, int64_t rows, int64_t columns, int64_t panel, T* packed) const {
    pack(from, rows, columns, panel, panel + 1, packed, 0);
  }

  // Stores a panel of the result and returns its inner product with the gradient's.
  double store(const T* sums, const T* grad, int64_t panel) const {
    return store_(sums, grad, width_, layer_.rows, columns_of(panel, layer_.columns),
                  layer_.out + panel * width_, layer_.columns);
  }

  const Layer<T>& layer_;
  const TileProduct<T>& product_;
  const Packing<T, T> pack_;
  const PanelStore<T> store_;
  const int64_t width_;
};

template <template <typename> class Way, typename T>
void precondition_all(const std::vector<Tensor>& grads, const std::vector<Tensor>& rights,
                      const std::vector<Tensor>& lefts, const std::vector<Tensor>& out,
                      const Tensor& inner) {
  const std::vector<Layer<T>> layers = layers_of<T>(grads, rights, lefts, out);
  const InstructionSet set = instruction_set_in_use();
  std::vector<Job> jobs;
  jobs.reserve(layers.size());
  for (const Layer<T>& layer : layers) jobs.push_back(Way<T>(set, layer).job());
  std::vector<double> products(layers.size());
  for_each_job<T>(jobs, [&](int64_t job, T* scratch, const auto& share) {
    products[job] = Way<T>(set, layers[job])(scratch, share);
  });
  double total = 0;
  for (const double product : products) total += product;
  *static_cast<T*>(inner.mutable_data_ptr()) = static_cast<T>(total);
}

// Way<T>(set, layer) has a Job job() and a call that returns the inner product.
template <template <typename> class Way>
bool precondition_by(const std::vector<Tensor>& grads, const std::vector<Tensor>& input_sides,
                     const std::vector<Tensor>& gradient_sides, const std::vector<Tensor>& out,
                     const Tensor& inner) {
  if (!layer_lists_pass(grads, input_sides, gradient_sides, out, inner)) return false;
  if (inner.scalar_type() == ScalarType::Double) {
    precondition_all<Way, double>(grads, input_sides, gradient_sides, out, inner);
  } else {
    precondition_all<Way, float>(grads, input_sides, gradient_sides, out, inner);
  }
  return true;
}

}  // namespace kfac_fast
