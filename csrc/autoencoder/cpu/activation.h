// The activations of csrc/autoencoder/activation.h with their first two derivatives, on vectors: without differences of
// nearly equal numbers, so that derivatives keep their digits where the activation is saturated. NaN survives.
#pragma once

#include "autoencoder/activation.h"
#include "common/cpu/math.h"

namespace lect11ext::CPU_CAPABILITY {

// −log(1 − s) for s in [0, ½], relative error 1.5e-7: interpolation of −log(1 − s)/s at Chebyshev's points.
inline Vec<float> minus_log1m(Vec<float> s) {
  Vec<float> p(1.777017f);
  for (const float c : {-2.555768f, 2.049732f, -6.3501287e-1f, 3.5381535e-1f, 1.7321175e-1f, 2.5216976e-1f,
                        3.3324498e-1f, 5.0000137e-1f, 1.0f}) {
    p = at::vec::fmadd(p, s, Vec<float>(c));
  }
  return p * s;
}

inline Vec<double> minus_log1m(Vec<double> s) { return s.neg().log1p().neg(); }

// σ, its derivatives and its integral from the smaller of σ(x) and σ(−x), which has all its digits.
template <class T>
struct Logistic {
  Vec<T> x, least;

  explicit Logistic(Vec<T> x) : x(x), least(lect11ext::CPU_CAPABILITY::sigmoid(x.abs().neg())) {}

  Vec<T> sigmoid() const { return select_less(x, Vec<T>(T(0)), least, Vec<T>(T(1)) - least); }
  Vec<T> slope() const { return at::vec::fnmadd(least, least, least); }
  Vec<T> softplus() const { return at::vec::maximum(x, Vec<T>(T(0))) + beyond_relu(); }
  // What softplus and σ have beyond what they tend to, max(x, 0) and 0 or 1.
  Vec<T> beyond_relu() const { return minus_log1m(least); }
  Vec<T> beyond_step() const { return select_less(x, Vec<T>(T(0)), least, least.neg()); }
  // The second derivative of σ.
  Vec<T> curvature() const {
    const Vec<T> magnitude = slope() * at::vec::fnmadd(Vec<T>(T(2)), least, Vec<T>(T(1)));
    return select_less(x, Vec<T>(T(0)), magnitude, magnitude.neg());
  }
};

// φ and its derivatives at x. What is not asked for is not computed.
template <Activation kActivation, class T>
struct Activated {
  Vec<T> x;

  Vec<T> value() const {
    if constexpr (kActivation == Activation::Relu) return at::vec::maximum(x, Vec<T>(T(0)));
    else if constexpr (kActivation == Activation::Sigmoid) return lect11ext::CPU_CAPABILITY::sigmoid(x);
    else if constexpr (kActivation == Activation::Softplus) return Logistic<T>(x).softplus();
    else if constexpr (kActivation == Activation::Tanh) return tanh(x);
    else return x;
  }

  Vec<T> slope() const {
    const Vec<T> zero(T(0)), one(T(1));
    if constexpr (kActivation == Activation::Relu) return Vec<T>::blendv(one, zero, x <= zero);  // 1 of NaN, as torch
    else if constexpr (kActivation == Activation::Sigmoid) return Logistic<T>(x).slope();
    else if constexpr (kActivation == Activation::Softplus) return Logistic<T>(x).sigmoid();
    else if constexpr (kActivation == Activation::Tanh) return Vec<T>(T(4)) * Logistic<T>(x + x).slope();
    else return one;
  }

  Vec<T> curvature() const {
    if constexpr (kActivation == Activation::Sigmoid) return Logistic<T>(x).curvature();
    else if constexpr (kActivation == Activation::Softplus) return Logistic<T>(x).slope();
    else if constexpr (kActivation == Activation::Tanh) return Vec<T>(T(8)) * Logistic<T>(x + x).curvature();
    else return Vec<T>(T(0));
  }
};

}  // namespace lect11ext::CPU_CAPABILITY
