#pragma once

#include <pybind11/pybind11.h>

namespace kfac_fast {

void bind_operators(pybind11::module_& module);

}  // namespace kfac_fast
