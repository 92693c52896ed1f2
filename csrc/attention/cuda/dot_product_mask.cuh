// The gradient of a mask: a block owns a tile of its elements, and goes through all pairs of queries and keys, heads
// and batches that were broadcast from there, in one order. Where a mask has few elements the pairs are cut among
// several blocks, whose parts are summed in order.
#pragma once

#include "attention/cuda/dot_product_derivative.cuh"

namespace lect11ext::cuda {

// Tiles along a dimension: a block has its own one, or goes through all of them.
struct MaskWalk {
  int64_t own[4], along[4];  // batch, heads, tiles of queries, tiles of keys

  __host__ __device__ MaskWalk(const DerivativeArgs& args, const DerivativeSettings& plan, int columns) {
    const int64_t sizes[4] = {args.batch, args.heads, divide_up(args.queries, plan.tiles.size),
                              divide_up(args.keys, columns)};
    for (int d = 0; d < 4; ++d) {
      own[d] = plan.mask_sizes[d] == 1 ? 1 : sizes[d];
      along[d] = plan.mask_sizes[d] == 1 ? sizes[d] : 1;
    }
  }
  __host__ __device__ int64_t blocks() const { return own[0] * own[1] * own[2] * own[3]; }
  __host__ __device__ int64_t steps() const { return along[0] * along[1] * along[2] * along[3]; }

  // Number `index` of so many along each dimension.
  static __device__ void split(int64_t index, const int64_t (&sizes)[4], int64_t (&at)[4]) {
    for (int d = 3; d >= 0; --d) {
      const int64_t rest = divide(index, sizes[d]);
      at[d] = index - rest * sizes[d];
      index = rest;
    }
  }
};

template <class S, Part kPart, int kBound>
class MaskGradient : public Derivative<S, kPart, kBound> {
  using Base = Derivative<S, kPart, kBound>;
  using Base::args_, Base::plan_, Base::kCols, Base::kTiles;
  using typename Base::C, typename Base::KnownRows, typename Base::Spot, typename Base::State, typename Base::Sums;

 public:
  using Base::Base;

  __device__ void run() const {
    const MaskWalk walk(args_, plan_, kCols);
    const Lane lane;
    const int size = static_cast<int>(plan_.tiles.size);
    int64_t block[4];
    MaskWalk::split(blockIdx.x, walk.own, block);
    C total[kTiles][4] = {};
    const int64_t steps = walk.steps(), last = steps * (blockIdx.y + 1) / plan_.splits;
    for (int64_t step = steps * blockIdx.y / plan_.splits; step < last; ++step) {
      int64_t at[4];
      MaskWalk::split(step, walk.along, at);
      for (int d = 0; d < 4; ++d) at[d] += block[d];
      const Sequence sequence(args_, at[0]);
      const int head = static_cast<int>(at[1]), first_row = static_cast<int>(at[2]) * size;
      const int first_column = static_cast<int>(at[3]) * kCols;
      const Range keys = keys_seen(sequence, first_row, std::min(first_row + size, sequence.queries) - 1);
      if (first_column >= keys.last || first_column + kCols <= keys.first) continue;
      const Spot spot{first_row + 16 * lane.warp, head, head / this->group_};
      this->load_rows_of(sequence, first_row, head);
      this->load_columns(sequence, spot.kv_head, first_column, 0);
      copy_commit();
      copy_wait<0>();
      __syncthreads();
      if (spot.first_row < sequence.queries) {
        KnownRows own;
        this->know_rows(own, sequence, head, spot, lane);
        Sums sums;
        State state;
        uint32_t seen;
        if (this->weigh_tile(sums, seen, state, sequence, Dropout(args_, sequence), own, spot, first_column, 0, lane)) {
#pragma unroll
          for (int i = 0; i < 4 * kTiles; ++i) total[i / 4][i % 4] += sums.of[0][0][i / 4][i % 4];
        }
      }
      __syncthreads();
    }
    write(total, block, lane);
  }

 private:
  __device__ void write(C (&total)[kTiles][4], const int64_t (&block)[4], const Lane& lane) const {
    const int64_t (&sizes)[4] = plan_.mask_sizes;
    C* const parts = static_cast<C*>(plan_.splits == 1 ? args_.grad_mask : plan_.mask_parts);
    C* const out = parts + blockIdx.y * sizes[0] * sizes[1] * sizes[2] * sizes[3] +
                   (block[0] * sizes[1] + block[1]) * sizes[2] * sizes[3];
    const bool sum_rows = sizes[2] == 1, sum_columns = sizes[3] == 1;
    const int64_t first_row = block[2] * plan_.tiles.size + 16 * lane.warp, first_column = block[3] * kCols;
    // Sums over columns come to stand in column 0, those over rows in row 0.
    if (sum_columns) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        C sum = 0;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) sum += total[n][2 * half] + total[n][2 * half + 1];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        total[0][2 * half] = sum;
      }
    }
    if (!sum_rows) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        const int64_t row = first_row + lane.g + i % 4 / 2 * 8;
        const int64_t column = first_column + i / 4 * 8 + 2 * lane.q + i % 2;
        if (row < sizes[2] && column < sizes[3]) out[row * sizes[3] + column] = total[i / 4][i % 4];
      }
      return;
    }
    C* const of_warps = reinterpret_cast<C*>(this->rows_);  // [warps, kCols], where tiles were
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        C sum = total[n][e] + total[n][2 + e];
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (lane.g == 0) of_warps[lane.warp * kCols + 8 * n + 2 * lane.q + e] = sum;
      }
    }
    __syncthreads();
    for (int column = static_cast<int>(threadIdx.x); column < kCols; column += static_cast<int>(blockDim.x)) {
      if (first_column + column >= sizes[3]) continue;
      C sum = 0;
      for (int warp = 0; warp < plan_.warps; ++warp) sum += of_warps[warp * kCols + column];
      out[first_column + column] = sum;
    }
  }
};

}  // namespace lect11ext::cuda
