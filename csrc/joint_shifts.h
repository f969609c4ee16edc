#pragma once
// Shifts of a line that are multiplied together. Where a panel of channels is one vector wide, a
// tile of one shift would load more than it multiplies; the vectors of several make a full one:
//
//   left: pixel p     right: pixel p + d | pixel p + d + step | pixel p + d + 2 step

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "conv_plan.h"

namespace kfac_fast {

// The pixels [first, first + length) are multiplied with those `distance` further on for the first
// member, and `step` more for each next one.
struct JointShifts {
  struct Member {
    int64_t shift, cell;  // the one of its cells that holds these pixels
  };

  int64_t first, length;
  int64_t distance = 0, step = 0;
  std::vector<Member> members{};
};

// Those of shifts evenly apart, three at most: then all or any two of them are evenly apart. The
// line is cut where the cells of one of them begin or end.
inline void add_joints(const OffsetAxis& axis, const std::vector<int64_t>& shifts,
                       std::vector<JointShifts>& joints) {
  std::vector<int64_t> cuts;
  for (int64_t shift : shifts) {
    for (const auto& [first, length] : axis.shifts[shift].cells) {
      cuts.insert(cuts.end(), {first, first + length});
    }
  }
  std::sort(cuts.begin(), cuts.end());
  for (size_t cut = 1; cut < cuts.size(); ++cut) {
    JointShifts joint{cuts[cut - 1], cuts[cut] - cuts[cut - 1]};
    if (joint.length == 0) continue;
    for (int64_t shift : shifts) {
      const auto& cells = axis.shifts[shift].cells;
      const auto cell = std::find_if(cells.begin(), cells.end(), [&](const auto& c) {
        return c.first <= joint.first && joint.first < c.first + c.length;
      });
      if (cell == cells.end()) continue;
      const int64_t distance = axis.shifts[shift].distance;
      if (joint.members.empty()) joint.distance = distance;
      if (joint.members.size() == 1) joint.step = distance - joint.distance;
      joint.members.push_back({shift, cell - cells.begin()});
    }
    if (!joint.members.empty()) joints.push_back(std::move(joint));
  }
}

// All given shifts of an axis, up to `most` together.
inline std::vector<JointShifts> join_shifts(const OffsetAxis& axis,
                                            const std::vector<int64_t>& shifts, size_t most) {
  std::vector<JointShifts> joints;
  std::vector<int64_t> together;
  const auto step_to = [&](int64_t shift) {
    return axis.shifts[shift].distance - axis.shifts[together.back()].distance;
  };
  int64_t step = 0;
  for (int64_t shift : shifts) {
    if (together.size() == most || (together.size() > 1 && step_to(shift) != step)) {
      add_joints(axis, together, joints);
      together.clear();
    }
    if (together.size() == 1) step = step_to(shift);
    together.push_back(shift);
  }
  add_joints(axis, together, joints);
  return joints;
}

}  // namespace kfac_fast
