// Standard normals of the Philox stream (common/philox.h), many at a time: Box–Muller on pairs of words.
#pragma once

#include <cmath>

#include "common/cpu/math.h"
#include "common/philox.h"

namespace lect11ext::CPU_CAPABILITY {

// Words of kLanes<float>/2 consecutive blocks: lanes 2b and 2b+1 of `radius` are x0 and x2 of block b, those of `angle`
// x1 and x3.
struct PhiloxWords {
  VecI radius, angle;
};

// The keys of all rounds, in memory: an instruction that takes one from there broadcasts it for nothing.
struct PhiloxKeys {
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];

  explicit PhiloxKeys(uint64_t seed) : seed(seed) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, low += kPhiloxW0, high += kPhiloxW1) {
      k0[round] = low;
      k1[round] = high;
    }
  }

  uint64_t seed;
};

#if defined(CPU_CAPABILITY_AVX512)

// A counter word occupies 64 bits, of which mul_epu32 reads the lower half: a product's halves need no shuffle.
inline PhiloxWords philox_words(const PhiloxKeys& keys, uint64_t counter) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0 =
      _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter)), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  __m512i c1 = _mm512_srli_epi64(c0, 32), c2 = _mm512_setzero_si512(), c3 = c2;
  constexpr int kXor3 = 0x96;
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(keys.k0[round]), kXor3);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(keys.k1[round]), kXor3);
    c1 = p1;
    c3 = p0;
  }
  constexpr __mmask16 kUpper = 0xAAAA;
  return {_mm512_mask_blend_epi32(kUpper, c0, _mm512_slli_epi64(c2, 32)),
          _mm512_mask_blend_epi32(kUpper, c1, _mm512_slli_epi64(c3, 32))};
}

#elif defined(CPU_CAPABILITY_AVX2)

inline PhiloxWords philox_words(const PhiloxKeys& keys, uint64_t counter) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter)), _mm256_set_epi64x(3, 2, 1, 0));
  __m256i c1 = _mm256_srli_epi64(c0, 32), c2 = _mm256_setzero_si256(), c3 = c2;
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(keys.k0[round]));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(keys.k1[round]));
    c1 = p1;
    c3 = p0;
  }
  constexpr int kUpper = 0xAA;
  return {_mm256_blend_epi32(c0, _mm256_slli_epi64(c2, 32), kUpper),
          _mm256_blend_epi32(c1, _mm256_slli_epi64(c3, 32), kUpper)};
}

#else

inline PhiloxWords philox_words(const PhiloxKeys& keys, uint64_t counter) {
  uint32_t radius[kLanes<float>], angle[kLanes<float>];
  for (int b = 0; b < kLanes<float> / 2; ++b) {
    const PhiloxBlock block = philox(keys.seed, counter + b);
    radius[2 * b] = block.x[0];
    radius[2 * b + 1] = block.x[2];
    angle[2 * b] = block.x[1];
    angle[2 * b + 1] = block.x[3];
  }
  return {VecI::loadu(radius), VecI::loadu(angle)};
}

#endif

// U = x·2⁻³² + 2⁻³³ of unsigned words.
inline Vec<float> uniform(VecI x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec<float> word = _mm512_cvtepu32_ps(x);
#else
  // By signed conversions of both halves, which are exact, so that one rounding remains.
  const Vec<float> high = at::vec::convert_to_fp_of_same_size<float>((x >> VecI(16)) & VecI(0xFFFF));
  const Vec<float> low = at::vec::convert_to_fp_of_same_size<float>(x & VecI(0xFFFF));
  const Vec<float> word = at::vec::fmadd(high, Vec<float>(65536.0f), low);
#endif
  return at::vec::fmadd(word, Vec<float>(0x1p-32f), Vec<float>(0x1p-33f));
}

inline constexpr int kNormalsPerStep = 2 * kLanes<float>;
// Room that normals() needs in `out` beyond `count`.
inline constexpr int kNormalSlack = 64 + 4;

// Normals number first … first + count − 1 of the stream; returns where in `out` they begin.
//
// Two loops, the words waiting in `out` between them: the chain from a counter to a normal is some 190 cycles long, and
// a processor that looks 300 instructions ahead sees only two such chains of one loop, but five of each of the halves.
inline const float* normals(uint64_t seed, uint64_t offset, int64_t first, int64_t count, float* out) {
  const PhiloxKeys keys(seed);
  const int64_t lead = first % 4;
  uint64_t counter = offset + static_cast<uint64_t>(first / 4);
  for (int64_t i = 0; i < lead + count; i += kNormalsPerStep, counter += kNormalsPerStep / 4) {
    const PhiloxWords words = philox_words(keys, counter);
    from_bits(words.radius).store(out + i);
    from_bits(words.angle).store(out + i + kLanes<float>);
  }
  for (int64_t i = 0; i < lead + count; i += kNormalsPerStep) {
    const Vec<float> u = uniform(bits(Vec<float>::loadu(out + i)));
    const SinCos turn = sincos_turns(bits(Vec<float>::loadu(out + i + kLanes<float>)));
    const Vec<float> radius = (log_normal_range(u) * Vec<float>(-2.0f)).sqrt();
    const auto [even, odd] = at::vec::interleave2(radius * turn.cos, radius * turn.sin);
    even.store(out + i);
    odd.store(out + i + kLanes<float>);
  }
  return out + lead;
}

inline const double* normals(uint64_t seed, uint64_t offset, int64_t first, int64_t count, double* out) {
  constexpr int kBlocks = kLanes<double>;
  const int64_t lead = first % 2;
  uint64_t counter = offset + static_cast<uint64_t>(first / 2);
  for (int64_t i = 0; i < lead + count; i += 2 * kBlocks) {
    double u[kBlocks], angle[kBlocks];
    for (int b = 0; b < kBlocks; ++b, ++counter) {
      const PhiloxBlock block = philox(seed, counter);
      u[b] = uniform_double(block.x[0], block.x[1]);
      angle[b] = uniform_double(block.x[2], block.x[3]) * 6.283185307179586477;
    }
    const Vec<double> radius = (Vec<double>::loadu(u).log() * Vec<double>(-2.0)).sqrt();
    const Vec<double> turn = Vec<double>::loadu(angle);
    const auto [even, odd] = at::vec::interleave2(radius * turn.cos(), radius * turn.sin());
    even.store(out + i);
    odd.store(out + i + kLanes<double>);
  }
  return out + lead;
}

}  // namespace lect11ext::CPU_CAPABILITY
