// Kronecker-factored inverses applied to the gradients of all layers on the CPU:
//
//   P = G V A,   inner = Σ ⟨V, P⟩
//
// with H = G V as its transpose, so that every operand is read row by row (tile_product.h):
//
//   H^T[c][r] = Σ_j V[j][c] G[r][j],   P[r][c] = Σ_j H^T[j][r] A[j][c]

#include <torch/csrc/stable/library.h>

#include <vector>

#include "layers.h"

namespace kfac_fast {
namespace {

template <typename T>
class Preconditioning : LayerPanels<T> {
 public:
  Preconditioning(InstructionSet set, const Layer<T>& layer)
      : LayerPanels<T>(set, layer),
        grad_size_(panel_size(layer.rows) * panels(layer.columns)),
        half_size_(panel_size(layer.columns) * panels(layer.rows)) {}

  Job job() const { return LayerPanels<T>::job(scratch_size(false), scratch_size(true)); }

  // Returns the inner product.
  template <typename Share>
  double operator()(T* scratch, const Share& share) const {
    const int64_t m = layer_.rows, k = layer_.columns;
    T* grad = scratch;
    T* half = grad + grad_size_;
    T* left = half + half_size_;
    T* right = left + slots(m, Share::is_parallel) * panel_size(m);
    T* result = right + slots(k, Share::is_parallel) * panel_size(k);
    const auto slot = [](int64_t panel) { return Share::is_parallel ? panel : 0; };
    const Panels<T> grads{grad, m, width_, width_, panel_size(m)};
    const Panels<T> halves{half, k, width_, width_, panel_size(k)};
    const double products = static_cast<double>(m) * static_cast<double>(k);
    share(panels(k), products,
          [&](int64_t panel) { pack(layer_.grad, m, k, panel, grad + panel * panel_size(m)); });
    share(panels(m), products * m, [&](int64_t panel) {
      T* packed = left + slot(panel) * panel_size(m);
      pack(layer_.left.transposed(), m, m, panel, packed);
      multiply(grads, k, {packed, m, width_, width_, panel_size(m)}, columns_of(panel, m),
               half + panel * panel_size(k));
    });
    std::vector<double> inner(panels(k));
    share(panels(k), products * k, [&](int64_t panel) {
      T* packed = right + slot(panel) * panel_size(k);
      pack(layer_.right, k, k, panel, packed);
      T* sums = result + slot(panel) * panel_size(m);
      multiply(halves, m, {packed, k, width_, width_, panel_size(k)}, columns_of(panel, k), sums);
      inner[panel] = store(sums, grads.at(panel * width_), panel);
    });
    return std::accumulate(inner.begin(), inner.end(), 0.0);
  }

 private:
  using LayerPanels<T>::layer_, LayerPanels<T>::product_, LayerPanels<T>::width_;
  using LayerPanels<T>::panels, LayerPanels<T>::panel_size, LayerPanels<T>::columns_of;
  using LayerPanels<T>::slots, LayerPanels<T>::pack, LayerPanels<T>::store;

  int64_t scratch_size(bool is_parallel) const {
    const int64_t m = layer_.rows, k = layer_.columns;
    return grad_size_ + half_size_ + slots(m, is_parallel) * panel_size(m) +
           slots(k, is_parallel) * (panel_size(k) + panel_size(m));
  }

  // Some of the depth at a time, which stays in the nearest cache from one tile to the next.
  void multiply(const Panels<T>& left, int64_t rows, const Panels<T>& right, int64_t columns,
                T* sums) const {
    constexpr int64_t longest = 128;
    for (int64_t first = 0; first < left.depth; first += longest) {
      const int64_t depth = std::min(longest, left.depth - first);
      const int64_t skipped = first * width_;
      multiply_panels(product_, {left.data + skipped, depth, width_, width_, left.distance}, rows,
                      {right.data + skipped, depth, width_, width_, right.distance}, columns, false,
                      sums, width_, first > 0);
    }
  }

  const int64_t grad_size_, half_size_;
};

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CPU, m) {
  m.impl("precondition", TORCH_BOX(&precondition<Preconditioning>));
}

}  // namespace
}  // namespace kfac_fast
