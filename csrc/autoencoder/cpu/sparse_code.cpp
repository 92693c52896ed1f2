// Sums and dot products of rows of a table at scattered places. The table is usually larger than the caches, and every
// row comes from memory: four rows are read at a time, and the next four asked for.
#include "autoencoder/sparse_code.h"

#include "common/cpu/memory.h"
#include "common/cpu/scratch.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

constexpr int kAtOnce = 4;

template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

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

template <class S, int N>
inline void add_rows(const S* const* rows, const Compute<S>* weights, int64_t width, const S* const* next,
                     Compute<S>* sums) {
  using T = Compute<S>;
  Vec<T> weight[N];
  for (int i = 0; i < N; ++i) weight[i] = Vec<T>(weights[i]);
  for_vectors<S>(width, [&](int64_t d, auto load) {
    Lanes<S> sum;
    for (int part = 0; part < kParts<S>; ++part) sum.part[part] = Vec<T>::loadu(sums + d + part * kLanes<T>);
    for (int i = 0; i < N; ++i) {
      __builtin_prefetch(next[i] + d);
      const Lanes<S> row = load(rows[i]);
      for (int part = 0; part < kParts<S>; ++part) {
        sum.part[part] = at::vec::fmadd(weight[i], row.part[part], sum.part[part]);
      }
    }
    for (int part = 0; part < kParts<S>; ++part) sum.part[part].store(sums + d + part * kLanes<T>);
  });
}

template <class S>
void sum_rows(const WeightedRows& args, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const bool ordered = args.order != nullptr;
  const auto start = [&](int64_t r) { return ordered ? args.starts[r] : r * args.k; };
  const auto place = [&](int64_t e) { return ordered ? args.order[e] : e; };
  const auto table_row = [&](int64_t p) {
    return static_cast<const S*>(args.table) + (ordered ? p / args.k : args.indices[p]) * args.stride;
  };
  const T* const values = static_cast<const T*>(args.values);
  const T* const bias = static_cast<const T*>(args.bias);
  Scratch<T> sums(args.width);
  const int64_t last = start(end);
  const S *rows[kAtOnce], *next[kAtOnce];
  T weights[kAtOnce];
  // Rows of the entries from e on, those beyond the end the first again.
  const auto rows_from = [&](int64_t e, const S** out) {
    for (int i = 0; i < kAtOnce; ++i) out[i] = e + i < last ? table_row(place(e + i)) : i > 0 ? out[0] : rows[0];
  };
  if (start(begin) < last) rows_from(start(begin), next);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t stop = start(r + 1);
    if (bias != nullptr) std::copy(bias, bias + args.width, static_cast<T*>(sums));
    else std::fill(static_cast<T*>(sums), sums + args.width, T(0));
    for (int64_t e = start(r); e < stop; e += kAtOnce) {
      const int64_t count = std::min<int64_t>(kAtOnce, stop - e);
      std::copy(next, next + kAtOnce, rows);
      for (int64_t i = 0; i < count; ++i) weights[i] = values[place(e + i)];
      rows_from(e + count, next);
      if (count == kAtOnce) {
        add_rows<S, kAtOnce>(rows, weights, args.width, next, sums);
      } else {
        for (int64_t i = 0; i < count; ++i) add_rows<S, 1>(rows + i, weights + i, args.width, next + i, sums);
      }
    }
    with_type(args.out_dtype, [&](auto* type) {
      convert(static_cast<const T*>(sums), static_cast<decltype(type)>(args.out) + r * args.width, args.width);
    });
  }
}

// --- dot products -------------------------------------------------------------------------------------------------

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
    out[i] = at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, total);
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
