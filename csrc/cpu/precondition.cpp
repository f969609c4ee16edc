// Kronecker-factored inverses applied to the gradients of all layers on the CPU:
//
//   P = G V A,   inner = Σ ⟨V, P⟩
//
// with H = G V as its transpose, so that every operand is read row by row (tile_product.h):
//
//   H^T[c][r] = Σ_j V[j][c] G[r][j],   P[r][c] = Σ_j H^T[j][r] A[j][c]

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <vector>

#include "gram_layout.h"
#include "instruction_set.h"
#include "list_loop.h"
#include "tensor_lists.h"
#include "tensors.h"
#include "tile_product.h"

namespace kfac_fast {
namespace {

template <typename T>
struct Strided {
  const T* data;
  int64_t row_stride, column_stride;
};

template <typename T>
struct Layer {
  int64_t rows, columns;  // of the gradient
  Strided<T> grad, left, right;
  T* out;
};

// The matrix `index` of a stacked batch.
template <typename T>
Strided<T> matrix_of(const Tensor& tensor, int64_t index) {
  const int64_t dims = tensor.dim();
  return {entry_of<T>(tensor, dims - 2, index), tensor.stride(dims - 2), tensor.stride(dims - 1)};
}

template <typename T>
class Preconditioning {
 public:
  Preconditioning(InstructionSet set, const Layer<T>& layer)
      : layer_(layer),
        product_(tile_product<T>(set)),
        pack_(packing<T, T>(set)),
        width_(product_.panel_width()),
        grad_size_(panel_size(layer.rows) * divide_up(layer.columns, width_)),
        half_size_(panel_size(layer.columns) * divide_up(layer.rows, width_)) {}

  Job job() const {
    const auto m = static_cast<double>(layer_.rows), k = static_cast<double>(layer_.columns);
    const double work = (m + 24) * (k + 24) * (m + k + 24);
    return {work, scratch_size(false), scratch_size(true)};
  }

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
    share(divide_up(k, width_), products, [&](int64_t panel) {
      pack(layer_.grad.data, layer_.grad.row_stride, layer_.grad.column_stride, m, k, panel,
           grad + panel * panel_size(m));
    });
    share(divide_up(m, width_), products * m, [&](int64_t panel) {
      T* packed = left + slot(panel) * panel_size(m);
      pack(layer_.left.data, layer_.left.column_stride, layer_.left.row_stride, m, m, panel,
           packed);
      multiply(grads, k, {packed, m, width_, width_, panel_size(m)}, columns_of(panel, m),
               half + panel * panel_size(k));
    });
    std::vector<double> inner(divide_up(k, width_));
    share(divide_up(k, width_), products * k, [&](int64_t panel) {
      T* packed = right + slot(panel) * panel_size(k);
      pack(layer_.right.data, layer_.right.row_stride, layer_.right.column_stride, k, k, panel,
           packed);
      T* sums = result + slot(panel) * panel_size(m);
      multiply(halves, m, {packed, k, width_, width_, panel_size(k)}, columns_of(panel, k), sums);
      inner[panel] = store(sums, grads.at(panel * width_), panel);
    });
    double total = 0;
    for (const double value : inner) total += value;
    return total;
  }

 private:
  // Panels of a side or of the result that are there at the same time.
  int64_t slots(int64_t columns, bool is_parallel) const {
    return is_parallel ? divide_up(columns, width_) : 1;
  }

  int64_t scratch_size(bool is_parallel) const {
    const int64_t m = layer_.rows, k = layer_.columns;
    return grad_size_ + half_size_ + slots(m, is_parallel) * panel_size(m) +
           slots(k, is_parallel) * (panel_size(k) + panel_size(m));
  }

  // Tiles of whole rows are stored; and panels a power of two apart would displace each other.
  int64_t panel_size(int64_t rows) const {
    return round_up(rows, product_.rows) * width_ + 64 / static_cast<int64_t>(sizeof(T));
  }
  int64_t columns_of(int64_t panel, int64_t columns) const {
    return std::min(width_, columns - panel * width_);
  }

  void pack(const T* data, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
            int64_t panel, T* packed) const {
    pack_(data + panel * width_ * column_stride, row_stride, column_stride, rows,
          columns_of(panel, columns), width_, packed, width_, 0);
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

  double store(const T* sums, const T* grad, int64_t panel) const {
    constexpr int64_t lanes = 16;  // sums side by side, which the compiler makes vectors of
    const int64_t columns = columns_of(panel, layer_.columns);
    double inner = 0;
    for (int64_t r = 0; r < layer_.rows; ++r, sums += width_, grad += width_) {
      std::copy_n(sums, columns, layer_.out + r * layer_.columns + panel * width_);
      T row[lanes] = {};
      int64_t c = 0;
      for (; c + lanes <= columns; c += lanes) {
        for (int64_t i = 0; i < lanes; ++i) row[i] += sums[c + i] * grad[c + i];
      }
      for (; c < columns; ++c) row[0] += sums[c] * grad[c];
      inner += static_cast<double>(std::accumulate(row, row + lanes, T{0}));
    }
    return inner;
  }

  const Layer<T>& layer_;
  const TileProduct<T>& product_;
  const Packing<T, T> pack_;
  const int64_t width_;
  const int64_t grad_size_, half_size_;
};

template <typename T>
void precondition_all(const std::vector<Tensor>& grads, const std::vector<Tensor>& rights,
                      const std::vector<Tensor>& lefts, const std::vector<Tensor>& out,
                      const Tensor& inner) {
  std::vector<Layer<T>> layers;
  layers.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t dims = grads[i].dim();
    const int64_t rows = grads[i].size(dims - 2), columns = grads[i].size(dims - 1);
    if (grads[i].numel() == 0) continue;
    T* target = static_cast<T*>(out[i].mutable_data_ptr());
    const int64_t count = grads[i].numel() / (rows * columns);
    for (int64_t n = 0; n < count; ++n, target += rows * columns) {
      layers.push_back({rows, columns, matrix_of<T>(grads[i], n), matrix_of<T>(lefts[i], n),
                        matrix_of<T>(rights[i], n), target});
    }
  }
  const InstructionSet set = instruction_set_in_use();
  std::vector<Job> jobs;
  jobs.reserve(layers.size());
  for (const Layer<T>& layer : layers) jobs.push_back(Preconditioning<T>(set, layer).job());
  std::vector<double> products(layers.size());
  for_each_job<T>(jobs, [&](int64_t job, T* scratch, const auto& share) {
    products[job] = Preconditioning<T>(set, layers[job])(scratch, share);
  });
  double total = 0;
  for (const double product : products) total += product;
  *static_cast<T*>(inner.mutable_data_ptr()) = static_cast<T>(total);
}

bool acceptable(const std::vector<Tensor>& grads, const std::vector<Tensor>& rights,
                const std::vector<Tensor>& lefts, const std::vector<Tensor>& out,
                const Tensor& inner) {
  const size_t count = grads.size();
  if (rights.size() != count || lefts.size() != count || out.size() != count) return false;
  const ScalarType type = inner.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) return false;
  ListCheck check(type);
  for (size_t i = 0; i < count; ++i) {
    const int64_t dims = grads[i].dim();
    if (dims < 2 || !check.reads(grads[i]) || !check.writes(out[i])) return false;
    if (!same_shape(grads[i], out[i], dims)) return false;
    if (!is_side(rights[i], grads[i], dims - 1) || !check.reads(rights[i])) return false;
    if (!is_side(lefts[i], grads[i], dims - 2) || !check.reads(lefts[i])) return false;
  }
  return inner.dim() == 0 && check.writes(inner) && check.apart();
}

bool precondition(std::vector<Tensor> grads, std::vector<Tensor> input_sides,
                  std::vector<Tensor> gradient_sides, std::vector<Tensor> out,
                  const Tensor& inner) {
  if (!acceptable(grads, input_sides, gradient_sides, out, inner)) return false;
  if (inner.scalar_type() == ScalarType::Double) {
    precondition_all<double>(grads, input_sides, gradient_sides, out, inner);
  } else {
    precondition_all<float>(grads, input_sides, gradient_sides, out, inner);
  }
  return true;
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CPU, m) {
  m.impl("precondition", TORCH_BOX(&precondition));
}

}  // namespace
}  // namespace kfac_fast
