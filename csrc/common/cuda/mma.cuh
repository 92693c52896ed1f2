// Products on tensor cores. The tests' host build has a stand-in for this header.
#pragma once

#include "common/cuda/memory.cuh"

namespace lect11ext::cuda {

// Types of 16 bits are multiplied exactly; of a float, ten bits of the fraction count (TF32), to which tensor_word
// rounds.
template <class S>
__device__ inline uint32_t tensor_word(uint32_t word) {
  if constexpr (std::is_same_v<S, float>) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
    return rounded;
  } else {
    return word;
  }
}

// d += a · bᵀ for sixteen rows of a and eight of b, along eight words of S each. With g = lane / 4 and q = lane % 4, a
// lane gives two words of each of three rows, the q-th of the first four and of the last four:
//   a = {row g, row g + 8, row g, row g + 8}, b = {row g, row g}: the first word of each, then the second
// and owns d[g][2q], d[g][2q + 1], d[g + 8][2q] and d[g + 8][2q + 1].
template <class S>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define LECT11EXT_MMA(shape_and_types)                                                                        \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<S, __nv_bfloat16>) LECT11EXT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else if constexpr (std::is_same_v<S, __half>) LECT11EXT_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else LECT11EXT_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef LECT11EXT_MMA
}

}  // namespace lect11ext::cuda
