// float16 and its conversions, rounding to nearest even; every NaN becomes the one that the hardware gives.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 0x1F, fraction = x.bits & 0x3FF;
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), __uint_as_float(sign));
  if (exponent == 0x1F) return __uint_as_float(sign | 0x7F800000 | fraction << 13);
  return __uint_as_float(sign | (exponent + 127 - 15) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7FFF};
  constexpr float kTooLarge = 65520;  // halfway between the largest finite number and the next
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000, bits = __float_as_uint(x) & 0x7FFFFFFF;
  unsigned magnitude;
  if (std::fabs(x) >= kTooLarge) {
    magnitude = 0x7C00;
  } else if (std::fabs(x) < 0x1p-14f) {
    magnitude = static_cast<unsigned>(std::nearbyint(std::fabs(x) * 0x1p24f));  // subnormal: a multiple of 2^−24
  } else {
    magnitude = (bits - ((127 - 15) << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
