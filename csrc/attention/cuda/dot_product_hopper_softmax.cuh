// The softmax of sm_90a's forward: of a tile of scores, 64 rows a warpgroup, of which a thread has parts of two.
// `unit`: binary logarithms in what scores are counted in.
#pragma once

#include "attention/cuda/dot_product_score.cuh"
#include "common/cuda/hopper.cuh"

namespace lect11ext::cuda {

// What a thread carries along the keys, of its two rows: what exponents are counted from, and the sum of weights.
struct SoftmaxRows {
  float base[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

// How a tile's scores become weights: powers of score · unit − shift; sums of tiles before are to be multiplied by
// `shrink`, where `shrinks`, as the warp agrees, says that it is not 1.
struct Powers {
  float shift[2], shrink[2];
  bool shrinks;
};

// Exponents are counted from a score of the row that no other exceeds by more than kMostGrowth: so it moves in the
// first tiles only, mostly, and what has been summed stays as it is (as in FlashAttention-4, 2025). Weights reach
// 2^kMostGrowth, which is far from all that 16 bits can hold.
template <int kTiles>
__device__ inline Powers find_powers(float (&scores)[kTiles][4], SoftmaxRows& rows, float unit) {
  constexpr float kMostGrowth = 8;
  constexpr int kChains = 4;  // of maxima, since each waits for the one before
  float largest[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float chains[kChains];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float score = scores[i / 2][2 * half + i % 2];
      chains[i % kChains] = i < kChains ? score : std::fmax(chains[i % kChains], score);
    }
    largest[half] = std::fmax(std::fmax(chains[0], chains[1]), std::fmax(chains[2], chains[3]));
  }
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance) {
#pragma unroll
    for (float& x : largest) x = std::fmax(x, __shfl_xor_sync(~0u, x, distance));
  }
  Powers powers;
  bool moves = false, large = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& base = rows.base[half];
    // As long as a row has seen nothing its base is −∞, from which nothing can be subtracted.
    const bool grows = largest[half] != -INFINITY && !((largest[half] - base) * unit <= kMostGrowth);
    powers.shrink[half] = power_of_two(grows ? (base - largest[half]) * unit : 0.0f);
    if (grows) base = largest[half];
    powers.shift[half] = base == -INFINITY ? 0.0f : base * unit;
    moves |= grows;
    large |= !(std::abs(powers.shift[half]) <= kLargeExponent);
  }
  powers.shrinks = __any_sync(~0u, moves) != 0;
  if (__builtin_expect(__any_sync(~0u, large), 0)) {  // a row at a time, whatever its neighbours are
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool row_is = !(std::abs(powers.shift[half]) <= kLargeExponent);
      const float from = row_is ? rows.base[half] : 0.0f;
      if (row_is) powers.shift[half] = 0;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) scores[i / 2][2 * half + i % 2] -= from;
    }
  }
  return powers;
}

// Of tiles kFirst to kLast − 1 of eight columns: scores become weights, and are summed, by two sums a row, since each
// addition waits for the one before.
template <int kFirst, int kLast, int kTiles>
__device__ inline void weigh(float (&scores)[kTiles][4], float (&sums)[1][4], const Powers& powers, float unit) {
#pragma unroll
  for (int i = 4 * kFirst; i < 4 * kLast; ++i) {
    const int half = i % 4 / 2;
    float& score = scores[i / 4][i % 4];
    score = power_of_two(std::fma(score, unit, -powers.shift[half]));
    sums[0][i % 4] += score;
  }
}

// Scores become weights, by way of `between`, half of them before it.
template <int kTiles, class Between>
__device__ inline void weigh(float (&scores)[kTiles][4], SoftmaxRows& rows, const Powers& powers, float unit,
                             Between between) {
  float sums[1][4] = {};
  weigh<0, kTiles / 2>(scores, sums, powers, unit);
  pin<kTiles / 2>(scores);
  pin(sums);
  between();
  weigh<kTiles / 2, kTiles>(scores, sums, powers, unit);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.sum[half] = std::fma(rows.sum[half], powers.shrink[half], sums[0][2 * half] + sums[0][2 * half + 1]);
  }
}

}  // namespace lect11ext::cuda
