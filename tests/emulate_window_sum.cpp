// csrc/cuda/window_sum.cuh on the CPU, for tests/test_window_sum_cuda.py, which compiles this file
// with `-include emulate_cuda.h`.
#include <limits>

// A float32 that counts how often it is read.
struct Counted {
  float value;
};
int64_t reads = 0;
float value_of(Counted v) { return ++reads, v.value; }

#include "../csrc/cuda/window_sum.cuh"

using namespace kfac_fast;

namespace {

struct Arguments {
  const void* x;
  int64_t axes;
  const int64_t *sizes, *strides;  // of x
  const int64_t *plan, *cells, *taps;
  int64_t groups, bias;
  double alpha, beta;
  void* out;
  int64_t blocks, most_bytes, descending;
};

// What was chosen; in bytes -1 if a block wrote beyond its shared memory.
struct Choice {
  int64_t vector, channels, bundles, pieces, row_parts, walkers, chunks, lanes, bytes, reads;
};

template <typename In, typename Acc, int kVector>
bool launch(const WindowInput<In>& in, const WindowTiling& tiling, const WindowOutput<Acc>& out,
            bool descending) {
  const dim3 grid{static_cast<unsigned>(tiling.blocks())};
  const dim3 block{static_cast<unsigned>(tiling.lanes), static_cast<unsigned>(tiling.walkers)};
  return Emulator::instance().run(
      grid, block, descending, [&] { window_sum_kernel<In, Acc, kVector>(in, tiling, out); },
      tiling.bytes);
}

template <typename In, typename Acc>
Choice run(const Arguments& a) {
  const WindowShape shape = window_shape(a.axes, a.sizes, a.strides, a.cells, a.taps);
  WindowOutput<Acc> out{static_cast<Acc*>(a.out), nullptr, static_cast<Acc>(a.alpha),
                        static_cast<Acc>(a.beta), a.groups};
  out.bias = a.bias;
  out.width = shape.channels / a.groups * shape.taps() + a.bias;
  Emulator& device = Emulator::instance();
  auto finish = [&](int64_t parts) {
    device.run({3}, {64}, a.descending,
               [&] { window_finish_kernel<Acc>(out, a.plan, shape.batch, parts); });
  };
  if (shape.empty()) {
    finish(0);
    return {};
  }

  const WindowInput<In> in{static_cast<const In*>(a.x), a.plan, shape};
  const WindowLimits limits{sizeof(In), sizeof(Acc), a.blocks, a.most_bytes};
  const WindowTiling tiling = window_tiling(shape, reinterpret_cast<uintptr_t>(a.x), limits);
  Choice choice{
      tiling.vector,  tiling.channels.value, tiling.bundles, tiling.pieces, tiling.row_parts,
      tiling.walkers, tiling.chunks,         tiling.lanes,   tiling.bytes,  0};
  if (tiling.bytes > limits.most_bytes) return choice;
  std::vector<Acc> parts(
      tiling.parts() > 1 ? tiling.parts() * shape.batch * shape.channels * shape.taps() : 0,
      std::numeric_limits<Acc>::quiet_NaN());
  if (!parts.empty()) out.parts = parts.data();
  reads = 0;
  bool inside = true;
  switch (tiling.vector) {
    case 8:
      if constexpr (sizeof(In) == 2) inside = launch<In, Acc, 8>(in, tiling, out, a.descending);
      break;
    case 4:
      if constexpr (sizeof(In) <= 4) inside = launch<In, Acc, 4>(in, tiling, out, a.descending);
      break;
    case 2:
      inside = launch<In, Acc, 2>(in, tiling, out, a.descending);
      break;
    default:
      inside = launch<In, Acc, 1>(in, tiling, out, a.descending);
  }
  if (!parts.empty()) finish(tiling.parts());
  if (!inside) choice.bytes = -1;
  choice.reads = reads;
  return choice;
}

}  // namespace

extern "C" {

void window_sum_float(const Arguments* a, Choice* choice) { *choice = run<Counted, float>(*a); }
void window_sum_double(const Arguments* a, Choice* choice) { *choice = run<double, double>(*a); }
void window_sum_bfloat16(const Arguments* a, Choice* choice) {
  *choice = run<__nv_bfloat16, float>(*a);
}
void window_sum_half(const Arguments* a, Choice* choice) { *choice = run<__half, float>(*a); }

int quotient(int numerator, int divisor) { return Divisor(divisor).quotient(numerator); }
}
