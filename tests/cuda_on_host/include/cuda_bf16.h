// bfloat16 and its conversions, rounding to nearest even; every NaN becomes the one that the hardware gives.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7FFF};
  const unsigned bits = __float_as_uint(x), half_less_even = 0x7FFF + (bits >> 16 & 1);
  return {static_cast<uint16_t>((bits + half_less_even) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
