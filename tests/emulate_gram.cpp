// csrc/cuda/gram.cuh on the CPU, for tests/test_gram_cuda.py, which compiles this file with
// `-include emulate_cuda.h`.
#include <limits>

#include "../csrc/cuda/gram.cuh"

using namespace kfac_fast;

namespace {

struct Arguments {
  const void* x;
  const bool* mask;
  int64_t dimensions;  // leading ones
  const int64_t *sizes, *strides, *mask_strides;
  int64_t width, column_stride, groups, bias;
  double alpha, beta;
  void* out;
  int64_t split, descending;
};

template <typename In, typename Acc, int kPer>
int64_t run(const Arguments& a) {
  constexpr int tile = 16 * kPer;
  GramRows<In> in{static_cast<const In*>(a.x), a.mask, a.width, a.column_stride};
  for (int64_t i = 0; i < a.dimensions; ++i) {
    if (!in.add({a.sizes[i], a.strides[i], a.mask_strides[i]})) return -1;
  }
  const int64_t tiles = lower_tiles(a.width, tile), programs = a.groups * tiles;
  const int64_t steps = (in.rows + kGramDepth - 1) / kGramDepth;
  const Acc unwritten = std::numeric_limits<Acc>::quiet_NaN();
  std::vector<Acc> part_tiles(a.split * programs * tile * tile, unwritten);
  std::vector<Acc> part_columns(a.split * a.groups * a.width, unwritten);
  std::vector<int64_t> counted(a.split, -1);
  GramParts<Acc> parts{part_tiles.data(), a.bias != 0, part_columns.data(), counted.data()};

  Emulator& device = Emulator::instance();
  const unsigned x = programs, y = a.split, patches = tile / kGramPatch * (tile / kGramPatch);
  device.run({x, y}, {kGramThreads}, a.descending, [&] {
    gram_partial_kernel<In, Acc, kPer>(in, parts, tiles, (steps + a.split - 1) / a.split);
  });
  device.run({x, patches}, {kGramPatch, 8}, a.descending, [&] {
    gram_finish_kernel<Acc>(parts, static_cast<Acc*>(a.out), a.alpha, a.beta, a.width, tiles, tile,
                            a.split);
  });
  return in.axes;
}

}  // namespace

extern "C" {

// Each returns the number of axes that the leading dimensions were merged into, or -1.
int64_t gram_float_64(const Arguments* a) { return run<float, float, 4>(*a); }
int64_t gram_float_128(const Arguments* a) { return run<float, float, 8>(*a); }
int64_t gram_bfloat16_64(const Arguments* a) { return run<__nv_bfloat16, float, 4>(*a); }
int64_t gram_bfloat16_128(const Arguments* a) { return run<__nv_bfloat16, float, 8>(*a); }
int64_t gram_half_64(const Arguments* a) { return run<__half, float, 4>(*a); }
int64_t gram_half_128(const Arguments* a) { return run<__half, float, 8>(*a); }
int64_t gram_double_64(const Arguments* a) { return run<double, double, 4>(*a); }

int64_t gram_split_of(int64_t programs, int64_t rows, int64_t tile_bytes, int64_t slots) {
  return gram_split(programs, rows, tile_bytes, slots);
}
int lower_tile_row(int64_t tile) { return lower_tile(tile).row; }
int lower_tile_column(int64_t tile) { return lower_tile(tile).column; }
}
