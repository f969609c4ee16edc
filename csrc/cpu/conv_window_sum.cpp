// Window sums of a convolution's input on the CPU, and the Gram matrix of their means; see
// window_sum.h and block_gram.h.

#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "block_gram.h"
#include "checks.h"
#include "operators.h"
#include "parallel.h"
#include "window_sum.h"

namespace kfac_fast {
namespace {

class Convolution {
 public:
  const int64_t groups, outputs;
  const Axes<SumAxis> axes;

  Convolution(const std::vector<int64_t>& plan, const std::vector<int64_t>& sizes, int64_t groups)
      : Convolution(PlanNumbers(plan.data()), static_cast<int64_t>(sizes.size()), groups) {}

  template <typename T>
  const SumPlan<T>& plan(InstructionSet set) {
    return std::get<SumPlans<T>>(plans_).of(set);
  }

  int64_t taps() const { return axes[0].taps * axes[1].taps * axes[2].taps; }
  int64_t width(const Tensor& x, bool bias) const { return x.size(1) / groups * taps() + bias; }

 private:
  Convolution(PlanNumbers numbers, int64_t dims, int64_t groups)
      : groups(groups),
        outputs(numbers.next()),
        axes(read_axes<SumAxis>(numbers, dims)),
        plans_(axes, axes) {}

  std::tuple<SumPlans<float>, SumPlans<double>> plans_;
};

// Reading a pixel takes the time of some multiply-adds of a product, a plane that of some more.
template <typename In>
double sum_work(const ImageSource<In>& source, const Axes<SumAxis>& axes) {
  double pixels = 10;
  for (const SumAxis& axis : axes) pixels *= axis.size;
  return (pixels + 200) * static_cast<double>(source.examples * source.channels);
}

template <typename In, typename T>
void sum_windows(const WindowSum<In, T>& sum, double work) {
  const int64_t workers = worker_count(sum.tasks(), work);
  const auto scratch = make_scratch<T>(workers * sum.scratch_size());
  for_each_independent_task(sum.tasks(), workers, [&](int64_t task, int64_t worker) {
    sum.run(task, &scratch[worker * sum.scratch_size()]);
  });
}

// The means of some examples for every group, and their Gram matrix: of few examples, some groups
// at a time, while their means are near.
template <typename In, typename T>
class MeanGram {
 public:
  MeanGram(const ImageSource<In>& source, Convolution& convolution, bool bias,
           const SymmetricStore<T>& store, T* means, T* out)
      : source_(source),
        groups_(convolution.groups),
        columns_(source.channels * convolution.taps()),
        bias_(bias),
        store_(store),
        few_(store.set, store, columns_ / groups_, bias),
        work_(sum_work(source, convolution.axes)),
        means_(means),
        sum_(source, convolution.axes, convolution.plan<T>(store.set), store.set,
             {means, groups_, false, T{1} / static_cast<T>(convolution.outputs), 0, 0}),
        out_(out) {}

  void run() const {
    constexpr int64_t enough_parts = 12;  // that threads have some each
    // Tasks of neighbouring channels share cache lines, and so follow each other.
    const bool neighbours = source_.channel_stride == 1;
    const int64_t together = std::lcm(source_.channels / groups_, sum_.channels_a_task());
    const bool enough = source_.channels >= enough_parts * together;
    if (few_.serves(source_.examples))
      return enough && !neighbours ? by_parts(together) : at_once();
    sum_windows(sum_, work_);
    const RowSource<T> rows(means_, 1, nullptr, {{source_.examples, columns_, 0}});
    gram_of_rows(rows, columns_, groups_, store_, bias_, out_);
  }

 private:
  // Parts of so many channels, which neither a group nor a task of sums crosses.
  void by_parts(int64_t channels) const {
    const int64_t parts = divide_up(source_.channels, channels);
    const int64_t groups_a_part = channels / (source_.channels / groups_);
    const int64_t sums = divide_up(source_.channels, sum_.channels_a_task());
    const int64_t sums_a_part = channels / sum_.channels_a_task();
    const int64_t workers = worker_count(parts, work_ + products());
    const auto scratch = make_scratch<T>(workers * scratch_size());
    for_each_independent_task(parts, workers, [&](int64_t part, int64_t worker) {
      T* own = &scratch[worker * scratch_size()];
      const int64_t last_sum = std::min((part + 1) * sums_a_part, sums);
      for (int64_t example = 0; example < source_.examples; ++example) {
        for (int64_t i = part * sums_a_part; i < last_sum; ++i) sum_.run(example * sums + i, own);
      }
      const int64_t last_group = std::min((part + 1) * groups_a_part, groups_);
      for (int64_t group = part * groups_a_part; group < last_group; ++group) {
        for (int64_t i = 0; i < few_.parts(); ++i) multiply(group, i, own);
      }
    });
  }

  // All means, then all products.
  void at_once() const {
    const int64_t parts = few_.parts(), tasks = groups_ * parts;
    const int64_t workers = worker_count(std::max(sum_.tasks(), tasks), work_ + products());
    const auto scratch = make_scratch<T>(workers * scratch_size());
    const auto own = [&](int64_t worker) { return &scratch[worker * scratch_size()]; };
    for_each_task_after(
        sum_.tasks(), tasks, workers,
        [&](int64_t task, int64_t worker) { sum_.run(task, own(worker)); },
        [&](int64_t task, int64_t worker) { multiply(task / parts, task % parts, own(worker)); });
  }

  // The means are read in place: a row's last lanes, which are not used, may be another part's.
  void multiply(int64_t group, int64_t part, T* scratch) const {
    const Panels<T> panels{means_ + group * (columns_ / groups_), source_.examples, columns_,
                           few_.panel_width(), few_.panel_width()};
    few_.multiply(panels, part, out_ + group * store_.edge * store_.edge, scratch);
  }

  double products() const {
    return products_of(source_.examples) * static_cast<double>(columns_) * (columns_ / groups_);
  }
  int64_t scratch_size() const { return std::max(sum_.scratch_size(), few_.scratch_size()); }

  const ImageSource<In>& source_;
  const int64_t groups_, columns_;
  const bool bias_;
  const SymmetricStore<T>& store_;
  const FewRows<T> few_;
  const double work_;
  T* const means_;
  const WindowSum<In, T> sum_;
  T* const out_;
};

template <typename In, typename T>
void reduce_gram_of(const Tensor& x, Convolution& convolution, bool bias, double alpha, double beta,
                    T* out) {
  const int64_t examples = x.size(0), groups = convolution.groups;
  const int64_t columns = x.size(1) * convolution.taps();
  const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta),
                                columns / groups + bias};
  const SymmetricStore<T> rest{store.alpha, T{1}, store.edge};  // added to the first chunk's
  if (columns > 0) {
    // The means of some examples at a time: those of tiny images outweigh the input. With their
    // panels they take up to three times their own memory.
    constexpr int64_t fewest = 256, most_bytes = 4 << 20;
    const auto size = static_cast<int64_t>(sizeof(T));
    const int64_t input = x.numel() * static_cast<int64_t>(sizeof(In));
    const int64_t result = columns * (columns / groups) * size;
    const int64_t fitting = most_scratch_bytes(input, result) / (3 * columns * size);
    const int64_t wanted = std::min(std::max(fewest, most_bytes / (columns * size)), fitting);
    const int64_t chunk = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(examples, 1));
    constexpr int64_t reach = 64 / sizeof(T);  // of a vector beyond the last row's end
    const auto means = make_scratch<T>(chunk * columns + reach);
    ImageSource<In> source = image_of<In>(x);
    for (int64_t first = 0; first == 0 || first < examples; first += chunk) {
      source.examples = std::min(chunk, examples - first);
      MeanGram(source, convolution, bias, first == 0 ? store : rest, means.get(), out).run();
      source.data += chunk * source.example_stride;
    }
  }
  if (bias) store_count(store, examples, groups, out);
}

}  // namespace

ConvKernel conv_window_sum(const std::vector<int64_t>& plan, const std::vector<int64_t>& sizes,
                           int64_t groups) {
  const auto convolution = std::make_shared<Convolution>(plan, sizes, groups);
  return [=](const Tensor& x, bool bias, double alpha, double beta, Result& out) {
    if (!images_pass(x, sizes, groups)) return false;
    const Sizes rows = stack_of_rows(x.size(0), groups, convolution->width(x, bias));
    if (!tensors_pass({&x}, {}, {}, out, rows)) return false;
    for_dtype(x, [&]<typename In, typename T>() {
      const InstructionSet set = instruction_set_in_use();
      const ImageSource<In> source = image_of<In>(x);
      const WindowSumTarget<T> target{static_cast<T*>(out.data()),
                                      groups,
                                      bias,
                                      static_cast<T>(alpha),
                                      static_cast<T>(beta),
                                      static_cast<T>(convolution->outputs)};
      const WindowSum<In, T> sum(source, convolution->axes, convolution->plan<T>(set), set, target);
      sum_windows(sum, sum_work(source, convolution->axes));
    });
    return true;
  };
}

ConvKernel conv_reduce_gram(const std::vector<int64_t>& plan, const std::vector<int64_t>& sizes,
                            int64_t groups) {
  const auto convolution = std::make_shared<Convolution>(plan, sizes, groups);
  return [=](const Tensor& x, bool bias, double alpha, double beta, Result& out) {
    if (!images_pass(x, sizes, groups)) return false;
    const Sizes squares = stack_of_squares(groups, convolution->width(x, bias));
    if (!tensors_pass({&x}, {}, {}, out, squares)) return false;
    for_dtype(x, [&]<typename In, typename T>() {
      reduce_gram_of<In, T>(x, *convolution, bias, alpha, beta, static_cast<T*>(out.data()));
    });
    return true;
  };
}

}  // namespace kfac_fast
