// What programs that try kernels on a GPU without torch share: memory, comparison, time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cuda/launch.h"

namespace lect11ext::on_gpu {

using S = __nv_bfloat16;

template <class T>
struct Device {
  T* data = nullptr;
  size_t count = 0;
  explicit Device(size_t count) : count(count) { cuda::check(cudaMalloc(&data, count * sizeof(T) + 16), "allocate"); }
  ~Device() { cudaFree(data); }
  Device(Device&& other) noexcept : data(std::exchange(other.data, nullptr)), count(other.count) {}
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  void clear() { cuda::check(cudaMemset(data, 0, count * sizeof(T)), "fill"); }
  // NaN, so that what is not written shows.
  void poison() { cuda::check(cudaMemset(data, 0xFF, count * sizeof(T)), "fill"); }
  std::vector<T> read() const {
    std::vector<T> host(count);
    cuda::check(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return host;
  }
  Device copy() const {
    Device other(count);
    cuda::check(cudaMemcpy(other.data, data, count * sizeof(T), cudaMemcpyDeviceToDevice), "copy");
    return other;
  }
  void draw(std::mt19937& random, float spread = 1) {
    constexpr size_t kDrawn = 1000003;  // repeated, since drawing takes longer than all the rest
    std::normal_distribution<float> normal(0, spread);
    std::vector<T> host(std::min(count, kDrawn));
    for (T& x : host) {
      if constexpr (std::is_same_v<T, S>) x = __float2bfloat16(normal(random));
      else x = T(normal(random));  // with all bits, since some kernels split them
    }
    cuda::check(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
    for (size_t done = host.size(); done < count; done *= 2) {
      const size_t more = std::min(done, count - done);
      cuda::check(cudaMemcpy(data + done, data, more * sizeof(T), cudaMemcpyDeviceToDevice), "copy");
    }
  }
};

inline double wide(float x) { return x; }
inline double wide(S x) { return __bfloat162float(x); }

// Of two results, in units of the largest value; NaN if one has it where the other has not.
template <class T>
double difference(const std::vector<T>& a, const std::vector<T>& b) {
  double largest = 1e-30, most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = wide(a[i]), y = wide(b[i]);
    if (x == y) continue;  // infinities
    if (std::isnan(x) != std::isnan(y)) return NAN;
    if (std::isfinite(y)) largest = std::max(largest, std::abs(y));
    most = std::max(most, std::abs(x - y));
  }
  return most / largest;
}

// The same of what lies on the GPU, where large results are compared in no time. Bits of floats that are not negative
// have their order.
struct Extremes {
  unsigned largest, most, one_is_nan;
};

template <class T>
__global__ void extremes_kernel(const T* a, const T* b, size_t count, Extremes* extremes) {
  float largest = 0, most = 0;
  bool one_is_nan = false;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const float x = static_cast<float>(a[i]), y = static_cast<float>(b[i]);
    if (x == y) continue;
    one_is_nan |= isnan(x) != isnan(y);
    if (isfinite(y)) largest = fmaxf(largest, fabsf(y));
    most = fmaxf(most, fabsf(x - y));
  }
  atomicMax(&extremes->largest, __float_as_uint(largest));
  atomicMax(&extremes->most, __float_as_uint(most));
  if (one_is_nan) extremes->one_is_nan = 1;
}

template <class T>
double difference(const Device<T>& a, const Device<T>& b) {
  Device<Extremes> found(1);
  found.clear();
  extremes_kernel<<<1024, 256>>>(a.data, b.data, a.count, found.data);
  const Extremes read = found.read()[0];
  if (read.one_is_nan) return NAN;
  float largest, most;
  std::memcpy(&largest, &read.largest, sizeof(float));
  std::memcpy(&most, &read.most, sizeof(float));
  return most == 0 ? 0 : most / std::max(largest, 1e-30f);
}

// Of one run; the slower it is, the fewer there are, since a GPU's minutes are.
template <class Run>
double milliseconds(Run run) {
  constexpr double kEnough = 50;
  constexpr int kMostRuns = 20;
  cudaEvent_t begin, end;
  cuda::check(cudaEventCreate(&begin), "time");
  cuda::check(cudaEventCreate(&end), "time");
  const auto time = [&](int runs) {
    cudaEventRecord(begin);
    for (int i = 0; i < runs; ++i) run();
    cudaEventRecord(end);
    cuda::check(cudaEventSynchronize(end), "wait");
    float elapsed = 0;
    cudaEventElapsedTime(&elapsed, begin, end);
    return elapsed / runs;
  };
  run();
  const double once = time(1);
  return once > kEnough / 2 ? once : time(std::clamp(static_cast<int>(kEnough / once), 2, kMostRuns));
}

}  // namespace lect11ext::on_gpu
