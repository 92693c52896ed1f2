// A warp's operands of a product on tensor cores: sixteen rows of a left one, eight columns of a right one, kDepth<S>
// elements of the sum. Sums lie where mma leaves them: with g = lane / 4 and q = lane % 4, element e of a tile of 16 ×
// 8 is that of row g + 8 · (e / 2) and column 2q + e % 2. They are a left operand as they are, without a word from lane
// to lane, since lanes take along the sum what they own: columns 2q and 2q + 1.
//
// 16-bit types are multiplied exactly, floats in two parts of TF32, doubles as they are.
#pragma once

#include "attention/cuda/dot_product_mma.cuh"

namespace lect11ext::cuda {

template <class S>
inline constexpr bool kIsHalf = sizeof(S) == 2;
template <class S>
inline constexpr int kDepth = kIsHalf<S> ? 16 : 8;
// Of floats the sums of two such pieces are added to the others at once.
template <class S>
inline constexpr int kPieces = std::is_same_v<S, float> ? 2 : 1;
// Tiles of eight columns whose right operands are loaded together. Of floats four chains of products are in flight: one
// waits some twenty clocks for the product before it, and tensor cores take another every eight.
template <class S>
constexpr int tiles_together(int row_tiles) {
  return kIsHalf<S> ? 2 : sizeof(S) == 8 ? 1 : 4 / row_tiles;
}
// The largest float that is split as it is: of TF32, so that nothing rounds to infinity.
inline constexpr float kMostSplit = 0x1.ffcp127f;

struct Lane {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
};

template <class S>
__device__ inline uint32_t pack_pair(float low, float high) {
  const S pair[2] = {to_storage<S>(low), to_storage<S>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

// N words of 16-bit pairs, floats or doubles.
template <class S, int N>
struct Fragment {
  uint32_t words[N];
};

template <int N>
struct Fragment<float, N> {
  uint32_t words[N], rest[N];

  // Words are finite, and of infinity and NaN the rest is all: a rest of zero times infinity would be NaN. What is
  // finite is rounded by an addition of integers; tensor_word would ask first. A rest has twelve bits, or is a power of
  // two: of the one too many, which tensor cores leave out, halves are as far from either neighbour. kFinite: |x| is at
  // most kMostSplit, which saves two of five instructions.
  template <bool kFinite = false>
  __device__ void set(int i, float x) {
    constexpr uint32_t kHalf = 0x1000, kLeftOut = 0x1FFF;
    const float bounded = kFinite ? x : std::fmin(std::fmax(x, -kMostSplit), kMostSplit);
    words[i] = (__float_as_uint(bounded) + kHalf) & ~kLeftOut;
    rest[i] = __float_as_uint(x - __uint_as_float(words[i]));
  }
};

template <int N>
struct Fragment<double, N> {
  double words[N];

  template <bool = false>
  __device__ void set(int i, double x) {
    words[i] = x;
  }
};

template <class S>
using Left = Fragment<S, 4>;
template <class S>
using Right = Fragment<S, 2>;

// sum(m, n) += Σ_k left[k][m] · right[k][n]ᵀ. Of floats only the product of the smaller parts is left out, so that
// about 22 bits count. Tensor cores cut what they add and do not round it: the small products come first, and what
// belongs together is added to the sums by a rounded addition. A product waits for the one before: those of all m and n
// take turns. kMirrored: with its operands exchanged the product has the same bits.
template <class S, bool kMirrored = false, int M, int N, class Sum>
__device__ inline void multiply(const Left<S> (&left)[kPieces<S>][M], const Right<S> (&right)[kPieces<S>][N], Sum sum) {
  const auto each = [](auto f) {
#pragma unroll
    for (int i = 0; i < M * N; ++i) f(i % M, i / M);
  };
  if constexpr (std::is_same_v<S, float>) {
    float parts[M][N][4] = {};
#pragma unroll
    for (int k = 0; k < kPieces<S>; ++k) {
      const auto small = [&](bool rest_of_left) {
        each([&](int m, int n) {
          const Left<S>& a = left[k][m];
          const Right<S>& b = right[k][n];
          mma<float>(parts[m][n], rest_of_left ? a.rest : a.words, rest_of_left ? b.words : b.rest);
        });
      };
      small(!kMirrored);
      small(kMirrored);
    }
#pragma unroll
    for (int k = 0; k < kPieces<S>; ++k) {
      each([&](int m, int n) { mma<float>(parts[m][n], left[k][m].words, right[k][n].words); });
    }
    each([&](int m, int n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum(m, n)[i] += parts[m][n][i];
    });
  } else {
    each([&](int m, int n) {
      if constexpr (kIsHalf<S>) mma<S>(sum(m, n), left[0][m].words, right[0][n].words);
      else mma(sum(m, n), left[0][m].words, right[0][n].words);
    });
  }
}

// --- left operands ------------------------------------------------------------------------------------------------
//
// kFinite, here and below: as in Fragment<float>::set, of what is read from memory. Sums are split as any floats.

// Of sixteen rows in shared memory, from their column `column` on.
template <bool kFinite, class S>
__device__ inline Left<S> left_of_shared(const S* rows, int stride, int column, const Lane& lane) {
  Left<S> left;
  if constexpr (kIsHalf<S>) {
    load_matrices<false>(left.words, rows + lane.lane % 16 * stride + column + lane.lane / 16 * 8);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const S* pair = rows + (lane.g + 8 * half) * stride + column + 2 * lane.q;
      const Pack<S, 2> both = Pack<S, 2>::load(pair);
      left.template set<kFinite>(half, both.data[0]);
      left.template set<kFinite>(2 + half, both.data[1]);
    }
  }
  return left;
}

// Of rows g and g + 8 in global memory, null where there are none; zero from column `columns` on.
template <bool kFinite, class S>
__device__ inline Left<S> left_of_global(const S* low, const S* high, int column, int columns, const Lane& lane) {
  Left<S> left;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const S* row = i % 2 == 0 ? low : high;
    const auto element = [&](int c) { return row != nullptr && c < columns ? row[c] : to_storage<S>(0.0f); };
    if constexpr (kIsHalf<S>) {
      const int first = column + i / 2 * 8 + 2 * lane.q;
      const S pair[2] = {element(first), element(first + 1)};
      memcpy(&left.words[i], pair, sizeof(left.words[i]));
    } else {
      left.template set<kFinite>(i, element(column + 2 * lane.q + i / 2));
    }
  }
  return left;
}

// Of sums, along their columns: part number `part` of kDepth<S> of them.
template <class S, int kTiles>
__device__ inline Left<S> left_of_sums(const Compute<S> (&sums)[kTiles][4], int part) {
  Left<S> left;
  if constexpr (kIsHalf<S>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &sums[2 * part + i / 2][i % 2 * 2];
      left.words[i] = pack_pair<S>(pair[0], pair[1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) left.set(i, sums[part][i % 2 * 2 + i / 2]);
  }
  return left;
}

// --- right operands -----------------------------------------------------------------------------------------------

// Whose columns are rows in shared memory, 8 · N of them, from column `column` on.
template <bool kFinite, class S, int N>
__device__ inline void right_of_rows(Right<S> (&right)[N], const S* rows, int stride, int column, const Lane& lane) {
  if constexpr (kIsHalf<S>) {
    uint32_t words[4];
    load_matrices<false>(words, rows + (lane.lane / 16 * 8 + lane.lane % 8) * stride + column + lane.lane / 8 % 2 * 8);
    right[0] = {words[0], words[1]};
    right[1] = {words[2], words[3]};
  } else {
#pragma unroll
    for (int t = 0; t < N; ++t) {
      const Pack<S, 2> both = Pack<S, 2>::load(rows + (8 * t + lane.g) * stride + column + 2 * lane.q);
      right[t].template set<kFinite>(0, both.data[0]);
      right[t].template set<kFinite>(1, both.data[1]);
    }
  }
}

// Whose rows are kDepth<S> rows in shared memory: 8 · N columns from `column` on. `rows_seen` has two bits for
// every eight rows, those of rows 2q and 2q + 1; a row without its bit counts as zero, whatever is in it.
template <bool kFinite, class S, int N>
__device__ inline void right_of_columns(Right<S> (&right)[N], const S* rows, int stride, int column, uint32_t rows_seen,
                                        const Lane& lane) {
  if constexpr (kIsHalf<S>) {
    uint32_t words[4];
    load_matrices<true>(words, rows + lane.lane % 16 * stride + column + lane.lane / 16 * 8);
    const auto halves = [&](int bits) { return (bits & 1 ? 0xFFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u); };
    const uint32_t first = halves(rows_seen & 3), second = halves(rows_seen >> 2 & 3);
    right[0] = {words[0] & first, words[1] & second};
    right[1] = {words[2] & first, words[3] & second};
  } else {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const S x = rows[(2 * lane.q + i % 2) * stride + column + i / 2 * 8 + lane.g];
      right[i / 2].template set<kFinite>(i % 2, rows_seen >> i % 2 & 1 ? x : S(0));
    }
  }
}

}  // namespace lect11ext::cuda
