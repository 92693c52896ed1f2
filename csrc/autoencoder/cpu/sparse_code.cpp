// Sums and dot products of rows of a table at scattered places. The table is usually larger than the caches, and every
// row comes from memory: those to be read next are asked for ahead.
#include "autoencoder/sparse_code.h"

#include "common/cpu/math.h"
#include "common/cpu/memory.h"
#include "common/cpu/scratch.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// Vectors of the arithmetic in one of the storage type S.
template <class S>
inline constexpr int kParts = kIsHalf<S> ? 2 : 1;

template <class S>
struct Lanes {
  Vec<Compute<S>> part[kParts<S>];
};

template <class S>
inline Lanes<S> widen(Vec<S> x) {
  if constexpr (kIsHalf<S>) {
    const auto [low, high] = at::vec::convert_to_float<S>(x);
    return {{low, high}};
  } else {
    return {{x}};
  }
}

// Calls f(d, load) for every vector of a row of `width` elements of S; load(from) takes that vector of a row.
template <class S, class F>
inline void for_vectors(int64_t width, F f) {
  int64_t d = 0;
  for (; d + kLanes<S> <= width; d += kLanes<S>) {
    f(d, [d](const S* from) { return widen<S>(Vec<S>::loadu(from + d)); });
  }
  if (d < width) {
    f(d, [d, left = static_cast<int>(width - d)](const S* from) { return widen<S>(Vec<S>::loadu(from + d, left)); });
  }
}

// --- weighted sums ------------------------------------------------------------------------------------------------

// Columns whose sums stay in registers while all rows of a batch pass, and how many rows ahead theirs are asked for:
// some 100 lines.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kHeld = 16, kAhead = 8;
#else
constexpr int kHeld = 8, kAhead = 24;
#endif
// Rows whose places are looked up together.
constexpr int kBatch = 64;

// sums[d …] += Σ weights[i] · rows[i][d …], of kHeld vectors; behind the rows lie kAhead more. In the end the first
// rows are asked for again, at the columns that come next, or where these are the last the rows behind.
template <class S>
inline void add_columns(const S* const* rows, const Compute<S>* weights, int64_t count, int64_t d, bool last,
                        Compute<S>* sums) {
  using T = Compute<S>;
  constexpr int kPart = kHeld / kParts<S>;  // vectors of storage
  constexpr int64_t kLine = 64 / sizeof(S);
  Vec<T> sum[kHeld];
#pragma GCC unroll 16
  for (int v = 0; v < kHeld; ++v) sum[v] = Vec<T>::loadu(sums + d + v * kLanes<T>);
  for (int64_t i = 0; i < count; ++i) {
    const Vec<T> weight(weights[i]);
    const S* const ahead = i + kAhead < count ? rows[i + kAhead] + d
                           : last             ? rows[i + kAhead]
                                              : rows[i + kAhead - count] + d + kPart * kLanes<S>;
    for (int64_t at = 0; at < kPart * kLanes<S>; at += kLine) __builtin_prefetch(ahead + at);
#pragma GCC unroll 16
    for (int v = 0; v < kPart; ++v) {
      const Lanes<S> row = widen<S>(Vec<S>::loadu(rows[i] + d + v * kLanes<S>));
      for (int part = 0; part < kParts<S>; ++part) {
        Vec<T>& to = sum[v * kParts<S> + part];
        to = at::vec::fmadd(weight, row.part[part], to);
      }
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < kHeld; ++v) sum[v].store(sums + d + v * kLanes<T>);
}

// What is left beside whole blocks of columns; of a last vector that is not whole, `sums` has room for all.
template <class S>
inline void add_rest(const S* row, Compute<S> weight, int64_t first, int64_t width, Compute<S>* sums) {
  using T = Compute<S>;
  for_vectors<S>(width - first, [&](int64_t d, auto load) {
    const Lanes<S> from = load(row + first);
    for (int part = 0; part < kParts<S>; ++part) {
      T* const to = sums + first + d + part * kLanes<T>;
      at::vec::fmadd(Vec<T>(weight), from.part[part], Vec<T>::loadu(to)).store(to);
    }
  });
}

template <class S>
void sum_rows(const WeightedRows& args, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int64_t kColumns = kHeld * kLanes<T>;
  const bool ordered = args.order != nullptr;
  const auto start = [&](int64_t r) { return ordered ? args.starts[r] : r * args.k; };
  const auto place = [&](int64_t e) { return ordered ? args.order[e] : e; };
  const auto table_row = [&](int64_t p) {
    return static_cast<const S*>(args.table) + (ordered ? p / args.k : args.indices[p]) * args.stride;
  };
  const T* const values = static_cast<const T*>(args.values);
  const T* const bias = static_cast<const T*>(args.bias);
  // Rows of whole vectors are summed where they belong; add_rest writes beyond the end of others.
  const bool direct = args.out_dtype == kDType<T> && args.width % kLanes<S> == 0;
  Scratch<T> buffer(direct ? 0 : args.width);
  const int64_t last = start(end), whole = args.width / kColumns * kColumns;
  const S* rows[kBatch + kAhead];  // of a batch, and the first of those behind it
  T weights[kBatch];
  // Those beyond the end are the first again.
  const auto row_at = [&](int64_t e) { return e < last ? table_row(place(e)) : rows[0]; };
  if (start(begin) < last) {
    for (int64_t i = 0; i < kAhead; ++i) rows[i] = row_at(start(begin) + i);
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t stop = start(r + 1);
    T* const sums = direct ? static_cast<T*>(args.out) + r * args.width : static_cast<T*>(buffer);
    if (bias != nullptr) std::copy(bias, bias + args.width, sums);
    else std::fill(sums, sums + args.width, T(0));
    for (int64_t e = start(r); e < stop; e += kBatch) {
      const int64_t count = std::min<int64_t>(kBatch, stop - e);
      for (int64_t i = 0; i < count; ++i) weights[i] = values[place(e + i)];
      for (int64_t i = 0; i < count; ++i) rows[kAhead + i] = row_at(e + kAhead + i);
      for (int64_t d = 0; d < whole; d += kColumns) {
        add_columns<S>(rows, weights, count, d, d + kColumns == whole, sums);
      }
      for (int64_t i = 0; i < count && whole < args.width; ++i) {
        add_rest<S>(rows[i], weights[i], whole, args.width, sums);
      }
      std::copy(rows + count, rows + count + kAhead, rows);
    }
    if (direct) continue;
    with_type(args.out_dtype, [&](auto* type) {
      convert(static_cast<const T*>(sums), static_cast<decltype(type)>(args.out) + r * args.width, args.width);
    });
  }
}

// --- dot products -------------------------------------------------------------------------------------------------

constexpr int kAtOnce = 4;  // rows, and as many are asked for

template <class S, int N>
inline void dot_rows(const S* const* rows, const Compute<S>* dense, int64_t width, const S* const* next,
                     Compute<S>* out) {
  using T = Compute<S>;
  Lanes<S> sum[N];
  for (auto& lanes : sum) {
    for (auto& part : lanes.part) part = Vec<T>(T(0));
  }
  for_vectors<S>(width, [&](int64_t d, auto load) {
    Lanes<S> other;
    for (int part = 0; part < kParts<S>; ++part) other.part[part] = Vec<T>::loadu(dense + d + part * kLanes<T>);
    for (int i = 0; i < N; ++i) {
      __builtin_prefetch(next[i] + d);
      const Lanes<S> row = load(rows[i]);
      for (int part = 0; part < kParts<S>; ++part) {
        sum[i].part[part] = at::vec::fmadd(row.part[part], other.part[part], sum[i].part[part]);
      }
    }
  });
  for (int i = 0; i < N; ++i) {
    Vec<T> total = sum[i].part[0];
    for (int part = 1; part < kParts<S>; ++part) total = total + sum[i].part[part];
    out[i] = sum_of_lanes(total);
  }
}

template <class S>
void dots(const RowDots& args, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const T* const bias = static_cast<const T*>(args.bias);
  Scratch<T> dense(args.width), out(args.k);
  const int64_t last = end * args.k;
  const S *rows[kAtOnce], *next[kAtOnce];
  const auto rows_from = [&](int64_t e, const S** to) {
    for (int i = 0; i < kAtOnce; ++i) {
      to[i] = e + i < last ? static_cast<const S*>(args.table) + args.indices[e + i] * args.stride
              : i > 0      ? to[0]
                           : rows[0];
    }
  };
  if (args.k > 0 && begin < end) rows_from(begin * args.k, next);
  for (int64_t r = begin; r < end; ++r) {
    with_type(args.dense_dtype, [&](auto* type) {
      const auto* const from = static_cast<const std::remove_pointer_t<decltype(type)>*>(args.dense);
      convert(from + r * args.dense_stride, static_cast<T*>(dense), args.width);
    });
    for (int64_t j = 0; j < args.k; j += kAtOnce) {
      const int64_t count = std::min<int64_t>(kAtOnce, args.k - j);
      std::copy(next, next + kAtOnce, rows);
      rows_from(r * args.k + j + count, next);
      if (count == kAtOnce) {
        dot_rows<S, kAtOnce>(rows, dense, args.width, next, out + j);
      } else {
        for (int64_t i = 0; i < count; ++i) dot_rows<S, 1>(rows + i, dense, args.width, next + i, out + j + i);
      }
    }
    if (bias != nullptr) {
      for (int64_t j = 0; j < args.k; ++j) out[j] += bias[args.indices[r * args.k + j]];
    }
    with_type(args.out_dtype, [&](auto* type) {
      convert(static_cast<const T*>(out), static_cast<decltype(type)>(args.out) + r * args.k, args.k);
    });
  }
}

}  // namespace

void weighted_rows_kernel(const WeightedRows& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) { sum_rows<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

void row_dots_kernel(const RowDots& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) { dots<std::remove_pointer_t<decltype(type)>>(args, begin, end); });
}

}  // namespace lect11ext::CPU_CAPABILITY
