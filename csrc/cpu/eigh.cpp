// Eigendecompositions of many symmetric matrices on the CPU. torch's LAPACK finds each of them;
// what is gained is that several are found at the same time, for its own threads help one matrix
// little.

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "list_loop.h"
#include "operators.h"
#include "strided.h"
#include "tensor_lists.h"

namespace kfac_fast {
namespace {

bool lists_pass(const std::vector<Tensor>& matrices, const std::vector<Tensor>& values,
                const std::vector<Tensor>& vectors, const Tensor& info) {
  const size_t count = matrices.size();
  if (count == 0 || values.size() != count || vectors.size() != count) return false;
  const ScalarType type = matrices[0].scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) return false;
  ListCheck check(type);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& x = matrices[i];
    const int64_t dims = x.dim();
    if (!are_squares(x)) return false;
    if (!same_shape(vectors[i], x, dims) || !same_shape(values[i], x, dims - 1)) return false;
    if (!check.reads(x) || !check.writes(values[i]) || !check.writes(vectors[i])) return false;
    total += stack_size(x, dims - 2);
  }
  return is_vector(info, total) && check.writes(info, ScalarType::Int) && check.apart();
}

template <typename T>
struct Matrix {
  Strided<T> entries;
  T *values, *vectors;
  int32_t* info;
};

// Matrices of one size that are decomposed in one call, since a call takes longer than tiny ones.
template <typename T>
struct Group {
  int64_t size;
  std::vector<Matrix<T>> matrices;
};

template <typename T>
std::vector<Group<T>> groups_of(const std::vector<Tensor>& matrices,
                                const std::vector<Tensor>& values,
                                const std::vector<Tensor>& vectors, const Tensor& info) {
  constexpr int64_t entries_a_group = 2400;
  std::vector<Group<T>> groups;
  std::map<int64_t, size_t> open;  // the last group of each size
  auto* infos = static_cast<int32_t*>(info.mutable_data_ptr());
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& x = matrices[i];
    const int64_t batch_dims = x.dim() - 2, size = x.size(batch_dims);
    const int64_t most = std::max<int64_t>(entries_a_group / (size * size), 1);
    T* own_values = static_cast<T*>(values[i].mutable_data_ptr());
    T* own_vectors = static_cast<T*>(vectors[i].mutable_data_ptr());
    for (int64_t n = 0; n < stack_size(x, batch_dims); ++n) {
      const auto [place, is_new] = open.try_emplace(size, groups.size());
      if (!is_new && static_cast<int64_t>(groups[place->second].matrices.size()) == most) {
        place->second = groups.size();
      }
      if (place->second == groups.size()) groups.push_back({size, {}});
      groups[place->second].matrices.push_back(
          {{entry_of<T>(x, batch_dims, n), x.stride(batch_dims), x.stride(batch_dims + 1)},
           own_values + n * size,
           own_vectors + n * size * size,
           infos++});
    }
  }
  return groups;
}

template <typename T>
torch::stable::Tensor stack_at(T* data, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
  const ScalarType type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(data, sizes, strides, cpu, type);
}

template <typename T>
class Eigensolver {
 public:
  static int64_t scratch_size(const Group<T>& group) {
    return static_cast<int64_t>(group.matrices.size()) * group.size * group.size;
  }

  // scratch holds the matrices.
  void operator()(const Group<T>& group, T* scratch) const {
    const auto count = static_cast<int64_t>(group.matrices.size());
    const int64_t area = group.size * group.size;
    for (int64_t i = 0; i < count; ++i) {
      const Matrix<T>& m = group.matrices[i];
      *m.info = load(m, group.size, scratch + i * area) ? 0 : 1;
    }
    if (!solve(group, 0, count, scratch) && count > 1) {
      for (int64_t i = 0; i < count; ++i) solve(group, i, 1, scratch + i * area);
    }
    for (const Matrix<T>& m : group.matrices) {
      if (*m.info == 0) continue;
      constexpr T nan = std::numeric_limits<T>::quiet_NaN();
      std::fill_n(m.values, group.size, nan);
      std::fill_n(m.vectors, area, nan);
    }
  }

 private:
  // Whether the lower triangle, which is read, is finite; zeros in its place if not.
  static bool load(const Matrix<T>& m, int64_t size, T* to) {
    T lost = 0;
    for (int64_t r = 0; r < size; ++r) {
      const T* row = m.entries.from(r, 0).data;
      for (int64_t c = 0; c <= r; ++c) {
        const T entry = row[c * m.entries.column_stride];
        to[r * size + c] = entry;
        lost += entry - entry;
      }
    }
    const bool is_finite = lost == 0;
    if (!is_finite) std::fill_n(to, size * size, T{0});
    return is_finite;
  }

  // False if torch raises an error. Which one, this ABI does not tell: a single one's info is 2.
  static bool solve(const Group<T>& group, int64_t first, int64_t count, T* scratch) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    const int64_t n = group.size;
    std::array<StableIValue, 2> stack{from(stack_at(scratch, {count, n, n})),
                                      from(std::string("L"))};
    if (torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION)) {
      if (count == 1) *group.matrices[first].info = 2;
      return false;
    }
    const auto values = to<torch::stable::Tensor>(stack[0]);
    const auto vectors = to<torch::stable::Tensor>(stack[1]);
    for (int64_t i = 0; i < count; ++i) {
      const Matrix<T>& m = group.matrices[first + i];
      const T* value = static_cast<const T*>(values.const_data_ptr()) + i * values.stride(0);
      const T* vector = static_cast<const T*>(vectors.const_data_ptr()) + i * vectors.stride(0);
      T lost = 0;
      for (int64_t c = 0; c < n; ++c) {
        m.values[c] = value[c * values.stride(1)];
        lost += m.values[c] - m.values[c];
      }
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t c = 0; c < n; ++c) {
          m.vectors[r * n + c] = vector[r * vectors.stride(1) + c * vectors.stride(2)];
        }
      }
      if (lost != 0) *m.info = 1;  // too large
    }
    return true;
  }
};

template <typename T>
void decompose(const std::vector<Group<T>>& groups) {
  // What LAPACK's threads make of one matrix, about.
  const double speedup = std::sqrt(static_cast<double>(torch::stable::get_num_threads()));
  std::vector<Job> jobs;
  for (const Group<T>& group : groups) {
    const auto n = static_cast<double>(group.size),
               count = static_cast<double>(group.matrices.size());
    const int64_t scratch = Eigensolver<T>::scratch_size(group);
    jobs.push_back({5 * n * n * (n + 30) * count, scratch, scratch});  // short loops take longer
  }
  for_each_job<T>(
      jobs, [&](int64_t job, T* scratch, const auto&) { Eigensolver<T>()(groups[job], scratch); },
      speedup);
}

}  // namespace

bool eigh(const std::vector<Tensor>& matrices, const std::vector<Tensor>& values,
          const std::vector<Tensor>& vectors, const Tensor& info) {
  if (!lists_pass(matrices, values, vectors, info)) return false;
  if (matrices[0].scalar_type() == ScalarType::Double) {
    decompose(groups_of<double>(matrices, values, vectors, info));
  } else {
    decompose(groups_of<float>(matrices, values, vectors, info));
  }
  return true;
}

}  // namespace kfac_fast
