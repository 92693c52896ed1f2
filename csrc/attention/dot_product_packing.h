// What the ops of dot-product attention on the CPU share: packed operands, costs and parts.
#pragma once

#include <c10/util/SmallVector.h>

#include "attention/dot_product_cpu.h"
#include "attention/dot_product_inputs.h"
#include "common/dispatch.h"
#include "common/workspace.h"

namespace lect11ext::attention_op {

inline int64_t compute_size(DType type) { return type == DType::Double ? 8 : 4; }

// Packed operands and the starts of panels and tiles, in memory that a call keeps.
class Packing {
 public:
  // Where it `may_share`, nothing but keys and values of `args` is added, and what is broadcast over the batch is
  // packed once.
  explicit Packing(const Attention& args, bool may_share = false)
      : args_(args),
        sequences_(args.sequences + 1),
        shared_(may_share && args.key_starts == nullptr && args.key.strides.batch == 0 &&
                args.value.strides.batch == 0) {
    panels_ = space_.reserve(sequences_ * sizeof(int64_t));
    tiles_ = space_.reserve(sequences_ * sizeof(int64_t));
    for (int64_t n = 0; n < args.sequences; ++n) {
      const AttentionSequence s(args, n);
      if (n == 0 || !shared_) panel_total_ += panel_count(s.keys);
      tile_total_ += tile_count(s.queries);
    }
  }

  // Announces an operand before anything is packed. Its pointers are set by run().
  void add(const AttentionOperand& from, int64_t columns, bool transposed, bool rows, PackedOperand& to) {
    to = {from, columns, nullptr, nullptr, rows && lies_packed(from, columns), nullptr};
    if (from.data == nullptr) return;
    const int64_t panels = panel_total_ * args_.kv_heads, element = compute_size(args_.dtype);
    Part part{&to, transposed, rows, 0, 0, space_.reserve(panels)};
    if (transposed) part.transposed_at = space_.reserve(panels * transposed_panel(columns) * element);
    if (rows && !to.rows_are_own) part.rows_at = space_.reserve(panels * rows_panel(columns) * element);
    parts_.push_back(part);
  }

  // Packs all that was announced; `widens` as AttentionPlan has it.
  AttentionPlan run(bool widens = prefers_float_products()) {
    auto* panels = static_cast<int64_t*>(space_.at(panels_));
    auto* tiles = static_cast<int64_t*>(space_.at(tiles_));
    panels[0] = tiles[0] = 0;
    for (int64_t n = 0; n < args_.sequences; ++n) {
      const AttentionSequence s(args_, n);
      panels[n + 1] = panels[n] + panel_count(s.keys);
      tiles[n + 1] = tiles[n] + tile_count(s.queries);
    }
    const AttentionPlan plan{panels, tiles, shared_, widens};
    AttentionPack pack{&args_, plan, {}, {}, {}, {}};
    PackedOperand* slots[] = {&pack.key, &pack.value, &pack.key_t, &pack.value_t};
    int64_t columns = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Part& part = parts_[i];
      part.to->finite = static_cast<bool*>(space_.at(part.finite_at));
      if (part.transposed) part.to->transposed = space_.at(part.transposed_at);
      if (part.rows && !part.to->rows_are_own) part.to->rows = space_.at(part.rows_at);
      *slots[i] = *part.to;
      columns += part.to->columns;
    }
    run_parallel(attention_pack_kernel, pack, panel_total_ * args_.kv_heads, kPanelKeys * columns / 4);
    return plan;
  }

  int64_t tiles() const { return tile_total_ * args_.heads; }

 private:
  // Whether rows can be multiplied where they lie: elements that are not paired, whole steps of columns, and rows that
  // are dense, or so few that their strides, often powers of two, do not make them share a few sets of the cache.
  bool lies_packed(const AttentionOperand& from, int64_t columns) const {
    constexpr int64_t kFew = 64;
    return (args_.dtype == DType::Float || args_.dtype == DType::Double) && args_.key_starts == nullptr &&
           columns % kColumnStep == 0 && (from.strides.position == columns || args_.keys <= kFew);
  }

  struct Part {
    PackedOperand* to;
    bool transposed, rows;
    size_t transposed_at, rows_at, finite_at;
  };

  const Attention& args_;
  const int64_t sequences_;
  const bool shared_;
  int64_t panel_total_ = 0, tile_total_ = 0;
  Workspace space_;
  size_t panels_, tiles_;
  c10::SmallVector<Part, 4> parts_;
};

// Of a tile against all keys, in units of about a nanosecond: some 30 multiply-adds in one.
inline int64_t tile_cost(const Attention& args) {
  const int64_t rows = std::min(args.queries, kTileQueries);
  return std::max<int64_t>(1, rows * args.keys / 32 * (args.head_dim + args.value_dim + 32));
}

// What a backward's parts are counted within: sequences and heads that are not together in an item.
inline int64_t backward_groups(const AttentionBackwardCpu& args) {
  return args.sequences / std::max<int64_t>(args.sequence_group, 1) * (args.kv_heads / args.head_group);
}

// Items enough for many threads, however few heads there are; each part has its own sums of the queries' gradients.
inline void choose_parts(const Inputs& in, AttentionBackwardCpu& args) {
  constexpr int64_t kItems = 16, kLeastKeys = 512;
  args.sequence_group = args.head_group = 1;
  if (args.grad_mask != nullptr) {
    if (in.attn_mask->size(0) == 1) args.sequence_group = args.sequences;
    if (in.attn_mask->size(1) == 1) args.head_group = args.kv_heads;
  }
  const int64_t items = backward_groups(args);
  const int64_t wanted = items == 0 ? 1 : (kItems + items - 1) / items;
  args.parts = std::clamp<int64_t>(args.keys / kLeastKeys, 1, wanted);
}

}  // namespace lect11ext::attention_op
