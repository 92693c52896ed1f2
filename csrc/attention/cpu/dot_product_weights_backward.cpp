// The backward of dot-product attention's weights: 128 keys at a time meet all queries that see them, a tile after the
// other, as in dot_product_gradients.h; what multiplies the weights is given here, not a product. Operands are of the
// type of the sums whatever the storage.
#include "attention/cpu/dot_product_factor.h"
#include "attention/cpu/dot_product_row_scores.h"
#include "attention/cpu/dot_product_score.h"
#include "attention/cpu/dot_product_weights.h"
#include "attention/dot_product_weights_cpu.h"
#include "common/workspace.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

template <class S>
class WeightsGradients {
  using C = Compute<S>;
  static constexpr int64_t kRows = kTileQueries, kKeys = kBackwardKeys;

 public:
  explicit WeightsGradients(const AttentionWeightsBackwardCpu& args)
      : args_(args), biased_(has_biases(args)), columns_(round_up(args.head_dim, kColumnStep)), dropout_(args) {
    const int64_t sizes[] = {kRows * kKeys,    kRows * kKeys,
                             kKeys * columns_, kRows * round_up(args.head_dim, kDeepStep),
                             kRows * columns_, kKeys * columns_};
    C** const to[] = {&scores_.data, &bias_.data, &key_sums_.data, &query_buffer_, &query_panel_, &copy_};
    size_t parts[6];
    for (int p = 0; p < 6; ++p) parts[p] = space_.reserve(sizes[p] * sizeof(C));
    for (int p = 0; p < 6; ++p) *to[p] = static_cast<C*>(space_.at(parts[p]));
    scores_.stride = bias_.stride = kKeys;
    key_sums_.stride = columns_;
  }

  void run(int64_t item) {
    each_head(args_, item, [&](int64_t n, int64_t kv_head, int64_t part) { run_head(n, kv_head, part); });
  }

 private:
  // A part of the keys of one head.
  void run_head(int64_t n, int64_t kv_head, int64_t part) {
    const AttentionSequence s(args_, n);
    const Band band(args_, s);
    const int64_t group = args_.heads / args_.kv_heads, blocks = (s.keys + kKeys - 1) / kKeys;
    first_panel_ = args_.plan.first_panel(n, args_.kv_heads, kv_head);
    keys_ = HeadRows<C>(args_.packed_key, s, kv_head, first_panel_);
    const int64_t begin = blocks * part / args_.parts, end = blocks * (part + 1) / args_.parts;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t j = b * kKeys, width = std::min(kKeys, round_up(s.keys - j, kKeyStep<C>));
      std::fill_n(key_sums_.data, kKeys * columns_, C(0));
      const int64_t most = tile_rows(s.queries);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t i = 0; i < s.queries; i += most) {
          const int64_t count = std::min(most, s.queries - i);
          if (band.first_row(i, count, j) >= band.end_row(i, count, j, width)) continue;
          meet(s, band, head, i, count, j, width, part);
        }
      }
      for (int64_t k = 0; k < std::min(kKeys, s.keys - j) && args_.grad_key != nullptr; ++k) {
        C* const sums = key_sums_.row(k);
        for (int64_t c = 0; c < columns_; ++c) sums[c] *= static_cast<C>(args_.scale);
        convert(sums, row_of<S>(args_.grad_key, args_.grad_key_strides, s.batch, kv_head, j + k), args_.head_dim);
      }
    }
  }

  // A tile of queries meets a block of keys.
  void meet(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t count, int64_t j,
            int64_t width, int64_t part) {
    PanelRows seen(band, i, count, j, width);
    const int64_t n = std::min(width, s.keys - j);
    for (int64_t r = 0; r < count && biased_; ++r) {
      bias_row<S>(args_, args_.mask, /*with_slopes=*/true, s.batch, head, i + r, band.diagonal, j, n, bias_.row(r));
    }
    if (args_.mask.type != MaskType::None && !seen.narrow(bias_, n)) return;
    const int64_t at = lse_row(args_, s.batch, head, i), row = part * args_.batch * args_.heads * args_.queries + at;
    const C* lse = static_cast<const C*>(args_.lse) + at;
    const auto query =
        load_factor<S, C>(args_.query, args_.head_dim, s, head, i, count, lse, query_buffer_, query_panel_);
    if (scores_by_rows(args_)) score_by_rows<S>(args_, s.batch, head, i, count, j, n, scores_);
    else multiply_panels<C>(seen, query.rows, args_.packed_key, first_panel_, j, width, scores_, /*add=*/false);
    C* lse_sums = static_cast<C*>(args_.lse_sums) + row;
    for (int64_t r = 0; r < count; ++r) lse_sums[r] -= weigh(s, band, head, i + r, r, j, width, lse[r]);
    if (args_.grad_key != nullptr) {
      add_across<C>(seen, count, {scores_.data, kKeys}, query, width, key_sums_, columns_);
    }
    if (args_.grad_query != nullptr) {
      const Matrix<C> sums{static_cast<C*>(args_.query_sums) + row * columns_, columns_};
      add_panels<C>(seen, count, scores_, keys_, j, width, sums, copy_);
    }
  }

  // Of query i, row r: scores become their gradients. Returns the sum of the gradients of t.
  C weigh(const AttentionSequence& s, const Band& band, int64_t head, int64_t i, int64_t r, int64_t j, int64_t width,
          C lse) {
    constexpr int kWidth = kLanes<C>;
    C* const scores = scores_.row(r);
    const int64_t begin = std::max<int64_t>(band.first_key(i) - j, 0);
    const int64_t end = lse == kMinusInfinity<C> ? 0 : std::min(band.end_key(i) - j, width);
    if (begin >= end) {
      std::fill_n(scores, width, C(0));
      return 0;
    }
    C given[kKeys], full[kKeys];
    load_gradient(s.batch, head, i, j, begin, end, given);
    const int64_t from = begin / kKeyStep<C> * kKeyStep<C>, to = round_up(end, kKeyStep<C>);
    const Vec<C> zero(C(0)), base(kLogBase<C>);
    const ScoreTransform<C> transform(args_);
    const Shift<C> shift(lse, kLogBase<C>);
    C z[kKeys + kPanelKeys];
    if (dropout_.acts()) dropout_.factors(s.batch, head, i, j + from, to - from, z);
    for (int64_t e = from; e < to; e += kWidth) {
      const auto capped = transform.capped(Vec<C>::loadu(scores + e));
      const Vec<C> t = biased_ ? transform.biased(capped.t, Vec<C>::loadu(bias_.row(r) + e)) : capped.t;
      const Vec<C> weight = shift.weight(t, base);
      Vec<C> gradient = weight * Vec<C>::loadu(given + e);
      if (dropout_.acts()) gradient = gradient * Vec<C>::loadu(z + e - from);
      // A barred key's gradient is none, be it NaN.
      select_equal(weight, zero, zero, gradient).store(full + e);
      select_equal(weight, zero, zero, gradient * capped.slope).store(scores + e);
    }
    std::fill(scores, scores + begin, C(0));
    std::fill(scores + end, scores + width, C(0));
    std::fill(full + from, full + begin, C(0));
    std::fill(full + end, full + to, C(0));
    Vec<C> sum = zero;
    for (int64_t k = from; k < to; k += kWidth) sum = sum + Vec<C>::loadu(full + k);
    if (args_.grad_mask != nullptr) add_to_mask(args_, s.batch, head, i, j, begin, end, full);
    return sum_of_lanes(sum);
  }

  // ∂L/∂w of keys j + begin … j + end − 1, zero around them.
  void load_gradient(int64_t batch, int64_t head, int64_t i, int64_t j, int64_t begin, int64_t end, C* to) const {
    const int64_t* strides = args_.gradient.strides;
    const S* from = static_cast<const S*>(args_.gradient.data) + batch * strides[0] + head * strides[1] +
                    i * strides[2] + (j + begin) * strides[3];
    std::fill_n(to, kKeys, C(0));
    if (strides[3] == 1) convert(from, to + begin, end - begin);
    else lect11ext::CPU_CAPABILITY::load_bias(from, strides[3], end - begin, to + begin);
    for (int64_t k = begin; k < end; ++k) to[k] *= static_cast<C>(args_.share);
  }

  const AttentionWeightsBackwardCpu& args_;
  const bool biased_;
  const int64_t columns_;
  const Dropout<C> dropout_;
  Workspace space_;
  Matrix<C> scores_, bias_, key_sums_;
  HeadRows<C> keys_;
  C *query_buffer_, *query_panel_, *copy_;
  int64_t first_panel_ = 0;
};

}  // namespace

void attention_weights_backward_kernel(const AttentionWeightsBackwardCpu& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    WeightsGradients<std::remove_pointer_t<decltype(type)>> gradients(args);
    for (int64_t item = begin; item < end; ++item) gradients.run(item);
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
