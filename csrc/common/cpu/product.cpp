#include "common/product.h"

#include "common/cpu/dot.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

constexpr int64_t kLineBytes = 64;
// Rows of C that a build has registers for, beside the four vectors of a row of B.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
// Depth of a packed panel: narrow and wide ones are 32 and 128 KiB of floats, a part of a second-level cache. A panel's
// sums start from zero and are then added up, which keeps their error that of sums of this length.
constexpr int64_t kDepth = 128;
// From this many rows on a panel of B is copied, dense and converted, before it is used: fewer do not repay the copy.
constexpr int64_t kRowsWorthPacking = 12;

template <class C>
constexpr int kTileColumns = kTileVectors * kLanes<C>;
// Whether rows of A are packed too, in wide blocks: in float for AVX2 and the default build, whose blocks have sixteen
// tiles of columns, not for AVX-512, whose have four (docs/performance-notes.md).
template <class C>
constexpr bool kPacksRows = kWide / kTileColumns<C> >= 16;

// One cache line in each row of what a later block reads. Its rows lie on different pages, where no hardware prefetcher
// follows: fetched here, between multiply-adds, they are near when they are packed.
struct Ahead {
  const char* line;
  int64_t stride;  // bytes; 0 where there is nothing to fetch
};

inline void prefetch_far(const char* line) {
#if defined(__x86_64__)
  // gcc keeps the accumulators in memory when __builtin_prefetch stands in their loop: half the speed.
  asm volatile("prefetcht1 (%0)" ::"r"(line));
#else
  __builtin_prefetch(line, /*write=*/0, /*locality=*/2);
#endif
}

// The pragmas make the compiler unroll before it assigns registers; without them the accumulators live on the stack.
// M rows × kTileColumns of C, from dense rows of B in the arithmetic's type.
template <int M, class C>
void tile(int64_t depth, const C* a, int64_t a_row, int64_t a_column, const C* b, int64_t b_stride, C* out,
          int64_t out_stride, bool add, const char* line, int64_t line_stride) {
  Vec<C> acc[M][kTileVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) acc[m][v] = Vec<C>(C(0));
  }
  for (int64_t k = 0; k < depth; ++k, line += line_stride) {
    Vec<C> row[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) row[v] = Vec<C>::loadu(b + k * b_stride + v * kLanes<C>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<C> scale(a[m * a_row + k * a_column]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) acc[m][v] = at::vec::fmadd(scale, row[v], acc[m][v]);
    }
    prefetch_far(line);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      C* to = out + m * out_stride + v * kLanes<C>;
      (add ? acc[m][v] + Vec<C>::loadu(to) : acc[m][v]).store(to);
    }
  }
}

template <class C>
void tiles(int64_t rows, int64_t depth, const C* a, int64_t a_tile, int64_t a_row, int64_t a_column, const C* b,
           int64_t b_stride, C* out, int64_t out_stride, bool add, Ahead ahead, int ahead_lines) {
  for (int64_t m = 0; m < rows; m += kTileRows) {
    const C* from = a + m / kTileRows * a_tile;
    C* to = out + m * out_stride;
    // The next rows of C: their lines come while this tile computes.
    for (int64_t r = std::min(m + kTileRows, rows); r < std::min(m + 2 * kTileRows, rows); ++r) {
      for (int v = 0; v < kTileVectors; ++v) __builtin_prefetch(out + r * out_stride + v * kLanes<C>, /*write=*/1);
    }
    const Ahead next = ahead_lines-- > 0 ? ahead : Ahead{reinterpret_cast<const char*>(to), 0};
    ahead.line += kLineBytes;
    const auto run = [&]<int M>() {
      tile<M>(depth, from, a_row, a_column, b, b_stride, to, out_stride, add, next.line, next.stride);
    };
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

// Tiles of rows of A, [k][kTileRows] each. Where they lie their rows are often pages apart, all in one set of the first
// level, and every tile of columns reads them again.
template <class C>
void pack_rows(const C* a, int64_t a_row, int64_t a_column, int64_t rows, int64_t depth, C* to) {
  for (int64_t m = 0; m < rows; m += kTileRows, a += kTileRows * a_row, to += depth * kTileRows) {
    const int64_t n = std::min<int64_t>(kTileRows, rows - m);
    if (n < kTileRows) {
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t i = 0; i < n; ++i) to[k * kTileRows + i] = a[i * a_row + k * a_column];
      }
    } else if (a_row == 1) {
      for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * kTileRows, a + k * a_column, kTileRows * sizeof(C));
    } else {
      for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) to[k * kTileRows + i] = a[i * a_row + k * a_column];
      }
    }
  }
}

template <class S>
void product(const Product& args, int64_t begin, int64_t end) {
  using C = Compute<S>;
  static_assert(kNarrow % kTileColumns<C> == 0 && kWide % kTileColumns<C> == 0);
  alignas(64) C panel[kDepth * kWide];
  alignas(64) C sums[kProductRows * kWide];
  alignas(64) C packed_rows[kPacksRows<C> ? kProductRows * kDepth : 1];
  const int64_t width = args.columns;
  const int64_t blocks = (args.n + width - 1) / width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_row = item / blocks * kProductRows, first_column = item % blocks * width;
    const int64_t rows = std::min(kProductRows, args.m - first_row);
    const int64_t columns = std::min(width, args.n - first_column);
    const C* a = static_cast<const C*>(args.a) + first_row * args.a_row;
    const S* b = static_cast<const S*>(args.b) + first_column;
    S* c = static_cast<S*>(args.c) + first_row * args.n + first_column;
    // Blocks that need neither conversion nor a tail go straight between memory and registers.
    const bool direct = columns % kTileColumns<C> == 0 && std::is_same_v<S, C>;
    C* out = direct ? reinterpret_cast<C*>(c) : sums;
    const int64_t out_stride = direct ? args.n : width;
    if (!direct && args.accumulate) {
      for (int64_t r = 0; r < rows; ++r) convert(c + r * args.n, sums + r * width, columns);
    }
    const bool pack = !direct || rows >= kRowsWorthPacking;
    for (int64_t k = 0; k == 0 || k < args.k; k += kDepth) {
      const int64_t depth = std::min(kDepth, args.k - k);
      const C* source = reinterpret_cast<const C*>(b + k * args.b_stride);
      if (pack) {
        for (int64_t d = 0; d < depth; ++d) convert(b + (k + d) * args.b_stride, panel + d * width, columns);
      }
      // The next panel: further down, or the first of the next columns.
      const S* next = b + (k + kDepth < args.k ? (k + kDepth) * args.b_stride : width);
      Ahead ahead{reinterpret_cast<const char*>(next), args.b_stride * static_cast<int64_t>(sizeof(S))};
      const C* left = a + k * args.a_column;
      int64_t a_row = args.a_row, a_column = args.a_column, a_tile = kTileRows * a_row;
      if (kPacksRows<C> && columns == kWide) {
        pack_rows(left, a_row, a_column, rows, depth, packed_rows);
        left = packed_rows, a_row = 1, a_column = kTileRows, a_tile = kTileRows * depth;
      }
      const int lines = pack ? kTileColumns<C> * sizeof(S) / kLineBytes : 0;
      for (int64_t v = 0; v < columns; v += kTileColumns<C>, ahead.line += kTileColumns<C> * sizeof(S)) {
        tiles(rows, depth, left, a_tile, a_row, a_column, (pack ? panel : source) + v, pack ? width : args.b_stride,
              out + v, out_stride, args.accumulate || k > 0, ahead, lines);
      }
    }
    if (!direct) {
      for (int64_t r = 0; r < rows; ++r) convert(sums + r * width, c + r * args.n, columns);
    }
  }
}

// Rows that are added up before what was found is, with the rounding of the last time made good: the error of a sum of
// a million rows is that of 32.
constexpr int64_t kSumRows = 32;

template <class S>
void column_sums(const ColumnSums& args, int64_t begin, int64_t end) {
  using C = Compute<S>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kSumColumns, n = std::min(kSumColumns, args.n - first);
    alignas(64) C sums[kSumColumns] = {}, part[kSumColumns], lost[kSumColumns] = {};
    C widened[kSumColumns];
    for (int64_t from = 0; from < args.m; from += kSumRows) {
      std::fill_n(part, n, C(0));
      for (int64_t m = from; m < std::min(from + kSumRows, args.m); ++m) {
        const int64_t at = m * args.n + first;
        if (args.rounded) convert(static_cast<const S*>(args.a) + at, widened, n);
        const C* row = args.rounded ? widened : static_cast<const C*>(args.a) + at;
        for (int64_t i = 0; i < n; ++i) part[i] += row[i];
      }
      for (int64_t i = 0; i < n; ++i) {  // Kahan 1965
        const C next = part[i] - lost[i], sum = sums[i] + next, error = (sum - sums[i]) - next;
        lost[i] = error - error == 0 ? error : 0;  // of inf there is none
        sums[i] = sum;
      }
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
