// Starting a kernel. Every kernel of the library is started here and by nothing else, so that the tests, which compile
// the same .cu files for the host, need no more than a cudaLaunchKernel of their own.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace lect11ext::cuda {

inline void check(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forget it: it is reported here, and the next call of the process should not report it again
  throw std::runtime_error(std::string("CUDA could not ") + action + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ").");
}

// `stream` is a cudaStream_t: opaque where op code sees it, which includes no CUDA header. Arguments are converted to
// the kernel's parameter types here, since cudaLaunchKernel copies them by those types' sizes.
template <class... Params>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const std::type_identity_t<Params>&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes, static_cast<cudaStream_t>(stream)),
        "launch a kernel");
}

// Of the current device.
inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "tell the current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "describe the device");
  return value;
}

template <class Kernel>
cudaFuncAttributes attributes_of(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "describe a kernel");
  return attributes;
}

// More than 48 KiB must be asked for. It is always all that there is: a thread's larger launch must not fail because
// another's smaller one comes between.
template <class Kernel>
void reserve_shared(Kernel* kernel) {
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t left = most - static_cast<int64_t>(attributes_of(kernel).sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(left)),
        "reserve shared memory");
}

// As launch(), of a kernel whose blocks wait for one another: all of them run at the same time, or none.
template <class... Params>
void launch_together(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                     const std::type_identity_t<Params>&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  reserve_shared(kernel);
  check(cudaLaunchCooperativeKernel(kernel, grid, block, pointers, shared_bytes, static_cast<cudaStream_t>(stream)),
        "launch a cooperative kernel");
}

// As many threads as the current device holds at a time. 2048 is what a multiprocessor of sm_80, sm_90 and sm_100
// holds; where it is 1536 (sm_86, sm_89) the figure is a little high, and nothing depends on it but speed.
inline int64_t resident_threads() { return 2048 * device_attribute(cudaDevAttrMultiProcessorCount); }

// The first dimension of a grid, or the second, of which `most` is kMostGridY.
inline constexpr int64_t kMostGridY = 65535;
inline unsigned grid_size(int64_t blocks, int64_t most = INT32_MAX) {
  if (blocks > most) {
    throw std::runtime_error("a dimension of a CUDA grid has at most " + std::to_string(most) +
                             " blocks, but these sizes take " + std::to_string(blocks) + ".");
  }
  return static_cast<unsigned>(blocks);
}

// Blocks for a grid-stride loop over `items`. A few times more than run at once, so that the last ones to finish leave
// little of the device idle, and no more, so that a block's setup is paid rarely.
inline dim3 grid_stride_blocks(int64_t items, int threads) {
  constexpr int64_t kWaves = 8;
  const int64_t blocks = (items + threads - 1) / threads;
  return dim3(static_cast<unsigned>(std::min(blocks, kWaves * resident_threads() / threads)));
}

}  // namespace lect11ext::cuda
