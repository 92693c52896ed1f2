// Scores of few queries, from keys as they lie. The forward of few queries takes them so (dot_product_decode.cpp), and
// whatever finds its weights again must have the same: a sum in another order is other by a rounding of the largest
// score, which is an error of all weights.
#pragma once

#include "attention/cpu/dot_product_tile.h"
#include "common/cpu/dot.h"

namespace lect11ext::CPU_CAPABILITY {

// How far ahead rows are asked for: what memory delivers in its latency, 13 GB/s for 100 ns, and twice as much again.
// The hardware's own prefetching stops at every page.
inline constexpr int64_t kBytesAhead = 4096;
template <class S>
inline int64_t rows_ahead(int64_t stride) {
  return stride == 0 ? 0 : std::max<int64_t>(1, kBytesAhead / (std::abs(stride) * static_cast<int64_t>(sizeof(S))));
}

template <class S>
class RowScores {
  using C = Compute<S>;

 public:
  RowScores(const S* queries, int64_t query_stride, int64_t rows, int64_t head_dim, const S* keys, int64_t key_stride)
      : queries_(queries),
        query_stride_(query_stride),
        rows_(rows),
        head_dim_(head_dim),
        keys_(keys),
        key_stride_(key_stride),
        ahead_(rows_ahead<S>(key_stride)) {}

  // Inner products of all rows with n keys, four at a time: up to three of a row beyond are written too.
  void operator()(int64_t n, const Matrix<C>& out) const {
    constexpr int kFour = 4, kElements = Step<S>::kElements;
    int64_t k = 0;
    if (rows_ == 1) {
      switch (head_dim_) {
        case kElements: k = row<1>(n, out.row(0)); break;
        case 2 * kElements: k = row<2>(n, out.row(0)); break;
        case 4 * kElements: k = row<4>(n, out.row(0)); break;
        case 8 * kElements: k = row<8>(n, out.row(0)); break;
      }
    }
    const RowProduct<S> product{keys_, key_stride_, queries_, query_stride_, head_dim_};
    for (; k < n; k += kFour) {
      for (int64_t r = 0, count; r < rows_; r += count) {
        count = next_rows_of_x(rows_ - r);
        C* to = out.row(r) + k;
        const auto run = [&]<int B>() { dot_tile<kFour, B>(&product, 1, k, n, r, to, out.stride, ahead_); };
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

 private:
  // Of one query, which stays in registers: all fours of the n keys. Returns how many keys these are.
  template <int kSteps>
  int64_t row(int64_t n, C* out) const {
    using Loader = Step<S>;
    const int64_t ahead = ahead_ * key_stride_;
    typename Loader::Loaded query[kSteps];
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) query[s] = Loader::load(queries_ + s * Loader::kElements);
    const S* keys = keys_;
    int64_t k = 0;
    for (; k + 4 <= n; k += 4, keys += 4 * key_stride_) {
      Vec<C> sums[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const S* key = keys + r * key_stride_;
        sums[r] = Vec<C>(C(0));
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; ++s) {
          __builtin_prefetch(key + ahead + s * Loader::kElements);
          sums[r] = Loader::madd(Loader::load(key + s * Loader::kElements), query[s], sums[r]);
        }
      }
      sum_lanes4(sums, out + k);
    }
    return k;
  }

  const S* const queries_;
  const int64_t query_stride_, rows_, head_dim_;
  const S* const keys_;
  const int64_t key_stride_, ahead_;
};

// Rows i … of `a`, queries or gradients of outputs, times keys or values j … j + n − 1, where scores_by_rows().
template <class S>
inline void multiply_rows(const Attention& args, const AttentionOperand& a, const AttentionOperand& b, int64_t columns,
                          int64_t batch, int64_t head, int64_t i, int64_t rows, int64_t j, int64_t n,
                          const Matrix<Compute<S>>& out) {
  const S* right = row_of<S>(b, batch, head / (args.heads / args.kv_heads), j);
  RowScores<S>(row_of<S>(a, batch, head, i), a.strides.position, rows, columns, right, b.strides.position)(n, out);
}

template <class S>
inline void score_by_rows(const Attention& args, int64_t batch, int64_t head, int64_t i, int64_t rows, int64_t j,
                          int64_t n, const Matrix<Compute<S>>& out) {
  multiply_rows<S>(args, args.query, args.key, args.head_dim, batch, head, i, rows, j, n, out);
}

}  // namespace lect11ext::CPU_CAPABILITY
