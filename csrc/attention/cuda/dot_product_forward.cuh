// The forward kernel: a block owns a tile of queries, and the keys that they see come by in tiles, once.
//
// Of every row a running maximum m and sum l of e^(t − m) are kept, and what has been summed of the output is rescaled
// as m grows. Where there are few queries, the heads that share keys lie in one tile ("packed"), and the keys are cut
// among several blocks ("splits"), whose parts, sums with their m and l, are merged in order: of the size of an lse of
// huge scores, little would be left of l.
#pragma once

#include "attention/cuda/dot_product_score.cuh"

namespace lect11ext::cuda {

struct ForwardSettings {
  SequenceTiles tiles;
  int packed;              // heads in a tile; a row is a query position and a head of these
  int64_t splits, chunks;  // of the keys; of the value's columns
  int warps;
  bool query_aligned, key_aligned, value_aligned, pairs_aligned;  // the last: of the output
  bool mask_pairs;
  const int* only_if;  // null: run; else a flag: kernels for finite numbers run where it is 0, others where it is not
  size_t shared_bytes;
  double unit;  // of what rows compare: the scale where these are products, else 1
  // Of splits, where there are several; C [splits, batch, heads, queries], and of sums of values [value_dim] more.
  void *partial_out, *partial_largest, *partial_sum;
};

// kDim: a bound of head_dim and value_dim, or 0.
template <int kDim>
struct ForwardPlan : ForwardSettings {
  TileShape<kDim> row, value;  // of queries and keys, and of values
};

// Rows for a warp, keys in a tile: what registers hold, but for some that are not used in the products.
// kPlain: without mask, ALiBi, softcap and dropout, and with a positive scale.
template <class S, int kWidth, bool kPlain>
struct ForwardShape {
  static constexpr int kDim = known_columns<S>(kWidth);
  static constexpr int kRowTiles = sizeof(S) < 8 && kWidth <= 128 ? 2 : 1;
  static constexpr int kKeys = sizeof(S) == 8             ? (kWidth == 64 ? 16 : 8)
                               : !kIsHalf<S>              ? 32
                               : kWidth == 128 && !kPlain ? 48
                                                          : 64;
  static constexpr int kRows = 16 * kRowTiles;
  using Plan = ForwardPlan<kDim>;
};

template <class S, int kWidth, bool kPlain, bool kFinite>
class Forward {
  using C = Compute<S>;
  using Shape = ForwardShape<S, kWidth, kPlain>;
  using Plan = typename Shape::Plan;
  static constexpr int kRowTiles = Shape::kRowTiles, kKeys = Shape::kKeys, kTiles = kKeys / 8, kColumns = kWidth / 8;

  // What one warp carries along the keys.
  struct State {
    C out[kRowTiles][kColumns][4] = {};
    C largest[kRowTiles][2], sum[kRowTiles][2];
  };

  // A tile: its products, then scores, then weights, and which of them count.
  struct Tile {
    C sums[kRowTiles][kTiles][4];
    uint32_t bits[kRowTiles][2];
    int first_key;
    bool whole, any;  // that all count; that some do
  };

 public:
  __device__ Forward(const AttentionForward& args, const Plan& plan, unsigned char* shared)
      : args_(args), plan_(plan), shared_(reinterpret_cast<S*>(shared)) {}

  __device__ void run() const {
    const int64_t count = plan_.tiles.count();
    const int64_t unit = divide(blockIdx.x, count);
    const SequenceTiles::Tile tile = plan_.tiles.find(blockIdx.x - unit * count);
    const Sequence sequence(args_, tile.sequence);
    const int packed = plan_.packed, size = static_cast<int>(plan_.tiles.size), rows = sequence.queries * packed;
    const int tiles = static_cast<int>(divide_up(rows, size));
    if (tile.number >= tiles) return;
    // The last queries of a causal attention have the most to do and come first.
    const int first_row = (tiles - 1 - tile.number) * size, last_row = std::min(first_row + size, rows) - 1;
    const Range keys = keys_seen(sequence, first_row / packed, last_row / packed);
    const int first_tile = keys.first / kKeys;
    const int key_tiles = keys.empty() ? 0 : static_cast<int>(divide_up(keys.last, kKeys)) - first_tile;
    const auto begin = [&](unsigned split) {
      return first_tile + static_cast<int>(int64_t{key_tiles} * split / plan_.splits);
    };
    attend(tile.sequence, static_cast<int>(unit) * packed, first_row, begin(blockIdx.z), begin(blockIdx.z + 1));
  }

 private:
  struct Row {
    int query, head;  // beyond the last row, a query that no sequence has
  };

  __device__ Row row_at(int row, const Sequence& sequence, int first_head) const {
    const int query = row / plan_.packed;
    return {query < sequence.queries ? query : kMostPositions, first_head + row - query * plan_.packed};
  }

  // Keys and values of a tile have room for one of each, and take turns: values come while scores are found, the next
  // keys while these are weighed and summed.
  __device__ void attend(int64_t sequence_number, int first_head, int first_row, int first_tile, int last_tile) const {
    const Lane lane;
    const Sequence sequence(args_, sequence_number);
    const Scores<S> scores{args_, sequence, plan_.mask_pairs};
    const Dropout dropout(args_, sequence);
    const int64_t kv_head = first_head / static_cast<int>(args_.heads / args_.kv_heads);

    S* const queries = shared_;
    S* const keys = queries + plan_.warps * Shape::kRows * plan_.row.stride();
    S* const values = keys + kKeys * plan_.row.stride();
    const S* const all_keys = row_of<S>(args_.key, sequence.batch, kv_head, sequence.first_key);
    const S* const all_values = row_of<S>(args_.value, sequence.batch, kv_head, sequence.first_key);
    const auto load = [&](S* to, const auto& shape, bool aligned, const S* all, const AttentionOperand& operand,
                          int tile) {
      const int64_t step = operand.strides.position;
      load_rows(to, shape, kKeys, aligned, all + int64_t{tile} * kKeys * step, step, sequence.keys - tile * kKeys);
      copy_commit();
    };
    const auto load_keys = [&](int tile) { load(keys, plan_.row, plan_.key_aligned, all_keys, args_.key, tile); };
    const auto load_values = [&](int tile) {
      load(values, plan_.value, plan_.value_aligned, all_values, args_.value, tile);
    };

    load_rows(queries, plan_.row, plan_.warps * Shape::kRows, plan_.query_aligned, [&](int i) -> const S* {
      const Row row = row_at(first_row + i, sequence, first_head);
      if (row.query >= sequence.queries) return nullptr;
      return row_of<S>(args_.query, sequence.batch, row.head, sequence.first_query + row.query);
    });
    const int own_row = first_row + lane.warp * Shape::kRows;
    SharedRows<S, kFinite> sources[kRowTiles];
    Row own[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      sources[m] = {queries + (lane.warp * Shape::kRows + 16 * m) * plan_.row.stride(), plan_.row.stride()};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        own[m][half] = row_at(own_row + 16 * m + 8 * half + lane.g, sequence, first_head);
      }
    }
    // From the warp's first query to its last: a tile that all of them see as a whole needs no comparisons.
    const int low = own_row / plan_.packed, high = (own_row + Shape::kRows - 1) / plan_.packed;

    State state;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) state.largest[m][half] = -infinity<C>(), state.sum[m][half] = 0;
    }

    if (first_tile < last_tile) load_keys(first_tile);
    for (int number = first_tile; number < last_tile; ++number) {
      Tile tile;
      tile.first_key = number * kKeys;
      copy_wait<0>();
      __syncthreads();  // the keys are there, and nobody reads the values before
      load_values(number);
      tile.whole = (kPlain || args_.mask.type == MaskType::None) &&
                   all_see(sequence, low, high - low + 1, tile.first_key, kKeys);
      tile.any = low < sequence.queries;
      if (tile.any && !tile.whole) find_seen(tile, scores, own, lane);
      if (tile.any) {
#pragma unroll
        for (int i = 0; i < 4 * kRowTiles * kTiles; ++i) tile.sums[i / (4 * kTiles)][i / 4 % kTiles][i % 4] = 0;
        multiply_rows<false, kFinite>(tile.sums, sources, keys, plan_.row, lane);
      }
      copy_wait<0>();
      __syncthreads();  // the values are there, and nobody reads the keys
      if (number + 1 < last_tile) load_keys(number + 1);
      if (tile.any) take_tile(state, tile, scores, dropout, own, values, lane);
    }
    copy_commit();  // of a block without tiles
    copy_wait<0>();
    // Found once more, so that no register holds it all along.
    finish(state, Sequence(args_, sequence_number), own_row, first_head, lane);
  }

  __device__ static LaneRow lane_row(const Scores<S>& scores, const Row& row, const Tile& tile, const Lane& lane) {
    return scores.row(row.head, row.query, tile.first_key + 2 * lane.q);
  }

  __device__ void find_seen(Tile& tile, const Scores<S>& scores, const Row (&own)[kRowTiles][2],
                            const Lane& lane) const {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const LaneRow row = lane_row(scores, own[i / 2][i % 2], tile, lane);
      uint32_t& bits = tile.bits[i / 2][i % 2];
      if constexpr (kPlain) bits = scores.template in_window<kTiles>(row);
      else bits = scores.template seen<kTiles>(row);
      any |= bits;
    }
    tile.any = __any_sync(~0u, any != 0);
  }

  __device__ void take_tile(State& state, Tile& tile, const Scores<S>& scores, const Dropout& dropout,
                            const Row (&own)[kRowTiles][2], const S* values, const Lane& lane) const {
    uint32_t seen = ~0u;
    if (!tile.whole) {
      seen = 0;
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) seen |= tile.bits[i / 2][i % 2];
      seen = columns_seen(seen);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto element = [&](int i) -> C& { return tile.sums[m][i / 2][2 * half + i % 2]; };
        const uint32_t bits = tile.whole ? ~0u : tile.bits[m][half];
        if constexpr (!kPlain) {
          const LaneRow row = lane_row(scores, own[m][half], tile, lane);
          scores.template finish<kTiles>(row, bits, element, [](int, C) {});
        }
        if (!tile.whole) {
#pragma unroll
          for (int i = 0; i < 2 * kTiles; ++i) element(i) = (bits >> i & 1) != 0 ? element(i) : -infinity<C>();
        }
      }
      update_rows(state, tile.sums[m], m);
      if constexpr (!kPlain) {
        if (args_.dropout_p > 0) {
          drop_weights(tile.sums[m], dropout, own[m][0].head, own[m][0].query, own[m][1].head, own[m][1].query,
                       tile.first_key, lane);
        }
      }
    }
    multiply_columns<kFinite, S>(state.out, tile.sums, values, plan_.value, static_cast<int>(blockIdx.y) * kWidth, seen,
                                 lane);
  }

  // Binary logarithms in what scores are counted in: products before they are scaled, or scores.
  __device__ C unit() const { return C(kPlain ? args_.scale * kLog2E : kLog2E); }

  // Scores of a tile become weights. All lanes of a quad hold a row's maximum, and each its own part of the sum.
  __device__ void update_rows(State& state, C (&sums)[kTiles][4], int m) const {
    C shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      C largest = state.largest[m][half];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) largest = std::fmax(largest, sums[i / 2][2 * half + i % 2]);
      largest = std::fmax(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = std::fmax(largest, __shfl_xor_sync(~0u, largest, 2));
      // As long as a row has seen nothing its maximum is −∞, from which nothing can be subtracted.
      const C base = largest == -infinity<C>() ? C(0) : largest;
      shrink[half] = power_of_two((state.largest[m][half] - base) * unit());
      C shift = base * unit();
      if (!kIsHalf<S> || !(std::abs(shift) <= kLargeExponent)) {
        shift = 0;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) sums[i / 2][2 * half + i % 2] -= base;
      }
      C sum = state.sum[m][half] * shrink[half];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        C& t = sums[i / 2][2 * half + i % 2];
        t = power_of_two(std::fma(t, unit(), -shift));
        sum += t;
      }
      state.largest[m][half] = largest;
      state.sum[m][half] = sum;
    }
    // Most tiles behind a row's first ones leave its maximum as it is.
    if (__all_sync(~0u, shrink[0] == 1 && shrink[1] == 1)) return;
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) state.out[m][i / 4][i % 4] *= shrink[i % 4 / 2];
  }

  __device__ void finish(const State& state, const Sequence& sequence, int first_row, int first_head,
                         const Lane& lane) const {
    const C kept = C(dropout_factor(args_.dropout_p));
    const int first_column = static_cast<int>(blockIdx.y) * kWidth;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        C sum = state.sum[m][half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const Row row = row_at(first_row + 16 * m + 8 * half + lane.g, sequence, first_head);
        if (row.query >= sequence.queries) continue;
        const int64_t query = sequence.first_query + row.query;
        const int64_t number = (sequence.batch * args_.heads + row.head) * args_.queries + query;
        const bool none = sum == 0;
        const C largest = state.largest[m][half], factor = plan_.splits > 1 ? C(1) : kept / sum;
        const int64_t part = blockIdx.z * args_.batch * args_.heads * args_.queries + number;
        if (blockIdx.y == 0 && lane.q == 0) {
          if (plan_.splits > 1) {
            static_cast<C*>(plan_.partial_largest)[part] = largest;
            static_cast<C*>(plan_.partial_sum)[part] = sum;
          } else {
            static_cast<C*>(args_.lse)[number] =
                none ? -infinity<C>() : rounded_product(largest, C(plan_.unit)) + std::log(sum);
          }
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int column = first_column + 8 * n + 2 * lane.q;
          const C pair[2] = {none ? C(0) : state.out[m][n][2 * half] * factor,
                             none ? C(0) : state.out[m][n][2 * half + 1] * factor};
          const int count = static_cast<int>(args_.value_dim) - column;
          if (plan_.splits == 1) {
            const AttentionStrides& strides = args_.out_strides;
            S* const to = static_cast<S*>(args_.out) + sequence.batch * strides.batch + row.head * strides.head +
                          query * strides.position + column;
            store_pair(to, pair, count, plan_.pairs_aligned);
          } else {
            store_pair(static_cast<C*>(plan_.partial_out) + part * args_.value_dim + column, pair, count, false);
          }
        }
      }
    }
  }

  const AttentionForward& args_;
  const Plan& plan_;
  S* shared_;
};

}  // namespace lect11ext::cuda
