#include "recurrent/layer_tangent_steps.h"
#include "common/ops.h"

#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <utility>

#include "recurrent/layer_tensors.h"

namespace lect11ext {
namespace layer_op {

TangentStates::TangentStates(const Inputs& in)
    : h(in.h),
      c(autograd::tensor_or_none(in.c)),
      steps_(in),
      keep_h_(steps_, in.zoneout_h, in.zoneout_rate_h, in.h),
      keep_c_(steps_, in.zoneout_c, in.zoneout_rate_c, in.h),
      all_h_(count()),
      all_c_(count()) {}

void TangentStates::begin(int64_t s) {
  for (Tensor* d : {&h, &c}) {
    if (!d->defined()) continue;
    if (steps_.is_cut(s)) *d = steps_.active_or(time(s), at::zeros_like(*d), *d);
    if (steps_.restarts.defined()) *d = Steps::choose(steps_.restarts, time(s), at::zeros_like(*d), *d);
  }
}

void TangentStates::end(int64_t t, Tensor new_h, Tensor new_c) {
  new_h = keep_h_.zone_out(h, new_h, t);
  if (new_c.defined()) new_c = keep_c_.zone_out(c, new_c, t);
  const auto finish = [&](const Tensor& after, Tensor& state, Tensor& out) {
    out = steps_.active_part(t, after);
    state = steps_.active_or(t, after, state);
  };
  finish(new_h, h, all_h_[t]);
  if (new_c.defined()) finish(new_c, c, all_c_[t]);
}

TangentOutputs TangentStates::outputs(const std::vector<Tensor>& sums, int64_t columns) const {
  const auto over_time = [&](const std::vector<Tensor>& each, int64_t size) {
    return count() > 0 ? at::stack(each) : at::zeros_symint({0, h.sym_size(0), size}, h.options());
  };
  const int64_t hidden = known(h.sym_size(1));
  return {over_time(all_h_, hidden), h, c, steps_.active_part(over_time(sums, columns)),
          c.defined() ? over_time(all_c_, hidden) : Tensor()};
}

TangentOutputs composite_tangents(const Inputs& in, const TangentProduct& product) {
  TangentStates states(in);
  const int64_t hidden = known(in.hidden());
  const auto part = [&](const Tensor& t, int64_t first, int64_t parts) {
    return t.narrow(-1, first * hidden, parts * hidden);
  };
  const auto sum_of_parts = [&](const Tensor& t) { return t.unflatten(1, {-1, hidden}).sum(1); };
  const auto each = in.factors.unbind(0);
  std::vector<Tensor> all(states.count());
  for (int64_t s = 0; s < states.count(); ++s) {
    const int64_t t = states.time(s);
    states.begin(s);
    const Tensor &sums = all[t] = product(t, states.masked_h()), &f = each[t];
    const Tensor of_sums = sum_of_parts(part(sums, 0, 3) * part(f, 0, 3));
    if (in.is_lstm()) {
      const Tensor c = at::addcmul(of_sums, part(f, 4, 1), states.c);
      states.end(t, at::addcmul(c * part(f, 5, 1), part(sums, 3, 1), part(f, 3, 1)), c);
    } else {
      states.end(t, of_sums + at::addcmul(part(f, 3, 1), part(f, 4, 1), states.h));
    }
  }
  return states.outputs(all, hidden * in.gates());
}

}  // namespace layer_op

namespace {

using namespace layer_op;

#define TANGENTS_PARAMETERS                                                                                        \
  const Tensor &input, const Tensor &factors, const Tensor &h, const OptionalTensor &c, const Tensor &weight_hh,   \
      const OptionalTensor &hidden_mask, const OptionalTensor &lengths, const OptionalTensor &reset,               \
      const OptionalTensor &zoneout_h, const OptionalTensor &zoneout_c, double zoneout_rate_h, double zoneout_rate_c, \
      int64_t truncate, bool reverse

using OpOutputs = std::tuple<Tensor, Tensor, OptionalTensor, Tensor, OptionalTensor>;
using Op = OpOutputs(TANGENTS_PARAMETERS);

template <TangentOutputs body(const Inputs&)>
OpOutputs tangents_op(TANGENTS_PARAMETERS) {
  const Inputs in{.input = input,
                  .h = h,
                  .c = c,
                  .weight_hh = weight_hh,
                  .hidden_mask = hidden_mask,
                  .lengths = lengths,
                  .reset = reset,
                  .zoneout_h = zoneout_h,
                  .zoneout_c = zoneout_c,
                  .zoneout_rate_h = zoneout_rate_h,
                  .zoneout_rate_c = zoneout_rate_c,
                  .truncate = truncate,
                  .reverse = reverse,
                  .factors = factors};
  TangentOutputs out = body(in);
  return {out.out, out.h, autograd::optional_of(out.c), out.sums, autograd::optional_of(out.cells)};
}

TangentOutputs by_composite(const Inputs& in) {
  in.check();
  const auto each = in.input.unbind(0);
  const Tensor weight = in.weight_hh.t();
  return composite_tangents(in, [&](int64_t t, const Tensor& h) { return at::addmm(each[t], h, weight); });
}

TangentOutputs by_kernel(const Inputs& in) {
  Inputs dense = in;
  dense.factors = in.factors.contiguous();
  const Outputs out = cpu_forward(dense, /*save=*/true);
  return {out.out, out.h, out.c, out.gates, out.cells};
}

TangentOutputs meta(const Inputs& in) {
  in.check();
  const auto over_time = [&](int64_t parts) {
    return at::empty_symint({in.steps(), in.batch(), in.hidden() * parts}, in.input.options());
  };
  const auto state = [&] { return at::empty_symint(in.h.sym_sizes(), in.input.options()); };
  return {over_time(1), state(), in.is_lstm() ? state() : Tensor(), over_time(in.gates()),
          in.is_lstm() ? over_time(1) : Tensor()};
}

TangentOutputs differentiable(const Inputs& in) {
  const OptionalTensor &c = in.c, &mask = in.hidden_mask;
  const bool needs_grad = autograd::needs_grad(in.input, in.factors, in.h, c, in.weight_hh, mask);
  if (needs_grad || autograd::has_tangent(in.input, in.factors, in.h, c, in.weight_hh, mask)) {
    return by_composite(in);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_tangents(in);
}

}  // namespace

TangentOutputs layer_op::call_tangents(const Inputs& in) {
  static const auto op = find_op<Op>("lect11ext::layer_tangents");
  auto [out, h, c, sums, cells] =
      op.call(in.input, in.factors, in.h, in.c, in.weight_hh, in.hidden_mask, in.lengths, in.reset, in.zoneout_h,
              in.zoneout_c, in.zoneout_rate_h, in.zoneout_rate_c, in.truncate, in.reverse);
  return {out, h, autograd::tensor_or_none(c), sums, autograd::tensor_or_none(cells)};
}

TORCH_LIBRARY_FRAGMENT(lect11ext, m) {
  m.def(
      "layer_tangents(Tensor input, Tensor factors, Tensor h, Tensor? c, Tensor weight_hh, Tensor? hidden_mask, "
      "Tensor? lengths, Tensor? reset, Tensor? zoneout_h, Tensor? zoneout_c, float zoneout_rate_h, float "
      "zoneout_rate_c, int truncate, bool reverse) -> (Tensor output, Tensor h_n, Tensor? c_n, Tensor sums, Tensor? "
      "cells)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lect11ext, CPU, m) { m.impl("layer_tangents", tangents_op<by_kernel>); }
#ifdef LECT11EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(lect11ext, CUDA, m) { m.impl("layer_tangents", tangents_op<by_composite>); }
#endif
TORCH_LIBRARY_IMPL(lect11ext, Meta, m) { m.impl("layer_tangents", tangents_op<meta>); }
TORCH_LIBRARY_IMPL(lect11ext, Autograd, m) { m.impl("layer_tangents", tangents_op<differentiable>); }

}  // namespace lect11ext
