// Kronecker-factored inverses applied to the gradients of all layers on the CPU by solves with
// their Cholesky factors (triangular_solve.h):
//
//   P = (L L^T)^-1 V (R R^T)^-1,   inner = Σ ⟨V, P⟩
//
// A panel of V^T, some rows of V, is solved with R, and transposed to its place in the panels that
// are solved with L.

#include <numeric>
#include <vector>

#include "layers.h"
#include "triangular_solve.h"

namespace kfac_fast {
namespace {

template <typename T>
class CholeskyPreconditioning : LayerPanels<T> {
 public:
  CholeskyPreconditioning(InstructionSet set, const Layer<T>& layer)
      : LayerPanels<T>(set, layer),
        store_square_(square_store<T>(set)),
        solve_left_(set, layer.rows),
        solve_right_(set, layer.columns),
        result_size_(panel_size(layer.rows) * panels(layer.columns)) {}

  Job job() const { return LayerPanels<T>::job(scratch_size(false), scratch_size(true)); }

  // Returns the inner product.
  template <typename Share>
  double operator()(T* scratch, const Share& share) const {
    const int64_t m = layer_.rows, k = layer_.columns;
    T* result = scratch;
    T* left = result + result_size_;
    T* right = left + solve_left_.packed_size();
    T* rest = right + solve_right_.packed_size();
    const auto slot = [&](int64_t panel) {
      return rest + (Share::is_parallel ? panel : 0) * slot_size();
    };
    const double products = static_cast<double>(m) * static_cast<double>(k);
    solve_left_.pack(layer_.left, left, share);
    solve_right_.pack(layer_.right, right, share);
    share(panels(m), products * k, [&](int64_t panel) {
      T* turned = slot(panel) + solve_size();
      pack(layer_.grad.transposed(), k, m, panel, turned);
      solve_right_(right, turned, columns_of(panel, m), slot(panel));
      turn(turned, panel, result);
    });
    std::vector<double> inner(panels(k));
    share(panels(k), products * m, [&](int64_t panel) {
      T* solved = result + panel * panel_size(m);
      T* grad = slot(panel) + solve_size();
      solve_left_(left, solved, columns_of(panel, k), slot(panel));
      pack(layer_.grad, m, k, panel, grad);
      inner[panel] = store(solved, grad, panel);
    });
    return std::accumulate(inner.begin(), inner.end(), 0.0);
  }

 private:
  using LayerPanels<T>::layer_, LayerPanels<T>::product_, LayerPanels<T>::width_;
  using LayerPanels<T>::panels, LayerPanels<T>::panel_size, LayerPanels<T>::columns_of;
  using LayerPanels<T>::pack, LayerPanels<T>::store;

  // Panels that are there at the same time, of those that one pass fills and reads.
  int64_t slots(int64_t columns, bool is_parallel) const {
    return is_parallel ? panels(columns) : 1;
  }

  // A pass solves one panel, and has one of the gradient beside it.
  int64_t solve_size() const { return solve_left_.scratch_size(); }
  int64_t slot_size() const {
    return solve_size() + panel_size(std::max(layer_.rows, layer_.columns));
  }

  int64_t scratch_size(bool is_parallel) const {
    const int64_t passes =
        std::max(slots(layer_.rows, is_parallel), slots(layer_.columns, is_parallel));
    return result_size_ + solve_left_.packed_size() + solve_right_.packed_size() +
           passes * slot_size();
  }

  // The panel of some rows of a matrix becomes its part of the panels of columns.
  void turn(const T* panel, int64_t index, T* columns) const {
    const int64_t lanes = product_.lanes;
    for (int64_t c = 0; c < layer_.columns; c += lanes) {
      T* place = columns + c / width_ * panel_size(layer_.rows) + c % width_;
      for (int64_t r = 0; r < columns_of(index, layer_.rows); r += lanes) {
        store_square_(panel + c * width_ + r, width_, lanes, place + (index * width_ + r) * width_,
                      width_);
      }
    }
  }

  const SquareStore<T> store_square_;
  const TriangularSolve<T> solve_left_, solve_right_;
  const int64_t result_size_;
};

}  // namespace

bool cholesky_precondition(const std::vector<Tensor>& grads, const std::vector<Tensor>& input_sides,
                           const std::vector<Tensor>& gradient_sides,
                           const std::vector<Tensor>& out, const Tensor& inner) {
  return precondition_by<CholeskyPreconditioning>(grads, input_sides, gradient_sides, out, inner);
}

}  // namespace kfac_fast
