// How the blocks of a layer's kernel share the work: teams, their tiles of units and rows of the batch, the weights
// that a block keeps, a step's product, and the barrier between steps.
#pragma once

#include <algorithm>

#include "common/cuda/cluster.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/math.cuh"
#include "recurrent/cuda/layer_product.cuh"

namespace lect11ext::cuda {

constexpr int gates_of(LayerCell cell) { return cell == LayerCell::Lstm ? 4 : 3; }

// The same for all blocks of a launch.
struct LayerPlan {
  int64_t teams, members;  // blocks of a team
  bool clusters;           // whether a team is a cluster
  int64_t row_groups;      // warps side by side along the batch; the others share the depth
  int64_t chunks;          // of the product's depth
  int64_t kept_chunks;     // those whose weights are in shared memory
  size_t shared_bytes;
};

// Row (t, b) of a tensor over time; null of null.
template <class T>
__device__ inline T* over_time(T* tensor, TimeStrides strides, int64_t t, int64_t b) {
  return tensor == nullptr ? nullptr : tensor + t * strides.step + b * strides.row;
}

// One block's part, for products with kColumns tiles of weights for each tile of units.
template <class S, bool kTensorCores, int kColumns>
class LayerTeam {
 public:
  // The largest cluster that every device has, and what it is worth: each tile more of a block is a product more a
  // step.
  static constexpr int64_t kClusterBlocks = 8, kClusterTiles = 2 * kClusterBlocks;

  static LayerPlan plan(const LayerCommon& args, int64_t chunks) {
    const int64_t blocks = device_attribute(cudaDevAttrMultiProcessorCount), tiles = cuda_tiles(args.hidden);
    LayerPlan plan{};
    plan.clusters =
        device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && tiles <= kClusterTiles && blocks >= kClusterBlocks;
    plan.members = std::min(tiles, plan.clusters ? kClusterBlocks : blocks);
    plan.teams = std::clamp<int64_t>((args.batch + kRows - 1) / kRows, 1, blocks / plan.members);
    const int64_t rows = (args.batch + plan.teams - 1) / plan.teams;
    plan.row_groups = 1;
    while (plan.row_groups < kLayerWarps && plan.row_groups * kRows < rows) plan.row_groups *= 2;
    plan.chunks = chunks;
    const int64_t own_tiles = (tiles + plan.members - 1) / plan.members;
    const int64_t chunk_bytes = own_tiles * kColumns * kPieces * kVectorBytes;
    const int64_t space = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kSumBytes;
    plan.kept_chunks = std::clamp<int64_t>(space / chunk_bytes, 0, chunks);
    plan.shared_bytes = kSumBytes + plan.kept_chunks * chunk_bytes;
    return plan;
  }

 protected:
  using C = Compute<S>;
  template <int kTiles>
  using Product = WarpProduct<S, kTensorCores, kTiles>;
  static constexpr int kRows = Product<kColumns>::kRows;
  static constexpr int kPassRows = kLayerWarps * kRows;  // at most
  // Shared memory besides weights: the warps' sums, and two numbers for every row of a pass.
  static constexpr int64_t kSumBytes = (kPassRows * kColumns * kTile + kPassRows * 2) * sizeof(C);

  __device__ LayerTeam(const LayerCommon& args, const LayerPlan& plan, const void* panels, void* arrivals,
                       unsigned char* shared)
      : common_(args),
        plan_(plan),
        panels_(static_cast<const uint4*>(panels)),
        sums_(reinterpret_cast<C*>(shared)),
        kept_(reinterpret_cast<uint4*>(shared + kSumBytes)),
        member_(blockIdx.x % plan.members),
        arrivals_(static_cast<unsigned long long*>(arrivals) + blockIdx.x / plan.members),
        tiles_(cuda_tiles(args.hidden)) {
    const int64_t team = blockIdx.x / plan.members;
    first_row_ = args.batch * team / plan.teams;
    last_row_ = args.batch * (team + 1) / plan.teams;
  }

  // --- time and rows

  __device__ int64_t time(int64_t step) const { return common_.reverse ? common_.steps - 1 - step : step; }
  __device__ bool active(int64_t t, int64_t b) const { return common_.lengths == nullptr || t < common_.lengths[b]; }
  // Whether the row's state is set to zero before the step at time t.
  __device__ bool restarts(int64_t t, int64_t b) const {
    return common_.reset != nullptr && active(t, b) && *over_time(common_.reset, common_.reset_strides, t, b) != 0;
  }

  static __device__ C parameter(const void* tensor, int64_t index) {
    return from_storage<C>(static_cast<const S*>(tensor)[index]);
  }
  __device__ int64_t at(int64_t b, int64_t unit) const { return b * common_.hidden + unit; }

  // --- tiles and passes over the rows

  // Calls back with every tile of this block, and the first row of every pass.
  template <class Call>
  __device__ void each_pass(Call call) const {
    for (int64_t tile = member_; tile < tiles_; tile += plan_.members) {
      for (int64_t row = first_row_; row < last_row_; row += plan_.row_groups * kRows) call(tile, row);
    }
  }

  // Calls back with the units of a pass that are this thread's: always the same ones.
  template <class Call>
  __device__ void each_unit_of(int64_t tile, int64_t first_row, Call call) const {
    for (int item = threadIdx.x; item < plan_.row_groups * kRows * kTile; item += kLayerThreads) {
      const int64_t row = first_row + item / kTile, unit = tile * kTile + item % kTile;
      if (row < last_row_ && unit < common_.hidden) call(row, unit, item);
    }
  }

  __device__ int64_t end_of_pass(int64_t first_row) const {
    return std::min(first_row + plan_.row_groups * kRows, last_row_);
  }
  __device__ int64_t units(int64_t tile) const { return std::min<int64_t>(kTile, common_.hidden - tile * kTile); }

  template <class Call>
  __device__ void each_unit(Call call) const {
    each_pass([&](int64_t tile, int64_t row) {
      each_unit_of(tile, row, [&](int64_t b, int64_t unit, int) { call(b, unit); });
    });
  }

  // --- products

  __device__ void keep_weights() {
    const int64_t pieces = plan_.kept_chunks * kColumns * kPieces;
    uint4* to = kept_;
    for (int64_t tile = member_; tile < tiles_; tile += plan_.members, to += pieces) {
      for (int64_t i = threadIdx.x; i < pieces; i += kLayerThreads) to[i] = panel(tile)[i];
    }
    __syncthreads();
  }

  // Chunks first … last − 1 of the depth of `operand` times columns kFirst … kFirst + kCount − 1 of the weights. Calls
  // back with every unit of this thread: load(b, unit), before the product, so that what it reads comes meanwhile, and
  // finish(b, unit, what it read, sums) after it.
  template <int kFirst, int kCount, class Load, class Finish>
  __device__ void multiply(const void* operand, int64_t stride, int64_t first, int64_t last, Load load, Finish finish) {
    each_pass([&](int64_t tile, int64_t row) {
      decltype(load(row, row)) loaded{};
      each_unit_of(tile, row, [&](int64_t b, int64_t unit, int item) {
        if (item == static_cast<int>(threadIdx.x)) loaded = load(b, unit);
      });
      warp_product<kFirst, kCount>(static_cast<const S*>(operand), stride, tile, row, first, last);
      __syncthreads();
      each_unit_of(tile, row, [&](int64_t b, int64_t unit, int item) {
        C sums[kCount] = {};
        const int64_t groups = plan_.row_groups;
        for (int64_t split = 0; split < kLayerWarps / groups; ++split) {
          const C* from = sums_ + (split * groups * kRows + item / kTile) * kCount * kTile + item % kTile;
#pragma unroll
          for (int column = 0; column < kCount; ++column) sums[column] += from[column * kTile];
        }
        if (item != static_cast<int>(threadIdx.x)) loaded = load(b, unit);
        finish(b, unit, loaded, sums);
      });
      __syncthreads();
    });
  }

  // Waits for all blocks of the team, and for what they have written.
  __device__ void wait() {
    if (plan_.clusters) return cluster_wait();
    __syncthreads();
    awaited_ += plan_.members;
    if (threadIdx.x == 0 && plan_.members > 1) {
      __threadfence();
      atomicAdd(arrivals_, 1ull);
      while (*static_cast<volatile unsigned long long*>(arrivals_) < awaited_) __nanosleep(kPollNanoseconds);
      __threadfence();
    }
    __syncthreads();
  }

  // --- two numbers for every row of a pass

  __device__ C* row_numbers(int64_t row_of_pass) const {
    return sums_ + kPassRows * kColumns * kTile + 2 * row_of_pass;
  }

  // find(b, lane, numbers), by the lanes of a warp, for every row of a pass.
  template <class Find>
  __device__ void find_row_numbers(int64_t first_row, Find find) const {
    const Lane lane;
    for (int64_t b = first_row + lane.warp; b < end_of_pass(first_row); b += kLayerWarps) {
      find(b, lane.lane, row_numbers(b - first_row));
    }
    __syncthreads();
  }

  // value(tile), summed over all tiles by a warp in an order that does not depend on who asks.
  template <class Value>
  __device__ C sum_tiles(int lane, Value value) const {
    C sum = 0;
    for (int64_t tile = lane; tile < tiles_; tile += 32) sum += value(tile);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
  }

  const LayerCommon& common_;
  const LayerPlan& plan_;
  int64_t first_row_, last_row_;

 private:
  static constexpr unsigned kPollNanoseconds = 20;
  // Chunks whose rows are on their way at a time: reading from the L2 cache takes longer than multiplying.
  static constexpr int kAhead = sizeof(typename Product<kColumns>::Operand) > 64 ? 1 : 4;

  __device__ const uint4* panel(int64_t tile) const { return panels_ + tile * plan_.chunks * kColumns * kPieces; }

  template <int kFirst, int kCount>
  __device__ void warp_product(const S* operand, int64_t stride, int64_t tile, int64_t row, int64_t first,
                               int64_t last) {
    using Tiles = Product<kCount>;
    const Lane lane;
    const int64_t groups = plan_.row_groups, group = lane.warp % groups, split = lane.warp / groups;
    const int64_t splits = kLayerWarps / groups, first_row = row + group * kRows;
    const int64_t rows = last_row_ - first_row;
    if (rows <= 0) return;
    constexpr int64_t kChunk = kCudaChunkBytes / sizeof(S);
    const uint4* kept = kept_ + tile / plan_.members * plan_.kept_chunks * kColumns * kPieces;
    Tiles product;
    for (int64_t chunk = first + split; chunk < last; chunk += kAhead * splits) {
      typename Tiles::Operand ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = chunk + i * splits;
        if (at < last) ahead[i].load(lane, operand + first_row * stride + at * kChunk, stride, rows);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = chunk + i * splits;
        if (at >= last) break;
        const int64_t from = (at * kColumns + kFirst) * kPieces;
        // Two calls, so that each knows which memory it reads: an access to either kind takes longer.
        if (at < plan_.kept_chunks) product.multiply(ahead[i], kept + from, lane, rows);
        else product.multiply(ahead[i], panel(tile) + from, lane, rows);
      }
    }
    product.store(sums_ + (split * groups + group) * kRows * kCount * kTile, lane, rows);
  }

  const uint4* panels_;
  C* sums_;      // [splits, rows of a pass, columns, 8]
  uint4* kept_;  // [own tiles, kept chunks, kColumns, 32]
  const int64_t member_;
  unsigned long long* arrivals_;
  unsigned long long awaited_ = 0;
  const int64_t tiles_;
};

// Lays out weight_hh as pieces of 16 bytes, [tiles, chunks, kColumns, 8, 4]. Forward, column j of a tile holds gate j's
// rows of its units; backward, where kColumns is one, it holds the units' columns of all gates, one gate after another.
template <class S, bool kTensorCores, bool kBackward>
__global__ void pack_kernel(const __grid_constant__ LayerCommon args, int64_t gates, uint4* panels, int64_t pieces) {
  constexpr int kElements = kVector<S>;
  const int64_t H = args.hidden, depth = cuda_depth(H, sizeof(S)), columns = kBackward ? 1 : gates;
  const int64_t chunks = depth * (kBackward ? gates : 1) * static_cast<int64_t>(sizeof(S)) / kCudaChunkBytes;
  const S* weight = static_cast<const S*>(args.weight_hh);
  for (int64_t i = int64_t{blockIdx.x} * kLayerThreads + threadIdx.x; i < pieces;
       i += int64_t{gridDim.x} * kLayerThreads) {
    const int64_t unit = i / (columns * chunks * kPieces) * kTile + i % kPieces / kQuarters;
    const int64_t column = i / kPieces % columns, chunk = i / (columns * kPieces) % chunks;
    const int64_t k = (chunk * kQuarters + i % kQuarters) * kElements;
    Pack<S, kElements> piece = Pack<S, kElements>::zero();
    for (int e = 0; e < kElements; ++e) {
      const int64_t along = (k + e) % depth, gate = kBackward ? (k + e) / depth : column;
      if (unit >= H || along >= H) continue;
      const int64_t row = gate * H + (kBackward ? along : unit), at = kBackward ? unit : along;
      piece.data[e] = weight[row * args.weight_hh_stride + at];
    }
    uint4 words;
    memcpy(&words, &piece, sizeof(words));
    panels[i] = WarpProduct<S, kTensorCores, 1>::rounded(words);
  }
}

template <class S, bool kTensorCores, bool kBackward>
void pack_weights(const LayerCommon& args, int64_t gates, void* panels, void* stream) {
  const int64_t depth = cuda_depth(args.hidden, sizeof(S));
  const int64_t pieces = cuda_tiles(args.hidden) * kTile * gates * depth / kVector<S>;
  launch(pack_kernel<S, kTensorCores, kBackward>, grid_stride_blocks(pieces, kLayerThreads), dim3(kLayerThreads), 0,
         stream, args, gates, static_cast<uint4*>(panels), pieces);
}

// Starts a kernel by its plan.
template <class Args>
void launch_teams(void (*kernel)(Args, LayerPlan), const Args& args, const LayerPlan& plan, void* stream) {
  const dim3 grid(static_cast<unsigned>(plan.teams * plan.members)), block(kLayerThreads);
  if (plan.clusters) {
    launch_clusters(kernel, static_cast<unsigned>(plan.members), grid, block, plan.shared_bytes, stream, args, plan);
  } else {
    launch_together(kernel, grid, block, plan.shared_bytes, stream, args, plan);
  }
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
