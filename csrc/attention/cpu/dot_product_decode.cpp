// The forward where few queries share a head of the keys, as in decoding: bound by reading keys and values, which are
// taken once, in place, and never packed. Many keys are cut into parts, for as many threads; what the parts found is
// merged in order.
#include "attention/cpu/dot_product_softmax.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

// Weights are floats (or doubles) whatever the storage: arithmetic is not what binds.
template <class S>
class Decode : RunningSoftmax<S, Compute<S>> {
  using C = Compute<S>;
  using Softmax = RunningSoftmax<S, C>;
  using Softmax::biased_, Softmax::columns_, Softmax::scores_, Softmax::sums_, Softmax::top_, Softmax::total_;

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
    const int64_t width = round_up(n, kKeyStep);
    const auto head = [&](int64_t r) { return kv_head * group_ + r / s.queries; };
    for (int64_t r = 0; r < rows && biased_; ++r) this->load_bias(s, band, head(r), r % s.queries, r, j, width);
    score(row_of<S>(args_.key, s.batch, kv_head, s.key_start + j), rows, n);
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(scores_.row(r) + n, scores_.row(r) + width, kMinusInfinity<C>);
      this->weigh(s, band, head(r), r % s.queries, r, j, width);
    }
    this->start_sums(rows);
    for (int64_t p = 0; p < n; p += kPanelKeys) {
      add_values(row_of<S>(args_.value, s.batch, kv_head, s.key_start + j + p), rows, p, std::min(kPanelKeys, n - p));
    }
  }

  // Inner products of all rows with n keys, four at a time.
  void score(const S* keys, int64_t rows, int64_t n) {
    constexpr int kFour = 4;
    const RowProduct<S> product{keys, args_.key.strides.position, query_, args_.head_dim, args_.head_dim};
    for (int64_t k = 0; k < n; k += kFour) {
      for (int64_t r = 0, count; r < rows; r += count) {
        count = next_rows_of_x(rows - r);
        C* out = scores_.row(r) + k;
        const auto run = [&]<int B>() {
          dot_tile<kFour, B, S>(&product, 1, k, n, r, out, kBlockKeys, /*next_rows=*/8);
        };
        switch (count) {
          case 1: run.template operator()<1>(); break;
          case 2: run.template operator()<2>(); break;
          case 3: run.template operator()<std::min(3, kMaxRowsOfX)>(); break;
          case 4: run.template operator()<std::min(4, kMaxRowsOfX)>(); break;
          case 5: run.template operator()<std::min(5, kMaxRowsOfX)>(); break;
          default: run.template operator()<kMaxRowsOfX>(); break;
        }
      }
    }
  }

  // Values p … p + n − 1 of the block: in place where they lie as the product wants them, and all have a weight.
  void add_values(const S* values, int64_t rows, int64_t p, int64_t n) {
    const int64_t stride = args_.value.strides.position;
    bool used[kPanelKeys], all = true;
    for (int64_t k = 0; k < n; ++k) {
      used[k] = false;
      for (int64_t r = 0; r < rows && !used[k]; ++r) used[k] = scores_.row(r)[p + k] != 0;
      all = all && used[k];
    }
    if (all && rows <= kRowsInRegisters && args_.value_dim % kChunk == 0) {
      for (int64_t r = 0; r < rows; ++r) add_row(values, stride, scores_.row(r) + p, n, sums_.row(r));
      return;
    }
    Matrix<const C> from{values_, columns_};
    bool in_place = false;
    if constexpr (std::is_same_v<S, C>) {
      in_place = all && args_.value_dim == columns_;
      if (in_place) from = {values, stride};
    }
    if (!in_place) {
      for (int64_t k = 0; k < n; ++k) {
        C* row = values_ + k * columns_;
        if (used[k]) convert(values + k * stride, row, args_.value_dim);
        std::fill(row + (used[k] ? args_.value_dim : 0), row + columns_, C(0));
      }
    }
    multiply<Order::Along, C>({scores_.row(0) + p, kBlockKeys}, rows, n, from, sums_, columns_, true);
  }

  // sums += Σ_k weights[k] · values[k], straight from the storage: what a panel would cost is more than the arithmetic.
  // Two keys at a time, so that a sum waits for every other one.
  static constexpr int64_t kRowsInRegisters = 2, kChunk = 64;
  void add_row(const S* values, int64_t stride, const C* weights, int64_t n, C* sums) const {
    constexpr int kVectors = kChunk / kLanes<C>;
    const auto load = [](const S* from, Vec<C>(&row)[kVectors]) {
      if constexpr (std::is_same_v<S, C>) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) row[v] = Vec<C>::loadu(from + v * kLanes<C>);
      } else {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v += 2) {
          const auto [low, high] = at::vec::convert_to_float<S>(Vec<S>::loadu(from + v * kLanes<C>));
          row[v] = low, row[v + 1] = high;
        }
      }
    };
    for (int64_t c = 0; c < args_.value_dim; c += kChunk) {
      Vec<C> even[kVectors], odd[kVectors], row[kVectors];
      for (int v = 0; v < kVectors; ++v) even[v] = Vec<C>::loadu(sums + c + v * kLanes<C>), odd[v] = Vec<C>(C(0));
      int64_t k = 0;
      for (; k + 2 <= n; k += 2) {
        load(values + k * stride + c, row);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) even[v] = at::vec::fmadd(row[v], Vec<C>(weights[k]), even[v]);
        load(values + (k + 1) * stride + c, row);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) odd[v] = at::vec::fmadd(row[v], Vec<C>(weights[k + 1]), odd[v]);
      }
      if (k < n) {
        load(values + k * stride + c, row);
        for (int v = 0; v < kVectors; ++v) even[v] = at::vec::fmadd(row[v], Vec<C>(weights[k]), even[v]);
      }
      for (int v = 0; v < kVectors; ++v) (even[v] + odd[v]).store(sums + c + v * kLanes<C>);
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
