#pragma once
// Enough of CUDA C++ to run a kernel on the CPU. The threads of a block are fibers that take turns:
// each runs until its next __syncthreads(). A missing barrier shows, because the result then
// depends on the order of the turns, which the caller picks. mute_barrier() takes one away, so that
// a test can see that it is missed.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float value;
  std::copy_n(reinterpret_cast<const char*>(&bits), 4, reinterpret_cast<char*>(&value));
  return value;
}

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  float value = exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return v.bits >> 15 ? -value : value;
}

using std::fma;
using std::log;
using std::max;
using std::min;
using std::sqrt;

// As far from the root as a GPU's may be.
inline float rsqrt(float v) { return (1 + 0x1p-22f) / sqrt(v); }

class Emulator {
 public:
  // Blocks and turns in ascending or descending order. Dynamic shared memory begins as NaN.
  // False if a block wrote beyond it.
  bool run(dim3 grid, dim3 block, bool descending, const std::function<void()>& kernel,
           size_t shared_bytes = 0) {
    gridDim = grid, blockDim = block, kernel_ = &kernel;
    bool inside = true;
    const unsigned count = block.x * block.y * block.z;
    if (fibers_.size() < count) fibers_.resize(count);
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned n = 0; n < blocks; ++n) {
      const unsigned b = descending ? blocks - 1 - n : n;
      blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
      shared_.assign((shared_bytes + kBeyond) / sizeof(uint64_t) + 1, ~uint64_t{0});
      run_block(count, descending);
      const char* begin = reinterpret_cast<const char*>(shared_.data());
      inside = inside && std::all_of(begin + shared_bytes, begin + shared_bytes + kBeyond,
                                     [](char byte) { return byte == ~char{0}; });
    }
    return inside;
  }

  void* shared() { return shared_.data(); }

  void sync(std::string_view file, int line) {
    if (line == muted_line && file.ends_with(muted_file)) return;
    pause();
  }

  // Place of a __syncthreads() that does nothing.
  std::string muted_file;
  int muted_line = 0;

 private:
  static constexpr size_t kStack = 1 << 16, kBeyond = 1 << 12;

  // A fiber is begun by setcontext once, and runs the threads of one block after another: later
  // turns are jumps, for which the operating system is not asked.
  struct Fiber {
    jmp_buf place;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool begun = false;
    bool running;
  };

  static void enter() {
    for (Emulator& self = instance();;) {
      (*self.kernel_)();
      self.current_->running = false;
      self.pause();
    }
  }

  void pause() {
    if (_setjmp(current_->place) == 0) _longjmp(scheduler_, 1);
  }

  void resume() {
    if (_setjmp(scheduler_) != 0) return;
    if (current_->begun) _longjmp(current_->place, 1);
    current_->begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {current_->stack.get(), 0, kStack};
    makecontext(&context, enter, 0);
    setcontext(&context);
  }

  void run_block(unsigned count, bool descending) {
    for (unsigned t = 0; t < count; ++t) fibers_[t].running = true;
    for (bool any = true; any;) {
      any = false;
      for (unsigned turn = 0; turn < count; ++turn) {
        const unsigned t = descending ? count - 1 - turn : turn;
        current_ = &fibers_[t];
        if (!current_->running) continue;
        any = true;
        threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        resume();
      }
    }
  }

  std::vector<Fiber> fibers_;
  std::vector<uint64_t> shared_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  const std::function<void()>* kernel_ = nullptr;

 public:
  static Emulator& instance() {
    static Emulator emulator;
    return emulator;
  }
};

#define __syncthreads() Emulator::instance().sync(__FILE__, __LINE__)

inline void* dynamic_shared() { return Emulator::instance().shared(); }

extern "C" __attribute__((used)) inline void mute_barrier(const char* file, int line) {
  Emulator& emulator = Emulator::instance();
  emulator.muted_file = file, emulator.muted_line = line;
}
