// The activations of csrc/autoencoder/activation.h with their first two derivatives, as autoencoder/cpu/activation.h
// has them: from one exponential of a negative number, without differences of nearly equal ones. NaN survives.
#pragma once

#include "autoencoder/activation.h"
#include "common/cuda/math.cuh"

namespace lect11ext::cuda {

// From e = e^−|x|.
template <class T>
struct Logistic {
  T x, e, large;  // large: σ(|x|)

  __device__ explicit Logistic(T x) : x(x), e(std::exp(-std::abs(x))), large(reciprocal(T(1) + e)) {}

  __device__ T sigmoid() const { return x < T(0) ? e * large : large; }
  __device__ T slope() const { return e * large * large; }
  __device__ T softplus() const { return (x < T(0) ? T(0) : x) + beyond_relu(); }
  __device__ T beyond_relu() const { return log1p_of_unit(e); }
  __device__ T beyond_step() const { return x < T(0) ? e * large : -e * large; }
  __device__ T curvature() const {
    const T magnitude = slope() * (T(1) - e) * large;
    return x < T(0) ? magnitude : -magnitude;
  }
};

template <class T>
struct Activated {
  T value, slope, curvature;
};

template <Activation kActivation, class T>
__device__ inline Activated<T> activate(T x) {
  if constexpr (kActivation == Activation::Relu) {
    return {x < T(0) ? T(0) : x, x <= T(0) ? T(0) : T(1), T(0)};
  } else if constexpr (kActivation == Activation::Sigmoid) {
    const Logistic<T> s(x);
    return {s.sigmoid(), s.slope(), s.curvature()};
  } else if constexpr (kActivation == Activation::Softplus) {
    const Logistic<T> s(x);
    return {s.softplus(), s.sigmoid(), s.slope()};
  } else if constexpr (kActivation == Activation::Tanh) {
    const T value = std::tanh(x), q = std::exp(T(-2) * std::abs(x)), d = reciprocal(T(1) + q), slope = T(4) * q * d * d;
    return {value, slope, T(-2) * value * slope};
  } else {
    return {x, T(1), T(0)};
  }
}

}  // namespace lect11ext::cuda
