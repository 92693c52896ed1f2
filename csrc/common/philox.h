// Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one block at a
// time. Shared by the CPU's tails and CUDA. Whoever includes it names the namespace, so that the builds stay apart.
//
// The stream: block j of key (seed, offset) has the counter (lo32(offset + j), hi32(offset + j), 0, 0) and the key
// (lo32(seed), hi32(seed)). float takes one word a uniform, hence 4 normals a block; double takes two, hence 2.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LECT11EXT_HOST_DEVICE __host__ __device__
#else
#define LECT11EXT_HOST_DEVICE
#endif

namespace lect11ext::LECT11EXT_KERNEL_NAMESPACE {

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;  // multipliers
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;  // key increments: golden ratio, sqrt(3) - 1
inline constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
  uint32_t x[4];
};

struct WideProduct {
  uint32_t low, high;
};

LECT11EXT_HOST_DEVICE inline WideProduct multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // One instruction, where nvcc 13 adds another for the shift.
  WideProduct product;
  asm("{ .reg .u64 wide;\n mul.wide.u32 wide, %2, %3;\n mov.b64 {%0, %1}, wide; }"
      : "=r"(product.low), "=r"(product.high)
      : "r"(a), "r"(b));
  return product;
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product), static_cast<uint32_t>(product >> 32)};
#endif
}

LECT11EXT_HOST_DEVICE inline PhiloxBlock philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideProduct p0 = multiply_wide(kPhiloxM0, c0), p1 = multiply_wide(kPhiloxM1, c2);
    c0 = p1.high ^ c1 ^ k0;
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ k1;
    c3 = p0.low;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// A uniform in (0, 1) from two words: 53 bits, centred in their cell, so that its logarithm is finite.
LECT11EXT_HOST_DEVICE inline double uniform_double(uint32_t low, uint32_t high) {
  const uint64_t bits = (static_cast<uint64_t>(high) << 32 | low) >> 11;
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

}  // namespace lect11ext::LECT11EXT_KERNEL_NAMESPACE
