// Kernels whose results are known, to test the emulation itself.
#include <cooperative_groups.h>

#include "common/cuda/launch.h"

namespace lect11ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

// Shared memory and block barriers: the block's values reversed, then their sum by halves in dynamic shared memory.
__global__ void reverse_and_sum(const int* in, int* reversed, int* sum) {
  __shared__ int values[128];
  int* partial = reinterpret_cast<int*>(dynamic_shared);
  const int n = blockDim.x, t = threadIdx.x, base = blockIdx.x * n;
  values[t] = partial[t] = in[base + t];
  __syncthreads();
  reversed[base + t] = values[n - 1 - t];
  for (int half = n / 2; half > 0; half /= 2) {
    if (t < half) partial[t] += partial[t + half];
    __syncthreads();
  }
  if (t == 0) sum[blockIdx.x] = partial[0];
}

// Element `at` of `count`, of global memory or of its copy in dynamic shared memory.
__global__ void read_global(const int* in, int* out, int, int at) { *out = in[at]; }
__global__ void read_shared(const int* in, int* out, int count, int at) {
  int* copy = reinterpret_cast<int*>(dynamic_shared);
  for (int i = 0; i < count; ++i) copy[i] = in[i];
  *out = copy[at];
}

// Each shuffle of a lane's number, one after another; the odd lanes alone vote.
__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  int* row = out + 6 * lane;
  row[0] = __shfl_xor_sync(~0u, lane, 5);
  row[1] = __shfl_down_sync(~0u, lane, 3, 8);
  row[2] = __shfl_up_sync(~0u, lane, 3);
  row[3] = __shfl_sync(~0u, lane, 9, 4);
  row[4] = lane % 2 == 1 ? static_cast<int>(__ballot_sync(0xAAAAAAAAu, lane > 16)) : -1;
  __syncwarp();
  row[5] = atomicAdd(out + 6 * 32, 1);
}

// Every block reads what all blocks wrote before the barrier.
__global__ void grid_sum(int* parts, int* sums, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) parts[blockIdx.x] = (round + 1) * (blockIdx.x + 1);
    cooperative_groups::this_grid().sync();
    if (threadIdx.x == 0) {
      for (unsigned b = 0; b < gridDim.x; ++b) sums[round * gridDim.x + blockIdx.x] += parts[b];
    }
    cooperative_groups::this_grid().sync();
  }
}

}  // namespace
}  // namespace lect11ext::cuda

using namespace lect11ext::cuda;

extern "C" void selftest_reverse_and_sum(const int* in, int* reversed, int* sum, int blocks, int threads) {
  launch(reverse_and_sum, blocks, threads, threads * sizeof(int), nullptr, in, reversed, sum);
}

extern "C" void selftest_read_global(const int* in, int* out, int count, int at) {
  launch(read_global, 1, 1, 0, nullptr, in, out, count, at);
}

extern "C" void selftest_read_shared(const int* in, int* out, int count, int at) {
  launch(read_shared, 1, 1, count * sizeof(int), nullptr, in, out, count, at);
}

extern "C" void selftest_shuffles(int* out) { launch(shuffles, 1, 32, 0, nullptr, out); }

extern "C" void selftest_grid_sum(int* parts, int* sums, int blocks, int threads, int rounds) {
  void* args[] = {&parts, &sums, &rounds};
  check(cudaLaunchCooperativeKernel(grid_sum, blocks, threads, args), "launch a kernel");
}

// The message of what fails.
template <class F>
const char* message_of(F f) {
  static std::string message;
  try {
    f();
    message.clear();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}

// Of a launch with an empty grid.
extern "C" const char* selftest_empty_grid(int* out) {
  return message_of([&] { launch(shuffles, 0, 32, 0, nullptr, out); });
}

// Of a launch with so many bytes of dynamic shared memory less than its kernel writes.
extern "C" const char* selftest_too_little_shared(const int* in, int* reversed, int* sum, int threads, int bytes) {
  return message_of(
      [&] { launch(reverse_and_sum, 1, threads, threads * sizeof(int) - bytes, nullptr, in, reversed, sum); });
}
