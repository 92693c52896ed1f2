// A layer's backward: the kernel's recurrence, then products and sums over all steps at once.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <array>
#include <iterator>

#include "common/tensors.h"
#include "common/workspace.h"
#include "recurrent/layer_tensors.h"
#include "recurrent/products.h"

namespace lect11ext::layer_op {
namespace {

// The states before every step, [T, B, H] in the order of the input: those after the step before it, or the first.
Tensor before_steps(const Inputs& in, const Tensor& states, const Tensor& initial) {
  const int64_t time = in.time_dim(), T = states.size(time);
  Tensor before = at::empty(states.sizes(), states.options());
  if (T == 0) return before;
  before.select(time, in.reverse ? T - 1 : 0).copy_(initial);
  before.narrow(time, in.reverse ? 0 : 1, T - 1).copy_(states.narrow(time, in.reverse ? 1 : 0, T - 1));
  if (in.reverse && autograd::defined(in.lengths)) {  // rows begin at their own end
    const Tensor last = (*in.lengths - 1).clamp(0, T - 1).unsqueeze(time).unsqueeze(-1);
    const Tensor start = initial.unsqueeze(time);
    before.scatter_(time, last.expand(start.sizes()), start);
  }
  if (autograd::defined(in.reset)) before.masked_fill_(in.reset->unsqueeze(-1), 0);
  // What a row without the step holds must not reach the weights, not even times zero.
  if (autograd::defined(in.lengths)) before.masked_fill_(in.inactive().unsqueeze(-1), 0);
  return before;
}

// Whether gradients of the sums are kept in the input's type: on the CPU where all products over time would round them
// anyway, and nothing else needs them.
bool rounds(const Inputs& in, const LayerGradients& args) {
  if (!in.input.is_cpu()) return true;
  if (in.has_norm() || in.resets_first() || args.peephole != nullptr || !autograd::defined(in.weight_ih)) return false;
  const int64_t columns = in.gates() * args.hidden, least = std::min(in.input.size(2), args.hidden);
  return columns % 2 == 0 &&
         recurrent::rounds_gradients(in.input.scalar_type(), args.steps * args.batch * columns * least);
}

// Steps first_step … of a sequence of which `in` has a part.
Gradients backward_of_steps(const Device& device, const OutputGradients& grads, const Inputs& in, const Outputs& kept,
                            const Mask& mask, int64_t first_step) {
  const Common common(in);
  LayerGradients args{};
  common.describe(in, args);
  const int64_t T = args.steps, B = args.batch, H = args.hidden, G = in.gates();
  const auto type = in.input.scalar_type();
  const auto options = in.input.options();
  args.rounds = rounds(in, args);
  const auto pre_options = options.dtype(args.rounds ? type : recurrent::compute_type(in.input));
  const auto [first, second] = in.order(T, B);
  const auto cast = [&](const Tensor& t) { return t.defined() ? t.to(type).contiguous() : Tensor(); };
  const Tensor grad_out = cast(grads.out), grad_h = cast(grads.h), grad_c = cast(grads.c);
  const Tensor grad_gates = cast(grads.gates), grad_cells = cast(grads.cells);
  const Tensor out = kept.out.contiguous(), gates = kept.gates.contiguous(), cells = cast(kept.cells);
  const Tensor normed = cast(kept.normed);
  const Tensor rstd = kept.rstd.defined() ? kept.rstd.to(recurrent::compute_type(in.input)).contiguous() : Tensor();
  const bool has_mask = common.hidden_mask.defined(), differs = in.has_norm() || (!in.is_lstm() && in.reset_after);

  Gradients result;
  // They stay in here, but for an input's gradient, so that on the CPU they need no fresh memory.
  const bool multiplies = autograd::defined(in.weight_ih), borrows = in.input.is_cpu() && multiplies;
  Workspace space;
  const bool wanted[] = {true, differs, in.has_norm() && !in.is_lstm()};
  size_t parts_of_space[std::size(wanted)];
  for (size_t i = 0; i < std::size(wanted); ++i) {
    if (borrows && wanted[i]) parts_of_space[i] = space.reserve(T * B * G * H * pre_options.dtype().itemsize());
  }
  const auto sums = [&, first = first, second = second](size_t i) {
    const std::array<int64_t, 3> size{first, second, G * H};
    if (!wanted[i]) return Tensor();
    return borrows ? at::from_blob(space.at(parts_of_space[i]), size, pre_options) : empty_output(size, pre_options);
  };
  if (mask[kH]) result[kH] = at::empty({B, H}, options);
  if (mask[kC] && in.is_lstm()) result[kC] = at::empty({B, H}, options);
  if (mask[kHiddenMask] && has_mask) result[kHiddenMask] = at::empty({B, H}, options);
  const Tensor pre = sums(0), hidden = sums(1), after_norm = sums(2);

  args.clip = in.clip();
  args.truncate = in.truncate;
  args.first_step = first_step;
  args.grad_out = read(grad_out);
  args.grad_h_out = read(grad_h);
  args.grad_c_out = read(grad_c);
  args.grad_gates = read(grad_gates);
  args.grad_cells = read(grad_cells);
  args.out = read(out);
  args.gates = read(gates);
  args.cells = read(cells);
  args.normed = read(normed);
  args.rstd = read(rstd);
  args.out_strides = strides_of(in, out);
  args.gates_strides = strides_of(in, gates);
  args.normed_strides = strides_of(in, normed);
  args.rstd_strides = strides_of(in, rstd);
  args.grad_pre = write(pre);
  args.grad_hidden = write(hidden);
  args.grad_normed = write(after_norm);
  args.grad_pre_strides = strides_of(in, pre);
  args.grad_h = write(result[kH]);
  args.grad_c = write(result[kC]);
  args.grad_mask = write(result[kHiddenMask]);
  device.run_backward(args, options);

  // What is left are products and sums over all steps at once.
  const auto as_rows = [&](const Tensor& t) { return t.view({T * B, t.size(2)}); };
  const Tensor rows = as_rows(pre), hidden_rows = differs ? as_rows(hidden) : rows;
  const Tensor bias_rows = after_norm.defined() ? as_rows(after_norm) : in.is_lstm() ? rows : hidden_rows;
  // What stands beyond the lengths must not reach the weights, not even times zero.
  const auto used_input = [&] {
    const Tensor x = autograd::defined(in.lengths) ? in.input.masked_fill(in.inactive().unsqueeze(-1), 0) : in.input;
    return as_rows(x.contiguous());
  };
  recurrent::Products products;
  if (mask[kInput]) {
    result[kInput] = multiplies ? products.input_gradient(rows, *in.weight_ih).view(in.input.sizes()) : pre.to(type);
  }
  if (mask[kWeightIh] && multiplies) result[kWeightIh] = products.weight_gradient(rows, used_input());
  if (mask[kWeightHh]) {
    Tensor before = before_steps(in, out, common.h);
    if (has_mask) before = before * common.hidden_mask.unsqueeze(in.time_dim());
    if (in.resets_first()) {
      const Tensor reset = gates.narrow(2, 0, H) * before;
      Tensor& grad = result[kWeightHh] = empty_output(in.weight_hh.sizes(), options);
      products.weight_gradient(rows.narrow(1, 0, 2 * H), as_rows(before), grad.narrow(0, 0, 2 * H));
      products.weight_gradient(rows.narrow(1, 2 * H, H), as_rows(reset), grad.narrow(0, 2 * H, H));
    } else {
      result[kWeightHh] = products.weight_gradient(hidden_rows, as_rows(before));
    }
  }
  if (mask[kBiasIh] && autograd::defined(in.bias_ih)) result[kBiasIh] = products.bias_gradient(rows, type);
  if (mask[kBiasHh] && autograd::defined(in.bias_hh)) result[kBiasHh] = products.bias_gradient(bias_rows, type);
  products.run();
  const auto parts = [&](const Tensor& t, int64_t g) { return t.narrow(2, g * H, H); };
  if (mask[kPeephole] && common.peephole.defined()) {
    const Tensor before = before_steps(in, cells, common.c);
    const Tensor after = in.zones_out_c() ? parts(gates, 1) * before + parts(gates, 0) * parts(gates, 2) : cells;
    const auto sum = [&](int64_t g, const Tensor& c) { return sum_rows(parts(pre, g) * c); };
    result[kPeephole] = at::stack({sum(0, before), sum(1, before), sum(3, after)}).to(type);
  }
  if (mask[kNorm] && common.norm.defined()) {
    result[kNorm] = sum_rows((after_norm.defined() ? after_norm : pre) * normed).to(type);
  }
  return result;
}

// `count` steps from `low` on in time, as a sequence of their own that begins with h and c.
Inputs part_of(const Inputs& in, int64_t low, int64_t count, const Tensor& h, const Tensor& c) {
  Inputs part = in.without_recompute();
  part.h = h;
  part.c = autograd::optional_of(c);
  part.input = in.input.narrow(in.time_dim(), low, count);
  for (OptionalTensor* t : {&part.reset, &part.zoneout_h, &part.zoneout_c}) {
    if (autograd::defined(*t)) *t = (*t)->narrow(in.time_dim(), low, count);
  }
  if (autograd::defined(in.lengths)) part.lengths = *in.lengths - low;
  return part;
}

// A part of `recompute` steps at a time, from the last: its forward again, then its backward.
Gradients backward_in_parts(const Device& device, const OutputGradients& grads, const Inputs& in, const Outputs& kept,
                            const Mask& mask) {
  const int64_t time = in.time_dim(), T = in.input.size(time);
  OutputGradients carried = grads;
  Mask part_mask = mask;
  part_mask[kH] = part_mask[kC] = true;
  Gradients result;
  if (mask[kInput]) result[kInput] = empty_output(in.input.sizes(), in.input.options());
  for (int64_t begin = (std::max<int64_t>(T, 1) - 1) / in.recompute * in.recompute; begin >= 0; begin -= in.recompute) {
    const int64_t count = std::min(in.recompute, T - begin);
    Tensor h = in.h, c = in.is_lstm() ? *in.c : Tensor();
    if (begin > 0) {
      const int64_t t = in.reverse ? T - begin : begin - 1;
      h = kept.out.select(time, t);
      // A row that begins later, from its own end on, has its first state yet.
      if (in.reverse && autograd::defined(in.lengths)) h = at::where((*in.lengths <= t).unsqueeze(-1), in.h, h);
      if (c.defined()) c = kept.cells.select(0, begin / in.recompute - 1);
    }
    const int64_t low = in.reverse ? T - begin - count : begin;
    const Inputs part = part_of(in, low, count, h, c);
    const Outputs again = device.forward(part, /*save=*/true);
    if (grads.out.defined()) carried.out = grads.out.narrow(time, low, count);
    const auto found = backward_of_steps(device, carried, part, again, part_mask, begin);
    carried.h = found[kH];
    carried.c = found[kC];
    if (mask[kInput]) result[kInput].narrow(time, low, count).copy_(found[kInput]);
    for (size_t i = kWeightIh; i < kInputs; ++i) {
      if (!found[i].defined()) continue;
      result[i] = result[i].defined() ? result[i].add_(found[i]) : found[i].to(recurrent::compute_type(found[i]));
    }
  }
  for (size_t i = kWeightIh; i < kInputs; ++i) {
    if (result[i].defined()) result[i] = result[i].to(in.input.scalar_type());
  }
  if (mask[kH]) result[kH] = carried.h;
  if (mask[kC]) result[kC] = carried.c;
  return result;
}

}  // namespace

Gradients fused_backward(const Device& device, const OutputGradients& grads, const Inputs& in, const Outputs& kept,
                         const Mask& mask) {
  check_backward(grads, in, kept);
  TORCH_CHECK_NOT_IMPLEMENTED(is_fused(in), "the fused backward has no projections");
  return in.recompute == 0 ? backward_of_steps(device, grads, in, kept, mask, /*first_step=*/0)
                           : backward_in_parts(device, grads, in, kept, mask);
}

}  // namespace lect11ext::layer_op
