#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace kfac_fast {

struct FreeScratch {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
using Scratch = std::unique_ptr<T[], FreeScratch>;

// Bytes of it that an operator on the CPU may take beside an input and a result of this many.
inline int64_t most_scratch_bytes(int64_t input, int64_t result) {
  constexpr int64_t always_allowed = 1 << 20;
  return 3 * input / 2 + result + always_allowed;
}

// Uninitialised memory for `count` numbers that begins on a cache line.
template <typename T>
Scratch<T> make_scratch(int64_t count) {
  constexpr int64_t line = 64;
  if (count > (INT64_MAX - line) / static_cast<int64_t>(sizeof(T))) throw std::bad_alloc();
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) / line + 1) * line;
  void* memory = std::aligned_alloc(line, bytes);
  if (!memory) throw std::bad_alloc();
  return Scratch<T>(static_cast<T*>(memory));
}

}  // namespace kfac_fast
