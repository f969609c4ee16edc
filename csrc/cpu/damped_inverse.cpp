// Inverses and Cholesky factors of damped symmetric matrices of mixed sizes on the CPU; see
// block_sweep.h.

#include <atomic>
#include <optional>
#include <vector>

#include "block_sweep.h"
#include "list_loop.h"
#include "operators.h"
#include "parallel.h"
#include "strided.h"
#include "symmetric_store.h"
#include "symmetry.h"
#include "tensor_lists.h"

namespace kfac_fast {
namespace {

template <typename T>
struct Matrix {
  Strided<T> entries;
  int64_t size;
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
  const bool joint = is_joint(damping, info.numel());
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& x = matrices[i];
    const int64_t batch_dims = x.dim() - 2, size = x.size(batch_dims);
    const int64_t count = stack_size(x, batch_dims);
    const Tensor& shift = damping[damping.size() == 1 ? 0 : i];
    T* result = static_cast<T*>(out[i].mutable_data_ptr());
    for (int64_t n = 0; n < count; ++n) {
      const auto entry = static_cast<int64_t>(all.size());
      all.push_back(
          {{entry_of<T>(x, batch_dims, n), x.stride(batch_dims), x.stride(batch_dims + 1)},
           size,
           *entry_of<T>(shift, shift.dim(), joint ? entry : n),
           result + n * size * size,
           infos + entry,
           logdets ? logdets + entry : nullptr});
    }
  }
  return all;
}

template <typename T>
bool are_symmetric(const std::vector<Matrix<T>>& matrices) {
  struct Strip {
    const Matrix<T>& matrix;
    int64_t top;
    size_t scales;
  };
  const Symmetry<T> symmetry(instruction_set_in_use());
  std::vector<T> scales;
  std::vector<Strip> strips;
  double work = 0;  // reading an entry takes as long as ten multiply-adds
  for (const Matrix<T>& m : matrices) {
    const size_t begin = scales.size();
    scales.resize(begin + symmetry.scales_size(m.size));
    symmetry.find_scales(m.entries, m.size, m.damping, &scales[begin]);
    for (int64_t top = 0; top < m.size; top += Symmetry<T>::strip) {
      strips.push_back({m, top, begin});
    }
    work += 10.0 * static_cast<double>(m.size) * m.size;
  }
  const auto count = static_cast<int64_t>(strips.size());
  std::atomic<bool> all{true};
  for_each_independent_task(count, worker_count(count, work), [&](int64_t i, int64_t) {
    const auto& [m, top, begin] = strips[i];
    if (all && !symmetry.holds(m.entries, m.size, top, &scales[begin])) all = false;
  });
  return all;
}

template <typename T>
class DampedSweep {
 public:
  DampedSweep(InstructionSet set, Sweep sweep, int64_t size)
      : inverts_(sweep == Sweep::inverse),
        lanes_(tile_product<T>(set).lanes),
        store_square_(square_store<T>(set)),
        sweep_(set, sweep, size),
        size_(sweep_.size()),
        stride_(sweep_.row_stride()) {}

  int64_t scratch_size() const { return size_ * stride_ + sweep_.scratch_size(); }

  template <typename Share>
  void operator()(const Matrix<T>& m, T* scratch, const Share& share) const {
    load(m, scratch);
    double logdet = 0;
    const int64_t done =
        sweep_(scratch, scratch + size_ * stride_, m.logdet ? &logdet : nullptr, share);
    const bool failed = done < size_;
    *m.info = failed ? static_cast<int32_t>(done + 1) : 0;
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    if (m.logdet) *m.logdet = failed ? nan : static_cast<T>(logdet);
    if (failed) {
      std::fill_n(m.out, m.size * m.size, nan);
      return;
    }
    if (inverts_ && size_ <= in_near_caches) {
      mirror(scratch, m.size);
      store_rows(m, 0, m.size, scratch, true);
      return;
    }
    const SymmetricStore<T> store{T{1}, T{0}, m.size};
    const int64_t strips = divide_up(m.size, strip);
    share(strips, static_cast<double>(m.size) * m.size, [&](int64_t i) {
      const int64_t row = i * strip;
      const int64_t rows = std::min(strip, m.size - row);
      const TileSums<T> sums{scratch + row * stride_, stride_, 1, 0};
      if (!inverts_) {
        store_rows(m, row, rows, sums.data, false);
      } else {
        store.wide(sums, rows, row, false, m.out, row, 0);
        store(sums.at(0, row), rows, rows, true, m.out, row, row);
      }
    });
  }

 private:
  static constexpr int64_t strip = max_tile_edge;
  // Rows of a matrix that is mirrored where it is before it is stored.
  static constexpr int64_t in_near_caches = 256;

  // The lower triangle, damped and negated; the last vector is filled up with a negated identity.
  // In the squares on the diagonal anything may stand above it.
  void load(const Matrix<T>& m, T* a) const {
    for (int64_t r = 0; r < size_; ++r, a += stride_) {
      const int64_t end = round_up(r + 1, lanes_);
      const int64_t columns = r < m.size ? std::min(end, m.size) : 0;
      const T* row = m.entries.from(r, 0).data;
      if (m.entries.column_stride == 1) {
        for (int64_t c = 0; c < columns; ++c) a[c] = -row[c];
      } else {
        for (int64_t c = 0; c <= std::min(r, columns - 1); ++c)
          a[c] = -row[c * m.entries.column_stride];
      }
      std::fill(a + columns, a + end, T{0});
      a[r] = r < m.size ? a[r] - m.damping : T{-1};
    }
  }

  // The upper triangle from the lower one. Whole squares on the diagonal have both, from the same
  // sums.
  void mirror(T* a, int64_t size) const {
    for (int64_t r = lanes_; r < size_; r += lanes_) {
      for (int64_t c = 0; c < r; c += lanes_) {
        store_square_(a + r * stride_ + c, stride_, lanes_, a + c * stride_ + r, stride_);
      }
    }
    for (int64_t r = size / lanes_ * lanes_; r < size; ++r) {
      for (int64_t c = r + 1; c < size; ++c) a[r * stride_ + c] = a[c * stride_ + r];
    }
  }

  // Rows as they are, or what is below the diagonal and zeros.
  void store_rows(const Matrix<T>& m, int64_t first, int64_t rows, const T* from,
                  bool whole) const {
    T* to = m.out + first * m.size;
    for (int64_t r = first; r < first + rows; ++r, from += stride_, to += m.size) {
      const int64_t columns = whole ? m.size : r + 1;
      std::fill(std::copy_n(from, columns, to), to + m.size, T{0});
    }
  }

  const bool inverts_;
  const int64_t lanes_;
  const SquareStore<T> store_square_;
  const BlockSweep<T> sweep_;
  const int64_t size_, stride_;
};

template <typename T>
bool sweep_all(Sweep sweep, const std::vector<Matrix<T>>& matrices) {
  if (!are_symmetric(matrices)) return false;
  const InstructionSet set = instruction_set_in_use();
  std::vector<Job> jobs;
  jobs.reserve(matrices.size());
  for (const Matrix<T>& m : matrices) {
    const double n = static_cast<double>(m.size) + 24;  // short loops take longer
    const int64_t scratch = DampedSweep<T>(set, sweep, m.size).scratch_size();
    jobs.push_back({n * n * n / (sweep == Sweep::inverse ? 2 : 6), scratch, scratch});
  }
  for_each_job<T>(jobs, [&](int64_t job, T* scratch, const auto& share) {
    DampedSweep<T>(set, sweep, matrices[job].size)(matrices[job], scratch, share);
  });
  return true;
}

bool damped(Sweep sweep, const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
            const std::vector<Tensor>& out, const Tensor& info,
            const std::optional<Tensor>& logdet) {
  if (!damped_lists_pass(matrices, damping, out, info, logdet)) return false;
  if (matrices[0].scalar_type() == ScalarType::Double) {
    return sweep_all(sweep, matrices_of<double>(matrices, damping, out, info, logdet));
  }
  return sweep_all(sweep, matrices_of<float>(matrices, damping, out, info, logdet));
}

}  // namespace

bool damped_inverse(const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
                    const std::vector<Tensor>& out, const Tensor& info,
                    const std::optional<Tensor>& logdet) {
  return damped(Sweep::inverse, matrices, damping, out, info, logdet);
}

bool damped_cholesky(const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
                     const std::vector<Tensor>& out, const Tensor& info,
                     const std::optional<Tensor>& logdet) {
  return damped(Sweep::cholesky, matrices, damping, out, info, logdet);
}

}  // namespace kfac_fast
