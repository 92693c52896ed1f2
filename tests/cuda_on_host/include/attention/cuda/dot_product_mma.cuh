// Stands in for csrc/attention/cuda/dot_product_mma.cuh. A copy takes place when it is waited for, and never otherwise.
#pragma once

#include <deque>
#include <initializer_list>
#include <vector>

#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"

namespace cuda_on_host {

struct Copies {
  struct One {
    void* to;
    const void* from;
    int bytes;
  };
  std::deque<std::vector<One>> groups{{}};  // the last is open
};

// Of the current thread of the block. A block that ended is none of the next one's business.
inline Copies& copies() {
  static thread_local std::vector<Copies> of_threads;
  const unsigned thread = threadIdx.x;
  if (of_threads.size() <= thread) of_threads.resize(thread + 1);
  return of_threads[thread];
}

}  // namespace cuda_on_host

namespace lect11ext::cuda {

template <int kBytes>
inline void copy_async(void* shared, const void* global) {
  for (const auto address : {reinterpret_cast<uintptr_t>(shared), reinterpret_cast<uintptr_t>(global)}) {
    if (address % kBytes != 0) cuda_on_host::fail("an asynchronous copy is not aligned");
  }
  cuda_on_host::copies().groups.back().push_back({shared, global, kBytes});
}

inline void copy_commit() { cuda_on_host::copies().groups.emplace_back(); }

template <int kGroups>
inline void copy_wait() {
  auto& groups = cuda_on_host::copies().groups;
  while (groups.size() > kGroups + 1) {
    for (const auto& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.pop_front();
  }
}

template <bool kTransposed>
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cuda_on_host::fail("a row of a matrix is not aligned");
  const auto rows = cuda_on_host::exchange_all(static_cast<const uint16_t*>(row));
  const int g = cuda_on_host::lane() / 4, q = cuda_on_host::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int j) -> uint32_t {
      return kTransposed ? rows[8 * i + 2 * q + j][g] : rows[8 * i + g][2 * q + j];
    };
    words[i] = element(0) | element(1) << 16;
  }
}

// Sums a product of 16 × 8 along eight: factors(lane, which) gives the two of a lane's a or b that belong together.
template <class T, class Given, class Multiply>
inline void sum_products(T (&d)[4], const Given& given, Multiply multiply) {
  const int g = cuda_on_host::lane() / 4, q = cuda_on_host::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < 4; ++lane) {
      for (int k = 0; k < 2; ++k)
        d[i] += multiply(given[4 * g + lane], 2 * k + i / 2, given[4 * (2 * q + i % 2) + lane], k);
    }
  }
}

inline void mma(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
  struct Given {
    double a[4], b[2];
  };
  sum_products(d, cuda_on_host::exchange_all(Given{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}),
               [](const Given& x, int i, const Given& y, int k) { return x.a[i] * y.b[k]; });
}

}  // namespace lect11ext::cuda
