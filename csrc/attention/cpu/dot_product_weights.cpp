// The weights of dot-product attention: a tile of queries against a block of keys, one head after the other.
#include <optional>

#include "attention/cpu/dot_product_row_scores.h"
#include "attention/cpu/dot_product_score.h"
#include "attention/cpu/dot_product_weights.h"
#include "attention/dot_product_weights_cpu.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

template <class S, class P>
class Weights {
  using C = Compute<S>;

 public:
  explicit Weights(const AttentionWeightsCpu& args)
      : args_(args),
        biased_(changes_scores(args)),
        one_bias_(args.mask.strides[1] == 0 && args.alibi_slopes == nullptr),
        factor_(biased_ ? kLogBase<C> : static_cast<C>(args.scale) * kLogBase<C>),
        dropout_(args) {
    constexpr int64_t kTile = kTileQueries * kBlockKeys;
    const auto scores = space_.reserve(kTile * sizeof(C)), bias = space_.reserve(biased_ ? kTile * sizeof(C) : 0);
    const auto sums = space_.reserve(kTile * sizeof(C));
    const auto query = space_.reserve(kTileQueries * round_up(args.head_dim, kDeepStep) * sizeof(P));
    scores_ = {static_cast<C*>(space_.at(scores)), kBlockKeys};
    bias_ = {static_cast<C*>(space_.at(bias)), kBlockKeys};
    sums_ = {static_cast<C*>(space_.at(sums)), kBlockKeys};
    query_buffer_ = static_cast<P*>(space_.at(query));
  }

  void run(int64_t item) {
    const int64_t blocks = key_block_count(args_.keys), tiles = tile_count(args_.queries);
    const int64_t heads = args_.average ? 1 : args_.heads, t = item / blocks % tiles;
    // Tiles alternate from both ends, so that those of a causal attention are shared evenly.
    const int64_t tile = t % 2 == 0 ? t / 2 : tiles - 1 - t / 2, j = item % blocks * kBlockKeys;
    const int64_t first_head = item / blocks / tiles % heads;
    const AttentionSequence s(args_, item / blocks / tiles / heads);
    const Band band(args_, s);
    const int64_t most = tile_rows(s.queries), i = tile * most, rows = std::min(most, s.queries - i);
    if (rows <= 0) return;
    const int64_t width = std::min(kBlockKeys, round_up(s.keys - j, kKeyStep<P>));
    for (int64_t r = 0; r < rows; ++r) std::fill_n(sums_.row(r), width, C(0));
    if (band.first_row(i, rows, j) < band.end_row(i, rows, j, width)) {
      const int64_t count = args_.average ? args_.heads : 1;
      for (int64_t h = first_head; h < first_head + count; ++h) add(s, band, h, h == first_head, i, rows, j, width);
    }
    store(s, first_head, i, rows, j);
  }

 private:
  // The weights of one head, added to the sums.
  void add(const AttentionSequence& s, const Band& band, int64_t head, bool first, int64_t i, int64_t rows, int64_t j,
           int64_t width) {
    if (first || (biased_ && !one_bias_)) any_ = find_seen(s, band, head, i, rows, j, width);
    if (!any_) return;
    const int64_t first_panel = args_.plan.first_panel(s.batch, args_.kv_heads, head / (args_.heads / args_.kv_heads));
    if (scores_by_rows(args_)) {
      score_by_rows<S>(args_, s.batch, head, i, rows, j, std::min(width, s.keys - j), scores_);
    } else {
      const auto query = operand_rows<S, P>(args_.query, args_.head_dim, s.batch, head, i, rows, query_buffer_);
      multiply_panels<P>(*seen_, query, args_.packed_key, first_panel, j, width, scores_, /*add=*/false);
    }
    for (int64_t r = 0; r < rows; ++r) weigh(s, band, head, i + r, r, j, width);
  }

  // Loads the biases. Returns whether any query sees any key.
  bool find_seen(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows, int64_t j,
                 int64_t width) {
    const int64_t n = std::min(width, s.keys - j);
    seen_.emplace(band, i, rows, j, width);
    for (int64_t r = 0; r < rows && biased_; ++r) {
      bias_row<S>(args_, args_.mask, /*with_slopes=*/true, s.batch, head, i + r, band.diagonal, j, n, bias_.row(r));
    }
    return args_.mask.type == MaskType::None || seen_->narrow(bias_, n);
  }

  // Of query i, row r.
  void weigh(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t r, int64_t j,
             int64_t width) {
    constexpr int kWidth = kLanes<C>;
    const C lse = static_cast<const C*>(args_.lse)[lse_row(args_, s.batch, head, i)];
    const int64_t begin = std::max<int64_t>(band.first_key(i) - j, 0);
    const int64_t end = lse == kMinusInfinity<C> ? 0 : std::min(band.end_key(i) - j, width);
    if (begin >= end) return;
    C *const scores = scores_.row(r), *const sums = sums_.row(r), *const bias = bias_.row(r);
    if (lse != lse) {  // NaN where there are weights, and nowhere else
      for (int64_t k = begin; k < end; ++k) sums[k] += biased_ && bias[k] == kMinusInfinity<C> ? C(0) : lse;
      return;
    }
    const int64_t from = begin / kKeyStep<P> * kKeyStep<P>, to = round_up(end, kKeyStep<P>);
    const ScoreTransform<C> transform(args_);
    const bool large = is_large(lse);
    if (biased_) transform.apply(scores, bias, from, to);
    else if (large) transform.apply_scale(scores, from, to);
    std::fill(scores + from, scores + begin, kMinusInfinity<C>);
    std::fill(scores + end, scores + to, kMinusInfinity<C>);
    const Vec<C> factor(factor_), base(kLogBase<C>), from_lse(lse);
    const Shift<C> shift(lse, biased_ ? kLogBase<C> : exponent_of_score(factor_, args_.scale));
    C z[kBlockKeys + kPanelKeys];
    if (dropout_.acts()) dropout_.factors(s.batch, head, i, j + from, to - from, z);
#pragma GCC unroll 4
    for (int64_t e = from; e < to; e += kWidth) {
      const Vec<C> t = Vec<C>::loadu(scores + e);
      Vec<C> weight = large ? power((t - from_lse) * base) : shift.weight(t, factor);
      if (dropout_.acts()) weight = weight * Vec<C>::loadu(z + e - from);
      (Vec<C>::loadu(sums + e) + weight).store(sums + e);
    }
  }

  void store(const AttentionSequence& s, int64_t head, int64_t i, int64_t rows, int64_t j) const {
    const int64_t n = std::min(kBlockKeys, s.keys - j), heads = args_.average ? 1 : args_.heads;
    const Vec<C> share(args_.average ? C(1) / static_cast<C>(args_.heads) : C(1));
    for (int64_t r = 0; r < rows; ++r) {
      C* const sums = sums_.row(r);
      for (int64_t k = 0; k < n && args_.average; k += kLanes<C>) (Vec<C>::loadu(sums + k) * share).store(sums + k);
      const int64_t row = (s.batch * heads + head) * args_.queries + i + r;
      convert(sums, static_cast<S*>(args_.weights) + row * args_.keys + j, n);
    }
  }

  const AttentionWeightsCpu& args_;
  const bool biased_;    // whether scores are changed before they are weighed; factor_ is the scale else
  const bool one_bias_;  // whether all heads have the same
  const C factor_;       // from a score to an exponent of the base
  const Dropout<C> dropout_;
  Workspace space_;
  Matrix<C> scores_, bias_, sums_;
  P* query_buffer_;
  std::optional<PanelRows> seen_;
  bool any_ = true;  // whether any query of the tile sees any key
};

}  // namespace

void attention_weights_kernel(const AttentionWeightsCpu& args, int64_t begin, int64_t end) {
  with_operands(args.dtype, args.plan.widens, [&](auto* type, auto* operand) {
    Weights<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(operand)>> weights(args);
    for (int64_t item = begin; item < end; ++item) weights.run(item);
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
