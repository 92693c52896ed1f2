#include "common/product.h"

#include "common/cpu/dot.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// Rows of C that a build has registers for, beside the four vectors of a row of B.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
// Depth of a packed panel: 256 × 64 floats are 64 KiB, an eighth to a half of a second-level cache.
constexpr int64_t kDepth = 256;
// From this many rows on a panel of B is copied, dense and converted, before it is used: fewer do not repay the copy.
constexpr int64_t kRowsWorthPacking = 12;

template <class C>
constexpr int kTileColumns = kTileVectors * kLanes<C>;

// The pragmas make the compiler unroll before it assigns registers; without them the accumulators live on the stack.
// M rows × kTileColumns of C, from dense rows of B in the arithmetic's type.
template <int M, class C>
void tile(int64_t depth, const C* a, int64_t a_row, int64_t a_column, const C* b, int64_t b_stride, C* out,
          int64_t out_stride, bool add) {
  Vec<C> acc[M][kTileVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      acc[m][v] = add ? Vec<C>::loadu(out + m * out_stride + v * kLanes<C>) : Vec<C>(C(0));
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> row[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) row[v] = Vec<C>::loadu(b + k * b_stride + v * kLanes<C>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<C> scale(a[m * a_row + k * a_column]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) acc[m][v] = at::vec::fmadd(scale, row[v], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) acc[m][v].store(out + m * out_stride + v * kLanes<C>);
  }
}

template <class C>
void tiles(int64_t rows, int64_t depth, const C* a, int64_t a_row, int64_t a_column, const C* b, int64_t b_stride,
           C* out, int64_t out_stride, bool add) {
  for (int64_t m = 0; m < rows; m += kTileRows) {
    const C* from = a + m * a_row;
    C* to = out + m * out_stride;
    const auto run = [&]<int M>() { tile<M>(depth, from, a_row, a_column, b, b_stride, to, out_stride, add); };
    switch (std::min<int64_t>(kTileRows, rows - m)) {
      case 1: run.template operator()<1>(); break;
      case 2: run.template operator()<2>(); break;
      case 3: run.template operator()<3>(); break;
      case 4: run.template operator()<4>(); break;
      case 5: run.template operator()<std::min(5, kTileRows)>(); break;
      default: run.template operator()<kTileRows>(); break;
    }
  }
}

template <class S>
void product(const Product& args, int64_t begin, int64_t end) {
  using C = Compute<S>;
  constexpr int64_t kColumns = kProductColumns;
  static_assert(kColumns % kTileColumns<C> == 0);
  alignas(64) C panel[kDepth * kColumns];
  alignas(64) C sums[kProductRows * kColumns];
  const int64_t blocks = (args.n + kColumns - 1) / kColumns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_row = item / blocks * kProductRows, first_column = item % blocks * kColumns;
    const int64_t rows = std::min(kProductRows, args.m - first_row);
    const int64_t columns = std::min(kColumns, args.n - first_column);
    const C* a = static_cast<const C*>(args.a) + first_row * args.a_row;
    const S* b = static_cast<const S*>(args.b) + first_column;
    S* c = static_cast<S*>(args.c) + first_row * args.n + first_column;
    const bool whole = columns == kColumns && std::is_same_v<S, C>;
    // Blocks that need neither conversion nor a tail go straight between memory and registers.
    C* out = whole ? reinterpret_cast<C*>(c) : sums;
    const int64_t out_stride = whole ? args.n : kColumns;
    if (!whole && args.accumulate) {
      for (int64_t r = 0; r < rows; ++r) convert(c + r * args.n, sums + r * kColumns, columns);
    }
    const bool pack = !whole || rows >= kRowsWorthPacking;
    for (int64_t k = 0; k == 0 || k < args.k; k += kDepth) {
      const int64_t depth = std::min(kDepth, args.k - k);
      const C* source = reinterpret_cast<const C*>(b + k * args.b_stride);
      if (pack) {
        for (int64_t d = 0; d < depth; ++d) convert(b + (k + d) * args.b_stride, panel + d * kColumns, columns);
      }
      for (int64_t v = 0; v < columns; v += kTileColumns<C>) {
        tiles(rows, depth, a + k * args.a_column, args.a_row, args.a_column, (pack ? panel : source) + v,
              pack ? kColumns : args.b_stride, out + v, out_stride, args.accumulate || k > 0);
      }
    }
    if (!whole) {
      for (int64_t r = 0; r < rows; ++r) convert(sums + r * kColumns, c + r * args.n, columns);
    }
  }
}

template <class S>
void column_sums(const ColumnSums& args, int64_t begin, int64_t end) {
  using C = Compute<S>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kSumColumns, n = std::min(kSumColumns, args.n - first);
    alignas(64) C sums[kSumColumns] = {};
    for (int64_t m = 0; m < args.m; ++m) {
      const C* row = static_cast<const C*>(args.a) + m * args.n + first;
      for (int64_t i = 0; i < n; ++i) sums[i] += row[i];
    }
    convert(sums, static_cast<S*>(args.out) + first, n);
  }
}

}  // namespace

void product_kernel(const Product& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) { product<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void column_sums_kernel(const ColumnSums& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) { column_sums<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

}  // namespace lect11ext::CPU_CAPABILITY
