// Masks, ALiBi and dropout in the backward of sm_90a: of 64 keys of a warpgroup, which are the rows, and 64 queries.
#pragma once

#include "attention/cuda/dot_product_hopper_tile.cuh"

namespace lect11ext::cuda {

template <class S>
struct HopperBackwardOptions {
  static constexpr int kQueries = 64, kTiles = kQueries / 8;

  const AttentionBackward& args;
  const Sequence& sequence;
  const MaskTiles& mask_tiles;
  bool mask_pairs;  // along the queries

  __device__ float scale() const { return static_cast<float>(args.scale); }

  // Of a thread's 2 × 16 elements of 64 × 64: which of them count, row by row, and which are kept, tile by tile.
  struct Marks {
    uint32_t seen = ~0u, kept = ~0u;

    __device__ bool counts(int i) const { return (seen >> (16 * (i % 4 / 2) + i / 4 * 2 + i % 2) & 1) != 0; }
    __device__ bool keeps(int i) const { return (kept >> i & 1) != 0; }
  };

  // Of the mask and the window, as far as is known of them: whether all is seen, and whether nothing is.
  struct View {
    bool whole, none;
  };
  __device__ View view_of(int head, int query, int key) const {
    const int state =
        args.mask.type == MaskType::None ? MaskTiles::kSeen : mask_tiles.state<1, 1>(sequence.batch, head, query, key);
    const bool whole = state == MaskTiles::kSeen && query + kQueries <= sequence.queries &&
                       all_see(sequence, query, kQueries, key, kGroupRows);
    return {whole, (state & MaskTiles::kSeen) == 0};
  }

  // Of a bool mask and the window, what is seen; whether that is all.
  __device__ bool find(Marks& marks, int head, int query, int key, const GroupLane& lane) const {
    const View view = view_of(head, query, key);
    if (view.whole) return true;
    marks.seen = 0;
    if (view.none) return false;
    const Scores<S, true> options{args, sequence, mask_pairs};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const LaneRow row = options.row(head, query + 2 * lane.q, key + lane.row + 8 * r);
      marks.seen |= options.template seen<kTiles, true>(row) << (16 * r);
    }
    return false;
  }

  // Products become weights, zero where a query does not see the key.
  __device__ void weigh(float (&scores)[kTiles][4], Marks& marks, const float* lses, int head, int query, int key,
                        const GroupLane& lane) const {
    const auto [whole, none] = view_of(head, query, key);
    if (!whole) marks.seen = 0;
    const bool simple = none || (whole && args.alibi_slopes == nullptr);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto element = [&](int i) -> float& { return scores[i / 2][2 * r + i % 2]; };
      uint32_t bits = none ? 0 : ~0u;
      if (simple) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) element(i) = rounded_product(element(i), scale());
      } else {
        const Scores<S, true> options{args, sequence, mask_pairs};
        const LaneRow row = options.row(head, query + 2 * lane.q, key + lane.row + 8 * r);
        if (!whole) {
          bits = options.template seen<kTiles>(row);
          marks.seen |= bits << (16 * r);
        }
        options.template finish<kTiles>(row, whole ? 0 : bits, element, [](int, float) {});
      }
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const float weight = weight_of(element(i) - lses[i]);
        element(i) = (bits >> i & 1) != 0 ? weight : 0.0f;
      }
    }
    if (args.dropout_p > 0) {
      const Dropout dropout(args, sequence);
      marks.kept = 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        marks.kept |= dropout.keep_of_keys(head, query + 8 * tile, key + 16 * lane.warp, lane) << (4 * tile);
      }
    }
  }

  // The weights' derivatives become the scores', of weights in `scores`; of what does not count, nothing stays.
  __device__ void derive(float (&grads)[kTiles][4], const float (&scores)[kTiles][4], const Marks& marks,
                         const float* deltas) const {
    const float factor = scale() * static_cast<float>(dropout_factor(args.dropout_p));
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& grad = grads[i / 4][i % 4];
      const float inner = std::fma(marks.keeps(i) ? grad : 0.0f, factor, -deltas[i / 4 * 2 + i % 2]);
      grad = marks.counts(i) ? scores[i / 4][i % 4] * inner : 0.0f;
    }
  }
};

}  // namespace lect11ext::cuda
