// Inverses of damped symmetric matrices of mixed sizes on the CPU; see block_sweep.h.

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <vector>

#include "block_sweep.h"
#include "parallel.h"
#include "scratch.h"
#include "symmetric_store.h"
#include "tensors.h"

namespace kfac_fast {
namespace {

template <typename T>
struct Matrix {
  const T* data;
  int64_t size, row_stride, column_stride;
  T damping;
  T* out;
  int32_t* info;
  T* logdet;  // or null
};

// Every matrix of the stacked batches in the list.
template <typename T>
std::vector<Matrix<T>> matrices_of(const std::vector<Tensor>& matrices,
                                   const std::vector<Tensor>& damping,
                                   const std::vector<Tensor>& out, const Tensor& info,
                                   const std::optional<Tensor>& logdet) {
  std::vector<Matrix<T>> all;
  all.reserve(info.numel());
  auto* infos = static_cast<int32_t*>(info.mutable_data_ptr());
  T* logdets = logdet ? static_cast<T*>(logdet->mutable_data_ptr()) : nullptr;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& x = matrices[i];
    const int64_t batch_dims = x.dim() - 2, size = x.size(batch_dims);
    int64_t count = 1;
    for (int64_t d = 0; d < batch_dims; ++d) count *= x.size(d);
    STD_TORCH_CHECK(out[i].is_contiguous() && out[i].numel() == count * size * size,
                    "damped_inverse: out must be contiguous and of the matrices' shapes");
    const T* data = static_cast<const T*>(x.const_data_ptr());
    const T* shift = static_cast<const T*>(damping[i].const_data_ptr());
    T* result = static_cast<T*>(out[i].mutable_data_ptr());
    for (int64_t n = 0; n < count; ++n) {
      int64_t offset = 0, shift_offset = 0, index = n;
      for (int64_t d = batch_dims - 1; d >= 0; --d) {
        const int64_t place = index % x.size(d);
        index /= x.size(d);
        offset += place * x.stride(d);
        if (damping[i].dim() > 0) shift_offset += place * damping[i].stride(d);
      }
      const auto entry = static_cast<int64_t>(all.size());
      all.push_back({data + offset, size, x.stride(batch_dims), x.stride(batch_dims + 1),
                     shift[shift_offset], result + n * size * size, infos + entry,
                     logdets ? logdets + entry : nullptr});
    }
  }
  return all;
}

template <typename T>
class Inverter {
 public:
  Inverter(InstructionSet set, int64_t size)
      : lanes_(tile_product<T>(set).lanes),
        size_(round_up(size, lanes_)),
        sweep_(set, size_),
        stride_(sweep_.row_stride(size_)) {}

  int64_t scratch_size() const { return size_ * stride_ + sweep_.scratch_size(); }

  template <typename Share>
  void operator()(const Matrix<T>& m, T* scratch, const Share& share) const {
    if (m.size == 0) {
      *m.info = 0;
      if (m.logdet) *m.logdet = 0;
      return;
    }
    load(m, scratch);
    double logdet = 0;
    const int64_t done = sweep_(scratch, size_, scratch + size_ * stride_, logdet, share);
    const bool failed = done < size_;
    *m.info = failed ? static_cast<int32_t>(done + 1) : 0;
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    if (m.logdet) *m.logdet = failed ? nan : static_cast<T>(logdet);
    if (failed) {
      std::fill_n(m.out, m.size * m.size, nan);
      return;
    }
    const SymmetricStore<T> store{T{-1}, T{0}, m.size};
    const int64_t strips = divide_up(m.size, strip);
    share(strips, static_cast<double>(m.size) * m.size, [&](int64_t i) {
      const int64_t row = i * strip;
      const int64_t rows = std::min(strip, m.size - row);
      const TileSums<T> sums{scratch + row * stride_, stride_, 1, 0};
      store.wide(sums, rows, row, false, m.out, row, 0);
      store(sums.at(0, row), rows, rows, true, m.out, row, row);
    });
  }

 private:
  static constexpr int64_t strip = max_tile_edge;

  // The lower triangle, damped; what fills up the last vector is a part of the identity.
  void load(const Matrix<T>& m, T* a) const {
    for (int64_t r = 0; r < size_; ++r, a += stride_) {
      std::fill_n(a, size_, T{0});
      if (r >= m.size) {
        a[r] = 1;
        continue;
      }
      const T* row = m.data + r * m.row_stride;
      if (m.column_stride == 1) {
        std::copy_n(row, r + 1, a);
      } else {
        for (int64_t c = 0; c <= r; ++c) a[c] = row[c * m.column_stride];
      }
      a[r] += m.damping;
    }
  }

  const int64_t lanes_, size_;
  const BlockSweep<T> sweep_;
  const int64_t stride_;
};

template <typename T>
void invert_all(const std::vector<Tensor>& list, const std::vector<Tensor>& damping,
                const std::vector<Tensor>& out, const Tensor& info,
                const std::optional<Tensor>& logdet) {
  std::vector<Matrix<T>> matrices = matrices_of<T>(list, damping, out, info, logdet);
  // The largest first: then no thread begins a long one when the others are done.
  std::stable_sort(matrices.begin(), matrices.end(),
                   [](const Matrix<T>& a, const Matrix<T>& b) { return a.size > b.size; });
  const auto work = [](const Matrix<T>& m) {
    const double n = static_cast<double>(m.size) + 24;  // short loops take longer
    return n * n * n / 2;
  };
  double total = 0;
  for (const Matrix<T>& m : matrices) total += work(m);
  const InstructionSet set = instruction_set_in_use();
  const int64_t threads = torch::stable::get_num_threads();
  size_t first = 0;
  // All threads share a matrix that would keep one of them busy longer than the rest the others.
  for (; first < matrices.size() && threads > 1; ++first) {
    const Matrix<T>& m = matrices[first];
    if (m.size < 512 || work(m) * static_cast<double>(threads) <= total) break;
    total -= work(m);
    const Inverter<T> invert(set, m.size);
    const auto scratch = make_scratch<T>(invert.scratch_size());
    invert(m, scratch.get(), [&](int64_t tasks, double products, const auto& run) {
      for_each_task(tasks, worker_count(tasks, products), [&](int64_t t, int64_t) { run(t); });
    });
  }
  if (first == matrices.size()) return;
  // Some small ones are one task.
  constexpr double work_a_task = 1e5;
  std::vector<size_t> begin{first};
  double gathered = 0;
  for (size_t i = first; i < matrices.size(); ++i) {
    gathered += work(matrices[i]);
    if (gathered >= work_a_task || i + 1 == matrices.size()) {
      begin.push_back(i + 1);
      gathered = 0;
    }
  }
  const auto tasks = static_cast<int64_t>(begin.size()) - 1;
  const int64_t workers = worker_count(tasks, total);
  int64_t scratch_size = 0;
  for (size_t i = first; i < matrices.size(); ++i) {
    scratch_size = std::max(scratch_size, Inverter<T>(set, matrices[i].size).scratch_size());
  }
  scratch_size = round_up(scratch_size, 16);
  const auto scratch = make_scratch<T>(workers * scratch_size);
  for_each_task(tasks, workers, [&](int64_t task, int64_t worker) {
    for (size_t i = begin[task]; i < begin[task + 1]; ++i) {
      const Inverter<T> invert(set, matrices[i].size);
      invert(matrices[i], &scratch[worker * scratch_size], InOrder{});
    }
  });
}

void damped_inverse(std::vector<Tensor> matrices, std::vector<Tensor> damping,
                    std::vector<Tensor> out, const Tensor& info,
                    const std::optional<Tensor>& logdet) {
  if (matrices.empty()) return;
  if (matrices[0].scalar_type() == ScalarType::Double) {
    invert_all<double>(matrices, damping, out, info, logdet);
  } else {
    invert_all<float>(matrices, damping, out, info, logdet);
  }
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CPU, m) {
  m.impl("damped_inverse", TORCH_BOX(&damped_inverse));
}

}  // namespace
}  // namespace kfac_fast
