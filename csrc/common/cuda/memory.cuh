// Elements in memory: types, vector accesses and the offsets of strided views. Included first by every .cu file.
#pragma once

#define LECT11EXT_KERNEL_NAMESPACE cuda

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/view.h"

namespace lect11ext::cuda {

template <class S>
inline constexpr DType kDType = std::is_same_v<S, float>           ? DType::Float
                                : std::is_same_v<S, double>        ? DType::Double
                                : std::is_same_v<S, __nv_bfloat16> ? DType::BFloat16
                                                                   : DType::Half;

// The type of the arithmetic for storage type S.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Calls f with a null pointer of the C++ type behind a DType.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::Float: return f(static_cast<float*>(nullptr));
    case DType::Double: return f(static_cast<double*>(nullptr));
    case DType::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::Half: return f(static_cast<__half*>(nullptr));
  }
}

// --- one element --------------------------------------------------------------------------------------------------

template <class T, class S>
__device__ inline T from_storage(S value) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) return static_cast<T>(__bfloat162float(value));
  else if constexpr (std::is_same_v<S, __half>) return static_cast<T>(__half2float(value));
  else return static_cast<T>(value);
}

// Rounds to nearest even.
template <class S, class T>
__device__ inline S to_storage(T value) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) return __float2bfloat16_rn(static_cast<float>(value));
  else if constexpr (std::is_same_v<S, __half>) return __float2half_rn(static_cast<float>(value));
  else return static_cast<S>(value);
}

template <class T>
__device__ inline T read(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::Float: return from_storage<T>(static_cast<const float*>(data)[offset]);
    case DType::Double: return from_storage<T>(static_cast<const double*>(data)[offset]);
    case DType::BFloat16: return from_storage<T>(static_cast<const __nv_bfloat16*>(data)[offset]);
    default: return from_storage<T>(static_cast<const __half*>(data)[offset]);
  }
}

template <class T>
__device__ inline void write(void* data, DType dtype, int64_t offset, T value) {
  switch (dtype) {
    case DType::Float: static_cast<float*>(data)[offset] = to_storage<float>(value); break;
    case DType::Double: static_cast<double*>(data)[offset] = to_storage<double>(value); break;
    case DType::BFloat16: static_cast<__nv_bfloat16*>(data)[offset] = to_storage<__nv_bfloat16>(value); break;
    default: static_cast<__half*>(data)[offset] = to_storage<__half>(value); break;
  }
}

// --- N elements at once -------------------------------------------------------------------------------------------

inline constexpr int kVectorBytes = 16;  // the widest access of a thread

template <class S>
inline constexpr int kVector = kVectorBytes / sizeof(S);

// What an address must be a multiple of for N elements to be loaded with the fewest accesses.
template <class S, int N>
inline constexpr int kAlignment = N * sizeof(S) < kVectorBytes ? N * sizeof(S) : kVectorBytes;

template <class S, int N>
bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kAlignment<S, N> == 0;
}

// The integer whose access moves that many bytes; a struct of halves would be split into several.
template <int Bytes>
using Word =
    std::conditional_t<Bytes == 16, uint4,
                       std::conditional_t<Bytes == 8, uint2, std::conditional_t<Bytes == 4, uint32_t, uint16_t>>>;

// N elements in registers, kept in their storage type until they are used, which takes the fewest registers.
template <class S, int N>
struct Pack {
  using Access = Word<kAlignment<S, N>>;
  static constexpr int kAccesses = N * sizeof(S) / sizeof(Access);

  alignas(Access) S data[N];

  __device__ Compute<S> operator[](int i) const { return from_storage<Compute<S>>(data[i]); }

  template <class T>
  __device__ void set(int i, T value) {
    data[i] = to_storage<S>(value);
  }

  static __device__ Pack load(const S* from) {
    Access words[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) words[i] = reinterpret_cast<const Access*>(from)[i];
    Pack pack;
    memcpy(&pack, words, sizeof(pack));
    return pack;
  }

  static __device__ Pack zero() {
    Pack pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.data[i] = to_storage<S>(0.0f);
    return pack;
  }

  // By the intrinsic, an ordinary store that stays whole: the compiler takes an assignment apart into its elements.
  __device__ void store(S* to) const {
    Access words[kAccesses];
    memcpy(words, this, sizeof(words));
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) __stwb(reinterpret_cast<Access*>(to) + i, words[i]);
  }
};

// Asks for what will be read later: into the L2 cache, and into no register.
__device__ inline void prefetch(const void* from) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#else
  (void)from;
#endif
}

// --- strided views ------------------------------------------------------------------------------------------------

// a / b for 0 ≤ a, 0 < b. A division of 64 bits takes several times the instructions of one of 32.
__device__ inline int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Where element number `index` of a Shape lies in a View, and its index in the last dimension.
struct Place {
  int64_t offset, column;
};

__device__ inline Place locate(const Shape& shape, const View& view, int64_t index) {
  Place place{0, index};
  if (shape.ndim > 1) {
    int64_t rest = divide(index, shape.sizes[shape.ndim - 1]);
    place.column = index - rest * shape.sizes[shape.ndim - 1];
    for (int d = shape.ndim - 2; d > 0; --d) {
      const int64_t outer = divide(rest, shape.sizes[d]);
      place.offset += (rest - outer * shape.sizes[d]) * view.strides[d];
      rest = outer;
    }
    place.offset += rest * view.strides[0];
  }
  place.offset += place.column * view.strides[shape.ndim - 1];
  return place;
}

}  // namespace lect11ext::cuda
