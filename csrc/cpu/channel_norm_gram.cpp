// The factor of a normalisation of channels on the CPU. Every channel of every example is read from
// memory once, with its gradients: its moments about its own mean are enough for those about the
// mean that the normalisation takes away, once that is known. Single entries have no such moments:
// they are read for the statistics, and again.

#include <optional>

#include "checks.h"
#include "contiguous_rows.h"
#include "gram_layout.h"
#include "norm_sums.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"

namespace kfac_fast {
namespace {

struct Arguments {
  const Tensor& x;
  const Tensor& gradient;
  const std::optional<Tensor>& mean;
  const std::optional<Tensor>& variance;
  int64_t num_groups;  // -1: each channel over all examples
  double eps;
  bool bias;

  int64_t examples() const { return x.size(0); }
  int64_t channels() const { return x.size(1); }
};

struct Statistics {
  double mean, scale;
};

// Rows of equal lengths whose entries are normalised together.
class Pool {
 public:
  explicit Pool(int64_t positions) : positions_(std::max<double>(positions, 1)) {}

  // Means are taken from that of the first row, lest the squares of large ones cancel.
  template <typename T>
  void add(const RowMoments<T>& row) {
    if (count_++ == 0) shift_ = row.mean;
    const double rounded = row.mean - shift_, rest = row.rest / positions_;
    sum_ += rounded + rest;
    squares_ += row.squares / positions_ + rounded * (rounded + 2 * rest);
  }

  Statistics statistics(double eps) const {
    const double mean = sum_ / count_;
    return {shift_ + mean, inverse_deviation(squares_ / count_ - mean * mean, eps)};
  }

 private:
  const double positions_;
  double count_ = 0, shift_ = 0, sum_ = 0, squares_ = 0;
};

template <typename T>
class ChannelNorm {
 public:
  ChannelNorm(const Arguments& arguments, const SymmetricStore<T>& store, T* out)
      : a_(arguments),
        store_(store),
        out_(out),
        rows_(a_.examples() * a_.channels()),
        positions_(a_.x.numel() / std::max<int64_t>(rows_, 1)),
        statistics_(
            make_scratch<Statistics>(std::max(a_.examples() * a_.num_groups, a_.channels()))) {}

  template <typename In>
  void run() {
    const bool adjacent = a_.x.stride(1) == 1 && a_.gradient.stride(1) == 1;
    if (positions_ == 1 && adjacent && a_.num_groups < 0) return run_columns<In>();
    read<In>();
    const double operations = operations_an_entry * static_cast<double>(rows_);
    if (a_.num_groups > 0) {
      for_each_part(a_.examples(), 1, operations, [&](int64_t n, int64_t) { pool_groups(n); });
    }
    for_each_part(a_.channels(), channels_a_task, operations, [&](int64_t begin, int64_t end) {
      if (a_.num_groups < 0) find_statistics(begin, end);
      for (int64_t channel = begin; channel < end; ++channel) add_examples(channel);
    });
  }

 private:
  static constexpr double operations_an_entry = 16;
  static constexpr int64_t channels_a_task = 16;
  static constexpr int64_t channels_together = 64;
  static constexpr int64_t room_a_channel = 11;  // five numbers, three sums and what they have lost

  template <typename In>
  void read() {
    const auto& sums = norm_sums<In, T>(instruction_set_in_use());
    const ContiguousRows<In> x(a_.x, 2), gradient(a_.gradient, 2);
    const int64_t parts = divide_up(a_.channels(), channels_a_task);
    const int64_t tasks = a_.examples() * parts;
    const int64_t workers = worker_count(tasks, operations_an_entry * a_.x.numel());
    const int64_t copies = x.in_place() && gradient.in_place() ? 0 : 2 * positions_;
    const auto room = make_scratch<In>(workers * copies);
    moments_ = make_scratch<RowMoments<T>>(rows_);
    for_each_independent_task(tasks, workers, [&](int64_t task, int64_t worker) {
      const int64_t example = task / parts, first = task % parts * channels_a_task;
      In* own = &room[worker * copies];
      for (int64_t c = first; c < std::min(first + channels_a_task, a_.channels()); ++c) {
        moments_[example * a_.channels() + c] = sums.moments(
            x.at(example, c, own), gradient.at(example, c, own + positions_), positions_);
      }
    });
  }

  // Channels side by side, with a single entry in each example: by vectors of channels.
  template <typename In>
  void run_columns() {
    const auto& sums = norm_sums<In, T>(instruction_set_in_use());
    const auto count = static_cast<T>(a_.examples());
    const double operations = operations_an_entry * a_.x.numel();
    for_each_part(a_.channels(), channels_together, operations, [&](int64_t begin, int64_t end) {
      const int64_t channels = end - begin;
      const auto row = [&](const Tensor& x, int64_t n) {
        return static_cast<const In*>(x.const_data_ptr()) + n * x.stride(0) + begin;
      };
      const auto room = make_scratch<T>(room_a_channel * channels_together);
      std::fill_n(room.get(), room_a_channel * channels_together, T{0});
      T *mean = room.get(), *rest = mean + channels, *scale = rest + channels;
      T *weight = scale + channels, *bias = weight + channels;
      T *total = bias + channels, *lost = total + 3 * channels;
      if (a_.mean) {
        find_statistics(begin, end);
        for (int64_t c = 0; c < channels; ++c) {
          mean[c] = static_cast<T>(statistics_[begin + c].mean);
          scale[c] = static_cast<T>(statistics_[begin + c].scale);
        }
      } else if (a_.examples() > 0) {
        std::copy_n(row(a_.x, 0), channels, mean);
        for (int pass = 0; pass < 2; ++pass) {  // about the first row, and then about the mean
          std::fill_n(total, 2 * channels, T{0});
          std::fill_n(lost, 2 * channels, T{0});
          for (int64_t n = 0; n < a_.examples(); ++n) {
            sums.add_deviations(row(a_.x, n), mean, channels, total, lost);
          }
          for (int64_t c = 0; c < channels && pass == 0; ++c) mean[c] += total[c] / count;
        }
        for (int64_t c = 0; c < channels; ++c) {
          rest[c] = total[c] / count;
          const T variance = total[channels + c] / count - rest[c] * rest[c];
          scale[c] = inverse_deviation(variance, static_cast<T>(a_.eps));
        }
      }
      std::fill_n(total, 3 * channels, T{0});
      std::fill_n(lost, 3 * channels, T{0});
      for (int64_t n = 0; n < a_.examples(); ++n) {
        sums.weigh(row(a_.x, n), row(a_.gradient, n), mean, rest, scale, channels, weight, bias);
        sums.add_outer_products[a_.bias](weight, bias, channels, total, lost);
      }
      for (int64_t c = 0; c < channels; ++c) {
        store_unit(store_, TileSums<T>{total + c, 1, 1, 0}, channels, begin + c, out_);
      }
    });
  }

  template <typename Run>
  static void for_each_part(int64_t count, int64_t size, double operations, const Run& run) {
    const int64_t tasks = divide_up(count, size);
    for_each_independent_task(tasks, worker_count(tasks, operations), [&](int64_t task, int64_t) {
      run(task * size, std::min(count, (task + 1) * size));
    });
  }

  const RowMoments<T>& moments(int64_t example, int64_t channel) const {
    return moments_[example * a_.channels() + channel];
  }

  void pool_groups(int64_t example) {
    const int64_t size = a_.channels() / a_.num_groups;
    for (int64_t group = 0; group < a_.num_groups; ++group) {
      Pool pool(positions_);
      for (int64_t i = 0; i < size; ++i) pool.add(moments(example, group * size + i));
      statistics_[example * a_.num_groups + group] = pool.statistics(a_.eps);
    }
  }

  void find_statistics(int64_t begin, int64_t end) {
    const auto at = [](const Tensor& values, int64_t channel) {
      return static_cast<const T*>(values.const_data_ptr())[channel * values.stride(0)];
    };
    for (int64_t channel = begin; channel < end; ++channel) {
      if (a_.mean) {
        const double variance = at(*a_.variance, channel);
        statistics_[channel] = {at(*a_.mean, channel), inverse_deviation(variance, a_.eps)};
        continue;
      }
      Pool pool(positions_);
      for (int64_t n = 0; n < a_.examples(); ++n) pool.add(moments(n, channel));
      statistics_[channel] = pool.statistics(a_.eps);
    }
  }

  const Statistics& statistics(int64_t example, int64_t channel) const {
    if (a_.num_groups < 0) return statistics_[channel];
    return statistics_[example * a_.num_groups + channel / (a_.channels() / a_.num_groups)];
  }

  void add_examples(int64_t channel) {
    double sums[3] = {};
    for (int64_t n = 0; n < a_.examples(); ++n) {
      const auto& [mean, scale] = statistics(n, channel);
      const RowMoments<T>& row = moments(n, channel);
      const double bias = row.gradients;
      const double weight = scale * (row.products + (row.mean - mean) * bias);
      sums[0] += weight * weight;
      sums[1] += weight * bias;
      sums[2] += bias * bias;
    }
    const T rounded[] = {static_cast<T>(sums[0]), static_cast<T>(sums[1]), static_cast<T>(sums[2])};
    store_unit(store_, TileSums<T>{rounded, 1, 1, 0}, 1, channel, out_);
  }

  const Arguments& a_;
  const SymmetricStore<T>& store_;
  T* const out_;
  const int64_t rows_;
  const int64_t positions_;
  Scratch<RowMoments<T>> moments_;
  const Scratch<Statistics> statistics_;  // of every channel, or of every example's groups
};

}  // namespace

bool channel_norm_gram(const Tensor& x, const Tensor& gradient, const std::optional<Tensor>& mean,
                       const std::optional<Tensor>& variance, int64_t num_groups, double eps,
                       bool bias, double alpha, double beta, Result& out) {
  if (!norm_inputs_pass(x, gradient, eps)) return false;
  if (num_groups != -1 && (num_groups < 1 || x.size(1) % num_groups != 0)) return false;
  if (mean.has_value() != variance.has_value() || (mean && num_groups != -1)) return false;
  for (const auto* given : {&mean, &variance}) {
    if (*given && !is_vector(**given, x.size(1))) return false;
  }
  if (!tensors_pass({&x, &gradient}, {&mean, &variance}, out, {x.size(1), 1 + bias, 1 + bias})) {
    return false;
  }
  const Arguments a{x, gradient, mean, variance, num_groups, eps, bias};
  for_dtype(x, [&]<typename In, typename T>() {
    const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta), 1 + bias};
    ChannelNorm<T>(a, store, static_cast<T*>(out.data())).template run<In>();
  });
  return true;
}

}  // namespace kfac_fast
