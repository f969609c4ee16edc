#pragma once
// The sum of the outer products of rows that come in blocks, for every group of columns:
//
//   out <- beta · out + alpha · Σ_r x_r x_r^T,   x_r = (row r, 1 if there is a bias)
//
// Rows are taken in blocks that fit in cache. A block is packed into panels (tile_product.h) and
// multiplied into the tiles of the lower triangle; finished tiles are scaled, blended with `out`
// and mirrored in one pass (symmetric_store.h). There are three ways to share the work:
//
//   by_rows   few columns: each task packs and multiplies its own rows into its own set of tiles,
//             which stays in its core's cache; the sets are added at the end
//   at_once   few rows: all threads pack them, then share out the tiles; or, of very few and with
//             nothing to add to, the rows of the result, whose triangles then are both multiplied
//   by_tiles  otherwise: all threads pack some blocks, share out the tiles, pack the next blocks
//
// Which way and in how many tasks depends on the shape, the length of vectors and whether beta is 0
// alone: the result does not depend on the number of threads, not by a bit.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gram_layout.h"
#include "parallel.h"
#include "row_blocks.h"
#include "scratch.h"
#include "symmetric_store.h"
#include "tile_product.h"

namespace kfac_fast {

// The multiply-adds in whose time an entry is formed of so many rows and stored.
inline double products_of(int64_t rows) {
  constexpr int64_t rows_a_store = 16;
  return static_cast<double>(rows + rows_a_store);
}

// So few rows that writing takes longer than multiplying, and nothing to be read before: both
// triangles are multiplied and written in order.
template <typename T>
class FewRows {
 public:
  FewRows(InstructionSet set, const SymmetricStore<T>& store, int64_t columns, bool bias)
      : product_(tile_product<T>(set)), store_(store), columns_(columns), bias_(bias) {}

  bool serves(int64_t rows) const {
    // More with longer vectors, which multiply faster, and twice as many with 16 lanes, unless the
    // store of one triangle and its mirror image goes past the caches, too.
    const bool fast = product_.lanes == 16 && !store_.past_caches();
    const int64_t few = (fast ? 4 : 2) * product_.rows;
    return rows > 0 && rows <= few && store_.beta == 0 && columns_ >= product_.lanes;
  }

  int64_t panel_width() const { return product_.panel_width(); }
  int64_t scratch_size() const { return round_up(columns_, product_.panel_width()); }

  // Of a matrix: some rows each.
  int64_t parts() const { return divide_up(columns_, rows_a_part()); }

  // Stores a part of the matrix of a group, whose columns `panels` are; with the first, the row and
  // column of the bias.
  void multiply(const Panels<T>& panels, int64_t part, T* matrix, T* scratch) const {
    const int64_t row = part * rows_a_part();
    store_.multiply_all(panels, row, std::min(rows_a_part(), columns_ - row), columns_, matrix);
    if (bias_ && part == 0) {
      sum_panels(product_, panels, columns_, scratch, false);
      store_.wide({scratch, 0, 1, 0}, 1, columns_, false, matrix, columns_, 0);
    }
  }

 private:
  int64_t rows_a_part() const {
    constexpr int64_t most = 48;
    return round_up(divide_up(columns_, divide_up(columns_, most)), product_.rows);
  }

  const TileProduct<T>& product_;
  const SymmetricStore<T>& store_;
  const int64_t columns_;
  const bool bias_;
};

// `Blocks` hands out the rows: see RowBlocks.
template <typename Blocks, typename T>
class BlockGram {
 public:
  BlockGram(const Blocks& blocks, const GramLayout& layout, InstructionSet set,
            const SymmetricStore<T>& store, bool bias, T* out)
      : rows_(blocks.rows()),
        blocks_(blocks),
        layout_(layout),
        product_(tile_product<T>(set)),
        store_(store),
        few_rows_(set, store, layout.group_columns, bias),
        bias_(bias),
        out_(out) {}

  void run() {
    constexpr int64_t cached_bytes = 640 * 1024;  // of 1 MB, with a block of rows beside the sums
    constexpr int64_t enough_tasks = 16;
    if (few_rows_.serves(rows_)) return both_triangles();
    cut(large_tile);
    const int64_t bytes = tile_count() * tile_size() * sizeof(T);
    if (bytes <= cached_bytes && rows_ >= 8 * layout_.strip_columns) {
      by_rows();
    } else {
      if (tile_count() < enough_tasks) cut(large_tile / 2);
      if (blocks_.count() <= blocks_a_round()) {
        at_once();
      } else {
        by_tiles();
      }
    }
  }

 private:
  // 18 or 36 KB of sums, which meet each panel of a block while it is near; more was not faster.
  static constexpr int64_t large_tile = 4 * max_tile_edge / sizeof(T);

  static constexpr int64_t panels_a_task = 8;

  void cut(int64_t edge) {
    tile_edge_ = std::min(edge, round_up(layout_.strip_columns, layout_.panel_width));
    tiles_ = layout_.tiles(tile_edge_);
  }

  int64_t tile_count() const { return tiles_.size(); }
  // With one more row for the column sums, the products with the bias, of tiles on the diagonal.
  int64_t tile_size() const { return (tile_edge_ + 1) * tile_edge_; }
  double operations() const {
    return products_of(rows_) * static_cast<double>(layout_.columns) * layout_.strip_columns;
  }

  void by_rows() {
    // 1024 rows each, but up to 8 chunks for balance; at most 64 sets of sums to add, and no more
    // of them than take the memory of the input.
    const int64_t sums_size = tile_count() * tile_size();
    const int64_t set_bytes = sums_size * static_cast<int64_t>(sizeof(T));
    const int64_t most_sets = std::max<int64_t>(blocks_.input_bytes() / set_bytes, 2);
    const int64_t most_chunks = std::min(std::clamp<int64_t>(rows_ / 1024, 8, 64), most_sets);
    const int64_t chunks = std::clamp<int64_t>(rows_ / 256, 1, most_chunks);
    const int64_t workers = worker_count(chunks, operations());
    const auto sums = make_scratch<T>(chunks * sums_size);
    const auto packed = make_scratch<T>(workers * blocks_.packed_size());
    for_each_task(chunks, workers, [&](int64_t chunk, int64_t worker) {
      const int64_t begin = chunk * blocks_.count() / chunks;
      const int64_t end = (chunk + 1) * blocks_.count() / chunks;
      for (int64_t index = begin; index < end; ++index) {
        const Block<T> block = blocks_.load(index, &packed[worker * blocks_.packed_size()]);
        for (int64_t t = 0; t < tile_count(); ++t) {
          T* sum = &sums[chunk * sums_size + t * tile_size()];
          multiply(tiles_[t], block, sum, index > begin);
        }
      }
    });
    const double additions = static_cast<double>(chunks) * sums_size;
    for_each_task(tile_count(), worker_count(tile_count(), additions), [&](int64_t t, int64_t) {
      store(tiles_[t], {&sums[t * tile_size()], tile_edge_, chunks, sums_size});
    });
  }

  // All blocks are packed, then each tile is multiplied and stored.
  void at_once() {
    const int64_t workers = worker_count(tile_count(), operations());
    const auto sums = make_scratch<T>(workers * tile_size());
    pack_and_share(tile_count(), workers, [&](int64_t t, int64_t worker, const auto& blocks) {
      if (blocks.size() == 1 && multiply_and_store(tiles_[t], blocks[0])) return;
      T* sum = &sums[worker * tile_size()];
      for (const Block<T>& block : blocks) multiply(tiles_[t], block, sum, &block != &blocks[0]);
      store(tiles_[t], {sum, tile_edge_, 1, 0});
    });
  }

  void both_triangles() {
    const int64_t parts = few_rows_.parts(), tasks = layout_.strips() * parts;
    const int64_t workers = worker_count(tasks, operations());
    const int64_t sums_size = few_rows_.scratch_size();
    const auto sums = make_scratch<T>(workers * sums_size);
    pack_and_share(tasks, workers, [&](int64_t task, int64_t worker, const auto& blocks) {
      const int64_t group = task / parts;
      few_rows_.multiply(blocks[0].strip(group), task % parts,
                         out_ + group * store_.edge * store_.edge, &sums[worker * sums_size]);
    });
  }

  // Packs all blocks, then calls run(task, worker, blocks) for every task.
  template <typename Run>
  void pack_and_share(int64_t tasks, int64_t workers, const Run& run) const {
    const int64_t block_size = blocks_.packed_size();
    const int64_t parts = divide_up(layout_.panels(), panels_a_task);
    const int64_t packs = blocks_.count() * parts;
    const auto packed = make_scratch<T>(blocks_.count() * block_size);
    std::vector<Block<T>> blocks(blocks_.count());
    const auto pack_part = [&](int64_t task, int64_t) {
      const int64_t index = task / parts;
      pack(index, task % parts, &packed[index * block_size], blocks[index]);
    };
    for_each_task_after(packs, tasks, workers, pack_part,
                        [&](int64_t task, int64_t worker) { run(task, worker, blocks); });
  }

  void pack(int64_t index, int64_t part, T* packed, Block<T>& block) const {
    const int64_t first = part * panels_a_task;
    const int64_t last = std::min(first + panels_a_task, layout_.panels());
    const Block<T> done = blocks_.pack(index, first, last, packed);
    if (part == 0) block = done;
  }

  // All threads pack the blocks of a round and share out its tiles. No barrier ends a round: tasks
  // are drawn in the order
  //
  //   pack 0 | pack 1, multiply 0 | pack 2, multiply 1 | ... | multiply last
  //
  // and wait only for what they need, which after the first round was drawn a round earlier. A core
  // that the system takes away for a while then delays its own task, not all the others.
  void by_tiles() {
    const int64_t block_size = blocks_.packed_size();
    const int64_t together = blocks_a_round();
    const int64_t rounds = divide_up(blocks_.count(), together);
    const int64_t parts = divide_up(layout_.panels(), panels_a_task);
    const int64_t packs = together * parts;
    const int64_t workers = worker_count(std::max(packs, tile_count()), operations());
    const int64_t buffers = this->buffers();

    const auto packed = make_scratch<T>(std::min(rounds, buffers) * together * block_size);
    const auto sums = make_scratch<T>(tile_count() * tile_size());
    std::vector<Block<T>> blocks(std::min(rounds, buffers) * together);
    std::vector<Progress> packs_done(rounds), tiles_done(rounds), rounds_done(tile_count());

    const auto pack_round = [&](int64_t round, int64_t task) {
      if (round >= buffers) tiles_done[round - buffers].wait_for(tile_count());
      const int64_t index = round * together + task / parts;
      const int64_t slot = round % buffers * together + task / parts;
      if (index < blocks_.count()) {
        pack(index, task % parts, &packed[slot * block_size], blocks[slot]);
      }
      packs_done[round].advance();
    };
    const auto multiply_round = [&](int64_t round, int64_t t) {
      packs_done[round].wait_for(packs);
      rounds_done[t].wait_for(round);
      T* sum = &sums[t * tile_size()];
      const int64_t count = std::min(together, blocks_.count() - round * together);
      for (int64_t b = 0; b < count; ++b) {
        const Block<T>& block = blocks[round % buffers * together + b];
        multiply(tiles_[t], block, sum, round + b > 0);
      }
      if (round == rounds - 1) store(tiles_[t], {sum, tile_edge_, 1, 0});
      rounds_done[t].advance();
      tiles_done[round].advance();
    };
    Stretches all_packs(packs, workers), all_tiles(tile_count(), workers);
    for_each_worker(workers, [&](int64_t worker) {
      for (int64_t step = 0; step <= rounds; ++step) {
        if (step < rounds) {
          all_packs.work(step, worker, [&](int64_t task) { pack_round(step, task); });
        }
        if (step > 0) {
          all_tiles.work(step - 1, worker, [&](int64_t t) { multiply_round(step - 1, t); });
        }
      }
    });
  }

  // Blocks of 1 MB together, or of up to 6 MB if the sums, read and written in every round, leave
  // the caches; or all, in one round, if they are small beside the sums, which then need not be
  // kept. Of a small input fewer, see room().
  int64_t blocks_a_round() const {
    constexpr int64_t large_sums = 12 << 20, megabyte = 1 << 20;
    const int64_t sums_size = tile_count() * tile_size();
    const int64_t block_size = blocks_.packed_size();
    if (blocks_.count() * block_size <= sums_size / 2) return blocks_.count();
    const int64_t sums_bytes = sums_size * static_cast<int64_t>(sizeof(T));
    const int64_t round_bytes =
        sums_bytes > large_sums ? std::min(6 * megabyte, sums_bytes / 3) : megabyte;
    const int64_t block_bytes = block_size * static_cast<int64_t>(sizeof(T));
    const int64_t together = std::min(round_bytes, room() / buffers()) / block_bytes;
    return std::clamp<int64_t>(together, 1, blocks_.count());
  }

  // Of rounds by tiles: one to pack, one to multiply and, if there is room, one with late tasks.
  int64_t buffers() const {
    const int64_t block_bytes = blocks_.packed_size() * static_cast<int64_t>(sizeof(T));
    return room() >= 3 * block_bytes ? 3 : 2;
  }

  // Bytes that packed blocks may take.
  int64_t room() const {
    constexpr auto size = static_cast<int64_t>(sizeof(T));
    const int64_t groups = layout_.columns / layout_.group_columns;
    const int64_t result = groups * store_.edge * store_.edge * size;
    return most_scratch_bytes(blocks_.input_bytes(), result) - tile_count() * tile_size() * size;
  }

  void multiply(const Tile& tile, const Block<T>& block, T* sum, bool accumulate) const {
    const Panels<T> strip = block.strip(tile.strip);
    if (strip.depth == 0 && accumulate) return;
    const int64_t rows = layout_.rows_of(tile, tile_edge_);
    const int64_t columns = layout_.columns_of(tile, tile_edge_);
    const Panels<T> right = strip.from(tile.column);
    multiply_panels(product_, strip.from(tile.row), rows, right, columns, tile.on_diagonal(), sum,
                    tile_edge_, accumulate);
    if (bias_ && tile.on_diagonal()) {
      sum_panels(product_, right, columns, sum + tile_edge_ * tile_edge_, accumulate);
    }
  }

  // Both at once; false where that is not possible.
  bool multiply_and_store(const Tile& tile, const Block<T>& block) const {
    const bool grouped = layout_.strip_columns != layout_.group_columns;
    if (tile.on_diagonal() && (bias_ || grouped)) return false;
    return store_.multiply(block.strip(tile.strip), tile.row, layout_.rows_of(tile, tile_edge_),
                           tile.column, layout_.columns_of(tile, tile_edge_),
                           out_ + tile.strip * store_.edge * store_.edge);
  }

  void store(const Tile& tile, const TileSums<T>& sums) const {
    const int64_t features = layout_.group_columns;
    const int64_t rows = std::min(tile_edge_, features - tile.row);
    const int64_t columns = std::min(tile_edge_, features - tile.column);
    for (int64_t first = 0; first < layout_.width(tile.strip); first += features) {
      const int64_t group = (tile.strip * layout_.strip_columns + first) / features;
      T* matrix = out_ + group * store_.edge * store_.edge;
      store_(sums.at(first, first), rows, columns, tile.on_diagonal(), matrix, tile.row,
             tile.column);
      if (bias_ && tile.on_diagonal()) {
        store_(sums.at(tile_edge_, first), 1, columns, false, matrix, features, tile.column);
      }
    }
  }

  const int64_t rows_;
  const Blocks& blocks_;
  const GramLayout& layout_;
  const TileProduct<T>& product_;
  const SymmetricStore<T>& store_;
  const FewRows<T> few_rows_;
  const bool bias_;
  T* const out_;
  int64_t tile_edge_ = 0;
  std::vector<Tile> tiles_;
};

// Calls run(first, count) for all groups, some at a time: a block of rows is packed with all of its
// columns, of which narrow groups make more.
template <typename Run>
void for_parts_of_groups(int64_t groups, int64_t group_columns, const Run& run) {
  constexpr int64_t columns_together = 1024;
  const int64_t together = std::max<int64_t>(columns_together / group_columns, 1);
  for (int64_t first = 0; first < groups; first += together) {
    run(first, std::min(together, groups - first));
  }
}

// The Gram matrices of rows that lie in memory, `columns` of them; without the entry of a count.
template <typename In, typename T>
void gram_of_rows(const RowSource<In>& rows, int64_t columns, int64_t groups,
                  const SymmetricStore<T>& store, bool bias, T* out) {
  const InstructionSet set = instruction_set_in_use();
  const TileProduct<T>& product = tile_product<T>(set);
  const int64_t width = columns / groups;
  const auto form = [&](int64_t first, int64_t count) {
    const RowSource<In> part = rows.from_column(first * width);
    const GramLayout layout(count * width, count, product.panel_width(), product.lanes);
    const RowBlocks<In, T> blocks(part, layout, packing<In, T>(set));
    BlockGram(blocks, layout, set, store, bias, out + first * store.edge * store.edge).run();
  };
  if (FewRows<T>(set, store, width, bias).serves(rows.rows())) return form(0, groups);
  for_parts_of_groups(groups, width, form);
}

// The last entry of every group's matrix: its rows' ones, counted exactly.
template <typename T>
void store_count(const SymmetricStore<T>& store, int64_t count, int64_t groups, T* out) {
  const T sum = static_cast<T>(count);
  const int64_t last = store.edge - 1;
  for (int64_t group = 0; group < groups; ++group) {
    store({&sum, 1, 1, 0}, 1, 1, true, out + group * store.edge * store.edge, last, last);
  }
}

}  // namespace kfac_fast
