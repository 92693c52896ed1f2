// The activations of csrc/autoencoder/activation.h with their first two derivatives, on vectors. All of them from one
// exponential of a negative number, so that nothing overflows, and without differences of nearly equal numbers, so that
// derivatives keep their digits where the activation is saturated. NaN survives.
#pragma once

#include "autoencoder/activation.h"
#include "common/cpu/math.h"

namespace lect11ext::CPU_CAPABILITY {

// log(1 + e) for e in [0, 1], relative error 1.5e-7: interpolation of log(1 + e)/e at Chebyshev's points.
inline Vec<float> log1p_unit(Vec<float> e) {
  Vec<float> p(-3.2563785e-3f);
  for (const float c : {1.9907162e-2f, -5.7064202e-2f, 1.0614265e-1f, -1.5311863e-1f, 1.9678117e-1f, -2.4954559e-1f,
                        3.3330005e-1f, -4.9999905e-1f, 1.0f}) {
    p = at::vec::fmadd(p, e, Vec<float>(c));
  }
  return p * e;
}

inline Vec<double> log1p_unit(Vec<double> e) { return e.log1p(); }

inline Vec<float> exp_of_negative(Vec<float> x) { return exp(x); }
inline Vec<double> exp_of_negative(Vec<double> x) { return x.exp(); }

// σ(x), σ(x)·σ(−x) and log(1 + e^x) from e = e^−|x|.
template <class T>
struct Logistic {
  Vec<T> x, e, large;  // large: σ(|x|)

  explicit Logistic(Vec<T> x) : x(x), e(exp_of_negative(x.abs().neg())), large(Vec<T>(T(1)) / (Vec<T>(T(1)) + e)) {}

  Vec<T> sigmoid() const { return select_less(x, Vec<T>(T(0)), e * large, large); }
  Vec<T> slope() const { return e * large * large; }
  Vec<T> softplus() const { return at::vec::maximum(x, Vec<T>(T(0))) + log1p_unit(e); }
  // The second derivative of σ.
  Vec<T> curvature() const {
    const Vec<T> magnitude = slope() * (Vec<T>(T(1)) - e) * large;
    return select_less(x, Vec<T>(T(0)), magnitude, magnitude.neg());
  }
};

// tanh(x) and 1 − tanh²(x) from q = e^−2|x|.
template <class T>
struct Tangent {
  Vec<T> value, slope;
};

inline Tangent<float> tangent(Vec<float> x) {
  const Vec<float> one(1.0f);
  const ReducedExp e = reduced_exp(x.abs() * Vec<float>(-2.0f));
  const Vec<float> scale = ldexp(one, e.n);
  const Vec<float> q_minus_1 = at::vec::fmadd(scale, e.em1, scale - one), q = scale * (e.em1 + one);
  const Vec<float> d = one / (q_minus_1 + Vec<float>(2.0f));
  const Vec<float> magnitude = q_minus_1.neg() * d;
  return {select_less(x, Vec<float>(0.0f), magnitude.neg(), magnitude), Vec<float>(4.0f) * q * d * d};
}

inline Tangent<double> tangent(Vec<double> x) {
  const Vec<double> q = (x.abs() * Vec<double>(-2.0)).exp(), d = Vec<double>(1.0) / (q + Vec<double>(1.0));
  return {x.tanh(), Vec<double>(4.0) * q * d * d};
}

template <class T>
struct Activated {
  Vec<T> value, slope, curvature;
};

template <Activation kActivation, class T>
inline Activated<T> activate(Vec<T> x) {
  const Vec<T> zero(T(0)), one(T(1)), two(T(2));
  if constexpr (kActivation == Activation::Relu) {
    return {at::vec::maximum(x, zero), select_less(zero, x, one, zero), zero};
  } else if constexpr (kActivation == Activation::Sigmoid) {
    const Logistic<T> s(x);
    return {s.sigmoid(), s.slope(), s.curvature()};
  } else if constexpr (kActivation == Activation::Softplus) {
    const Logistic<T> s(x);
    return {s.softplus(), s.sigmoid(), s.slope()};
  } else if constexpr (kActivation == Activation::Tanh) {
    const auto [value, slope] = tangent(x);
    return {value, slope, (two * value * slope).neg()};
  } else {
    return {x, one, zero};
  }
}

}  // namespace lect11ext::CPU_CAPABILITY
