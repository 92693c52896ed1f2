// Products of rows with panels: out[r][n] = Σ_k a[r][k]·panel[k][n], for panels that are used again and again.
//
// A panel is a block of columns of a matrix, laid out dense so that a row of it is a few vectors. Rows of `a` and of
// `out` are given by pointers: any subset of the rows of a batch may take part, in any layout.
#pragma once

#include <algorithm>

#include "common/capability.h"
#include "common/cpu/amx.h"
#include "common/cpu/dot.h"

namespace lect11ext::CPU_CAPABILITY {

// The type that a product's operands have in a panel, for storage type S: S itself where the machine multiplies it.
template <class S>
struct OperandOf {
#if defined(__AVX512BF16__)
  using type = std::conditional_t<std::is_same_v<S, at::Half>, float, S>;
#else
  using type = Compute<S>;
#endif
};
template <class S>
using Operand = typename OperandOf<S>::type;

// How one operand type is loaded and multiplied. kDeep elements of k lie beside one another in a panel:
// [k/kDeep][n][kDeep].
template <class P>
struct PanelStep {
  static constexpr int kDeep = 1;
  using Row = Vec<P>;
  using Scale = Vec<P>;
  static Row row(const P* p) { return Vec<P>::loadu(p); }
  static Scale scale(const P* p) { return Vec<P>(*p); }
  static Vec<P> madd(const Scale& a, const Row& b, const Vec<P>& acc) { return at::vec::fmadd(a, b, acc); }
};

#if defined(__AVX512BF16__)
template <>
struct PanelStep<at::BFloat16> {
  static constexpr int kDeep = 2;
  using Row = __m512i;
  using Scale = __m512i;
  static Row row(const at::BFloat16* p) { return _mm512_loadu_si512(p); }
  static Scale scale(const at::BFloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Vec<float> madd(const Scale& a, const Row& b, const Vec<float>& acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Vectors of a tile's row, for a panel of `vectors` of them: what leaves registers for enough rows.
#if defined(CPU_CAPABILITY_AVX512)
template <int kVectors>
inline constexpr int kPanelVectors = kVectors <= 4 ? kVectors : kVectors / 2;
template <int V>
inline constexpr int kPanelRows = V >= 3 ? 24 / V : 8;
#else
template <int kVectors>
inline constexpr int kPanelVectors = kVectors % 2 == 0 ? 2 : 1;
template <int V>
inline constexpr int kPanelRows = 6;
#endif
// Steps along k that all rows take before the next: 64 KiB of 64 floats, which the second-level cache streams faster
// than the tiles multiply. It bounds the length of a sum too; smaller ones only store more often
// (docs/performance-notes.md).
inline constexpr int64_t kPanelDepth = 128;

// M rows × V vectors. The pragmas make the compiler unroll before it assigns registers.
template <int M, int V, class P>
inline void panel_tile(const P* const* a, int64_t k, int64_t depth, const P* panel, int64_t panel_row,
                       Compute<P>* const* out, int64_t column, bool add) {
  using C = Compute<P>;
  using Loader = PanelStep<P>;
  constexpr int kDeep = Loader::kDeep;
  Vec<C> acc[M][V];
  const P* from[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    from[m] = a[m] + k;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[m][v] = Vec<C>(C(0));
  }
  for (int64_t i = 0; i < depth; i += kDeep, panel += panel_row) {
    typename Loader::Row row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = Loader::row(panel + v * kLanes<C> * kDeep);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto scale = Loader::scale(from[m] + i);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = Loader::madd(scale, row[v], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      C* to = out[m] + column + v * kLanes<C>;
      (add ? acc[m][v] + Vec<C>::loadu(to) : acc[m][v]).store(to);
    }
  }
}

// All `rows` rows times a panel of kColumns columns, rows of it `panel_row` apart; `size` is a multiple of kDeep.
template <int kColumns, class P>
inline void panel_product(const P* const* a, int64_t rows, int64_t size, const P* panel, int64_t panel_row,
                          Compute<P>* const* out, bool add) {
  using C = Compute<P>;
  constexpr int kVectors = kColumns / kLanes<C>, V = kPanelVectors<kVectors>, kRows = kPanelRows<V>;
  constexpr int64_t kDeep = PanelStep<P>::kDeep;
  static_assert(kVectors % V == 0);
  constexpr int64_t steps = kPanelDepth * kDeep;
  int64_t done = 0;
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<P, at::BFloat16>) {
    if (rows >= kAmxLeastRows && capability() == Capability::AMX) {
      done = amx_product<kColumns>(a, rows, size, panel, panel_row, out, add);
      if (done == size) return;
    }
  }
#endif
  for (int64_t k = done; k == 0 || k < size; k += steps) {
    const int64_t depth = std::min(steps, size - k);
    const P* from = panel + k / kDeep * panel_row;
    // Rows are spread evenly: a tile of few is bound by reading the panel.
    int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t r = 0, n; r < rows; r += n, --tiles) {
      n = (rows - r + tiles - 1) / tiles;
      const auto run = [&]<int M>() {
        for (int64_t v = 0; v < kVectors; v += V) {
          const int64_t column = v * kLanes<C>;
          panel_tile<M, V>(a + r, k, depth, from + column * kDeep, panel_row, out + r, column, add || k > 0);
        }
      };
      switch (n) {
        case 1: run.template operator()<1>(); break;
        case 2: run.template operator()<2>(); break;
        case 3: run.template operator()<3>(); break;
        case 4: run.template operator()<4>(); break;
        case 5: run.template operator()<5>(); break;
        case 6: run.template operator()<std::min(6, kRows)>(); break;
        case 7: run.template operator()<std::min(7, kRows)>(); break;
        default: run.template operator()<kRows>(); break;
      }
    }
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
