// How a layer's kernel is spread over the device: teams of blocks, what a block keeps where, and the launch. A team's
// blocks run at the same time, and meet at a counter in global memory. Weights stay in shared memory as far as they
// fit; the rest is read from the L2 cache in every step.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "common/cuda/launch.h"
#include "recurrent/cuda/layer_product.cuh"

namespace lect11ext::cuda {

// The same for all blocks of a launch. Groups are powers of two.
struct LayerPlan {
  int64_t teams, members;     // blocks of a team
  bool near_states;           // whether a block keeps its units' states in shared memory
  int64_t own_tiles;          // of a block, neighbours
  int row_shift, tile_shift;  // log2 of the warps side by side along the batch, and along the tiles; the others share
                              // the depth
  int64_t chunks;             // of the product's depth
  int64_t kept_chunks;        // those whose weights are in shared memory
  int64_t team_rows;          // of the batch, at most
  // Where parts of shared memory begin, in bytes; sums are first.
  int64_t states_at, kept_at;
  size_t shared_bytes;
};

// What a kernel asks for.
struct LayerNeeds {
  int64_t rows;         // of a warp's product
  int64_t chunks;       // of its depth
  int64_t chunk_bytes;  // of weights, of one tile
  int64_t sum_bytes;    // of the warps' sums
  int64_t state_bytes;  // of a unit of a row, in all states
};

inline LayerPlan plan_teams(const LayerCommon& args, const LayerNeeds& needs) {
  constexpr int64_t kSideBySide = 1 << kLayerGroupBits;  // tiles: more leave too few warps to each
  constexpr int64_t kMostStateBytes = 32 << 10;          // more room is worth more for weights
  const auto log2 = [](int64_t n) { return std::bit_width(static_cast<uint64_t>(n - 1)); };  // rounded up
  const auto to_pieces = [](int64_t bytes) { return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes; };
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount), tiles = cuda_tiles(args.hidden);
  LayerPlan plan{};
  plan.own_tiles = (tiles + multiprocessors - 1) / multiprocessors;
  plan.members = (tiles + plan.own_tiles - 1) / plan.own_tiles;
  plan.teams = std::clamp<int64_t>((args.batch + needs.rows - 1) / needs.rows, 1, multiprocessors / plan.members);
  plan.team_rows = (args.batch + plan.teams - 1) / plan.teams;
  plan.tile_shift = plan.own_tiles <= kSideBySide ? log2(plan.own_tiles) : 0;
  plan.chunks = needs.chunks;
  const auto more_rows = [&] { return needs.rows << plan.row_shift < plan.team_rows; };
  while (plan.row_shift + plan.tile_shift < kLayerGroupBits && more_rows()) ++plan.row_shift;

  const int64_t states = plan.team_rows * plan.own_tiles * kTile * needs.state_bytes;
  plan.near_states = states <= kMostStateBytes;
  plan.states_at = to_pieces(needs.sum_bytes);
  plan.kept_at = plan.states_at + (plan.near_states ? to_pieces(states) : 0);
  const int64_t space = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - plan.kept_at;
  const int64_t chunk_bytes = plan.own_tiles * needs.chunk_bytes;
  plan.kept_chunks = std::clamp<int64_t>(space / chunk_bytes, 0, needs.chunks);
  plan.shared_bytes = plan.kept_at + plan.kept_chunks * chunk_bytes;
  return plan;
}

template <class Args>
void launch_layer(void (*kernel)(Args, LayerPlan), const Args& args, const LayerNeeds& needs, void* stream) {
  const LayerPlan plan = plan_teams(args, needs);
  const dim3 grid(static_cast<unsigned>(plan.teams * plan.members));
  launch_together(kernel, grid, kLayerThreads, plan.shared_bytes, stream, args, plan);
}

// --- the counter of a team ----------------------------------------------------------------------------------------

// After all that this thread knows to be written.
__device__ inline void count_arrival(unsigned long long* counter) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
#else
  atomicAdd(counter, 1ull);
#endif
}

// What those had written who are counted is seen by what follows.
__device__ inline unsigned long long arrivals(const unsigned long long* counter) {
#if defined(__CUDA_ARCH__)
  unsigned long long count;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(count) : "l"(counter) : "memory");
  return count;
#else
  return *static_cast<const volatile unsigned long long*>(counter);
#endif
}

// Between two looks at what others are to write. On the host they must be let run; on the device to look again at once
// costs nobody anything.
__device__ inline void pause() {
#if !defined(__CUDA_ARCH__)
  __nanosleep(0);
#endif
}

// Calls f with the storage type and whether tensor cores multiply it.
template <class F>
void with_product(DType dtype, bool tensor_cores, F f) {
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<S, float>) {
      tensor_cores ? f(type, std::true_type{}) : f(type, std::false_type{});
    } else {
      f(type, std::bool_constant<!std::is_same_v<S, double>>{});
    }
  });
}

}  // namespace lect11ext::cuda
