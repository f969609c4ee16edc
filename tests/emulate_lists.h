#pragma once
// What the emulated kernels on lists of matrices share.

#include <algorithm>
#include <cstdint>
#include <vector>

// What a plan made of a list; bytes < 0 if something was written beyond the workspace.
struct Launches {
  int64_t table_rows, launches, thread_blocks, bytes;
};

// Runs the launches of a plan, whose results follow its workspace.
template <typename Plan, typename... Results>
Launches run_plan(Plan& plan, bool descending, Results... results) {
  constexpr int64_t beyond = 1 << 12;
  Launches launches{plan.table_rows(), 0, 0, plan.workspace_size()};
  std::vector<char> workspace(launches.bytes + beyond, ~char{0});  // NaN
  plan.run(workspace.data(), results..., [&](auto kernel, int blocks, const auto&... arguments) {
    const dim3 grid{static_cast<unsigned>(blocks)};
    ++launches.launches, launches.thread_blocks += blocks;
    Emulator::instance().run(grid, {kfac_fast::kTaskThreads}, descending,
                             [&] { kernel(arguments...); });
  });
  const bool inside = std::all_of(workspace.end() - beyond, workspace.end(),
                                  [](char byte) { return byte == ~char{0}; });
  if (!inside) launches.bytes = -1;
  return launches;
}
