// Kronecker-factored inverses applied to the gradients of all layers on the CPU:
//
//   P = G V A,   inner = Σ ⟨V, P⟩
//
// with H = G V as its transpose, so that every operand is read row by row (tile_product.h):
//
//   H^T[c][r] = Σ_j V[j][c] G[r][j],   P[r][c] = Σ_j H^T[j][r] A[j][c]

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
    T* side = half + half_size_;
    T* result = side + side_size(Share::is_parallel);
    const Panels<T> grads{grad, m, width_, width_, panel_size(m)};
    const Panels<T> halves{half, k, width_, width_, panel_size(k)};
    const double products = static_cast<double>(m) * static_cast<double>(k);
    share(panels(k), products,
          [&](int64_t panel) { pack(layer_.grad, m, k, panel, grad + panel * panel_size(m)); });
    share(groups(m), products * m, [&](int64_t group) {
      multiply(grads, k, layer_.left.transposed(), m, group, side_of<Share>(side, group),
               half + group * together(m) * panel_size(k), panel_size(k));
    });
    std::vector<double> inner(panels(k));
    share(groups(k), products * k, [&](int64_t group) {
      const int64_t first = group * together(k);
      T* sums = result + (Share::is_parallel ? first : 0) * panel_size(m);
      multiply(halves, m, layer_.right, k, group, side_of<Share>(side, group), sums, panel_size(m));
      for (int64_t panel = first; panel < end_of(group, k); ++panel) {
        inner[panel] =
            store(sums + (panel - first) * panel_size(m), grads.at(panel * width_), panel);
      }
    });
    return std::accumulate(inner.begin(), inner.end(), 0.0);
  }

 private:
  using LayerPanels<T>::layer_, LayerPanels<T>::product_, LayerPanels<T>::width_;
  using LayerPanels<T>::panels, LayerPanels<T>::panel_size, LayerPanels<T>::columns_of;
  using LayerPanels<T>::pack, LayerPanels<T>::store;

  // Panels of a side that meet the same panels of the other factor in the nearer caches; few where
  // there are few, for the threads' sake.
  int64_t together(int64_t columns) const {
    return std::clamp<int64_t>(panels(columns) / 16, 1, 4);
  }
  // Of the depth at a time, which stays in the nearest cache from one tile to the next.
  static constexpr int64_t longest = 128;

  int64_t groups(int64_t columns) const { return divide_up(panels(columns), together(columns)); }
  int64_t end_of(int64_t group, int64_t columns) const {
    return std::min((group + 1) * together(columns), panels(columns));
  }
  // Groups of a side or of the result that are there at the same time.
  int64_t slots(int64_t columns, bool is_parallel) const {
    return is_parallel ? groups(columns) : 1;
  }

  int64_t scratch_size(bool is_parallel) const {
    const int64_t m = layer_.rows, k = layer_.columns;
    return grad_size_ + half_size_ + side_size(is_parallel) +
           slots(k, is_parallel) * together(k) * panel_size(m);
  }

  // Of each group, the part of a panel that is being multiplied.
  int64_t side_size(bool is_parallel) const {
    return panel_size(longest) *
           std::max(slots(layer_.rows, is_parallel), slots(layer_.columns, is_parallel));
  }
  template <typename Share>
  T* side_of(T* side, int64_t group) const {
    return side + (Share::is_parallel ? group : 0) * panel_size(longest);
  }

  // A group of panels of left^T side, `distance` apart.
  void multiply(const Panels<T>& left, int64_t rows, const Strided<T>& side, int64_t columns,
                int64_t group, T* packed, T* sums, int64_t distance) const {
    const int64_t begin = group * together(columns);
    for (int64_t first = 0; first < left.depth; first += longest) {
      const int64_t depth = std::min(longest, left.depth - first);
      const Panels<T> part{left.data + first * width_, depth, width_, width_, left.distance};
      const Strided<T> some{side.data + first * side.row_stride, side.row_stride,
                            side.column_stride};
      for (int64_t panel = begin; panel < end_of(group, columns); ++panel) {
        pack(some, depth, columns, panel, packed);
        multiply_panels(product_, part, rows, {packed, depth, width_, width_, panel_size(longest)},
                        columns_of(panel, columns), false, sums + (panel - begin) * distance,
                        width_, first > 0);
      }
    }
  }

  const int64_t grad_size_, half_size_;
};

}  // namespace

bool precondition(const std::vector<Tensor>& grads, const std::vector<Tensor>& input_sides,
                  const std::vector<Tensor>& gradient_sides, const std::vector<Tensor>& out,
                  const Tensor& inner) {
  return precondition_by<Preconditioning>(grads, input_sides, gradient_sides, out, inner);
}

}  // namespace kfac_fast
