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

  // How far sums of weights may be off by roundings: of the scores, times these.
  static C sums_room(C lse) { return 8 * std::numeric_limits<C>::epsilon() * (1 + std::abs(lse)); }

  // grad_out · out as the keys at hand have it, unless that is not what the output has but for roundings: a caller may
  // bring the output and the LSE of more keys than it passes, as a ring of processes does. `size`: of the keys' terms.
  C nearer(C of_keys, C size, C lse, const AttentionSequence& s, int64_t head, int64_t i) const {
    const C kOfOutput = static_cast<C>(std::numeric_limits<S>::epsilon()) / 2;
    C size_of_output = 0;
    const C of_output = dot(args_.grad_out, args_.out, s, head, i, &size_of_output);
    const C room = (kOfOutput + sums_room(lse)) * (size + size_of_output);
    return std::abs(of_keys - of_output) <= room ? of_keys : of_output;
  }

  C grad_lse(int64_t at) const { return element(args_.grad_lse, at); }

 private:
  static C element(const void* data, int64_t at) { return data != nullptr ? static_cast<const C*>(data)[at] : C(0); }

  C dot(const AttentionOperand& a, const AttentionOperand& b, const AttentionSequence& s, int64_t head, int64_t i,
        C* size = nullptr) const {
    if (a.data == nullptr || b.data == nullptr) return 0;
    const int64_t position = s.query_start + i;
    return inner_product(row_of<S>(a, s.batch, head, position), row_of<S>(b, s.batch, head, position), size);
  }

  // `size`: the same of absolute values, where it is asked for.
  C inner_product(const S* x, const S* y, C* size) const {
    constexpr int64_t kMost = 64;
    Vec<C> sum(C(0)), sizes(C(0));
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
        const Vec<C> l = Vec<C>::loadu(left + e, lanes), r = Vec<C>::loadu(right + e, lanes);
        sum = at::vec::fmadd(l, r, sum);
        if (size != nullptr) sizes = sizes + (l * r).abs();
      }
    }
    if (size != nullptr) *size = sum_of_lanes(sizes);
    return sum_of_lanes(sum);
  }

  const AttentionBackwardCpu& args_;
};

}  // namespace lect11ext::CPU_CAPABILITY
