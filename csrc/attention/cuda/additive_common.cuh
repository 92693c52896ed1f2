// What both directions of additive attention share: batches of matrices, their products, and tanh(q + k) of a pair.
//
// As on the CPU (cpu/additive_tanh.h) tanh(q + k) is (E − 1) / (E + 1) with E = e^2q · e^2k: one reciprocal a pair, on
// the unit that gives sixteen a cycle on a multiprocessor, and that bounds these kernels.
#pragma once

#include "attention/additive.h"
#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

constexpr float kLargestFactored = 20, kLargestSmall = 0.5f;

// NaN is not within.
template <class T>
__device__ inline bool within(T x, float bound) {
  return x <= T(bound) && x >= T(-bound);
}

// e^2x, or with less_1 e^2x − 1, for |x| ≤ kLargestFactored.
__device__ inline float power(float x, bool less_1) {
  const ReducedExp e = reduced_exp(2 * x);
  const float scale = __int_as_float((e.n + 127) << 23);
  return fmaf(scale, e.em1, less_1 ? scale - 1 : scale);
}
__device__ inline double power(double x, bool less_1) { return less_1 ? std::expm1(2 * x) : std::exp(2 * x); }

// a / b for b in [1, e^81], within two units in the last place.
__device__ inline float quotient(float a, float b) { return __fdividef(a, b); }
__device__ inline double quotient(double a, double b) { return a / b; }

// tanh(q + k) from e^2q, −1 and e^2k, or, where k is small, from e^2q, e^2q − 1 and e^2k − 1.
template <class T>
__device__ inline T pair_tanh(T scale, T shift, T factor) {
  const T less_1 = std::fma(factor, scale, shift);
  return quotient(less_1, less_1 + 2);
}

// A batch of matrices of any strides, over the dimensions of Additive::batches.
struct Operand {
  const void* data;
  DType dtype;
  int64_t row, column;
  int64_t strides[kMaxDims];
};

__device__ inline int64_t batch_offset(const Shape& batches, const int64_t* strides, int64_t index) {
  int64_t offset = 0;
  for (int d = batches.ndim - 1; d >= 0; --d) {
    const int64_t outer = divide(index, batches.sizes[d]);
    offset += (index - outer * batches.sizes[d]) * strides[d];
    index = outer;
  }
  return offset;
}

inline Operand strided(const Additive& args, const Matrices& matrices) {
  Operand operand{matrices.data, args.dtype, matrices.row, 1, {}};
  std::copy_n(matrices.strides, kMaxDims, operand.strides);
  return operand;
}

inline Operand dense(const Additive& args, const void* data, DType dtype, int64_t rows, int64_t columns) {
  Operand operand{data, dtype, columns, 1, {}};
  int64_t stride = rows * columns;
  for (int d = args.batches.ndim - 1; d >= 0; stride *= args.batches.sizes[d--]) operand.strides[d] = stride;
  return operand;
}

inline Operand transposed(Operand operand) {
  std::swap(operand.row, operand.column);
  return operand;
}

inline DType compute_type(DType dtype) { return dtype == DType::Double ? DType::Double : DType::Float; }

// --- products -----------------------------------------------------------------------------------------------------

// c[m][n] = Σ_k a(m, k)·b(k, n), c dense. With skips_zeros pairs with a = 0 have no part in it, though b be NaN there.
// These products are a small part of the work, which is why they are plain.
struct BatchProduct {
  Shape batches;
  Operand a, b;
  void* c;
  DType c_dtype;
  int64_t m, n, k;
  bool skips_zeros;
};

constexpr int kProductTile = 64, kProductDepth = 16, kProductThreads = 256, kProductSide = 4;

template <class T>
__global__ void __launch_bounds__(kProductThreads) product_kernel(const __grid_constant__ BatchProduct args) {
  __shared__ T a[kProductDepth][kProductTile + 1], b[kProductDepth][kProductTile + 1];
  const int64_t across = (args.n + kProductTile - 1) / kProductTile, down = (args.m + kProductTile - 1) / kProductTile;
  const int64_t line = divide(blockIdx.x, across), element = divide(line, down);
  const int64_t first_m = (line - element * down) * kProductTile, first_n = (blockIdx.x - line * across) * kProductTile;
  const int64_t a_offset = batch_offset(args.batches, args.a.strides, element);
  const int64_t b_offset = batch_offset(args.batches, args.b.strides, element);
  const int x = threadIdx.x % (kProductTile / kProductSide), y = threadIdx.x / (kProductTile / kProductSide);
  T sums[kProductSide][kProductSide] = {};
  for (int64_t k = 0; k < args.k; k += kProductDepth) {
    for (int i = threadIdx.x; i < kProductTile * kProductDepth; i += kProductThreads) {
      // Neighbouring threads along the dimension of unit stride.
      const bool deep = args.a.column == 1, wide = args.b.column == 1;
      const int am = deep ? i / kProductDepth : i % kProductTile, ak = deep ? i % kProductDepth : i / kProductTile;
      const int bn = wide ? i % kProductTile : i / kProductDepth, bk = wide ? i / kProductTile : i % kProductDepth;
      const int64_t m = first_m + am, n = first_n + bn;
      a[ak][am] = m < args.m && k + ak < args.k
                      ? read<T>(args.a.data, args.a.dtype, a_offset + m * args.a.row + (k + ak) * args.a.column)
                      : T(0);
      b[bk][bn] = n < args.n && k + bk < args.k
                      ? read<T>(args.b.data, args.b.dtype, b_offset + (k + bk) * args.b.row + n * args.b.column)
                      : T(0);
    }
    __syncthreads();
    T tile[kProductSide][kProductSide] = {};  // short sums lose fewer digits
#pragma unroll
    for (int step = 0; step < kProductDepth; ++step) {
#pragma unroll
      for (int i = 0; i < kProductSide; ++i) {
        const T factor = a[step][y * kProductSide + i];
        if (args.skips_zeros && factor == 0) continue;
#pragma unroll
        for (int j = 0; j < kProductSide; ++j) {
          tile[i][j] = std::fma(factor, b[step][x + j * (kProductTile / kProductSide)], tile[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kProductSide; ++i) {
#pragma unroll
      for (int j = 0; j < kProductSide; ++j) sums[i][j] += tile[i][j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kProductSide; ++i) {
#pragma unroll
    for (int j = 0; j < kProductSide; ++j) {
      const int64_t m = first_m + y * kProductSide + i, n = first_n + x + j * (kProductTile / kProductSide);
      if (m < args.m && n < args.n) write(args.c, args.c_dtype, (element * args.m + m) * args.n + n, sums[i][j]);
    }
  }
}

inline void launch_blocks(auto kernel, int64_t blocks, int threads, void* stream, const auto& args) {
  if (blocks > 0) launch(kernel, dim3(grid_size(blocks)), threads, 0, stream, args);
}

inline void multiply(const BatchProduct& args, DType compute, void* stream) {
  const int64_t tiles = ((args.m + kProductTile - 1) / kProductTile) * ((args.n + kProductTile - 1) / kProductTile);
  launch_blocks(compute == DType::Double ? product_kernel<double> : product_kernel<float>, args.batches.numel * tiles,
                kProductThreads, stream, args);
}

// --- rows of scores -----------------------------------------------------------------------------------------------

constexpr int kRowThreads = 128, kLanesOfWarp = 32;

// Every lane gets the sum, or the largest, of all lanes.
template <class T, class F>
__device__ inline T combine_lanes(T value, F f) {
#pragma unroll
  for (int distance = kLanesOfWarp / 2; distance > 0; distance /= 2) {
    value = f(value, __shfl_xor_sync(~0u, value, distance));
  }
  return value;
}

}  // namespace lect11ext::cuda
