// The weights of dot-product attention on the CPU, from tensors to the kernels of dot_product_weights_cpu.h.
#include "attention/dot_product_weights_cpu.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <cstring>

#include "attention/dot_product_describe.h"
#include "attention/dot_product_packing.h"
#include "attention/dot_product_weights_inputs.h"

namespace lect11ext::attention_op::on_cpu {
namespace {

bool is_empty(const Attention& args) { return args.batch * args.heads * args.queries * args.keys == 0; }

// Of all gradients, where nothing is summed.
Gradients zero_gradients(const WeightsInputs& w, GradientMask mask) {
  Gradients result;
  if (mask[0]) std::get<0>(result) = at::zeros_like(w.in.query);
  if (mask[1]) std::get<1>(result) = at::zeros_like(w.in.key);
  if (mask[2]) std::get<2>(result) = at::zeros(w.lse.sizes(), w.lse.options());
  if (mask[3] && w.in.has_float_mask())
    std::get<3>(result) = at::zeros(w.in.attn_mask->sizes(), w.in.attn_mask->options());
  return result;
}

}  // namespace

Tensor weights(const WeightsInputs& w) {
  AttentionWeightsCpu args{};
  Describer described(w.in, args);
  args.lse = described.dense(w.lse);
  args.average = w.average;
  const auto shape = w.shape();
  if (is_empty(args)) return at::full_symint(shape, std::nan(""), w.in.query.options());  // an average over no heads
  Tensor result = at::empty_symint(shape, w.in.query.options());
  args.weights = result.mutable_data_ptr();
  Packing packing(args, /*may_share=*/true);
  packing.add(args.key, args.head_dim, !scores_by_rows(args), /*rows=*/false, args.packed_key);
  args.plan = packing.run();
  const int64_t items = args.batch * tile_count(args.queries) * key_block_count(args.keys);
  const int64_t rows = std::min(args.queries, kTileQueries), width = std::min(args.keys, kBlockKeys);
  const int64_t cost = std::max<int64_t>(1, rows * width / 32 * (args.head_dim + 32));  // of a head
  const int64_t together = args.average ? args.heads : 1;
  run_parallel(attention_weights_kernel, args, items * args.heads / together, cost * together);
  return result;
}

Gradients weights_backward(const Tensor& grad, const WeightsInputs& w, GradientMask mask) {
  AttentionWeightsBackwardCpu args{};
  Describer described(w.in, args);
  args.lse = described.dense(w.lse);
  if (is_empty(args)) return zero_gradients(w, mask);
  args.gradient.data = grad.const_data_ptr();
  for (int64_t d = 0, from = 0; d < 4; ++d) args.gradient.strides[d] = d == 1 && w.average ? 0 : grad.stride(from++);
  args.share = w.average ? 1.0 / static_cast<double>(args.heads) : 1.0;
  args.wide_mask = is_mask_repeated(w.in);
  const GradientTensors gradients(w.in, {mask[0], mask[1], false, mask[3]}, args,
                                  args.wide_mask ? at::kDouble : w.in.compute_type());
  // A bias of all keys of a query changes their weights as −lse does.
  const bool one_bias = args.grad_mask != nullptr && w.in.attn_mask->size(3) == 1 && args.keys != 1;
  if (one_bias) args.grad_mask = nullptr;
  choose_parts(w.in, args);
  Packing packing(args);
  packing.add(args.key, args.head_dim, !scores_by_rows(args), /*rows=*/mask[0], args.packed_key);
  args.plan = packing.run(/*widens=*/true);
  const int64_t rows = args.batch * args.heads * args.queries;
  Workspace space;
  if (mask[0]) {
    const int64_t bytes = args.parts * rows * round_up(args.head_dim, kColumnStep) * compute_size(args.dtype);
    args.query_sums = space.at(space.reserve(bytes));
    if (bytes > 0) std::memset(args.query_sums, 0, bytes);
  }
  const Tensor lse_sums = at::zeros({args.parts, args.batch, args.heads, args.queries}, w.lse.options());
  args.lse_sums = lse_sums.mutable_data_ptr();
  const int64_t groups = backward_groups(args);
  run_parallel(attention_weights_backward_kernel, args, groups * args.parts, 2 * tile_cost(args));
  if (mask[0]) {
    run_parallel(attention_query_gradient_kernel, static_cast<const AttentionBackwardCpu&>(args), rows,
                 args.head_dim * (args.parts + 1) / 8 + 1);
  }
  const Gradients found = gradients.finish(w.in);
  Gradients result{std::get<0>(found), std::get<1>(found), Tensor(), std::get<3>(found)};
  const Tensor grad_lse = args.parts == 1 ? lse_sums.squeeze(0) : lse_sums.select(0, 0).clone();
  for (int64_t part = 1; part < args.parts; ++part) grad_lse.add_(lse_sums.select(0, part));
  if (mask[2]) std::get<2>(result) = grad_lse;
  if (one_bias) {
    const Tensor& like = *w.in.attn_mask;
    std::get<3>(result) = at::sum_to(-grad_lse.unsqueeze(-1), like.sizes()).to(like.scalar_type());
  }
  return result;
}

}  // namespace lect11ext::attention_op::on_cpu
