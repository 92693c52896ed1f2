// What the ops of dot-product attention on the CPU share: packed operands, costs and parts.
#pragma once

#include <c10/util/SmallVector.h>

#include <array>

#include "attention/dot_product_cpu.h"
#include "attention/dot_product_inputs.h"
#include "common/dispatch.h"
#include "common/workspace.h"

namespace lect11ext::attention_op {

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

  // Announces an operand before anything is packed.
  void add(const AttentionOperand& from, int64_t columns, bool transposed, bool rows, PackedOperand& to) {
    to = {from, columns, 0, nullptr, nullptr, rows && lies_packed(from, columns), nullptr};
    parts_.push_back({&to, transposed, rows && !to.rows_are_own});
  }

  // Packs all that was announced; `widens` as AttentionPlan has it.
  AttentionPlan run(bool widens = prefers_float_products()) {
    PackedOperand* packed[kMostParts];
    for (size_t i = 0; i < parts_.size(); ++i) packed[i] = parts_[i].to;
    const Places places = reserve(packed, panel_total_ * args_.kv_heads, space_);
    const AttentionPlan plan = make_plan(widens);
    AttentionPack pack{&args_, plan, {}, {}, {}, {}};
    place(packed, places, 0, space_, pack);
    run_parallel(attention_pack_kernel, pack, panel_total_ * args_.kv_heads, pack_cost());
    return plan;
  }

  // Whether there are short sequences enough to take a few heads at a time: see run_by_heads.
  bool runs_by_heads() const {
    constexpr int64_t kMostKeys = 256, kHeadsOfAThread = 4;
    return args_.key_starts == nullptr && !shared_ && args_.keys > 0 && args_.keys <= kMostKeys &&
           args_.sequences * args_.kv_heads >= kHeadsOfAThread * at::get_num_threads();
  }

  // In place of run() and of a kernel after it, whose `items` lie one kv_head of a sequence after the other: packs a
  // few heads and runs the kernel on them, again and again, so that panels are read from the cache. `packed(args)` are
  // the operands that were announced, in order.
  template <class Args, class Packed>
  void run_by_heads(void (*kernel)(const Args&, int64_t, int64_t), Args& args, int64_t items, int64_t cost,
                    Packed packed) {
    constexpr int64_t kCache = 256 * 1024;
    args.plan = make_plan(prefers_float_products());
    const int64_t heads = args.sequences * args.kv_heads, of_head = items / heads, panels = panel_count(args.keys);
    const int64_t few = std::max<int64_t>(1, kCache / std::max<int64_t>(1, panels * panel_bytes()));
    const int64_t cost_of_head = cost * of_head + pack_cost() * panels;
    const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost_of_head));
    at::parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
      Args part = args;
      const auto operands = packed(part);
      Workspace space;
      const Places places = reserve(operands.data(), few * panels, space);
      for (int64_t head = begin; head < end; head += few) {
        const int64_t last = std::min(head + few, end);
        AttentionPack pack{&args_, args.plan, {}, {}, {}, {}};
        place(operands.data(), places, head * panels, space, pack);
        attention_pack_kernel(pack, head * panels, last * panels);
        kernel(part, head * of_head, last * of_head);
      }
    });
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
  };
  static constexpr size_t kMostParts = 4;

  AttentionPlan make_plan(bool widens) {
    auto* panels = static_cast<int64_t*>(space_.at(panels_));
    auto* tiles = static_cast<int64_t*>(space_.at(tiles_));
    panels[0] = tiles[0] = 0;
    for (int64_t n = 0; n < args_.sequences; ++n) {
      const AttentionSequence s(args_, n);
      panels[n + 1] = panels[n] + panel_count(s.keys);
      tiles[n + 1] = tiles[n] + tile_count(s.queries);
    }
    return {panels, tiles, shared_, widens};
  }

  // Where in a workspace an operand's flags, transposed panels and rows are.
  using Places = std::array<std::array<size_t, 3>, kMostParts>;

  // Of `count` panels.
  Places reserve(PackedOperand* const* packed, int64_t count, Workspace& space) const {
    const int64_t element = compute_size(args_.dtype);
    Places places{};
    for (size_t i = 0; i < parts_.size(); ++i) {
      const int64_t columns = packed[i]->from.data == nullptr ? 0 : packed[i]->columns;
      places[i] = {space.reserve(count),
                   space.reserve(parts_[i].transposed ? count * transposed_panel(columns) * element : 0),
                   space.reserve(parts_[i].rows ? count * rows_panel(columns) * element : 0)};
    }
    return places;
  }

  // The operands' panels from panel `first` on.
  void place(PackedOperand* const* packed, const Places& places, int64_t first, Workspace& space,
             AttentionPack& pack) const {
    PackedOperand* slots[] = {&pack.key, &pack.value, &pack.key_t, &pack.value_t};
    for (size_t i = 0; i < parts_.size(); ++i) {
      PackedOperand& to = *packed[i];
      if (to.from.data == nullptr) continue;
      to.first = first;
      to.finite = static_cast<bool*>(space.at(places[i][0]));
      if (parts_[i].transposed) to.transposed = space.at(places[i][1]);
      if (parts_[i].rows) to.rows = space.at(places[i][2]);
      *slots[i] = to;
    }
  }

  int64_t pack_cost() const {  // of a panel of all operands
    int64_t columns = 0;
    for (const Part& part : parts_) columns += part.to->columns;
    return kPanelKeys * columns / 4;
  }
  int64_t panel_bytes() const {
    int64_t columns = 0;
    for (const Part& part : parts_) columns += part.to->columns * (part.transposed + part.rows);
    return kPanelKeys * columns * compute_size(args_.dtype);
  }

  const Attention& args_;
  const int64_t sequences_;
  const bool shared_;
  int64_t panel_total_ = 0, tile_total_ = 0;
  Workspace space_;
  size_t panels_, tiles_;
  c10::SmallVector<Part, kMostParts> parts_;
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

// Whether an element of the mask is added to so many scores that its gradient is added up in double. Such a mask is
// small; of one that heads share, say, double would be a tenth of a backward's time.
inline bool is_mask_repeated(const Inputs& in) {
  constexpr int64_t kManyScores = 256;
  if (!in.has_float_mask()) return false;
  const int64_t scores[] = {in.query.size(0), in.query.size(1), in.query.size(2), in.key.size(2)};
  int64_t times = 1;
  for (int64_t d = 0; d < 4; ++d) times *= in.attn_mask->size(d) == 1 ? scores[d] : 1;
  return times >= kManyScores;
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
