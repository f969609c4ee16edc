// The factor of a normalisation of features on the CPU: each row is normalised again, and its
// products with the gradients are added up example by example, while they are in the caches.

#include <optional>

#include "checks.h"
#include "contiguous_rows.h"
#include "gram_layout.h"
#include "norm_sums.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"
#include "segments.h"

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

  // Of scales and of shifts, of one of so many parts of an example's rows. `room` is for four
  // numbers a unit, `copies` for two of each row at once.
  void sum(int64_t example, int64_t part, int64_t parts, T* sums, T* room, In* copies) const {
    // The rows after the first few are summed apart, a few at a time.
    constexpr int64_t rows_a_chain = 2 * most_rows_at_once;
    const int64_t units = a_.units(), at_once = rows_at_once();
    T *lost = room, *chain = room + 2 * units;
    std::fill_n(sums, 2 * units, T{0});
    const In *x[most_rows_at_once], *g[most_rows_at_once];
    int64_t rows = 0, waiting = 0;
    const auto add_waiting = [&] {
      if (rows == rows_a_chain) {
        std::fill_n(room, 4 * units, T{0});
      } else if (rows > 0 && rows % rows_a_chain == 0) {
        functions_.end_chain(chain, 2 * units, sums, lost);
      }
      T* into = rows < rows_a_chain ? sums : chain;
      functions_.add_normalized[a_.center](x, g, waiting, units, static_cast<T>(a_.eps), into,
                                           into + units);
      rows += waiting;
      waiting = 0;
    };
    for_each_row(example, part, parts, [&](int64_t row) {
      if (!a_.counts(row)) return;
      In* own = copies + waiting * 2 * units;
      x[waiting] = x_.at(row, own);
      g[waiting] = gradient_.at(row, own + units);
      if (++waiting == at_once) add_waiting();
    });
    if (waiting > 0) add_waiting();
    if (rows > rows_a_chain) functions_.end_chain(chain, 2 * units, sums, lost);
  }

  // What the nearest cache holds of short rows, and the next one of longer ones; a divisor of those
  // of a chain.
  int64_t rows_at_once() const {
    return a_.units() <= 512 ? most_rows_at_once : a_.units() <= 8192 ? 4 : 1;
  }

  // total += the outer products of an example's sums, part by part.
  void multiply(const T* sums, T* total, T* lost) const {
    const int64_t units = a_.units();
    functions_.add_outer_products[a_.bias](sums, sums + units, units, total, lost);
  }

  // sums += more, more <- 0
  void add(T* more, T* sums, T* lost) const {
    functions_.end_chain(more, 2 * a_.units(), sums, lost);
  }

 private:
  template <typename Visit>
  void for_each_row(int64_t example, int64_t part, int64_t parts, const Visit& visit) const {
    const int64_t first = segments_ ? segments_->begin[example] : example * positions_;
    const int64_t count = segments_ ? segments_->begin[example + 1] - first : positions_;
    const int64_t end = first + count * (part + 1) / parts;
    for (int64_t i = first + count * part / parts; i < end; ++i) {
      visit(segments_ ? segments_->rows[i] : i);
    }
  }

  const Arguments& a_;
  const ContiguousRows<In> x_, gradient_;
  const NormSums<In, T>& functions_;
  std::optional<Segments> segments_;
  int64_t positions_ = 1;  // of an example, without segments
};

template <typename In, typename T>
void feature_norm_gram_of(const Arguments& a, double alpha, double beta, T* out) {
  // Chunks of examples, or parts of few long ones: they depend on the shape alone, and so does the
  // order in which they are added.
  constexpr int64_t entries_a_chunk = 1 << 14, most_chunks = 32;
  constexpr double operations_an_entry = 16;
  constexpr int64_t room_a_unit = 9;  // what three sums have lost, two sums and their room
  const ExampleSums<In, T> sums(a);
  const int64_t units = a.units(), examples = a.examples(), set_size = 3 * units;
  const int64_t wanted = std::clamp<int64_t>(a.x.numel() / entries_a_chunk, 1, most_chunks);
  const int64_t parts = divide_up(wanted, std::max<int64_t>(examples, 1));
  const int64_t chunks = parts > 1 ? 1 : std::clamp<int64_t>(examples, 1, wanted);
  const int64_t tasks = parts > 1 ? examples * parts : chunks;
  const int64_t workers = worker_count(tasks, operations_an_entry * a.x.numel());
  const auto sets = make_scratch<T>(chunks * set_size);
  const auto room = make_scratch<T>(workers * room_a_unit * units);
  const int64_t copies_size = 2 * units * sums.rows_at_once();
  const auto copies = make_scratch<In>(workers * copies_size);
  if (parts == 1) {
    for_each_task(tasks, workers, [&](int64_t chunk, int64_t worker) {
      T *total = &sets[chunk * set_size], *lost = &room[worker * room_a_unit * units];
      T *own = lost + 3 * units, *rest = own + 2 * units;
      std::fill_n(total, 3 * units, T{0});
      std::fill_n(lost, 3 * units, T{0});
      const int64_t end = (chunk + 1) * examples / chunks;
      for (int64_t example = chunk * examples / chunks; example < end; ++example) {
        sums.sum(example, 0, 1, own, rest, &copies[worker * copies_size]);
        sums.multiply(own, total, lost);
      }
    });
  } else {
    const auto all = make_scratch<T>(tasks * 2 * units);
    for_each_task(tasks, workers, [&](int64_t task, int64_t worker) {
      sums.sum(task / parts, task % parts, parts, &all[task * 2 * units],
               &room[worker * room_a_unit * units], &copies[worker * copies_size]);
    });
    T *total = sets.get(), *lost = room.get(), *lost_sums = lost + 3 * units;
    std::fill_n(total, 3 * units, T{0});
    std::fill_n(lost, 3 * units, T{0});
    for (int64_t example = 0; example < examples; ++example) {
      T* own = &all[example * parts * 2 * units];
      std::fill_n(lost_sums, 2 * units, T{0});
      for (int64_t part = 1; part < parts; ++part) {
        sums.add(own + part * 2 * units, own, lost_sums);
      }
      sums.multiply(own, total, lost);
    }
  }
  const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta), 1 + a.bias};
  for (int64_t unit = 0; unit < units; ++unit) {
    store_unit(store, TileSums<T>{&sets[unit], 1, chunks, set_size}, units, unit, out);
  }
}

}  // namespace

bool feature_norm_gram(const Tensor& x, const Tensor& gradient, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& segments, int64_t num_segments, double eps,
                       bool center, bool bias, double alpha, double beta, Result& out) {
  if (!norm_inputs_pass(x, gradient, eps)) return false;
  if (mask && !same_shape(*mask, x, x.dim() - 1)) return false;
  if (!segments_pass(x, segments, num_segments)) return false;
  const Arguments a{x, gradient, mask, segments, num_segments, eps, center, bias};
  if (!tensors_pass({&x, &gradient}, mask, segments, out, {a.units(), 1 + bias, 1 + bias})) {
    return false;
  }
  for_dtype(x, [&]<typename In, typename T>() {
    feature_norm_gram_of<In, T>(a, alpha, beta, static_cast<T*>(out.data()));
  });
  return true;
}

}  // namespace kfac_fast
