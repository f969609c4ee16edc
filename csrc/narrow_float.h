#pragma once
// The 16-bit floating types as they lie in memory. Their conversions have no branches, so that the
// compiler turns loops over them into vector code.

#include <bit>
#include <cstdint>

namespace kfac_fast {

struct BFloat16 {
  uint16_t bits;

  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;

  // Exponents of Half and float differ by 112; the product also normalises the subnormals.
  operator float() const {
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t infinite = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | infinite | sign);
  }
};

}  // namespace kfac_fast
