// What the kernels of attention ask of the hardware by inline PTX: copies that run by themselves, loads of matrices,
// products on tensor cores. The tests' host build has a stand-in for this header.
#pragma once

#include "common/cuda/math.cuh"
#include "common/cuda/mma.cuh"

namespace lect11ext::cuda {

// Reads kBytes of global memory into shared memory; both are aligned to kBytes. The thread finds them there after
// copy_commit and copy_wait, others of the block after a barrier too.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
  }
}

// Ends a group of copies.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups but the latest kGroups.
template <int kGroups>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four matrices of 8 × 8 elements of 16 bits; lane l gives the address of row l % 8 of matrix l / 8, aligned to 16
// bytes. Word i holds, with g = lane / 4 and q = lane % 4, elements [g][2q], [g][2q + 1] of matrix i; [2q][g],
// [2q + 1][g] if transposed.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  }
}

// d += a · bᵀ as mma<float>, in double.
__device__ inline void mma(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
          : "+d"(d[2 * half]), "+d"(d[2 * half + 1])
          : "d"(a[2 * k + half]), "d"(b[k]));
    }
  }
}

}  // namespace lect11ext::cuda
