// The forward of dot-product attention that leaves its weights too: what the running softmax weighed is kept for all
// keys of a tile's rows, and divided once their sums are known.
#include "attention/cpu/dot_product_row_scores.h"
#include "attention/cpu/dot_product_softmax.h"
#include "attention/dot_product_weights_cpu.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

template <class S, class P>
class WithWeights : RunningSoftmax<S, P> {
  using Softmax = RunningSoftmax<S, P>;
  using Softmax::biased_, Softmax::factor_, Softmax::scores_, Softmax::sums_, Softmax::top_, Softmax::total_,
      Softmax::weights_;
  using typename Softmax::C;
  static constexpr int64_t kMostBlocks = kOnePassKeys / kBlockKeys;

 public:
  explicit WithWeights(const AttentionWithWeightsCpu& args)
      : Softmax(args), args_(args), width_(round_up(args.keys, kPanelKeys)) {
    this->reserve(space_, width_);
    const auto query = space_.reserve(kTileQueries * round_up(args.head_dim, kDeepStep) * sizeof(P));
    const auto copy = space_.reserve(kBlockKeys * round_up(args.value_dim, kColumnStep) * sizeof(P));
    const auto given = space_.reserve(kTileQueries * width_ * sizeof(C));
    this->place(space_);
    query_buffer_ = static_cast<P*>(space_.at(query));
    copy_ = static_cast<P*>(space_.at(copy));
    given_ = {static_cast<C*>(space_.at(given)), width_};
    first_score_ = scores_.data;
    first_weight_ = weights_.data;
  }

  void run(int64_t item) {
    const int64_t tiles = (args_.queries + args_.rows - 1) / args_.rows;
    const AttentionSequence s(args_, item / tiles);
    const Band band(args_, s);
    const int64_t i = item % tiles * args_.rows, rows = std::min(args_.rows, s.queries - i);
    begin_ = band.first_key(i) / kPanelKeys * kPanelKeys;
    end_ = std::max(begin_, band.end_key(i + rows - 1));
    for (int64_t head = 0; head < args_.heads; ++head) {
      if (head == 0 || !args_.average) clear(rows);
      attend(s, band, head, i, rows);
      for (int64_t r = 0; r < rows; ++r) give(r);
      if (!args_.average) store(s, head, args_.heads, i, rows);
    }
    if (args_.average) store(s, 0, 1, i, rows);
  }

 private:
  void clear(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(given_.row(r), width_, C(0));
  }

  // One head: its output and lse, and for all keys the weights before they are divided.
  void attend(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows) {
    first_panel_ = args_.plan.first_panel(s.batch, args_.kv_heads, head / (args_.heads / args_.kv_heads));
    values_ = HeadRows<P>(args_.packed_value, s, head / (args_.heads / args_.kv_heads), first_panel_);
    query_ = operand_rows<S, P>(args_.query, args_.head_dim, s.batch, head, i, rows, query_buffer_);
    this->start(rows);
    for (int64_t j = begin_, b = 0; j < end_; j += kBlockKeys, ++b) {
      scores_.data = first_score_ + (j - begin_);
      weights_.data = first_weight_ + (j - begin_);
      block(s, band, head, i, rows, j, std::min(kBlockKeys, round_up(end_ - j, kKeyStep<P>)));
      std::copy_n(top_, rows, tops_[b]);
    }
    this->finish_all(s, head, i, rows);
  }

  void block(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t rows, int64_t j,
             int64_t width) {
    PanelRows seen(band, i, rows, j, width);
    if (biased_ && !this->load_biases(s, band, head, i, rows, j, width, seen)) {
      for (int64_t r = 0; r < rows; ++r) std::fill_n(weights_.row(r), width, P(0));
      return;
    }
    if (scores_by_rows(args_)) score_by_rows<S>(args_, s.batch, head, i, rows, j, std::min(width, s.keys - j), scores_);
    else multiply_panels<P>(seen, query_, args_.packed_key, first_panel_, j, width, scores_, /*add=*/false);
    for (int64_t r = 0; r < rows; ++r) this->weigh(s, band, head, i + r, r, j, width);
    this->start_sums(rows);
    add_panels<P>(seen, rows, weights_, values_, j, width, sums_, copy_);
  }

  // Adds the weights of row r, each block's brought from the greatest score that was known then to the last.
  void give(int64_t r) {
    const C total = this->total_of(r);
    if (total == 0) return;
    const bool ordinary = total <= std::numeric_limits<C>::max();  // else NaN, where there is a weight
    for (int64_t at = 0, b = 0; at < end_ - begin_; at += kBlockKeys, ++b) {
      if (tops_[b][r] == kMinusInfinity<C> && ordinary) continue;
      C grown[kLanes<C>] = {C(1)};
      if (tops_[b][r] != top_[r]) power(Vec<C>((tops_[b][r] - top_[r]) * factor_)).store(grown);
      const Vec<C> factor(grown[0] / total), zero(C(0));
      const P* const from = first_weight_ + r * weights_.stride + at;
      C* const to = given_.row(r) + begin_ + at;
      const int64_t n = std::min(kBlockKeys, round_up(end_ - begin_ - at, kKeyStep<P>));
      for (int64_t k = 0; k < n; k += kLanes<P>) {
        Vec<C> part[kParts<P>];
        load_weights(from + k, part);
        for (int v = 0; v < kParts<P>; ++v) {
          Vec<C> weight = part[v] * factor;
          if (!ordinary) weight = select_equal(part[v], zero, zero, weight);
          C* const sum = to + k + v * kLanes<C>;
          (Vec<C>::loadu(sum) + weight).store(sum);
        }
      }
    }
  }

  static void load_weights(const P* from, Vec<C> (&part)[kParts<P>]) {
    if constexpr (kParts<P> == 1) {
      part[0] = Vec<C>::loadu(from);
    } else {
      const auto [low, high] = at::vec::convert_to_float<P>(Vec<P>::loadu(from));
      part[0] = low, part[1] = high;
    }
  }

  void store(const AttentionSequence& s, int64_t head, int64_t heads, int64_t i, int64_t rows) const {
    const Vec<C> share(args_.average ? C(1) / static_cast<C>(args_.heads) : C(1));
    for (int64_t r = 0; r < rows; ++r) {
      C* const row = given_.row(r);
      for (int64_t k = 0; k < s.keys && args_.average; k += kLanes<C>) (Vec<C>::loadu(row + k) * share).store(row + k);
      const int64_t at = (s.batch * heads + head) * args_.queries + i + r;
      convert(row, static_cast<S*>(args_.weights) + at * args_.keys, s.keys);
    }
  }

  const AttentionWithWeightsCpu& args_;
  const int64_t width_;
  Workspace space_;
  Matrix<const P> query_;
  HeadRows<P> values_;
  P *query_buffer_, *copy_, *first_weight_;
  C* first_score_;
  Matrix<C> given_;                    // [rows][keys]: the weights, or their sums over the heads so far
  C tops_[kMostBlocks][kTileQueries];  // greatest scores after each block
  int64_t begin_ = 0, end_ = 0;        // of the keys that the tile sees, from a panel's first on
  int64_t first_panel_ = 0;
};

}  // namespace

void attention_with_weights_kernel(const AttentionWithWeightsCpu& args, int64_t begin, int64_t end) {
  with_operands(args.dtype, args.plan.widens, [&](auto* type, auto* operand) {
    WithWeights<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(operand)>> attention(args);
    for (int64_t item = begin; item < end; ++item) attention.run(item);
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
