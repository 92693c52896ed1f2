#include "attention/cpu/dot_product_matrix.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kMostVectors = 4;  // of a tile's row
template <int V>
constexpr int kMostRows = V == 4 ? 6 : 8;
#else
constexpr int kMostVectors = 2;
template <int V>
constexpr int kMostRows = 6;
#endif

// M rows × V vectors. The pragmas make the compiler unroll before it assigns registers.
template <int M, int V, Order kOrder, class P>
void run_tile(const P* a, int64_t a_stride, int64_t steps, const P* b, int64_t b_stride, Compute<P>* c,
              int64_t c_stride, bool add) {
  using C = Compute<P>;
  using Loader = PanelStep<P>;
  constexpr int kDeep = Loader::kDeep;
  Vec<C> acc[M][V];
  const P* from[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    from[m] = a + m * a_stride;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[m][v] = Vec<C>(C(0));
  }
  for (int64_t i = 0; i < steps; ++i, b += b_stride) {
    typename Loader::Row row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = Loader::row(b + v * kLanes<C> * kDeep);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto scale = Loader::scale(kOrder == Order::Along ? from[m] + i * kDeep : a + m * kDeep);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = Loader::madd(scale, row[v], acc[m][v]);
    }
    if constexpr (kOrder == Order::Across) a += a_stride;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m, c += c_stride) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      C* to = c + v * kLanes<C>;
      (add ? acc[m][v] + Vec<C>::loadu(to) : acc[m][v]).store(to);
    }
  }
}

// All rows times V vectors of columns. Rows are spread evenly: a tile of few is bound by reading b.
template <int V, Order kOrder, class P>
void all_rows(const P* a, int64_t a_stride, int64_t rows, int64_t steps, const P* b, int64_t b_stride, Compute<P>* c,
              int64_t c_stride, bool add) {
  constexpr int64_t kRows = kMostRows<V>;
  const int64_t a_row = kOrder == Order::Along ? a_stride : PanelStep<P>::kDeep;
  int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t r = 0, n; r < rows; r += n, --tiles) {
    n = (rows - r + tiles - 1) / tiles;
    const auto run = [&]<int M>() {
      run_tile<M, V, kOrder>(a + r * a_row, a_stride, steps, b, b_stride, c + r * c_stride, c_stride, add);
    };
    switch (n) {
      case 1: run.template operator()<1>(); break;
      case 2: run.template operator()<2>(); break;
      case 3: run.template operator()<3>(); break;
      case 4: run.template operator()<4>(); break;
      case 5: run.template operator()<5>(); break;
      case 6: run.template operator()<std::min<int>(6, kRows)>(); break;
      case 7: run.template operator()<std::min<int>(7, kRows)>(); break;
      default: run.template operator()<kRows>(); break;
    }
  }
}

#if defined(__AMX_BF16__)

// By AMX, whose tiles of a have rows dense along k: what lies across is turned first, a pair moving as one word.
template <Order kOrder>
void by_amx(const Matrix<const at::BFloat16>& a, int64_t rows, int64_t depth, const Matrix<const at::BFloat16>& b,
            const Matrix<float>& c, int64_t columns, bool add) {
  constexpr int64_t kRows = 64, kDepth = 256, kStep = 16;
  alignas(64) at::BFloat16 turned[kRows * kDepth];
  const at::BFloat16* from[kRows];
  float* to[kRows];
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t n = std::min(kRows, rows - r);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t deep = std::min(kDepth, depth - k);
      if constexpr (kOrder == Order::Across) {
        const auto* words = reinterpret_cast<const float*>(a.data + k / 2 * a.stride) + r;
        for (int64_t i = 0; i < deep / 2; i += kStep) {
          for (int64_t m = 0; m < n; m += kStep) {
            at::vec::transpose_mxn<float>(
                words + i * (a.stride / 2) + m, a.stride / 2, reinterpret_cast<float*>(turned + m * kDepth) + i,
                kDepth / 2, static_cast<int>(std::min(kStep, deep / 2 - i)), static_cast<int>(std::min(kStep, n - m)));
          }
        }
      }
      for (int64_t m = 0; m < n; ++m) {
        from[m] = kOrder == Order::Across ? turned + m * kDepth : a.data + (r + m) * a.stride + k;
      }
      const at::BFloat16* panel = b.data + k / 2 * b.stride;
      for (int64_t column = 0; column < columns;) {
        const int64_t width = columns - column >= 64 ? 64 : columns - column >= 32 ? 32 : 16;
        for (int64_t m = 0; m < n; ++m) to[m] = c.row(r + m) + column;
        const auto run = [&]<int kColumns>() {
          panel_product<kColumns>(from, n, deep, panel + column * 2, b.stride, to, add || k > 0);
        };
        if (width == 64) run.template operator()<64>();
        else if (width == 32) run.template operator()<32>();
        else run.template operator()<16>();
        column += width;
      }
    }
  }
}

#endif

}  // namespace

template <Order kOrder, class P>
void multiply(const Matrix<const P>& a, int64_t rows, int64_t depth, const Matrix<const P>& b,
              const Matrix<Compute<P>>& c, int64_t columns, bool add) {
  using C = Compute<P>;
  constexpr int64_t kDeep = PanelStep<P>::kDeep, kWidth = kLanes<C>;
  if (depth == 0 && !add) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(c.row(r), columns, C(0));
  }
  if (rows == 0 || depth == 0) return;
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<P, at::BFloat16>) {
    if (capability() == Capability::AMX) return by_amx<kOrder>(a, rows, depth, b, c, columns, add);
  }
#endif
  const int64_t steps = depth / kDeep;
  for (int64_t k = 0; k < steps; k += kPanelDepth) {
    const int64_t deep = std::min(kPanelDepth, steps - k);
    const P* left = a.data + k * (kOrder == Order::Along ? kDeep : a.stride);
    for (int64_t column = 0; column < columns;) {
      const auto run = [&]<int V>() {
        all_rows<V, kOrder>(left, a.stride, rows, deep, b.data + k * b.stride + column * kDeep, b.stride,
                            c.data + column, c.stride, add || k > 0);
        column += V * kWidth;
      };
      switch (std::min<int64_t>(kMostVectors, (columns - column) / kWidth)) {
        case 1: run.template operator()<1>(); break;
        case 2: run.template operator()<2>(); break;
        case 3: run.template operator()<std::min(3, kMostVectors)>(); break;
        default: run.template operator()<kMostVectors>(); break;
      }
    }
  }
}

#define LECT11EXT_MULTIPLY(P)                                                                                         \
  template void multiply<Order::Along, P>(const Matrix<const P>&, int64_t, int64_t, const Matrix<const P>&,           \
                                          const Matrix<Compute<P>>&, int64_t, bool);                                  \
  template void multiply<Order::Across, P>(const Matrix<const P>&, int64_t, int64_t, const Matrix<const P>&,          \
                                           const Matrix<Compute<P>>&, int64_t, bool);
LECT11EXT_MULTIPLY(float)
LECT11EXT_MULTIPLY(double)
#if defined(__AVX512BF16__)
LECT11EXT_MULTIPLY(at::BFloat16)
#endif

}  // namespace lect11ext::CPU_CAPABILITY
