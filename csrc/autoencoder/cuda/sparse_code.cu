// Sums and dot products of rows of a table at scattered places: bound by reading those rows, from the L2 cache where
// the table fits it. Every thread has several rows' loads under way, of 16 bytes each where alignment allows.
#include <cmath>
#include <cstdint>

#include "common/cuda/memory.cuh"

#include "autoencoder/sparse_code.h"
#include "common/cuda/launch.h"

namespace lect11ext::cuda {
namespace {

constexpr int kThreads = 128, kWarp = 32;
constexpr int kBlocks = 8;  // on a multiprocessor at a time: leaves enough registers that none is spilled

// N elements from `from` on, of which `count` are there.
template <class S, int N>
__device__ inline Pack<S, N> load_some(const S* from, int64_t count) {
  if (count >= N) return Pack<S, N>::load(from);
  Pack<S, N> pack = Pack<S, N>::zero();
  for (int i = 0; i < count; ++i) pack.data[i] = from[i];
  return pack;
}

// threadIdx.x goes over the columns, N at a time, threadIdx.y over rows of `out`; blockIdx.y over what columns are
// left.
template <class S, int N>
__global__ void __launch_bounds__(kThreads, kBlocks) weighted_rows_kernel(const __grid_constant__ WeightedRows args) {
  using T = Compute<S>;
  const int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t column = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
  if (r >= args.rows || column >= args.width) return;
  const int64_t left = args.width - column;
  const bool ordered = args.order != nullptr;
  const int64_t first = ordered ? args.starts[r] : r * args.k, last = ordered ? args.starts[r + 1] : first + args.k;
  T sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum[i] = args.bias != nullptr && i < left ? static_cast<const T*>(args.bias)[column + i] : T(0);
  }
  bool good = true;
#pragma unroll 4
  for (int64_t e = first; e < last; ++e) {
    const int64_t p = ordered ? args.order[e] : e;
    int64_t row = ordered ? divide(p, args.k) : args.indices[p];
    const bool there = 0 <= row && row < args.table_rows;
    good = good && there;
    row = there ? row : 0;
    const T value = static_cast<const T*>(args.values)[p];
    const auto pack = load_some<S, N>(static_cast<const S*>(args.table) + row * args.stride + column, left);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = std::fma(value, pack[i], sum[i]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < left) write(args.out, args.out_dtype, r * args.width + column + i, good ? sum[i] : T(NAN));
  }
}

// A warp takes an entry: lanes go over the columns, and their sums are added as a tree.
template <class S, int N>
__global__ void __launch_bounds__(kThreads) row_dots_kernel(const __grid_constant__ RowDots args) {
  using T = Compute<S>;
  const int64_t count = args.rows * args.k;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t{kThreads / kWarp} * gridDim.x;
  for (int64_t e = int64_t{kThreads / kWarp} * blockIdx.x + threadIdx.x / kWarp; e < count; e += step) {
    const int64_t index = args.indices[e];
    const bool there = 0 <= index && index < args.table_rows;
    const int64_t row = divide(e, args.k) * args.dense_stride;
    const S* const from = static_cast<const S*>(args.table) + (there ? index : 0) * args.stride;
    T sum = T(0);
#pragma unroll 2
    for (int64_t column = lane * N; column < args.width; column += kWarp * N) {
      const int64_t left = args.width - column;
      const auto pack = load_some<S, N>(from + column, left);
      if (args.dense_dtype == kDType<S>) {
        const S* const dense = static_cast<const S*>(args.dense) + row + column;
        const auto other = load_some<S, N>(dense, left);
#pragma unroll
        for (int i = 0; i < N; ++i) sum = std::fma(pack[i], other[i], sum);
      } else {
        for (int i = 0; i < N && i < left; ++i) {
          sum = std::fma(pack[i], read<T>(args.dense, args.dense_dtype, row + column + i), sum);
        }
      }
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) {
      if (args.bias != nullptr && there) sum += static_cast<const T*>(args.bias)[index];
      write(args.out, args.out_dtype, e, there ? sum : T(NAN));
    }
  }
}

template <class S>
bool is_wide(const void* data, int64_t stride) {
  return is_aligned<S, kVector<S>>(data) && stride % kVector<S> == 0;
}

template <class S, int N>
void sum_rows(const WeightedRows& args, void* stream) {
  int across = 1;
  while (across < kThreads && across * N < args.width) across *= 2;
  const int64_t down = kThreads / across, columns = int64_t{across} * N;
  const dim3 grid(grid_size(divide_up(args.rows, down)), grid_size(divide_up(args.width, columns), kMostGridY));
  launch(weighted_rows_kernel<S, N>, grid, dim3(across, static_cast<unsigned>(down)), 0, stream, args);
}

}  // namespace

void weighted_rows(const WeightedRows& args, void* stream) {
  if (args.rows * args.width == 0) return;
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    is_wide<S>(args.table, args.stride) ? sum_rows<S, kVector<S>>(args, stream) : sum_rows<S, 1>(args, stream);
  });
}

void row_dots(const RowDots& args, void* stream) {
  if (args.rows * args.k == 0) return;
  with_type(args.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const bool dense_wide = args.dense_dtype != kDType<S> || is_wide<S>(args.dense, args.dense_stride);
    const bool wide = is_wide<S>(args.table, args.stride) && dense_wide;
    launch(wide ? row_dots_kernel<S, kVector<S>> : row_dots_kernel<S, 1>,
           grid_stride_blocks(args.rows * args.k * kWarp, kThreads), kThreads, 0, stream, args);
  });
}

}  // namespace lect11ext::cuda
