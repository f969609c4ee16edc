#pragma once
// Window sums: of every plane (example, channel) of x, for every tap of the kernel, the sum of the
// pixels that the tap reads, each as often as it reads it. The plan of kfac_fast/conv.py names the
// cell of each pixel of an axis, which are the pixels that all taps read equally often, and how
// often. No torch headers, so that any nvcc compiles it and a C++ compiler can emulate it.
//
//   row      a position along the first spatial axes
//   column   an element of a row: a pixel along the last axis, of one of the channels that lie
//            interleaved there
//   bundle   the planes that share their rows: one where the pixels of a plane are neighbours in
//            memory (NCHW), some channels where those are (channels_last)
//   slot     sums of columns, one for each cell of the rows
//
// x is read once, in vectors of columns. A thread walks down some rows with its columns and adds up
// in registers what lies in the same cell of the rows. Then the thread block turns its slots, in
// shared memory, into the sums of the taps, axis by axis. If several blocks share a plane they
// store parts, which a second kernel adds. No sum depends on the order in which blocks run.

#include "value.cuh"
#include "window_tiling.cuh"

namespace kfac_fast {

#ifdef __CUDACC__
__device__ inline void* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}
#endif

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

template <typename In>
struct WindowInput {
  const In* x;
  const int64_t* plan;
  WindowShape shape;

  // The cell of a pixel, -1 if no tap reads it.
  __device__ int cell(const WindowAxis& axis, int64_t pixel) const {
    return axis.plan_cells < 0 ? 0 : static_cast<int>(plan[axis.plan_cells + pixel]);
  }
  __device__ int weight(const WindowAxis& axis, int tap, int cell) const {
    return static_cast<int>(plan[axis.plan_weights + int64_t{tap} * axis.cells + cell]);
  }
};

template <typename Acc>
struct WindowOutput {
  Acc* out;              // [N, groups, width]
  Acc* parts = nullptr;  // [parts, N, C, taps]; null if the sums go to out
  Acc alpha, beta;
  int64_t groups, width;  // of a group: channels x taps and the bias entry
  bool bias;

  __device__ void accumulate(int64_t at, Acc sum) const {
    Acc value = alpha * sum;
    if (beta != 0) value += beta * out[at];
    out[at] = value;
  }
};

struct WindowBlock {
  int64_t example;  // of the first bundle
  int bundle;       // the first one in its example
  int bundles;
  int64_t first_row;  // of the first walker
  int first_pixel, pixels;
  int part;

  __device__ WindowBlock(const WindowShape& shape, const WindowTiling& tiling) {
    part = tiling.grid.quotient(blockIdx.x);
    const int64_t first = (blockIdx.x - part * tiling.grid.value) * int64_t{tiling.bundles};
    example = first / tiling.bundles_each.value;
    bundle = static_cast<int>(first - example * tiling.bundles_each.value);
    const int64_t left = shape.batch * tiling.bundles_each.value - first;
    bundles = static_cast<int>(min(int64_t{tiling.bundles}, left));
    const int row_part = part / tiling.pieces;
    first_row = int64_t{row_part} * tiling.rows_each * tiling.walkers;
    first_pixel = (part - row_part * tiling.pieces) * tiling.pixels;
    pixels = min(tiling.pixels, shape.axis[2].size - first_pixel);
  }
};

struct WindowPlane {
  int64_t example;
  int channel;

  // The first one of a bundle of the thread block.
  __device__ WindowPlane(const WindowTiling& tiling, const WindowBlock& block, int bundle) {
    const int n = block.bundle + bundle, later = tiling.bundles_each.quotient(n);
    example = block.example + later;
    channel = (n - later * tiling.bundles_each.value) * tiling.channels.value;
  }
};

// A thread's vectors of columns.
struct WindowColumns {
  int64_t offset;  // of the first one in x
  int place;       // and in a slot
  int chunks;      // that exist

  __device__ WindowColumns(const WindowShape& shape, const WindowTiling& tiling,
                           const WindowBlock& block) {
    const int column = threadIdx.x * tiling.vector;
    const int bundle = tiling.columns.quotient(column);
    const int inside = column - bundle * tiling.columns.value;
    const int pixel = tiling.channels.quotient(inside);
    const WindowPlane first(tiling, block, bundle);
    const int channel = first.channel + inside - pixel * tiling.channels.value;
    place = bundle * tiling.bundle_pitch + inside;
    offset = first.example * shape.batch_stride + channel * shape.channel_stride +
             (block.first_pixel + pixel) * shape.axis[2].stride;
    chunks = 0;
    if (channel >= shape.channels) return;
    while (chunks < tiling.chunks && bundle + chunks * tiling.chunk_bundles < block.bundles &&
           pixel + chunks * tiling.chunk_pixels < block.pixels) {
      ++chunks;
    }
  }
};

// A tap that does not read a value has a weight of 0, which must not make NaN of infinity.
template <typename Acc>
__device__ void window_add(int weight, Acc value, Acc& sum) {
  sum = weight ? sum + static_cast<Acc>(weight) * value : sum;
}

// A row, for one vector of each thread.
struct alignas(16) WindowRow {
  int64_t offset;  // in x
  int place;       // of its slot; -1 if no tap reads it, or there is none
};

// Lists the rows of all walkers of the thread block, for each chunk.
template <typename In>
__device__ void window_list_rows(const WindowInput<In>& in, const WindowTiling& tiling,
                                 const WindowBlock& block, WindowRow* list) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const WindowAxis &outer = in.shape.axis[0], &inner = in.shape.axis[1];
  const int64_t left = in.shape.rows() - block.first_row;
  const int first_y = static_cast<int>(block.first_row / inner.size);
  const int first_z = static_cast<int>(block.first_row - int64_t{first_y} * inner.size);
  const int rows = tiling.rows_each * tiling.walkers;
#pragma unroll 1
  for (int i = thread; i < rows; i += threads) {
    const int more = tiling.row_length.quotient(first_z + i), y = first_y + more;
    const int z = first_z + i - more * inner.size;
    const int outer_cell = i < left ? in.cell(outer, y) : -1;
    const int inner_cell = i < left ? in.cell(inner, z) : -1;
    const bool read = outer_cell >= 0 && inner_cell >= 0;
    const int place = (outer_cell * inner.cells + inner_cell) * tiling.slot_pitch;
    for (int chunk = 0; chunk < tiling.chunks; ++chunk) {
      list[chunk * rows + i] = {y * outer.stride + z * inner.stride + chunk * tiling.chunk_stride,
                                read ? place + chunk * tiling.chunk_pitch : -1};
    }
  }
}

// Sums the rows of a walker into its slots.
template <typename In, typename Acc, int kVector>
__device__ void window_walk(const WindowInput<In>& in, const WindowTiling& tiling,
                            const WindowBlock& block, const WindowRow* list, Acc* slots) {
  using Vector = Pack<In, kVector>;
  constexpr int kTogether = kVector * sizeof(Acc) > 16 ? 16 / sizeof(Acc) : kVector;
  using Sums = Pack<Acc, kTogether>;
  constexpr int kFlight = sizeof(Vector) == 16 ? 4 : 8;  // loads under way
  const WindowColumns columns(in.shape, tiling, block);
  const In* const x = in.x + columns.offset;
  const int walker = threadIdx.y, count = columns.chunks * tiling.rows_each;
  list += walker * tiling.rows_each;
  slots += walker * tiling.row_cells.value * tiling.slot_pitch + columns.place;

  for (int chunk = 0; chunk < columns.chunks; ++chunk) {
#pragma unroll 1
    for (int cell = 0; cell < tiling.row_cells.value; ++cell) {
      Acc* slot = slots + chunk * tiling.chunk_pitch + cell * tiling.slot_pitch;
#pragma unroll
      for (int v = 0; v < kVector; v += kTogether) *reinterpret_cast<Sums*>(slot + v) = Sums{};
    }
  }

  Acc sum[kVector] = {};
  int open = -1;  // place of the slot that the sum is for
  auto put_away = [&] {
    if (open < 0) return;
#pragma unroll
    for (int v = 0; v < kVector; v += kTogether) {
      Sums sums = *reinterpret_cast<Sums*>(slots + open + v);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        sums.value[i] += sum[v + i];
        sum[v + i] = 0;
      }
      *reinterpret_cast<Sums*>(slots + open + v) = sums;
    }
  };
#pragma unroll 1
  for (int first = 0; first < count; first += kFlight) {
    int place[kFlight];
    Vector loaded[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      place[i] = first + i < count ? list[first + i].place : -1;
      if (place[i] < 0) continue;
      loaded[i] = *reinterpret_cast<const Vector*>(x + list[first + i].offset);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (place[i] < 0) continue;
      if (place[i] != open) {
        put_away();
        open = place[i];
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] += value_of(loaded[i].value[v]);
    }
    if ((first + kFlight) % kWindowChain == 0) put_away();
  }
  put_away();
}

// Pixels of the last axis to its taps: slots [walkers, row_cells, columns] to sums
// [walkers, segments, row_cells, taps, planes].
template <typename In, typename Acc>
__device__ void window_columns_to_taps(const WindowInput<In>& in, const WindowTiling& tiling,
                                       const WindowBlock& block, const Acc* slots, Acc* sums) {
  constexpr int kPixels = 4;  // at once
  const WindowAxis& axis = in.shape.axis[2];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int channels = tiling.channels.value;
  const int items = tiling.walkers * tiling.segments.value * tiling.row_cells.value *
                    tiling.tap_blocks.value * tiling.planes.value;
#pragma unroll 1
  for (int item = thread; item < items; item += threads) {
    // From the fastest index: plane, taps, cell of the row, segment, walker.
    int rest = tiling.planes.quotient(item);
    const int plane = item - rest * tiling.planes.value;
    const int slot = tiling.tap_blocks.quotient(rest);  // of all segments
    const int first_tap = (rest - slot * tiling.tap_blocks.value) * kWindowTapsTogether;
    rest = tiling.row_cells.quotient(slot);
    const int row_cell = slot - rest * tiling.row_cells.value;
    const int walker = tiling.segments.quotient(rest);
    const int segment = rest - walker * tiling.segments.value;
    const int bundle = tiling.channels.quotient(plane);
    const Acc* column = slots + (walker * tiling.row_cells.value + row_cell) * tiling.slot_pitch +
                        bundle * tiling.bundle_pitch + plane - bundle * channels;
    const int begin = segment * kWindowSegment, end = min(begin + kWindowSegment, block.pixels);
    Acc sum[kWindowTapsTogether] = {};
#pragma unroll 1
    for (int pixel = begin; pixel < end; pixel += kPixels) {
      int cell[kPixels], weight[kPixels][kWindowTapsTogether];
      Acc value[kPixels];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const bool exists = pixel + p < end;
        cell[p] = exists ? in.cell(axis, block.first_pixel + pixel + p) : -1;
        value[p] = exists ? column[(pixel + p) * channels] : Acc(0);
      }
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
#pragma unroll
        for (int i = 0; i < kWindowTapsTogether; ++i) {
          const bool reads = cell[p] >= 0 && first_tap + i < axis.taps;
          weight[p][i] = reads ? in.weight(axis, first_tap + i, cell[p]) : 0;
        }
      }
#pragma unroll
      for (int i = 0; i < kWindowTapsTogether; ++i) {
        Acc some = 0;
#pragma unroll
        for (int p = 0; p < kPixels; ++p) window_add(weight[p][i], value[p], some);
        sum[i] += some;
      }
    }
    Acc* target = sums + (slot * axis.taps + first_tap) * tiling.plane_pitch + plane;
#pragma unroll
    for (int i = 0; i < kWindowTapsTogether; ++i) {
      if (first_tap + i < axis.taps) target[i * tiling.plane_pitch] = sum[i];
    }
  }
}

// Adds up `count` arrays that follow each other.
template <typename Acc>
__device__ void window_add_arrays(const Acc* from, int count, int size, Acc* to) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int i = thread; i < size; i += threads) {
    Acc sum = 0;
    for (int n = 0; n < count; ++n) sum += from[n * size + i];
    to[i] = sum;
  }
}

// Cells of an axis to its taps: [before, cells, after] to [before, taps, after].
template <typename In, typename Acc>
__device__ void window_cells_to_taps(const WindowInput<In>& in, const WindowAxis& axis,
                                     const WindowPass& pass, const Acc* from, Acc* to) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int after = pass.after.value, taps = pass.taps.value;
  for (int item = thread; item < pass.before * taps * after; item += threads) {
    const int with_tap = pass.after.quotient(item), before = pass.taps.quotient(with_tap);
    const int tap = with_tap - before * taps, i = item - with_tap * after;
    Acc sum = 0;
    for (int cell = 0; cell < axis.cells; ++cell) {
      window_add(in.weight(axis, tap, cell), from[(before * axis.cells + cell) * after + i], sum);
    }
    to[item] = sum;
  }
}

// Writes sums [taps, planes], the taps in the order of the shape's axes.
template <typename In, typename Acc>
__device__ void window_store(const WindowInput<In>& in, const WindowTiling& tiling,
                             const WindowBlock& block, const Acc* sums,
                             const WindowOutput<Acc>& out) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const WindowShape& shape = in.shape;
  const int taps = tiling.taps.value, group_channels = shape.channels / out.groups;
  for (int item = thread; item < tiling.planes.value * taps; item += threads) {
    const int plane = tiling.taps.quotient(item), tap = item - plane * taps;
    const int bundle = tiling.channels.quotient(plane);
    const WindowPlane first(tiling, block, bundle);
    const int channel = first.channel + plane - bundle * tiling.channels.value;
    if (bundle >= block.bundles || channel >= shape.channels) continue;
    const int rows = tiling.last_taps.quotient(tap), k2 = tap - rows * shape.axis[2].taps;
    const int k0 = tiling.pass[1].taps.quotient(rows), k1 = rows - k0 * shape.axis[1].taps;
    const int64_t at = (first.example * shape.channels + channel) * taps +
                       k0 * shape.axis[0].out_step + k1 * shape.axis[1].out_step +
                       k2 * shape.axis[2].out_step;
    const Acc sum = sums[tap * tiling.plane_pitch + plane];
    if (out.parts) {
      out.parts[block.part * shape.batch * shape.channels * taps + at] = sum;
      continue;
    }
    const int group = channel / group_channels;
    const int64_t row = first.example * out.groups + group;
    out.accumulate(out.bias ? at + row : at, sum);
    if (out.bias && tap == 0 && channel == (group + 1) * group_channels - 1) {
      out.accumulate((row + 1) * out.width - 1, static_cast<Acc>(in.plan[0]));
    }
  }
}

// Grid tiling.blocks(), block (tiling.lanes, tiling.walkers), tiling.bytes of shared memory.
template <typename In, typename Acc, int kVector>
__global__ void __launch_bounds__(kWindowThreads)
    window_sum_kernel(WindowInput<In> in, WindowTiling tiling, WindowOutput<Acc> out) {
  Acc* from = static_cast<Acc*>(dynamic_shared());
  Acc* to = from + tiling.first_room;
  auto exchange = [&] {
    Acc* const written = to;
    to = from;
    from = written;
  };
  const WindowBlock block(in.shape, tiling);
  WindowRow* const list = reinterpret_cast<WindowRow*>(to);
  window_list_rows(in, tiling, block, list);
  __syncthreads();
  window_walk<In, Acc, kVector>(in, tiling, block, list, from);
  __syncthreads();
  window_columns_to_taps(in, tiling, block, from, to);
  exchange();
  __syncthreads();
  const int copies = tiling.walkers * tiling.segments.value;
  if (copies > 1) {
    const int size = tiling.row_cells.value * in.shape.axis[2].taps * tiling.plane_pitch;
    window_add_arrays(from, copies, size, to);
    exchange();
    __syncthreads();
  }
  for (int i = 1; i >= 0; --i) {
    if (in.shape.axis[i].plan_cells < 0) continue;
    window_cells_to_taps(in, in.shape.axis[i], tiling.pass[i], from, to);
    exchange();
    __syncthreads();
  }
  window_store(in, tiling, block, from, out);
}

// out <- beta out + alpha sum of the parts, which may be none; a grid of any size.
template <typename Acc>
__global__ void window_finish_kernel(WindowOutput<Acc> out, const int64_t* outputs, int64_t batch,
                                     int64_t parts) {
  const int64_t size = batch * out.groups * out.width, stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t part_size = out.bias ? size - batch * out.groups : size;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += stride) {
    const int64_t row = out.bias ? i / out.width : 0;
    Acc sum = 0;
    if (out.bias && i == (row + 1) * out.width - 1) {
      sum = static_cast<Acc>(*outputs);
    } else {
      for (int64_t part = 0; part < parts; ++part) sum += out.parts[part * part_size + i - row];
    }
    out.accumulate(i, sum);
  }
}

}  // namespace kfac_fast
