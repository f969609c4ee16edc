#pragma once
// Enough of CUDA C++ to run a kernel on the CPU. The threads of a block are fibers that take turns:
// each runs until its next __syncthreads(). A missing barrier shows, because the result then
// depends on the order of the turns, which the caller picks.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

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

using std::min;
using std::sqrt;

class Emulator {
 public:
  // Turns in ascending or descending order of the threads.
  void run(dim3 grid, dim3 block, bool descending, const std::function<void()>& kernel) {
    gridDim = grid, blockDim = block, kernel_ = &kernel;
    const unsigned count = block.x * block.y * block.z;
    if (fibers_.size() < count) fibers_.resize(count);
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(count, descending);
      }
    }
  }

  void sync() { swapcontext(&current_->context, &scheduler_); }

 private:
  static constexpr size_t kStack = 1 << 16;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool running;
  };

  static void enter() {
    Emulator& self = instance();
    (*self.kernel_)();
    self.current_->running = false;
  }

  void run_block(unsigned count, bool descending) {
    for (unsigned t = 0; t < count; ++t) {
      Fiber& fiber = fibers_[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
      fiber.context.uc_link = &scheduler_;
      fiber.running = true;
      makecontext(&fiber.context, enter, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (unsigned turn = 0; turn < count; ++turn) {
        const unsigned t = descending ? count - 1 - turn : turn;
        current_ = &fibers_[t];
        if (!current_->running) continue;
        any = true;
        threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        swapcontext(&scheduler_, &current_->context);
      }
    }
  }

  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;

 public:
  static Emulator& instance() {
    static Emulator emulator;
    return emulator;
  }
};

inline void __syncthreads() { Emulator::instance().sync(); }
