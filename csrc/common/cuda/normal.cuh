// Standard normals of the Philox stream (common/philox.h): Box–Muller on pairs of words, as common/cpu/normal.h.
#pragma once

#include <cmath>

#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"
#include "common/philox.h"

namespace lect11ext::cuda {

// float takes one word a uniform, double two.
template <class T>
inline constexpr int kNormalsPerBlock = 16 / sizeof(T);

// −2 ln u of a normal number: u = m·2^e with m between 2/3 and 4/3, and a polynomial of m − 1.
__device__ inline float minus_twice_log(float u) {
  constexpr float kCoefficients[] = {-2.0f,        0.999998689f,  -0.666664004f, 0.500156879f, -0.400220603f,
                                     0.328311533f, -0.279955387f, 0.307806104f,  -0.280354261f};
  constexpr int kTwoThirds = 0x3F2AAAAB, kExponent = static_cast<int>(0xFF800000);
  constexpr float kMinusTwiceLog2 = -1.38629436112f;
  const int bits = __float_as_int(u), exponent = (bits - kTwoThirds) & kExponent;
  const float f = __int_as_float(bits - exponent) - 1.0f;
  return fmaf(static_cast<float>(exponent), 0x1p-23f * kMinusTwiceLog2, polynomial(kCoefficients, f) * f);
}

// U = x·2⁻³² + 2⁻³³ for the radius, rounded as on the CPU. The angle 2πU is half turns, whose sign the radius takes,
// and what of a half turn is left, between −½ and ½: sine and cosine are polynomials that need no case. All of it is
// written out, since logf, sqrtf and sincospif look after numbers that cannot come here and take twice the
// instructions.
__device__ inline void box_muller(uint32_t radius_word, uint32_t angle_word, float* out) {
  constexpr float kSine[] = {3.14159274f, -5.1677103f, 2.55007768f, -0.598292172f, 0.0776593983f};
  constexpr float kCosine[] = {1.0f, -4.93480206f, 4.05870962f, -1.33521605f, 0.23495391f, -0.024420673f};
  constexpr uint32_t kSign = 0x80000000;
  const float u = fmaf(static_cast<float>(radius_word), 0x1p-32f, 0x1p-33f);
  const uint32_t rest_word = angle_word << 1;
  const float rest = fmaf(static_cast<float>(static_cast<int32_t>(rest_word)), 0x1p-32f, 0x1p-32f);
  const uint32_t sign = (angle_word ^ rest_word) & kSign;
  const float radius = __uint_as_float(__float_as_uint(root(minus_twice_log(u))) ^ sign), square = rest * rest;
  out[0] = radius * polynomial(kCosine, square);
  out[1] = radius * (rest * polynomial(kSine, square));
}

// The normals of one block.
__device__ inline void normal_block(uint64_t seed, uint64_t counter, float* out) {
  const PhiloxBlock block = philox(seed, counter);
  box_muller(block.x[0], block.x[1], out);
  box_muller(block.x[2], block.x[3], out + 2);
}

__device__ inline void normal_block(uint64_t seed, uint64_t counter, double* out) {
  const PhiloxBlock block = philox(seed, counter);
  const double radius = sqrt(-2.0 * log(uniform_double(block.x[0], block.x[1])));
  double sine, cosine;
  sincospi(2.0 * uniform_double(block.x[2], block.x[3]), &sine, &cosine);
  out[0] = radius * cosine;
  out[1] = radius * sine;
}

// Normals number first … first + 3 of the stream of key [seed, offset]. Aligned: `first` is known to be a multiple of
// four, which takes one Philox block less, one in float and two in double.
template <bool Aligned, class T>
__device__ inline void four_normals(uint64_t seed, uint64_t offset, int64_t first, T* out) {
  constexpr int kBlock = kNormalsPerBlock<T>;
  const int lead = Aligned ? 0 : static_cast<int>(first % kBlock);
  const uint64_t counter = offset + static_cast<uint64_t>(first) / kBlock;
  T drawn[4 + kBlock] = {};
#pragma unroll
  for (int i = 0; i < 4; i += kBlock) normal_block(seed, counter + i / kBlock, drawn + i);
  if (!Aligned && lead != 0) {
    normal_block(seed, counter + 4 / kBlock, drawn + 4);
    // Moved down one place at a time: an index known only at run time would put the array into memory.
#pragma unroll
    for (int shift = 1; shift < kBlock; ++shift) {
      if (shift <= lead) {
#pragma unroll
        for (int i = 0; i + 1 < 4 + kBlock; ++i) drawn[i] = drawn[i + 1];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = drawn[i];
}

}  // namespace lect11ext::cuda
