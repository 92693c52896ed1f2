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

 public:
  explicit Forward(const AttentionForwardCpu& args)
      : args_(args),
        biased_(args.mask.type != MaskType::None || args.alibi_slopes != nullptr || args.softcap != 0 ||
                args.scale < 0),
        factor_(biased_ ? kLogBase<C> : static_cast<C>(args.scale) * kLogBase<C>),
        columns_(round_up(args.value_dim, kColumnStep)),
        dropout_(args) {
    const auto scores = space_.reserve(kTileQueries * kBlockKeys * sizeof(C));
    const auto weights = space_.reserve(kInPlace ? 0 : kTileQueries * kBlockKeys * sizeof(P));
    const auto sums = space_.reserve(kTileQueries * columns_ * sizeof(C));
    const auto bias = space_.reserve(biased_ ? kTileQueries * kBlockKeys * sizeof(C) : 0);
    const auto query = space_.reserve(kTileQueries * round_up(args.head_dim, kDeepStep) * sizeof(P));
    const auto scrubbed = space_.reserve(kPanelKeys * columns_ * sizeof(P));
    for (int64_t r = 0; r < kTileQueries; ++r) {
      scores_[r] = static_cast<C*>(space_.at(scores)) + r * kBlockKeys;
      if constexpr (kInPlace) weights_[r] = scores_[r];
      else weights_[r] = static_cast<P*>(space_.at(weights)) + r * kBlockKeys;
      sums_[r] = static_cast<C*>(space_.at(sums)) + r * columns_;
      bias_[r] = biased_ ? static_cast<C*>(space_.at(bias)) + r * kBlockKeys : nullptr;
    }
    query_buffer_ = static_cast<P*>(space_.at(query));
    scrubbed_ = static_cast<P*>(space_.at(scrubbed));
  }

  void run(int64_t item) {
    const TileItem where(args_, args_.plan.tiles, item);
    const AttentionSequence s(args_, where.sequence);
    const Band band(args_, s);
    const int64_t most = tile_rows(s.queries), i = where.tile * most, rows = std::min(most, s.queries - i);
    const int64_t panels = args_.plan.panels[where.sequence + 1] - args_.plan.panels[where.sequence];
    const int64_t kv_head = where.head / (args_.heads / args_.kv_heads);
    first_panel_ = args_.plan.panels[where.sequence] * args_.kv_heads + kv_head * panels;
    operand_rows<S, P>(args_.query, args_.head_dim, s.batch, where.head, s.query_start + i, rows, query_buffer_, query_);
    std::fill(top_, top_ + rows, kMinusInfinity<C>);
    std::fill(total_, total_ + rows, C(0));
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
    const int64_t depth = summed_columns<P>(args_.head_dim);
    const int64_t panel_size = transposed_panel(args_.head_dim);
    const P* keys = static_cast<const P*>(args_.packed_key.transposed);
    bool whole = true;  // whether all rows see some key of every panel
    for (int64_t p = 0; p < width; p += kPanelKeys) {
      const int64_t first = band.first_row(i, rows, j + p), last = band.end_row(i, rows, j + p, kPanelKeys);
      whole = whole && first == 0 && last == rows;
      if (first >= last) continue;
      C* to[kTileQueries];
      for (int64_t r = first; r < last; ++r) to[r] = scores_[r] + p;
      const P* panel = keys + (first_panel_ + (j + p) / kPanelKeys) * panel_size;
      multiply<P>(query_ + first, last - first, depth, panel, kPanelKeys * PanelStep<P>::kDeep, to + first, kPanelKeys,
                  /*add=*/false);
    }
    for (int64_t r = 0; r < rows; ++r) weigh(s, band, head, i + r, r, j, width);
    add_values(band, i, rows, j, width, whole);
  }

  // False where the mask bars all of them.
  bool load_biases(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows, int64_t j,
                   int64_t width) {
    bool any = args_.mask.type == MaskType::None;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = std::min(width, s.keys - j);
      bias_row<S>(args_, args_.mask, /*with_slopes=*/true, s.batch, head, i + r, band.diagonal, j, n, bias_[r]);
      for (int64_t k = 0; k < n && !any; ++k) any = bias_[r][k] != kMinusInfinity<C>;
    }
    return any;
  }

  // Scores of row r become weights.
  void weigh(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t r, int64_t j,
             int64_t width) {
    constexpr int kWidth = kLanes<C>, kSums = kPanelKeys / kWidth >= 4 ? 4 : kPanelKeys / kWidth;
    const int64_t begin = std::max<int64_t>(band.first_key(i) - j, 0), end = std::min(band.end_key(i) - j, width);
    P* const weights = weights_[r];
    if (begin >= end) return std::fill(weights, weights + width, P(0));
    const int64_t from = begin / kPanelKeys * kPanelKeys, to = round_up(end, kPanelKeys);
    C* const scores = scores_[r];
    if (biased_) apply_bias(scores, bias_[r], from, to);
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
      const C shrink = before == kMinusInfinity<C> ? C(0) : std::exp((before - top) * (factor_ / kLogBase<C>));
      total_[r] *= shrink;
      if (started_) {
        for (int64_t c = 0; c < columns_; c += kWidth) {
          (Vec<C>::loadu(sums_[r] + c) * Vec<C>(shrink)).store(sums_[r] + c);
        }
      }
    }

    const Vec<C> factor(factor_), minus_shift(-shift);
    Vec<C> totals[kSums];
    for (auto& v : totals) v = Vec<C>(C(0));
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
    total_[r] += sum_of_lanes(totals[0]);
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

  void add_values(const Band& band, int64_t i, int64_t rows, int64_t j, int64_t width, bool whole) {
    const P* values = static_cast<const P*>(args_.packed_value.rows);
    const int64_t panel_size = rows_panel(args_.value_dim), panel_row = columns_ * PanelStep<P>::kDeep;
    const int64_t panel = first_panel_ + j / kPanelKeys;
    const bool* finite = args_.packed_value.finite + panel;
    const bool clean = std::all_of(finite, finite + width / kPanelKeys, [](bool f) { return f; });
    if (!started_) {
      for (int64_t r = 0; r < rows; ++r) std::fill(sums_[r], sums_[r] + columns_, C(0));
      started_ = true;
    }
    if (whole && clean) return multiply<P>(weights_, rows, width, values + panel * panel_size, panel_row, sums_, columns_, true);
    for (int64_t p = 0; p < width; p += kPanelKeys) {
      const int64_t first = band.first_row(i, rows, j + p), last = band.end_row(i, rows, j + p, kPanelKeys);
      if (first >= last) continue;
      const P* from = values + (panel + p / kPanelKeys) * panel_size;
      if (!finite[p / kPanelKeys]) from = without_unused(from, rows, p);
      const P* weights[kTileQueries];
      for (int64_t r = first; r < last; ++r) weights[r] = weights_[r] + p;
      multiply<P>(weights + first, last - first, kPanelKeys, from, panel_row, sums_ + first, columns_, true);
    }
  }

  // A copy of a panel of values in which those that no row has a weight for are zero.
  const P* without_unused(const P* panel, int64_t rows, int64_t p) {
    constexpr int64_t kDeep = PanelStep<P>::kDeep;
    std::copy_n(panel, kPanelKeys * columns_, scrubbed_);
    for (int64_t k = 0; k < kPanelKeys; ++k) {
      bool used = false;
      for (int64_t r = 0; r < rows && !used; ++r) used = static_cast<float>(weights_[r][p + k]) != 0;
      for (int64_t c = 0; c < columns_ && !used; ++c) {
        scrubbed_[(k / kDeep * columns_ + c) * kDeep + k % kDeep] = P(0);
      }
    }
    return scrubbed_;
  }

  void finish(const AttentionSequence& s, int64_t head, int64_t i, int64_t rows) {
    C* lse = static_cast<C*>(args_.lse) + lse_row(args_, s.batch, head, s.query_start + i);
    for (int64_t r = 0; r < rows; ++r) {
      S* out = row_of<S>(args_.out, args_.out_strides, s.batch, head, s.query_start + i + r);
      if (!started_ || total_[r] == 0) {
        lse[r] = kMinusInfinity<C>;
        std::fill(out, out + args_.value_dim, S(0));
        continue;
      }
      lse[r] = top_[r] * (factor_ / kLogBase<C>) + std::log(total_[r]);
      const Vec<C> inverse(C(1) / total_[r]);
      for (int64_t c = 0; c < columns_; c += kLanes<C>) {
        (Vec<C>::loadu(sums_[r] + c) * inverse).store(sums_[r] + c);
      }
      convert(sums_[r], out, args_.value_dim);
    }
  }

  const AttentionForwardCpu& args_;
  const bool biased_;    // whether scores are changed before they are weighed; factor_ is the scale else
  const C factor_;       // from a score to an exponent of the base
  const int64_t columns_;
  const Dropout<C> dropout_;
  Workspace space_;
  C *scores_[kTileQueries], *sums_[kTileQueries], *bias_[kTileQueries];
  std::conditional_t<kInPlace, C, P>* weights_[kTileQueries];
  const P* query_[kTileQueries];
  P *query_buffer_, *scrubbed_;
  C top_[kTileQueries], total_[kTileQueries];
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
