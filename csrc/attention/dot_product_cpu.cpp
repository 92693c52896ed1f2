// Dot-product attention on the CPU, from tensors to the kernels of dot_product_cpu.h.
#include "attention/dot_product_cpu.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <cmath>
#include <cstring>

#include "attention/dot_product_describe.h"
#include "attention/dot_product_devices.h"
#include "attention/dot_product_packing.h"
#define LECT11EXT_KERNEL_NAMESPACE HOST
#include "common/philox.h"

namespace lect11ext::attention_op {

namespace on_cpu {
namespace {

Outputs decode(const Inputs& in) {
  AttentionDecodeCpu args{};
  const Describer described(in, args);
  Outputs result{empty_output(in), empty_lse(in)};
  args.out = std::get<0>(result).mutable_data_ptr();
  args.out_strides = strides_of(std::get<0>(result));
  args.lse = std::get<1>(result).mutable_data_ptr();
  // As many parts as give work to many threads, of 512 keys at least.
  constexpr int64_t kItems = 32, kLeastKeys = 512;
  const int64_t heads = args.batch * args.kv_heads, rows = args.batch * args.heads * args.queries;
  args.parts = std::clamp<int64_t>(args.keys / kLeastKeys, 1, (kItems + heads - 1) / heads);
  Workspace space;
  if (args.parts > 1) {
    args.partial =
        space.at(space.reserve(args.parts * rows * decode_partial(args.value_dim) * compute_size(args.dtype)));
  }
  const int64_t cost = args.keys * (args.head_dim + args.value_dim) / 8 / args.parts;
  run_parallel(attention_decode_kernel, args, heads * args.parts, cost);
  if (args.parts > 1) run_parallel(attention_merge_kernel, args, rows, args.parts * args.value_dim / 4);
  return result;
}

Outputs forward_by_tiles(const Inputs& in) {
  AttentionForwardCpu args{};
  const Describer described(in, args);
  Outputs result{empty_output(in), empty_lse(in)};
  const auto& [output, lse] = result;
  args.out = output.mutable_data_ptr();
  args.out_strides = strides_of(output);
  args.lse = lse.mutable_data_ptr();
  if (lse.numel() == 0) return result;
  Packing packing(args, /*may_share=*/true);
  packing.add(args.key, args.head_dim, /*transposed=*/true, /*rows=*/false, args.packed_key);
  packing.add(args.value, args.value_dim, /*transposed=*/false, /*rows=*/true, args.packed_value);
  if (packing.runs_by_heads()) {
    packing.run_by_heads(attention_forward_kernel, args, packing.tiles(), tile_cost(args),
                         [](AttentionForwardCpu& a) { return std::array{&a.packed_key, &a.packed_value}; });
    return result;
  }
  args.plan = packing.run();
  run_parallel(attention_forward_kernel, args, packing.tiles(), tile_cost(args));
  return result;
}

}  // namespace

Outputs forward(const Inputs& in) {
  const bool has_rows = !in.has_starts() && in.query.numel() > 0 && in.key.size(1) > 0;
  const bool decodes = has_rows && few_rows(in.query.size(1), in.key.size(1), in.query.size(2));
  return decodes ? decode(in) : forward_by_tiles(in);
}

Outputs tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Tangents& t) {
  AttentionTangentCpu args{};
  Describer described(in, args);
  described.saved(output, lse, args);
  described.tangents(t, args);
  Outputs result{empty_output(in), empty_lse(in)};
  args.out_t = std::get<0>(result).mutable_data_ptr();
  args.out_t_strides = strides_of(std::get<0>(result));
  args.lse_t = std::get<1>(result).mutable_data_ptr();
  Packing packing(args);
  packing.add(args.key, args.head_dim, /*transposed=*/true, /*rows=*/false, args.packed_key);
  packing.add(args.value, args.value_dim, /*transposed=*/false, /*rows=*/true, args.packed_value);
  packing.add(args.key_t, args.head_dim, /*transposed=*/true, /*rows=*/false, args.packed_key_t);
  packing.add(args.value_t, args.value_dim, /*transposed=*/false, /*rows=*/true, args.packed_value_t);
  args.plan = packing.run();
  run_parallel(attention_tangent_kernel, args, packing.tiles(), 3 * tile_cost(args));
  return result;
}

namespace {

Gradients run_backward(const Inputs& in, const Tensor& output, const Tensor& lse, const Directions& along,
                       GradientMask wanted, bool tangent) {
  AttentionBackwardCpu args{};
  Describer described(in, args);
  described.saved(output, lse, args);
  described.gradients(along.grad_output, along.grad_lse, args);
  if (tangent) described.directions(along, args);
  args.wide_mask = is_mask_repeated(in);
  const GradientTensors gradients(in, wanted, args, args.wide_mask ? at::kDouble : in.compute_type());
  // Weights sum to one, so that a bias of all keys of a query changes lse alone.
  const bool one_bias = args.grad_mask != nullptr && in.attn_mask->size(3) == 1 && args.keys != 1;
  if (one_bias) args.grad_mask = nullptr;
  choose_parts(in, args);
  Packing packing(args);
  const bool transposed = tangent || !scores_by_rows(args);
  packing.add(args.key, args.head_dim, transposed, /*rows=*/true, args.packed_key);
  packing.add(args.value, args.value_dim, transposed, /*rows=*/false, args.packed_value);
  packing.add(args.key_t, args.head_dim, /*transposed=*/true, /*rows=*/true, args.packed_key_t);
  packing.add(args.value_t, args.value_dim, /*transposed=*/true, /*rows=*/false, args.packed_value_t);
  const int64_t rows = args.batch * args.heads * args.queries;
  const int64_t groups = backward_groups(args), cost = tile_cost(args) * (tangent ? 6 : 3);
  const bool by_heads = packing.runs_by_heads() && args.parts == 1 && groups == args.sequences * args.kv_heads;
  if (!by_heads) args.plan = packing.run();
  Workspace space;
  if (args.grad_query != nullptr) {
    const int64_t bytes = args.parts * rows * round_up(args.head_dim, kColumnStep) * compute_size(args.dtype);
    args.query_sums = space.at(space.reserve(bytes));
    std::memset(args.query_sums, 0, bytes);
  }
  const auto kernel = tangent ? attention_backward_tangent_kernel : attention_backward_kernel;
  if (by_heads) {
    packing.run_by_heads(kernel, args, groups, cost, [](AttentionBackwardCpu& a) {
      return std::array{&a.packed_key, &a.packed_value, &a.packed_key_t, &a.packed_value_t};
    });
  } else {
    run_parallel(kernel, args, groups * args.parts, cost);
  }
  if (args.grad_query != nullptr) {
    run_parallel(attention_query_gradient_kernel, args, rows, args.head_dim * (args.parts + 1) / 8 + 1);
  }
  Gradients result = gradients.finish(in);
  if (one_bias) {
    const OptionalTensor& grad_lse = tangent ? along.grad_lse_t : along.grad_lse;
    Tensor& grad = std::get<3>(result);
    if (autograd::defined(grad_lse)) {
      const Tensor seen = at::where(lse == -INFINITY, at::zeros_like(*grad_lse), *grad_lse);
      grad = at::sum_to(seen.unsqueeze(-1), in.attn_mask->sizes()).to(grad.scalar_type());
    }
  }
  return result;
}

}  // namespace

Gradients backward(const OptionalTensor& grad_output, const OptionalTensor& grad_lse, const Inputs& in,
                   const Tensor& output, const Tensor& lse, GradientMask mask) {
  const OptionalTensor none;
  return run_backward(in, output, lse, {grad_output, grad_lse, none, none, {none, none, none, none}, output, lse}, mask,
                      /*tangent=*/false);
}

Gradients backward_tangent(const Inputs& in, const Tensor& output, const Tensor& lse, const Directions& along,
                           GradientMask mask) {
  return run_backward(in, output, lse, along, mask, /*tangent=*/true);
}

}  // namespace on_cpu

Tensor dropout_mask_cpu(const Tensor& key, c10::SymIntArrayRef size, double p) {
  Tensor mask = at::empty_symint(size, key.options().dtype(at::kBool));
  bool* out = mask.mutable_data_ptr<bool>();
  const Tensor dense = key.contiguous();
  const auto seed = static_cast<uint64_t>(dense.const_data_ptr<int64_t>()[0]);
  uint64_t counter = static_cast<uint64_t>(dense.const_data_ptr<int64_t>()[1]);
  const uint32_t threshold = dropout_threshold(p);
  const int64_t columns = mask.size(-1), rows = columns == 0 ? 0 : mask.numel() / columns;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; j += kDropoutBlock, ++counter) {
      const auto block = HOST::philox(seed, counter);
      for (int64_t k = 0; k < std::min<int64_t>(kDropoutBlock, columns - j); ++k) {
        *out++ = (block.x[k / 2] >> (16 * (k % 2)) & 0xFFFF) >= threshold;
      }
    }
  }
  return mask;
}

}  // namespace lect11ext::attention_op
