// The tangents of a layer's outputs, in differentiable ATen.
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include "recurrent/layer_tangent_steps.h"

namespace lect11ext::layer_op {
namespace {

Tensor primal(const Tensor& t) { return t.defined() ? t._fw_primal(/*level=*/0) : t; }
Tensor tangent(const Tensor& t) { return t.defined() ? t._fw_grad(/*level=*/0) : Tensor(); }

Tensor tangent(const OptionalTensor& t) { return tangent(autograd::tensor_or_none(t)); }

// Adds two terms of which either may be missing.
void accumulate(Tensor& sum, const Tensor& term) {
  if (term.defined()) sum = sum.defined() ? sum + term : term;
}

class Tangents {
 public:
  Tangents(const Inputs& dual, const Outputs& out)
      : dual_(dual),
        in_(dual.mapped(primal)),
        steps_(in_),
        out_(out),
        hidden_(known(in_.hidden())),
        reset_(steps_first(in_.reset)),
        zoneout_h_(steps_first(in_.zoneout_h)),
        zoneout_c_(steps_first(in_.zoneout_c)) {
    gates_ = steps_.first(out.gates).chunk(in_.kept_gates(), 2);
    before_ = steps_.before(steps_.first(out.out), in_.h);
    multiplied_ = steps_.masked(before_);
    if (tangent(dual.hidden_mask).defined()) by_mask_ = before_ * tangent(dual.hidden_mask);
    if (in_.has_norm()) std::tie(normed_, rstd_) = normalize(multiplied_.matmul(in_.weight_hh.t()));
    const auto start = [](const Tensor& d, const Tensor& like) { return d.defined() ? d : at::zeros_like(like); };
    h_ = start(tangent(dual.h), in_.h);
    if (in_.is_lstm()) c_ = start(tangent(dual.c), *in_.c);
  }

  OutputGradients run() {
    if (steps_.count == 0) {
      return {at::zeros_like(out_.out), h_, autograd::tensor_or_none(c_), at::zeros_like(out_.gates),
              in_.is_lstm() ? at::zeros_like(out_.cells) : Tensor()};
    }
    const auto [all, gates] = in_.is_lstm() ? lstm() : in_.reset_after ? gru() : gru_reset_first();
    return {steps_.first(all.out), all.h, all.c, steps_.first(steps_.active_part(gates)), steps_.first(all.cells)};
  }

 private:
  using Found = std::pair<TangentOutputs, Tensor>;  // with the gates' tangents

  OptionalTensor steps_first(const OptionalTensor& t) const {
    return autograd::optional_of(steps_.first(autograd::tensor_or_none(t)));
  }

  Tensor part(const Tensor& t, int64_t g, int64_t parts = 1) const {
    return t.narrow(-1, g * hidden_, parts * hidden_);
  }
  Tensor sum_of_parts(const Tensor& t) const { return t.unflatten(-1, {-1, hidden_}).sum(-2); }

  // What of the sums' tangents does not depend on the state's: the input's part, and the state's bias.
  void set_input_part() {
    const Tensor dx = steps_.active_part(steps_.first(tangent(dual_.input)));
    if (!autograd::defined(in_.weight_ih)) {
      by_input_ = dx;
    } else {
      if (dx.defined()) accumulate(by_input_, dx.matmul(in_.weight_ih->t()));
      if (tangent(dual_.weight_ih).defined()) {
        accumulate(by_input_, steps_.input().matmul(tangent(dual_.weight_ih).t()));
      }
    }
    accumulate(by_input_, tangent(dual_.bias_ih));
    const std::array<c10::SymInt, 3> size{steps_.count, in_.batch(), in_.gates() * hidden_};
    by_input_ = by_input_.defined() ? by_input_.expand_symint(size) : at::zeros_symint(size, in_.input.options());
  }

  // The state's product, by what the weights' tangent and the mask's give; undefined where neither is.
  Tensor product_part() const {
    Tensor by_product;
    if (const Tensor d_hh = tangent(dual_.weight_hh); d_hh.defined()) {
      by_product = multiplied_.matmul(d_hh.t());
      if (in_.resets_first()) {
        const Tensor of_n = (gates_[0] * multiplied_).matmul(d_hh.narrow(0, 2 * hidden_, hidden_).t());
        by_product = at::cat({part(by_product, 0, 2), of_n}, 2);
      }
    }
    // Of a GRU that resets first the mask goes through r ⊙ u as well, and is taken step by step.
    if (by_mask_.defined() && !in_.resets_first()) accumulate(by_product, by_mask_.matmul(in_.weight_hh.t()));
    return by_product;
  }

  // All steps, given the factors of layer.h. `added` are the sums' tangents, but for what the state's product gives,
  // and come after the norm.
  TangentOutputs steps(Tensor added, const Tensor& factors) {
    const Tensor by_product = product_part();
    accumulate(added, tangent(dual_.bias_hh));
    if (!in_.has_norm()) {
      accumulate(added, by_product);
      return call_tangents(recurrence(added, factors));
    }
    if (tangent(dual_.layer_norm).defined()) added = added + normed_ * tangent(dual_.layer_norm);
    const Tensor weight = in_.weight_hh.t();
    return composite_tangents(recurrence(added, factors), [&](int64_t t, const Tensor& h) {
      const Tensor d = by_product.defined() ? at::addmm(by_product[t], h, weight) : h.matmul(weight);
      return at::addcmul(added[t], through_norm(d, normed_[t], rstd_[t]), *in_.layer_norm);
    });
  }

  Inputs recurrence(const Tensor& sums, const Tensor& factors) const {
    return {.input = sums,
            .h = h_,
            .c = c_,
            .weight_hh = in_.weight_hh,
            .hidden_mask = in_.hidden_mask,
            .lengths = in_.lengths,
            .reset = reset_,
            .zoneout_h = zoneout_h_,
            .zoneout_c = zoneout_c_,
            .zoneout_rate_h = in_.zoneout_rate_h,
            .zoneout_rate_c = in_.zoneout_rate_c,
            .truncate = in_.truncate,
            .reverse = in_.reverse,
            .factors = factors};
  }

  Found lstm() {
    const Tensor &i = gates_[0], &f = gates_[1], &g = gates_[2], &o = gates_[3], cells = steps_.first(out_.cells);
    const Tensor c_before = steps_.before(cells, *in_.c);
    const Tensor c_after = in_.zones_out_c() ? f * c_before + i * g : cells;
    const Tensor tanh_c = c_after.tanh();
    const Tensor slope_g = in_.sigmoid_candidate() ? g * (1 - g) : 1 - g * g;
    const Tensor slopes = at::cat({i * (1 - i), f * (1 - f), slope_g, o * (1 - o)}, 2);
    const Tensor into_c = part(slopes, 0, 3) * at::cat({g, c_before, i}, 2), into_h = part(slopes, 3) * tanh_c;
    Tensor c_into_c = f, c_into_h = o * (1 - tanh_c * tanh_c);
    const Tensor peephole = autograd::tensor_or_none(in_.weight_peephole), d_peephole = tangent(dual_.weight_peephole);
    if (peephole.defined()) {
      c_into_c = c_into_c + part(into_c, 0) * peephole[0] + part(into_c, 1) * peephole[1];
      c_into_h = c_into_h + into_h * peephole[2];
    }
    set_input_part();
    Tensor added = by_input_;
    if (d_peephole.defined()) {
      const Tensor none = at::zeros_like(c_before);
      added = added + at::cat({c_before * d_peephole[0], c_before * d_peephole[1], none, c_after * d_peephole[2]}, 2);
    }
    const TangentOutputs all = steps(added, at::cat({into_c, into_h, c_into_c, c_into_h}, 2));
    Tensor sums = all.sums;
    if (peephole.defined()) {
      Tensor found = steps_.before(all.cells, *c_);
      if (in_.truncate > 0) found = at::where(steps_.cuts(), at::zeros_like(found), found);
      const Tensor given = sum_of_parts(part(sums, 0, 3) * into_c) + c_into_c * found;
      sums = sums + at::cat({found * peephole[0], found * peephole[1], at::zeros_like(found), given * peephole[2]}, 2);
    }
    return {all, sums * slopes};
  }

  Found gru() {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2], &hidden = gates_[3];
    const Tensor slopes = at::cat({r * (1 - r), z * (1 - z)}, 2), slope_n = 1 - n * n, n_into_h = (1 - z) * slope_n;
    const Tensor r_into_n = part(slopes, 0) * hidden;
    set_input_part();
    // The input's part of n is no part of what r multiplies.
    const Tensor of_n = part(by_input_, 2);
    const Tensor added = at::cat({part(by_input_, 0, 2), at::zeros_like(of_n)}, 2);
    const TangentOutputs all = steps(
        added, at::cat({r_into_n * n_into_h, part(slopes, 1) * (before_ - n), r * n_into_h, of_n * n_into_h, z}, 2));
    const Tensor d_hidden = part(all.sums, 2), dn = (of_n + part(all.sums, 0) * r_into_n + d_hidden * r) * slope_n;
    return {all, at::cat({part(all.sums, 0, 2) * slopes, dn, d_hidden}, 2)};
  }

  Found gru_reset_first() {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2];
    const Tensor slopes = at::cat({r * (1 - r), z * (1 - z), 1 - n * n}, 2);
    const auto into_reset = (part(slopes, 0) * multiplied_).unbind(0), each_r = r.unbind(0), each_z = z.unbind(0);
    const auto z_into_h = (part(slopes, 1) * (before_ - n)).unbind(0), n_into_h = (part(slopes, 2) * (1 - z)).unbind(0);
    const Tensor weight = in_.weight_hh.t(), by_gates = part(weight, 0, 2), by_n = part(weight, 2);
    set_input_part();
    Tensor added = by_input_;
    accumulate(added, tangent(dual_.bias_hh));
    accumulate(added, product_part());
    const Inputs in = recurrence(added, added);
    TangentStates states(in);
    std::vector<Tensor> all(states.count());
    for (int64_t s = 0; s < states.count(); ++s) {
      const int64_t t = steps_.time(s);
      states.begin(s);
      Tensor du = states.masked_h();
      if (by_mask_.defined()) du = du + by_mask_[t];
      const Tensor rz = at::addmm(part(added[t], 0, 2), du, by_gates);
      const Tensor d_reset = at::addcmul(each_r[t] * du, part(rz, 0), into_reset[t]);
      const Tensor sum_n = at::addmm(part(added[t], 2), d_reset, by_n);
      all[t] = at::cat({rz, sum_n}, 1);
      states.end(t, at::addcmul(at::addcmul(each_z[t] * states.h, part(rz, 1), z_into_h[t]), sum_n, n_into_h[t]));
    }
    const TangentOutputs found = states.outputs(all, 3 * hidden_);
    return {found, found.sums * slopes};
  }

  const Inputs& dual_;
  const Inputs in_;  // without their tangents
  const Steps steps_;
  const Outputs& out_;
  const int64_t hidden_;
  const OptionalTensor reset_, zoneout_h_, zoneout_c_;  // steps first
  std::vector<Tensor> gates_;
  Tensor before_, multiplied_;  // the state before every step, and what of it is multiplied
  Tensor normed_, rstd_, by_mask_, by_input_;
  Tensor h_;
  OptionalTensor c_;  // tangents of the states at the start
};

}  // namespace

OutputGradients tangents(const Inputs& dual, const Outputs& out) {
  if (!loses_norms(dual)) return Tangents(dual, out).run();
  const Inputs wide = widened(dual);
  const Outputs wide_out = widened(out);
  const OutputGradients d = Tangents(wide, wide_out).run();
  return {narrowed(d.out, dual), narrowed(d.h, dual), narrowed(d.c, dual), narrowed(d.gates, dual),
          narrowed(d.cells, dual)};
}

}  // namespace lect11ext::layer_op
