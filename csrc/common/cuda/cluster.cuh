// Thread-block clusters (sm_90 and newer). The tests' host build has a stand-in for this header.
#pragma once

namespace lect11ext::cuda {

// Waits for all threads of the cluster, and for what they have written. Blocks of a cluster are neighbours on the chip:
// this takes a fraction of what a counter in global memory does. Threads of a warp may come one by one.
__device__ inline void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

}  // namespace lect11ext::cuda
