// The factor of a normalisation of features on the CPU: each row is normalised again, and its
// products with the gradients are added up example by example, while they are in the caches.

#include <optional>

#include "checks.h"
#include "contiguous_rows.h"
#include "norm_sums.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"
#include "segments.h"
#include "symmetric_store.h"

namespace kfac_fast {
namespace {

struct Arguments {
  const Tensor& x;
  const Tensor& gradient;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& segments;
  int64_t num_segments;
  double eps;
  bool center;
  bool bias;

  int64_t units() const { return x.size(x.dim() - 1); }
  int64_t examples() const { return segments ? num_segments : x.size(0); }

  // Of the rows of all examples.
  bool counts(int64_t row) const { return !mask || *entry_of<bool>(*mask, mask->dim(), row); }
};

template <typename In, typename T>
class ExampleSums {
 public:
  explicit ExampleSums(const Arguments& arguments)
      : a_(arguments),
        x_(a_.x, a_.x.dim() - 1),
        gradient_(a_.gradient, a_.x.dim() - 1),
        functions_(norm_sums<In, T>(instruction_set_in_use())) {
    if (a_.segments) segments_.emplace(*a_.segments, a_.num_segments, "feature_norm_gram");
    for (int64_t d = 1; d < a_.x.dim() - 1; ++d) positions_ *= a_.x.size(d);
  }

  int64_t room() const { return 9 * a_.units(); }
  int64_t copies() const { return 2 * a_.units(); }

  // total = the outer products of the gradients of some examples, part by part.
  void add(int64_t begin, int64_t end, T* total, T* room, In* copies) const {
    const int64_t units = a_.units();
    T *lost = room, *sums = room + 3 * units;
    std::fill_n(total, 3 * units, T{0});
    std::fill_n(lost, 3 * units, T{0});
    for (int64_t example = begin; example < end; ++example) {
      sum_example(example, sums, copies);
      functions_.add_outer_products[a_.bias](sums, sums + units, units, total, lost);
    }
  }

 private:
  // Of scales and of shifts. The rows after the first few are summed apart, a few at a time.
  void sum_example(int64_t example, T* sums, In* copies) const {
    constexpr int64_t rows_a_chain = 16;
    const int64_t units = a_.units();
    T *lost = sums + 2 * units, *chain = lost + 2 * units;
    std::fill_n(sums, 6 * units, T{0});
    int64_t rows = 0;
    for_each_row(example, [&](int64_t row) {
      if (!a_.counts(row)) return;
      if (rows > 0 && rows % rows_a_chain == 0) {
        functions_.end_chain(chain, 2 * units, sums, lost);
      }
      T* into = rows++ < rows_a_chain ? sums : chain;
      const In* x = x_.at(row, copies);
      const In* g = gradient_.at(row, copies + units);
      functions_.add_normalized[a_.center](x, g, units, static_cast<T>(a_.eps), into, into + units);
    });
    if (rows > rows_a_chain) functions_.end_chain(chain, 2 * units, sums, lost);
  }

  template <typename Visit>
  void for_each_row(int64_t example, const Visit& visit) const {
    if (!segments_) {
      for (int64_t i = 0; i < positions_; ++i) visit(example * positions_ + i);
      return;
    }
    const auto& begin = segments_->begin;
    for (int64_t i = begin[example]; i < begin[example + 1]; ++i) visit(segments_->rows[i]);
  }

  const Arguments& a_;
  const ContiguousRows<In> x_, gradient_;
  const NormSums<In, T>& functions_;
  std::optional<Segments> segments_;
  int64_t positions_ = 1;  // of an example, without segments
};

template <typename In, typename T>
void feature_norm_gram_of(const Arguments& a, double alpha, double beta, T* out) {
  // The chunks depend on the shape alone, and so does the order in which they are added.
  constexpr int64_t entries_a_chunk = 1 << 14, most_chunks = 32;
  constexpr double operations_an_entry = 16;
  const ExampleSums<In, T> sums(a);
  const int64_t most = std::clamp<int64_t>(a.examples(), 1, most_chunks);
  const int64_t chunks = std::clamp<int64_t>(a.x.numel() / entries_a_chunk, 1, most);
  const int64_t workers = worker_count(chunks, operations_an_entry * a.x.numel());
  const int64_t set_size = 3 * a.units();
  const auto sets = make_scratch<T>(chunks * set_size);
  const auto room = make_scratch<T>(workers * sums.room());
  const auto copies = make_scratch<In>(workers * sums.copies());
  for_each_task(chunks, workers, [&](int64_t chunk, int64_t worker) {
    sums.add(chunk * a.examples() / chunks, (chunk + 1) * a.examples() / chunks,
             &sets[chunk * set_size], &room[worker * sums.room()], &copies[worker * sums.copies()]);
  });
  const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta), 1 + a.bias};
  for (int64_t unit = 0; unit < a.units(); ++unit) {
    T* matrix = out + unit * store.edge * store.edge;
    const TileSums<T> weight{&sets[unit], 1, chunks, set_size};
    store(weight, 1, 1, true, matrix, 0, 0);
    if (!a.bias) continue;
    store(weight.at(a.units(), 0), 1, 1, false, matrix, 1, 0);
    store(weight.at(2 * a.units(), 0), 1, 1, true, matrix, 1, 1);
  }
}

}  // namespace

bool feature_norm_gram(const Tensor& x, const Tensor& gradient, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& segments, int64_t num_segments, double eps,
                       bool center, bool bias, double alpha, double beta, const Tensor& out) {
  if (!norm_inputs_pass(x, gradient, eps)) return false;
  if (mask && !same_shape(*mask, x, x.dim() - 1)) return false;
  if (segments ? x.dim() != 2 || !is_vector(*segments, x.size(0)) || num_segments < 0
               : num_segments != -1) {
    return false;
  }
  const Arguments a{x, gradient, mask, segments, num_segments, eps, center, bias};
  if (!memory_passes({&x, &gradient}, mask, segments, out) ||
      !has_sizes(out, {a.units(), 1 + bias, 1 + bias})) {
    return false;
  }
  for_dtype(x, [&]<typename In, typename T>() {
    feature_norm_gram_of<In, T>(a, alpha, beta, static_cast<T*>(out.mutable_data_ptr()));
  });
  return true;
}

}  // namespace kfac_fast
