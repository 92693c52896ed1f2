// Sums over the rows of a tile (autoencoder/row_tiles.h) by a block.
#pragma once

#include "autoencoder/cuda/quads.cuh"
#include "autoencoder/row_tiles.h"

namespace lect11ext::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kRowTile = static_cast<int>(RowTiles::kElements);
// Of a block: a thread takes four quads, so that what a block does once is little beside what it does for elements.
inline constexpr int kTileThreads = 64;

// Sums of the `rows` rows of a tile, of `width` values each: neighbouring lanes of a warp share a row, each adds every
// lanes-th value of it, and the lanes' sums are added as a tree. There are as many lanes as let the rows of a full tile
// be summed at once, so that the order depends on the length of a row alone. The block's registers wait meanwhile: no
// division and few branches are in the way.
template <class T>
__device__ inline void sum_rows(const T* values, int rows, int rows_per_tile, int width, T* out) {
  constexpr int kAtOnce = 4;
  if (rows_per_tile > kTileThreads / 2) {
#pragma unroll 1
    for (int row = threadIdx.x; row < rows; row += kTileThreads) {
      T sum = T(0);
#pragma unroll 1
      for (int i = 0; i < width; ++i) sum += values[row * width + i];
      out[row] = sum;
    }
    return;
  }
  const int most = __clz(rows_per_tile * 2 - 1) - __clz(kTileThreads), log_lanes = most < 5 ? most : 5;
  const int lanes = 1 << log_lanes, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int row = static_cast<int>(threadIdx.x) >> log_lanes;
  T sum = T(0);
#pragma unroll 1
  for (int i = row < rows ? lane : width; i < width; i += kAtOnce * lanes) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (i + k * lanes < width) sum += values[row * width + i + k * lanes];
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(~0u, sum, distance);
    if (distance < lanes) sum += other;
  }
  if (lane == 0 && row < rows) out[row] = sum;
}

// The elements of a tile, and the way from their values to its sums: through shared memory of kRowTile numbers.
template <class Access>
struct TileRange {
  int64_t row, begin;  // number of its first sum; its first element
  int rows = 1, rows_per_tile, width, count;
  bool quads_in_rows;  // every quad is whole and of one row, and its sum is formed in registers

  __device__ TileRange(const RowTiles& tiles, int64_t t)
      : rows_per_tile(static_cast<int>(tiles.rows_per_tile)), quads_in_rows(Access::kDense || tiles.cols % kQuad == 0) {
    if (tiles.tiles_per_row > 1) {
      const int64_t whole = divide(t, tiles.tiles_per_row), within = (t - whole * tiles.tiles_per_row) * kRowTile;
      begin = whole * tiles.cols + within;
      width = static_cast<int>(tiles.cols - within < kRowTile ? tiles.cols - within : kRowTile);
      row = t;  // one sum a tile
    } else {
      row = t * tiles.rows_per_tile;
      const int64_t left = tiles.rows - row;
      rows = static_cast<int>(left < tiles.rows_per_tile ? left : tiles.rows_per_tile);
      begin = row * tiles.cols;
      width = static_cast<int>(tiles.cols);
    }
    count = rows * width;
  }

  static bool fits(const RowTiles& tiles) { return !Access::kDense || tiles.cols % kQuad == 0; }

  // The number of passes over the tile, of `kQuads` quads a thread each: one more for one thread where it begins inside
  // a quad.
  template <int kQuads>
  __device__ int passes() const {
    constexpr int kPass = kQuads * kTileThreads * kQuad;
    return (lead() + count + kPass - 1) / kPass;
  }
  // Quad number j of this thread.
  __device__ Quad quad(int j) const {
    const int place = (j * kTileThreads + static_cast<int>(threadIdx.x)) * kQuad;
    return Quad(begin - lead() + place, place - lead(), count);
  }

  template <class T>
  __device__ void put(const Quad& quad, const T* values, T* shared) const {
    const int place = static_cast<int>(quad.first - begin);
    if (quads_in_rows) {
      if (!quad.empty()) shared[place / kQuad] = (values[0] + values[1]) + (values[2] + values[3]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (quad.holds(i)) shared[place + i] = values[i];
    }
  }

  // Called by all threads of the block, after all of them have put theirs.
  template <class T>
  __device__ void sum(const T* shared, T* out) const {
    __syncthreads();
    sum_rows(shared, rows, rows_per_tile, quads_in_rows ? width / kQuad : width, out + row);
  }

 private:
  __device__ int lead() const { return Access::kDense ? 0 : static_cast<int>(begin) & (kQuad - 1); }
};

}  // namespace lect11ext::cuda
