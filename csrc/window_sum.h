#pragma once
// The sums of every example's patches over the output positions:
//
//   sums[n][c][k] = Σ_o patch[n, o][c][k]
//
// Tap k reads a pixel as often as the product of the axes' weights says. So the pixels are summed
// by cells, which all pixels that the same taps read equally often make up, in one pass; the few
// cells then give all taps.

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "conv_plan.h"
#include "gram_layout.h"
#include "image_source.h"
#include "tile_product.h"

namespace kfac_fast {

// The plan of a geometry, of inputs with any strides; "outer" stands for the axes z and y together.
template <typename T>
struct SumPlan {
  struct Rows {  // evenly spaced rows of one cell
    int64_t z, y, count, step, cell;
    bool first;  // of its cell
  };
  struct Pixels {  // evenly spaced pixels of one cell
    int64_t begin, count, step, cell;
    bool first;  // of its cell
  };
  struct Square {  // neighbouring blocks of pixels that the same taps read
    int64_t block, blocks;
    std::vector<Pixels> pixels;  // of the blocks' sum
  };
  struct Term {
    int64_t cell;
    T weight;
  };
  struct Window {  // neighbouring cells, each counted once
    int64_t first, last;
    bool operator==(const Window&) const = default;
  };
  struct Taps {  // along x, or across it
    int64_t cells;
    std::vector<std::vector<Term>> terms;  // of every tap
    std::vector<Window> windows;           // of every tap, if all of them hold the cell `middle`
    int64_t middle;
  };

  int64_t width;          // pixels along x
  int64_t block, blocks;  // pixels that are loaded together, and how often
  int64_t cells, outer_cells;
  int64_t taps, outer_taps;
  Taps along_x, across;
  std::vector<Rows> rows;
  std::vector<Pixels> columns;
  std::vector<Square> squares;

  // Whether along x and across it the first tap reads the first two of three cells, the second
  // all, and the third the last two: a 3 x 3 kernel over a frame of one pixel.
  bool is_three_by_three;

  // Whether along x the first pixel and the last one are cells of their own, and all between them
  // one cell, of not too many blocks to add up in one chain.
  bool is_framed;

  // Whether such a frame is one block wide, and the rows of each cell, which all have some, are
  // added up in one chain.
  bool is_narrow;

  SumPlan(const Axes<SumAxis>& axes, int64_t pixels_a_block)
      : width(axes[2].size),
        block(pixels_a_block),
        blocks(divide_up(width, block)),
        cells(axes[2].cells),
        outer_cells(axes[0].cells * axes[1].cells),
        taps(axes[2].taps),
        outer_taps(axes[0].taps * axes[1].taps),
        along_x(list_taps(SumAxis(), axes[2])),
        across(list_taps(axes[0], axes[1])),
        columns(list_pixels(axes[2].cell_of)),
        is_three_by_three(slides(along_x) && slides(across)),
        is_framed(blocks <= chain && is_frame(axes[2])) {
    list_rows(axes[0], axes[1]);
    list_squares(axes[2]);
    is_narrow = is_framed && blocks == 1 && static_cast<int64_t>(rows.size()) == outer_cells;
  }

 private:
  // Rows, pixels or blocks of them that are added up in one chain, at most: less rounding.
  static constexpr int64_t chain = 32;

  void list_rows(const SumAxis& along_z, const SumAxis& along_y) {
    std::vector<bool> seen(outer_cells);
    const std::vector<SumAxis::Run> runs = SumAxis::runs(along_y.cell_of, chain);
    for (int64_t z = 0; z < along_z.size; ++z) {
      if (along_z.cell_of[z] < 0) continue;
      for (const SumAxis::Run& run : runs) {
        const int64_t cell = along_z.cell_of[z] * along_y.cells + run.cell;
        rows.push_back({z, run.begin, run.count, run.step, cell, !seen[cell]});
        seen[cell] = true;
      }
    }
  }

  std::vector<Pixels> list_pixels(std::span<const int64_t> cell_of) const {
    std::vector<bool> seen(cells);
    std::vector<Pixels> pixels;
    for (const SumAxis::Run& run : SumAxis::runs(cell_of, chain)) {
      pixels.push_back({run.begin, run.count, run.step, run.cell, !seen[run.cell]});
      seen[run.cell] = true;
    }
    return pixels;
  }

  void list_squares(const SumAxis& axis) {
    std::vector<bool> seen(cells);
    std::vector<int64_t> cell_of = axis.cell_of;
    cell_of.resize(blocks * block, -1);
    for (int64_t b = 0; b < blocks; ++b) {
      const auto begin = cell_of.begin() + b * block;
      const bool repeats = b > 0 && std::equal(begin, begin + block, begin - block);
      if (repeats && squares.back().blocks < chain) {
        ++squares.back().blocks;
        continue;
      }
      squares.push_back({b, 1, list_pixels({begin, begin + block})});
      for (Pixels& pixels : squares.back().pixels) {
        pixels.first &= !seen[pixels.cell];
        seen[pixels.cell] = true;
      }
    }
    std::erase_if(squares, [](const Square& square) { return square.pixels.empty(); });
  }

  static bool is_frame(const SumAxis& axis) {
    const std::vector<int64_t>& cell_of = axis.cell_of;
    return axis.size >= 3 && cell_of.front() == 0 && cell_of.back() == 2 &&
           std::all_of(cell_of.begin() + 1, cell_of.end() - 1, [](int64_t c) { return c == 1; });
  }

  static Taps list_taps(const SumAxis& outer, const SumAxis& inner) {
    Taps taps{outer.cells * inner.cells, {}, {}, 0};
    int64_t end = taps.cells;  // of the cells that all windows hold
    for (int64_t tap = 0; tap < outer.taps * inner.taps; ++tap) {
      std::vector<Term>& terms = taps.terms.emplace_back();
      bool once = true;
      for (int64_t cell = 0; cell < taps.cells; ++cell) {
        const int64_t weight = outer.weight(tap / inner.taps, cell / inner.cells) *
                               inner.weight(tap % inner.taps, cell % inner.cells);
        if (weight != 0) terms.push_back({cell, static_cast<T>(weight)});
        once &= weight <= 1;
      }
      if (!once || terms.empty()) continue;
      const Window window{terms.front().cell, terms.back().cell};
      if (window.last - window.first + 1 != static_cast<int64_t>(terms.size())) continue;
      taps.windows.push_back(window);
      taps.middle = std::max(taps.middle, window.first);
      end = std::min(end, window.last + 1);
    }
    if (taps.windows.size() < taps.terms.size() || taps.middle >= end) taps.windows.clear();
    return taps;
  }

  static bool slides(const Taps& taps) {
    return taps.cells == 3 && taps.windows == std::vector<Window>{{0, 1}, {0, 2}, {1, 2}};
  }
};

// Some channels of one example and one group.
template <typename In>
struct Channels {
  const In* data;
  const In* end;  // of the input's memory
  int64_t count;
  int64_t stride;
  std::array<int64_t, spatial_axes> strides;  // of a channel's pixels
  int64_t reach;  // elements from a channel's first to the end of its last row's blocks

  template <typename Rows>
  int64_t offset(const Rows& rows) const {
    return rows.z * strides[0] + rows.y * strides[1];
  }
};

// Vectors of neighbouring channels that are summed together.
constexpr int64_t channel_vectors = 4;

#define KFAC_FAST_BODY "window_sum_body.h"
#include "compile_for_instruction_sets.h"

template <typename In, typename T>
struct WindowSumFunctions {
  using Function = void (*)(const SumPlan<T>& plan, const Channels<In>& channels, T alpha, T beta,
                            T* scratch, T* target);
  int64_t lanes;
  Function of_planes, of_pixels;
};

template <typename In, typename T>
WindowSumFunctions<In, T> window_sum_functions(InstructionSet set) {
  constexpr int64_t size = sizeof(T);
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) {
    return {64 / size, avx512::sum_planes<In, T>, avx512::sum_pixels<In, T>};
  }
  if (set == InstructionSet::avx2) {
    return {32 / size, avx2::sum_planes<In, T>, avx2::sum_pixels<In, T>};
  }
#endif
  return {16 / size, portable::sum_planes<In, T>, portable::sum_pixels<In, T>};
}

// A geometry's plans, each made when an instruction set first asks for it.
template <typename T>
class SumPlans {
 public:
  explicit SumPlans(const Axes<SumAxis>& axes) : axes_(axes) {}

  const SumPlan<T>& of(InstructionSet set) {
    return set == InstructionSet::portable ? short_.get(axes_, 16) : long_.get(axes_, 32);
  }

 private:
  struct Made {
    std::once_flag once;
    std::optional<SumPlan<T>> plan;

    const SumPlan<T>& get(const Axes<SumAxis>& axes, int64_t bytes_a_block) {
      std::call_once(once, [&] { plan.emplace(axes, bytes_a_block / sizeof(T)); });
      return *plan;
    }
  };
  const Axes<SumAxis>& axes_;
  Made short_, long_;
};

// out[n][channel · taps + tap] <- beta · out + alpha · sum, after each group's sums one entry more,
// which the number of positions goes to, if there is a bias.
template <typename T>
struct WindowSumTarget {
  T* out;
  int64_t groups;
  bool bias;
  T alpha;
  T beta;  // 0: the target is not read
  T positions;
};

template <typename In, typename T>
class WindowSum {
 public:
  WindowSum(const ImageSource<In>& source, const Axes<SumAxis>& axes, const SumPlan<T>& plan,
            InstructionSet set, const WindowSumTarget<T>& target)
      : source_(source),
        functions_(window_sum_functions<In, T>(set)),
        plan_(plan),
        target_(target),
        // Where no entry for a bias comes between, groups are channels side by side.
        groups_(target.bias ? target.groups : 1),
        end_(source.end({axes[0].size, axes[1].size, axes[2].size})),
        reach_((axes[0].size - 1) * source.strides[0] + (axes[1].size - 1) * source.strides[1] +
               plan_.blocks * plan_.block),
        channels_a_group_(source.channels / groups_) {
    constexpr int64_t pixels_a_task = 1 << 14;
    const int64_t pixels = std::max<int64_t>(axes[0].size * axes[1].size * axes[2].size, 1);
    const int64_t few = round_up(divide_up(pixels_a_task, pixels), functions_.lanes);
    channels_a_task_ = std::max<int64_t>(std::min(channels_a_group_, few), 1);
    tasks_a_group_ = std::max<int64_t>(divide_up(channels_a_group_, channels_a_task_), 1);
  }

  int64_t tasks() const { return source_.examples * groups_ * tasks_a_group_; }

  // Each of an example's tasks takes the next so many, the last one what is left, if no bias parts
  // the groups.
  int64_t channels_a_task() const { return channels_a_task_; }

  int64_t scratch_size() const {
    const int64_t lanes = functions_.lanes;
    const int64_t cells = 2 * channel_vectors * plan_.outer_cells * plan_.cells;  // and lost parts
    const int64_t chains = channel_vectors * static_cast<int64_t>(plan_.columns.size());
    const int64_t taps = round_up(plan_.outer_taps * plan_.taps, lanes);
    const int64_t vectors = cells + plan_.outer_cells * plan_.taps + taps + chains;
    return lanes * (vectors + plan_.outer_cells * plan_.blocks * plan_.block);
  }

  // Some channels of one example.
  void run(int64_t task, T* scratch) const {
    const int64_t example = task / tasks_a_group_ / groups_;
    const int64_t group = task / tasks_a_group_ % groups_;
    const int64_t first = task % tasks_a_group_ * channels_a_task_;
    const int64_t count = std::min(channels_a_task_, channels_a_group_ - first);
    const Channels<In> channels{source_.at(example, group * channels_a_group_ + first),
                                end_,
                                count,
                                source_.channel_stride,
                                source_.strides,
                                reach_};
    const int64_t taps = plan_.outer_taps * plan_.taps;
    const int64_t width = channels_a_group_ * taps + target_.bias;
    T* row = target_.out + (example * groups_ + group) * width;
    const bool neighbours = source_.channel_stride == 1 && source_.strides[2] != 1;
    const auto sum = neighbours ? functions_.of_pixels : functions_.of_planes;
    sum(plan_, channels, target_.alpha, target_.beta, scratch, row + first * taps);
    if (target_.bias && first == 0) {
      T& entry = row[width - 1];
      const T value = target_.alpha * target_.positions;
      entry = target_.beta == 0 ? value : value + target_.beta * entry;
    }
  }

 private:
  const ImageSource<In>& source_;
  const WindowSumFunctions<In, T> functions_;
  const SumPlan<T>& plan_;
  const WindowSumTarget<T> target_;
  const int64_t groups_;
  const In* const end_;
  const int64_t reach_;
  const int64_t channels_a_group_;
  int64_t channels_a_task_, tasks_a_group_;
};

}  // namespace kfac_fast
