// The backward of dot-product attention and its tangent: 128 keys at a time meet all queries that see them, a tile
// after the other. What keys and values gain stays in the cache meanwhile; what queries gain is added up in memory.
//
// With a tangent every quantity has a dot: the products are those of the backward differentiated once.
#pragma once

#include "attention/cpu/dot_product_delta.h"
#include "attention/cpu/dot_product_factor.h"
#include "attention/cpu/dot_product_row_scores.h"
#include "attention/cpu/dot_product_score.h"
#include "attention/cpu/dot_product_weights.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {

template <class S, class P, bool kTangent>
class Gradients {
  using C = Compute<S>;
  static constexpr int64_t kRows = kTileQueries, kKeys = kBackwardKeys;
  static constexpr int64_t kDeep = PanelStep<P>::kDeep;
  // Outputs are rounded, and with them D = grad_out · out. Of few keys, gradients of scores are often smaller than
  // what that leaves (with one key and dropout by a factor of 80 in bfloat16): then D is the sum of weights times
  // inner products, as exact as these are. Beyond so many keys the rule of the tests holds without.
  static constexpr int64_t kFewKeys = 16;
  static constexpr C kLeastTotal = C(0.5);  // of weights that are divided by it: of huge scores it may be 0
  static constexpr bool kInPlace = std::is_same_v<C, P>;  // weights and gradients are operands as they are

 public:
  explicit Gradients(const AttentionBackwardCpu& args)
      : args_(args),
        factor_(static_cast<C>(args.scale) * kLogBase<C>),
        biased_(has_biases(args)),
        columns_(round_up(args.head_dim, kColumnStep)),
        value_columns_(round_up(args.value_dim, kColumnStep)),
        of_outputs_(args),
        dropout_(args) {
    for (int pass = 0; pass < 2; ++pass) {  // reserve, then place
      place_ = pass == 1;
      next_ = 0;
      tile(scores_), tile(inner_);
      if (kTangent) tile(scores_t_), tile(inner_t_);
      if (biased_) tile(bias_), tile(mask_grads_);
      if (args.mask_t.type != MaskType::None) tile(bias_t_);
      for (int d = 0; d < (kTangent ? 2 : 1); ++d) {
        if (!kInPlace) {
          rows(weights_[d], kRows / kDeep, kKeys * kDeep), rows(score_grads_[d], kRows / kDeep, kKeys * kDeep);
          rows(query_grads_[d], kRows, kKeys);
        }
        memory(query_buffer_[d], kRows * round_up(args.head_dim, kDeepStep));
        memory(grad_buffer_[d], kRows * round_up(args.value_dim, kDeepStep));
        memory(query_panel_[d], kRows * columns_), memory(grad_panel_[d], kRows * value_columns_);
        memory(copy_[d], kKeys * columns_);
      }
      rows(key_sums_, kKeys, columns_), rows(value_sums_, kKeys, value_columns_);
      const int64_t group = args.heads / args.kv_heads;
      memory(delta_, group * args.queries);
      if (kTangent) memory(delta_t_, group * args.queries);
    }
  }

  void run(int64_t item) {
    each_head(args_, item, [&](int64_t n, int64_t kv_head, int64_t part) { run_head(n, kv_head, part); });
  }

 private:
  // --- scratch

  template <class T>
  void memory(T*& pointer, int64_t count) {
    if (!place_) parts_[next_++] = space_.reserve(count * sizeof(T));
    else pointer = static_cast<T*>(space_.at(parts_[next_++]));
  }
  template <class T>
  void rows(Matrix<T>& to, int64_t count, int64_t stride) {
    T* data = nullptr;
    memory(data, count * stride);
    to = {data, stride};
  }
  void tile(Matrix<C>& to) { rows(to, kRows, kKeys); }

  // --- a part of the keys of one head

  void run_head(int64_t n, int64_t kv_head, int64_t part) {
    const AttentionSequence s(args_, n);
    const Band band(args_, s);
    const int64_t group = args_.heads / args_.kv_heads;
    first_panel_ = args_.plan.first_panel(n, args_.kv_heads, kv_head);
    keys_[0] = HeadRows<P>(args_.packed_key, s, kv_head, first_panel_);
    if constexpr (kTangent) keys_[1] = HeadRows<P>(args_.packed_key_t, s, kv_head, first_panel_);
    const int64_t blocks = (s.keys + kKeys - 1) / kKeys;
    adds_deltas_ = s.keys <= kFewKeys;
    const int64_t begin = blocks * part / args_.parts, end = blocks * (part + 1) / args_.parts;
    if (begin == end) return;
    for (int64_t g = 0; g < group; ++g)
      find_deltas(s, kv_head * group + g, delta_ + g * args_.queries, delta_t_ + g * args_.queries);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t j = b * kKeys, width = std::min(kKeys, round_up(s.keys - j, kKeyStep<P>));
      for (int64_t k = 0; k < width; ++k) {
        std::fill_n(key_sums_.row(k), columns_, C(0));
        std::fill_n(value_sums_.row(k), value_columns_, C(0));
      }
      const int64_t most = tile_rows(s.queries);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t head = kv_head * group + g;
        for (int64_t i = 0; i < s.queries; i += most) {
          const int64_t count = std::min(most, s.queries - i);
          if (band.first_row(i, count, j) >= band.end_row(i, count, j, width)) continue;
          meet(s, band, head, g, i, count, j, width, part);
        }
      }
      store(args_.grad_key, args_.grad_key_strides, args_.head_dim, s, kv_head, j, key_sums_, args_.scale);
      store(args_.grad_value, args_.grad_value_strides, args_.value_dim, s, kv_head, j, value_sums_, 1);
    }
  }

  void store(void* grad, const AttentionStrides& strides, int64_t columns, const AttentionSequence& s, int64_t head,
             int64_t j, const Matrix<C>& sums, double scale) const {
    if (grad == nullptr) return;
    for (int64_t k = 0; k < std::min(kKeys, s.keys - j); ++k) {
      for (int64_t c = 0; c < columns; ++c) sums.row(k)[c] *= static_cast<C>(scale);
      convert(sums.row(k), row_of<S>(grad, strides, s.batch, head, s.key_start + j + k), columns);
    }
  }

  // Of all queries of a head, but what weigh() adds up itself.
  void find_deltas(const AttentionSequence& s, int64_t head, C* delta, C* delta_t) const {
    for (int64_t i = 0; i < s.queries; ++i) {
      if (!adds_deltas_) delta[i] = of_outputs_(s, head, i);
      if constexpr (kTangent) delta_t[i] = of_outputs_.tangent(s, head, i);
    }
  }

  // --- a tile of queries meets a block of keys

  void meet(const AttentionSequence& s, const Band& band, int64_t head, int64_t g, int64_t i, int64_t count, int64_t j,
            int64_t width, int64_t part) {
    PanelRows seen(band, i, count, j, width);
    const int64_t n = std::min(width, s.keys - j);
    const BlockMask kind = block_mask(args_, s.batch, head, i, count, j, n);
    if (kind == BlockMask::AllBarred) return;
    has_bias_ = biased_ && kind == BlockMask::Some;
    if (has_bias_) load_biases(s, band, head, i, count, j);
    if (has_bias_ && args_.mask.type != MaskType::None && !seen.narrow(bias_, n)) return;
    const C* lse = static_cast<const C*>(args_.lse) + lse_row(args_, s.batch, head, s.query_start + i);
    const AttentionOperand *queries[] = {&args_.query, &args_.query_t}, *grads[] = {&args_.grad_out, &args_.grad_out_t};
    for (int d = 0; d < (kTangent ? 2 : 1); ++d) {
      query_[d] =
          load_factor<S, P>(*queries[d], args_.head_dim, s, head, i, count, lse, query_buffer_[d], query_panel_[d]);
      grad_[d] = load_factor<S, P>(*grads[d], args_.value_dim, s, head, i, count, lse, grad_buffer_[d], grad_panel_[d]);
    }
    const auto against = [&](const Factor<P>& a, const PackedOperand& b, const Matrix<C>& out, bool add) {
      if (a.rows.data == nullptr || b.transposed == nullptr) return add;
      multiply_panels<P>(seen, a.rows, b, first_panel_, j, width, out, add);
      return true;
    };
    if (scores_by_rows(args_)) {
      score_by_rows<S>(args_, s.batch, head, i, count, j, n, scores_);
      has_inner_ = args_.grad_out.data != nullptr;
      if (has_inner_) {
        multiply_rows<S>(args_, args_.grad_out, args_.value, args_.value_dim, s.batch, head, i, count, j, n, inner_);
      }
    } else {
      if (!against(query_[0], args_.packed_key, scores_, false)) {  // no columns
        for (int64_t r = 0; r < count; ++r) std::fill_n(scores_.row(r), width, C(0));
      }
      has_inner_ = against(grad_[0], args_.packed_value, inner_, false);
    }
    if constexpr (kTangent) {
      has_score_t_ = against(query_[1], args_.packed_key, scores_t_, false);
      has_score_t_ = against(query_[0], args_.packed_key_t, scores_t_, has_score_t_);
      has_inner_t_ = against(grad_[1], args_.packed_value, inner_t_, false);
      has_inner_t_ = against(grad_[0], args_.packed_value_t, inner_t_, has_inner_t_);
    }
    for (int64_t r = 0; r < count; ++r) weigh(s, band, head, g, i, r, j, width, lse[r]);
    if constexpr (!kInPlace) {
      for (int d = 0; d < (kTangent ? 2 : 1); ++d) {
        interleave(d == 0 ? scores_ : scores_t_, count, width, weights_[d]);
        interleave(d == 0 ? inner_ : inner_t_, count, width, score_grads_[d]);
        for (int64_t r = 0; r < count; ++r) convert((d == 0 ? inner_ : inner_t_).row(r), query_grads_[d].row(r), width);
      }
    }
    add_products(s, seen, head, part, i, count, j, width);
  }

  // What the tile adds to the gradients; scores_ are weights by now, and inner_ gradients of scores.
  void add_products(const AttentionSequence& s, const PanelRows& seen, int64_t head, int64_t part, int64_t i,
                    int64_t count, int64_t j, int64_t width) {
    constexpr int kLast = kTangent ? 1 : 0;  // what the gradients themselves, or their tangents, are made of
    if (args_.grad_value != nullptr) {
      add_across<P>(seen, count, weights(kLast), grad_[0], width, value_sums_, value_columns_);
      if (kTangent) add_across<P>(seen, count, weights(0), grad_[1], width, value_sums_, value_columns_);
    }
    if (args_.grad_key != nullptr) {
      add_across<P>(seen, count, score_grads(kLast), query_[0], width, key_sums_, columns_);
      if (kTangent) add_across<P>(seen, count, score_grads(0), query_[1], width, key_sums_, columns_);
    }
    if (args_.grad_query == nullptr) return;
    const int64_t row =
        part * args_.batch * args_.heads * args_.queries + lse_row(args_, s.batch, head, s.query_start + i);
    const Matrix<C> sums{static_cast<C*>(args_.query_sums) + row * columns_, columns_};
    const auto along = [&](const Matrix<P>& grads, const HeadRows<P>& keys, P* copy) {
      add_panels<P>(seen, count, grads, keys, j, width, sums, copy);
    };
    along(query_grads(kLast), keys_[0], copy_[0]);
    if (kTangent) along(query_grads(0), keys_[kLast], copy_[kLast]);
  }

  // The tile's weights, and gradients of its scores, as operands across their rows and along them.
  Matrix<const P> weights(int d) const {
    if constexpr (kInPlace) return {(d == 0 ? scores_ : scores_t_).data, kKeys};
    else return {weights_[d].data, kKeys * kDeep};
  }
  Matrix<const P> score_grads(int d) const {
    if constexpr (kInPlace) return {(d == 0 ? inner_ : inner_t_).data, kKeys};
    else return {score_grads_[d].data, kKeys * kDeep};
  }
  Matrix<P> query_grads(int d) const {
    if constexpr (kInPlace) return d == 0 ? inner_ : inner_t_;
    else return query_grads_[d];
  }

  // [count][width] → [count / kDeep][width][kDeep], zeros beyond count.
  void interleave(const Matrix<C>& from, int64_t count, int64_t width, const Matrix<P>& to) const {
    if constexpr (!kInPlace) {
      for (int64_t r = 0; r < count; r += 2) {
        P* pairs = to.row(r / 2);
        const C *even = from.row(r), *odd = r + 1 < count ? from.row(r + 1) : nullptr;
#if defined(__AVX512BF16__)
        for (int64_t k = 0; k < width; k += kLanes<C>) {
          // Words of both rows: a pair is one word, the even row in its lower half.
          const Vec<C> low = Vec<C>::loadu(even + k), high = odd != nullptr ? Vec<C>::loadu(odd + k) : Vec<C>(C(0));
          const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(high, low);
          const __m512i upper = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(words, 1));
          const __m512i wide_low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
          const __m512i wide_high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(upper)), 16);
          _mm512_storeu_si512(pairs + 2 * k, _mm512_or_si512(wide_low, wide_high));
        }
#else
        for (int64_t k = 0; k < width; ++k) {
          pairs[2 * k] = static_cast<P>(even[k]);
          pairs[2 * k + 1] = odd != nullptr ? static_cast<P>(odd[k]) : P(0);
        }
#endif
      }
    }
  }

  void load_biases(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t count, int64_t j) {
    const int64_t n = std::min(kKeys, s.keys - j);
    for (int64_t r = 0; r < count; ++r) {
      bias_row<S>(args_, args_.mask, /*with_slopes=*/true, s.batch, head, i + r, band.diagonal, j, n, bias_.row(r));
      if (args_.mask_t.type != MaskType::None) {
        bias_row<S>(args_, args_.mask_t, false, s.batch, head, i + r, band.diagonal, j, n, bias_t_.row(r));
      }
    }
  }

  // Of one row: scores become weights times z, and inner products gradients of the scores; their tangents likewise.
  void weigh(const AttentionSequence& s, const Band& band, int64_t head, int64_t g, int64_t i, int64_t r, int64_t j,
             int64_t width, C lse) {
    constexpr int kWidth = kLanes<C>;
    C *const p = scores_.row(r), *const inner = inner_.row(r);
    C *const p_t = kTangent ? scores_t_.row(r) : nullptr, *const inner_t = kTangent ? inner_t_.row(r) : nullptr;
    const int64_t begin = std::max<int64_t>(band.first_key(i + r) - j, 0);
    const int64_t end = lse == kMinusInfinity<C> ? 0 : std::min(band.end_key(i + r) - j, width);
    const auto clear = [&](int64_t from, int64_t to) {
      for (C* row : {p, inner, p_t, inner_t}) {
        if (row != nullptr) std::fill(row + from, row + to, C(0));
      }
    };
    if (begin >= end) return clear(0, width);
    const int64_t from = begin / kKeyStep<P> * kKeyStep<P>, to = round_up(end, kKeyStep<P>);
    const bool has_bias_t = kTangent && args_.mask_t.type != MaskType::None;
    const int64_t at = lse_row(args_, s.batch, head, s.query_start + i + r);
    const Vec<C> zero(C(0));
    const ScoreTransform<C> transform(args_);
    const Vec<C> factor(factor_), base(kLogBase<C>);
    const Shift<C> shift(lse, exponent_of_score(factor_, args_.scale));
    const Vec<C> delta_t(kTangent ? delta_t_[g * args_.queries + i + r] : C(0));
    const Vec<C> lse_t(kTangent ? static_cast<const C*>(args_.lse_t)[at] : C(0));
    const bool keeps_bias = args_.grad_mask != nullptr;
    const bool fast = !has_bias_ && !is_large(lse);
    C z[kKeys + kPanelKeys];
    if (dropout_.acts()) dropout_.factors(s.batch, head, s.query_start + i + r, j + from, to - from, z);
    const auto kept_at = [&](int64_t e) { return dropout_.acts() ? Vec<C>::loadu(z + e - from) : Vec<C>(C(1)); };
    // A weight; the derivative of its score by what the softcap takes, and that one's, divided by the slope.
    const auto weight_at = [&](int64_t e, Vec<C>& slope, Vec<C>& bend) __attribute__((always_inline)) {
      const Vec<C> raw = Vec<C>::loadu(p + e);
      if (fast) return shift.weight(raw, factor);
      if (!has_bias_) return power(bounded(transform.bounded_below(raw * transform.scale) - Vec<C>(lse)) * base);
      const auto capped = transform.capped(raw);
      slope = capped.slope, bend = capped.bend;
      const Vec<C> t = transform.biased(capped.t, Vec<C>::loadu(bias_.row(r) + e));
      return power(bounded(t - Vec<C>(lse)) * base);
    };
    C own_delta, share = 1;  // of a weight, what is its own but for the rounding of the LSE
    if (adds_deltas_) {
      const Vec<C> first(static_cast<C>(begin)), last(static_cast<C>(end - 1));
      Vec<C> sum = zero, terms = zero, sizes = zero;
      for (int64_t e = from; e < to; e += kWidth) {
        Vec<C> slope, bend;
        const Vec<C> key = Vec<C>::arange(static_cast<C>(e), C(1)), is_seen = (key >= first) & (key <= last);
        const Vec<C> weight = Vec<C>::blendv(zero, weight_at(e, slope, bend), is_seen);
        sum = sum + weight;
        const Vec<C> term = has_inner_ ? weight * kept_at(e) * Vec<C>::loadu(inner + e) : zero;
        const Vec<C> seen_term = select_equal(weight, zero, zero, term);
        terms = terms + seen_term;
        sizes = sizes + seen_term.abs();
      }
      // Divided by the weights' sum, or the rounding of the LSE would be D's; the weights too, where these are all.
      const C total = sum_of_lanes(sum), scale = 1 / total, of_keys = sum_of_lanes(terms) * scale;
      if (total >= kLeastTotal && std::abs(total - 1) <= Deltas<S>::sums_room(lse)) share = scale;
      own_delta =
          of_outputs_.nearer(of_keys, sum_of_lanes(sizes) * scale, lse, s, head, i + r) - of_outputs_.grad_lse(at);
    } else {
      own_delta = delta_[g * args_.queries + i + r];
    }
    const Vec<C> delta(own_delta), shares(share);
#pragma GCC unroll 2
    for (int64_t e = from; e < to; e += kWidth) {
      Vec<C> slope(C(1)), bend = zero;
      Vec<C> weight = weight_at(e, slope, bend);
      if (adds_deltas_) weight = weight * shares;
      const Vec<C> kept = kept_at(e);
      // What a key that is barred, or is NaN where nobody sees it, would give is no gradient: its weight is zero.
      const auto seen = [&](const Vec<C>& v) { return select_equal(weight, zero, zero, v); };
      const Vec<C> first = has_inner_ ? Vec<C>::loadu(inner + e) * kept - delta : zero - delta;
      const Vec<C> full = seen(weight * first);
      (weight * kept).store(p + e);
      (has_bias_ ? seen(full * slope) : full).store(inner + e);  // a slope of a barred NaN is NaN too
      if constexpr (kTangent) {
        const Vec<C> raw = has_score_t_ ? Vec<C>::loadu(p_t + e) * transform.scale : zero;
        Vec<C> score = raw * slope;
        if (has_bias_t) score = score + Vec<C>::loadu(bias_t_.row(r) + e);
        const Vec<C> weight_t = seen(weight * (score - lse_t));
        const Vec<C> second = has_inner_t_ ? Vec<C>::loadu(inner_t + e) * kept - delta_t : zero - delta_t;
        const Vec<C> full_t = seen(weight_t * first + weight * second);
        (weight_t * kept).store(p_t + e);
        seen(full_t * slope + full * bend * raw).store(inner_t + e);
        if (keeps_bias) full_t.store(mask_grads_.row(r) + e);
      } else {
        if (keeps_bias) full.store(mask_grads_.row(r) + e);
      }
    }
    clear(0, begin);
    clear(end, width);
    if (keeps_bias) add_to_mask(args_, s.batch, head, i + r, j, begin, end, mask_grads_.row(r));
  }

  const AttentionBackwardCpu& args_;
  const C factor_;  // from a score to an exponent of the base
  const bool biased_;
  const int64_t columns_, value_columns_;
  const Deltas<S> of_outputs_;
  const Dropout<C> dropout_;
  Workspace space_;
  size_t parts_[48];
  int next_ = 0;
  bool place_ = false;
  Matrix<C> scores_, inner_, scores_t_, inner_t_, bias_, bias_t_;
  Matrix<C> mask_grads_;                                    // gradients of t
  Matrix<P> weights_[2], score_grads_[2], query_grads_[2];  // as operands, where they are none as they are
  Matrix<C> key_sums_, value_sums_;
  P *query_buffer_[2], *grad_buffer_[2], *query_panel_[2], *grad_panel_[2], *copy_[2];
  Factor<P> query_[2], grad_[2];
  HeadRows<P> keys_[2];
  bool adds_deltas_ = false;  // D is added up from the keys' own inner products
  bool has_bias_ = false;     // whether the block has biases; where not, they are zero
  bool has_inner_ = false, has_score_t_ = false, has_inner_t_ = false;
  C *delta_ = nullptr, *delta_t_ = nullptr;
  int64_t first_panel_ = 0;
};

}  // namespace lect11ext::CPU_CAPABILITY
