// A warp's part of a step's product: some rows of the batch times tiles of eight columns, over chunks of the depth.
//
// Operands and weights are read in pieces of 16 bytes. With g = lane / 4 and q = lane % 4, a lane holds the q-th
// quarter of a chunk of column g of every tile: the order in which tensor cores want it, if the words of a quarter are
// taken two by two.
#pragma once

#include "common/cuda/mma.cuh"
#include "recurrent/layer_cuda.h"

namespace lect11ext::cuda {

inline constexpr int kLayerThreads = 256;
inline constexpr int kLayerWarps = kLayerThreads / 32;
// Warps side by side, along the batch and along tiles together, are at most 4; so a thread has at most two units a
// pass.
inline constexpr int kLayerGroupBits = 2, kLayerItems = 2;
inline constexpr int kTile = static_cast<int>(kCudaTileUnits), kTileBits = 3;
static_assert(kTile == 1 << kTileBits);
inline constexpr int kQuarters = 4;
inline constexpr int kPieces = kTile * kQuarters;  // of a tile's chunk: one for each lane

// From row to row of sums of so many tiles: an odd number of tiles, so that four rows lie in different banks.
constexpr int sum_stride(int tiles) { return (tiles | 1) * kTile; }

struct Lane {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / kQuarters, q = lane % kQuarters;
};

// On tensor cores: all but double, and float only where TF32 is allowed.
template <class S, bool kTensorCores, int kTiles>
class WarpProduct {
 public:
  static constexpr int kRows = 16;

  // The pieces of a chunk of rows g and g + 8 of an operand.
  struct Operand {
    uint4 low, high;

    template <class Read>
    __device__ void load(const Lane& lane, const S* first, int64_t stride, int rows, Read read) {
      const auto piece = [&](int row) {
        return row < rows ? read(reinterpret_cast<const uint4*>(first + row * stride) + lane.q) : uint4{0, 0, 0, 0};
      };
      low = piece(lane.g);
      high = piece(lane.g + 8);
    }
  };

  // weights(tile) are this lane's.
  template <class Weights>
  __device__ void multiply(const Operand& rows, Weights weights_of, int) {
    const uint4 low = rounded(rows.low), high = rounded(rows.high);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 weights = weights_of(tile);
      mma<S>(sums_[tile], {low.x, high.x, low.y, high.y}, {weights.x, weights.y});
      mma<S>(sums_[tile], {low.z, high.z, low.w, high.w}, {weights.z, weights.w});
    }
  }

  // To [kRows, sum_stride].
  __device__ void store(float* to, const Lane& lane, int) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const row = to + (lane.g + half * 8) * sum_stride(kTiles) + tile * kTile;
        reinterpret_cast<float2*>(row)[lane.q] = {sums_[tile][2 * half], sums_[tile][2 * half + 1]};
      }
    }
  }

  static __device__ uint4 rounded(uint4 words) {
    return {tensor_word<S>(words.x), tensor_word<S>(words.y), tensor_word<S>(words.z), tensor_word<S>(words.w)};
  }

 private:
  float sums_[kTiles][4] = {};
};

// By multiply-adds of S itself: every lane a quarter of a chunk, of all rows.
template <class S, int kTiles>
class WarpProduct<S, false, kTiles> {
  static constexpr int kElements = kVector<S>;  // of a piece

 public:
  static constexpr int kRows = sizeof(S) == 8 ? 8 : 16;  // their sums fill half the registers

  struct Operand {
    Pack<S, kElements> rows[kRows];

    template <class Read>
    __device__ void load(const Lane& lane, const S* first, int64_t stride, int count, Read read) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= count) break;
        const uint4 words = read(reinterpret_cast<const uint4*>(first + row * stride) + lane.q);
        memcpy(&rows[row], &words, sizeof(words));
      }
    }
  };

  template <class Weights>
  __device__ void multiply(const Operand& operand, Weights weights_of, int count) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 words = weights_of(tile);
      Pack<S, kElements> weights;
      memcpy(&weights, &words, sizeof(weights));
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= count) break;
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          sums_[tile][row] = std::fma(operand.rows[row].data[i], weights.data[i], sums_[tile][row]);
        }
      }
    }
  }

  __device__ void store(S* to, const Lane& lane, int count) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= count) break;
        S sum = sums_[tile][row];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane.q == 0) to[row * sum_stride(kTiles) + tile * kTile + lane.g] = sum;
      }
    }
  }

  static __device__ uint4 rounded(uint4 words) { return words; }

 private:
  S sums_[kTiles][kRows] = {};
};

}  // namespace lect11ext::cuda
