// What the passes of dot-product attention on the CPU share: which keys a query sees, dropout, and products of rows
// with packed panels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/cpu/dot_product_mask.h"
#include "attention/cpu/dot_product_matrix.h"
#include "attention/dot_product_cpu.h"
#include "common/cpu/math.h"
#include "common/cpu/words.h"

namespace lect11ext::CPU_CAPABILITY {

// Weights are powers of a base that is cheap for the type: 2 for float, e for double. A score times kLogBase is the
// exponent.
template <class C>
inline constexpr C kLogBase = std::is_same_v<C, float> ? C(1.44269504088896341) : C(1);
template <class C>
inline constexpr double kLogOfBase = std::is_same_v<C, float> ? 0.69314718055994531 : 1.0;
inline Vec<float> power(Vec<float> x) { return exp2(x); }
inline Vec<double> power(Vec<double> x) { return x.exp(); }

// Beyond this exponents are differences of scores, not of products of scores with a factor: the product's rounding
// would be an error of all weights of a row, and of its lse, that the backward does not make again.
template <class C>
inline constexpr C kLargeExponent = 64;

// The greater one; acc where x is NaN, which shows in the weights anyway.
inline Vec<float> greater(Vec<float> x, Vec<float> acc) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(x, acc);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(x, acc);
#else
  return at::vec::maximum(x, acc);
#endif
}
inline Vec<double> greater(Vec<double> x, Vec<double> acc) { return at::vec::maximum(x, acc); }

// A score less its row's lse, whose exponential is a weight. It exceeds 0 only by what it was rounded otherwise where
// the lse was found, which of a huge score would be a factor of any size. NaN stays.
inline constexpr float kMostExcess = 0.5f;
inline Vec<float> bounded(Vec<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(_mm512_set1_ps(kMostExcess), x);
#else
  return at::vec::minimum(x, Vec<float>(kMostExcess));
#endif
}
inline Vec<double> bounded(Vec<double> x) { return at::vec::minimum(x, Vec<double>(kMostExcess)); }

template <class C>
inline C greatest_lane(const Vec<C>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<C, float>) return _mm512_reduce_max_ps(v);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<C, float>) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
#endif
  C lanes[kLanes<C>];
  v.store(lanes);
  return *std::max_element(lanes, lanes + kLanes<C>);
}

// Keys that a tile takes are rounded up to this: a vector of operands P, and whole blocks of dropout's stream.
template <class P>
inline constexpr int64_t kKeyStep = std::max<int64_t>(kLanes<P>, kDropoutBlock);

// Vectors of sums of which a vector of operands is made.
template <class P>
inline constexpr int kParts = kLanes<P> / kLanes<Compute<P>>;

// Weights, rounded to the operands of the next product.
template <class P>
inline void store_weights(const Vec<Compute<P>> (&weights)[kParts<P>], P* to) {
  if constexpr (kParts<P> == 1) {
    weights[0].store(to);
  } else {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]));
#else
    at::vec::convert_from_float<P>(weights[0], weights[1]).store(to);
#endif
  }
}

// The keys that a query sees by causality and window, and the queries that see a key: both ascend.
struct Band {
  int64_t diagonal, left, right, queries, keys;

  Band(const Attention& args, const AttentionSequence& s)
      : diagonal(s.diagonal(args)),
        left(args.window_left),
        right(args.window_right),
        queries(s.queries),
        keys(s.keys) {}

  int64_t first_key(int64_t i) const { return std::max<int64_t>(0, i + diagonal - left); }
  int64_t end_key(int64_t i) const { return std::clamp<int64_t>(i + diagonal + right + 1, 0, keys); }
  // Of `rows` queries from i on, those that see any of keys j … j + n − 1: [first_row, end_row).
  int64_t first_row(int64_t i, int64_t rows, int64_t j) const {
    return std::clamp<int64_t>(j - right - diagonal - i, 0, rows);
  }
  int64_t end_row(int64_t i, int64_t rows, int64_t j, int64_t n) const {
    return std::clamp<int64_t>(j + n + left - diagonal - i, 0, rows);
  }
};

// Where the rows of one head of one sequence lie.
template <class S>
inline const S* row_of(const AttentionOperand& t, int64_t batch, int64_t head, int64_t position) {
  return static_cast<const S*>(t.data) + batch * t.strides.batch + head * t.strides.head +
         position * t.strides.position;
}
template <class S>
inline S* row_of(void* data, const AttentionStrides& s, int64_t batch, int64_t head, int64_t position) {
  return static_cast<S*>(data) + batch * s.batch + head * s.head + position * s.position;
}
inline int64_t lse_row(const Attention& args, int64_t batch, int64_t head, int64_t position) {
  return (batch * args.heads + head) * args.queries + position;
}

// Calls f with null pointers of the storage type and of the type that products' operands have.
template <class F>
inline void with_operands(DType dtype, bool widens, F f) {
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<Operand<S>, Compute<S>>) {
      if (widens) return f(type, static_cast<Compute<S>*>(nullptr));
    }
    f(type, static_cast<Operand<S>*>(nullptr));
  });
}

// `rows` rows of a tensor as operands of a product: in place, or rounded up in columns and converted into `buffer`.
template <class S, class P>
inline Matrix<const P> operand_rows(const AttentionOperand& t, int64_t columns, int64_t batch, int64_t head,
                                    int64_t position, int64_t rows, P* buffer) {
  if constexpr (std::is_same_v<S, P>) {
    if (columns % PanelStep<P>::kDeep == 0) return {row_of<S>(t, batch, head, position), t.strides.position};
  }
  const int64_t padded = round_up(columns, kDeepStep);
  for (int64_t r = 0; r < rows; ++r) {
    P* to = buffer + r * padded;
    convert(row_of<S>(t, batch, head, position + r), to, columns);
    std::fill(to + columns, to + padded, P(0));
  }
  return {buffer, padded};
}

// Multiplies the weights of keys j … j + n − 1 of a row by z; j is a multiple of kDropoutBlock.
template <class C>
class Dropout {
 public:
  explicit Dropout(const Attention& args)
      : args_(args), acts_(args.dropout_p > 0), keys_(acts_ ? static_cast<uint64_t>(args.dropout_key[0]) : 0) {
    if (!acts_) return;
    offset_ = static_cast<uint64_t>(args.dropout_key[1]);
    threshold_ = dropout_threshold(args.dropout_p);
    kept_ = static_cast<C>(dropout_factor(args.dropout_p));
  }

  bool acts() const { return acts_; }

  // z of keys j … j + n − 1 of query `position` of its tensor; z has room for a panel more.
  void factors(int64_t batch, int64_t head, int64_t position, int64_t j, int64_t n, C* z) const {
    constexpr int64_t kStepKeys = 2 * kNormalsPerStep, kManyKeys = kStepsTogether * kStepKeys;
    static_assert(kStepKeys <= kPanelKeys);
    const auto row = static_cast<uint64_t>(lse_row(args_, batch, head, position));
    const auto blocks = static_cast<uint64_t>((args_.keys + kDropoutBlock - 1) / kDropoutBlock);
    const uint64_t counter = offset_ + row * blocks + static_cast<uint64_t>(j / kDropoutBlock);
    int64_t k = 0;
    for (; k + kManyKeys <= n; k += kManyKeys)
      step<kStepsTogether>(counter + static_cast<uint64_t>(k / kDropoutBlock), z + k);
    for (; k < n; k += kStepKeys) step<1>(counter + static_cast<uint64_t>(k / kDropoutBlock), z + k);
  }

 private:
  template <int kSteps>
  void step(uint64_t counter, C* z) const {
    constexpr int kKeys = 2 * kSteps * kNormalsPerStep;
    uint32_t drawn[kKeys / 2];
    uint16_t halves[kKeys];
    ordered_words<kSteps>(keys_, counter, drawn);
    std::memcpy(halves, drawn, sizeof(halves));  // of a word the lower one first
    for (int i = 0; i < kKeys; ++i) z[i] = halves[i] >= threshold_ ? kept_ : C(0);
  }

  const Attention& args_;
  const bool acts_;
  const PhiloxKeys keys_;
  uint64_t offset_ = 0;
  uint32_t threshold_ = 0;
  C kept_ = 0;
};

// Of a tile's rows those that see any key of each panel of a block, and whether these are all rows of every panel.
struct PanelRows {
  static constexpr int64_t kMost = kBlockKeys / kPanelKeys;
  int64_t first[kMost], last[kMost];
  bool whole = true;

  // By causality and window: `rows` queries from i on, `width` keys from j on.
  PanelRows(const Band& band, int64_t i, int64_t rows, int64_t j, int64_t width) {
    for (int64_t p = 0; p * kPanelKeys < width; ++p) {
      const int64_t keys = std::min(kPanelKeys, width - p * kPanelKeys);
      first[p] = band.first_row(i, rows, j + p * kPanelKeys);
      last[p] = band.end_row(i, rows, j + p * kPanelKeys, keys);
      whole = whole && first[p] == 0 && last[p] == rows;
    }
  }

  // By the mask too, whose biases of n keys are given. Returns whether any row is left.
  template <class C>
  bool narrow(const Matrix<C>& bias, int64_t n) {
    bool any = false;
    for (int64_t p = 0; p * kPanelKeys < n; ++p) {
      const int64_t begin = p * kPanelKeys, end = std::min(begin + kPanelKeys, n);
      const auto barred = [&](int64_t r) {
        const Vec<C> low(kMinusInfinity<C>), zero(C(0)), one(C(1));
        Vec<C> others = zero;  // biases that are not −∞; NaN is none
        int64_t k = begin;
        for (; k + kLanes<C> <= end; k += kLanes<C>) {
          others = others + select_equal(Vec<C>::loadu(bias.row(r) + k), low, zero, one);
        }
        if (greatest_lane(others) != 0) return false;
        return std::all_of(bias.row(r) + k, bias.row(r) + end, [](C b) { return b == kMinusInfinity<C>; });
      };
      const int64_t top = first[p], bottom = last[p];
      while (first[p] < last[p] && barred(first[p])) ++first[p];
      while (first[p] < last[p] && barred(last[p] - 1)) --last[p];
      whole = whole && first[p] == top && last[p] == bottom;
      any = any || first[p] < last[p];
    }
    return any;
  }
};

// A tile's rows of queries, or of gradients of outputs, times `width` packed keys from j on.
template <class P>
inline void multiply_panels(const PanelRows& rows, const Matrix<const P>& a, const PackedOperand& b,
                            int64_t first_panel, int64_t j, int64_t width, const Matrix<Compute<P>>& out, bool add) {
  const int64_t depth = round_up(b.columns, PanelStep<P>::kDeep), size = transposed_panel(b.columns);
  for (int64_t p = 0; p * kPanelKeys < width; ++p) {
    const int64_t first = rows.first[p], count = rows.last[p] - first,
                  keys = std::min(kPanelKeys, width - p * kPanelKeys);
    if (count <= 0) continue;
    const P* panel = static_cast<const P*>(b.transposed) + (first_panel - b.first + j / kPanelKeys + p) * size;
    multiply<Order::Along, P>({a.row(first), a.stride}, count, depth, {panel, kPanelKeys * PanelStep<P>::kDeep},
                              {out.row(first) + p * kPanelKeys, out.stride}, keys, add);
  }
}

// Where the rows of a head's keys or values lie, from the first on, in steps of kDeep keys.
template <class P>
struct HeadRows {
  Matrix<const P> rows{nullptr, 0};  // data null where there are none
  const bool* finite = nullptr;      // of each panel
  int64_t columns = 0;               // rounded to kColumnStep
  int64_t keys = 0;                  // as many lie there

  HeadRows() = default;
  HeadRows(const PackedOperand& from, const AttentionSequence& s, int64_t kv_head, int64_t first_panel)
      : columns(round_up(from.columns, kColumnStep)), keys(s.keys) {
    if (from.from.data == nullptr) return;
    first_panel -= from.first;
    finite = from.finite + first_panel;
    if (from.rows_are_own) {
      rows = {row_of<P>(from.from, s.batch, kv_head, s.key_start), from.from.strides.position};
    } else if (from.rows != nullptr) {
      rows = {static_cast<const P*>(from.rows) + first_panel * rows_panel(from.columns), columns * PanelStep<P>::kDeep};
    }
  }
};

// Rows of `count` keys from j on in which those without any weight are zero, in a copy where one of them is not finite:
// else such a key would make NaN of a weight of zero. Weights are [rows][count].
template <class P>
inline Matrix<const P> without_unused(const HeadRows<P>& from, int64_t j, int64_t count, const Matrix<const P>& weights,
                                      int64_t rows, P* copy) {
  constexpr int64_t kDeep = PanelStep<P>::kDeep;
  const Matrix<const P> given{from.rows.row(j / kDeep), from.rows.stride};
  const bool* finite = from.finite + j / kPanelKeys;
  if (std::all_of(finite, finite + panel_count(count), [](bool f) { return f; })) return given;
  const int64_t words = from.columns * kDeep;
  for (int64_t k = 0; k < count; k += kDeep) std::copy_n(given.row(k / kDeep), words, copy + k / kDeep * words);
  for (int64_t k = 0; k < count; ++k) {
    bool used = false;
    for (int64_t r = 0; r < rows && !used; ++r) used = static_cast<float>(weights.row(r)[k]) != 0;
    for (int64_t c = 0; c < from.columns && !used; ++c) copy[k / kDeep * words + c * kDeep + k % kDeep] = P(0);
  }
  return {copy, words};
}

// out += weights of a tile · rows of `width` packed keys or values from j on.
template <class P>
inline void add_panels(const PanelRows& rows, int64_t count, const Matrix<P>& weights, const HeadRows<P>& b, int64_t j,
                       int64_t width, const Matrix<Compute<P>>& out, P* copy) {
  if (b.rows.data == nullptr) return;
  width = std::min(width, round_up(b.keys - j, PanelStep<P>::kDeep));
  const int64_t step = rows.whole ? width : kPanelKeys;
  for (int64_t p = 0; p < width; p += step) {
    const int64_t keys = std::min(step, width - p);
    const int64_t first = rows.whole ? 0 : rows.first[p / kPanelKeys];
    const int64_t last = rows.whole ? count : rows.last[p / kPanelKeys];
    if (first >= last) continue;
    const Matrix<const P> part{weights.row(first) + p, weights.stride};
    multiply<Order::Along, P>(part, last - first, keys, without_unused<P>(b, j + p, keys, part, last - first, copy),
                              {out.row(first), out.stride}, b.columns, true);
  }
}

// The gradients of t of keys j + begin … j + end − 1 of query i, to those of the mask.
template <class C>
inline void add_to_mask(const AttentionBackwardCpu& args, int64_t batch, int64_t head, int64_t i, int64_t j,
                        int64_t begin, int64_t end, const C* gradient) {
  const int64_t* strides = args.grad_mask_strides;
  const int64_t at = batch * strides[0] + head * strides[1] + i * strides[2] + j;
  const auto add = [&](auto* to) {
    for (int64_t k = begin; k < end; ++k) to[k] += gradient[k];
  };
  if (args.wide_mask) add(static_cast<double*>(args.grad_mask) + at);
  else add(static_cast<C*>(args.grad_mask) + at);
}

// Which sequence, head and tile a work item is. Tiles alternate from both ends, so that those of a causal attention,
// which see more and more keys, are shared evenly.
struct TileItem {
  int64_t sequence, head, tile;

  TileItem(const Attention& args, const int64_t* starts, int64_t item) {
    sequence = std::upper_bound(starts, starts + args.sequences + 1, item / args.heads) - starts - 1;
    const int64_t tiles = starts[sequence + 1] - starts[sequence];
    const int64_t local = item - starts[sequence] * args.heads;
    head = local / tiles;
    const int64_t t = local % tiles;
    tile = t % 2 == 0 ? t / 2 : tiles - 1 - t / 2;
  }
};

}  // namespace lect11ext::CPU_CAPABILITY
