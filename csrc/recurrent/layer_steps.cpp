// lstm_layer and gru_layer step by step, in differentiable ops: whatever the layer's own kernels do not cover.
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>

#include <vector>

#include "recurrent/cells_ops.h"
#include "recurrent/layer_composite.h"

namespace lect11ext::layer_op {
namespace {

// Whether a step is a fused cell's. The cell clips its own h, not what a projection makes of it.
bool is_plain(const Inputs& in) {
  return !(in.has_projection() && in.grad_clip.has_value()) && autograd::defined(in.weight_ih) &&
         !autograd::defined(in.weight_peephole) && !in.has_norm() && !autograd::defined(in.hidden_mask) &&
         !in.zones_out_h() && !in.zones_out_c();
}

struct State {
  Tensor h, c;
};

State cell_step(const Inputs& in, const Tensor& x, const State& before) {
  if (!in.is_lstm()) {
    return {std::get<0>(gru_cell(x, before.h, *in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.reset_after,
                                 in.grad_clip, false)),
            {}};
  }
  auto [h, c, gates] = lstm_cell(x, before.h, before.c, *in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh,
                                 in.candidate, in.grad_clip, false);
  if (in.has_projection()) h = at::linear(h, *in.weight_hr);
  return {h, c};
}

// What a step computes, as layer.h has it.
class GeneralStep {
 public:
  explicit GeneralStep(const Steps& steps)
      : in_(steps.in),
        steps_(steps),
        keep_h_(steps, in_.zoneout_h, in_.zoneout_rate_h, in_.h),
        keep_c_(steps, in_.zoneout_c, in_.zoneout_rate_c, in_.h) {}

  State operator()(const Tensor& x, const State& before, int64_t t) const {
    State after = in_.is_lstm() ? lstm(sums_of(x), before) : gru(sums_of(x), before.h);
    after.h = clip_gradient(keep_h_.zone_out(before.h, after.h, t), in_.clip());
    if (after.c.defined()) after.c = clip_gradient(keep_c_.zone_out(before.c, after.c, t), in_.clip());
    return after;
  }

 private:
  Tensor sums_of(const Tensor& x) const {
    if (autograd::defined(in_.weight_ih)) return at::linear(x, *in_.weight_ih, in_.bias_ih);
    return autograd::defined(in_.bias_ih) ? x + *in_.bias_ih : x;
  }

  Tensor product(const Tensor& h) const {
    if (!in_.has_norm()) return at::linear(steps_.masked(h), in_.weight_hh, in_.bias_hh);
    const Tensor v = normalize(at::linear(steps_.masked(h), in_.weight_hh)).first * *in_.layer_norm;
    return autograd::defined(in_.bias_hh) ? v + *in_.bias_hh : v;
  }

  State lstm(const Tensor& x, const State& before) const {
    const auto sums = (x + product(before.h)).chunk(4, 1);
    const Tensor p = autograd::tensor_or_none(in_.weight_peephole);
    const auto gate = [&](const Tensor& sum, int64_t part, const Tensor& c) {
      return (p.defined() ? sum + p[part] * c : sum).sigmoid();
    };
    const Tensor i = gate(sums[0], 0, before.c), f = gate(sums[1], 1, before.c);
    const Tensor g = in_.sigmoid_candidate() ? sums[2].sigmoid() : sums[2].tanh();
    const Tensor c = f * before.c + i * g, o = gate(sums[3], 2, c), h = o * c.tanh();
    return {in_.has_projection() ? at::linear(h, *in_.weight_hr) : h, c};
  }

  State gru(const Tensor& x, const Tensor& h) const {
    const int64_t size = known(in_.hidden());
    const auto sums = x.chunk(3, 1);
    Tensor r, z, n;
    if (in_.reset_after) {
      const auto v = product(h).chunk(3, 1);
      r = (sums[0] + v[0]).sigmoid(), z = (sums[1] + v[1]).sigmoid();
      n = (sums[2] + r * v[2]).tanh();
    } else {
      const Tensor u = steps_.masked(h), bias = autograd::tensor_or_none(in_.bias_hh);
      const auto linear = [&](const Tensor& operand, int64_t first, int64_t count) {
        const auto rows = [&](const Tensor& t) { return t.narrow(0, first * size, count * size); };
        return at::linear(operand, rows(in_.weight_hh), autograd::optional_of(bias.defined() ? rows(bias) : bias));
      };
      const auto v = linear(u, 0, 2).chunk(2, 1);
      r = (sums[0] + v[0]).sigmoid(), z = (sums[1] + v[1]).sigmoid();
      n = (sums[2] + linear(r * u, 2, 1)).tanh();
    }
    return {n + z * (h - n), {}};
  }

  const Inputs& in_;
  const Steps& steps_;
  const KeptShare keep_h_, keep_c_;
};

}  // namespace

Outputs step_by_step(const Inputs& in, bool save) {
  if (loses_norms(in)) {
    const Outputs wide = step_by_step(widened(in), save);
    return {narrowed(wide.out, in), narrowed(wide.h, in), narrowed(wide.c, in), {}, narrowed(wide.cells, in), {}, {}};
  }
  const Steps steps(in);
  const GeneralStep general(steps);
  const bool plain = is_plain(in);
  const Tensor input = steps.input();
  State state{in.h, in.is_lstm() ? *in.c : Tensor()};
  const int64_t count = steps.known_count();
  std::vector<Tensor> outputs(count), cells(count);
  for (int64_t s = 0; s < count; ++s) {
    const int64_t t = steps.time(s);
    if (steps.is_cut(s)) {
      state.h = steps.active_or(t, state.h.detach(), state.h);
      if (state.c.defined()) state.c = steps.active_or(t, state.c.detach(), state.c);
    }
    if (steps.restarts.defined()) {
      state.h = Steps::choose(steps.restarts, t, at::zeros_like(state.h), state.h);
      if (state.c.defined()) state.c = Steps::choose(steps.restarts, t, at::zeros_like(state.c), state.c);
    }
    // What a row without the step holds must not reach the weights' gradients, not even times zero.
    State before = state;
    before.h = steps.active_part(t, state.h);
    if (state.c.defined()) before.c = steps.active_part(t, state.c);
    const State after = plain ? cell_step(in, input[t], before) : general(input[t], before, t);
    const auto finish = [&](const Tensor& now, Tensor& kept, Tensor& out) {
      out = steps.active_part(t, now);
      kept = steps.active_or(t, now, kept);
    };
    finish(after.h, state.h, outputs[t]);
    if (after.c.defined()) finish(after.c, state.c, cells[t]);
  }
  Outputs out;
  const auto over_time = [&](const std::vector<Tensor>& parts, const c10::SymInt& size) {
    if (!parts.empty()) return at::stack(parts, in.time_dim());
    const auto [first, second] = in.order(in.steps(), in.batch());
    return in.input.sum(-1, /*keepdim=*/true).expand_symint({first, second, size});  // empty, but part of the graph
  };
  out.out = over_time(outputs, in.h.sym_size(1));
  // What an op gives must not be what it was given.
  out.h = count > 0 ? state.h : state.h.clone();
  if (in.is_lstm()) {
    out.c = count > 0 ? state.c : state.c.clone();
    if (save) out.cells = over_time(cells, in.hidden());
  }
  return out;
}

}  // namespace lect11ext::layer_op
