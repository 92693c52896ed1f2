// Thread-block clusters (sm_90 and newer). The tests' host build has a stand-in for this header.
#pragma once

#include <cstdint>

namespace lect11ext::cuda {

// Waits for all threads of the cluster, and for what they have written. Blocks of a cluster are neighbours on the chip:
// this takes a fraction of what a counter in global memory does. Threads of a warp may come one by one.
__device__ inline void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes 16 bytes to where `own`, in this block's shared memory, lies in that of block `rank` of the cluster. To be
// seen there, a wait must follow, and that block must not have ended.
__device__ inline void cluster_store(void* own, uint32_t rank, uint4 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

}  // namespace lect11ext::cuda
