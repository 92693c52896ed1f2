// Elementary functions on one number, with the meaning that common/cpu/math.h gives them: NaN survives.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

// As torch.clamp. fminf and fmaxf would drop a NaN.
template <class T>
__device__ inline T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

// The largest number in place of +∞.
template <class T>
__device__ inline T finite(T x) {
  constexpr T kLargest = std::numeric_limits<T>::max();
  return x > kLargest ? kLargest : x;
}

// 1/x by one instruction, to one unit in the last place: 0 of what is beyond 2^126. A division takes ten times that.
__device__ inline float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

__device__ inline double reciprocal(double x) { return 1.0 / x; }

// The root of x ≥ 0, likewise.
__device__ inline float root(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::sqrt(x);
#endif
}

// 2^x, within two units of the last place; below 2^−126 it is zero.
__device__ inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;
#endif
}

__device__ inline double power_of_two(double x) { return std::exp2(x); }

template <class T>
__device__ inline T sigmoid(T x) {
  return reciprocal(T(1) + std::exp(-x));
}

// Σ coefficients[i] · x^i. Those of this library's floats are minimax in relative error, below 2^-24 unless they say
// otherwise.
template <int N>
__device__ inline float polynomial(const float (&coefficients)[N], float x) {
  float sum = coefficients[N - 1];
#pragma unroll
  for (int i = N - 2; i >= 0; --i) sum = fmaf(sum, x, coefficients[i]);
  return sum;
}

// log(1 + x) of 0 ≤ x ≤ 1.
__device__ inline float log1p_of_unit(float x) {
  constexpr float kCoefficients[] = {0.99999994f,   -0.499994934f, 0.333190918f,   -0.248429343f, 0.191058174f,
                                     -0.136628419f, 0.078221187f,  -0.0295023154f, 0.00523196533f};
  return x * polynomial(kCoefficients, x);
}

__device__ inline double log1p_of_unit(double x) { return std::log1p(x); }

// x = n·ln 2 + r with |r| ≤ ln(2)/2, and what exp and expm1 share. Coefficients: Cephes (S. Moshier).
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

}  // namespace lect11ext::cuda
