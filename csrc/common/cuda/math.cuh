// Elementary functions on one number, with the meaning that common/cpu/math.h gives them: NaN survives.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

// As torch.clamp. fminf and fmaxf would drop a NaN.
template <class T>
__device__ inline T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

template <class T>
__device__ inline T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

// x = n·ln 2 + r with |r| ≤ ln(2)/2, and what exp, expm1 and expm1(x) − x share. Coefficients: Cephes (S. Moshier).
struct ReducedExp {
  int n;
  float em1;   // e^r − 1
  float tail;  // e^r − 1 − r, free of cancellation
};

__device__ inline ReducedExp reduced_exp(float x) {
  // Beyond these bounds exp is 0 or inf whatever x.
  x = clamp(x, -104.0f, 89.0f);
  // 1.5·2^23: adding it leaves the nearest integer in the low bits of the sum, which is cheaper than a conversion.
  constexpr float kToInteger = 12582912.0f;
  const float shifted = fmaf(x, 1.44269504088896341f, kToInteger);
  const float n = shifted - kToInteger;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  const float tail = p * r * r;
  return {__float_as_int(shifted) - __float_as_int(kToInteger), r + tail, tail};
}

// 2^n · x for n in [−252, 254], in two steps, so that neither scale leaves the range of a float.
__device__ inline float scale_by_power(float x, int n) {
  const int half = n >> 1;
  return x * __int_as_float((half + 127) << 23) * __int_as_float((n - half + 127) << 23);
}

// e^(x/2), e^x − 1 and e^x − 1 − x, all from one exponential of x/2. Near zero neither of the last two cancels: with
// m = expm1(x/2) they are m·(2 + m) and 2·(m − x/2) + m².
template <class T>
struct HalfExp {
  T root, expm1, expm1_less_x;
};

__device__ inline HalfExp<float> half_exp(float x) {
  const ReducedExp e = reduced_exp(0.5f * x);
  const float root = scale_by_power(e.em1 + 1.0f, e.n);
  if (e.n == 0) return {root, e.em1 * (2.0f + e.em1), fmaf(2.0f, e.tail, e.em1 * e.em1)};
  const float square_less_1 = fmaf(root, root, -1.0f);
  return {root, square_less_1, square_less_1 - x};
}

__device__ inline HalfExp<double> half_exp(double x) {
  const double expm1 = std::expm1(x);
  return {std::exp(0.5 * x), expm1, expm1 - x};
}

// e^(x/2).
__device__ inline float root_exp(float x) {
  const ReducedExp e = reduced_exp(0.5f * x);
  return scale_by_power(e.em1 + 1.0f, e.n);
}

__device__ inline double root_exp(double x) { return std::exp(0.5 * x); }

}  // namespace lect11ext::cuda
