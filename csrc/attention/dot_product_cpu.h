// Dot-product attention on the CPU: what the kernels of dot_product.h are given beyond it.
//
// Keys are packed first, in panels of 64 that all queries multiply: transposed, so that a row of a panel is a few
// vectors. Values, and what else is multiplied by weights, are packed with their columns rounded up. Then every work
// item is a tile of queries of one head against blocks of keys (forward, tangent), or a head's keys against all of its
// queries (backward).
#pragma once

#include "attention/dot_product.h"

namespace lect11ext {

inline constexpr int64_t kPanelKeys = 64;    // keys of a panel
inline constexpr int64_t kBlockKeys = 256;   // keys that a tile of queries meets at a time: whole panels
inline constexpr int64_t kTileQueries = 96;  // queries of a tile, at most: sixteen rows of register tiles
inline constexpr int64_t kColumnStep = 16;   // columns are rounded up to this: whole vectors of every build
inline constexpr int64_t kDeepStep = 32;     // columns of 16-bit operands that are summed over, likewise: AMX's depth

// One sequence, or one of the batch.
struct AttentionSequence {
  int64_t batch, query_start, queries, key_start, keys;

  AttentionSequence(const Attention& args, int64_t n)
      : batch(args.query_starts != nullptr ? 0 : n),
        query_start(args.query_starts != nullptr ? args.query_starts[n] : 0),
        queries(args.query_starts != nullptr ? args.query_starts[n + 1] - query_start : args.queries),
        key_start(args.key_starts != nullptr ? args.key_starts[n] : 0),
        keys(args.key_starts != nullptr ? args.key_starts[n + 1] - key_start : args.keys) {}

  // Key j is on query i's diagonal where j = i + diagonal.
  int64_t diagonal(const Attention& args) const { return args.bottom_right ? keys - queries : 0; }
};

// Tiles are of equal size, in whole register tiles, so that threads share them evenly.
inline int64_t tile_count(int64_t queries) { return (queries + kTileQueries - 1) / kTileQueries; }
inline int64_t tile_rows(int64_t queries) {
  constexpr int64_t kRegisterRows = 6;
  const int64_t tiles = tile_count(queries);
  return tiles == 0 ? 0 : round_up((queries + tiles - 1) / tiles, kRegisterRows);
}
inline int64_t panel_count(int64_t keys) { return (keys + kPanelKeys - 1) / kPanelKeys; }

// Keys or values of all sequences and heads, packed. Panel p of sequence n and head h is number
// panels[n] · kv_heads + h · (panels of n) + p.
struct PackedOperand {
  AttentionOperand from;
  int64_t columns;
  int64_t first;      // number of the panel that memory begins with
  void* transposed;   // [panels][columns rounded to kDeepStep][64]; null where it is not needed
  void* rows;         // [panels][64][columns rounded to kColumnStep]; the same
  bool rows_are_own;  // rows are read where the operand has them: whole steps of columns, of the products' type
  bool* finite;       // [panels]: whether all elements of rows are, or have to be seen where they are not
};

inline int64_t transposed_panel(int64_t columns) { return round_up(columns, kDeepStep) * kPanelKeys; }
inline int64_t rows_panel(int64_t columns) { return round_up(columns, kColumnStep) * kPanelKeys; }

struct AttentionPlan {
  const int64_t *panels, *tiles;  // where the sequences' panels and tiles begin, [sequences + 1] each, of one head
  bool shared;                    // whether all sequences have the panels of the first, which are broadcast
  bool widens;                    // whether bfloat16 is multiplied as float where there are dot products of it too

  // Of sequence n and a head of the keys.
  int64_t first_panel(int64_t n, int64_t kv_heads, int64_t kv_head) const {
    const int64_t* starts = panels + (shared ? 0 : n);
    return starts[0] * kv_heads + kv_head * (starts[1] - starts[0]);
  }
};

struct AttentionPack {
  const Attention* args;
  AttentionPlan plan;
  PackedOperand key, value, key_t, value_t;  // from.data null: not there
};

struct AttentionForwardCpu : AttentionForward {
  AttentionPlan plan;
  PackedOperand packed_key, packed_value;
};

// Where few queries share a head of the keys nothing is packed, and scores are inner products of rows: in the forward
// and in all that makes its scores again. Sequences of one length only.
inline constexpr int64_t kDecodeRows = 16;  // queries times heads that share, at most

inline bool few_rows(int64_t heads, int64_t kv_heads, int64_t queries) {
  return heads / kv_heads * queries <= kDecodeRows;
}
inline bool scores_by_rows(const Attention& args) {
  return args.query_starts == nullptr && few_rows(args.heads, args.kv_heads, args.queries);
}

struct AttentionDecodeCpu : AttentionForward {
  int64_t parts;  // of the keys, by sizes alone
  void* partial;  // C [parts][batch][heads][queries][decode_partial]; null where there is one part
};

// The sums of a row in a part, its greatest score and its total of weights.
constexpr int64_t decode_partial(int64_t value_dim) { return round_up(value_dim, kColumnStep) + 2; }

struct AttentionTangentCpu : AttentionTangent {
  AttentionPlan plan;
  PackedOperand packed_key, packed_value, packed_key_t, packed_value_t;
};

// A backward's work item is a part of the keys of one head, or, where a gradient of a mask is wanted, of all heads and
// sequences that the mask is broadcast over: nobody else adds to what it adds to. How many parts there are depends on
// sizes alone, and so do the results.
struct AttentionBackwardCpu : AttentionBackwardTangent {
  AttentionPlan plan;
  PackedOperand packed_key, packed_value, packed_key_t, packed_value_t;
  int64_t parts;           // of the keys
  int64_t sequence_group;  // sequences of an item
  int64_t head_group;      // heads of the keys of an item
  bool wide_mask;          // whether grad_mask is double whatever C
  void* query_sums;        // C [parts][batch][heads][queries][columns rounded to kColumnStep], added to: zero at first
};

inline constexpr int64_t kBackwardKeys = 128;  // keys whose gradients wait in the cache while the queries go by

LECT11EXT_CPU_KERNEL(attention_pack_kernel, AttentionPack)           // items: panels of all sequences and kv_heads
LECT11EXT_CPU_KERNEL(attention_forward_kernel, AttentionForwardCpu)  // items: tiles of all sequences and heads
LECT11EXT_CPU_KERNEL(attention_decode_kernel, AttentionDecodeCpu)    // items: parts of all heads of the keys
LECT11EXT_CPU_KERNEL(attention_merge_kernel, AttentionDecodeCpu)     // items: rows of queries, after the parts
LECT11EXT_CPU_KERNEL(attention_tangent_kernel, AttentionTangentCpu)  // items: tiles of all sequences and heads
LECT11EXT_CPU_KERNEL(attention_backward_kernel, AttentionBackwardCpu)
// The same where there are tangents: writes the gradients' tangents.
LECT11EXT_CPU_KERNEL(attention_backward_tangent_kernel, AttentionBackwardCpu)
LECT11EXT_CPU_KERNEL(attention_query_gradient_kernel, AttentionBackwardCpu)  // items: rows of queries, after the others

}  // namespace lect11ext
