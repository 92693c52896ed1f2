// lstm_layer and gru_layer step by step, from the fused cells: whatever the layer's own kernels do not cover.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "recurrent/cells_ops.h"
#include "recurrent/layer_inputs.h"

namespace lect11ext::layer_op {

Outputs step_by_step(const Inputs& in) {
  const int64_t time = in.batch_first ? 1 : 0, steps = in.input.size(time);
  Tensor h = in.h, c = in.is_lstm() ? *in.c : Tensor();
  std::vector<Tensor> outputs(steps);
  const auto choose = [](const Tensor& where, const Tensor& a, const Tensor& b) { return at::where(where, a, b); };
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = in.reverse ? steps - 1 - s : s;
    const Tensor active = autograd::defined(in.lengths) ? in.lengths->gt(t).unsqueeze(-1) : Tensor();
    if (autograd::defined(in.reset)) {
      Tensor restart = in.reset->select(time, t).unsqueeze(-1);
      if (active.defined()) restart = restart & active;
      h = choose(restart, at::zeros_like(h), h);
      if (c.defined()) c = choose(restart, at::zeros_like(c), c);
    }
    Tensor h_new, c_new;
    const Tensor input = in.input.select(time, t);
    if (in.is_lstm()) {
      Tensor gates;
      std::tie(h_new, c_new, gates) =
          lstm_cell(input, h, c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.candidate, in.grad_clip, false);
      if (in.has_projection()) h_new = at::linear(h_new, *in.weight_hr);
    } else {
      h_new = std::get<0>(gru_cell(input, h, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, /*reset_after=*/true,
                                   in.grad_clip, false));
    }
    outputs[t] = active.defined() ? choose(active, h_new, at::zeros_like(h_new)) : h_new;
    h = active.defined() ? choose(active, h_new, h) : h_new;
    if (c.defined()) c = active.defined() ? choose(active, c_new, c) : c_new;
  }
  if (steps == 0) {
    const auto [first, second] = in.order(in.steps(), in.batch());
    return {at::empty_symint({first, second, in.h.sym_size(1)}, in.input.options()),
            h.clone(),
            c.defined() ? c.clone() : c,
            {},
            {}};
  }
  return {at::stack(outputs, time), h, c, {}, {}};
}

}  // namespace lect11ext::layer_op
