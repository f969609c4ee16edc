// The importable module kfac_fast._C: the operators on the CPU, the facts of the build and the
// choice of instruction set. Loading it also registers the CUDA kernels with the dispatcher.
#include <pybind11/pybind11.h>

#include "instruction_set.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace {

// The oldest torch the stable ABI in use serves: 0x020b... is 2.11.
std::string torch_target() {
  return std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
}

py::tuple instruction_sets() {
  py::list names;
  for (const std::string& name : kfac_fast::instruction_sets()) names.append(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of kfac_fast; import torch first.";
  module.attr("version") = KFAC_FAST_VERSION;
  module.attr("compiler") = KFAC_FAST_COMPILER;
  module.attr("cxx_standard") = __cplusplus;
  module.attr("torch_target") = torch_target();
  module.attr("cuda_archs") = KFAC_FAST_CUDA_ARCHS;
  module.def("instruction_set", &kfac_fast::instruction_set,
             "Name of the instruction set that the CPU kernels use.");
  module.def("instruction_sets", &instruction_sets,
             "Names of the instruction sets that this processor has kernels for.");
  module.def("use_instruction_set", &kfac_fast::use_instruction_set, py::arg("name"),
             "Make the CPU kernels use another instruction set; for tests and benchmarks.");
  kfac_fast::bind_operators(module);
}
