// PyTorch side of penalized_activation: schema, kernels' arguments. Derivatives: penalties_autograd.cpp. Equations and
// kernels: penalties.h.
#include "autoencoder/penalties.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "autoencoder/partial_sums.h"
#include "autoencoder/penalties_inputs.h"
#include "common/dispatch.h"
#include "common/ops.h"

namespace lect11ext {
namespace {

using namespace penalties;

// --- meta ---------------------------------------------------------------------------------------------------------

Pair meta_forward(const Inputs& in) {
  in.check();
  const auto options = in.input.options();
  return {at::empty_symint(in.input.sym_sizes(), options),
          at::empty_symint(in.sums_size(), options.dtype(in.compute_dtype()))};
}

Pair meta_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_penalty, const Inputs& in,
                   std::array<bool, 2> mask) {
  in.check();
  in.check_gradients(grad_output, grad_penalty);
  const bool wants_scale = mask[1] && in.is_scaled();
  return {mask[0] ? at::empty_symint(in.input.sym_sizes(), in.input.options()) : Tensor(),
          wants_scale ? at::empty_symint(in.scale->sym_sizes(), in.scale->options()) : Tensor()};
}

// --- kernels ------------------------------------------------------------------------------------------------------

// Tensors that the views borrow from.
struct Held {
  Operand input, scale, grad_output, grad_penalty;
};

void describe(const Inputs& in, PenalizedActivation& args, Held& held) {
  const auto size = in.input.sizes();
  held.input = {in.input, &args.input};
  held.scale = {in.is_scaled() ? in.scale->expand(size) : Tensor(), &args.scale};
  set_views(size, args.shape, {&held.input, &held.scale, &held.grad_output, &held.grad_penalty});
  args.compute_double = in.compute_dtype() == at::kDouble;
  args.activation = in.activation;
  args.penalty = in.penalty;
  args.streams = 2 * in.input.nbytes() > kBeyondCaches;
}

ColumnBlocks blocks_of(const Tensor& input) {
  const int64_t cols = input.size(-1), rows = input.numel() / cols;
  if (input.is_cpu()) return ColumnBlocks(rows, cols, ColumnBlocks::kRuns);
  // A block of threads takes eight rows at a time: runs of fewer would leave some idle, and sums as many as elements.
  constexpr int64_t kRowsAtOnce = 8;
  return ColumnBlocks(rows, cols, std::min(ColumnBlocks::kRunsOnGpu, (rows + kRowsAtOnce - 1) / kRowsAtOnce));
}

constexpr int64_t kElementCost = 1;  // nanoseconds, of the slowest activation

Pair kernel_forward(const Inputs& in) {
  in.check();
  PenaltyForward args{};
  Held held;
  describe(in, args, held);
  const auto options = in.input.options(), sums_options = options.dtype(in.compute_dtype());
  const auto size = in.sums_size();
  Tensor output = empty_output(in.input.sizes(), options);
  if (in.input.numel() == 0) return {output, at::zeros_symint(size, sums_options)};
  const int64_t cols = in.input.size(-1), rows = in.input.numel() / cols;
  args.output = output.mutable_data_ptr();
  args.output_dtype = dtype_of(output, "input");
  Tensor sums;
  const bool by_columns = in.penalty == Penalty::Mean;
  if (by_columns) {
    args.blocks = blocks_of(in.input);
    sums = at::empty({args.blocks.runs, cols}, sums_options);
  } else {
    args.tiles = RowTiles(rows, cols);
    sums = at::empty({rows * args.tiles.tiles_per_row}, sums_options);
  }
  args.sums = sums.mutable_data_ptr();
  const int64_t items = by_columns ? args.blocks.count : args.tiles.count;
  const int64_t elements = by_columns ? elements_of(args.blocks) : elements_of(args.tiles);
  launch<penalty_forward_kernel, LECT11EXT_CUDA_KERNEL(penalty_forward)>(args, items, elements * kElementCost,
                                                                         output.device());
  if (by_columns) return {output, sum_runs(sums, 1.0 / static_cast<double>(rows))};
  const auto plain_size = C10_AS_INTARRAYREF_SLOW(size);
  return {output, args.tiles.tiles_per_row > 1 ? sum_tiles(sums, plain_size, args.tiles) : sums.view(plain_size)};
}

Pair kernel_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_penalty, const Inputs& in,
                     std::array<bool, 2> mask) {
  in.check();
  in.check_gradients(grad_output, grad_penalty);
  PenaltyBackward args{};
  Held held;
  held.grad_output = {autograd::tensor_or_none(grad_output), &args.grad_output};
  held.grad_penalty = {autograd::defined(grad_penalty) ? in.expand_grad(*grad_penalty) : Tensor(), &args.grad_penalty};
  describe(in, args, held);
  const bool wants_scale = mask[1] && in.is_scaled();
  Tensor grad_input = mask[0] ? empty_output(in.input.sizes(), in.input.options()) : Tensor(), grad_scale;
  if (in.input.numel() == 0) {
    if (wants_scale) grad_scale = at::zeros(in.scale->sizes(), in.scale->options());
    return {grad_input, grad_scale};
  }
  const int64_t cols = in.input.size(-1);
  args.blocks = blocks_of(in.input);
  args.grad_penalty_scale =
      in.penalty == Penalty::Mean ? 1.0 / static_cast<double>(in.rows().guard_int(__FILE__, __LINE__)) : 1.0;
  if (mask[0]) args.grad_input = grad_input.mutable_data_ptr();
  args.grad_input_dtype = dtype_of(in.input, "input");
  Tensor sums;
  if (wants_scale) {
    sums = at::empty({args.blocks.runs, cols}, in.input.options().dtype(in.compute_dtype()));
    args.grad_scale = sums.mutable_data_ptr();
  }
  if (mask[0] || wants_scale) {
    launch<penalty_backward_kernel, LECT11EXT_CUDA_KERNEL(penalty_backward)>(
        args, args.blocks.count, elements_of(args.blocks) * kElementCost, in.input.device());
  }
  if (wants_scale) grad_scale = sum_runs(sums).to(in.scale->scalar_type());
  return {grad_input, grad_scale};
}

// --- registration -------------------------------------------------------------------------------------------------

template <Pair (*body)(const Inputs&)>
Pair forward_entry(PENALTY_PARAMETERS) {
  return body(PENALTY_INPUTS);
}

template <Pair (*body)(const OptionalTensor&, const OptionalTensor&, const Inputs&, std::array<bool, 2>)>
Pair backward_entry(const OptionalTensor& grad_output, const OptionalTensor& grad_penalty, PENALTY_PARAMETERS,
                    std::array<bool, 2> mask) {
  return body(grad_output, grad_penalty, PENALTY_INPUTS, mask);
}

}  // namespace

Pair penalties::call_forward(PENALTY_PARAMETERS) {
  static const auto op = find_op<ForwardSignature>("lect11ext::penalized_activation");
  return op.call(PENALTY_ARGUMENTS);
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def(
      "penalized_activation(Tensor input, Tensor? scale, str activation, str penalty) -> (Tensor output, Tensor "
      "penalty)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "penalized_activation_backward(Tensor? grad_output, Tensor? grad_penalty, Tensor input, Tensor? scale, "
      "str activation, str penalty, bool[2] output_mask) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

static void add_kernels(torch::Library& m) {
  m.impl("penalized_activation", forward_entry<kernel_forward>);
  m.impl("penalized_activation_backward", backward_entry<kernel_backward>);
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { add_kernels(m); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(lect11ext, Meta, m) {
  m.impl("penalized_activation", forward_entry<meta_forward>);
  m.impl("penalized_activation_backward", backward_entry<meta_backward>);
}

}  // namespace lect11ext
