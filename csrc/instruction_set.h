#pragma once
// Which vector instructions the CPU kernels use: the widest the processor has, unless a test or a
// benchmark asks for less. Kernels are compiled for every set and chosen at run time, so that one
// build serves every x86-64 machine; elsewhere only the portable form exists.

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

namespace kfac_fast {

enum class InstructionSet { portable, avx2, avx512 };

inline const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

// The sets this processor and its operating system can run, widest first.
inline std::vector<InstructionSet> supported_instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back(InstructionSet::avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(InstructionSet::avx2);
  }
#endif
  sets.push_back(InstructionSet::portable);
  return sets;
}

inline std::atomic<InstructionSet>& instruction_set_in_use() {
  static std::atomic<InstructionSet> set{supported_instruction_sets().front()};
  return set;
}

inline const char* instruction_set() { return name_of(instruction_set_in_use()); }

inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (InstructionSet set : supported_instruction_sets()) names.push_back(name_of(set));
  return names;
}

inline void use_instruction_set(const std::string& name) {
  std::string expected;
  for (InstructionSet set : supported_instruction_sets()) {
    if (name == name_of(set)) {
      instruction_set_in_use() = set;
      return;
    }
    expected += (expected.empty() ? "'" : ", '") + std::string(name_of(set)) + "'";
  }
  throw std::invalid_argument("use_instruction_set: name must be one of " + expected + ", got '" +
                              name + "'");
}

}  // namespace kfac_fast

// A set's own form of a function or template that compile_for_instruction_sets.h compiled for all.
#if defined(__x86_64__)
#define KFAC_FAST_FORM(set, ...)                         \
  ((set) == InstructionSet::avx512 ? avx512::__VA_ARGS__ \
   : (set) == InstructionSet::avx2 ? avx2::__VA_ARGS__   \
                                   : portable::__VA_ARGS__)
#else
#define KFAC_FAST_FORM(set, ...) (portable::__VA_ARGS__)
#endif
