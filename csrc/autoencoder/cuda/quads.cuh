// Elementwise kernels whose threads take quads, four consecutive elements, in any type, stride and alignment. A thread
// loads some quads before it uses the first of them: what is under way must cover the latency of the memory.
#pragma once

#include <algorithm>

#include "common/cuda/launch.h"
#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

inline constexpr int kQuad = 4;  // one Philox block, 16 bytes of float

// Four consecutive elements, the first a multiple of four, of which [low, high) belong to the block's tile.
struct Quad {
  int64_t first;
  int low, high;

  // `place`: the first's number among the `count` elements of the tile; may be negative, or beyond.
  __device__ Quad(int64_t first, int place, int count)
      : first(first),
        low(place < 0 ? -place : 0),
        high(count - place > kQuad ? kQuad
             : count - place > 0   ? count - place
                                   : 0) {}
  __device__ bool holds(int i) const { return low <= i && i < high; }
  __device__ bool whole() const { return low == 0 && high == kQuad; }
  __device__ bool empty() const { return high == 0; }
};

// Where an element lies in a Shape of up to two dimensions, found once for all operands.
struct Spot {
  const Shape& shape;
  int64_t first, row = 0, column;

  __device__ Spot(const Shape& shape, int64_t first) : shape(shape), first(first), column(first) {
    if (shape.ndim == 2) {
      row = divide(first, shape.sizes[1]);
      column = first - row * shape.sizes[1];
    }
  }

  // In a View whose last stride is 0 or 1.
  __device__ int64_t offset(const View& view) const {
    return row * view.strides[0] + (view.strides[shape.ndim - 1] == 0 ? 0 : column);
  }
};

// How a thread reaches four elements. Vectors: every operand is of type S and a quad of it is either consecutive and
// aligned or one value repeated. Shapes of more than two dimensions are rare once these are merged, and the code that
// would find places in them takes the registers of all others.
template <class S>
struct Vectors {
  static constexpr bool kAligned = true;  // numel is a multiple of four, so that every sample begins at one
  static constexpr bool kDense = false;

  template <class T>
  using Loaded = Pack<S, kQuad>;

  template <class T>
  static __device__ Loaded<T> repeat(T value) {
    Pack<S, kQuad> pack;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) pack.set(i, value);
    return pack;
  }

  template <class T>
  static __device__ Loaded<T> load(const Spot& spot, const View& view, const Quad&) {
    if (view.dense) return Pack<S, kQuad>::load(static_cast<const S*>(view.data) + spot.first);
    const S* from = static_cast<const S*>(view.data) + spot.offset(view);
    if (view.strides[spot.shape.ndim - 1] != 0) return Pack<S, kQuad>::load(from);
    Pack<S, kQuad> pack;
    pack.data[0] = *from;
#pragma unroll
    for (int i = 1; i < kQuad; ++i) pack.data[i] = pack.data[0];
    return pack;
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
    if (shape.ndim > 2 || view.dtype != kDType<S> || shape.sizes[last] % kQuad != 0) return false;
    if (view.strides[last] == 0) return true;
    if (view.strides[last] != 1 || !is_aligned<S, kQuad>(view.data)) return false;
    return std::all_of(view.strides, view.strides + last, [](int64_t stride) { return stride % kQuad == 0; });
  }

  static bool fits(const void* dense, DType dtype) {
    return dense == nullptr || (dtype == kDType<S> && is_aligned<S, kQuad>(dense));
  }
};

// Every operand of type S has its elements one behind the other, and quads are whole: the most of what is asked for,
// and a quarter of the instructions less than where strides are asked about.
template <class S>
struct Dense : Vectors<S> {
  static constexpr bool kDense = true;

  template <class T>
  static __device__ Pack<S, kQuad> load(const Spot& spot, const View& view, const Quad&) {
    return Pack<S, kQuad>::load(static_cast<const S*>(view.data) + spot.first);
  }

  template <class T>
  static __device__ void store(void* data, DType, int64_t first, const Quad& quad, const T* values) {
    if (quad.empty()) return;
    Pack<S, kQuad> pack;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) pack.set(i, values[i]);
    pack.store(static_cast<S*>(data) + first);
  }

  static bool fits(const Shape& shape, const View& view) {
    return Vectors<S>::fits(shape, view) && (view.data == nullptr || view.dense);
  }
  using Vectors<S>::fits;
};

// Any types, strides and alignment, one element at a time.
struct Elements {
  static constexpr bool kAligned = false, kDense = false;

  template <class T>
  struct Loaded {
    T data[kQuad];
    __device__ T operator[](int i) const { return data[i]; }
  };

  template <class T>
  static __device__ Loaded<T> repeat(T value) {
    return {{value, value, value, value}};
  }

  template <class T>
  static __device__ Loaded<T> load(const Spot& spot, const View& view, const Quad& quad) {
    const Shape& shape = spot.shape;
    const int last = shape.ndim - 1;
    Loaded<T> out{};
    Place place{};
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (!quad.holds(i)) continue;
      if (i == quad.low || place.column == shape.sizes[last]) place = locate(shape, view, spot.first + i);
      out.data[i] = read<T>(view.data, view.dtype, place.offset);
      place.offset += view.strides[last];
      ++place.column;
    }
    return out;
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

// An operand that may be absent: `value` then.
template <class Access, class T>
__device__ inline auto load_or(T value, const Spot& spot, const View& view, const Quad& quad) {
  return view.data == nullptr ? Access::template repeat<T>(value) : Access::template load<T>(spot, view, quad);
}

// How much of a kernel is on a multiprocessor at a time: `Quads` quads a thread of which all loads are under way
// together, and as many threads as leave registers for them. Strides, and one element after the other, are more to
// keep.
template <class Access, int Quads, int Threads>
struct Share {
  static constexpr int kQuads = Access::kAligned ? Quads : 1;
  static constexpr int kThreads = Access::kDense ? Threads : Threads * (Access::kAligned ? 5 : 3) / 8;
};

// Calls f with a number of the arithmetic's type and the best access of which `fits` says that the operands allow it.
template <class Fits, class F>
void with_access(bool compute_double, Fits fits, F f) {
  if (compute_double) return f(0.0, Elements());
  if (fits(Dense<float>())) return f(0.0f, Dense<float>());
  if (fits(Vectors<float>())) return f(0.0f, Vectors<float>());
  if (fits(Dense<__nv_bfloat16>())) return f(0.0f, Dense<__nv_bfloat16>());
  if (fits(Vectors<__nv_bfloat16>())) return f(0.0f, Vectors<__nv_bfloat16>());
  if (fits(Dense<__half>())) return f(0.0f, Dense<__half>());
  if (fits(Vectors<__half>())) return f(0.0f, Vectors<__half>());
  f(0.0f, Elements());
}

inline constexpr int kFlatThreads = 128;

// The elements of a block where nothing is summed: some quads a thread, whatever their rows.
template <int Quads>
struct FlatRange {
  static constexpr int kElements = Quads * kFlatThreads * kQuad;
  int64_t begin;
  int count;

  __device__ explicit FlatRange(int64_t numel) : begin(int64_t{kElements} * blockIdx.x) {
    count = static_cast<int>(numel - begin < kElements ? numel - begin : kElements);
  }
  // Quad number j of this thread.
  __device__ Quad quad(int j) const {
    const int place = (j * kFlatThreads + static_cast<int>(threadIdx.x)) * kQuad;
    return Quad(begin + place, place, count);
  }
  static dim3 grid(int64_t numel) { return dim3(grid_size(divide_up(numel, kElements))); }
};

}  // namespace lect11ext::cuda
