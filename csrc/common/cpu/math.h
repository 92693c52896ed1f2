// Elementary functions on vectors, as far as at::vec has none or has only a call into Sleef, which costs more than all
// the arithmetic around it. Polynomial coefficients: Cephes (S. Moshier), single precision.
#pragma once

#include <limits>

#include "common/cpu/namespace.h"

namespace lect11ext::CPU_CAPABILITY {

using VecI = Vec<int32_t>;

inline VecI bits(Vec<float> x) { return at::vec::cast<int32_t>(x); }
inline Vec<float> from_bits(VecI x) { return at::vec::cast<float>(x); }

// The sum of words, which wraps around: where at::vec has loops, it adds ints.
inline VecI add_words(VecI a, int32_t b) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return a + VecI(b);
#else
  uint32_t lanes[kLanes<int32_t>];
  a.store(lanes);
  for (uint32_t& lane : lanes) lane += static_cast<uint32_t>(b);
  return VecI::loadu(lanes);
#endif
}

// The largest number in place of +∞; NaN survives.
template <class T>
inline Vec<T> finite(Vec<T> x) {
  return at::vec::clamp_max(x, Vec<T>(std::numeric_limits<T>::max()));
}

template <class T>
inline T sum_of_lanes(const Vec<T>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_add_ps(v);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
#endif
  T lanes[kLanes<T>], sum = 0;
  v.store(lanes);
  for (T lane : lanes) sum += lane;
  return sum;
}

// a < b ? x : y and a == b ? x : y, neither being true of NaN. at::vec's comparisons make lanes of ones, which its
// blendv then tests again.
template <class T>
inline Vec<T> select_less(Vec<T> a, Vec<T> b, Vec<T> x, Vec<T> y) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
#endif
  return Vec<T>::blendv(y, x, a < b);
}

template <class T>
inline Vec<T> select_equal(Vec<T> a, Vec<T> b, Vec<T> x, Vec<T> y) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), y, x);
  }
#endif
  return Vec<T>::blendv(y, x, a == b);
}

// 2^n · x for integral n in [-252, 254], in two steps, so that neither scale leaves the range of a float.
inline Vec<float> ldexp(Vec<float> x, Vec<float> n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(x, n);
#else
  const VecI whole = at::vec::convert_to_int_of_same_size(n);
  const VecI half = whole >> VecI(1);
  const VecI bias(127), shift(23);
  return x * from_bits((half + bias) << shift) * from_bits((whole - half + bias) << shift);
#endif
}

// What exp, expm1 and expm1(x) − x share: x = n·ln 2 + r with |r| ≤ ln(2)/2.
struct ReducedExp {
  Vec<float> n;  // integral; NaN where x is
  Vec<float> r;
  Vec<float> em1;   // e^r − 1
  Vec<float> tail;  // e^r − 1 − r, free of cancellation
};

inline ReducedExp reduced_exp(Vec<float> x) {
  // Beyond these bounds exp is 0 or inf whatever x; at::vec::clamp keeps NaN.
  x = at::vec::clamp(x, Vec<float>(-104.0f), Vec<float>(89.0f));
  ReducedExp e;
  e.n = (x * Vec<float>(1.44269504088896341f)).round();
  e.r = at::vec::fmadd(e.n, Vec<float>(-0.693359375f), x);
  e.r = at::vec::fmadd(e.n, Vec<float>(2.12194440e-4f), e.r);
  Vec<float> p(1.9875691500e-4f);
  p = at::vec::fmadd(p, e.r, Vec<float>(1.3981999507e-3f));
  p = at::vec::fmadd(p, e.r, Vec<float>(8.3334519073e-3f));
  p = at::vec::fmadd(p, e.r, Vec<float>(4.1665795894e-2f));
  p = at::vec::fmadd(p, e.r, Vec<float>(1.6666665459e-1f));
  p = at::vec::fmadd(p, e.r, Vec<float>(5.0000001201e-1f));
  e.tail = p * e.r * e.r;
  e.em1 = e.r + e.tail;
  return e;
}

inline Vec<float> exp(Vec<float> x) {
  const ReducedExp e = reduced_exp(x);
  return ldexp(e.em1 + Vec<float>(1.0f), e.n);
}

// 2^x for x ≤ 0 or little above, −∞ giving 0 and 0 giving 1. The polynomial is a minimax one of 2^r on [0, 1), relative
// error 8e-8.
inline Vec<float> exp2(Vec<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec<float> r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x − ⌊x⌋, 0 of −∞
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 least = _mm256_set1_ps(-126.0f), most = _mm256_set1_ps(128.0f);  // what is less gives 0, more +∞
  const __m256 inside = _mm256_cmp_ps(x, least, _CMP_NLT_UQ);
  x = _mm256_min_ps(most, _mm256_max_ps(least, x));  // keeps NaN
  const Vec<float> n = x.floor(), r = x - n;
#else
  x = at::vec::clamp(x, Vec<float>(-150.0f), Vec<float>(150.0f));  // keeps NaN
  const Vec<float> n = x.floor(), r = x - n;
#endif
  Vec<float> p(1.8671300495043397e-3f);
  p = at::vec::fmadd(p, r, Vec<float>(9.017030708491802e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(5.579991266131401e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(2.4016444385051727e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(6.931512951850891e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(1.0f));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, x);  // takes ⌊x⌋ itself
#elif defined(CPU_CAPABILITY_AVX2)
  // n is added to the exponent; of NaN it is one whose shift is 0.
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvttps_epi32(n), 23);
  return _mm256_and_ps(inside, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent)));
#else
  return ldexp(p, n);
#endif
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

// The two activations of the layers, in few instructions: these bind, not the division, which has a unit of its own
// (docs/performance-notes.md).
//
// 2^n and r = x + n·ln_2, n = round(−x / ln_2): adding 1.5·2^23 rounds, in one step with the product. One step for r,
// too; what ln_2 lacks is n·2e-9 of it.
struct Halvings {
  Vec<float> r, scale;
};

inline Halvings halvings(Vec<float> x, float ln_2) {
  const Vec<float> rounder(0x1.8p23f);
  const Vec<float> sum = at::vec::fmadd(x, Vec<float>(-1.0f / ln_2), rounder), n = sum - rounder;
#if defined(CPU_CAPABILITY_AVX512)
  const Vec<float> scale = _mm512_scalef_ps(_mm512_set1_ps(1.0f), n);
#else  // the sum's lowest bits are n
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(sum), 23);
  const Vec<float> scale = _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23)));
#endif
  return {at::vec::fmadd(n, Vec<float>(ln_2), x), scale};
}

template <size_t kCount>
inline Vec<float> horner(Vec<float> x, const float (&coefficients)[kCount]) {
  Vec<float> p(coefficients[0]);
  for (size_t i = 1; i < kCount; ++i) p = at::vec::fmadd(p, x, Vec<float>(coefficients[i]));
  return p;
}

// σ(x) = 1 / (1 + 2^n·e^−r); NaN survives. At the lower bound 2^n is inf, and σ 0; at the upper one σ is 1 and 2^n
// still normal: a denormal takes hundreds of cycles. e^−r is a minimax polynomial, relative error 9e-8.
[[gnu::always_inline]] inline Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> one(1.0f);
  const Halvings h = halvings(at::vec::clamp(x, Vec<float>(-89.0f), Vec<float>(80.0f)), 0.69314718055994531f);
  const Vec<float> p =
      horner(h.r, {-8.2902722e-3f, 4.1898161e-2f, -1.6667638e-1f, 4.9999148e-1f, -9.9999971e-1f, 1.0f});
  return one / at::vec::fmadd(p, h.scale, one);
}

// tanh(x) = sign(x) · m / (1 − m) with m = (1 − e^−2|x|) / 2 = (1 − 2^n) / 2 + 2^n · (1 − e^−2r) / 2, whose last factor
// is r + r²·P(r), so that small x keep their digits (relative error 1.3e-8). Beyond 10 it is 1.
[[gnu::always_inline]] inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> half(0.5f);
  const Halvings h = halvings(at::vec::clamp_max(x.abs(), Vec<float>(10.0f)), 0.34657359027997265f);
  const Vec<float> p = horner(h.r, {-4.4424058e-2f, 1.3386476e-1f, -3.3333761e-1f, 6.6666174e-1f, -9.9999996e-1f});
  const Vec<float> m = at::vec::fmadd(at::vec::fmadd(p, h.r * h.r, h.r), h.scale, at::vec::fnmadd(h.scale, half, half));
  const Vec<float> magnitude = m / (Vec<float>(1.0f) - m);
#if defined(CPU_CAPABILITY_AVX512)
  return from_bits(_mm512_ternarylogic_epi32(VecI(INT32_MIN), bits(x), bits(magnitude), 0xCA));  // its bits, x's sign
#else
  return from_bits(bits(magnitude) | (bits(x) & VecI(INT32_MIN)));
#endif
}

#else

// σ(x) = 1 / (1 + e^−x); NaN survives, ±inf gives 1 and 0.
inline Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> one(1.0f);
  return one / (one + exp(x.neg()));
}

// tanh(x) = sign(x) · (1 − q) / (1 + q) with q = e^−2|x|; 1 − q is taken from expm1, so that small x keep their digits.
inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> one(1.0f);
  const ReducedExp e = reduced_exp(x.abs() * Vec<float>(-2.0f));
  const Vec<float> scale = ldexp(one, e.n);
  const Vec<float> q_minus_1 = at::vec::fmadd(scale, e.em1, scale - one);
  const Vec<float> magnitude = q_minus_1.abs() / (q_minus_1 + Vec<float>(2.0f));
  return from_bits(bits(magnitude) | (bits(x) & VecI(INT32_MIN)));
}

#endif

inline Vec<double> sigmoid(Vec<double> x) {
  const Vec<double> one(1.0);
  return one / (one + x.neg().exp());
}

inline Vec<double> tanh(Vec<double> x) { return x.tanh(); }

// −2·ln u for normal u > 0: u = m·2^e with m in [√½, √2), and ln m = f − f²/2 + f³·P(f) at f = m − 1. P was fitted to
// an absolute error of 7e-9, below the rounding of the sum; the coefficients carry the factor −2.
inline Vec<float> minus_2_log_normal_range(Vec<float> u) {
  const VecI sqrt_half(0x3F3504F3);
  const VecI exponent = (bits(u) - sqrt_half) >> VecI(23);
  const Vec<float> e = at::vec::convert_to_fp_of_same_size<float>(exponent);
  const Vec<float> f = from_bits(bits(u) - (exponent << VecI(23))) - Vec<float>(1.0f);
  const Vec<float> z = f * f;
  Vec<float> p(-2 * 8.672009025e-2f);
  p = at::vec::fmadd(p, f, Vec<float>(-2 * -1.437901216e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(-2 * 1.497805223e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(-2 * -1.656442535e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(-2 * 1.995487028e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(-2 * -2.500169879e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(-2 * 3.333416605e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(1.0f));
  const Vec<float> log_m = at::vec::fmadd(p, z, f * Vec<float>(-2.0f));
  return at::vec::fmadd(e, Vec<float>(-2 * 0.69314718055994531f), log_m);
}

struct SinCos {
  Vec<float> sin, cos;
};

// Sine and cosine of 2π·U, U = x·2⁻³² + 2⁻³³, x an unsigned word. The quadrant and the sign are the word's upper bits,
// and what is left is exact: no reduction by π is needed.
inline SinCos sincos_turns(VecI x) {
  const VecI quadrant = add_words(x, 1 << 29);
  const Vec<float> a = at::vec::fmadd(at::vec::convert_to_fp_of_same_size<float>(x << VecI(2)), Vec<float>(0x1p-32f),
                                      Vec<float>(0x1p-31f));
  const Vec<float> z = a * a;
  // In quarter turns: Cephes' coefficients, each times the power of π/2 that belongs to it.
  Vec<float> s(-4.604837188878714e-3f);
  s = at::vec::fmadd(s, z, Vec<float>(7.968141387872897e-2f));
  s = at::vec::fmadd(s, z, Vec<float>(-6.459636302545759e-1f));
  s = at::vec::fmadd(s, z, Vec<float>(1.57079632679489662f));
  s = s * a;
  Vec<float> c(9.056045669359857e-4f);
  c = at::vec::fmadd(c, z, Vec<float>(-2.0861118398843314e-2f));
  c = at::vec::fmadd(c, z, Vec<float>(2.53669380150983e-1f));
  c = at::vec::fmadd(c, z, Vec<float>(-1.2337005501361697f));
  c = at::vec::fmadd(c, z, Vec<float>(1.0f));
  const VecI odd = (quadrant << VecI(1)) >> VecI(31);  // all ones in quadrants 1 and 3, where the two change places
  const VecI exchange = (bits(s) ^ bits(c)) & odd;
  const VecI sign(INT32_MIN);
  return {from_bits((bits(s) ^ exchange) ^ (quadrant & sign)),
          from_bits((bits(c) ^ exchange) ^ (add_words(quadrant, 1 << 30) & sign))};
}

}  // namespace lect11ext::CPU_CAPABILITY
