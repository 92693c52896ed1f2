// Which tiles of a mask let everything through, which nothing: the kernels of sm_90a treat the first as if there were
// no mask, and leave the second out, so that padding, documents side by side and other masks of blocks cost what is
// seen of them. Finding out costs one read of the mask, which is short beside the work of all heads.
#pragma once

#include "attention/cuda/dot_product_score.cuh"

namespace lect11ext::cuda {

struct MaskTiles {
  static constexpr int kSize = 64;  // queries and keys
  // What a tile has: both where it has some of either, or what is to be added.
  static constexpr int kSeen = 1, kBarred = 2;

  uint8_t* states;           // null: not known
  int64_t batch, head, row;  // distances; 0 where the mask is broadcast
  int batches, heads, rows, columns;

  // The mask of every head by itself is read once anyway, by the kernel.
  static bool pays(const Attention& args) {
    const bool shared = args.mask.strides[1] == 0 && args.heads > 1;
    return args.query_starts == nullptr &&
           (args.mask.type == MaskType::Bool || (args.mask.type != MaskType::None && shared));
  }

  static MaskTiles of(const Attention& args, void* data) {
    MaskTiles tiles{};
    if (!pays(args)) return tiles;
    const auto count = [](int64_t size) { return static_cast<int>((size + kSize - 1) / kSize); };
    const auto along = [&](int d, int64_t size) { return static_cast<int>(args.mask.strides[d] == 0 ? 1 : size); };
    tiles.states = static_cast<uint8_t*>(data);
    tiles.batches = along(0, args.batch), tiles.heads = along(1, args.heads),
    tiles.rows = along(2, count(args.queries));
    tiles.columns = count(args.keys);
    tiles.row = tiles.rows == 1 ? 0 : tiles.columns;
    tiles.head = tiles.heads == 1 ? 0 : int64_t{tiles.rows} * tiles.columns;
    tiles.batch = tiles.batches == 1 ? 0 : int64_t{tiles.heads} * tiles.rows * tiles.columns;
    return tiles;
  }

  __host__ __device__ int64_t count() const { return int64_t{batches} * heads * rows * columns; }
  // Of scratch, and what lies behind it is aligned.
  int64_t bytes() const { return (count() + 255) / 256 * 256; }

  // Of kRows × kColumns tiles from a query and a key on, multiples of kSize, as far as there are some; else 0.
  template <int kRows, int kColumns>
  __device__ int state(int64_t of_batch, int of_head, int query, int key) const {
    if (states == nullptr) return kSeen | kBarred;
    const uint8_t* at = states + of_batch * batch + of_head * head;
    int found = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int tile_row = query / kSize + r;
      if (row == 0 ? r > 0 : tile_row >= rows) break;
      const uint8_t* const from = at + tile_row * row + key / kSize;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c == 0 || key / kSize + c < columns) found |= from[c];
      }
    }
    return found;
  }
};

namespace {

constexpr int kMaskTileThreads = 256;

template <class T>
__global__ void __launch_bounds__(kMaskTileThreads)
    mask_tiles_kernel(const __grid_constant__ Attention args, const __grid_constant__ MaskTiles tiles) {
  constexpr int kSize = MaskTiles::kSize;
  const auto* const mask = static_cast<const T*>(args.mask.data);
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    const int64_t line = divide(i, tiles.columns), column = i - line * tiles.columns;
    const int64_t unit = divide(line, tiles.rows), row = line - unit * tiles.rows;
    const int64_t batch = divide(unit, tiles.heads), head = unit - batch * tiles.heads;
    const int64_t first = batch * args.mask.strides[0] + head * args.mask.strides[1];
    const int64_t rows = args.mask.strides[2] == 0 ? 1 : args.queries;
    bool seen = false, barred = false;
    for (int e = static_cast<int>(threadIdx.x); e < kSize * kSize; e += kMaskTileThreads) {
      const int64_t query = row * kSize + e / kSize, key = column * kSize + e % kSize;
      if (query >= rows || key >= args.keys) continue;
      const T x = mask[first + query * args.mask.strides[2] + key * args.mask.strides[3]];
      if constexpr (std::is_same_v<T, uint8_t>) {
        (x != 0 ? seen : barred) = true;
      } else {
        const float added = from_storage<float>(x);
        seen |= added != -INFINITY;
        barred |= added != 0;
      }
    }
    const bool any_seen = __syncthreads_count(seen) > 0, any_barred = __syncthreads_count(barred) > 0;
    if (threadIdx.x == 0) {
      tiles.states[i] = static_cast<uint8_t>((any_seen ? MaskTiles::kSeen : 0) | (any_barred ? MaskTiles::kBarred : 0));
    }
  }
}

// Finds the states of a mask of queries of type S.
template <class S>
void find_mask_tiles(const Attention& args, const MaskTiles& tiles, void* stream) {
  if (tiles.states == nullptr) return;
  const dim3 blocks = grid_stride_blocks(tiles.count(), 1);
  const auto start = [&](auto* kernel) { launch(kernel, blocks, kMaskTileThreads, 0, stream, args, tiles); };
  if (args.mask.type == MaskType::Bool) start(mask_tiles_kernel<uint8_t>);
  else if (args.mask.type == MaskType::Float) start(mask_tiles_kernel<float>);
  else start(mask_tiles_kernel<S>);
}

}  // namespace
}  // namespace lect11ext::cuda
