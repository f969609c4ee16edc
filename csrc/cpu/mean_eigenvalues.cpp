// The average eigenvalue of each of many matrices on the CPU, from its diagonal.

#include <cstdint>
#include <vector>

#include "checks.h"
#include "operators.h"
#include "parallel.h"

namespace kfac_fast {
namespace {

// One that is given by its diagonal is a vector.
int64_t dims_of_stack(const Tensor& tensor) { return tensor.dim() - (tensor.dim() > 1 ? 2 : 1); }

int64_t matrices_in(const Tensor& tensor) { return stack_size(tensor, dims_of_stack(tensor)); }

bool matrices_pass(const std::vector<Tensor>& matrices, const Tensor& out) {
  if (matrices.empty()) return false;
  const ScalarType type = matrices[0].scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) return false;
  ListCheck check(type);
  int64_t total = 0;
  for (const Tensor& matrix : matrices) {
    if (!is_covariance(matrix) || !check.reads(matrix)) return false;
    total += matrices_in(matrix);
  }
  return is_vector(out, total) && check.writes(out) && check.apart();
}

template <typename T>
void average_all(const std::vector<Tensor>& matrices, T* out) {
  std::vector<T*> targets;
  double entries = 0;
  for (const Tensor& matrix : matrices) {
    targets.push_back(out);
    const int64_t count = matrices_in(matrix);
    out += count;
    entries += static_cast<double>(count * matrix.size(matrix.dim() - 1));
  }
  constexpr double operations_a_miss = 100;
  const auto tasks = static_cast<int64_t>(matrices.size());
  for_each_task(tasks, worker_count(tasks, operations_a_miss * entries), [&](int64_t i, int64_t) {
    const Tensor& matrix = matrices[i];
    const int64_t last = matrix.dim() - 1, size = matrix.size(last);
    const int64_t step = matrix.stride(last) + (last > 0 ? matrix.stride(last - 1) : 0);
    for (int64_t m = 0; m < matrices_in(matrix); ++m) {
      const T* entry = entry_of<T>(matrix, dims_of_stack(matrix), m);
      double trace = 0;
      for (int64_t r = 0; r < size; ++r) trace += static_cast<double>(entry[r * step]);
      targets[i][m] = static_cast<T>(trace / static_cast<double>(size));
    }
  });
}

}  // namespace

bool mean_eigenvalues(const std::vector<Tensor>& matrices, const Tensor& out) {
  if (!matrices_pass(matrices, out)) return false;
  if (out.scalar_type() == ScalarType::Double) {
    average_all(matrices, static_cast<double*>(out.mutable_data_ptr()));
  } else {
    average_all(matrices, static_cast<float*>(out.mutable_data_ptr()));
  }
  return true;
}

}  // namespace kfac_fast
