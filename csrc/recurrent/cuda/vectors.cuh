// What the elementwise kernels of the cells share: how a [B, H] step is divided among threads.
//
// A thread takes N neighbouring hidden units of one row: 16 bytes of each operand where sizes and addresses allow it
// and there are enough of them, else one unit.
#pragma once

#include <initializer_list>

#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

inline constexpr int kCellThreads = 128;
// Blocks on a multiprocessor at a time, at least: leaves 128 registers a thread, so that none is spilled.
inline constexpr int kCellBlocks = 4;

// Calls f(row, unit) for the units of this thread.
template <int N, class F>
__device__ inline void for_each_unit(int64_t batch, int64_t hidden, F f) {
  const int64_t per_row = hidden / N, items = batch * per_row, step = int64_t{kCellThreads} * gridDim.x;
  for (int64_t item = int64_t{kCellThreads} * blockIdx.x + threadIdx.x; item < items; item += step) {
    const int64_t row = divide(item, per_row);
    f(row, (item - row * per_row) * N);
  }
}

// N elements from `index` on; zeros where there is no operand.
template <int N, class S>
__device__ inline Pack<S, N> load(const void* data, int64_t index) {
  return Pack<S, N>::load(static_cast<const S*>(data) + index);
}

template <int N, class S>
__device__ inline Pack<S, N> load_or_zero(const void* data, int64_t index) {
  return data == nullptr ? Pack<S, N>::zero() : load<N, S>(data, index);
}

template <class S, int N>
__device__ inline void store(const Pack<S, N>& pack, void* data, int64_t index) {
  pack.store(static_cast<S*>(data) + index);
}

// Whether threads should take kVector<S> units each: rows must keep the alignment of their pointers (null is aligned),
// and a small step is spread over as many threads as it has units, for its time is the latency of one thread.
template <class S>
bool use_vectors(int64_t batch, int64_t hidden, int64_t stride, std::initializer_list<const void*> pointers) {
  const auto aligned = [](const void* pointer) { return is_aligned<S, kVector<S>>(pointer); };
  return hidden % kVector<S> == 0 && stride % kVector<S> == 0 && batch * hidden >= resident_threads() &&
         std::all_of(pointers.begin(), pointers.end(), aligned);
}

// Starts one of two builds of a kernel, of one unit a thread and of N.
template <int N, class Args>
void launch_cell(void (*single)(Args), void (*vector)(Args), bool vectors, const Args& args, void* stream) {
  const int64_t units = args.batch * args.hidden;
  if (units == 0) return;
  const dim3 blocks = grid_stride_blocks(vectors ? units / N : units, kCellThreads);
  launch(vectors ? vector : single, blocks, kCellThreads, 0, stream, args);
}

}  // namespace lect11ext::cuda
