// The Gram matrix of the rows of X on the CPU:
//
//   out <- beta · out + alpha · Σ_r x_r x_r^T,   x_r = (row r, 1 if there is a bias)
//
// Rows are taken in blocks that fit in cache. A block is packed into panels (tile_product.h) and
// multiplied into the tiles of the lower triangle; finished tiles are scaled, blended with `out`
// and mirrored in one pass (symmetric_store.h). There are two ways to share the work:
//
//   by_rows   few columns: each task packs and multiplies its own rows into its own set of tiles,
//             which stays in its core's cache; the sets are added at the end
//   by_tiles  many columns, or few rows: all threads pack some blocks, then share out the tiles
//
// Which way and in how many tasks depends on the shape alone: the result does not depend on the
// number of threads, not by a bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "gram_layout.h"
#include "instruction_set.h"
#include "narrow_float.h"
#include "parallel.h"
#include "row_source.h"
#include "scratch.h"
#include "symmetric_store.h"
#include "tile_product.h"

namespace kfac_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of a block: enough that the sums are read and written seldom, few enough that a panel of the
// block (48 KB at most) stays in the nearest caches.
constexpr int64_t longest_block = 256;

// A block of rows of all strips.
template <typename T>
struct Block {
  Panels<T> first_strip;
  int64_t strip_distance;

  Panels<T> strip(int64_t index) const {
    Panels<T> panels = first_strip;
    panels.data += index * strip_distance;
    return panels;
  }
};

template <typename In, typename T>
class Gram {
 public:
  Gram(const RowSource<In>& source, const GramLayout& layout, const TileProduct<T>& product,
       const Packing<In, T>& packing, const SymmetricStore<T>& store, bool bias, T* out)
      : source_(source),
        layout_(layout),
        product_(product),
        pack_rows_(packing),
        store_(store),
        bias_(bias),
        out_(out),
        block_rows_(std::clamp<int64_t>(source.rows(), 1, longest_block)),
        blocks_(std::max<int64_t>(1, divide_up(source.rows(), block_rows_))) {}

  void run() {
    constexpr int64_t cached_bytes = 640 * 1024;  // of 1 MB, with a block of rows beside the sums
    constexpr int64_t enough_tasks = 16;
    cut(large_tile);
    const int64_t bytes = tile_count() * tile_size() * sizeof(T);
    if (bytes <= cached_bytes && source_.rows() >= 8 * layout_.strip_columns) {
      by_rows();
    } else {
      if (tile_count() < enough_tasks) cut(large_tile / 2);
      by_tiles();
    }
  }

 private:
  // Sums of 36 KB: they meet each panel of a block while it is near, and larger tiles were not
  // faster.
  static constexpr int64_t large_tile = 4 * max_tile_edge / sizeof(T);

  void cut(int64_t edge) {
    tile_edge_ = layout_.strip_columns <= layout_.panel_width ? layout_.panel_width : edge;
    tiles_ = layout_.tiles(tile_edge_);
  }

  int64_t tile_count() const { return tiles_.size(); }
  // The last row of a tile on the diagonal is for the column sums, the outer products with the
  // bias.
  int64_t tile_size() const { return (tile_edge_ + 1) * tile_edge_; }
  // One cache line more than the rows: panels a power of two apart would displace each other.
  int64_t panel_size() const { return block_rows_ * layout_.panel_width + 64 / sizeof(T); }
  int64_t block_size() const { return layout_.panels() * panel_size(); }
  double operations() const {
    return static_cast<double>(source_.rows()) * layout_.columns * layout_.strip_columns;
  }

  void by_rows() {
    // At least 8 chunks to balance, at most 64 sets of sums to add, otherwise 1024 rows each.
    const int64_t most_chunks = std::clamp<int64_t>(source_.rows() / 1024, 8, 64);
    const int64_t chunks = std::min(blocks_, most_chunks);
    const int64_t sums_size = tile_count() * tile_size();
    const int64_t workers = worker_count(chunks, operations());
    const auto sums = make_scratch<T>(chunks * sums_size);
    const auto packed = make_scratch<T>(workers * block_size());
    for_each_task(chunks, workers, [&](int64_t chunk, int64_t worker) {
      const int64_t begin = chunk * blocks_ / chunks;
      const int64_t end = (chunk + 1) * blocks_ / chunks;
      for (int64_t index = begin; index < end; ++index) {
        const Block<T> block = load(index, &packed[worker * block_size()]);
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

  void by_tiles() {
    constexpr int64_t packed_bytes = 4 << 20;  // to share a round of packing among many blocks
    const int64_t block_bytes = block_size() * sizeof(T);
    const int64_t together = std::clamp<int64_t>(packed_bytes / block_bytes, 1, blocks_);
    const bool one_round = together == blocks_;  // then a worker stores a tile before the next one
    const int64_t workers = worker_count(tile_count(), operations());
    const auto packed = make_scratch<T>(together * block_size());
    const auto sums = make_scratch<T>((one_round ? workers : tile_count()) * tile_size());
    std::vector<Block<T>> blocks(together);
    for (int64_t begin = 0; begin < blocks_; begin += together) {
      const int64_t count = std::min(together, blocks_ - begin);
      pack_round(begin, count, packed.get(), blocks);
      for_each_task(tile_count(), workers, [&](int64_t t, int64_t worker) {
        T* sum = &sums[(one_round ? worker : t) * tile_size()];
        for (int64_t b = 0; b < count; ++b) multiply(tiles_[t], blocks[b], sum, begin + b > 0);
        if (begin + count == blocks_) store(tiles_[t], {sum, tile_edge_, 1, 0});
      });
    }
  }

  // Packs `count` blocks from `begin` on, some panels a task.
  void pack_round(int64_t begin, int64_t count, T* memory, std::vector<Block<T>>& blocks) const {
    constexpr int64_t panels_a_task = 8;
    const int64_t parts = divide_up(layout_.panels(), panels_a_task);
    const int64_t workers = worker_count(count * parts, operations());
    for_each_task(count * parts, workers, [&](int64_t task, int64_t) {
      const int64_t b = task / parts;
      const int64_t first = task % parts * panels_a_task;
      const int64_t last = std::min(first + panels_a_task, layout_.panels());
      const Block<T> block = pack(begin + b, first, last, memory + b * block_size());
      if (first == 0) blocks[b] = block;
    });
  }

  // A block, packed into `memory` unless it can be read in place.
  Block<T> load(int64_t index, T* memory) const {
    if constexpr (std::is_same_v<In, T>) {
      if (readable_in_place(index)) {
        const int64_t stride = source_.even_row_stride();
        const T* data = source_.data() + index * block_rows_ * stride;
        const int64_t width = layout_.panel_width;
        return {{data, block_rows_, stride, width, width}, layout_.strip_columns};
      }
    }
    return pack(index, 0, layout_.panels(), memory);
  }

  // Rows that lie close together can be multiplied where they are, if the last lanes of their last
  // vectors do not reach beyond the end of X.
  bool readable_in_place(int64_t index) const {
    constexpr int64_t longest_row = 512 / sizeof(T);
    const int64_t stride = source_.even_row_stride();
    if (source_.column_stride() != 1 || stride < layout_.columns || stride > longest_row) {
      return false;
    }
    const int64_t rows_after = source_.rows() - (index + 1) * block_rows_;
    const int64_t last_width = layout_.width(layout_.strips() - 1);
    const int64_t reach = round_up(last_width, product_.lanes) - last_width;
    return rows_after >= 0 && rows_after * stride >= reach;
  }

  Block<T> pack(int64_t index, int64_t first_panel, int64_t last_panel, T* memory) const {
    constexpr int64_t piece = 32;  // rows that stay in cache from one strip to the next
    const int64_t width = layout_.panel_width;
    const int64_t begin = index * block_rows_;
    const int64_t end = std::min(begin + block_rows_, source_.rows());
    int64_t depth = 0;
    source_.for_each_stretch(begin, end, [&](const In* rows, int64_t row_stride, int64_t count) {
      for (int64_t r = 0; r < count; r += piece) {
        const int64_t height = std::min(piece, count - r);
        pack_piece(rows + r * row_stride, row_stride, height, first_panel, last_panel,
                   memory + depth * width);
        depth += height;
      }
    });
    return {{memory, depth, width, width, panel_size()}, layout_.strip_panels() * panel_size()};
  }

  void pack_piece(const In* rows, int64_t row_stride, int64_t count, int64_t first_panel,
                  int64_t last_panel, T* memory) const {
    const int64_t column_stride = source_.column_stride();
    for (int64_t panel = first_panel, next; panel < last_panel; panel = next) {
      next = layout_.end_of_run(panel, last_panel);
      const int64_t column = layout_.first_column(panel);
      const int64_t columns = layout_.end_column(next - 1) - column;
      pack_rows_(rows + column * column_stride, row_stride, column_stride, count, columns,
                 layout_.columns_a_panel(), memory + panel * panel_size(), layout_.panel_width,
                 panel_size());
    }
  }

  void multiply(const Tile& tile, const Block<T>& block, T* sum, bool accumulate) const {
    const Panels<T> strip = block.strip(tile.strip);
    if (strip.depth == 0 && accumulate) return;
    const int64_t rows = std::min(tile_edge_, layout_.width(tile.strip) - tile.row);
    const int64_t columns = std::min(tile_edge_, layout_.width(tile.strip) - tile.column);
    const Panels<T> right = strip.from(tile.column);
    multiply_panels(product_, strip.from(tile.row), rows, right, columns, tile.on_diagonal(), sum,
                    tile_edge_, accumulate);
    if (bias_ && tile.on_diagonal()) {
      sum_panels(product_, right, columns, sum + tile_edge_ * tile_edge_, accumulate);
    }
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

  const RowSource<In>& source_;
  const GramLayout& layout_;
  const TileProduct<T>& product_;
  const Packing<In, T>& pack_rows_;
  const SymmetricStore<T>& store_;
  const bool bias_;
  T* const out_;
  const int64_t block_rows_;
  const int64_t blocks_;
  int64_t tile_edge_ = 0;
  std::vector<Tile> tiles_;
};

// The last entry of every group's matrix: its rows' ones, counted exactly.
template <typename T>
void store_count(const SymmetricStore<T>& store, int64_t count, int64_t groups, T* out) {
  const T sum = static_cast<T>(count);
  const int64_t last = store.edge - 1;
  for (int64_t group = 0; group < groups; ++group) {
    store({&sum, 1, 1, 0}, 1, 1, true, out + group * store.edge * store.edge, last, last);
  }
}

template <typename In>
RowSource<In> rows_of(const Tensor& x, const std::optional<Tensor>& mask) {
  const int64_t leading = x.dim() - 1;
  std::vector<Axis> axes;
  for (int64_t i = 0; i < leading; ++i) {
    axes.push_back({x.size(i), x.stride(i), mask ? mask->stride(i) : 0});
  }
  return {static_cast<const In*>(x.const_data_ptr()), x.stride(leading),
          mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, axes};
}

template <typename In, typename T>
void gram_of(const Tensor& x, const std::optional<Tensor>& mask, int64_t groups, bool bias,
             double alpha, double beta, const Tensor& out) {
  const int64_t columns = x.size(x.dim() - 1);
  const RowSource<In> source = rows_of<In>(x, mask);
  const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta),
                                columns / groups + bias};
  T* data = static_cast<T*>(out.mutable_data_ptr());
  if (columns > 0) {
    const InstructionSet set = instruction_set_in_use();
    const TileProduct<T>& product = tile_product<T>(set);
    const GramLayout layout(columns, groups, product.panel_width(), product.lanes);
    Gram<In, T>(source, layout, product, packing<In, T>(set), store, bias, data).run();
  }
  if (bias) store_count(store, source.counted(0, source.rows()), groups, data);
}

// The arguments have passed the checks of kfac_fast/schema.py; what guards memory is repeated here.
void gram(const Tensor& x, const std::optional<Tensor>& mask, int64_t groups, bool bias,
          double alpha, double beta, const Tensor& out) {
  const int64_t edge = x.size(x.dim() - 1) / groups + bias;
  const ScalarType result =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      out.scalar_type() == result && out.is_contiguous() && out.numel() == groups * edge * edge,
      "gram: out must be contiguous with ", groups * edge * edge,
      " elements of the result's dtype, got ", out.numel());
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return gram_of<float, float>(x, mask, groups, bias, alpha, beta, out);
    case ScalarType::Double:
      return gram_of<double, double>(x, mask, groups, bias, alpha, beta, out);
    case ScalarType::BFloat16:
      return gram_of<BFloat16, float>(x, mask, groups, bias, alpha, beta, out);
    case ScalarType::Half:
      return gram_of<Half, float>(x, mask, groups, bias, alpha, beta, out);
    default:
      STD_TORCH_CHECK(false, "gram: x must be float32, float64, bfloat16 or float16");
  }
}

STABLE_TORCH_LIBRARY_IMPL(kfac_fast_native, CPU, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace
}  // namespace kfac_fast
