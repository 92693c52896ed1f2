// What a block of sm_90a's forward does one after the other: tiles of queries, and of each the tiles of keys that it
// sees.
#pragma once

#include "attention/cuda/dot_product_hopper_tile.cuh"

namespace lect11ext::cuda {

struct HopperForwardPlan {
  CUtensorMap query, key, value;
  SequenceTiles tiles;  // of queries
  BlockOrder order;
  int first_key;  // of those that are mapped
  bool mask_pairs;
  MaskTiles mask_tiles;
};

template <int kColumns, HopperKind kKind>
struct HopperForwardWork {
  static constexpr bool kPlain = kKind == HopperKind::Plain;
  static constexpr int kGroups = kColumns == 64 && kPlain ? 3 : 2;  // warpgroups that compute
  static constexpr int kQueries = kGroups * kGroupRows, kKeys = 128;

  // A tile of queries of a sequence, and the first keys of a tile of keys that it sees, of the next one, kNone where
  // there is none, and of all. From the last keys on: the first tile that a warpgroup takes is, where attention is
  // causal, the cut one.
  struct Work {
    int head, number, first_query, key, after, first_key;
    static constexpr int kNone = -1;
  };

  const AttentionForward& args;
  const HopperForwardPlan& plan;
  const Sequence first_sequence;

  __device__ HopperForwardWork(const AttentionForward& args, const HopperForwardPlan& plan)
      : args(args), plan(plan), first_sequence(args, 0) {}

  // Of the plain kernel all sequences are alike but for their batch.
  __device__ Sequence sequence_of(const Work& work) const {
    if (!kPlain && args.query_starts != nullptr) return Sequence(args, work.number);
    Sequence sequence = first_sequence;
    sequence.batch = work.number;
    return sequence;
  }

  // What the block does in a round, and whether there is anything; `over`: nothing, and that was all.
  __device__ bool find(Work& work, int round, bool& over) const {
    BlockOrder::Block block;
    work.key = Work::kNone;
    if (!plan.order.in_round(round, block, over)) return false;
    int tiles = plan.order.tiles, tile = block.tile;
    if (!kPlain && args.query_starts != nullptr) {
      const SequenceTiles::Tile found = plan.tiles.find(block.tile);
      work.number = static_cast<int>(found.sequence);
      work.head = block.unit;
      tile = found.number;
      tiles = (sequence_of(work).queries + kQueries - 1) / kQueries;
      if (tile >= tiles) return false;
    } else {
      work.number = block.unit / static_cast<int>(args.heads);
      work.head = block.unit - work.number * static_cast<int>(args.heads);
    }
    // The last queries of a causal attention have the most to do and come first.
    work.first_query = (tiles - 1 - tile) * kQueries;
    const Sequence sequence = sequence_of(work);
    const int last_query = std::min(work.first_query + kQueries, sequence.queries) - 1;
    const Range range = keys_seen(sequence, work.first_query, last_query);
    // Masks are read by pairs of keys and known by tiles, and dropout draws for eight keys at a time.
    constexpr int kTogetherKeys = kPlain ? 1 : MaskTiles::kSize;
    work.first_key = range.first / kTogetherKeys * kTogetherKeys;
    const int seen = range.empty() ? 0 : (range.last - work.first_key + kKeys - 1) / kKeys;
    work.after = before(work, work.first_key + seen * kKeys);
    pass(work);
    return true;
  }

  // Of the tiles of keys before `key` the next one of which a mask lets something through.
  __device__ int before(const Work& work, int key) const {
    key -= kKeys;
    if constexpr (!kPlain) {
      const auto barred = [&] {
        const int state = plan.mask_tiles.template state<kGroups, kKeys / MaskTiles::kSize>(work.number, work.head,
                                                                                            work.first_query, key);
        return (state & MaskTiles::kSeen) == 0;
      };
      if (plan.mask_tiles.known()) {
        while (key >= work.first_key && barred()) key -= kKeys;
      }
    }
    return key >= work.first_key ? key : Work::kNone;
  }

  __device__ bool pass(Work& work) const {
    work.key = work.after;
    if (work.key == Work::kNone) return false;
    work.after = before(work, work.key);
    return true;
  }

  // Moves on, from `round` on, to what has keys; false: there is nothing more. What has none is given to `blank`.
  template <class Blank>
  __device__ bool next(Work& work, int& round, Blank blank) const {
    for (bool over = false; !over; ++round) {
      if (!find(work, round, over)) continue;
      if (work.key != Work::kNone) return true;
      blank(work);
    }
    return false;
  }
};

}  // namespace lect11ext::cuda
