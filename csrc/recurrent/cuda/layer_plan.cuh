// How a layer's kernel is spread over the device: teams of blocks, what a block keeps where, and the launch.
//
// Paths, from the sizes and the device:
//   clusters      up to 32 tiles, on sm_90 and newer: a team is a thread-block cluster, whose blocks write what is
//                 multiplied next to one another's shared memory
//   the grid      else: a team's blocks run at the same time, and meet at a counter in global memory
// and, on either, weights in registers where a block's tiles lie side by side and a warp's part fits, else in shared
// memory as far as they fit, else in the L2 cache.
//
// Two environment variables overrule the choice, for measuring and for trouble, read at every call:
// LECT11EXT_LAYER_CLUSTER (blocks of a cluster: 0, 2, 4, 8 or 16) and LECT11EXT_LAYER_REGISTERS (0 or 1).
#pragma once

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <type_traits>

#include "common/cuda/launch.h"
#include "recurrent/cuda/layer_product.cuh"

namespace lect11ext::cuda {

// The same for all blocks of a launch. Groups are powers of two.
struct LayerPlan {
  int64_t teams, members;     // blocks of a team
  bool registers;             // whether warps hold their weights in registers
  bool near_states;           // whether a block keeps its units' states in shared memory
  int64_t own_tiles;          // of a block, neighbours
  int row_shift, tile_shift;  // log2 of the warps side by side along the batch, and along the tiles; the others share
                              // the depth
  int64_t chunks;             // of the product's depth
  int64_t kept_chunks;        // those whose weights are in shared memory
  int64_t team_rows;          // of the batch, at most
  int64_t operand_stride;     // elements from row to row of what is multiplied, in shared memory
  // Where parts of shared memory begin, in bytes; sums are first.
  int64_t states_at, operands_at, kept_at;
  size_t shared_bytes;
};

// What a kernel asks for.
struct LayerNeeds {
  int64_t rows;                         // of a warp's product
  int64_t chunks;                       // of its depth
  int64_t chunk_bytes;                  // of weights, of one tile
  int64_t held_chunks;                  // that a warp can hold in registers; 0 for none
  int64_t sum_bytes;                    // of the warps' sums
  int64_t state_bytes;                  // of a unit of a row, in all states
  int64_t element, row_bytes, buffers;  // of what is multiplied: of an element, of a row, and how many such tensors
};

inline int64_t layer_wish(const char* variable, int64_t otherwise) {
  const char* const wish = std::getenv(variable);
  return wish == nullptr || *wish == '\0' ? otherwise : std::strtol(wish, nullptr, 10);
}

// A plan for at most `most_teams` of at most `most_members` blocks; of clusters one that may need more shared memory
// than there is.
inline LayerPlan plan_teams(const LayerCommon& args, const LayerNeeds& needs, int64_t most_members, bool clusters,
                            int64_t most_teams) {
  constexpr int64_t kSideBySide = 1 << kLayerGroupBits;  // tiles: more leave too few warps to each
  constexpr int64_t kMostStateBytes = 32 << 10;          // more room is worth more for weights
  const auto log2 = [](int64_t n) { return std::bit_width(static_cast<uint64_t>(n - 1)); };  // rounded up
  const auto to_pieces = [](int64_t bytes) { return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes; };
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount), tiles = cuda_tiles(args.hidden);
  LayerPlan plan{};
  plan.own_tiles = (tiles + most_members - 1) / most_members;
  plan.members = (tiles + plan.own_tiles - 1) / plan.own_tiles;
  if (clusters) plan.members = int64_t{1} << log2(plan.members);
  plan.teams = std::clamp<int64_t>((args.batch + needs.rows - 1) / needs.rows, 1,
                                   std::min(most_teams, multiprocessors / plan.members));
  plan.team_rows = (args.batch + plan.teams - 1) / plan.teams;
  plan.tile_shift = plan.own_tiles <= kSideBySide ? log2(plan.own_tiles) : 0;
  const bool side_by_side = plan.own_tiles <= int64_t{1} << plan.tile_shift;
  plan.chunks = needs.chunks;
  plan.registers = side_by_side && needs.chunks << plan.tile_shift <= needs.held_chunks * kLayerWarps &&
                   layer_wish("LECT11EXT_LAYER_REGISTERS", 1) != 0;
  // With weights in registers every warp takes all rows, with those of its own part of the depth.
  const auto more_rows = [&] { return needs.rows << plan.row_shift < plan.team_rows; };
  while (!plan.registers && plan.row_shift + plan.tile_shift < kLayerGroupBits && more_rows()) ++plan.row_shift;

  const int64_t states = plan.team_rows * plan.own_tiles * kTile * needs.state_bytes;
  plan.near_states = states <= kMostStateBytes;
  // Rows that begin half a turn of the banks apart: eight lanes read two rows at a time.
  const int64_t stride =
      needs.row_bytes % (2 * kCudaChunkBytes) == 0 ? needs.row_bytes + kCudaChunkBytes : needs.row_bytes;
  plan.operand_stride = stride / needs.element;
  plan.states_at = to_pieces(needs.sum_bytes);
  plan.operands_at = plan.states_at + (plan.near_states ? to_pieces(states) : 0);
  plan.kept_at = plan.operands_at + (clusters ? needs.buffers * plan.team_rows * stride : 0);
  const int64_t space = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - plan.kept_at;
  const int64_t chunk_bytes = plan.own_tiles * needs.chunk_bytes;
  if (!plan.registers) plan.kept_chunks = std::clamp<int64_t>(space / chunk_bytes, 0, needs.chunks);
  plan.shared_bytes = plan.kept_at + plan.kept_chunks * chunk_bytes;
  return plan;
}

// The builds of a kernel: weights in shared memory; in registers; and for clusters, with weights in registers where the
// arithmetic has such a build, else in shared memory.
template <class Args>
struct LayerKernels {
  void (*shared)(Args, LayerPlan);
  void (*registers)(Args, LayerPlan);
  void (*clusters)(Args, LayerPlan);
};

// Starts it on clusters, if the device, the sizes and the build allow it.
template <class Args>
bool launch_clusters(const LayerKernels<Args>& kernels, const Args& args, const LayerNeeds& needs, void* stream) {
  constexpr int64_t kClusterBlocks = 8, kClusterTiles = 4;  // the largest cluster that every device has; tiles a block
  constexpr int64_t kMostBlocks = 16;
  const int64_t blocks = layer_wish("LECT11EXT_LAYER_CLUSTER", kClusterBlocks);
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9 || blocks > std::min(kMostBlocks, multiprocessors) ||
      blocks < 1 || !std::has_single_bit(static_cast<uint64_t>(blocks))) {
    return false;
  }
  if (cuda_tiles(args.hidden) > blocks * kClusterTiles) return false;
  int64_t active = multiprocessors / blocks;
  for (;;) {
    const LayerPlan plan = plan_teams(args, needs, blocks, true, active);
    const bool fits = plan.shared_bytes <= size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    const bool is_built = needs.held_chunks > 0 ? plan.registers : plan.kept_chunks == plan.chunks;
    if (!fits || !is_built) return false;
    const dim3 grid(static_cast<unsigned>(plan.teams * plan.members));
    const Clusters clusters(static_cast<unsigned>(plan.members), grid, kLayerThreads, plan.shared_bytes, stream);
    // The blocks of a cluster are neighbours on the chip, so that some of it may be left over. A second round of
    // clusters would take as long as the first: rather fewer of them, with more rows each.
    const int64_t most = clusters.active(kernels.clusters);
    if (most == 0) return false;
    if (plan.teams <= most) return clusters.launch(kernels.clusters, args, plan), true;
    active = most;
  }
}

template <class Args>
void launch_layer(const LayerKernels<Args>& kernels, const Args& args, const LayerNeeds& needs, void* stream) {
  if (launch_clusters(kernels, args, needs, stream)) return;
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const LayerPlan plan = plan_teams(args, needs, multiprocessors, false, multiprocessors);
  const dim3 grid(static_cast<unsigned>(plan.teams * plan.members));
  launch_together(plan.registers ? kernels.registers : kernels.shared, grid, kLayerThreads, plan.shared_bytes, stream,
                  args, plan);
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
