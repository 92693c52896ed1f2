// The forward of dot-product attention: a tile of queries meets block after block of keys, and keeps the greatest score
// so far, the sum of weights and the weighted sum of values, rescaled where the greatest score grows (Milakov &
// Gimelshein 2018; Dao et al. 2022).
#include "attention/cpu/dot_product_tile.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

template <class S, class P>
class Forward {
  using C = Compute<S>;
  static constexpr bool kInPlace = std::is_same_v<C, P>;  // weights take the scores' place
  static constexpr double kLeastScale = 1e-30;            // −∞ times a smaller factor could be NaN, or +∞

 public:
  explicit Forward(const AttentionForwardCpu& args)
      : args_(args),
        biased_(args.mask.type != MaskType::None || args.alibi_slopes != nullptr || args.softcap != 0 ||
                !(args.scale > kLeastScale)),
        factor_(biased_ ? kLogBase<C> : static_cast<C>(args.scale) * kLogBase<C>),
        columns_(round_up(args.value_dim, kColumnStep)),
        dropout_(args) {
    constexpr int64_t kTile = kTileQueries * kBlockKeys;
    const int64_t depth = round_up(args.head_dim, kDeepStep);
    const auto scores = space_.reserve(kTile * sizeof(C)), weights = space_.reserve(kInPlace ? 0 : kTile * sizeof(P));
    const auto bias = space_.reserve(biased_ ? kTile * sizeof(C) : 0);
    const auto sums = space_.reserve(kTileQueries * columns_ * sizeof(C));
    const auto query = space_.reserve(kTileQueries * depth * sizeof(P));
    const auto copy = space_.reserve(kBlockKeys * columns_ * sizeof(P));
    scores_ = {static_cast<C*>(space_.at(scores)), kBlockKeys};
    if constexpr (kInPlace) weights_ = scores_;
    else weights_ = {static_cast<P*>(space_.at(weights)), kBlockKeys};
    bias_ = {static_cast<C*>(space_.at(bias)), kBlockKeys};
    sums_ = {static_cast<C*>(space_.at(sums)), columns_};
    query_buffer_ = static_cast<P*>(space_.at(query));
    copy_ = static_cast<P*>(space_.at(copy));
  }

  void run(int64_t item) {
    const TileItem where(args_, args_.plan.tiles, item);
    const AttentionSequence s(args_, where.sequence);
    const Band band(args_, s);
    const int64_t most = tile_rows(s.queries), i = where.tile * most, rows = std::min(most, s.queries - i);
    const int64_t panels = args_.plan.panels[where.sequence + 1] - args_.plan.panels[where.sequence];
    const int64_t kv_head = where.head / (args_.heads / args_.kv_heads);
    first_panel_ = args_.plan.panels[where.sequence] * args_.kv_heads + kv_head * panels;
    query_ = operand_rows<S, P>(args_.query, args_.head_dim, s.batch, where.head, s.query_start + i, rows, query_buffer_);
    std::fill(top_, top_ + rows, kMinusInfinity<C>);
    std::fill(total_[0], total_[0] + rows * kLanes<C>, C(0));
    started_ = false;
    const int64_t begin = band.first_key(i) / kPanelKeys * kPanelKeys, end = band.end_key(i + rows - 1);
    for (int64_t j = begin; j < end; j += kBlockKeys) {
      block(s, band, where.head, i, rows, j, std::min(kBlockKeys, round_up(end - j, kPanelKeys)));
    }
    finish(s, where.head, i, rows);
  }

 private:
  // Keys j … j + width − 1, in whole panels.
  void block(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows, int64_t j,
             int64_t width) {
    if (biased_ && !load_biases(s, band, head, i, rows, j, width)) return;
    const bool whole =
        multiply_panels<P>(band, query_, i, rows, args_.packed_key, first_panel_, j, width, scores_, /*add=*/false);
    for (int64_t r = 0; r < rows; ++r) weigh(s, band, head, i + r, r, j, width);
    if (!started_) {
      for (int64_t r = 0; r < rows; ++r) std::fill_n(sums_.row(r), columns_, C(0));
      started_ = true;
    }
    add_panels<P>(band, weights_, i, rows, args_.packed_value, first_panel_, j, width, whole, sums_, copy_);
  }

  // False where the mask bars all of them.
  bool load_biases(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows, int64_t j,
                   int64_t width) {
    bool any = args_.mask.type == MaskType::None;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = std::min(width, s.keys - j);
      bias_row<S>(args_, args_.mask, /*with_slopes=*/true, s.batch, head, i + r, band.diagonal, j, n, bias_.row(r));
      for (int64_t k = 0; k < n && !any; ++k) any = bias_.row(r)[k] != kMinusInfinity<C>;
    }
    return any;
  }

  // Scores of row r become weights.
  void weigh(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t r, int64_t j,
             int64_t width) {
    constexpr int kWidth = kLanes<C>, kSums = kPanelKeys / kWidth >= 4 ? 4 : kPanelKeys / kWidth;
    const int64_t begin = std::max<int64_t>(band.first_key(i) - j, 0), end = std::min(band.end_key(i) - j, width);
    P* const weights = weights_.row(r);
    if (begin >= end) return std::fill(weights, weights + width, P(0));
    const int64_t from = begin / kPanelKeys * kPanelKeys, to = round_up(end, kPanelKeys);
    C* const scores = scores_.row(r);
    if (biased_) apply_bias(scores, bias_.row(r), from, to);
    std::fill(scores + from, scores + begin, kMinusInfinity<C>);
    std::fill(scores + end, scores + to, kMinusInfinity<C>);

    Vec<C> best[kSums];
    for (auto& v : best) v = Vec<C>(kMinusInfinity<C>);
    for (int64_t k = from; k < to; k += kSums * kWidth) {
#pragma GCC unroll 4
      for (int v = 0; v < kSums; ++v) best[v] = greater(Vec<C>::loadu(scores + k + v * kWidth), best[v]);
    }
    for (int v = 1; v < kSums; ++v) best[0] = greater(best[v], best[0]);
    const C before = top_[r], top = std::max(before, greatest_lane(best[0]));
    const C shift = top == kMinusInfinity<C> ? C(0) : top * factor_;
    if (before != top) {
      top_[r] = top;
      const Vec<C> shrink = before == kMinusInfinity<C> ? Vec<C>(C(0)) : power(Vec<C>((before - top) * factor_));
      (Vec<C>::loadu(total_[r]) * shrink).store(total_[r]);
      if (started_) {
        for (int64_t c = 0; c < columns_; c += kWidth) (Vec<C>::loadu(sums_.row(r) + c) * shrink).store(sums_.row(r) + c);
      }
    }

    const Vec<C> factor(factor_), minus_shift(-shift);
    Vec<C> totals[kSums];
    for (auto& v : totals) v = Vec<C>(C(0));
    totals[0] = Vec<C>::loadu(total_[r]);
    C z[kPanelKeys];
    for (int64_t k = from; k < to; k += kPanelKeys) {
      if (dropout_.acts()) dropout_.factors(s.batch, head, s.query_start + i, j + k, kPanelKeys, z);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelKeys / kWidth; v += 2) {
        Vec<C> pair[2];
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
          const Vec<C> score = Vec<C>::loadu(scores + k + (v + u) * kWidth);
          pair[u] = power(at::vec::fmadd(score, factor, minus_shift));
          totals[(v + u) % kSums] = totals[(v + u) % kSums] + pair[u];
          if (dropout_.acts()) pair[u] = pair[u] * Vec<C>::loadu(z + (v + u) * kWidth);
        }
        store_weights(pair[0], pair[1], weights + k + v * kWidth);
      }
    }
    for (int v = 1; v < kSums; ++v) totals[0] = totals[0] + totals[v];
    totals[0].store(total_[r]);
    std::fill(weights, weights + from, P(0));
    std::fill(weights + to, weights + width, P(0));
  }

  // t = u + bias of raw scores, and −∞ where a key is barred, whatever its score.
  void apply_bias(C* scores, const C* bias, int64_t from, int64_t to) const {
    const Vec<C> scale(static_cast<C>(args_.scale)), low(kMinusInfinity<C>);
    const Vec<C> cap(static_cast<C>(args_.softcap)), steep(static_cast<C>(args_.softcap != 0 ? 1 / args_.softcap : 0));
    for (int64_t k = from; k < to; k += kLanes<C>) {
      Vec<C> t = Vec<C>::loadu(scores + k) * scale;
      if (args_.softcap != 0) t = tanh(t * steep) * cap;
      const Vec<C> b = Vec<C>::loadu(bias + k);
      select_equal(b, low, low, t + b).store(scores + k);
    }
  }

  void finish(const AttentionSequence& s, int64_t head, int64_t i, int64_t rows) {
    C* lse = static_cast<C*>(args_.lse) + lse_row(args_, s.batch, head, s.query_start + i);
    for (int64_t r = 0; r < rows; ++r) {
      S* out = row_of<S>(args_.out, args_.out_strides, s.batch, head, s.query_start + i + r);
      const C total = sum_of_lanes(Vec<C>::loadu(total_[r]));
      if (!started_ || total == 0) {
        lse[r] = kMinusInfinity<C>;
        std::fill(out, out + args_.value_dim, S(0));
        continue;
      }
      lse[r] = top_[r] * (factor_ / kLogBase<C>) + std::log(total);
      const Vec<C> inverse(C(1) / total);
      for (int64_t c = 0; c < columns_; c += kLanes<C>) {
        (Vec<C>::loadu(sums_.row(r) + c) * inverse).store(sums_.row(r) + c);
      }
      convert(sums_.row(r), out, args_.value_dim);
    }
  }

  const AttentionForwardCpu& args_;
  const bool biased_;    // whether scores are changed before they are weighed; factor_ is the scale else
  const C factor_;       // from a score to an exponent of the base
  const int64_t columns_;
  const Dropout<C> dropout_;
  Workspace space_;
  Matrix<C> scores_, bias_, sums_;
  Matrix<P> weights_;
  Matrix<const P> query_;
  P *query_buffer_, *copy_;
  C top_[kTileQueries];               // greatest score so far
  C total_[kTileQueries][kLanes<C>];  // sum of weights so far, in lanes
  int64_t first_panel_ = 0;
  bool started_ = false;  // whether sums_ hold anything
};

}  // namespace

void attention_forward_kernel(const AttentionForwardCpu& args, int64_t begin, int64_t end) {
  with_operands(args.dtype, args.plan.widens, [&](auto* type, auto* operand) {
    Forward<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(operand)>> forward(args);
    for (int64_t item = begin; item < end; ++item) forward.run(item);
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
