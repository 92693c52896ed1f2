// Sums over the rows of a tile (autoencoder/row_tiles.h) by a block, whose threads take four elements each.
#pragma once

#include "autoencoder/cuda/quads.cuh"
#include "autoencoder/row_tiles.h"

namespace lect11ext::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarp = 32;
inline constexpr int kTile = static_cast<int>(RowTiles::kElements);
static_assert(kTile == kThreads * kQuad);

// Sums of `rows` consecutive rows of `width` values each, in an order that depends on `width` alone: neighbouring lanes
// of a warp share a row, each adds every lanes-th value of it, and the lanes' sums are added as a tree.
template <class T>
__device__ inline void sum_rows(const T* values, int rows, int width, T* out) {
  int lanes = 1;
  while (lanes < width && lanes < kWarp) lanes *= 2;
  const int lane = threadIdx.x % lanes, rows_at_once = kThreads / lanes;
  // All threads of a warp stay in the loop for as long as one of them has a row, as the shuffles require.
  for (int base = 0; base < rows; base += rows_at_once) {
    const int row = base + threadIdx.x / lanes;
    T sum = T(0);
    if (row < rows) {
      for (int i = lane; i < width; i += lanes) sum += values[row * width + i];
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0 && row < rows) out[row] = sum;
  }
}

// The elements of a tile, and the way from their values to its sums: through shared memory of kTile numbers.
struct TileRange {
  int64_t row, begin, end;  // number of its first sum; its elements
  int rows = 1;
  bool quads_in_rows;  // every quad is whole and of one row, and its sum is formed in registers

  __device__ TileRange(const RowTiles& tiles, int64_t t) : quads_in_rows(tiles.cols % kQuad == 0) {
    if (tiles.tiles_per_row > 1) {
      const int64_t whole = divide(t, tiles.tiles_per_row), within = (t - whole * tiles.tiles_per_row) * kTile;
      begin = whole * tiles.cols + within;
      end = begin + (tiles.cols - within < kTile ? tiles.cols - within : kTile);
      row = t;  // one sum a tile
    } else {
      row = t * tiles.rows_per_tile;
      const int64_t left = tiles.rows - row;
      rows = static_cast<int>(left < tiles.rows_per_tile ? left : tiles.rows_per_tile);
      begin = row * tiles.cols;
      end = begin + rows * tiles.cols;
    }
  }

  // Of this thread. The next is kTile further on: only for one thread, where the tile begins inside a quad.
  __device__ int64_t first_quad() const { return begin / kQuad * kQuad + kQuad * threadIdx.x; }

  template <class T>
  __device__ void put(const Quad& quad, const T* values, T* shared) const {
    if (quads_in_rows) {
      shared[(quad.first - begin) / kQuad] = (values[0] + values[1]) + (values[2] + values[3]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (quad.holds(i)) shared[quad.first - begin + i] = values[i];
    }
  }

  // Called by all threads of the block, after all of them have put theirs.
  template <class T>
  __device__ void sum(const T* shared, T* out) const {
    __syncthreads();
    const int width = static_cast<int>((end - begin) / rows) / (quads_in_rows ? kQuad : 1);
    sum_rows(shared, rows, width, out + row);
  }
};

}  // namespace lect11ext::cuda
