// How the blocks of a layer's kernel share the work: teams, their tiles of units and rows of the batch, the weights
// that a block keeps, a step's product, and the barrier between steps. Who gets what: layer_plan.cuh.
#pragma once

#include "common/cuda/math.cuh"
#include "recurrent/cuda/layer_pack.cuh"
#include "recurrent/cuda/layer_plan.cuh"

namespace lect11ext::cuda {

// Row (t, b) of a tensor over time; null of null.
template <class T>
__device__ inline T* over_time(T* tensor, TimeStrides strides, int64_t t, int64_t b) {
  return tensor == nullptr ? nullptr : tensor + t * strides.step + b * strides.row;
}

// One block's part, for products with kColumns tiles of weights for each tile of units. What is multiplied has kParts
// parts to a row, one behind the other.
template <class S, bool kTensorCores, int kColumns, int kParts>
class LayerTeam {
 public:
  // For `states` that stay with their units' threads.
  static LayerNeeds needs(const LayerCommon& args, int64_t states) {
    LayerNeeds needs{};
    needs.rows = kRows;
    needs.chunks = kParts * cuda_depth(args.hidden, sizeof(S)) * int64_t{sizeof(S)} / kCudaChunkBytes;
    needs.chunk_bytes = kColumns * kPieces * kVectorBytes;
    needs.sum_bytes = kSumBytes;
    needs.state_bytes = states * int64_t{sizeof(C)};
    return needs;
  }

 protected:
  using C = Compute<S>;
  template <int kTiles>
  using Product = WarpProduct<S, kTensorCores, kTiles>;
  static constexpr int kRows = Product<kColumns>::kRows;
  static constexpr int kPassRows = kRows << kLayerGroupBits;  // at most
  static_assert(kPassRows * kTile <= kLayerItems * kLayerThreads && kLayerItems == 2);
  // Shared memory besides weights: the warps' sums, and two numbers for every row of a pass.
  static constexpr int64_t kNumbersAt = kLayerWarps * kRows * sum_stride(kColumns), kSums = kNumbersAt + kPassRows * 2;
  static constexpr int64_t kSumBytes = kSums * sizeof(C);

  // Rows of this team of what is multiplied.
  struct Rows {
    S* first;
    int64_t stride;
  };

  __device__ LayerTeam(const LayerCommon& args, const LayerPlan& plan, const void* panels, void* arrivals,
                       unsigned char* shared)
      : common_(args),
        plan_(plan),
        depth_(cuda_depth(args.hidden, sizeof(S))),
        panels_(static_cast<const uint4*>(panels)),
        sums_(reinterpret_cast<C*>(shared)),
        states_(reinterpret_cast<C*>(shared + plan.states_at)),
        kept_(reinterpret_cast<uint4*>(shared + plan.kept_at)),
        member_(blockIdx.x % plan.members),
        arrivals_(static_cast<unsigned long long*>(arrivals) + blockIdx.x / plan.members * kCudaArrivals),
        tiles_(cuda_tiles(args.hidden)),
        first_tile_(std::min(member_ * plan.own_tiles, tiles_)),
        last_tile_(std::min(first_tile_ + plan.own_tiles, tiles_)) {
    const int64_t team = blockIdx.x / plan.members;
    first_row_ = args.batch * team / plan.teams;
    last_row_ = args.batch * (team + 1) / plan.teams;
  }

  // Before anything else.
  __device__ void prepare() {
    keep_weights();
    __syncthreads();
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

  // Calls back with the first tile of those that go side by side, and the first row of every pass.
  template <class Call>
  __device__ void each_pass(Call call) const {
    for (int64_t tile = first_tile_; tile < last_tile_; tile += int64_t{1} << plan_.tile_shift) {
      for (int64_t row = first_row_; row < last_row_; row += rows_of_pass()) call(tile, row);
    }
  }
  __device__ int64_t rows_of_pass() const { return int64_t{kRows} << plan_.row_shift; }
  __device__ int64_t end_of_pass(int64_t first_row) const { return std::min(first_row + rows_of_pass(), last_row_); }
  __device__ int64_t units(int64_t tile) const { return std::min<int64_t>(kTile, common_.hidden - tile * kTile); }

  // Calls back with every tile of a pass.
  template <class Call>
  __device__ void each_tile_of(int64_t tile, Call call) const {
    const int64_t end = std::min(tile + (int64_t{1} << plan_.tile_shift), last_tile_);
    for (; tile < end; ++tile) call(tile);
  }

  // Items of a pass, each a unit of a row. A thread's are always the same: threadIdx.x, and kLayerThreads more.
  __device__ int items() const { return kRows * kTile << (plan_.row_shift + plan_.tile_shift); }

  // Calls back with an item's row and unit, if there is such an item.
  template <class Call>
  __device__ void with_item(int64_t tile, int64_t first_row, int item, Call call) const {
    const int width = kTile << plan_.tile_shift;
    const int64_t row = first_row + (item >> (kTileBits + plan_.tile_shift)),
                  unit = tile * kTile + (item & (width - 1));
    if (item < items() && row < last_row_ && unit < std::min(last_tile_ * kTile, common_.hidden)) call(row, unit);
  }

  template <class Call>
  __device__ void each_unit_of(int64_t tile, int64_t first_row, Call call) const {
    for (int item = threadIdx.x; item < items(); item += kLayerThreads) with_item(tile, first_row, item, call);
  }

  template <class Call>
  __device__ void each_unit(Call call) const {
    each_pass([&](int64_t tile, int64_t row) { each_unit_of(tile, row, call); });
  }

  // A unit's value of state number `which`, in shared memory where there is room, else in `tensor`, [B, H] of T.
  template <class T = C>
  __device__ T& state(int which, void* tensor, int64_t b, int64_t unit) const {
    if (!plan_.near_states) return static_cast<T*>(tensor)[at(b, unit)];
    const int64_t width = plan_.own_tiles * kTile, row = which * plan_.team_rows + b - first_row_;
    return reinterpret_cast<T&>(states_[row * width + unit - first_tile_ * kTile]);
  }

  // --- what is multiplied

  // Of `tensor`, [B, kParts · depth].
  __device__ Rows rows_of(void* tensor) const {
    const int64_t stride = kParts * depth_;
    return {static_cast<S*>(tensor) + first_row_ * stride, stride};
  }
  __device__ S& operand(void* tensor, int64_t b, int part, int64_t unit) const {
    const Rows rows = rows_of(tensor);
    return rows.first[(b - first_row_) * rows.stride + part * depth_ + unit];
  }

  // Waits for all blocks of the team, and for what they have written: one thread of each counts itself, after the rest
  // of its block, and looks on.
  __device__ void wait() {
    __syncthreads();
    awaited_ += plan_.members;
    if (threadIdx.x == 0 && plan_.members > 1) {
      count_arrival(arrivals_);
      while (arrivals(arrivals_) < awaited_) pause();
    }
    __syncthreads();
  }

  // --- products

  // Chunks first … last − 1 of the depth of `operand` times columns kFirst … kFirst + kCount − 1 of the weights. Calls
  // back with every unit of this thread: load(b, unit), before the product, so that what it reads comes meanwhile, and
  // finish(b, unit, what it read, sums) after it.
  template <int kFirst, int kCount, class Load, class Finish>
  __device__ void multiply(Rows operand, int first, int last, Load load, Finish finish) {
    each_pass([&](int64_t tile, int64_t row) {
      decltype(load(row, row)) loaded[kLayerItems] = {};
#pragma unroll
      for (int i = 0; i < kLayerItems; ++i) {
        with_item(tile, row, threadIdx.x + i * kLayerThreads,
                  [&](int64_t b, int64_t unit) { loaded[i] = load(b, unit); });
      }
      warp_product<kFirst, kCount>(operand, tile, row, first, last);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kLayerItems; ++i) {
        const int item = threadIdx.x + i * kLayerThreads;
        with_item(tile, row, item, [&](int64_t b, int64_t unit) {
          C sums[kCount] = {};
          add_sums<kCount>(item, sums);
          finish(b, unit, loaded[i], sums);
        });
      }
      __syncthreads();
    });
  }

  // --- two numbers for every row of a pass

  __device__ C* row_numbers(int64_t row_of_pass) const { return sums_ + kNumbersAt + 2 * row_of_pass; }

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
  const int64_t depth_;  // of a part
  int64_t first_row_, last_row_;

 private:
  // Chunks whose rows are on their way at a time, as far as registers reach: reading from the L2 cache takes longer
  // than multiplying.
  static constexpr int kAhead = sizeof(typename Product<kColumns>::Operand) > 64 ? 1 : 4;

  __device__ const uint4* panel(int64_t tile) const { return panels_ + tile * plan_.chunks * kColumns * kPieces; }

  // A warp's part: rows, a tile, and every how many-th chunk of the depth.
  struct Part {
    int row, tile, split, splits;
  };
  __device__ Part part_of(int warp) const {
    const int shift = plan_.row_shift + plan_.tile_shift;
    return {kRows * (warp & ((1 << plan_.row_shift) - 1)), warp >> plan_.row_shift & ((1 << plan_.tile_shift) - 1),
            warp >> shift, kLayerWarps >> shift};
  }

  // --- weights

  __device__ void keep_weights() {
    const int64_t pieces = plan_.kept_chunks * kColumns * kPieces;
    uint4* to = kept_;
    for (int64_t tile = first_tile_; tile < last_tile_; ++tile, to += pieces) {
      for (int64_t i = threadIdx.x; i < pieces; i += kLayerThreads) to[i] = panel(tile)[i];
    }
  }

  // --- products

  template <int kFirst, int kCount>
  __device__ void warp_product(Rows operand, int64_t first_tile, int64_t row, int first, int last) {
    using Tiles = Product<kCount>;
    const Lane lane;
    const Part part = part_of(lane.warp);
    const int64_t first_row = row + part.row, tile = first_tile + part.tile;
    const int rows = static_cast<int>(std::min<int64_t>(last_row_ - first_row, kRows));
    if (rows <= 0 || tile >= last_tile_) return;
    const S* from = operand.first + (first_row - first_row_) * operand.stride;
    Tiles product;
    __syncwarp();  // lanes may have come apart over their items
    multiply<kFirst>(product, from, operand.stride, rows, tile, part, first, last);
    product.store(sums_ + lane.warp * kRows * sum_stride(kCount), lane, rows);
  }

  static __device__ uint4 read_piece(const uint4* piece) { return __ldcg(piece); }

  // By weights of shared memory, and of the L2 cache what is not there.
  template <int kFirst, class Tiles>
  __device__ void multiply(Tiles& product, const S* from, int64_t stride, int rows, int64_t tile, Part part, int first,
                           int last) {
    const Lane lane;
    const uint4* kept = kept_ + (tile - first_tile_) * plan_.kept_chunks * kColumns * kPieces;
    for (int chunk = first + part.split; chunk < last; chunk += kAhead * part.splits) {
      typename Tiles::Operand ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = chunk + i * part.splits;
        if (at < last) ahead[i].load(lane, from + at * kChunk, stride, rows, read_piece);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = chunk + i * part.splits;
        if (at >= last) break;
        const auto by = [&](const uint4* tiles) {
          tiles += (at * kColumns + kFirst) * kPieces + lane.lane;
          product.multiply(ahead[i], [&](int t) { return tiles[t * kPieces]; }, rows);
        };
        // Two calls, so that each knows which memory it reads.
        if (at < plan_.kept_chunks) by(kept);
        else by(panel(tile));
      }
    }
  }

  // What the warps have found for an item, in the order of their chunks.
  template <int kCount>
  __device__ void add_sums(int item, C (&sums)[kCount]) const {
    const int row = item >> (kTileBits + plan_.tile_shift), tile = item >> kTileBits & ((1 << plan_.tile_shift) - 1);
    const int shift = plan_.row_shift + plan_.tile_shift;
    const int first = (tile << plan_.row_shift) + row / kRows;
    for (int split = 0; split < kLayerWarps >> shift; ++split) {
      const C* from = sums_ + (((split << shift) + first) * kRows + row % kRows) * sum_stride(kCount) + item % kTile;
#pragma unroll
      for (int column = 0; column < kCount; ++column) sums[column] += from[column * kTile];
    }
  }

  static constexpr int64_t kChunk = kCudaChunkBytes / sizeof(S);
  const uint4* panels_;
  // In shared memory:
  C* sums_;      // [warps, kRows, sum_stride], then the rows' numbers
  C* states_;    // [states, rows of the team, own units]
  uint4* kept_;  // [own tiles, kept chunks, kColumns, 32]
  const int64_t member_;
  unsigned long long* arrivals_;
  unsigned long long awaited_ = 0;
  const int64_t tiles_, first_tile_, last_tile_;
};

}  // namespace lect11ext::cuda
