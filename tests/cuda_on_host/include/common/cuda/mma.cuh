// Stands in for csrc/common/cuda/mma.cuh: the same products, by what the lanes of a warp tell one another.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

template <class S>
inline uint32_t tensor_word(uint32_t word) {
  if constexpr (std::is_same_v<S, float>) {
    if (std::isnan(__uint_as_float(word))) return 0x7FFFFFFF;
    return (word + 0x1000) & ~0x1FFFu;  // to nearest, halves away from zero
  } else {
    return word;
  }
}

// The two products of a word of each operand.
template <class S>
inline void multiply_words(uint32_t a, uint32_t b, double (&products)[2]) {
  if constexpr (std::is_same_v<S, float>) {
    products[0] = double{__uint_as_float(a & ~0x1FFFu)} * __uint_as_float(b & ~0x1FFFu);
    products[1] = 0;
  } else {
    S x[2], y[2];
    std::memcpy(x, &a, sizeof(a));
    std::memcpy(y, &b, sizeof(b));
    for (int i = 0; i < 2; ++i) products[i] = double{from_storage<float>(x[i])} * from_storage<float>(y[i]);
  }
}

// As Hopper's tensor cores add: nothing is rounded. Of every term what lies below a float's last bit of the greatest is
// cut off but for two bits, and so is what a float does not hold of the sum.
template <int kTerms>
inline float add_terms(const double (&terms)[kTerms]) {
  double greatest = 0, sum = 0;
  for (double term : terms) greatest = std::max(greatest, std::abs(term)), sum += term;
  if (greatest == 0 || !std::isfinite(sum)) return static_cast<float>(sum);
  const double unit = std::ldexp(1.0, std::ilogb(greatest) - 25);
  sum = 0;
  for (double term : terms) sum += std::trunc(term / unit) * unit;
  const float rounded = static_cast<float>(sum);
  return std::isfinite(rounded) && std::abs(rounded) > std::abs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

template <class S>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Given {
    uint32_t row[4], column[2];
  };
  const auto given = cuda_on_host::exchange_all(Given{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int g = cuda_on_host::lane() / 4, q = cuda_on_host::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    double terms[17] = {d[i]};
    for (int lane = 0; lane < 4; ++lane) {
      for (int half = 0; half < 2; ++half) {
        double products[2];
        multiply_words<S>(given[4 * g + lane].row[i / 2 + 2 * half], given[4 * (2 * q + i % 2) + lane].column[half],
                          products);
        terms[1 + 4 * lane + 2 * half] = products[0];
        terms[2 + 4 * lane + 2 * half] = products[1];
      }
    }
    d[i] = add_terms(terms);
  }
}

}  // namespace lect11ext::cuda
