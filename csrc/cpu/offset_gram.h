#pragma once
// The Gram matrix of all patches of a convolution by offset correlation (docs/math.md, section 3).
//
// The pixels are packed once, in the lines of the plan, all examples of a pixel side by side:
//
//   row ((z · Y + y) · X + x) · N + n   of a panel holds the channels of one pixel of one example
//
// so that the pixels which a tap reads along x are consecutive rows, a tap further on is the same
// rows shifted, and nothing is unfolded. A task multiplies one tile of channels: row by row of the
// images it goes through all shifts, whose operands then are in cache, and adds each product to the
// sums of its cell. The sums of a tile's cells become the entries of all pairs of taps at once.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_plan.h"
#include "gram_layout.h"
#include "image_source.h"
#include "joint_shifts.h"
#include "parallel.h"
#include "scratch.h"
#include "symmetric_store.h"
#include "tap_store.h"
#include "tile_product.h"
#include "transpose.h"

namespace kfac_fast {

template <typename In, typename T>
class OffsetGram {
 public:
  OffsetGram(const ImageSource<In>& source, const Axes<OffsetAxis>& axes, int64_t groups,
             InstructionSet set, const SymmetricStore<T>& store, bool bias, int64_t input_bytes,
             T* out)
      : source_(source),
        axes_(axes),
        input_bytes_(input_bytes),
        product_(tile_product<T>(set)),
        pack_(packing<In, T>(set)),
        layout_(source.channels, groups,
                even_panel_width(source.channels, groups, product_.panel_width(), product_.lanes),
                product_.lanes),
        tiles_(layout_.tiles(edge())),
        bias_(bias),
        store_(layout_, store, cells_, windows_, bias, out) {
    lay_out_pixels();
    lay_out_sums();
    list_operands();
    list_windows();
    list_joints();
  }

  void run() {
    choose_chunks();
    const int64_t rounds = chunks_ / chunks_a_round_;
    const int64_t sets = chunks_ == 1
                             ? std::min(worker_count(tile_count(), operations()), most_workers_)
                             : chunks_a_round_;
    const int64_t tiles_a_set = chunks_ == 1 ? 1 : tile_count();
    const auto packed = make_scratch<T>(divide_up(source_.examples, rounds) * image_size());
    const auto sums = make_scratch<T>(sets * tiles_a_set * sums_size_);
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t first = round * chunks_a_round_;
      const int64_t last = first + chunks_a_round_;
      pack_chunks(first, last, packed.get());
      const int64_t tasks = (last - first) * tile_count();
      const int64_t workers = chunks_ == 1 ? sets : worker_count(tasks, operations());
      for_each_task(tasks, workers, [&](int64_t task, int64_t worker) {
        const int64_t set = task % (last - first), tile = task / (last - first);
        const int64_t place = chunks_ == 1 ? worker : set * tile_count() + tile;
        T* own = &sums[place * sums_size_];
        if (round == 0) std::fill_n(own, sums_size_, T{0});
        const int64_t chunk = first + set;
        multiply(tiles_[tile], chunk, chunk_data(chunk, first, packed.get()), own);
        if (chunks_ == 1) store_.rows(tiles_[tile], own, 0, rows_of(tiles_[tile]));
      });
    }
    if (chunks_ > 1) add_sets_and_store(sums.get());
  }

 private:
  using Shift = OffsetAxis::Shift;
  static constexpr int64_t longest = 128;  // rows of a product, as in row_blocks.h

  // A row of the images, seen as the left operand of a pair of shifts along z and y.
  struct Operand {
    int64_t shift_z, shift_y;
    int64_t cell;   // of those along z and y
    int64_t right;  // the row that is the right operand
  };

  // Three shifts and what is multiplied for them.
  struct Triple {
    int64_t mirror;
    int64_t first_cell;
    bool still;  // no shift along any axis
  };

  static int64_t even_panel_width(int64_t channels, int64_t groups, int64_t widest, int64_t lanes) {
    const int64_t columns = GramLayout(channels, groups, widest, lanes).strip_columns;
    return round_up(divide_up(columns, divide_up(columns, widest)), lanes);
  }

  const OffsetAxis& z() const { return axes_[0]; }
  const OffsetAxis& y() const { return axes_[1]; }
  const OffsetAxis& x() const { return axes_[2]; }

  int64_t pixels() const { return static_cast<int64_t>(place_.size()); }
  int64_t panels() const { return layout_.panels(); }
  int64_t edge() const { return layout_.panel_width; }
  int64_t image_size() const { return panels() * (pixels() * edge() + 64 / sizeof(T)); }
  int64_t panel_size(int64_t examples) const {
    // One cache line more than the rows: panels a power of two apart would displace each other.
    return examples * (pixels() * edge() + 64 / sizeof(T));
  }
  int64_t tile_count() const { return static_cast<int64_t>(tiles_.size()); }
  int64_t taps() const { return z().taps * y().taps * x().taps; }

  int64_t triple_index(int64_t shift_z, int64_t shift_y, int64_t shift_x) const {
    return (shift_z * static_cast<int64_t>(y().shifts.size()) + shift_y) *
               static_cast<int64_t>(x().shifts.size()) +
           shift_x;
  }

  double operations() const {
    double rows = source_.examples;
    for (const OffsetAxis& axis : axes_) {
      int64_t length = 0;
      for (const Shift& shift : axis.shifts) {
        for (const auto& cell : shift.cells) length += cell.length;
      }
      rows *= length;
    }
    return rows * layout_.columns * (is_depthwise() ? 1 : layout_.strip_columns) / 2;
  }

  void lay_out_pixels() {
    place_.reserve(z().size() * y().size() * x().size());
    for (int64_t at_z : z().line) {
      for (int64_t at_y : y().line) {
        for (int64_t at_x : x().line) {
          place_.push_back(at_z * source_.strides[0] + at_y * source_.strides[1] +
                           at_x * source_.strides[2]);
        }
      }
    }
  }

  void lay_out_sums() {
    int64_t cells = 0;
    for (const Shift& at_z : z().shifts) {
      for (const Shift& at_y : y().shifts) {
        for (const Shift& at_x : x().shifts) {
          const bool still = !at_z.distance && !at_y.distance && !at_x.distance;
          triples_.push_back({triple_index(at_z.mirror, at_y.mirror, at_x.mirror), cells, still});
          const int64_t own = static_cast<int64_t>(at_z.cells.size() * at_y.cells.size()) *
                              static_cast<int64_t>(at_x.cells.size());
          if (still) cells_.still_first = cells, still_cells_ = own;
          cells += own;
        }
      }
    }
    cells_.count = cells;
    cells_.edge = edge();
    // The smallest products have as many rows as a power of two.
    const int64_t rows = std::min(edge(), round_up(layout_.strip_columns, product_.rows));
    cells_.size = is_depthwise() ? edge() : rows * edge();
    sums_size_ = cells * cells_.size + (bias_ ? still_cells_ * edge() : 0);
  }

  void list_operands() {
    operands_.resize(z().size() * y().size());
    for (size_t shift_z = 0; shift_z < z().shifts.size(); ++shift_z) {
      for (size_t shift_y = 0; shift_y < y().shifts.size(); ++shift_y) {
        const Shift &at_z = z().shifts[shift_z], &at_y = y().shifts[shift_y];
        const int64_t step = at_z.distance * y().size() + at_y.distance;
        for (size_t cell = 0; cell < at_z.cells.size() * at_y.cells.size(); ++cell) {
          const auto& along_z = at_z.cells[cell / at_y.cells.size()];
          const auto& along_y = at_y.cells[cell % at_y.cells.size()];
          for (int64_t i = 0; i < along_z.length * along_y.length; ++i) {
            const int64_t row = (along_z.first + i / along_y.length) * y().size() + along_y.first +
                                i % along_y.length;
            operands_[row].push_back({static_cast<int64_t>(shift_z), static_cast<int64_t>(shift_y),
                                      static_cast<int64_t>(cell), row + step});
          }
        }
      }
    }
  }

  // For every pair of taps the cells that make up its window.
  void list_windows() {
    const int64_t count = windows_.taps = taps();
    windows_.begin.reserve(count * count + 1);
    int64_t cells = 1;
    for (const OffsetAxis& axis : axes_) {
      int64_t along = 0;
      for (const auto& pair : axis.pairs) along += pair.last - pair.first;
      cells *= along;
    }
    windows_.cells.reserve(cells);
    for (int64_t left = 0; left < count; ++left) {
      for (int64_t right = 0; right < count; ++right) {
        windows_.begin.push_back(static_cast<int64_t>(windows_.cells.size()));
        add_window(left, right);
      }
    }
    windows_.begin.push_back(static_cast<int64_t>(windows_.cells.size()));
  }

  void add_window(int64_t left, int64_t right) {
    const auto pair_of = [&](const OffsetAxis& axis, int64_t after) {
      return axis.pairs[left / after % axis.taps * axis.taps + right / after % axis.taps];
    };
    const auto along_z = pair_of(z(), y().taps * x().taps);
    const auto along_y = pair_of(y(), x().taps);
    const auto along_x = pair_of(x(), 1);
    const int64_t first =
        triples_[triple_index(along_z.shift, along_y.shift, along_x.shift)].first_cell;
    const int64_t cells_y = y().shifts[along_y.shift].cells.size();
    const int64_t cells_x = x().shifts[along_x.shift].cells.size();
    for (int64_t at_z = along_z.first; at_z < along_z.last; ++at_z) {
      for (int64_t at_y = along_y.first; at_y < along_y.last; ++at_y) {
        for (int64_t at_x = along_x.first; at_x < along_x.last; ++at_x) {
          windows_.cells.push_back(first + (at_z * cells_y + at_y) * cells_x + at_x);
        }
      }
    }
  }

  // Whether a panel is one vector: then a strip has one tile.
  bool is_narrow() const { return edge() == product_.lanes; }
  // Whether of all products of a tile's channels only each one's with itself are wanted.
  bool is_depthwise() const { return layout_.group_columns == 1; }

  void list_joints() {
    std::vector<int64_t> all, half;  // half: one of each shift and its mirror
    for (int64_t shift = 0; shift < static_cast<int64_t>(x().shifts.size()); ++shift) {
      all.push_back(shift);
      if (shift <= x().shifts[shift].mirror) half.push_back(shift);
    }
    const auto by_distance = [&](int64_t a, int64_t b) {
      return x().shifts[a].distance < x().shifts[b].distance;
    };
    std::sort(all.begin(), all.end(), by_distance);
    std::sort(half.begin(), half.end(), by_distance);
    const size_t most = is_narrow() ? TileProduct<T>::vectors : 1;
    joints_ = join_shifts(x(), all, most);
    half_joints_ = join_shifts(x(), half, most);
  }

  // Few tiles are cut into chunks of examples, for enough tasks for many threads; each has a set of
  // sums, together a third of the input at most. Examples are packed all at once, or in rounds that
  // add to the same sets. Both numbers depend on the shape alone. That all memory together can be
  // as much as is allowed, _cost in kfac_fast/conv_kernels.py makes sure: where rounds do not fit,
  // few threads may have to do.
  void choose_chunks() {
    constexpr int64_t enough_tasks = 16, few_sums = 3 << 18;
    constexpr int64_t other_tables = 1 << 18;  // of shifts and joints, and of the plan
    const int64_t examples = std::max<int64_t>(source_.examples, 1);
    const int64_t groups = source_.channels / layout_.group_columns;
    const int64_t result = groups * store_.matrix_size() * sizeof(T);
    int64_t tables = 8 * (windows_.cells.size() + windows_.begin.size() + place_.size());
    for (const auto& row : operands_) tables += row.size() * sizeof(Operand);
    const int64_t budget = most_scratch_bytes(input_bytes_, result) - tables - other_tables;
    const int64_t tile_sums = std::max<int64_t>(sums_size_ * sizeof(T), 1);
    const int64_t sums = tile_count() * tile_sums;
    const int64_t example = image_size() * sizeof(T);
    const int64_t busy = std::min(enough_tasks, tile_count()) * tile_sums;
    const int64_t a_round = (budget - sums) / example;  // examples, beside all sums
    const bool in_rounds = examples * example + busy > budget && a_round > 0;
    const int64_t rounds = in_rounds ? divide_up(examples, a_round) : 1;
    const int64_t left = budget - divide_up(examples, rounds) * example;
    const int64_t most_sets = std::min(std::max(input_bytes_ / 3, few_sums), left) / sums;
    const int64_t wanted = std::min(divide_up(enough_tasks, tile_count()), most_sets);
    chunks_a_round_ = std::clamp<int64_t>(wanted, 1, divide_up(examples, rounds));
    chunks_ = rounds * chunks_a_round_;
    most_workers_ = std::max<int64_t>(left / tile_sums, 1);
  }

  int64_t first_example(int64_t chunk) const { return chunk * source_.examples / chunks_; }
  int64_t examples(int64_t chunk) const { return first_example(chunk + 1) - first_example(chunk); }

  T* chunk_data(int64_t chunk, int64_t first_chunk, T* packed) const {
    return packed + (first_example(chunk) - first_example(first_chunk)) * image_size();
  }

  void pack_chunks(int64_t first, int64_t last, T* packed) const {
    constexpr int64_t pixels_a_task = 512;
    const int64_t parts = divide_up(pixels(), pixels_a_task);
    const int64_t count = first_example(last) - first_example(first);
    const double work = 0.25 * count * pixels() * source_.channels;
    for_each_task(count * parts, worker_count(count * parts, work), [&](int64_t task, int64_t) {
      const int64_t example = first_example(first) + task / parts;
      int64_t chunk = first;
      while (first_example(chunk + 1) <= example) ++chunk;
      const int64_t begin = task % parts * pixels_a_task;
      pack_example(example, begin, std::min(begin + pixels_a_task, pixels()), chunk,
                   chunk_data(chunk, first, packed));
    });
  }

  // Packs the pixels [begin, end) of an example, runs of evenly spaced ones together.
  void pack_example(int64_t example, int64_t begin, int64_t end, int64_t chunk, T* packed) const {
    const int64_t count = examples(chunk), within = example - first_example(chunk);
    const In* image = source_.at(example, 0);
    for (int64_t stop; begin < end; begin = stop) {
      const int64_t step = begin + 1 < end ? place_[begin + 1] - place_[begin] : 0;
      for (stop = begin + 1; stop < end && place_[stop] - place_[stop - 1] == step;) ++stop;
      T* target = packed + (begin * count + within) * edge();
      for (int64_t panel = 0, next; panel < panels(); panel = next) {
        next = layout_.end_of_run(panel, panels());
        const int64_t column = layout_.first_column(panel);
        pack_(image + place_[begin] + column * source_.channel_stride, step, source_.channel_stride,
              stop - begin, layout_.end_column(next - 1) - column, layout_.columns_a_panel(),
              target + panel * panel_size(count), count * edge(), panel_size(count));
      }
    }
  }

  int64_t rows_of(const Tile& tile) const { return layout_.rows_of(tile, edge()); }
  int64_t columns_of(const Tile& tile) const { return layout_.columns_of(tile, edge()); }

  // Adds a chunk to the sums of one tile.
  void multiply(const Tile& tile, int64_t chunk, const T* packed, T* sums) const {
    const int64_t count = examples(chunk);
    const int64_t first_panel = tile.strip * layout_.strip_panels();
    const T* left = packed + (first_panel + tile.row / edge()) * panel_size(count);
    const T* right = packed + (first_panel + tile.column / edge()) * panel_size(count);
    const int64_t row_stride = x().size() * count * edge();
    for (size_t row = 0; row < operands_.size(); ++row) {
      for (const Operand& operand : operands_[row]) {
        multiply_rows(tile, operand, left + row * row_stride, right + operand.right * row_stride,
                      count, sums);
      }
    }
    if (tile.on_diagonal()) mirror_shifts(tile, sums);
  }

  // One row of the images with another, at all shifts along x.
  void multiply_rows(const Tile& tile, const Operand& operand, const T* left, const T* right,
                     int64_t count, T* sums) const {
    const int64_t mirror_z = z().shifts[operand.shift_z].mirror;
    const int64_t mirror_y = y().shifts[operand.shift_y].mirror;
    const int64_t index = triple_index(operand.shift_z, operand.shift_y, 0);
    const int64_t mirror = triple_index(mirror_z, mirror_y, 0);
    if (tile.on_diagonal() && index > mirror) return;  // the mirror has it
    const bool is_half = tile.on_diagonal() && index == mirror;
    for (const JointShifts& joint : is_half ? half_joints_ : joints_) {
      T* own[TileProduct<T>::vectors];
      int64_t still_cell = -1;
      for (size_t m = 0; m < joint.members.size(); ++m) {
        const auto [shift, cell_x] = joint.members[m];
        const auto cells_x = static_cast<int64_t>(x().shifts[shift].cells.size());
        const Triple& triple = triples_[index + shift];
        const int64_t cell = triple.first_cell + operand.cell * cells_x + cell_x;
        own[m] = sums + cell * cells_.size;
        if (triple.still && tile.on_diagonal()) still_cell = cell;
      }
      const int64_t rows = joint.length * count, pieces = divide_up(rows, longest);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t begin = piece * rows / pieces, depth = (piece + 1) * rows / pieces - begin;
        const T* from = left + (joint.first * count + begin) * edge();
        const T* to = right + ((joint.first + joint.distance) * count + begin) * edge();
        const Panels<T> a{from, depth, edge(), edge(), edge()},
            b{to, depth, edge(), edge(), edge()};
        multiply_joint(tile, joint, a, b, joint.step * count * edge(), still_cell >= 0, own);
        if (bias_ && still_cell >= 0) {
          sum_panels(product_, a, columns_of(tile), bias_sums(sums, still_cell), true);
        }
      }
    }
  }

  // Some rows with those of all members of a joint, which lie `step` numbers apart. Only narrow
  // tiles have joints of several.
  void multiply_joint(const Tile& tile, const JointShifts& joint, const Panels<T>& left,
                      const Panels<T>& right, int64_t step, bool lower, T* const* sums) const {
    const auto members = static_cast<int64_t>(joint.members.size());
    if (is_depthwise()) {
      product_.lanewise[members - 1](left.data, edge(), right.data, edge(), step, left.depth, sums);
    } else if (is_narrow()) {
      multiply_spread(product_, left, rows_of(tile), right, members, step, sums, edge());
    } else {
      multiply_panels(product_, left, rows_of(tile), right, columns_of(tile), lower, sums[0],
                      edge(), true);
    }
  }

  T* bias_sums(T* sums, int64_t cell) const { return sums + cells_.bias(cell); }

  // On the diagonal a shift's sums are those of its mirror, transposed.
  void mirror_shifts(const Tile& tile, T* sums) const {
    const int64_t width = columns_of(tile);
    for (size_t t = 0; t < triples_.size(); ++t) {
      const Triple& mirror = triples_[triples_[t].mirror];
      if (static_cast<int64_t>(t) <= triples_[t].mirror) continue;
      const int64_t next = t + 1 < triples_.size() ? triples_[t + 1].first_cell : cells_.count;
      for (int64_t i = 0; i < next - triples_[t].first_cell; ++i) {
        const T* from = sums + (mirror.first_cell + i) * cells_.size;
        T* to = sums + (triples_[t].first_cell + i) * cells_.size;
        if (is_depthwise()) {
          std::copy_n(from, edge(), to);
        } else {
          transpose(from, edge(), width, width, to, edge());
        }
      }
    }
  }

  void add_sets_and_store(T* sums) const {
    constexpr int64_t slices = 8;
    const int64_t set_size = tile_count() * sums_size_;
    const int64_t additions = set_size * (chunks_a_round_ - 1);
    for_each_task(slices, worker_count(slices, 0.25 * additions), [&](int64_t slice, int64_t) {
      const int64_t begin = slice * set_size / slices, end = (slice + 1) * set_size / slices;
      for (int64_t set = 1; set < chunks_a_round_; ++set) {
        const T* more = sums + set * set_size;
        for (int64_t i = begin; i < end; ++i) sums[i] += more[i];
      }
    });
    const int64_t rows = store_.channels_together();
    const int64_t parts = divide_up(std::min(edge(), layout_.strip_columns), rows);
    const double pairs = static_cast<double>(windows_.cells.size()) * tile_count();
    const double entries = pairs * edge() * (is_depthwise() ? 4 : 2 * edge());
    for_each_task(tile_count() * parts, worker_count(tile_count() * parts, entries),
                  [&](int64_t task, int64_t) {
                    const Tile& tile = tiles_[task / parts];
                    const int64_t first = tile.row + task % parts * rows;
                    store_.rows(tile, sums + task / parts * sums_size_, first - tile.row,
                                std::min(first + rows, tile.row + rows_of(tile)) - tile.row);
                  });
  }

  const ImageSource<In>& source_;
  const Axes<OffsetAxis>& axes_;
  const int64_t input_bytes_;
  const TileProduct<T>& product_;
  const Packing<In, T> pack_;
  const GramLayout layout_;
  const std::vector<Tile> tiles_;  // of channels, a panel by a panel
  const bool bias_;
  CellSums cells_;
  TapWindows windows_;
  const TapStore<T> store_;

  std::vector<int64_t> place_;  // of every pixel of the lines in an image
  std::vector<Triple> triples_;
  int64_t still_cells_ = 0, sums_size_ = 0;
  std::vector<std::vector<Operand>> operands_;     // by the row that is the left operand
  std::vector<JointShifts> joints_, half_joints_;  // of the shifts along x
  int64_t chunks_ = 1, chunks_a_round_ = 1, most_workers_ = 1;
};

}  // namespace kfac_fast
