// The exponents of weights whose lse is known.
#pragma once

#include "attention/cpu/dot_product_score.h"

namespace lect11ext::CPU_CAPABILITY {

// From a score to an exponent, by the score: kLogBase but for the rounding of `factor`, which so does not count where a
// score is near the lse. Of a scale that leaves no such factor, kLogBase.
template <class C>
inline double exponent_of_score(C factor, double scale) {
  const bool has_factor = std::abs(scale) > kLeastScale && std::abs(factor) <= std::numeric_limits<C>::max();
  return has_factor ? factor / scale : kLogBase<C>;
}

// Whether the LSE is of scores that were rounded, so that weights must be of these too; an lse is ln 2 of an exponent.
template <class C>
inline bool is_large(C lse) {
  return !(std::abs(lse) < kLargeExponent<C> * C(0.75));
}

// −lse as an exponent of the base, in two parts: the greatest weights have the least exponents, and what the product's
// rounding leaves would be most of their error.
template <class C>
struct Shift {
  Vec<C> high, low;

  Shift(C lse, double exponent_of_score) {
    const double product = -lse * exponent_of_score;
    const C first = static_cast<C>(product), rest = static_cast<C>(product - first);
    high = Vec<C>(first);
    low = Vec<C>(std::abs(rest) <= std::numeric_limits<C>::max() ? rest : C(0));
  }

  // The weight of a score times `factor`.
  Vec<C> weight(const Vec<C>& score, const Vec<C>& factor) const {
    return power(at::vec::fmadd(score, factor, high) + low);
  }
};

}  // namespace lect11ext::CPU_CAPABILITY
