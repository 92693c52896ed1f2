// Derivatives of lstm_layer and gru_layer: the Node; what a backward's own derivative and the tangents are made of, in
// differentiable ATen; autocast.
//
// Both definitions take gates and cells from the forward op, whose derivative with respect to them is fused: what is
// left of a step are a handful of small operations, and all that does not depend on the state is done for all steps at
// once.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <string>

#include "recurrent/layer_inputs.h"

namespace lect11ext {
namespace {

using namespace layer_op;

// --- shared by both definitions -----------------------------------------------------------------------------------

// Tensors over time with the steps first, and the masks of a step.
struct Steps {
  const Inputs& in;
  int64_t count;
  Tensor inactive, restarts;  // [T, B, 1]; undefined where there are none

  explicit Steps(const Inputs& in) : in(in), count(in.input.size(in.batch_first ? 1 : 0)) {
    if (autograd::defined(in.lengths)) inactive = first(in.inactive()).unsqueeze(-1);
    if (autograd::defined(in.reset)) restarts = first(*in.reset).unsqueeze(-1);
    if (inactive.defined() && restarts.defined()) restarts = restarts.logical_and(inactive.logical_not());
  }

  // Steps first, from the order of the input; and back.
  Tensor first(const Tensor& t) const { return t.defined() && in.batch_first ? t.transpose(0, 1) : t; }

  int64_t time(int64_t s) const { return in.reverse ? count - 1 - s : s; }

  // The states before every step, where `states` are those after it and zero where it does not take place.
  Tensor before(const Tensor& states, const Tensor& initial) const {
    if (count == 0) return states;
    const Tensor start = initial.unsqueeze(0);
    Tensor shifted = in.reverse ? at::cat({states.narrow(0, 1, count - 1), start})
                                : at::cat({start, states.narrow(0, 0, count - 1)});
    if (in.reverse && inactive.defined()) {  // rows begin at their own end
      const Tensor begins = at::cat({inactive.narrow(0, 1, count - 1), at::zeros_like(inactive.narrow(0, 0, 1))});
      shifted = at::where(begins, start, shifted);
    }
    return restarts.defined() ? at::where(restarts, at::zeros_like(shifted), shifted) : shifted;
  }

  Tensor input() const {
    return inactive.defined() ? at::where(inactive, at::zeros_like(first(in.input)), first(in.input)) : first(in.input);
  }
};

Tensor choose(const Tensor& mask, int64_t t, const Tensor& yes, const Tensor& no) {
  return at::where(mask[t], yes, no);
}

Tensor sum_steps(const Tensor& a, const Tensor& b) { return a.flatten(0, 1).t().matmul(b.flatten(0, 1)); }

// --- a backward's definition --------------------------------------------------------------------------------------

// The gradients of the sums of all steps, and of the state before the first.
struct SumGradients {
  Tensor input, hidden;  // [T, B, G·H]; the GRU's differ in n
  Tensor h, c;
};

class CompositeBackward {
 public:
  CompositeBackward(const OutputGradients& grads, const Inputs& in)
      : in_(in), steps_(in), grads_(grads), kept_(call_forward(in, /*save=*/true)) {
    out_ = steps_.first(kept_.out);
    gates_ = steps_.first(kept_.gates).chunk(4, 2);
    grad_out_ = steps_.first(grads.out);
    if (grads.gates.defined()) grad_gates_ = steps_.first(grads.gates).chunk(4, 2);
  }

  Gradients run(const Mask& mask) const {
    const Tensor before = steps_.before(out_, in_.h);
    const SumGradients g = in_.is_lstm() ? lstm() : gru(before);
    const auto when = [](bool wanted, auto make) { return wanted ? make() : Tensor(); };
    return {when(mask[0], [&] { return steps_.first(g.input.matmul(in_.weight_ih)); }),
            mask[1] ? g.h : Tensor(),
            mask[2] ? g.c : Tensor(),
            when(mask[3], [&] { return sum_steps(g.input, steps_.input()); }),
            when(mask[4], [&] { return sum_steps(g.hidden, before); }),
            when(mask[5] && autograd::defined(in_.bias_ih), [&] { return g.input.sum({0, 1}); }),
            when(mask[6] && autograd::defined(in_.bias_hh), [&] { return g.hidden.sum({0, 1}); })};
  }

 private:
  Tensor clip(const Tensor& grad) const {
    return std::isinf(in_.clip()) ? grad : at::clamp(grad, -in_.clip(), in_.clip());
  }

  Tensor at_step(const Tensor& over_time, int64_t t) const { return over_time.defined() ? over_time[t] : Tensor(); }
  static Tensor plus(const Tensor& a, const Tensor& b) { return b.defined() ? a + b : a; }

  Tensor or_zeros(const Tensor& grad, const Tensor& like) const { return grad.defined() ? grad : at::zeros_like(like); }

  // The gradient with respect to a gate that came from outside, times the gate's slope.
  Tensor outer(int64_t gate, const Tensor& slope) const {
    return grad_gates_.empty() ? Tensor() : grad_gates_[gate] * slope;
  }

  // Where a step does not take place the gradient passes by; where the state before it was set to zero, none does.
  void leave(int64_t t, Tensor& carry, const Tensor& before) const {
    if (steps_.restarts.defined()) carry = choose(steps_.restarts, t, at::zeros_like(carry), carry);
    if (steps_.inactive.defined()) carry = choose(steps_.inactive, t, before, carry);
  }

  Tensor active_part(const Tensor& grad) const {
    return steps_.inactive.defined() && grad.defined() ? at::where(steps_.inactive, at::zeros_like(grad), grad) : grad;
  }

  Tensor stack(const std::vector<Tensor>& pre, int64_t gates) const {
    if (!pre.empty()) return at::stack(pre);
    const auto& like = in_.input;
    return at::zeros({0, in_.h.size(0), gates * in_.h.size(1)}, like.options());
  }

  SumGradients lstm() const {
    const Tensor &i = gates_[0], &f = gates_[1], &g = gates_[2], &o = gates_[3], cells = steps_.first(kept_.cells);
    const Tensor tanh_c = cells.tanh(), c_before = steps_.before(cells, *in_.c);
    const Tensor slope_i = i * (1 - i), slope_f = f * (1 - f), slope_o = o * (1 - o);
    const Tensor slope_g = in_.sigmoid_candidate() ? g * (1 - g) : 1 - g * g;
    const Tensor by_c = at::stack({g * slope_i, c_before * slope_f, i * slope_g}, 2);  // [T, B, 3, H]
    const Tensor by_h = tanh_c * slope_o, into_c = o * (1 - tanh_c * tanh_c);
    const Tensor outer_gates =
        grad_gates_.empty()
            ? Tensor()
            : active_part(at::cat({outer(0, slope_i), outer(1, slope_f), outer(2, slope_g), outer(3, slope_o)}, 2));
    const Tensor grad_out = active_part(grad_out_), grad_cells = active_part(steps_.first(grads_.cells));
    Tensor carry_h = or_zeros(grads_.h, in_.h), carry_c = or_zeros(grads_.c, *in_.c);
    std::vector<Tensor> pre(steps_.count);
    for (int64_t s = steps_.count - 1; s >= 0; --s) {
      const int64_t t = steps_.time(s);
      const Tensor dh = clip(plus(carry_h, at_step(grad_out, t)));
      const Tensor dc = at::addcmul(clip(plus(carry_c, at_step(grad_cells, t))), dh, into_c[t]);
      Tensor sums = at::cat({dc.unsqueeze(1) * by_c[t], (dh * by_h[t]).unsqueeze(1)}, 1).flatten(1);
      sums = plus(sums, at_step(outer_gates, t));
      if (steps_.inactive.defined()) sums = choose(steps_.inactive, t, at::zeros_like(sums), sums);
      const Tensor before_h = carry_h, before_c = carry_c;
      carry_h = sums.matmul(in_.weight_hh);
      carry_c = dc * f[t];
      leave(t, carry_h, before_h);
      leave(t, carry_c, before_c);
      pre[t] = sums;
    }
    const Tensor all = stack(pre, 4);
    return {all, all, carry_h, carry_c};
  }

  SumGradients gru(const Tensor& before) const {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2], &hidden = gates_[3];
    const Tensor slope_r = r * (1 - r), slope_z = z * (1 - z), slope_n = 1 - n * n;
    const Tensor z_by_h = (before - n) * slope_z, n_by_h = (1 - z) * slope_n, r_by_n = hidden * slope_r;
    const Tensor outer_r = active_part(outer(0, slope_r)), outer_z = active_part(outer(1, slope_z)),
                 outer_n = active_part(outer(2, slope_n)),
                 outer_hidden = grad_gates_.empty() ? Tensor() : active_part(grad_gates_[3]);
    const Tensor grad_out = active_part(grad_out_);
    Tensor carry = or_zeros(grads_.h, in_.h);
    std::vector<Tensor> pre_input(steps_.count), pre_hidden(steps_.count);
    for (int64_t s = steps_.count - 1; s >= 0; --s) {
      const int64_t t = steps_.time(s);
      const Tensor dh = clip(plus(carry, at_step(grad_out, t)));
      const Tensor dn = plus(dh * n_by_h[t], at_step(outer_n, t)), dz = plus(dh * z_by_h[t], at_step(outer_z, t));
      const Tensor dr = plus(dn * r_by_n[t], at_step(outer_r, t));
      const Tensor d_hidden = plus(dn * r[t], at_step(outer_hidden, t));
      Tensor by_input = at::cat({dr, dz, dn}, 1), by_hidden = at::cat({dr, dz, d_hidden}, 1);
      if (steps_.inactive.defined()) {
        by_input = choose(steps_.inactive, t, at::zeros_like(by_input), by_input);
        by_hidden = choose(steps_.inactive, t, at::zeros_like(by_hidden), by_hidden);
      }
      const Tensor outside = carry;
      carry = at::addcmul(by_hidden.matmul(in_.weight_hh), dh, z[t]);
      leave(t, carry, outside);
      pre_input[t] = by_input;
      pre_hidden[t] = by_hidden;
    }
    return {stack(pre_input, 3), stack(pre_hidden, 3), carry, Tensor()};
  }

  const Inputs& in_;
  const Steps steps_;
  const OutputGradients& grads_;
  const Outputs kept_;
  Tensor out_, grad_out_;
  std::vector<Tensor> gates_, grad_gates_;
};

// --- tangents -----------------------------------------------------------------------------------------------------

Tensor primal(const Tensor& t) { return t._fw_primal(/*level=*/0); }
Tensor tangent(const Tensor& t) { return t.defined() ? t._fw_grad(/*level=*/0) : Tensor(); }
Tensor tangent(const OptionalTensor& t) { return tangent(autograd::tensor_or_none(t)); }

// Adds two terms of which either may be missing.
void accumulate(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; }

// Given the primal inputs and outputs; grad_clip does not act on tangents.
Outputs tangents(const Inputs& dual, const Outputs& out) {
  const Tensor input = primal(dual.input), h0 = primal(dual.h), ih = primal(dual.weight_ih),
               hh = primal(dual.weight_hh);
  const OptionalTensor c0 = dual.is_lstm() ? OptionalTensor(primal(*dual.c)) : std::nullopt, none;
  const Inputs in{input,
                  h0,
                  c0,
                  ih,
                  hh,
                  none,
                  none,
                  none,
                  dual.lengths,
                  dual.reset,
                  dual.candidate,
                  dual.grad_clip,
                  dual.reverse,
                  dual.batch_first};
  const Steps steps(in);
  const int64_t T = steps.count, B = h0.size(0), H = h0.size(1), G = in.gates();
  const Tensor states = steps.first(out.out), before = steps.before(states, h0);

  // The sums' tangents, but for the states' own: of the inputs' part, and of the states'.
  Tensor by_input, by_hidden;
  if (tangent(dual.input).defined()) {
    Tensor dx = steps.first(tangent(dual.input));
    if (steps.inactive.defined()) dx = at::where(steps.inactive, at::zeros_like(dx), dx);
    accumulate(by_input, dx.matmul(ih.t()));
  }
  if (tangent(dual.weight_ih).defined()) accumulate(by_input, steps.input().matmul(tangent(dual.weight_ih).t()));
  if (tangent(dual.bias_ih).defined()) accumulate(by_input, tangent(dual.bias_ih).expand({T, B, G * H}));
  if (tangent(dual.weight_hh).defined()) accumulate(by_hidden, before.matmul(tangent(dual.weight_hh).t()));
  if (tangent(dual.bias_hh).defined()) accumulate(by_hidden, tangent(dual.bias_hh).expand({T, B, G * H}));
  if (!by_input.defined()) by_input = at::zeros({T, B, G * H}, input.options());
  if (!by_hidden.defined()) by_hidden = at::zeros({T, B, G * H}, input.options());
  if (in.is_lstm()) by_hidden = by_input + by_hidden;

  const auto gates = steps.first(out.gates).chunk(4, 2);
  const auto or_zeros = [](const Tensor& t, const Tensor& like) { return t.defined() ? t : at::zeros_like(like); };
  Tensor dh = or_zeros(tangent(dual.h), h0), dc = in.is_lstm() ? or_zeros(tangent(dual.c), *c0) : Tensor();
  std::vector<Tensor> all_h(T), all_c(T), all_gates(T);

  Tensor slopes, into_c, by_o, by_c, r, z, hidden, z_to_h, n_to_h, cells;
  if (in.is_lstm()) {
    const Tensor &i = gates[0], &f = gates[1], &g = gates[2], &o = gates[3];
    cells = steps.first(out.cells);
    const Tensor tanh_c = cells.tanh(), c_before = steps.before(cells, *c0);
    slopes = at::cat({i * (1 - i), f * (1 - f), in.sigmoid_candidate() ? g * (1 - g) : 1 - g * g, o * (1 - o)}, 2);
    into_c = at::stack({g, c_before, i}, 2);  // [T, B, 3, H]
    by_o = tanh_c;
    by_c = o * (1 - tanh_c * tanh_c);
  } else {
    r = gates[0], z = gates[1], hidden = gates[3];
    const Tensor& n = gates[2];
    slopes = at::cat({r * (1 - r), z * (1 - z)}, 2);
    n_to_h = 1 - z;
    z_to_h = before - n;
    by_c = 1 - n * n;
  }
  for (int64_t s = 0; s < T; ++s) {
    const int64_t t = steps.time(s);
    const auto restart = [&](Tensor& d) {
      if (steps.restarts.defined()) d = choose(steps.restarts, t, at::zeros_like(d), d);
    };
    restart(dh);
    if (dc.defined()) restart(dc);
    const Tensor sums = at::addmm(by_hidden[t], dh, hh.t());
    Tensor new_h, new_c;
    if (in.is_lstm()) {
      all_gates[t] = sums * slopes[t];
      const Tensor parts = (all_gates[t].narrow(1, 0, 3 * H).unflatten(1, {3, H}) * into_c[t]).sum(1);
      new_c = at::addcmul(parts, gates[1][t], dc);
      new_h = at::addcmul(all_gates[t].narrow(1, 3 * H, H) * by_o[t], new_c, by_c[t]);
    } else {
      const Tensor x = by_input[t], d_hidden = sums.narrow(1, 2 * H, H);
      const Tensor rz = (x.narrow(1, 0, 2 * H) + sums.narrow(1, 0, 2 * H)) * slopes[t];
      const Tensor dr = rz.narrow(1, 0, H), dz = rz.narrow(1, H, H);
      const Tensor dn = (x.narrow(1, 2 * H, H) + dr * hidden[t] + r[t] * d_hidden) * by_c[t];
      new_h = dz * z_to_h[t] + n_to_h[t] * dn + z[t] * dh;
      all_gates[t] = at::cat({rz, dn, d_hidden}, 1);
    }
    if (steps.inactive.defined()) {
      const auto zero = [&](const Tensor& d) { return choose(steps.inactive, t, at::zeros_like(d), d); };
      all_gates[t] = zero(all_gates[t]);
      all_h[t] = zero(new_h);
      new_h = choose(steps.inactive, t, dh, new_h);
      if (dc.defined()) {
        all_c[t] = zero(new_c);
        new_c = choose(steps.inactive, t, dc, new_c);
      }
    } else {
      all_h[t] = new_h;
      all_c[t] = new_c;
    }
    dh = new_h;
    dc = new_c;
  }
  const auto over_time = [&](const std::vector<Tensor>& parts, const Tensor& like) {
    return parts.empty() ? at::zeros_like(like) : steps.first(at::stack(parts));
  };
  return {over_time(all_h, out.out), dh, dc, over_time(all_gates, out.gates),
          in.is_lstm() ? over_time(all_c, out.cells) : Tensor()};
}

// --- autograd -----------------------------------------------------------------------------------------------------

struct LayerNode : autograd::Node {
  std::array<autograd::SavedVariable, kInputs> inputs_;
  autograd::SavedVariable lengths_, reset_, out_, gates_, cells_;
  std::string candidate_;
  std::optional<double> grad_clip_;
  bool is_lstm_, reverse_, batch_first_;

  std::string name() const override { return is_lstm_ ? "LstmLayerBackward" : "GruLayerBackward"; }

  void release_variables() override {
    for (auto& saved : inputs_) saved.reset_data();
    for (auto* saved : {&lengths_, &reset_, &out_, &gates_, &cells_}) saved->reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    // output, h_n, c_n, gates, cells; a GRU has neither c_n nor cells.
    const OutputGradients outer = is_lstm_ ? OutputGradients{grads[0], grads[1], grads[2], grads[3], grads[4]}
                                           : OutputGradients{grads[0], grads[1], {}, grads[2], {}};
    bool any = false;
    for (const auto& grad : grads) any = any || grad.defined();
    if (!any) return autograd::variable_list(kInputs);
    Mask mask;
    std::array<Tensor, kInputs> in;
    for (size_t i = 0; i < kInputs; ++i) {
      mask[i] = task_should_compute_output(i);
      in[i] = inputs_[i].unpack();
    }
    const auto self = getptr();
    const Outputs kept{out_.unpack(self), {}, {}, gates_.unpack(self), is_lstm_ ? cells_.unpack(self) : Tensor()};
    const auto optional = [](const Tensor& t) { return autograd::optional_of(t); };
    const OptionalTensor c = optional(in[2]), bias_ih = optional(in[5]), bias_hh = optional(in[6]), none;
    const OptionalTensor lengths = optional(lengths_.unpack()), reset = optional(reset_.unpack());
    const auto result = call_backward(outer,
                                      {in[0], in[1], c, in[3], in[4], bias_ih, bias_hh, none, lengths, reset,
                                       candidate_, grad_clip_, reverse_, batch_first_},
                                      kept, mask);
    return {result.begin(), result.end()};
  }
};

Outputs autograd_forward(const Inputs& in, bool save) {
  const auto& [input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reset, candidate, grad_clip,
               reverse, batch_first] = in;
  const bool differentiable = autograd::needs_grad(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
  const bool dual = autograd::has_tangent(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
  if ((differentiable || dual) && !is_fused(in)) {
    in.check();
    return step_by_step(in);
  }
  Outputs out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_forward(in, save || differentiable || dual);
  }
  if (differentiable) {
    auto node = autograd::make_node<LayerNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh));
    const auto save_input = [](const OptionalTensor& t) {
      return autograd::SavedVariable(autograd::tensor_or_none(t), /*is_output=*/false);
    };
    node->inputs_ = {save_input(input),     save_input(h),       save_input(c),      save_input(weight_ih),
                     save_input(weight_hh), save_input(bias_ih), save_input(bias_hh)};
    node->lengths_ = save_input(lengths);
    node->reset_ = save_input(reset);
    node->candidate_ = std::string(candidate);
    node->grad_clip_ = grad_clip;
    node->is_lstm_ = in.is_lstm();
    node->reverse_ = reverse;
    node->batch_first_ = batch_first;
    for (const Tensor* output : {&out.out, &out.h, &out.c, &out.gates, &out.cells}) {
      if (output->defined()) torch::autograd::set_history(*output, node);
    }
    node->out_ = autograd::SavedVariable(out.out, /*is_output=*/true);
    node->gates_ = autograd::SavedVariable(out.gates, /*is_output=*/true);
    if (out.cells.defined()) node->cells_ = autograd::SavedVariable(out.cells, /*is_output=*/true);
  }
  if (dual) {
    const Outputs d = tangents(in, out);
    const auto set = [](const Tensor& output, const Tensor& t) {
      if (output.defined()) output._set_fw_grad(t, /*level=*/0, /*is_inplace_op=*/false);
    };
    set(out.out, d.out);
    set(out.h, d.h);
    set(out.c, d.c);
    set(out.gates, d.gates);
    set(out.cells, d.cells);
  }
  return out;
}

Gradients autograd_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  const bool differentiable = autograd::needs_grad(grads.out, grads.h, grads.c, grads.gates, grads.cells, in.input,
                                                   in.h, in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh);
  if (differentiable || autograd::has_tangent(grads.out, grads.h, grads.c, grads.gates, grads.cells, in.input, in.h,
                                              in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh)) {
    check_backward(grads, in, kept);
    return CompositeBackward(grads, in).run(mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grads, in, kept, mask);
}

template <c10::DispatchKey key, c10::DeviceType device>
Outputs autocast_forward(const Inputs& in, bool save) {
  const c10::impl::ExcludeDispatchKeyGuard without(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  const auto cast_optional = [&](const OptionalTensor& t) {
    return autograd::defined(t) ? OptionalTensor(cast(*t)) : std::nullopt;
  };
  const Tensor input = cast(in.input), h = cast(in.h), ih = cast(in.weight_ih), hh = cast(in.weight_hh);
  const OptionalTensor c = cast_optional(in.c), bias_ih = cast_optional(in.bias_ih),
                       bias_hh = cast_optional(in.bias_hh), hr = cast_optional(in.weight_hr);
  return call_forward({input, h, c, ih, hh, bias_ih, bias_hh, hr, in.lengths, in.reset, in.candidate, in.grad_clip,
                       in.reverse, in.batch_first},
                      save);
}

}  // namespace

namespace layer_op {

Outputs call_forward(const Inputs& in, bool save) {
  if (in.is_lstm()) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::lstm_layer", "").typed<LstmForward>();
    auto [out, h, c, gates, cells] =
        op.call(in.input, in.h, *in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.weight_hr, in.lengths,
                in.reset, in.candidate, in.grad_clip, in.reverse, in.batch_first, save);
    return {std::move(out), std::move(h), std::move(c), std::move(gates), std::move(cells)};
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::gru_layer", "").typed<GruForward>();
  auto [out, h, gates] = op.call(in.input, in.h, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.lengths,
                                 in.reset, in.grad_clip, in.reverse, in.batch_first, save);
  return {std::move(out), std::move(h), {}, std::move(gates), {}};
}

Gradients call_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  const auto optional = [](const Tensor& t) { return autograd::optional_of(t); };
  if (in.is_lstm()) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::lstm_layer_backward", "").typed<LstmBackward>();
    auto [x, h, c, ih, hh, b_ih, b_hh] = op.call(
        optional(grads.out), optional(grads.h), optional(grads.c), optional(grads.gates), optional(grads.cells),
        in.input, in.h, *in.c, in.weight_ih, in.weight_hh, in.bias_ih, in.bias_hh, in.weight_hr, in.lengths, in.reset,
        in.candidate, in.grad_clip, in.reverse, in.batch_first, kept.out, kept.gates, kept.cells, mask);
    return {x, h, c, ih, hh, b_ih, b_hh};
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("lect11ext::gru_layer_backward", "").typed<GruBackward>();
  auto [x, h, ih, hh, b_ih, b_hh] =
      op.call(optional(grads.out), optional(grads.h), optional(grads.gates), in.input, in.h, in.weight_ih, in.weight_hh,
              in.bias_ih, in.bias_hh, in.lengths, in.reset, in.grad_clip, in.reverse, in.batch_first, kept.out,
              kept.gates, {mask[0], mask[1], mask[3], mask[4], mask[5], mask[6]});
  return {x, h, {}, ih, hh, b_ih, b_hh};
}

}  // namespace layer_op

TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) {
  m.impl("lstm_layer", lstm_forward<autograd_forward>);
  m.impl("lstm_layer_backward", lstm_backward<autograd_backward>);
  m.impl("gru_layer", gru_forward<autograd_forward>);
  m.impl("gru_layer_backward", gru_backward<autograd_backward>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCPU, m) {
  m.impl("lstm_layer", lstm_forward<autocast_forward<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>>);
  m.impl("gru_layer", gru_forward<autocast_forward<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(lect11ext, AutocastCUDA, m) {
  m.impl("lstm_layer", lstm_forward<autocast_forward<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>>);
  m.impl("gru_layer", gru_forward<autocast_forward<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>>);
}

}  // namespace lect11ext
