#pragma once
// The 16-bit floating types as they lie in memory, and their conversions one by one; whole vectors
// of them are converted in tile_product_body.h.

#include <bit>
#include <cstdint>

namespace kfac_fast {

struct BFloat16 {
  uint16_t bits;

  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;

  // Exponents of Half and float differ by 112. Subnormals are counted, for as floats they would be
  // zero on threads that are set to flush such.
  operator float() const {
    const int32_t magnitude = bits & 0x7fff;
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t infinite = magnitude >= 0x7c00 ? 0x7f800000u : 0u;
    const uint32_t normal = (static_cast<uint32_t>(magnitude) << 13) + (112u << 23);
    const uint32_t subnormal = std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
    return std::bit_cast<float>((magnitude < 0x0400 ? subnormal : normal) | infinite | sign);
  }
};

}  // namespace kfac_fast
