// Standard normals of the Philox stream (common/philox.h), many at a time: Box–Muller on pairs of words.
#pragma once

#include <cmath>
#include <cstring>

#include "common/cpu/math.h"
#include "common/philox.h"

namespace lect11ext::CPU_CAPABILITY {

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

inline constexpr int kNormalsPerStep = 2 * kLanes<float>;

// Writes the words of kNormalsPerStep/4 consecutive blocks a step. Lanes 2b and 2b+1 of a step's first vector are x0
// and x2 of its block b, from which radii are made; those of the second, x1 and x3, are for angles. N steps go side by
// side: a round's four instructions wait for one another, and the processor's scheduler holds too few to look past
// them.
template <int N>
inline void philox_words(const PhiloxKeys& keys, uint64_t counter, float* out);

#if defined(CPU_CAPABILITY_AVX512)

inline constexpr int kStepsTogether = 4;

// A counter word occupies 64 bits, of which mul_epu32 reads the lower half: a product's halves need no shuffle.
template <int N>
inline void philox_words(const PhiloxKeys& keys, uint64_t counter, float* out) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0[N], c1[N], c2[N], c3[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    c0[j] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter + 8 * j)),
                             _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    c1[j] = _mm512_srli_epi64(c0[j], 32);
    c2[j] = c3[j] = _mm512_setzero_si512();
  }
  constexpr int kXor3 = 0x96;
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const __m512i p0 = _mm512_mul_epu32(c0[j], m0), p1 = _mm512_mul_epu32(c2[j], m1);
      c0[j] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[j], _mm512_set1_epi64(keys.k0[round]), kXor3);
      c2[j] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[j], _mm512_set1_epi64(keys.k1[round]), kXor3);
      c1[j] = p1;
      c3[j] = p0;
    }
  }
  constexpr __mmask16 kUpper = 0xAAAA;
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j, out += kNormalsPerStep) {
    _mm512_storeu_si512(out, _mm512_mask_blend_epi32(kUpper, c0[j], _mm512_slli_epi64(c2[j], 32)));
    _mm512_storeu_si512(out + kLanes<float>, _mm512_mask_blend_epi32(kUpper, c1[j], _mm512_slli_epi64(c3[j], 32)));
  }
}

#elif defined(CPU_CAPABILITY_AVX2)

inline constexpr int kStepsTogether = 2;  // sixteen registers hold no more

template <int N>
inline void philox_words(const PhiloxKeys& keys, uint64_t counter, float* out) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  __m256i c0[N], c1[N], c2[N], c3[N];
#pragma GCC unroll 2
  for (int j = 0; j < N; ++j) {
    c0[j] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter + 4 * j)), _mm256_set_epi64x(3, 2, 1, 0));
    c1[j] = _mm256_srli_epi64(c0[j], 32);
    c2[j] = c3[j] = _mm256_setzero_si256();
  }
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
      const __m256i p0 = _mm256_mul_epu32(c0[j], m0), p1 = _mm256_mul_epu32(c2[j], m1);
      c0[j] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[j]), _mm256_set1_epi64x(keys.k0[round]));
      c2[j] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[j]), _mm256_set1_epi64x(keys.k1[round]));
      c1[j] = p1;
      c3[j] = p0;
    }
  }
  constexpr int kUpper = 0xAA;
#pragma GCC unroll 2
  for (int j = 0; j < N; ++j, out += kNormalsPerStep) {
    const auto store = [](float* to, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); };
    store(out, _mm256_blend_epi32(c0[j], _mm256_slli_epi64(c2[j], 32), kUpper));
    store(out + kLanes<float>, _mm256_blend_epi32(c1[j], _mm256_slli_epi64(c3[j], 32), kUpper));
  }
}

#else

inline constexpr int kStepsTogether = 1;

template <int N>
inline void philox_words(const PhiloxKeys& keys, uint64_t counter, float* out) {
  static_assert(N == 1);
  uint32_t words[kNormalsPerStep];
  for (int b = 0; b < kLanes<float> / 2; ++b) {
    const PhiloxBlock block = philox(keys.seed, counter + b);
    words[2 * b] = block.x[0];
    words[2 * b + 1] = block.x[2];
    words[kLanes<float> + 2 * b] = block.x[1];
    words[kLanes<float> + 2 * b + 1] = block.x[3];
  }
  std::memcpy(out, words, sizeof words);
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

// Room that normals() needs in `out` beyond `count`.
inline constexpr int kNormalSlack = 64 + 4;

// Normals number first … first + count − 1 of the stream; returns where in `out` they begin.
//
// Two loops, the words waiting in `out` between them: the chain from a counter to a normal is some 190 cycles long, and
// a processor that looks 300 instructions ahead sees only two such chains of one loop, but five of each of the halves.
inline const float* normals(uint64_t seed, uint64_t offset, int64_t first, int64_t count, float* out) {
  const PhiloxKeys keys(seed);
  const int64_t lead = first % 4;
  const uint64_t counter = offset + static_cast<uint64_t>(first / 4);
  int64_t drawn = 0;
  for (constexpr int kMany = kStepsTogether * kNormalsPerStep; drawn + kMany <= lead + count; drawn += kMany) {
    philox_words<kStepsTogether>(keys, counter + drawn / 4, out + drawn);
  }
  for (; drawn < lead + count; drawn += kNormalsPerStep) philox_words<1>(keys, counter + drawn / 4, out + drawn);
  for (int64_t i = 0; i < lead + count; i += kNormalsPerStep) {
    const Vec<float> u = uniform(bits(Vec<float>::loadu(out + i)));
    const SinCos turn = sincos_turns(bits(Vec<float>::loadu(out + i + kLanes<float>)));
    const Vec<float> radius = minus_2_log_normal_range(u).sqrt();
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
