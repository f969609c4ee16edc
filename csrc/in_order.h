#pragma once

#include <cstdint>

namespace kfac_fast {

// A loop that one thread runs, where share(passes, multiply-adds, run) may give the passes to many.
struct InOrder {
  static constexpr bool is_parallel = false;

  template <typename Run>
  void operator()(int64_t passes, double, const Run& run) const {
    for (int64_t pass = 0; pass < passes; ++pass) run(pass);
  }
};

}  // namespace kfac_fast
