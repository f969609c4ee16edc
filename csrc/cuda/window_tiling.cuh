#pragma once
// How a window sum is cut into thread blocks: what the host tells window_sum.cuh, whose words are
// explained there. No torch headers.

#include <algorithm>
#include <cstdint>

namespace kfac_fast {

constexpr int kWindowThreads = 256;
constexpr int kWindowBundleBytes = 64;   // of interleaved channels: what memory delivers at once
constexpr int kWindowSegment = 32;       // pixels of a row that a thread turns into taps
constexpr int kWindowTapsTogether = 4;   // that it sums in one pass over them
constexpr int kWindowChain = 16;         // values that a float32 sum takes in before it is put away
constexpr int kWindowLongestWalk = 256;  // rows of a walker

inline int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

// Quotients of numerators below 2^31 without dividing.
class Divisor {
 public:
  int value = 1;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<int>(divisor)) {
    while (uint64_t{1} << shift_ < static_cast<uint64_t>(divisor)) ++shift_;
    const uint64_t power = uint64_t{1} << shift_;
    multiplier_ = static_cast<uint32_t>(((power - divisor) << 32) / divisor + 1);
  }

  __host__ __device__ int quotient(int numerator) const {
    const uint32_t n = static_cast<uint32_t>(numerator);
    return static_cast<int>((static_cast<uint32_t>(uint64_t{n} * multiplier_ >> 32) + n) >> shift_);
  }

 private:
  uint32_t multiplier_ = 1, shift_ = 0;
};

struct WindowAxis {
  int size = 1, cells = 1, taps = 1;
  int64_t stride = 0;
  int64_t out_step = 0;  // from the sum of a tap to that of the next one
  // Where the cells of its pixels and the weights begin in the plan; -1: x has no such axis.
  int64_t plan_cells = -1, plan_weights = -1;
};

struct WindowShape {
  int64_t batch, batch_stride;
  int channels;
  int64_t channel_stride;
  WindowAxis axis[3];  // rows lie along the first two, columns along the last

  __host__ __device__ int64_t rows() const { return int64_t{axis[0].size} * axis[1].size; }
  int64_t row_cells() const { return int64_t{axis[0].cells} * axis[1].cells; }
  // Whether no tap reads anything.
  bool empty() const { return batch * channels * rows() * row_cells() * axis[2].cells == 0; }
  int64_t taps() const { return int64_t{axis[0].taps} * axis[1].taps * axis[2].taps; }
};

// Sizes and strides of x [N, C, *spatial]; cells and taps of each spatial axis.
inline WindowShape window_shape(int axes, const int64_t* sizes, const int64_t* strides,
                                const int64_t* cells, const int64_t* taps) {
  WindowShape shape{sizes[0], strides[0], static_cast<int>(sizes[1]), strides[1], {}};
  WindowAxis* const first = shape.axis + 3 - axes;
  int64_t at = 1;  // the plan begins with the number of output positions
  for (int i = 0; i < axes; ++i) {
    constexpr int header = 3;
    first[i].size = static_cast<int>(sizes[2 + i]);
    first[i].cells = static_cast<int>(cells[i]);
    first[i].taps = static_cast<int>(taps[i]);
    first[i].stride = strides[2 + i];
    first[i].plan_cells = at + header;
    first[i].plan_weights = first[i].plan_cells + sizes[2 + i];
    at = first[i].plan_weights + taps[i] * cells[i];
  }
  int64_t out_step = 1;
  for (int i = 2; i >= 0; out_step *= shape.axis[i--].taps) shape.axis[i].out_step = out_step;
  // The columns are to be neighbours in memory.
  WindowAxis* columns = shape.axis + 2;
  for (WindowAxis* axis = shape.axis + 1; axis >= first; --axis) {
    if (axis->size > 1 && (columns->size == 1 || axis->stride < columns->stride)) columns = axis;
  }
  std::rotate(columns, columns + 1, shape.axis + 3);
  return shape;
}

// Turns the sums of an axis' cells into those of its taps.
struct WindowPass {
  int before = 1;  // entries along the axes that vary more slowly
  Divisor taps, after;
};

struct WindowTiling {
  int vector = 1;        // columns that a thread reads at once
  Divisor channels;      // of a bundle
  int pixels = 1;        // of a bundle, in a piece of the last axis
  Divisor columns;       // of a bundle: channels x pixels
  Divisor bundles_each;  // of an example
  int bundles = 1;       // of a thread block
  int pieces = 1;        // that the last axis is cut into
  int row_parts = 1;     // that the rows are cut into, each for a thread block
  int lanes = 1;         // the block's threads: lanes along the columns,
  int walkers = 1;       // times walkers, each with rows of its own
  // A thread reads a few vectors of a row, each this far from the one before.
  int chunks = 1, chunk_bundles = 0, chunk_pixels = 0;
  int64_t chunk_stride = 0;  // in x
  int chunk_pitch = 0;       // in a slot
  Divisor grid;              // thread blocks for one piece and one part of the rows
  int rows_each = 0;         // of a walker
  Divisor row_length;        // rows along the second axis
  int bundle_pitch = 1;      // in shared memory, where the columns of a bundle follow each other,
  int slot_pitch = 1;        // and those of all bundles
  Divisor segments;          // of a piece
  Divisor tap_blocks;        // of the last axis
  Divisor row_cells;
  Divisor planes;  // of a thread block
  int plane_pitch = 1;
  Divisor taps, last_taps;
  WindowPass pass[2];
  int64_t first_room = 0;  // entries of the first half of the shared memory
  int64_t bytes = 0;       // of shared memory

  int64_t parts() const { return int64_t{pieces} * row_parts; }
  int64_t blocks() const { return grid.value * parts(); }
};

struct WindowLimits {
  int element_bytes, sum_bytes;
  int64_t blocks;      // that fill the device
  int64_t most_bytes;  // of shared memory that a thread block may have
};

// Whether channels, not pixels, are neighbours in memory.
inline bool window_interleaved(const WindowShape& shape) {
  const WindowAxis& last = shape.axis[2];
  return shape.channels > 1 && (last.size == 1 || shape.channel_stride < last.stride);
}

// The widest vector that x's strides and address allow, in elements.
inline int window_vector(const WindowShape& shape, uintptr_t address, int element_bytes) {
  const WindowAxis& last = shape.axis[2];
  const bool interleaved = window_interleaved(shape);
  // A whole row is one stretch of memory if a bundle has all channels and nothing lies between.
  const bool whole = interleaved && last.stride == shape.channels &&
                     shape.channels <= kWindowBundleBytes / element_bytes;
  auto fits = [&](int64_t vector) {
    if (address % (vector * element_bytes)) return false;
    auto even = [&](int64_t size, int64_t stride) { return size == 1 || stride % vector == 0; };
    if (!even(shape.batch, shape.batch_stride)) return false;
    for (int i = 0; i < 2; ++i) {
      if (!even(shape.axis[i].size, shape.axis[i].stride)) return false;
    }
    if (!interleaved) {
      return last.stride == 1 && last.size % vector == 0 &&
             even(shape.channels, shape.channel_stride);
    }
    if (shape.channel_stride != 1) return false;
    if (shape.channels % vector == 0 && even(last.size, last.stride)) return true;
    return whole && int64_t{shape.channels} * last.size % vector == 0;
  };
  int vector = 16 / element_bytes;
  while (vector > 1 && !fits(vector)) vector /= 2;
  return vector;
}

// Fills in what follows from the choices: pitches, passes, room.
inline void window_room(const WindowShape& shape, int sum_bytes, WindowTiling& tiling) {
  const WindowAxis *axis = shape.axis, &last = axis[2];
  auto divisor = [](int64_t value) { return Divisor(value); };
  const int64_t columns = int64_t{tiling.channels.value} * tiling.pixels;
  const int64_t planes = int64_t{tiling.bundles} * tiling.channels.value;
  // The pitches keep vectors aligned and lanes that read different bundles, or planes, in different
  // banks.
  const int aligned = std::min<int>(tiling.vector, 16 / sum_bytes);
  const int64_t vectors = parts_of(columns, aligned);
  tiling.bundle_pitch = (tiling.bundles > 1 ? vectors | 1 : vectors) * aligned;
  tiling.slot_pitch = tiling.bundles * tiling.bundle_pitch;
  tiling.chunk_pitch =
      tiling.chunk_bundles * tiling.bundle_pitch + tiling.chunk_pixels * tiling.channels.value;
  tiling.plane_pitch = planes | 1;

  tiling.columns = divisor(columns);
  tiling.segments = divisor(parts_of(tiling.pixels, kWindowSegment));
  tiling.tap_blocks = divisor(parts_of(last.taps, kWindowTapsTogether));
  tiling.row_cells = divisor(shape.row_cells());
  tiling.row_length = divisor(axis[1].size);
  tiling.planes = divisor(planes);
  tiling.taps = divisor(shape.taps());
  tiling.last_taps = divisor(last.taps);
  const int64_t row = int64_t{last.taps} * tiling.plane_pitch;
  tiling.pass[1] = {axis[0].cells, divisor(axis[1].taps), divisor(row)};
  tiling.pass[0] = {1, divisor(axis[0].taps), divisor(axis[1].taps * row)};

  const int64_t slots = int64_t{tiling.walkers} * shape.row_cells() * tiling.slot_pitch;
  const int64_t sums = shape.row_cells() * row;
  const int64_t later = std::max(
      {sums, axis[0].cells * axis[1].taps * row, int64_t{axis[0].taps} * axis[1].taps * row});
  const int64_t align = 16 / sum_bytes;
  tiling.first_room = parts_of(std::max(slots, later), align) * align;
  constexpr int listed_row = 16;
  const int64_t listed = int64_t{tiling.rows_each} * tiling.walkers * tiling.chunks;
  const int64_t second = std::max(
      {listed * listed_row / sum_bytes, tiling.walkers * tiling.segments.value * sums, later});
  tiling.bytes = (tiling.first_room + second) * sum_bytes;
}

// The tiling for blocks of up to `threads` threads and bundles of up to `most_channels`; without
// bytes if there is none.
inline WindowTiling window_tiling(const WindowShape& shape, int vector, int threads,
                                  int64_t most_channels, const WindowLimits& limits) {
  constexpr int64_t loads = 4;  // that a thread should have under way
  constexpr int most_walkers = 8, warp = 32;
  WindowTiling tiling;
  tiling.vector = vector;
  const int64_t rows = shape.rows(), last = shape.axis[2].size;
  int64_t channels = std::min<int64_t>(most_channels, shape.channels);
  if (channels < shape.channels) {
    if (shape.channels % vector) return tiling;  // only whole rows are made of such vectors
    channels = parts_of(shape.channels, parts_of(shape.channels, channels));
    if (window_interleaved(shape)) channels = parts_of(channels, vector) * vector;
  }
  if (!window_interleaved(shape)) channels = 1;
  const int64_t each = parts_of(shape.channels, channels), bundles = shape.batch * each;
  const int64_t vectors = channels * last / vector;  // of a row
  tiling.channels = Divisor(channels);
  tiling.bundles_each = Divisor(each);

  // Several vectors of a row where there are too few rows, if that leaves enough blocks.
  int64_t chunks = 1;
  while (chunks * rows < loads && bundles * vectors >= 2 * chunks * threads * limits.blocks) {
    chunks *= 2;
  }
  // To turn slots into taps should not take longer than to fill them.
  const int64_t least_rows = std::max(loads, shape.row_cells());
  int64_t walkers = 1;
  if (vectors > threads) {
    int64_t step = 1;  // pixels of whole vectors
    while (step * channels % vector) step *= 2;
    const int64_t most_pixels = threads * vector / channels / step * step;
    if (most_pixels == 0) return tiling;
    const int64_t pieces = parts_of(last, most_pixels * chunks);
    const int64_t pixels = parts_of(parts_of(last, pieces * chunks), step) * step;
    tiling.lanes = pixels * channels / vector;
    tiling.pixels = pixels * chunks;
    tiling.pieces = parts_of(last, tiling.pixels);
    tiling.chunk_pixels = pixels;
    tiling.chunk_stride = pixels * shape.axis[2].stride;
  } else {
    // The next vectors are those of other bundles, which must lie evenly in memory.
    const int64_t stride = each == 1 ? shape.batch_stride : channels * shape.channel_stride;
    const bool complete = shape.channels % channels == 0;
    const bool even =
        each == 1 || (complete && (shape.batch == 1 || shape.batch_stride == each * stride));
    if (!even) chunks = 1;
    auto together = [&](int64_t n) { return std::min(bundles, threads / n / vectors * chunks); };
    while (parts_of(bundles, together(walkers)) < limits.blocks && walkers < most_walkers &&
           2 * walkers * least_rows <= rows && together(2 * walkers) > 0) {
      walkers *= 2;
    }
    // No more than it takes to fill the device, but whole warps.
    const int64_t enough = std::max(parts_of(bundles, limits.blocks), parts_of(warp, vectors));
    tiling.bundles = std::min(together(walkers), parts_of(enough, chunks) * chunks);
    tiling.lanes = parts_of(tiling.bundles, chunks) * vectors;
    tiling.pixels = last;
    tiling.chunk_bundles = parts_of(tiling.bundles, chunks);
    tiling.chunk_stride = tiling.chunk_bundles * stride;
  }
  tiling.chunks = chunks;
  tiling.walkers = walkers;
  tiling.grid = Divisor(parts_of(bundles, tiling.bundles));

  const int64_t fill = limits.blocks / tiling.blocks();
  const int64_t most = std::max<int64_t>(1, rows / (walkers * least_rows));
  const int64_t least = parts_of(rows, walkers * kWindowLongestWalk);
  tiling.row_parts = std::max(least, std::clamp<int64_t>(fill, 1, most));
  tiling.rows_each = parts_of(rows, walkers * tiling.row_parts);
  window_room(shape, limits.sum_bytes, tiling);
  return tiling;
}

// The first tiling that fits: with so little shared memory that an SM holds several blocks, then
// with all of it; with as wide vectors, as many channels, as many threads as possible, in this
// order. Its bytes are above the limit if none fits: that takes a kernel of some 20000 taps.
inline WindowTiling window_tiling(const WindowShape& shape, uintptr_t address,
                                  const WindowLimits& limits) {
  const int64_t usual_bytes = std::min<int64_t>(48 * 1024, limits.most_bytes);
  constexpr int usual_threads = 64;
  const int most_channels = kWindowBundleBytes / limits.element_bytes;
  const int widest = window_vector(shape, address, limits.element_bytes);
  WindowTiling tiling;
  for (const bool usual : {true, false}) {
    const int64_t bytes = usual ? usual_bytes : limits.most_bytes;
    for (int vector = widest; vector >= 1; vector /= 2) {
      for (int channels = most_channels; channels >= vector; channels /= 2) {
        for (int n = kWindowThreads; n >= (usual ? usual_threads : 1); n /= 2) {
          tiling = window_tiling(shape, vector, n, channels, limits);
          if (tiling.bytes && tiling.bytes <= bytes) return tiling;
        }
      }
    }
  }
  return tiling;
}

}  // namespace kfac_fast
