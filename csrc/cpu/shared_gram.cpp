// The Gram matrix of the sums or means of the rows of every example, or segment, on the CPU: one
// pass over the rows, then block_gram.h.

#include <optional>
#include <string>

#include "block_gram.h"
#include "checks.h"
#include "operators.h"
#include "parallel.h"
#include "row_sum.h"
#include "segments.h"

namespace kfac_fast {
namespace {

struct Arguments {
  const Tensor& x;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& segments;
  int64_t num_segments;
  bool mean;
  int64_t groups;
  bool bias;

  int64_t columns() const { return x.size(x.dim() - 1); }
  int64_t column_stride() const { return x.stride(x.dim() - 1); }
  int64_t width() const { return columns() / groups + bias; }  // of a group's reduced row
  int64_t examples() const { return segments ? num_segments : x.size(0); }

  // Whether a row of [R, D] counts.
  bool counts(int64_t row) const {
    return !mask || static_cast<const bool*>(mask->const_data_ptr())[row * mask->stride(0)];
  }
};

template <typename In, typename T>
class SharedSums {
 public:
  SharedSums(const Arguments& arguments, T* out)
      : a_(arguments),
        data_(static_cast<const In*>(a_.x.const_data_ptr())),
        rows_(rows_of<In>(a_.x, a_.mask)),
        positions_(rows_.rows() / std::max<int64_t>(a_.x.size(0), 1)),
        sum_(instruction_set_in_use(), a_.column_stride()),
        out_(out) {}

  void run() {
    std::optional<Segments> segments;
    if (a_.segments) segments.emplace(*a_.segments, a_.num_segments, "shared_gram");
    // Few examples leave threads without work, so their columns are shared out too; each is summed
    // in the same order however they are.
    constexpr int64_t narrowest = 128;
    const int64_t wanted =
        divide_up(2 * torch::stable::get_num_threads(), std::max<int64_t>(a_.examples(), 1));
    const int64_t widest = std::max<int64_t>(1, divide_up(a_.columns(), narrowest));
    const int64_t columns = divide_up(a_.columns(), std::min(wanted, widest));
    const int64_t parts = columns == 0 ? 1 : divide_up(a_.columns(), columns);
    // Many short examples are a task together; segments may be of any length.
    constexpr int64_t entries_a_task = 1 << 13;
    const int64_t examples = a_.examples();
    const int64_t size = std::max<int64_t>(a_.x.numel() / std::max<int64_t>(examples, 1), 1);
    const int64_t together = segments ? 1 : std::max<int64_t>(entries_a_task / size, 1);
    const int64_t tasks = divide_up(examples, together) * parts;
    constexpr double operations_an_entry = 16;  // that it takes to read one
    const int64_t workers = worker_count(tasks, operations_an_entry * a_.x.numel());
    const auto scratch = make_scratch<T>(workers * 3 * columns);
    for_each_independent_task(tasks, workers, [&](int64_t task, int64_t worker) {
      const int64_t begin = task / parts * together, first = task % parts * columns;
      const int64_t end = std::min(begin + together, examples);
      const int64_t count = std::min(columns, a_.columns() - first);
      T* total = &scratch[worker * 3 * columns];
      for (int64_t example = begin; example < end; ++example) {
        const int64_t terms = segments
                                  ? add_segment(*segments, example, first, count, columns, total)
                                  : add_example(example, first, count, columns, total);
        store(example, first, count, total, terms);
      }
    });
  }

 private:
  // Each returns the number of rows that count.
  int64_t add_example(int64_t example, int64_t first, int64_t columns, int64_t room,
                      T* total) const {
    const int64_t begin = example * positions_, end = begin + positions_;
    sum_(rows_, begin, end, first, columns, total, total + room, total + 2 * room);
    return rows_.counted(begin, end);
  }

  int64_t add_segment(const Segments& segments, int64_t segment, int64_t first, int64_t columns,
                      int64_t room, T* total) const {
    const int64_t begin = segments.begin[segment], end = segments.begin[segment + 1];
    const bool is_long = end - begin > sum_.rows_a_chain();  // as in RowSum
    T* chain = is_long ? total + room : total;
    T* lost = total + 2 * room;
    for (T* sums : {total, chain, lost}) std::fill_n(sums, columns, T{0});
    int64_t terms = 0, open = 0;  // rows of the chain
    const int64_t stride = a_.x.stride(0);
    for (int64_t i = begin, next; i < end; i = next) {
      // Rows of a segment mostly follow each other.
      const int64_t row = segments.rows[i];
      next = i + 1;
      if (!a_.counts(row)) continue;
      while (next < end && segments.rows[next] == row + next - i &&
             a_.counts(segments.rows[next])) {
        ++next;
      }
      const In* rows = data_ + row * stride + first * a_.column_stride();
      for (int64_t done = 0, count; done < next - i; done += count) {
        count = std::min(next - i - done, sum_.rows_a_chain() - open);
        sum_.add(rows + done * stride, stride, count, columns, chain);
        open += count;
        if (is_long && open == sum_.rows_a_chain()) {
          sum_.end_chain(chain, columns, total, lost);
          open = 0;
        }
      }
      terms += next - i;
    }
    if (is_long) sum_.end_chain(chain, columns, total, lost);
    return terms;
  }

  // The reduced row, each group's entries followed by that of a bias.
  void store(int64_t example, int64_t first, int64_t columns, const T* total, int64_t terms) const {
    const T scale = a_.mean && terms > 0 ? T{1} / static_cast<T>(terms) : T{1};
    const int64_t features = a_.columns() / a_.groups;
    T* row = out_ + example * a_.groups * a_.width();
    for (int64_t c = 0; c < columns;) {
      const int64_t group = a_.groups == 1 ? 0 : (first + c) / features;
      T* target = row + first + group * a_.bias;
      for (const int64_t end = std::min(columns, (group + 1) * features - first); c < end; ++c) {
        target[c] = scale * total[c];
      }
    }
    if (!a_.bias || first > 0) return;
    for (int64_t group = 0; group < a_.groups; ++group) {
      const int64_t ones = a_.mean ? std::min<int64_t>(terms, 1) : terms;
      row[(group + 1) * a_.width() - 1] = static_cast<T>(ones);
    }
  }

  const Arguments& a_;
  const In* const data_;
  const RowSource<In> rows_;
  const int64_t positions_;  // of an example
  const RowSum<In, T> sum_;
  T* const out_;
};

template <typename In, typename T>
void shared_gram_of(const Arguments& a, double alpha, double beta, T* out) {
  const int64_t columns = a.groups * a.width();
  if (columns == 0) return;
  const auto rows = make_scratch<T>(a.examples() * columns);
  SharedSums<In, T>(a, rows.get()).run();
  const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta), a.width()};
  const RowSource<T> source(rows.get(), 1, nullptr, {{a.examples(), columns, 0}});
  gram_of_rows(source, columns, a.groups, store, false, out);
}

}  // namespace

bool shared_gram(const Tensor& x, const std::optional<Tensor>& mask,
                 const std::optional<Tensor>& segments, int64_t num_segments,
                 const std::string& reduction, int64_t groups, bool bias, double alpha, double beta,
                 Result& out) {
  if (x.dim() < 2 || (reduction != "mean" && reduction != "sum")) return false;
  if (!segments_pass(x, segments, num_segments) || !rows_pass(x, mask, groups)) return false;
  const Arguments a{x, mask, segments, num_segments, reduction == "mean", groups, bias};
  if (!tensors_pass({&x}, mask, segments, out, stack_of_squares(groups, a.width()))) return false;
  for_dtype(x, [&]<typename In, typename T>() {
    shared_gram_of<In, T>(a, alpha, beta, static_cast<T*>(out.data()));
  });
  return true;
}

}  // namespace kfac_fast
