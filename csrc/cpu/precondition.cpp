// Kronecker-factored inverses applied to the gradients of all layers on the CPU:
//
//   P = G V A,   inner = Σ ⟨V, P⟩
//
// with H = G V as its transpose, so that every operand is read row by row (tile_product.h):
//
//   H^T[c][r] = Σ_j V[j][c] G[r][j],   P[r][c] = Σ_j H^T[j][r] A[j][c]

#include <numeric>
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
    const Groups rows = groups(m, Share::is_parallel), columns = groups(k, Share::is_parallel);
    T* grad = scratch;
    T* half = grad + grad_size_;
    T* sides = half + half_size_;
    T* results = sides + slots(rows, columns, Share::is_parallel) * side_size();
    const auto side = [&](int64_t group) {
      return sides + (Share::is_parallel ? group : 0) * side_size();
    };
    const Panels<T> grads{grad, m, width_, width_, panel_size(m)};
    const Panels<T> halves{half, k, width_, width_, panel_size(k)};
    const double products = static_cast<double>(m) * static_cast<double>(k);
    share(panels(k), products,
          [&](int64_t panel) { pack(layer_.grad, m, k, panel, grad + panel * panel_size(m)); });
    share(rows.count(), products * m, [&](int64_t group) {
      multiply(grads, k, layer_.left.transposed(), m, rows.first(group), rows.end(group),
               side(group), half + rows.first(group) * panel_size(k), panel_size(k));
    });
    std::vector<double> inner(panels(k));
    share(columns.count(), products * k, [&](int64_t group) {
      const int64_t first = columns.first(group);
      T* sums = results + (Share::is_parallel ? first : 0) * panel_size(m);
      multiply(halves, m, layer_.right, k, first, columns.end(group), side(group), sums,
               panel_size(m));
      for (int64_t panel = first; panel < columns.end(group); ++panel) {
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

  // Panels of a side that meet the same rows of the other factor in the nearer caches.
  struct Groups {
    int64_t panels, together;

    int64_t count() const { return divide_up(panels, together); }
    int64_t first(int64_t group) const { return group * together; }
    int64_t end(int64_t group) const { return std::min(first(group) + together, panels); }
  };

  static constexpr int64_t most_together = 4;
  // Of the depth at a time, which stays in the nearest cache from one tile to the next.
  static constexpr int64_t longest = 128;
  // Of the other factor at a time, whole panels of any instruction set, which stay in the second
  // cache from one panel of a group to the next.
  static constexpr int64_t rows_at_once = 384;

  // Many groups if threads share them.
  Groups groups(int64_t columns, bool is_parallel) const {
    const int64_t count = panels(columns);
    return {count, is_parallel ? std::clamp<int64_t>(count / 16, 1, most_together) : most_together};
  }

  // Groups of rows or of columns that are there at the same time.
  static int64_t slots(const Groups& rows, const Groups& columns, bool is_parallel) {
    return is_parallel ? std::max(rows.count(), columns.count()) : 1;
  }

  // The part of a group's panels that is being multiplied.
  int64_t side_size() const { return most_together * panel_size(longest); }

  int64_t scratch_size(bool is_parallel) const {
    const Groups rows = groups(layer_.rows, is_parallel);
    const Groups columns = groups(layer_.columns, is_parallel);
    const int64_t results = is_parallel ? columns.panels : columns.end(0);
    return grad_size_ + half_size_ + slots(rows, columns, is_parallel) * side_size() +
           results * panel_size(layer_.rows);
  }

  // The panels [begin, end) of left^T side, `distance` apart.
  void multiply(const Panels<T>& left, int64_t rows, const Strided<T>& side, int64_t columns,
                int64_t begin, int64_t end, T* packed, T* sums, int64_t distance) const {
    for (int64_t first = 0; first < left.depth; first += longest) {
      const int64_t depth = std::min(longest, left.depth - first);
      const Panels<T> part{left.data + first * width_, depth, width_, width_, left.distance};
      const Strided<T> some{side.data + first * side.row_stride, side.row_stride,
                            side.column_stride};
      pack(some, depth, columns, begin, end, packed, panel_size(longest));
      for (int64_t row = 0; row < rows; row += rows_at_once) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const T* own = packed + (panel - begin) * panel_size(longest);
          multiply_panels(product_, part.from(row), std::min(rows_at_once, rows - row),
                          {own, depth, width_, width_, 0}, columns_of(panel, columns), false,
                          sums + (panel - begin) * distance + row * width_, width_, first > 0);
        }
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
