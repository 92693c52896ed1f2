// D = grad_out · out − grad_lse of a query, which the gradients of its scores have in common, and its tangent.
#pragma once

#include "attention/cpu/dot_product_softmax.h"

namespace lect11ext::CPU_CAPABILITY {

template <class S>
class Deltas {
  using C = Compute<S>;

 public:
  explicit Deltas(const AttentionBackwardCpu& args) : args_(args) {}

  C operator()(const AttentionSequence& s, int64_t head, int64_t i) const {
    return dot(args_.grad_out, args_.out, s, head, i) - grad_lse(lse_row(args_, s.batch, head, s.query_start + i));
  }

  C tangent(const AttentionSequence& s, int64_t head, int64_t i) const {
    const int64_t at = lse_row(args_, s.batch, head, s.query_start + i);
    return dot(args_.grad_out_t, args_.out, s, head, i) + dot(args_.grad_out, args_.out_t, s, head, i) -
           element(args_.grad_lse_t, at);
  }

  C grad_lse(int64_t at) const { return element(args_.grad_lse, at); }

 private:
  static C element(const void* data, int64_t at) { return data != nullptr ? static_cast<const C*>(data)[at] : C(0); }

  C dot(const AttentionOperand& a, const AttentionOperand& b, const AttentionSequence& s, int64_t head,
        int64_t i) const {
    if (a.data == nullptr || b.data == nullptr) return 0;
    const int64_t position = s.query_start + i;
    return inner_product(row_of<S>(a, s.batch, head, position), row_of<S>(b, s.batch, head, position));
  }

  C inner_product(const S* x, const S* y) const {
    constexpr int64_t kMost = 64;
    Vec<C> sum(C(0));
    C u[kMost], v[kMost];
    for (int64_t c = 0; c < args_.value_dim; c += kMost) {
      const int64_t n = std::min(kMost, args_.value_dim - c);
      const C *left = u, *right = v;
      if constexpr (std::is_same_v<S, C>) {
        left = x + c, right = y + c;
      } else {
        convert(x + c, u, n);
        convert(y + c, v, n);
      }
      for (int64_t e = 0; e < n; e += kLanes<C>) {
        const int64_t lanes = std::min<int64_t>(kLanes<C>, n - e);
        sum = at::vec::fmadd(Vec<C>::loadu(left + e, lanes), Vec<C>::loadu(right + e, lanes), sum);
      }
    }
    return sum_of_lanes(sum);
  }

  const AttentionBackwardCpu& args_;
};

}  // namespace lect11ext::CPU_CAPABILITY
