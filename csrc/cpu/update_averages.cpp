// Running averages of many tensors on the CPU: one pass over what is averaged in, once it is known
// to be finite.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "operators.h"
#include "parallel.h"

namespace kfac_fast {
namespace {

bool averages_pass(const std::vector<Tensor>& sums, size_t terms, double decay, bool covariances,
                   const std::vector<Tensor>& out, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& skipped) {
  const size_t count = out.size();
  if (sums.size() != count || terms != count || weights.size() != count) return false;
  if (skipped.size() != count || !(decay >= 0 && decay < 1)) return false;
  if (count == 0) return true;
  const ScalarType type = out[0].scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) return false;
  ListCheck check(type);
  for (size_t i = 0; i < count; ++i) {
    const int64_t dims = out[i].dim();
    if (!same_shape(sums[i], out[i], dims) || !sums[i].is_contiguous()) return false;
    if (sums[i].numel() == 0) return false;
    if (covariances && !is_covariance(out[i])) return false;
    if (weights[i].dim() != 0 || skipped[i].dim() != 0) return false;
    if (!check.reads(sums[i]) || !check.writes(out[i]) || !check.writes(weights[i])) return false;
    if (!check.writes(skipped[i], ScalarType::Long)) return false;
  }
  return check.apart();
}

// As torch.lerp, which ends where the weight is 1.
template <typename T>
T interpolated(T start, T end, T weight) {
  return weight < T{0.5} ? start + weight * (end - start) : end - (1 - weight) * (end - start);
}

template <typename T>
class Averages {
 public:
  Averages(const std::vector<Tensor>& sums, const std::vector<double>& terms, double decay,
           bool covariances, const std::vector<Tensor>& out, const std::vector<Tensor>& weights,
           const std::vector<Tensor>& skipped)
      : sums_(sums),
        terms_(terms),
        decay_(static_cast<T>(decay)),
        rate_(static_cast<T>(1 - decay)),
        covariances_(covariances),
        out_(out),
        weights_(weights),
        skipped_(skipped),
        rates_(out.size()) {}

  void run() {
    double witnesses = 0;
    const auto count = static_cast<int64_t>(out_.size());
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t entries = out_[i].numel();
      witnesses += static_cast<double>(entries) / step(i);
      for (int64_t first = 0; first < entries; first += entries_a_piece) {
        pieces.push_back({i, first, std::min(first + entries_a_piece, entries)});
      }
      entries_ += entries;
    }
    constexpr double operations_a_miss = 100, operations_an_entry = 16;
    for_each_task(count, worker_count(count, operations_a_miss * witnesses),
                  [&](int64_t i, int64_t) { rates_[i] = is_finite(i) ? weigh(i) : skip(i); });
    const auto tasks = static_cast<int64_t>(pieces.size());
    for_each_independent_task(
        tasks, worker_count(tasks, operations_an_entry * static_cast<double>(entries_)),
        [&](int64_t task, int64_t) { average(pieces[task]); });
  }

 private:
  static constexpr int64_t entries_a_piece = 1 << 14;

  struct Piece {
    int64_t index, first, last;
  };

  const T* sum(int64_t i) const { return static_cast<const T*>(sums_[i].const_data_ptr()); }

  // From one entry that is looked at to the next: along the diagonal, where there is one.
  int64_t step(int64_t i) const {
    const int64_t dims = out_[i].dim();
    return covariances_ && dims > 1 ? out_[i].size(dims - 1) + 1 : 1;
  }

  bool is_finite(int64_t i) const {
    const T* entries = sum(i);
    const T terms = static_cast<T>(terms_[i]);
    const int64_t distance = step(i), size = out_[i].numel();
    const int64_t matrix = distance > 1 ? (distance - 1) * (distance - 1) : size;
    for (int64_t first = 0; first < size; first += matrix) {
      for (int64_t c = 0; c < matrix; c += distance) {
        if (!std::isfinite(entries[first + c] / terms)) return false;
      }
    }
    return true;
  }

  // Each returns the share of the batch in its average.
  T weigh(int64_t i) const {
    T& weight = *static_cast<T*>(weights_[i].mutable_data_ptr());
    weight = decay_ * weight + rate_;
    return rate_ / weight;
  }
  T skip(int64_t i) const {
    ++*static_cast<int64_t*>(skipped_[i].mutable_data_ptr());
    return 0;
  }

  void average(const Piece& piece) const {
    const T rate = rates_[piece.index];
    if (rate == 0) return;
    const T* __restrict from = sum(piece.index);
    T* __restrict to = static_cast<T*>(out_[piece.index].mutable_data_ptr());
    const T terms = static_cast<T>(terms_[piece.index]);
    for (int64_t c = piece.first; c < piece.last; ++c) {
      to[c] = interpolated(to[c], from[c] / terms, rate);
    }
  }

  const std::vector<Tensor>& sums_;
  const std::vector<double>& terms_;
  const T decay_, rate_;
  const bool covariances_;
  const std::vector<Tensor>&out_, &weights_, &skipped_;
  std::vector<T> rates_;
  int64_t entries_ = 0;
};

}  // namespace

bool update_averages(const std::vector<Tensor>& sums, const std::vector<double>& terms,
                     double decay, bool covariances, const std::vector<Tensor>& out,
                     const std::vector<Tensor>& weights, const std::vector<Tensor>& skipped) {
  if (!averages_pass(sums, terms.size(), decay, covariances, out, weights, skipped)) return false;
  if (!out.empty() && out[0].scalar_type() == ScalarType::Double) {
    Averages<double>(sums, terms, decay, covariances, out, weights, skipped).run();
  } else {
    Averages<float>(sums, terms, decay, covariances, out, weights, skipped).run();
  }
  return true;
}

}  // namespace kfac_fast
