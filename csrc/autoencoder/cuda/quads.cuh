// Elementwise kernels whose threads take four consecutive elements each, in any type, stride and alignment.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

inline constexpr int kQuad = 4;  // consecutive elements of a thread: one Philox block, 16 bytes of float

// Four consecutive elements, the first a multiple of four, of which [low, high) belong to the block's tile.
struct Quad {
  int64_t first;
  int low, high;

  __device__ Quad(int64_t first, int64_t begin, int64_t end)
      : first(first),
        low(first < begin ? static_cast<int>(begin - first) : 0),
        high(first + kQuad > end ? static_cast<int>(end - first) : kQuad) {}
  __device__ bool holds(int i) const { return low <= i && i < high; }
  __device__ bool whole() const { return low == 0 && high == kQuad; }
};

// How a thread reaches four elements. Vectors: every operand is of type S and a quad of it is either consecutive and
// aligned or one value repeated, so that all loads of a thread are under way before the first is used.
template <class S>
struct Vectors {
  // On a multiprocessor at a time, one less with a prior: as many as leave enough registers that none is spilled.
  // Four have 32 KiB of loads under way in float, of which some 20 KiB cover the latency of the memory.
  static constexpr int kBlocks = 4;
  static constexpr bool kAligned = true;  // numel is a multiple of four, so that every sample begins at one

  template <class T>
  static __device__ void load(const Shape& shape, const View& view, int64_t first, const Quad&, T* out) {
    const S* from = static_cast<const S*>(view.data) + locate(shape, view, first).offset;
    if (view.strides[shape.ndim - 1] == 0) {
      const T value = from_storage<T>(*from);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) out[i] = value;
    } else {
      const auto pack = Pack<S, kQuad>::load(from);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) out[i] = pack[i];
    }
  }

  template <class T>
  static __device__ void store(void* data, DType, int64_t first, const Quad& quad, const T* values) {
    S* to = static_cast<S*>(data) + first;
    if (quad.whole()) {
      Pack<S, kQuad> pack;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) pack.set(i, values[i]);
      pack.store(to);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (quad.holds(i)) to[i] = to_storage<S>(values[i]);
      }
    }
  }

  // Whether View, over Shape, can be loaded so.
  static bool fits(const Shape& shape, const View& view) {
    if (view.data == nullptr) return true;
    const int last = shape.ndim - 1;
    if (view.dtype != kDType<S> || shape.sizes[last] % kQuad != 0) return false;
    if (view.strides[last] == 0) return true;
    if (view.strides[last] != 1 || !is_aligned<S, kQuad>(view.data)) return false;
    return std::all_of(view.strides, view.strides + last, [](int64_t stride) { return stride % kQuad == 0; });
  }

  static bool fits(const void* dense, DType dtype) {
    return dense == nullptr || (dtype == kDType<S> && is_aligned<S, kQuad>(dense));
  }
};

// Any types, strides and alignment, one element at a time.
struct Elements {
  static constexpr int kBlocks = 2;
  static constexpr bool kAligned = false;

  template <class T>
  static __device__ void load(const Shape& shape, const View& view, int64_t first, const Quad& quad, T* out) {
    const int last = shape.ndim - 1;
    Place place{};
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      out[i] = T(0);
      if (!quad.holds(i)) continue;
      if (i == quad.low || place.column == shape.sizes[last]) place = locate(shape, view, first + i);
      out[i] = read<T>(view.data, view.dtype, place.offset);
      place.offset += view.strides[last];
      ++place.column;
    }
  }

  template <class T>
  static __device__ void store(void* data, DType dtype, int64_t first, const Quad& quad, const T* values) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (quad.holds(i)) write(data, dtype, first + i, values[i]);
    }
  }
};

// The access to what is of the arithmetic's type whatever the operands are of: kl and its gradients.
template <class Access, class T>
using Arithmetic = std::conditional_t<Access::kAligned, Vectors<T>, Elements>;

}  // namespace lect11ext::cuda
