// Moves elements between a View of any type and stride and a dense buffer of the type in which a kernel computes.
#pragma once

#include <algorithm>

#include "common/cpu/namespace.h"
#include "common/view.h"

namespace lect11ext::CPU_CAPABILITY {

// Calls f with a null pointer of the C++ type behind a DType.
template <class F>
inline void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::Float: return f(static_cast<float*>(nullptr));
    case DType::Double: return f(static_cast<double*>(nullptr));
    case DType::BFloat16: return f(static_cast<at::BFloat16*>(nullptr));
    case DType::Half: return f(static_cast<at::Half*>(nullptr));
  }
}

template <class T>
inline constexpr DType kDType = std::is_same_v<T, float>          ? DType::Float
                                : std::is_same_v<T, double>       ? DType::Double
                                : std::is_same_v<T, at::BFloat16> ? DType::BFloat16
                                                                  : DType::Half;

template <class T>
inline constexpr bool kIsHalf = sizeof(T) == 2;

// The type in which a kernel computes with elements of type S, sums above all.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// A vector of floats from and to a 16-bit type.
template <class S>
inline Vec<float> load_floats(const S* from) {
  Vec<float> v;
  at::vec::load_to_float<S>(from, v);
  return v;
}

// The n first of them.
template <class S>
inline void store_floats(Vec<float> v, S* to, int64_t n = kLanes<float>) {
  const Vec<S> rounded = at::vec::convert_from_float<S>(v, v);
#if defined(CPU_CAPABILITY_AVX512)
  if (n == kLanes<float>) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(rounded));
#elif defined(CPU_CAPABILITY_AVX2)
  if (n == kLanes<float>) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(rounded));
#endif
  rounded.store(to, std::min<int64_t>(n, kLanes<float>));
}

// Dense conversion. The 16-bit types go through at::vec, whose conversions round to nearest even.
template <class From, class To>
inline void convert(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  if constexpr (kIsHalf<From> && std::is_same_v<To, float>) {
    for (; i + kLanes<float> <= n; i += kLanes<float>) load_floats(from + i).store(to + i);
    if (i == n) return;
    const auto [low, high] = at::vec::convert_to_float<From>(Vec<From>::loadu(from + i, n - i));
    low.store(to + i, n - i);
  } else if constexpr (std::is_same_v<From, float> && kIsHalf<To>) {
    for (; i + kLanes<float> <= n; i += kLanes<float>) store_floats(Vec<float>::loadu(from + i), to + i);
    if (i < n) store_floats(Vec<float>::loadu(from + i, n - i), to + i, n - i);
  } else if constexpr (kIsHalf<From> || kIsHalf<To>) {  // two of them, or one and a double
    float buffer[kLanes<float>];
    for (; i < n; i += kLanes<float>) {
      const int64_t count = std::min<int64_t>(kLanes<float>, n - i);
      convert(from + i, buffer, count);
      convert(buffer, to + i, count);
    }
  } else {
    for (; i < n; ++i) to[i] = static_cast<To>(from[i]);
  }
}

template <class T, class Compute>
inline void gather(const Shape& shape, const View& view, int64_t start, int64_t n, Compute* buffer) {
  const T* data = static_cast<const T*>(view.data);
  const int last = shape.ndim - 1;
  int64_t index[kMaxDims], position = 0, rest = start;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % shape.sizes[d];
    rest /= shape.sizes[d];
    position += index[d] * view.strides[d];
  }
  const int64_t stride = view.strides[last];
  while (n > 0) {
    const int64_t run = std::min(n, shape.sizes[last] - index[last]);
    if (stride == 1) {
      convert(data + position, buffer, run);
    } else if (stride == 0) {
      Compute value;
      convert(data + position, &value, 1);
      std::fill(buffer, buffer + run, value);
    } else if constexpr (kIsHalf<T>) {
      for (int64_t i = 0; i < run; ++i) convert(data + position + i * stride, buffer + i, 1);
    } else {
      for (int64_t i = 0; i < run; ++i) buffer[i] = static_cast<Compute>(data[position + i * stride]);
    }
    buffer += run;
    n -= run;
    position += run * stride;
    index[last] += run;
    for (int d = last; d > 0 && index[d] == shape.sizes[d]; --d) {
      position += view.strides[d - 1] - index[d] * view.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Elements start … start + n − 1 as Compute: in place where they lie dense, of that type and in whole vectors, else
// copied to `buffer`, whose last vector may hold anything beyond n.
template <class Compute>
inline const Compute* fetch(const Shape& shape, const View& view, int64_t start, int64_t n, Compute* buffer) {
  if (view.dense && view.dtype == kDType<Compute> && n % kLanes<Compute> == 0) {
    return static_cast<const Compute*>(view.data) + start;
  }
  with_type(view.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gather<T>(shape, view, start, n, buffer);
  });
  return buffer;
}

// Where a kernel writes n dense elements from `start` on: the output itself, or `buffer`, which flush() then stores.
template <class Compute>
inline Compute* target(void* data, DType dtype, int64_t start, int64_t n, Compute* buffer) {
  const bool direct = dtype == kDType<Compute> && n % kLanes<Compute> == 0;
  return direct ? static_cast<Compute*>(data) + start : buffer;
}

template <class Compute>
inline void flush(void* data, DType dtype, int64_t start, int64_t n, const Compute* written, const Compute* buffer) {
  if (written != buffer) return;
  with_type(dtype, [&](auto* type) { convert(buffer, static_cast<decltype(type)>(data) + start, n); });
}

// Stores that go past the caches do not first read the lines that they fill, and leave the caches to others: for
// outputs too large to be found there again. They take whole vectors at aligned addresses.
template <class T>
inline bool can_stream(const T* to) {
  return reinterpret_cast<uintptr_t>(to) % sizeof(Vec<T>) == 0;
}

template <class T>
inline void store(Vec<T> v, T* to, bool stream) {
  if (!stream) return v.store(to);
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) _mm512_stream_ps(to, v);
  else _mm512_stream_pd(to, v);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) _mm256_stream_ps(to, v);
  else _mm256_stream_pd(to, v);
#else
  v.store(to);
#endif
}

// Puts streamed stores before whatever this thread does next.
inline void finish_streams() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

}  // namespace lect11ext::CPU_CAPABILITY
