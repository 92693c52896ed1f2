// Products of rows: the sums Σ_k w[r][k]·x[b][k] of a few rows of two row-major matrices, held in registers.
//
// Both operands lie dense along k, so nothing is packed: each vector step loads R + B vectors for R·B multiply-adds,
// which with 4 × 6 keeps the multiply units busy. What remains is to sum the lanes of R·B accumulators at the end;
// that costs about 3 instructions a sum against K/16 multiply-adds.
#pragma once

#include <algorithm>

#include "common/cpu/memory.h"

namespace lect11ext::CPU_CAPABILITY {

// A vector step of one storage type: what is loaded, how many elements, and the multiply-add into Compute lanes.
template <class S>
struct Step {
  using Loaded = Vec<S>;
  static constexpr int kElements = kLanes<S>;
  static Loaded load(const S* p) { return Vec<S>::loadu(p); }
  static Loaded load(const S* p, int64_t n) { return Vec<S>::loadu(p, n); }
  static Vec<S> madd(const Loaded& a, const Loaded& b, const Vec<S>& acc) { return at::vec::fmadd(a, b, acc); }
};

// 16-bit types become two float vectors; in which order is of no account to a sum.
template <class S>
struct HalfStep {
  struct Loaded {
    Vec<float> low, high;
  };
  static constexpr int kElements = kLanes<S>;
  static Loaded widen(const Vec<S>& v) {
    const auto [low, high] = at::vec::convert_to_float<S>(v);
    return {low, high};
  }
  static Loaded load(const S* p) { return widen(Vec<S>::loadu(p)); }
  static Loaded load(const S* p, int64_t n) { return widen(Vec<S>::loadu(p, n)); }
  static Vec<float> madd(const Loaded& a, const Loaded& b, const Vec<float>& acc) {
    return at::vec::fmadd(a.high, b.high, at::vec::fmadd(a.low, b.low, acc));
  }
};

template <>
struct Step<at::Half> : HalfStep<at::Half> {};

#if defined(__AVX512BF16__)
// vdpbf16ps multiplies 32 pairs and adds neighbours: rows dense along k are already in the order that it wants.
template <>
struct Step<at::BFloat16> {
  using Loaded = __m512i;
  static constexpr int kElements = 32;
  static Loaded load(const at::BFloat16* p) { return _mm512_loadu_si512(p); }
  static Loaded load(const at::BFloat16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
  }
  static Vec<float> madd(const Loaded& a, const Loaded& b, const Vec<float>& acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
};
#else
template <>
struct Step<at::BFloat16> : HalfStep<at::BFloat16> {};
#endif

// out[0 … 3] = the sums of the lanes of four vectors.
inline void sum_lanes4(const Vec<float> (&v)[4], float* out) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
  const __m512 c = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 a = _mm256_hadd_ps(v[0], v[1]), b = _mm256_hadd_ps(v[2], v[3]);
  const __m256 c = _mm256_hadd_ps(a, b);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    float lanes[kLanes<float>], sum = 0;
    v[i].store(lanes);
    for (float lane : lanes) sum += lane;
    out[i] = sum;
  }
#endif
}

inline void sum_lanes4(const Vec<double> (&v)[4], double* out) {
  for (int i = 0; i < 4; ++i) {
    double lanes[kLanes<double>], sum = 0;
    v[i].store(lanes);
    for (double lane : lanes) sum += lane;
    out[i] = sum;
  }
}

// One of the products that are summed: rows of `weight` times rows of `x`, both `size` long. Where `packed`, the
// weights lie transposed instead: a block's units dense for each k, k's `weight_stride` apart.
template <class S>
struct RowProduct {
  const S* weight;
  int64_t weight_stride;
  const S* x;
  int64_t x_stride;
  int64_t size;
  bool packed = false;
};

// Accumulators that a build has registers for, beside the operands of a step.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kMaxRowsOfX = 6;
#elif defined(CPU_CAPABILITY_AVX2)
inline constexpr int kMaxRowsOfX = 3;
#else
inline constexpr int kMaxRowsOfX = 2;
#endif

// Rows of x for the next tile where `left` remain. One or two more than a tile takes are halved: a tile of one or two
// rows takes nearly as long as one of four.
inline int64_t next_rows_of_x(int64_t left) {
  const bool halve = left > kMaxRowsOfX && left <= kMaxRowsOfX + 2 && kMaxRowsOfX > 2;
  return halve ? (left + 1) / 2 : std::min<int64_t>(left, kMaxRowsOfX);
}

// out[b·out_stride + r] = Σ over `count` products, for R rows of weights (a multiple of 4; rows beyond `rows` repeat
// the last one, and their sums are for the caller to ignore) and B rows of x. The pragmas make the compiler unroll
// before it assigns registers; without them the accumulators live on the stack and the tile costs a fifth more.
// kFetch: rows `next_rows` further are fetched meanwhile, which costs a tenth where they have been.
template <int R, int B, bool kFetch = true, class S>
inline void dot_tile(const RowProduct<S>* products, int count, int64_t first_row, int64_t rows, int64_t first_x,
                     Compute<S>* out, int64_t out_stride, int64_t next_rows) {
  using C = Compute<S>;
  using Loader = Step<S>;
  Vec<C> acc[B][R];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[b][r] = Vec<C>(C(0));
  }
  for (int p = 0; p < count; ++p) {
    const RowProduct<S>& product = products[p];
    const S *w[R], *x[B];
    w[0] = product.weight + first_row * product.weight_stride;
    x[0] = product.x + first_x * product.x_stride;
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) w[r] = w[r - 1] + (first_row + r < rows ? product.weight_stride : 0);
#pragma GCC unroll 8
    for (int b = 1; b < B; ++b) x[b] = x[b - 1] + product.x_stride;
    const int64_t whole = product.size - product.size % Loader::kElements;
    const auto step = [&](auto load) {
      typename Loader::Loaded wide[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) wide[r] = load(w[r]);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        const auto column = load(x[b]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[b][r] = Loader::madd(wide[r], column, acc[b][r]);
      }
    };
    int64_t k = 0;
    const int64_t ahead = next_rows * product.weight_stride;
    for (; k < whole; k += Loader::kElements) {
      if constexpr (kFetch) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + ahead + k, /*write=*/0, /*locality=*/2);
      }
      step([k](const S* p) { return Loader::load(p + k); });
    }
    if (k < product.size) step([k, n = product.size - k](const S* p) { return Loader::load(p + k, n); });
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 4) {
      const Vec<C> four[4] = {acc[b][r], acc[b][r + 1], acc[b][r + 2], acc[b][r + 3]};
      sum_lanes4(four, out + b * out_stride + r);
    }
  }
}

// out[b·out_stride + u] for all units of a block of packed weights. With few rows of x the sum over k is split into P
// sums, so that enough additions are in flight.
template <int kUnits, int B, int P, class C>
inline void packed_tile(const RowProduct<C>* products, int count, int64_t first_x, C* out, int64_t out_stride) {
  constexpr int kVectors = kUnits / kLanes<C>;
  Vec<C> acc[P][B][kVectors];
  for (auto& part : acc) {
    for (auto& row : part) {
      for (auto& v : row) v = Vec<C>(C(0));
    }
  }
  for (int p = 0; p < count; ++p) {
    const RowProduct<C>& product = products[p];
    const C* x = product.x + first_x * product.x_stride;
    const auto step = [&](int64_t k, Vec<C>(&sums)[B][kVectors]) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<C> weight = Vec<C>::loadu(product.weight + k * product.weight_stride + v * kLanes<C>);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
          sums[b][v] = at::vec::fmadd(weight, Vec<C>(x[b * product.x_stride + k]), sums[b][v]);
        }
      }
    };
    int64_t k = 0;
    for (; k + P <= product.size; k += P) {
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) step(k + q, acc[q]);
    }
    for (; k < product.size; ++k) step(k, acc[0]);
  }
  for (int b = 0; b < B; ++b) {
    for (int v = 0; v < kVectors; ++v) {
      Vec<C> sum = acc[0][b][v];
      for (int q = 1; q < P; ++q) sum = sum + acc[q][b][v];
      sum.store(out + b * out_stride + v * kLanes<C>);
    }
  }
}

template <int kUnits, class C>
inline void packed_block(const RowProduct<C>* products, int count, int64_t first_x, int64_t rows_of_x, C* out,
                         int64_t out_stride) {
  switch (rows_of_x) {
    case 1: return packed_tile<kUnits, 1, 8>(products, count, first_x, out, out_stride);
    case 2: return packed_tile<kUnits, 2, 4>(products, count, first_x, out, out_stride);
    case 3: return packed_tile<kUnits, std::min(3, kMaxRowsOfX), 2>(products, count, first_x, out, out_stride);
    case 4: return packed_tile<kUnits, std::min(4, kMaxRowsOfX), 2>(products, count, first_x, out, out_stride);
    case 5: return packed_tile<kUnits, std::min(5, kMaxRowsOfX), 2>(products, count, first_x, out, out_stride);
    default: return packed_tile<kUnits, kMaxRowsOfX, 2>(products, count, first_x, out, out_stride);
  }
}

// The same for `rows_of_x` ≤ kMaxRowsOfX rows of x and a block of kUnits rows of weights, of which `units` exist.
// With one or two rows of x eight rows of weights at a time keep enough additions in flight.
template <int kUnits, class S>
inline void dot_block(const RowProduct<S>* products, int count, int64_t units, int64_t first_x, int64_t rows_of_x,
                      Compute<S>* out, int64_t out_stride) {
  if constexpr (std::is_same_v<S, Compute<S>>) {  // the 16-bit types are never packed: their rows are in order already
    if (products[0].packed) return packed_block<kUnits>(products, count, first_x, rows_of_x, out, out_stride);
  }
  const auto run = [&]<int R, int B, bool kFetch = true>() {
    for (int64_t r = 0; r < units; r += R) {
      dot_tile<R, B, kFetch>(products, count, r, units, first_x, out + r, out_stride, kUnits);
    }
  };
  if (first_x > 0 && rows_of_x == kMaxRowsOfX) return run.template operator()<4, kMaxRowsOfX, false>();
  switch (rows_of_x) {
    case 1: return run.template operator()<8, 1>();
    case 2: return run.template operator()<kMaxRowsOfX <= 3 ? 4 : 8, 2>();
    case 3: return run.template operator()<4, std::min(3, kMaxRowsOfX)>();
    case 4: return run.template operator()<4, std::min(4, kMaxRowsOfX)>();
    case 5: return run.template operator()<4, std::min(5, kMaxRowsOfX)>();
    default: return run.template operator()<4, kMaxRowsOfX>();
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
