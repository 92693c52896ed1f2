// The running softmax of the forward: block after block of scores, each row keeps the greatest score so far, the sum of
// weights and the weighted sum of values, rescaled where the greatest score grows (Milakov & Gimelshein 2018; Dao et
// al. 2022).
#pragma once

#include "attention/cpu/dot_product_score.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {

// Rows are queries of one head, and others where a derived class has them so.
template <class S, class P>
class RunningSoftmax {
 protected:
  using C = Compute<S>;
  static constexpr bool kInPlace = std::is_same_v<C, P>;  // weights take the scores' place

  explicit RunningSoftmax(const AttentionForward& args)
      : args_(args),
        biased_(changes_scores(args)),
        factor_(biased_ ? kLogBase<C> : static_cast<C>(args.scale) * kLogBase<C>),
        columns_(round_up(args.value_dim, kColumnStep)),
        dropout_(args) {}

  // Before anything is placed in `space`; place() then hands out what was reserved. Of scores and weights `width`
  // columns are kept.
  void reserve(Workspace& space, int64_t width = kBlockKeys) {
    width_ = width;
    at_[0] = space.reserve(kTileQueries * width * sizeof(C));
    at_[1] = space.reserve(kInPlace ? 0 : kTileQueries * width * sizeof(P));
    at_[2] = space.reserve(biased_ ? kTileQueries * kBlockKeys * sizeof(C) : 0);
    at_[3] = space.reserve(kTileQueries * columns_ * sizeof(C));
  }
  void place(Workspace& space) {
    scores_ = {static_cast<C*>(space.at(at_[0])), width_};
    if constexpr (kInPlace) weights_ = scores_;
    else weights_ = {static_cast<P*>(space.at(at_[1])), width_};
    bias_ = {static_cast<C*>(space.at(at_[2])), kBlockKeys};
    sums_ = {static_cast<C*>(space.at(at_[3])), columns_};
  }

  void start(int64_t rows) {
    std::fill(top_, top_ + rows, kMinusInfinity<C>);
    std::fill(total_[0], total_[0] + rows * kLanes<C>, C(0));
    started_ = false;
  }

  // Before the first values are added.
  void start_sums(int64_t rows) {
    if (started_) return;
    for (int64_t r = 0; r < rows; ++r) std::fill_n(sums_.row(r), columns_, C(0));
    started_ = true;
  }

  // Biases of row r, of keys j ….
  void load_bias(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t r, int64_t j,
                 int64_t width) {
    bias_row<S>(args_, args_.mask, /*with_slopes=*/true, s.batch, head, i, band.diagonal, j,
                std::min(width, s.keys - j), bias_.row(r));
  }

  // Those of `rows` queries from i on, in rows 0 …. Returns whether any of these may see any of the keys; `seen` is
  // narrowed to what may.
  bool load_biases(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows, int64_t j,
                   int64_t width, PanelRows& seen) {
    const int64_t n = std::min(width, s.keys - j);
    const BlockMask kind = block_mask(args_, s.batch, head, i, rows, j, n);
    has_bias_ = kind == BlockMask::Some;
    if (!has_bias_) return kind == BlockMask::AllAllowed;
    for (int64_t r = 0; r < rows; ++r) load_bias(s, band, head, i + r, r, j, width);
    return args_.mask.type == MaskType::None || seen.narrow(bias_, n);
  }

  // Scores of row r become weights.
  void weigh(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t r, int64_t j,
             int64_t width) {
    constexpr int kWidth = kLanes<C>, kStep = kKeyStep<P> / kWidth, kSums = std::max(4, kStep);  // vectors
    constexpr int64_t kTogether = kSums / kStep * kKeyStep<P>;  // keys: so that enough chains are in flight
    const int64_t begin = std::max<int64_t>(band.first_key(i) - j, 0), end = std::min(band.end_key(i) - j, width);
    P* const weights = weights_.row(r);
    if (begin >= end) return std::fill(weights, weights + width, P(0));
    const int64_t from = begin / kKeyStep<P> * kKeyStep<P>, to = round_up(end, kKeyStep<P>);
    C* const scores = scores_.row(r);
    if (biased_) {
      const ScoreTransform<C> transform(args_);
      if (has_bias_) transform.apply(scores, bias_.row(r), from, to);
      else transform.apply_scale(scores, from, to);
    }
    std::fill(scores + from, scores + begin, kMinusInfinity<C>);
    std::fill(scores + end, scores + to, kMinusInfinity<C>);

    Vec<C> best[kSums];
    for (auto& v : best) v = Vec<C>(kMinusInfinity<C>);
    const auto compare = [&]<int kVectors>(int64_t k) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) best[v] = greater(Vec<C>::loadu(scores + k + v * kWidth), best[v]);
    };
    int64_t k = from;
    for (; k + kTogether <= to; k += kTogether) compare.template operator()<kSums>(k);
    for (; k < to; k += kKeyStep<P>) compare.template operator()<kStep>(k);
    for (int v = 1; v < kSums; ++v) best[0] = greater(best[v], best[0]);
    const C before = top_[r], top = std::max(before, greatest_lane(best[0]));
    C shift = top == kMinusInfinity<C> ? C(0) : top * factor_;
    if (std::abs(shift) > kLargeExponent<C>) {  // the rounding of the shift alone would be too much of an exponent
      for (k = from; k < to; k += kWidth) (Vec<C>::loadu(scores + k) - Vec<C>(top)).store(scores + k);
      shift = 0;
    }
    if (before != top) {
      top_[r] = top;
      const Vec<C> shrink = before == kMinusInfinity<C> ? Vec<C>(C(0)) : power(Vec<C>((before - top) * factor_));
      (Vec<C>::loadu(total_[r]) * shrink).store(total_[r]);
      if (started_) {
        for (int64_t c = 0; c < columns_; c += kWidth)
          (Vec<C>::loadu(sums_.row(r) + c) * shrink).store(sums_.row(r) + c);
      }
    }

    const Vec<C> factor(factor_), minus_shift(-shift);
    Vec<C> totals[kSums];
    for (auto& v : totals) v = Vec<C>(C(0));
    totals[0] = Vec<C>::loadu(total_[r]);
    C z[kBlockKeys + kPanelKeys];
    const bool drops = dropout_.acts();
    if (drops) dropout_.factors(s.batch, head, s.query_start + i, j + from, to - from, z);
    const auto weigh_step = [&]<int kVectors>(int64_t at) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v += kParts<P>) {
        Vec<C> part[kParts<P>];
#pragma GCC unroll 2
        for (int u = 0; u < kParts<P>; ++u) {
          const int64_t e = at + (v + u) * kWidth;
          part[u] = power(at::vec::fmadd(Vec<C>::loadu(scores + e), factor, minus_shift));
          totals[v + u] = totals[v + u] + part[u];
          if (drops) part[u] = part[u] * Vec<C>::loadu(z + e - from);
        }
        store_weights<P>(part, weights + at + v * kWidth);
      }
    };
    for (k = from; k + kTogether <= to; k += kTogether) weigh_step.template operator()<kSums>(k);
    for (; k < to; k += kKeyStep<P>) weigh_step.template operator()<kStep>(k);
    for (int v = 1; v < kSums; ++v) totals[0] = totals[0] + totals[v];
    totals[0].store(total_[r]);
    std::fill(weights, weights + from, P(0));
    std::fill(weights + to, weights + width, P(0));
  }

  // Output and lse of query i, row r.
  void finish(const AttentionSequence& s, int64_t head, int64_t i, int64_t r) {
    const C total = total_of(r);
    finish(s, head, i, r, total, std::log(total));
  }
  // Of queries i …, rows 0 …: their logarithms a vector at a time.
  void finish_all(const AttentionSequence& s, int64_t head, int64_t i, int64_t rows) {
    static_assert(kTileQueries % kLanes<C> == 0);
    C totals[kTileQueries], logs[kTileQueries];
    for (int64_t r = 0; r < rows; ++r) totals[r] = total_of(r);
    for (int64_t r = 0; r < rows; r += kLanes<C>) {
      const int64_t n = std::min<int64_t>(kLanes<C>, rows - r);
      Vec<C>::loadu(totals + r, n).log().store(logs + r, n);
    }
    for (int64_t r = 0; r < rows; ++r) finish(s, head, i + r, r, totals[r], logs[r]);
  }

  C total_of(int64_t r) const { return started_ ? sum_of_lanes(Vec<C>::loadu(total_[r])) : C(0); }

  const AttentionForward& args_;
  const bool biased_;  // whether scores are changed before they are weighed; factor_ is the scale else
  const C factor_;     // from a score to an exponent of the base
  const int64_t columns_;
  const Dropout<C> dropout_;
  Matrix<C> scores_, bias_, sums_;
  Matrix<P> weights_;
  C top_[kTileQueries];               // greatest score so far
  C total_[kTileQueries][kLanes<C>];  // sum of weights so far, in lanes
  bool started_ = false;              // whether sums_ hold anything
  bool has_bias_ = true;              // whether the block's biases are in bias_, where biased_; else they are zero

 private:
  void finish(const AttentionSequence& s, int64_t head, int64_t i, int64_t r, C total, C log_of_total) {
    C& lse = static_cast<C*>(args_.lse)[lse_row(args_, s.batch, head, s.query_start + i)];
    S* out = row_of<S>(args_.out, args_.out_strides, s.batch, head, s.query_start + i);
    if (total == 0) {
      lse = kMinusInfinity<C>;
      std::fill(out, out + args_.value_dim, S(0));
      return;
    }
    // What is lost here is an error of all weights of a backward. Of a large score the backward has the product with
    // the scale, rounded; else the shift that the weights had, and the factor's own rounding is made good.
    const C shift = top_[r] * factor_, scale = biased_ ? C(1) : static_cast<C>(args_.scale);
    const double exact = (biased_ ? 1.0 : args_.scale) / kLogOfBase<C>, top = top_[r];
    if (std::abs(shift) > kLargeExponent<C>) lse = top_[r] * scale + log_of_total;
    else lse = static_cast<C>((shift + top * (exact - factor_)) * kLogOfBase<C> + log_of_total);
    const Vec<C> inverse(C(1) / total);
    for (int64_t c = 0; c < columns_; c += kLanes<C>)
      (Vec<C>::loadu(sums_.row(r) + c) * inverse).store(sums_.row(r) + c);
    convert(sums_.row(r), out, args_.value_dim);
  }

  size_t at_[4];
  int64_t width_ = 0;
};

}  // namespace lect11ext::CPU_CAPABILITY
