// What the kernels of the backward of sm_90a hand to one another: a float for each of the queries' gradients, numbers
// of every query, counts of every tile.
#pragma once

#include "attention/cuda/dot_product_hopper_launch.cuh"

namespace lect11ext::cuda {

// What kernels share in memory, beyond the tensors. Of queries by tiles of kQueries, so many of every head; of
// sequences one behind the other the tiles are numbered as SequenceTiles does.
struct HopperBackwardScratch {
  float* sums;  // of queries' gradients: a tile as put() below lays it
  // Of each query, in the order of place_of: its lse, +∞ for one that sees nothing, which makes its weights zero; and
  // D · scale. Where scores are counted in products, of a tile in which all lses are small, these are binary
  // logarithms. Behind every tile of them there is a word that says so, 0, or not.
  float *lses, *deltas;
  int *counts, *taken;   // of each tile, the tiles of keys that have been added; numbers that blocks have taken
  int64_t tiles, units;  // of a head; heads of all batches
  SequenceTiles order;   // of the tiles of a head

  static HopperBackwardScratch of(const AttentionBackward& args, void* data) {
    const int64_t columns = hopper_columns(args);
    HopperBackwardScratch s{};
    s.order = tiles_of_head(args, args.query_starts, args.queries, queries_of_tile(columns));
    s.tiles = s.order.count(), s.units = args.batch * args.heads;
    s.sums = static_cast<float*>(data);
    s.lses = s.sums + s.rows(columns) * columns;
    s.deltas = s.lses + s.units * s.tiles * lses_of_tile(columns);
    s.counts = reinterpret_cast<int*>(s.deltas + s.rows(columns));
    s.taken = s.counts + s.units * s.tiles;
    return s;
  }

  // A tile of queries of a head: the first of them, counted within the tensor, and how many there are, perhaps none.
  struct Queries {
    int64_t first;
    int count;
  };
  __device__ Queries queries_of(const AttentionBackward& args, int64_t tile) const {
    const SequenceTiles::Tile found = order.find(tile);
    const Sequence sequence(args, found.sequence);
    const int size = static_cast<int>(order.size), first = found.number * size;
    return {sequence.first_query + first, std::max(0, std::min(size, sequence.queries - first))};
  }
  static constexpr int kKeysOfTile = 128;
  static __host__ __device__ constexpr int queries_of_tile(int64_t columns) { return columns == 64 ? 128 : 64; }
  static __host__ __device__ constexpr int lses_of_tile(int64_t columns) { return queries_of_tile(columns) + 4; }
  // Where a query's numbers are, of its tile's: those that a lane has of 64 scores lie one behind the other.
  static __host__ __device__ constexpr int place_of(int query) {
    return query / 64 * 64 + query % 8 / 2 * 16 + query % 64 / 8 * 2 + query % 2;
  }
  int64_t rows(int64_t columns) const { return units * tiles * queries_of_tile(columns); }
  int64_t bytes(int64_t columns) const {
    constexpr auto kNumber = static_cast<int64_t>(sizeof(float));
    return kNumber * (rows(columns) * (columns + 1) + units * tiles * (lses_of_tile(columns) + 1) + 1);
  }
};

}  // namespace lect11ext::cuda
