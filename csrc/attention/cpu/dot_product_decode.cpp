// The forward where few queries share a head of the keys, as in decoding: bound by reading keys and values, which are
// taken once, in place, and never packed. Many keys are cut into parts, for as many threads; what the parts found is
// merged in order.
#include "attention/cpu/dot_product_row_scores.h"
#include "attention/cpu/dot_product_softmax.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// Two vectors of a row. Of bfloat16 they are its even and its odd elements, which a shift and a mask give, where the
// natural order takes two shuffles more.
template <class S>
struct TwoVectors {
  using C = Compute<S>;
  static constexpr int64_t kElements = 2 * kLanes<C>;
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr bool kInterleaved = std::is_same_v<S, at::BFloat16>;
#else
  static constexpr bool kInterleaved = false;
#endif
  Vec<C> first, second;

  static TwoVectors load(const S* from) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (kInterleaved) {
      const __m512i pairs = _mm512_loadu_si512(from), high_halves = _mm512_set1_epi32(-0x10000);
      return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(pairs, high_halves))};
    }
#endif
    if constexpr (std::is_same_v<S, C>) {
      return {Vec<C>::loadu(from), Vec<C>::loadu(from + kLanes<C>)};
    } else {
      const auto [low, high] = at::vec::convert_to_float<S>(Vec<S>::loadu(from));
      return {low, high};
    }
  }

  // Sums, which lie in the natural order.
  static TwoVectors load_sums(const C* from) {
    const Vec<C> low = Vec<C>::loadu(from), high = Vec<C>::loadu(from + kLanes<C>);
    if constexpr (!kInterleaved) return {low, high};
    const auto [even, odd] = at::vec::deinterleave2(low, high);
    return {even, odd};
  }
  void store_sums(C* to) const {
    auto [low, high] = kInterleaved ? at::vec::interleave2(first, second) : std::pair(first, second);
    low.store(to);
    high.store(to + kLanes<C>);
  }
};

// Weights are floats (or doubles) whatever the storage: arithmetic is not what binds.
template <class S>
class Decode : RunningSoftmax<S, Compute<S>> {
  using C = Compute<S>;
  using Softmax = RunningSoftmax<S, C>;
  using Softmax::biased_, Softmax::columns_, Softmax::has_bias_, Softmax::scores_, Softmax::sums_, Softmax::top_,
      Softmax::total_;

 public:
  explicit Decode(const AttentionDecodeCpu& args) : Softmax(args), args_(args), group_(args.heads / args.kv_heads) {
    this->reserve(space_);
    const auto query = space_.reserve(kDecodeRows * args.head_dim * sizeof(S));
    const auto values = space_.reserve(kPanelKeys * columns_ * sizeof(C));
    this->place(space_);
    query_ = static_cast<S*>(space_.at(query));
    values_ = static_cast<C*>(space_.at(values));
  }

  void run(int64_t item) {
    const int64_t part = item % args_.parts, kv_head = item / args_.parts % args_.kv_heads;
    const AttentionSequence s(args_, item / args_.parts / args_.kv_heads);
    const Band band(args_, s);
    const int64_t rows = group_ * s.queries;
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = row_of<S>(args_.query, s.batch, kv_head * group_ + r / s.queries, s.query_start + r % s.queries);
      std::copy_n(from, args_.head_dim, query_ + r * args_.head_dim);
    }
    this->start(rows);
    const int64_t blocks = (s.keys + kBlockKeys - 1) / kBlockKeys;
    const int64_t first =
        std::max(blocks * part / args_.parts * kBlockKeys, band.first_key(0) / kPanelKeys * kPanelKeys);
    const int64_t end = std::min({blocks * (part + 1) / args_.parts * kBlockKeys, band.end_key(s.queries - 1), s.keys});
    for (int64_t j = first; j < end; j += kBlockKeys) block(s, band, kv_head, rows, j, std::min(kBlockKeys, end - j));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = kv_head * group_ + r / s.queries, i = r % s.queries;
      if (args_.parts == 1) this->finish(s, head, i, r);
      else keep(part, lse_row(args_, s.batch, head, s.query_start + i), r);
    }
  }

 private:
  void block(const AttentionSequence& s, const Band& band, int64_t kv_head, int64_t rows, int64_t j, int64_t n) {
    const int64_t width = round_up(n, kKeyStep<C>);
    if (biased_ && !load_biases(s, band, kv_head, rows, j, n)) return;
    const S* keys = row_of<S>(args_.key, s.batch, kv_head, s.key_start + j);
    RowScores<S>(query_, args_.head_dim, rows, args_.head_dim, keys, args_.key.strides.position)(n, scores_);
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(scores_.row(r) + n, scores_.row(r) + width, kMinusInfinity<C>);
      this->weigh(s, band, kv_head * group_ + r / s.queries, r % s.queries, r, j, width);
    }
    this->start_sums(rows);
    add_values(row_of<S>(args_.value, s.batch, kv_head, s.key_start + j), rows, n);
  }

  // Returns whether any row may see any of the keys. A mask that heads and queries share is looked at as a whole.
  bool load_biases(const AttentionSequence& s, const Band& band, int64_t kv_head, int64_t rows, int64_t j, int64_t n) {
    const bool shared = args_.mask.strides[1] == 0 && (args_.mask.strides[2] == 0 || s.queries == 1);
    const BlockMask kind = shared ? block_mask(args_, s.batch, kv_head * group_, 0, 1, j, n) : BlockMask::Some;
    has_bias_ = kind == BlockMask::Some;
    for (int64_t r = 0; r < rows && has_bias_; ++r) {
      this->load_bias(s, band, kv_head * group_ + r / s.queries, r % s.queries, r, j, round_up(n, kKeyStep<C>));
    }
    return kind != BlockMask::AllBarred;
  }

  // Values of the block's n keys, whose weights are zero beyond n.
  void add_values(const S* values, int64_t rows, int64_t n) {
    const int64_t stride = args_.value.strides.position;
    C used[kBlockKeys];  // how many rows use a key
    const bool all = count_uses(rows, n, used);
    if (all && rows <= kRowsInRegisters && args_.value_dim % kChunk == 0) {
      for (int64_t r = 0; r < rows; ++r) add_row(values, stride, scores_.row(r), n, sums_.row(r));
      return;
    }
    for (int64_t p = 0; p < n; p += kPanelKeys) {
      add_panel(values + p * stride, rows, p, std::min(kPanelKeys, n - p), all ? nullptr : used + p);
    }
  }

  // Returns whether all n keys are used.
  bool count_uses(int64_t rows, int64_t n, C* used) const {
    const Vec<C> zero(C(0)), one(C(1));
    Vec<C> unused = zero;
    const int64_t width = round_up(n, kLanes<C>);
    for (int64_t k = 0; k < width; k += kLanes<C>) {
      Vec<C> uses = zero;
      for (int64_t r = 0; r < rows; ++r) uses = uses + select_equal(Vec<C>::loadu(scores_.row(r) + k), zero, zero, one);
      uses.store(used + k);
      unused = unused + select_equal(uses, zero, one, zero);
    }
    return sum_of_lanes(unused) == static_cast<C>(width - n);
  }

  // Values p … p + n − 1 of the block, by their panel: in place where they lie as the product wants them, and all have
  // a weight.
  void add_panel(const S* values, int64_t rows, int64_t p, int64_t n, const C* used) {
    const int64_t stride = args_.value.strides.position;
    Matrix<const C> from{values_, columns_};
    bool in_place = false;
    if constexpr (std::is_same_v<S, C>) {
      in_place = used == nullptr && args_.value_dim == columns_;
      if (in_place) from = {values, stride};
    }
    if (!in_place) {
      for (int64_t k = 0; k < n; ++k) {
        const bool uses = used == nullptr || used[k] != 0;
        C* row = values_ + k * columns_;
        if (uses) convert(values + k * stride, row, args_.value_dim);
        std::fill(row + (uses ? args_.value_dim : 0), row + columns_, C(0));
      }
    }
    multiply<Order::Along, C>({scores_.row(0) + p, kBlockKeys}, rows, n, from, sums_, columns_, true);
  }

  // sums += Σ_k weights[k] · values[k], straight from the storage: what a panel would cost is more than the arithmetic.
  // Two keys at a time, so that a sum waits for every other one.
  static constexpr int64_t kRowsInRegisters = 2, kChunk = 64;
  void add_row(const S* values, int64_t stride, const C* weights, int64_t n, C* sums) const {
    using Two = TwoVectors<S>;
    constexpr int kPairs = kChunk / Two::kElements;
    const int64_t ahead = rows_ahead<S>(stride) * stride;
    const auto add = [&](const S* from, C weight, Two(&to)[kPairs]) {
      const Vec<C> w(weight);
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; ++p) {
        const Two row = Two::load(from + p * Two::kElements);
        __builtin_prefetch(from + ahead + p * Two::kElements);
        to[p].first = at::vec::fmadd(row.first, w, to[p].first);
        to[p].second = at::vec::fmadd(row.second, w, to[p].second);
      }
    };
    for (int64_t c = 0; c < args_.value_dim; c += kChunk) {
      Two even[kPairs], odd[kPairs];
      for (int p = 0; p < kPairs; ++p) {
        even[p] = Two::load_sums(sums + c + p * Two::kElements);
        odd[p] = {Vec<C>(C(0)), Vec<C>(C(0))};
      }
      const S* from = values + c;
      int64_t k = 0;
      for (; k + 2 <= n; k += 2, from += 2 * stride) {
        add(from, weights[k], even);
        add(from + stride, weights[k + 1], odd);
      }
      if (k < n) add(from, weights[k], even);
      for (int p = 0; p < kPairs; ++p) {
        even[p].first = even[p].first + odd[p].first;
        even[p].second = even[p].second + odd[p].second;
        even[p].store_sums(sums + c + p * Two::kElements);
      }
    }
  }

  void keep(int64_t part, int64_t row, int64_t r) const {
    C* to = static_cast<C*>(args_.partial) +
            (part * args_.batch * args_.heads * args_.queries + row) * decode_partial(args_.value_dim);
    this->started_ ? std::copy_n(sums_.row(r), columns_, to) : std::fill_n(to, columns_, C(0));
    to[columns_] = top_[r];
    to[columns_ + 1] = sum_of_lanes(Vec<C>::loadu(total_[r]));
  }

  const AttentionDecodeCpu& args_;
  const int64_t group_;
  Workspace space_;
  S* query_;
  C* values_;
};

// What the parts found of a row, in one.
template <class S>
class Merge : RunningSoftmax<S, Compute<S>> {
  using C = Compute<S>;
  using Softmax = RunningSoftmax<S, C>;
  using Softmax::columns_, Softmax::factor_, Softmax::sums_, Softmax::top_, Softmax::total_;

 public:
  explicit Merge(const AttentionDecodeCpu& args) : Softmax(args), args_(args) {
    this->reserve(space_);
    this->place(space_);
  }

  void run(int64_t row) {
    const int64_t size = decode_partial(args_.value_dim), rows = args_.batch * args_.heads * args_.queries;
    const C* partial = static_cast<const C*>(args_.partial) + row * size;
    this->start(1);
    this->start_sums(1);
    for (int64_t part = 0; part < args_.parts; ++part)
      top_[0] = std::max(top_[0], partial[part * rows * size + columns_]);
    if (top_[0] != kMinusInfinity<C>) {
      for (int64_t part = 0; part < args_.parts; ++part) {
        const C* from = partial + part * rows * size;
        if (from[columns_] == kMinusInfinity<C> && from[columns_ + 1] == 0) continue;
        C shrink[kLanes<C>];
        power(Vec<C>((from[columns_] - top_[0]) * factor_)).store(shrink);
        total_[0][0] += from[columns_ + 1] * shrink[0];
        for (int64_t c = 0; c < columns_; ++c) sums_.row(0)[c] += from[c] * shrink[0];
      }
    } else {
      // All scores are −∞ or NaN: whoever had a NaN has it in its sums.
      for (int64_t part = 0; part < args_.parts; ++part) {
        const C* from = partial + part * rows * size;
        total_[0][0] += from[columns_ + 1];
        for (int64_t c = 0; c < columns_; ++c) sums_.row(0)[c] += from[c];
      }
    }
    const int64_t i = row % args_.queries, head = row / args_.queries % args_.heads;
    AttentionSequence s(args_, 0);
    s.batch = row / args_.queries / args_.heads;
    s.query_start = 0;
    this->finish(s, head, i, 0);
  }

 private:
  const AttentionDecodeCpu& args_;
  Workspace space_;
};

}  // namespace

void attention_decode_kernel(const AttentionDecodeCpu& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    Decode<std::remove_pointer_t<decltype(type)>> decode(args);
    for (int64_t item = begin; item < end; ++item) decode.run(item);
  });
}

void attention_merge_kernel(const AttentionDecodeCpu& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* type) {
    Merge<std::remove_pointer_t<decltype(type)>> merge(args);
    for (int64_t row = begin; row < end; ++row) merge.run(row);
  });
}

}  // namespace lect11ext::CPU_CAPABILITY
