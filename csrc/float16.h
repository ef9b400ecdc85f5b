// float16 and bfloat16, as they are stored, from and to float. Torch-free, and the same for every
// instruction set.
#pragma once

#include <cstdint>

#include "macros.h"

namespace crossent {

CROSSENT_INLINE float from_bfloat16(uint16_t h) { return bits<float>(uint32_t(h) << 16); }
CROSSENT_INLINE uint16_t to_bfloat16(float f) {  // nearest, ties to even; nan stays nan
  const uint32_t u = bits<uint32_t>(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return f != f ? uint16_t(0x7fc0) : uint16_t(rounded);
}
CROSSENT_INLINE float from_float16(uint16_t h) {  // exact, subnormals, inf and nan included
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const float scaled = bits<float>(uint32_t(h & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits<float>(bits<uint32_t>(scaled) | special | sign);
}
CROSSENT_INLINE uint16_t to_float16(float f) {  // nearest, ties to even
  const uint32_t u = bits<uint32_t>(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t odd = (a >> 13) & 1u;
  const uint32_t normal = (a + 0xc8000fffu + odd) >> 13;  // rebias by 2^-112, round
  const uint32_t small = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000u;
  const uint32_t finite = a < 0x38800000u ? small : normal;
  const uint32_t result = a > 0x7f800000u ? 0x7e00u : a >= 0x47800000u ? 0x7c00u : finite;
  return uint16_t(result | sign);
}

// Stored numbers that are read as floats.
struct BFloat16 {
  uint16_t stored;

  CROSSENT_INLINE operator float() const { return from_bfloat16(stored); }
};
struct Float16 {
  uint16_t stored;

  CROSSENT_INLINE operator float() const { return from_float16(stored); }
};

}  // namespace crossent
