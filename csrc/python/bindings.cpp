// The CPU's operators as functions of the module kfac_fast._C. Each takes the arguments of
// kfac_fast/schema.py and checks them. Where they are not plain (python_tensor.h) or the operator
// refuses them, it returns None and has written nothing. Otherwise an operator that accumulates
// returns its result, a new tensor if None is given for it, and one on lists returns True or, if it
// makes it, info.

#include "bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "../cpu/checks.h"
#include "../cpu/operators.h"
#include "conv_calls.h"
#include "fast_function.h"
#include "python_tensor.h"
#include "quick_calls.h"

namespace kfac_fast {
namespace {

template <typename Function>
py::object fast_function(const std::string& name, Function function) {
  return FastFunction<Function>::make(name, std::move(function));
}

using Integer = Exactly<int64_t>;
using Flag = Exactly<bool>;
using Text = Exactly<std::string>;

// Runs a kernel apart from the interpreter's lock.
template <typename Kernel>
bool run(const Kernel& kernel) {
  const py::gil_scoped_release release;
  return kernel();
}

// The same and, if it ran, tells autograd what it wrote.
template <typename Kernel>
bool run(const py::list& written, const Kernel& kernel) {
  const bool done = run(kernel);
  if (done) Torch::get().increment_versions(written);
  return done;
}

py::list objects(const std::vector<Output>& outputs) {
  py::list list;
  for (const Output& output : outputs) list.append(py::handle(output.object));
  return list;
}

void append(py::list& list, const Output& output) { list.append(py::handle(output.object)); }

std::vector<Tensor> tensors(const std::vector<Output>& outputs) {
  return {outputs.begin(), outputs.end()};
}

// The result of an accumulating kernel: `out`, or a new tensor; None if it refuses.
template <typename Kernel>
py::object accumulate(Number beta, const std::optional<Output>& out, const Kernel& kernel) {
  if (out) {
    Result result(*out);
    if (!run(objects({*out}), [&] { return kernel(result); })) return py::none();
    return py::reinterpret_borrow<py::object>(out->object);
  }
  if (beta.value != 0) return py::none();
  py::object made;
  Result result([&](const Sizes& sizes, ScalarType type) {
    const py::gil_scoped_acquire lock;
    made = Torch::get().empty(sizes, type);
    return Torch::get().view(made);  // empty if a transform of torch.func has wrapped it
  });
  if (!run([&] { return kernel(result); })) return py::none();
  return made;
}

py::object call_gram(const Tensor& x, const std::optional<Tensor>& mask, Integer groups, Flag bias,
                     Number alpha, Number beta, const std::optional<Output>& out) {
  return accumulate(beta, out, [&](Result& result) {
    return gram(x, mask, groups.value, bias.value, alpha.value, beta.value, result);
  });
}

py::object call_shared_gram(const Tensor& x, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& segments, Integer num_segments,
                            Text reduction, Integer groups, Flag bias, Number alpha, Number beta,
                            const std::optional<Output>& out) {
  return accumulate(beta, out, [&](Result& result) {
    return shared_gram(x, mask, segments, num_segments.value, reduction.value, groups.value,
                       bias.value, alpha.value, beta.value, result);
  });
}

py::object call_feature_norm_gram(const Tensor& x, const Tensor& gradient,
                                  const std::optional<Tensor>& mask,
                                  const std::optional<Tensor>& segments, Integer num_segments,
                                  Number eps, Flag center, Flag bias, Number alpha, Number beta,
                                  const std::optional<Output>& out) {
  return accumulate(beta, out, [&](Result& result) {
    return feature_norm_gram(x, gradient, mask, segments, num_segments.value, eps.value,
                             center.value, bias.value, alpha.value, beta.value, result);
  });
}

py::object call_channel_norm_gram(const Tensor& x, const Tensor& gradient,
                                  const std::optional<Tensor>& mean,
                                  const std::optional<Tensor>& variance, Integer num_groups,
                                  Number eps, Flag bias, Number alpha, Number beta,
                                  const std::optional<Output>& out) {
  return accumulate(beta, out, [&](Result& result) {
    return channel_norm_gram(x, gradient, mean, variance, num_groups.value, eps.value, bias.value,
                             alpha.value, beta.value, result);
  });
}

py::object call_conv_kernel(const ConvKernel& kernel, const Tensor& x, Flag bias, Number alpha,
                            Number beta, const std::optional<Output>& out) {
  return accumulate(beta, out, [&](Result& result) {
    return kernel(x, bias.value, alpha.value, beta.value, result);
  });
}

py::object true_or_none(bool done) { return done ? py::object(py::bool_(true)) : py::none(); }

py::object call_mean_eigenvalues(const std::vector<Tensor>& matrices, const Output& out) {
  return true_or_none(run(objects({out}), [&] { return mean_eigenvalues(matrices, out); }));
}

py::object call_update_averages(const std::vector<Tensor>& sums, const std::vector<Number>& terms,
                                Number decay, Flag covariances, const std::vector<Output>& out,
                                const std::vector<Output>& weights,
                                const std::vector<Output>& skipped) {
  py::list written = objects(out);
  for (const auto* outputs : {&weights, &skipped}) {
    for (const Output& output : *outputs) append(written, output);
  }
  std::vector<double> numbers;
  for (const Number& number : terms) numbers.push_back(number.value);
  return true_or_none(run(written, [&] {
    return update_averages(sums, numbers, decay.value, covariances.value, tensors(out),
                           tensors(weights), tensors(skipped));
  }));
}

py::object call_eigh(const std::vector<Tensor>& matrices, const std::vector<Output>& values,
                     const std::vector<Output>& vectors, const Output& info) {
  py::list written = objects(values);
  for (const Output& output : vectors) append(written, output);
  append(written, info);
  return true_or_none(
      run(written, [&] { return eigh(matrices, tensors(values), tensors(vectors), info); }));
}

// Returns `info` if it is made here, which is so if it is None.
template <decltype(damped_inverse)& op>
py::object call_damped(const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
                       const std::vector<Output>& out, const std::optional<Output>& info,
                       const std::optional<Output>& logdet) {
  py::list written = objects(out);
  std::optional<Tensor> infos, logdets;
  py::object made;
  if (info) {
    append(written, *info);
    infos = *info;
  } else {
    int64_t count = 0;
    for (const Tensor& stack : matrices) count += stack_size(stack, stack.dim() - 2);
    made = Torch::get().empty({count}, ScalarType::Int);
    infos = Torch::get().view(made);  // empty if a transform of torch.func has wrapped it
    if (!infos) return py::none();
  }
  if (logdet) {
    append(written, *logdet);
    logdets = *logdet;
  }
  const bool done =
      run(written, [&] { return op(matrices, damping, tensors(out), *infos, logdets); });
  return done && made ? made : true_or_none(done);
}

template <decltype(precondition)& op>
py::object call_precondition(const std::vector<Tensor>& grads,
                             const std::vector<Tensor>& input_sides,
                             const std::vector<Tensor>& gradient_sides,
                             const std::vector<Output>& out, const Output& inner) {
  py::list written = objects(out);
  append(written, inner);
  return true_or_none(
      run(written, [&] { return op(grads, input_sides, gradient_sides, tensors(out), inner); }));
}

ConvKernel make_conv_kernel(const std::string& name, const std::vector<int64_t>& plan,
                            const std::vector<int64_t>& sizes, int64_t groups) {
  if (name == "conv_offset_gram") return conv_offset_gram(plan, sizes, groups);
  if (name == "conv_patch_gram") return conv_patch_gram(plan, sizes, groups);
  if (name == "conv_reduce_gram") return conv_reduce_gram(plan, sizes, groups);
  if (name == "conv_window_sum") return conv_window_sum(plan, sizes, groups);
  throw py::value_error("ConvKernel: there is no kernel " + name);
}

// A convolution operator, which calls `plan` for every geometry that it has not met: see ConvCalls.
py::object conv_operator(const py::str& op, const py::object& plan) {
  return fast_function(
      op,
      [calls = ConvCalls(op, plan)](const Tensor& x, py::handle kernel_size, py::handle stride,
                                    py::handle padding, py::handle padding_mode,
                                    py::handle dilation, py::handle groups, py::handle transposed,
                                    py::handle output_padding, Flag bias, Number alpha, Number beta,
                                    const std::optional<Output>& out) mutable -> py::object {
        if (!is_floating(x.scalar_type())) return py::none();
        const auto kernel = calls.find(x, {kernel_size, stride, padding, padding_mode, dilation,
                                           groups, transposed, output_padding});
        if (!kernel) return py::none();
        return call_conv_kernel(*kernel, x, bias, alpha, beta, out);
      });
}

py::object quick_calls(py::dict kernels, QuickCalls::Objects listeners,
                       QuickCalls::Objects requests) {
  const QuickCalls calls(std::move(kernels), std::move(listeners), std::move(requests));
  return fast_function("quick_call", [calls](py::handle op, const py::tuple& args) -> py::object {
    return calls(op, args);
  });
}

}  // namespace

void bind_operators(py::module_& module) {
  const auto bind = [&](const char* name, const auto& function) {
    module.attr(name) = fast_function(name, function);
  };
  bind("gram", &call_gram);
  bind("shared_gram", &call_shared_gram);
  bind("feature_norm_gram", &call_feature_norm_gram);
  bind("channel_norm_gram", &call_channel_norm_gram);
  bind("mean_eigenvalues", &call_mean_eigenvalues);
  bind("update_averages", &call_update_averages);
  bind("eigh", &call_eigh);
  bind("damped_inverse", &call_damped<damped_inverse>);
  bind("damped_cholesky", &call_damped<damped_cholesky>);
  bind("precondition", &call_precondition<precondition>);
  bind("cholesky_precondition", &call_precondition<cholesky_precondition>);
  py::class_<ConvKernel, std::shared_ptr<ConvKernel>>(module, "ConvKernel")
      .def(py::init(&make_conv_kernel), py::arg("name"), py::arg("plan"), py::arg("sizes"),
           py::arg("groups"))
      .def("__call__", &call_conv_kernel)
      .def("__call__", [](const ConvKernel&, const py::args&) { return py::none(); });
  module.def("conv_operator", &conv_operator, py::arg("op"), py::arg("plan"));
  module.def("quick_calls", &quick_calls, py::arg("kernels"), py::arg("listeners"),
             py::arg("requests"));
}

}  // namespace kfac_fast
