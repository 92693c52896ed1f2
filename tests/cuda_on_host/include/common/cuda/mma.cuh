// Stands in for csrc/common/cuda/mma.cuh: the same products, by what the lanes of a warp tell one another.
#pragma once

#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

template <class S>
inline uint32_t tensor_word(uint32_t word) {
  if constexpr (std::is_same_v<S, float>) return (word + 0x1000) & ~0x1FFFu;  // to nearest, halves away from zero
  else return word;
}

template <class S>
inline float dot_words(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<S, float>) {
    return __uint_as_float(a & ~0x1FFFu) * __uint_as_float(b & ~0x1FFFu);
  } else {
    S x[2], y[2];
    std::memcpy(x, &a, sizeof(a));
    std::memcpy(y, &b, sizeof(b));
    return from_storage<float>(x[0]) * from_storage<float>(y[0]) + from_storage<float>(x[1]) * from_storage<float>(y[1]);
  }
}

template <class S>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Given {
    uint4 row;
    uint2 column;
  };
  const auto given = cuda_on_host::exchange_all(Given{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int g = cuda_on_host::lane() / 4, q = cuda_on_host::lane() % 4;
  for (int lane = 0; lane < 4; ++lane) {
    const uint4 row = given[4 * g + lane].row;
    for (int column = 0; column < 2; ++column) {
      const uint2 other = given[4 * (2 * q + column) + lane].column;
      d[column] += dot_words<S>(row.x, other.x) + dot_words<S>(row.z, other.y);
      d[2 + column] += dot_words<S>(row.y, other.x) + dot_words<S>(row.w, other.y);
    }
  }
}

}  // namespace lect11ext::cuda
