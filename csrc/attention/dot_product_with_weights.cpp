// Attention and its weights as one op: schema, devices, derivatives. What the two separate ops say of output, lse and
// weights holds here; the derivatives are theirs too.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention/dot_product_autograd.h"
#include "attention/dot_product_describe.h"
#include "attention/dot_product_devices.h"
#include "attention/dot_product_packing.h"
#include "attention/dot_product_weights_cpu.h"
#include "common/ops.h"

namespace lect11ext {
namespace attention_op {

OutputsAndWeights call_with_weights(const Inputs& in, bool average) {
  static const auto op = find_op<WithWeightsSignature>("lect11ext::attention_with_weights");
  return op.call(in.query, in.key, in.value, in.attn_mask, in.alibi_slopes, in.dropout_key, in.dropout_p, in.scale,
                 in.window_left, in.window_right, in.bottom_right, in.softcap, average);
}

namespace {

const OptionalTensor kNone;

// Of the same attention; the key stands for the value, which has no part in them.
WeightsInputs weights_inputs(const Inputs& in, const Tensor& lse, bool average) {
  return {{in.query, in.key, in.key, in.attn_mask, in.alibi_slopes, in.cu_seqlens_q, in.cu_seqlens_k, in.dropout_key,
           in.dropout_p, in.scale, in.window_left, in.window_right, in.bottom_right, in.softcap},
          lse,
          average};
}

// Rows enough for work of many threads, whatever their number; whole register tiles.
int64_t rows_of_item(const Attention& args) {
  constexpr int64_t kItems = 16, kRegisterRows = 6, kLeast = 12;
  return std::clamp(round_up(args.batch * args.queries / kItems, kRegisterRows), kLeast, kTileQueries);
}

OutputsAndWeights cpu_with_weights(WITH_WEIGHTS_PARAMETERS) {
  const Inputs in = WITH_WEIGHTS_INPUTS(kNone);
  in.check();
  const bool one_pass =
      in.query.numel() > 0 && in.key.numel() > 0 && in.value.numel() > 0 && in.key.size(2) <= kOnePassKeys;
  if (!one_pass) {
    const auto [output, lse] = on_cpu::forward(in);
    return {output, lse, on_cpu::weights(weights_inputs(in, lse, average_heads))};
  }
  AttentionWithWeightsCpu args{};
  const Describer described(in, args);
  const Tensor output = empty_output(in), lse = empty_lse(in);
  const Tensor weights = at::empty_symint(weights_inputs(in, lse, average_heads).shape(), query.options());
  args.out = output.mutable_data_ptr();
  args.out_strides = strides_of(output);
  args.lse = lse.mutable_data_ptr();
  args.weights = weights.mutable_data_ptr();
  args.average = average_heads;
  args.rows = rows_of_item(args);
  Packing packing(args, /*may_share=*/true);
  packing.add(args.key, args.head_dim, !scores_by_rows(args), /*rows=*/false, args.packed_key);
  packing.add(args.value, args.value_dim, /*transposed=*/false, /*rows=*/true, args.packed_value);
  args.plan = packing.run();
  const int64_t items = args.batch * ((args.queries + args.rows - 1) / args.rows);
  run_parallel(attention_with_weights_kernel, args, items, tile_cost(args) * args.heads);
  return {output, lse, weights};
}

#ifdef LECT11EXT_WITH_CUDA
OutputsAndWeights cuda_with_weights(WITH_WEIGHTS_PARAMETERS) {
  const Inputs in = WITH_WEIGHTS_INPUTS(kNone);
  in.check();
  const auto [output, lse] = on_cuda::forward(in);
  return {output, lse, composite_weights(weights_inputs(in, lse, average_heads))};
}
#endif

OutputsAndWeights meta_with_weights(WITH_WEIGHTS_PARAMETERS) {
  const Inputs in = WITH_WEIGHTS_INPUTS(kNone);
  in.check();
  const Tensor lse = empty_lse(in);
  return {empty_output(in), lse, at::empty_symint(weights_inputs(in, lse, average_heads).shape(), query.options())};
}

OutputsAndWeights autograd_with_weights(WITH_WEIGHTS_PARAMETERS) {
  const Inputs in = WITH_WEIGHTS_INPUTS(kNone);
  check_constants(in);
  if (inputs_have_tangents(in)) {
    const auto [output, lse] = call_forward(in);
    return {output, lse, call_weights(weights_inputs(in, lse, average_heads))};
  }
  OutputsAndWeights out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_with_weights(in, average_heads);
  }
  const auto& [output, lse, weights] = out;
  record_attention(in, output, lse);
  record_weights(weights_inputs(in, lse, average_heads), weights);
  return out;
}

template <c10::DispatchKey dispatch_key, c10::DeviceType device>
OutputsAndWeights autocast_with_weights(WITH_WEIGHTS_PARAMETERS) {
  const c10::impl::ExcludeDispatchKeyGuard without(dispatch_key);
  return call_with_weights(CastInputs(WITH_WEIGHTS_INPUTS(kNone), device).in, average_heads);
}

}  // namespace
}  // namespace attention_op

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def("attention_with_weights(" WITH_WEIGHTS_SCHEMA ") -> (Tensor output, Tensor lse, Tensor weights)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { m.impl("attention_with_weights", attention_op::cpu_with_weights); }

#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { m.impl("attention_with_weights", attention_op::cuda_with_weights); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) { m.impl("attention_with_weights", attention_op::meta_with_weights); }

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) { m.impl("attention_with_weights", attention_op::autograd_with_weights); }

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) {
  m.impl("attention_with_weights",
         attention_op::autocast_with_weights<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) {
  m.impl("attention_with_weights",
         attention_op::autocast_with_weights<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace lect11ext
