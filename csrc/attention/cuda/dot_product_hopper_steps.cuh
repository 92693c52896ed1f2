// What a block of sm_90a's backward owns, keys, and what comes by: tiles of queries.
#pragma once

#include "attention/cuda/dot_product_hopper_scratch.cuh"
#include "attention/cuda/dot_product_hopper_tile.cuh"

namespace lect11ext::cuda {

struct HopperBackwardPlan {
  CUtensorMap key, value, query, grad_out;
  BlockOrder order;
  SequenceTiles tiles;         // of keys, where sequences lie one behind the other
  int first_query, first_key;  // of those that are mapped
  bool mask_pairs;             // along the queries
  MaskTiles mask_tiles;
  MaskRanks mask_ranks;
  HopperBackwardScratch scratch;
};

template <int kColumns, bool kPlain>
struct HopperBackwardSteps {
  static constexpr int kKeys = HopperBackwardScratch::kKeysOfTile;
  static constexpr int kQueries = HopperBackwardScratch::queries_of_tile(kColumns), kHalf = 64;

  const AttentionBackward& args;
  const HopperBackwardPlan& plan;
  const Sequence& sequence;
  int kv_head, first_head, last_head, first_key, first_tile, tiles;
  int steps;             // all of them, of which a mask may leave some out
  int64_t first_of_all;  // the number of the sequence's first tile of queries among those of all

  // What a block owns: a tile of the keys of a sequence and a head; none where `tile` is behind the sequence's last
  // one.
  struct Own {
    int kv_head, tile;
    int64_t sequence;
  };
  __device__ static Own find(const AttentionBackward& args, const HopperBackwardPlan& plan, int number) {
    const BlockOrder::Block block = plan.order.find(number);
    if (!kPlain && args.query_starts != nullptr) {
      const SequenceTiles::Tile tile = plan.tiles.find(block.tile);
      return {block.unit, tile.number, tile.sequence};
    }
    const int heads = static_cast<int>(args.kv_heads), batch = block.unit / heads;
    return {block.unit - batch * heads, block.tile, batch};
  }

  __device__ HopperBackwardSteps(const AttentionBackward& args, const HopperBackwardPlan& plan,
                                 const Sequence& sequence, const Own& own)
      : args(args), plan(plan), sequence(sequence), kv_head(own.kv_head) {
    // The first keys of a causal attention have the most to do and come first.
    first_key = own.tile * kKeys;
    first_of_all = 0;
    if (!kPlain && args.query_starts != nullptr) first_of_all = plan.scratch.order.first_of(own.sequence);
    const Range range = queries_seen(sequence, first_key, std::min(first_key + kKeys, sequence.keys) - 1);
    first_tile = range.first / kQueries;
    tiles = range.empty() ? 0 : (range.last - 1) / kQueries + 1 - first_tile;
    const int group = static_cast<int>(args.heads / args.kv_heads);
    first_head = kv_head * group, last_head = first_head + group - 1;
    steps = tiles * group;
  }

  // What comes by, in its order: tiles of queries from the last one on, of all heads each. Were it head by head, keys
  // that few queries see would wait in every head for those that many see.
  struct Step {
    int head, tile;
  };
  __device__ Step first_step() const { return {first_head, first_tile + tiles - 1}; }
  __device__ Step after(const Step& step) const {
    const bool last = step.head == last_head;
    return {last ? first_head : step.head + 1, step.tile - (last ? 1 : 0)};
  }
  __device__ bool is_over(const Step& step) const { return step.tile < first_tile; }
  // Of the tiles of keys from number `first` to `last` − 1, those of which a step's queries see something, as far as a
  // mask goes.
  __device__ int seen_between(const Step& step, int first, int last) const {
    if constexpr (kPlain) return last - first;
    else return plan.mask_ranks.between(sequence.batch, step.head, step.tile, first, last);
  }
  // The same or the first behind it that has something to do.
  __device__ Step seen_from(Step step) const {
    const int own = first_key / kKeys;
    while (!is_over(step) && seen_between(step, own, own + 1) == 0) step = after(step);
    return step;
  }
  __device__ int query_of(const Step& step, int half) const { return step.tile * kQueries + half * kHalf; }
  __device__ int64_t tile_of_all(const Step& step) const {
    return (sequence.batch * args.heads + step.head) * plan.scratch.tiles + first_of_all + step.tile;
  }
};

}  // namespace lect11ext::cuda
