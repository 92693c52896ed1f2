// The exponents of weights whose lse is known.
#pragma once

#include "attention/cpu/dot_product_tile.h"

namespace lect11ext::CPU_CAPABILITY {

// −lse as an exponent of the base, in two parts: the greatest weights have the least exponents, and what the product's
// rounding leaves would be most of their error.
template <class C>
struct Shift {
  Vec<C> high, low;

  explicit Shift(C lse) {
    const C product = -lse * kLogBase<C>, rest = std::fma(-lse, kLogBase<C>, -product);
    high = Vec<C>(product);
    low = Vec<C>(std::abs(rest) <= std::numeric_limits<C>::max() ? rest : C(0));
  }

  // The weight of a score times `factor`.
  Vec<C> weight(const Vec<C>& score, const Vec<C>& factor) const {
    return power(at::vec::fmadd(score, factor, high) + low);
  }
};

}  // namespace lect11ext::CPU_CAPABILITY
