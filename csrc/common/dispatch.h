// With what an op runs its kernels: the parallel loop of the CPU, and the stream of a GPU.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/Device.h>

#include <cstdint>

// LECT11EXT_CUDA_KERNEL: as launch() takes it.
#ifdef LECT11EXT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define LECT11EXT_CUDA_KERNEL(name) cuda::name
#else
#define LECT11EXT_CUDA_KERNEL(name) nullptr
#endif

namespace lect11ext {

// Below this much work, in units of about a nanosecond, starting a second thread costs more than it saves: waking an
// idle OpenMP team takes 2 to 5 µs.
inline constexpr int64_t kWorthAThread = 8000;

// Runs kernel(args, begin, end) over `items` work items of `cost` units each on as many threads as that is worth.
template <class Args>
void run_parallel(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items, int64_t cost) {
  if (items == 0) return;
  const int64_t grain = cost >= kWorthAThread ? 1 : (kWorthAThread + cost - 1) / (cost > 0 ? cost : 1);
  if (items <= grain || at::get_num_threads() == 1) return kernel(args, 0, items);
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

#ifdef LECT11EXT_WITH_CUDA
// Of the current device, as the kernels take it.
inline void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
#endif

// Runs the kernel that the device has: items and cost are those of run_parallel. Without items none runs.
template <auto kCpu, auto kCuda, class Args>
void launch(const Args& args, int64_t items, int64_t cost, c10::Device device) {
  if (items == 0) return;
  if (device.is_cpu()) return run_parallel(kCpu, args, items, cost);
#ifdef LECT11EXT_WITH_CUDA
  const c10::cuda::CUDAGuard guard(device);
  kCuda(args, current_stream());
#endif
}

}  // namespace lect11ext
