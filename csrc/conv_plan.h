#pragma once
// The plans of kfac_fast/conv.py, read from their numbers. Each kernel sees three spatial axes; the
// ones that an input lacks come first and hold one pixel under one tap.

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace kfac_fast {

constexpr int spatial_axes = 3;
template <typename Axis>
using Axes = std::array<Axis, spatial_axes>;

class PlanNumbers {
 public:
  explicit PlanNumbers(const int64_t* numbers) : next_(numbers) {}

  int64_t next() { return *next_++; }
  std::vector<int64_t> next(int64_t count) {
    next_ += count;
    return {next_ - count, next_};
  }

 private:
  const int64_t* next_;
};

// One axis' line of pixels with its shifted self: what is multiplied for which pairs of taps.
struct OffsetAxis {
  struct Cell {
    int64_t first = 0, length = 1;
  };
  struct Shift {
    int64_t distance = 0, mirror = 0;
    std::vector<Cell> cells{{}};
  };
  struct Pair {  // cells [first, last) of a shift
    int64_t shift = 0, first = 0, last = 1;
  };

  std::vector<int64_t> line{0};
  int64_t taps = 1;
  std::vector<Shift> shifts{{}};
  std::vector<Pair> pairs{{}};

  OffsetAxis() = default;
  explicit OffsetAxis(PlanNumbers& numbers) {
    const int64_t pixels = numbers.next();
    taps = numbers.next();
    shifts.resize(numbers.next());
    line = numbers.next(pixels);
    for (Shift& shift : shifts) {
      shift.distance = numbers.next();
      shift.mirror = numbers.next();
      shift.cells.resize(numbers.next());
      for (Cell& cell : shift.cells) {
        cell.first = numbers.next();
        cell.length = numbers.next();
      }
    }
    pairs.resize(taps * taps);
    for (Pair& pair : pairs) {
      pair.shift = numbers.next();
      pair.first = numbers.next();
      pair.last = numbers.next();
    }
  }

  int64_t size() const { return static_cast<int64_t>(line.size()); }
};

// What each tap of an axis reads at each output position: a pixel, or -1 for a zero.
struct PatchAxis {
  int64_t taps = 1;
  int64_t outputs = 1;
  std::vector<int64_t> reads{0};
  std::vector<int64_t> ahead{1};  // from each read on, how many are of neighbouring pixels in order

  PatchAxis() = default;
  explicit PatchAxis(PlanNumbers& numbers)
      : taps(numbers.next()),
        outputs(numbers.next()),
        reads(numbers.next(taps * outputs)),
        ahead(reads.size()) {
    for (int64_t i = static_cast<int64_t>(reads.size()) - 1; i >= 0; --i) {
      if (reads[i] < 0) continue;
      const bool goes_on = (i + 1) % outputs != 0 && reads[i + 1] == reads[i] + 1;
      ahead[i] = 1 + (goes_on ? ahead[i + 1] : 0);
    }
  }

  int64_t pixel(int64_t tap, int64_t output) const { return reads[tap * outputs + output]; }
  // As far as they are read.
  int64_t pixels() const { return *std::max_element(reads.begin(), reads.end()) + 1; }
};

// Pixels of an axis that the same taps read equally often make a cell.
struct SumAxis {
  struct Run {  // evenly spaced pixels of one cell
    int64_t cell, begin, count, step;
  };

  int64_t size = 1;
  int64_t taps = 1;
  int64_t cells = 1;
  std::vector<int64_t> cell_of{0};  // each pixel's, or -1 of one that no tap reads
  std::vector<int64_t> weights{1};  // [taps][cells]

  SumAxis() = default;
  explicit SumAxis(PlanNumbers& numbers)
      : size(numbers.next()),
        taps(numbers.next()),
        cells(numbers.next()),
        cell_of(numbers.next(size)),
        weights(numbers.next(taps * cells)) {}

  int64_t weight(int64_t tap, int64_t cell) const { return weights[tap * cells + cell]; }

  // Pixels of these cells in runs of at most `longest`: neighbours, or of each of the cells that
  // strides or dilations interleave the nearest pixels.
  static std::vector<Run> runs(std::span<const int64_t> cell_of, int64_t longest) {
    constexpr int64_t widest_step = 16;
    const auto size = static_cast<int64_t>(cell_of.size());
    std::vector<bool> listed(size);
    std::vector<Run> runs;
    for (int64_t begin = 0; begin < size; ++begin) {
      const int64_t cell = cell_of[begin];
      if (cell < 0 || listed[begin]) continue;
      const auto is_free = [&](int64_t x) { return cell_of[x] == cell && !listed[x]; };
      const int64_t end = std::min(begin + widest_step + 1, size);
      int64_t step = 1;
      while (begin + step < end && !is_free(begin + step)) ++step;
      if (begin + step == end) step = 1;
      int64_t count = 0;
      for (int64_t x = begin; count < longest && x < size && is_free(x); x += step, ++count) {
        listed[x] = true;
      }
      runs.push_back({cell, begin, count, step});
    }
    return runs;
  }
};

// The axes of `dimensions` spatial dimensions.
template <typename Axis>
Axes<Axis> read_axes(PlanNumbers& numbers, int64_t dimensions) {
  Axes<Axis> axes;
  for (int64_t i = spatial_axes - dimensions; i < spatial_axes; ++i) axes[i] = Axis(numbers);
  return axes;
}

}  // namespace kfac_fast
