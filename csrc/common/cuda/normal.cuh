// Standard normals of the Philox stream (common/philox.h): Box–Muller on pairs of words, as common/cpu/normal.h.
#pragma once

#include <cmath>

#include "common/cuda/memory.cuh"
#include "common/philox.h"

namespace lect11ext::cuda {

// float takes one word a uniform, double two.
template <class T>
inline constexpr int kNormalsPerBlock = 16 / sizeof(T);

// U = x·2⁻³² + 2⁻³³ for the radius, rounded as on the CPU. The angle 2πU is taken from the signed word, which is one
// turn less where x ≥ 2^31: the same sine and cosine, with one bit more of the angle.
__device__ inline void box_muller(uint32_t radius_word, uint32_t angle_word, float* out) {
  const float u = fmaf(static_cast<float>(radius_word), 0x1p-32f, 0x1p-33f);
  const float half_turns = fmaf(static_cast<float>(static_cast<int32_t>(angle_word)), 0x1p-31f, 0x1p-32f);
  const float radius = sqrtf(-2.0f * logf(u));
  float sine, cosine;
  sincospif(half_turns, &sine, &cosine);
  out[0] = radius * cosine;
  out[1] = radius * sine;
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
  const uint64_t counter = offset + static_cast<uint64_t>(first / kBlock);
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
