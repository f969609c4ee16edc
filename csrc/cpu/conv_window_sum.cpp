// Window sums of a convolution's input on the CPU, and the Gram matrix of their means; see
// window_sum.h and block_gram.h.

#include <memory>
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

template <typename In, typename T>
void sum_windows(const ImageSource<In>& source, Convolution& convolution,
                 const WindowSumTarget<T>& target) {
  const InstructionSet set = instruction_set_in_use();
  const WindowSum<In, T> sum(source, convolution.axes, convolution.plan<T>(set), set, target);
  // Reading a pixel takes the time of some multiply-adds of a product, a plane that of some more.
  double pixels = 10;
  for (const SumAxis& axis : convolution.axes) pixels *= axis.size;
  const double work = (pixels + 200) * source.examples * source.channels;
  const int64_t workers = worker_count(sum.tasks(), work);
  const auto scratch = make_scratch<T>(workers * sum.scratch_size());
  for_each_independent_task(sum.tasks(), workers, [&](int64_t task, int64_t worker) {
    sum.run(task, &scratch[worker * sum.scratch_size()]);
  });
}

template <typename In, typename T>
void reduce_gram_of(const Tensor& x, Convolution& convolution, bool bias, double alpha, double beta,
                    T* out) {
  const int64_t examples = x.size(0), groups = convolution.groups;
  const int64_t columns = x.size(1) * convolution.taps();
  const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta),
                                columns / groups + bias};
  const SymmetricStore<T> rest{store.alpha, T{1}, store.edge};  // added to the first chunk's
  if (columns > 0) {
    // The means of some examples at a time: those of tiny images outweigh the input.
    constexpr int64_t fewest = 256, most_bytes = 4 << 20;
    const int64_t most = most_bytes / (columns * static_cast<int64_t>(sizeof(T)));
    const int64_t chunk =
        std::clamp<int64_t>(std::max(fewest, most), 1, std::max<int64_t>(examples, 1));
    const auto means = make_scratch<T>(chunk * columns);
    const T scale = T{1} / static_cast<T>(convolution.outputs);
    ImageSource<In> source = image_of<In>(x);
    for (int64_t first = 0; first == 0 || first < examples; first += chunk) {
      source.examples = std::min(chunk, examples - first);
      sum_windows<In, T>(source, convolution, {means.get(), groups, false, scale, 0, 0});
      const RowSource<T> rows(means.get(), 1, nullptr, {{source.examples, columns, 0}});
      gram_of_rows(rows, columns, groups, first == 0 ? store : rest, bias, out);
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
      sum_windows<In, T>(image_of<In>(x), *convolution,
                         {static_cast<T*>(out.data()), groups, bias, static_cast<T>(alpha),
                          static_cast<T>(beta), static_cast<T>(convolution->outputs)});
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
