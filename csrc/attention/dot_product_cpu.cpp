// Dot-product attention on the CPU, from tensors to the kernels of dot_product_cpu.h.
#include "attention/dot_product_cpu.h"

#include <ATen/ops/empty.h>

#include "attention/dot_product_describe.h"
#include "attention/dot_product_devices.h"
#include "common/dispatch.h"
#define LECT11EXT_KERNEL_NAMESPACE HOST
#include "common/philox.h"
#include "common/workspace.h"

namespace lect11ext::attention_op {
namespace {

int64_t compute_size(DType type) { return type == DType::Double ? 8 : 4; }

// Packed operands and the starts of panels and tiles, in memory that a call keeps.
class Packing {
 public:
  explicit Packing(const Attention& args) : args_(args), sequences_(args.sequences + 1) {
    panels_ = space_.reserve(sequences_ * sizeof(int64_t));
    tiles_ = space_.reserve(sequences_ * sizeof(int64_t));
    for (int64_t n = 0; n < args.sequences; ++n) {
      const AttentionSequence s(args, n);
      panel_total_ += panel_count(s.keys);
      tile_total_ += tile_count(s.queries);
    }
  }

  // Announces an operand before anything is packed. Its pointers are set by run().
  void add(const AttentionOperand& from, int64_t columns, bool transposed, bool rows, PackedOperand& to) {
    to = {from, columns, nullptr, nullptr, nullptr};
    if (from.data == nullptr) return;
    const int64_t panels = panel_total_ * args_.kv_heads, element = compute_size(args_.dtype);
    Part part{&to, transposed, rows, 0, 0, space_.reserve(panels)};
    if (transposed) part.transposed_at = space_.reserve(panels * transposed_panel(columns) * element);
    if (rows) part.rows_at = space_.reserve(panels * rows_panel(columns) * element);
    parts_.push_back(part);
  }

  // Packs all that was announced.
  AttentionPlan run() {
    auto* panels = static_cast<int64_t*>(space_.at(panels_));
    auto* tiles = static_cast<int64_t*>(space_.at(tiles_));
    panels[0] = tiles[0] = 0;
    for (int64_t n = 0; n < args_.sequences; ++n) {
      const AttentionSequence s(args_, n);
      panels[n + 1] = panels[n] + panel_count(s.keys);
      tiles[n + 1] = tiles[n] + tile_count(s.queries);
    }
    const AttentionPlan plan{panels, tiles, prefers_float_products()};
    AttentionPack pack{&args_, plan, {}, {}, {}, {}};
    PackedOperand* slots[] = {&pack.key, &pack.value, &pack.key_t, &pack.value_t};
    int64_t columns = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Part& part = parts_[i];
      part.to->finite = static_cast<bool*>(space_.at(part.finite_at));
      if (part.transposed) part.to->transposed = space_.at(part.transposed_at);
      if (part.rows) part.to->rows = space_.at(part.rows_at);
      *slots[i] = *part.to;
      columns += part.to->columns;
    }
    run_parallel(attention_pack_kernel, pack, panel_total_ * args_.kv_heads, kPanelKeys * columns / 4);
    return plan;
  }

  int64_t tiles() const { return tile_total_ * args_.heads; }

 private:
  struct Part {
    PackedOperand* to;
    bool transposed, rows;
    size_t transposed_at, rows_at, finite_at;
  };

  const Attention& args_;
  const int64_t sequences_;
  int64_t panel_total_ = 0, tile_total_ = 0;
  Workspace space_;
  size_t panels_, tiles_;
  c10::SmallVector<Part, 4> parts_;
};

// Of a tile against all keys, in units of about a nanosecond: some 30 multiply-adds in one.
int64_t tile_cost(const Attention& args) {
  const int64_t rows = std::min(args.queries, kTileQueries);
  return std::max<int64_t>(1, rows * args.keys / 32 * (args.head_dim + args.value_dim + 32));
}

}  // namespace

namespace on_cpu {

Outputs forward(const Inputs& in) {
  AttentionForwardCpu args{};
  const Describer described(in, args);
  Outputs result{empty_output(in), empty_lse(in)};
  const auto& [output, lse] = result;
  args.out = output.mutable_data_ptr();
  args.out_strides = strides_of(output);
  args.lse = lse.mutable_data_ptr();
  Packing packing(args);
  packing.add(args.key, args.head_dim, /*transposed=*/true, /*rows=*/false, args.packed_key);
  packing.add(args.value, args.value_dim, /*transposed=*/false, /*rows=*/true, args.packed_value);
  args.plan = packing.run();
  run_parallel(attention_forward_kernel, args, packing.tiles(), tile_cost(args));
  return result;
}

Gradients backward(const OptionalTensor&, const OptionalTensor&, const Inputs&, const Tensor&, const Tensor&,
                   GradientMask) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "soon");
}
Outputs tangent(const Inputs&, const Tensor&, const Tensor&, const Tangents&) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "soon");
}
Gradients backward_tangent(const Inputs&, const Tensor&, const Tensor&, const Directions&, GradientMask) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "soon");
}

}  // namespace on_cpu

Tensor dropout_mask_cpu(const Tensor& key, c10::SymIntArrayRef size, double p) {
  Tensor mask = at::empty_symint(size, key.options().dtype(at::kBool));
  bool* out = mask.mutable_data_ptr<bool>();
  const Tensor dense = key.contiguous();
  const auto seed = static_cast<uint64_t>(dense.const_data_ptr<int64_t>()[0]);
  uint64_t counter = static_cast<uint64_t>(dense.const_data_ptr<int64_t>()[1]);
  const auto threshold = static_cast<uint32_t>(std::min(p * 0x1p32, 0x1p32 - 1));
  const int64_t columns = mask.size(-1), rows = columns == 0 ? 0 : mask.numel() / columns;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; j += 4, ++counter) {
      const auto block = HOST::philox(seed, counter);
      for (int64_t k = j; k < std::min(j + 4, columns); ++k) *out++ = block.x[k - j] >= threshold;
    }
  }
  return mask;
}

}  // namespace lect11ext::attention_op
