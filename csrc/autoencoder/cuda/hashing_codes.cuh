// Packed codes and their distances.
#pragma once

#include "autoencoder/hashing.h"
#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

inline constexpr int kWord = 4;  // bytes

__host__ __device__ inline int64_t words_of(int64_t bytes) { return (bytes + kWord - 1) / kWord; }

// Word number w of a code of `bytes` bytes, filled up with zeros. Aligned: every row begins at a multiple of a word and
// consists of whole ones.
template <bool Aligned>
__device__ inline uint32_t load_word(const uint8_t* code, int64_t bytes, int64_t w) {
  if constexpr (Aligned) return reinterpret_cast<const uint32_t*>(code)[w];
  uint32_t word = 0;
  const int64_t left = bytes - kWord * w;
#pragma unroll
  for (int i = 0; i < kWord; ++i) {
    if (i < left) word |= static_cast<uint32_t>(code[kWord * w + i]) << 8 * i;
  }
  return word;
}

inline bool are_aligned(const CodeRows& codes, int64_t bytes, int64_t alignment) {
  return bytes % kWord == 0 && codes.stride % alignment == 0 &&
         reinterpret_cast<uintptr_t>(codes.data) % alignment == 0;
}

// A code of kWords words, which lies in registers; of any length for 0, which stays where it is.
template <int kWords>
struct Code {
  using Words = Pack<uint32_t, kWords>;
  Words words;

  // Of a query in shared memory, aligned as codes are.
  static __device__ Words in_registers(const uint32_t* query) { return Words::load(query); }
  static __device__ Code load(const CodeRows& codes, int64_t, int64_t number) {
    return {Words::load(reinterpret_cast<const uint32_t*>(codes.data + number * codes.stride))};
  }
  // Three words at a time by a full adder, whose logic has several times the rate of a count of bits.
  __device__ int distance(const uint32_t* query) const {
    constexpr int kThrees = kWords / 3 * 3;
    uint32_t bits[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits[w] = query[w] ^ words.data[w];
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kThrees; w += 3) {
      const uint32_t a = bits[w], b = bits[w + 1], c = bits[w + 2];
      sum += __popc(a ^ b ^ c) + 2 * __popc((a & b) | (c & (a | b)));
    }
#pragma unroll
    for (int w = kThrees; w < kWords; ++w) sum += __popc(bits[w]);
    return sum;
  }
};

template <>
struct Code<0> {
  struct Words {
    const uint32_t* data;
  };
  const uint8_t* from;
  int64_t bytes;

  static __device__ Words in_registers(const uint32_t* query) { return {query}; }
  static __device__ Code load(const CodeRows& codes, int64_t bytes, int64_t number) {
    return {codes.data + number * codes.stride, bytes};
  }
  __device__ int distance(const uint32_t* query) const {
    int sum = 0;
    for (int64_t w = 0; w < words_of(bytes); ++w) sum += __popc(query[w] ^ load_word<false>(from, bytes, w));
    return sum;
  }
};

// Calls f with the number of words of a code where it is one of those that have a build.
template <class F>
void with_words(const HammingCudaSearch& args, F f) {
  const auto is = [&](int64_t words) {
    return args.bytes == kWord * words && are_aligned(args.codes, args.bytes, std::min<int64_t>(args.bytes, 16));
  };
  if (is(2)) return f(std::integral_constant<int, 2>());
  if (is(4)) return f(std::integral_constant<int, 4>());
  if (is(8)) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, 0>());
}

}  // namespace lect11ext::cuda
