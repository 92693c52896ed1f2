// The tangent of dot-product attention's forward. lse is known by then, so that weights are final at once.
#include "attention/cpu/dot_product_row_scores.h"
#include "attention/cpu/dot_product_score.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

template <class S, class P>
class TangentPass {
  using C = Compute<S>;

 public:
  explicit TangentPass(const AttentionTangentCpu& args)
      : args_(args),
        biased_(args.mask.type != MaskType::None || args.alibi_slopes != nullptr),
        columns_(round_up(args.value_dim, kColumnStep)),
        dropout_(args) {
    constexpr int64_t kTile = kTileQueries * kBlockKeys;
    const int64_t depth = round_up(args.head_dim, kDeepStep);
    size_t parts[10];
    int next = 0;
    for (int i = 0; i < 4; ++i) parts[next++] = space_.reserve(kTile * sizeof(C));
    for (int i = 0; i < 2; ++i) parts[next++] = space_.reserve(kTile * sizeof(P));
    parts[next++] = space_.reserve(kTileQueries * columns_ * sizeof(C));
    for (int i = 0; i < 2; ++i) parts[next++] = space_.reserve(kTileQueries * depth * sizeof(P));
    parts[next++] = space_.reserve(kBlockKeys * columns_ * sizeof(P));
    Matrix<C>* const tiles[] = {&scores_, &scores_t_, &bias_, &bias_t_};
    for (int i = 0; i < 4; ++i) *tiles[i] = {static_cast<C*>(space_.at(parts[i])), kBlockKeys};
    weights_ = {static_cast<P*>(space_.at(parts[4])), kBlockKeys};
    weights_t_ = {static_cast<P*>(space_.at(parts[5])), kBlockKeys};
    sums_ = {static_cast<C*>(space_.at(parts[6])), columns_};
    query_buffer_ = static_cast<P*>(space_.at(parts[7]));
    query_t_buffer_ = static_cast<P*>(space_.at(parts[8]));
    copy_ = static_cast<P*>(space_.at(parts[9]));
  }

  void run(int64_t item) {
    const TileItem where(args_, args_.plan.tiles, item);
    const AttentionSequence s(args_, where.sequence);
    const Band band(args_, s);
    const int64_t most = tile_rows(s.queries), i = where.tile * most, rows = std::min(most, s.queries - i);
    const int64_t kv_head = where.head / (args_.heads / args_.kv_heads);
    first_panel_ = args_.plan.first_panel(where.sequence, args_.kv_heads, kv_head);
    values_ = HeadRows<P>(args_.packed_value, s, kv_head, first_panel_);
    values_t_ = HeadRows<P>(args_.packed_value_t, s, kv_head, first_panel_);
    const int64_t at = s.query_start + i;
    query_ = operand_rows<S, P>(args_.query, args_.head_dim, s.batch, where.head, at, rows, query_buffer_);
    if (args_.query_t.data != nullptr) {
      query_t_ = operand_rows<S, P>(args_.query_t, args_.head_dim, s.batch, where.head, at, rows, query_t_buffer_);
    }
    for (int64_t r = 0; r < rows; ++r) std::fill_n(sums_.row(r), columns_, C(0));
    std::fill(mean_, mean_ + rows, C(0));
    const int64_t begin = band.first_key(i) / kPanelKeys * kPanelKeys, end = band.end_key(i + rows - 1);
    for (int64_t j = begin; j < end; j += kBlockKeys) {
      block(s, band, where.head, i, rows, j, std::min(kBlockKeys, round_up(end - j, kKeyStep<P>)));
    }
    finish(s, where.head, i, rows);
  }

 private:
  bool has_score_t() const { return args_.query_t.data != nullptr || args_.packed_key_t.transposed != nullptr; }
  bool has_mask_t() const { return args_.mask_t.type != MaskType::None; }

  void block(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows, int64_t j,
             int64_t width) {
    const int64_t n = std::min(width, s.keys - j);
    const BlockMask kind = block_mask(args_, s.batch, head, i, rows, j, n);
    if (kind == BlockMask::AllBarred) return;
    has_bias_ = biased_ && kind == BlockMask::Some;
    for (int64_t r = 0; r < rows && has_bias_; ++r) {
      bias_row<S>(args_, args_.mask, /*with_slopes=*/true, s.batch, head, i + r, band.diagonal, j, n, bias_.row(r));
      if (has_mask_t())
        bias_row<S>(args_, args_.mask_t, false, s.batch, head, i + r, band.diagonal, j, n, bias_t_.row(r));
    }
    PanelRows seen(band, i, rows, j, width);
    if (has_bias_ && args_.mask.type != MaskType::None && !seen.narrow(bias_, n)) return;
    const auto against = [&](const Matrix<const P>& a, const PackedOperand& keys, const Matrix<C>& out, bool add) {
      multiply_panels<P>(seen, a, keys, first_panel_, j, width, out, add);
    };
    const bool has_query_t = args_.query_t.data != nullptr;
    if (scores_by_rows(args_)) score_by_rows<S>(args_, s.batch, head, i, rows, j, n, scores_);
    else against(query_, args_.packed_key, scores_, false);
    if (has_query_t) against(query_t_, args_.packed_key, scores_t_, false);
    if (args_.packed_key_t.transposed != nullptr) against(query_, args_.packed_key_t, scores_t_, has_query_t);
    for (int64_t r = 0; r < rows; ++r) weigh(s, band, head, i, r, j, width);
    add_panels<P>(seen, rows, weights_t_, values_, j, width, sums_, copy_);
    add_panels<P>(seen, rows, weights_, values_t_, j, width, sums_, copy_);
  }

  // Of row r: weights times z, and their products with the scores' tangents.
  void weigh(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t r, int64_t j,
             int64_t width) {
    constexpr int kWidth = kLanes<C>;
    const int64_t at = lse_row(args_, s.batch, head, s.query_start + i + r);
    const C lse = static_cast<const C*>(args_.lse)[at];
    const int64_t begin = std::max<int64_t>(band.first_key(i + r) - j, 0);
    const int64_t end = lse == kMinusInfinity<C> ? 0 : std::min(band.end_key(i + r) - j, width);
    P *const weights = weights_.row(r), *const weights_t = weights_t_.row(r);
    if (begin >= end) {
      std::fill(weights, weights + width, P(0));
      return std::fill(weights_t, weights_t + width, P(0));
    }
    const int64_t from = begin / kKeyStep<P> * kKeyStep<P>, to = round_up(end, kKeyStep<P>);
    const Vec<C> zero(C(0)), base(kLogBase<C>);
    const ScoreTransform<C> transform(args_);
    Vec<C> mean = zero;
    C z[kBlockKeys + kPanelKeys];
    if (dropout_.acts()) dropout_.factors(s.batch, head, s.query_start + i + r, j + from, to - from, z);
    for (int64_t e = from; e < to; e += kParts<P> * kWidth) {
      Vec<C> part[kParts<P>], part_t[kParts<P>];
      for (int u = 0; u < kParts<P>; ++u) {
        const int64_t c = e + u * kWidth;
        const auto capped = transform.capped(Vec<C>::loadu(scores_.row(r) + c));
        const Vec<C> t = has_bias_ ? transform.biased(capped.t, Vec<C>::loadu(bias_.row(r) + c)) : capped.t;
        Vec<C> score_t = has_score_t() ? Vec<C>::loadu(scores_t_.row(r) + c) * transform.scale * capped.slope : zero;
        if (has_mask_t()) score_t = score_t + Vec<C>::loadu(bias_t_.row(r) + c);
        C lane[kLanes<C>];
        const Vec<C> weight = power(bounded(t - Vec<C>(lse)) * base);
        Vec<C> product = select_equal(weight, zero, zero, weight * score_t), kept = weight;
        if (c < begin || c + kWidth > end) {  // the edges
          for (Vec<C>* v : {&product, &kept}) {
            v->store(lane);
            for (int l = 0; l < kWidth; ++l) lane[l] = c + l < begin || c + l >= end ? C(0) : lane[l];
            *v = Vec<C>::loadu(lane);
          }
        }
        mean = mean + product;
        if (dropout_.acts()) {
          const Vec<C> factor = Vec<C>::loadu(z + c - from);
          product = product * factor;
          kept = kept * factor;
        }
        part[u] = kept;
        part_t[u] = product;
      }
      store_weights<P>(part, weights + e);
      store_weights<P>(part_t, weights_t + e);
    }
    mean_[r] += sum_of_lanes(mean);
    for (P* row : {weights, weights_t}) {
      std::fill(row, row + from, P(0));
      std::fill(row + to, row + width, P(0));
    }
  }

  void finish(const AttentionSequence& s, int64_t head, int64_t i, int64_t rows) {
    C* lse_t = static_cast<C*>(args_.lse_t) + lse_row(args_, s.batch, head, s.query_start + i);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = s.query_start + i + r;
      const S* out = row_of<S>(args_.out, s.batch, head, at);
      lse_t[r] = mean_[r];
      for (int64_t c = 0; c < args_.value_dim; ++c) sums_.row(r)[c] -= mean_[r] * static_cast<C>(out[c]);
      convert(sums_.row(r), row_of<S>(args_.out_t, args_.out_t_strides, s.batch, head, at), args_.value_dim);
    }
  }

  const AttentionTangentCpu& args_;
  const bool biased_;
  bool has_bias_ = false;  // whether the block has biases; where not, they are zero
  const int64_t columns_;
  const Dropout<C> dropout_;
  Workspace space_;
  Matrix<C> scores_, scores_t_, bias_, bias_t_, sums_;
  Matrix<P> weights_, weights_t_;
  Matrix<const P> query_, query_t_;
  HeadRows<P> values_, values_t_;
  P *query_buffer_, *query_t_buffer_, *copy_;
  C mean_[kTileQueries];
  int64_t first_panel_ = 0;
};

}  // namespace

void attention_tangent_kernel(const AttentionTangentCpu& args, int64_t begin, int64_t end) {
  with_operands(args.dtype, args.plan.widens, [&](auto* type, auto* operand) {
    TangentPass<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(operand)>> pass(args);
    for (int64_t item = begin; item < end; ++item) pass.run(item);
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
