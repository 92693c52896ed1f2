// Which tiles of a mask let everything through, which nothing: the kernels of sm_90a treat the first as if there were
// no mask, and leave the second out, so that padding, documents side by side and other masks of blocks cost what is
// seen of them. Finding out costs one read of the mask, of a byte a pair where it is a bool, and short beside the work
// of all heads where they share it.
#pragma once

#include <algorithm>

#include "attention/cuda/dot_product_score.cuh"

namespace lect11ext::cuda {

struct MaskTiles {
  static constexpr int kSize = 64;  // queries and keys
  // What a tile has: both where it has some of either, or what is to be added.
  static constexpr int kSeen = 1, kBarred = 2;

  uint8_t* states;
  int64_t batch, head, row;  // distances; 0 where there is one
  int batches, heads, rows, columns;
  bool same_rows;  // broadcast along the queries

  __host__ __device__ bool known() const { return columns > 0; }

  // An additive mask of every head by itself is read once anyway, by the kernel.
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
    tiles.same_rows = args.mask.strides[2] == 0;
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
    if (!known()) return kSeen | kBarred;
    const uint8_t* at = states + of_batch * batch + of_head * head;
    int found = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int tile_row = query / kSize + r;
      if (same_rows ? r > 0 : tile_row >= rows) break;
      const uint8_t* const from = at + tile_row * row + key / kSize;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (key / kSize + c < columns) found |= from[c];
      }
    }
    return found;
  }
};

// Of tiles of queries and keys, of some states each, how many of the tiles of keys before one let something through.
struct MaskRanks {
  int32_t* ranks;
  int64_t batch, head;   // distances; 0 where there is one
  int rows, columns;     // tiles of queries, one where all are the same; of keys, and one behind
  int per_row, per_key;  // states

  __host__ __device__ bool known() const { return columns > 0; }

  static MaskRanks of(const MaskTiles& tiles, int queries, int keys, void* data) {
    MaskRanks ranks{};
    if (!tiles.known()) return ranks;
    ranks.ranks = static_cast<int32_t*>(data);
    ranks.per_row = queries / MaskTiles::kSize, ranks.per_key = keys / MaskTiles::kSize;
    ranks.rows = tiles.same_rows ? 1 : (tiles.rows + ranks.per_row - 1) / ranks.per_row;
    ranks.columns = (tiles.columns + ranks.per_key - 1) / ranks.per_key + 1;
    ranks.head = tiles.heads == 1 ? 0 : int64_t{ranks.rows} * ranks.columns;
    ranks.batch = tiles.batches == 1 ? 0 : int64_t{tiles.heads} * ranks.rows * ranks.columns;
    return ranks;
  }

  // Of scratch, and what lies behind it is aligned.
  int64_t bytes(const MaskTiles& tiles) const {
    const int64_t count = int64_t{tiles.batches} * tiles.heads * rows * columns;
    return (static_cast<int64_t>(sizeof(int32_t)) * count + 255) / 256 * 256;
  }

  // Rows of queries lie side by side, as the backward goes through them.
  __device__ int32_t& at(int64_t of_batch, int of_head, int row, int column) const {
    return ranks[of_batch * batch + of_head * head + int64_t{column} * rows + (rows == 1 ? 0 : row)];
  }

  // Of the tiles of keys from `first` to `last` − 1 those of which a tile of queries sees something.
  __device__ int between(int64_t of_batch, int of_head, int row, int first, int last) const {
    if (!known()) return last - first;
    return at(of_batch, of_head, row, last) - at(of_batch, of_head, row, first);
  }
};

namespace {

constexpr int kMaskTileThreads = 256, kPiece = 16;

__device__ inline bool has_zero_byte(uint32_t word) { return ((word - 0x01010101u) & ~word & 0x80808080u) != 0; }

// Whether a bool mask can be read by sixteen bytes, of one row each.
inline bool in_pieces(const Attention& args) {
  const int64_t* const strides = args.mask.strides;
  return args.mask.type == MaskType::Bool && strides[3] == 1 && args.keys % kPiece == 0 &&
         reinterpret_cast<uintptr_t>(args.mask.data) % kPiece == 0 &&
         std::all_of(strides, strides + 3, [](int64_t stride) { return stride % kPiece == 0; });
}

// `pieces`: a thread has sixteen bytes, and not every kMaskTileThreads-th element.
template <class T>
__global__ void __launch_bounds__(kMaskTileThreads)
    mask_tiles_kernel(const __grid_constant__ Attention args, const __grid_constant__ MaskTiles tiles, bool pieces) {
  constexpr int kSize = MaskTiles::kSize, kPieces = kSize / kPiece;
  static_assert(kMaskTileThreads * kPiece == kSize * kSize);
  const auto* const mask = static_cast<const T*>(args.mask.data);
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    const int64_t line = divide(i, tiles.columns), column = i - line * tiles.columns;
    const int64_t unit = divide(line, tiles.rows), row = line - unit * tiles.rows;
    const int64_t batch = divide(unit, tiles.heads), head = unit - batch * tiles.heads;
    const int64_t first = batch * args.mask.strides[0] + head * args.mask.strides[1];
    const int64_t rows = args.mask.strides[2] == 0 ? 1 : args.queries;
    bool seen = false, barred = false;
    if (pieces) {
      const int64_t query = row * kSize + static_cast<int>(threadIdx.x) / kPieces;
      const int64_t key = column * kSize + static_cast<int>(threadIdx.x) % kPieces * kPiece;
      if (query < rows && key < args.keys) {
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(mask + first + query * args.mask.strides[2] + key));
#pragma unroll
        for (const uint32_t word : {words.x, words.y, words.z, words.w}) {
          seen |= word != 0;
          barred |= has_zero_byte(word);
        }
      }
    }
    for (int e = pieces ? kSize * kSize : static_cast<int>(threadIdx.x); e < kSize * kSize; e += kMaskTileThreads) {
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

// A thread for a row of tiles.
__global__ void __launch_bounds__(kMaskTileThreads)
    mask_ranks_kernel(const __grid_constant__ MaskTiles tiles, const __grid_constant__ MaskRanks ranks) {
  const int64_t i = int64_t{blockIdx.x} * kMaskTileThreads + threadIdx.x;
  if (i >= int64_t{tiles.batches} * tiles.heads * ranks.rows) return;
  const int64_t unit = divide(i, ranks.rows), batch = divide(unit, tiles.heads);
  const int head = static_cast<int>(unit - batch * tiles.heads), row = static_cast<int>(i - unit * ranks.rows);
  int32_t rank = 0;
  for (int column = 0; column < ranks.columns; ++column) {
    ranks.at(batch, head, row, column) = rank;
    int state = 0;
    for (int r = 0; r < ranks.per_row; ++r) {
      for (int c = 0; c < ranks.per_key; ++c) {
        state |= tiles.state<1, 1>(batch, head, (row * ranks.per_row + r) * MaskTiles::kSize,
                                   (column * ranks.per_key + c) * MaskTiles::kSize);
      }
    }
    rank += (state & MaskTiles::kSeen) != 0;
  }
}

inline void find_mask_ranks(const MaskTiles& tiles, const MaskRanks& ranks, void* stream) {
  if (!ranks.known()) return;
  const int64_t count = int64_t{tiles.batches} * tiles.heads * ranks.rows;
  launch(mask_ranks_kernel, grid_size((count + kMaskTileThreads - 1) / kMaskTileThreads), kMaskTileThreads, 0, stream,
         tiles, ranks);
}

// Finds the states of a mask of queries of type S.
template <class S>
void find_mask_tiles(const Attention& args, const MaskTiles& tiles, void* stream) {
  if (!tiles.known()) return;
  const dim3 blocks = grid_stride_blocks(tiles.count(), 1);
  const bool pieces = in_pieces(args);
  const auto start = [&](auto* kernel) { launch(kernel, blocks, kMaskTileThreads, 0, stream, args, tiles, pieces); };
  if (args.mask.type == MaskType::Bool) start(mask_tiles_kernel<uint8_t>);
  else if (args.mask.type == MaskType::Float) start(mask_tiles_kernel<float>);
  else start(mask_tiles_kernel<S>);
}

}  // namespace
}  // namespace lect11ext::cuda
