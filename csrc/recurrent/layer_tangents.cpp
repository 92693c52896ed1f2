// The tangents of a layer's outputs, in differentiable ATen.
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "recurrent/layer_composite.h"

namespace lect11ext::layer_op {
namespace {

Tensor primal(const Tensor& t) { return t.defined() ? t._fw_primal(/*level=*/0) : t; }
Tensor tangent(const Tensor& t) { return t.defined() ? t._fw_grad(/*level=*/0) : Tensor(); }

OptionalTensor primal(const OptionalTensor& t) { return autograd::optional_of(primal(autograd::tensor_or_none(t))); }
Tensor tangent(const OptionalTensor& t) { return tangent(autograd::tensor_or_none(t)); }

// Adds two terms of which either may be missing.
void accumulate(Tensor& sum, const Tensor& term) {
  if (term.defined()) sum = sum.defined() ? sum + term : term;
}

// All of a forward's inputs without their tangents.
struct Primals {
  const Tensor input, h;
  const OptionalTensor c, weight_ih;
  const Tensor weight_hh;
  const OptionalTensor bias_ih, bias_hh, peephole, norm, hidden_mask, none;
  const Inputs in;

  explicit Primals(const Inputs& dual)
      : input(primal(dual.input)),
        h(primal(dual.h)),
        c(primal(dual.c)),
        weight_ih(primal(dual.weight_ih)),
        weight_hh(primal(dual.weight_hh)),
        bias_ih(primal(dual.bias_ih)),
        bias_hh(primal(dual.bias_hh)),
        peephole(primal(dual.weight_peephole)),
        norm(primal(dual.weight_norm)),
        hidden_mask(primal(dual.hidden_mask)),
        in{input,
           h,
           c,
           weight_ih,
           weight_hh,
           bias_ih,
           bias_hh,
           none,
           peephole,
           norm,
           hidden_mask,
           dual.lengths,
           dual.reset,
           dual.zoneout_h,
           dual.zoneout_c,
           dual.candidate,
           dual.reset_after,
           dual.zoneout_rate_h,
           dual.zoneout_rate_c,
           dual.grad_clip,
           dual.truncate,
           dual.recompute,
           dual.reverse,
           dual.batch_first} {}
};

class Tangents {
 public:
  Tangents(const Inputs& dual, const Outputs& out)
      : dual_(dual),
        primals_(dual),
        in_(primals_.in),
        steps_(in_),
        out_(out),
        keep_h_(steps_, in_.zoneout_h, in_.zoneout_rate_h, in_.h),
        keep_c_(steps_, in_.zoneout_c, in_.zoneout_rate_c, in_.h),
        hidden_(known(in_.hidden())),
        all_h_(steps_.count),
        all_c_(steps_.count),
        all_sums_(steps_.count) {
    gates_ = steps_.first(out.gates).chunk(in_.kept_gates(), 2);
    before_ = steps_.before(steps_.first(out.out), in_.h);
    multiplied_ = steps_.masked(before_);
    if (tangent(dual.hidden_mask).defined()) by_mask_ = before_ * tangent(dual.hidden_mask);
    if (in_.has_norm()) std::tie(normed_, rstd_) = normalize(multiplied_.matmul(in_.weight_hh.t()));
    set_constant_parts();
    const auto start = [](const Tensor& d, const Tensor& like) { return d.defined() ? d : at::zeros_like(like); };
    dh_ = start(tangent(dual.h), in_.h);
    if (in_.is_lstm()) dc_ = start(tangent(dual.c), *in_.c);
  }

  OutputGradients run() {
    if (steps_.count == 0) {
      return {at::zeros_like(out_.out), dh_, dc_, at::zeros_like(out_.gates),
              in_.is_lstm() ? at::zeros_like(out_.cells) : Tensor()};
    }
    const Tensor gates = in_.is_lstm() ? lstm() : in_.reset_after ? gru() : gru_reset_first();
    return {steps_.first(at::stack(all_h_)), dh_, dc_, steps_.first(steps_.active_part(gates)),
            in_.is_lstm() ? steps_.first(at::stack(all_c_)) : Tensor()};
  }

 private:
  Tensor part(const Tensor& t, int64_t g, int64_t parts = 1) const {
    return t.narrow(-1, g * hidden_, parts * hidden_);
  }

  // What of the sums' tangents does not depend on the state's: the input's part, the state's bias, and, of the state's
  // product, what the weights' tangent and the mask's give.
  void set_constant_parts() {
    const int64_t columns = in_.gates() * hidden_;
    const std::array<c10::SymInt, 3> size{steps_.count, in_.batch(), columns};
    const auto zeros = [&] { return at::zeros_symint(size, in_.input.options()); };
    const Tensor dx = steps_.active_part(steps_.first(tangent(dual_.input))), d_hh = tangent(dual_.weight_hh);
    if (!autograd::defined(in_.weight_ih)) {
      by_input_ = dx;
    } else {
      if (dx.defined()) accumulate(by_input_, dx.matmul(in_.weight_ih->t()));
      if (tangent(dual_.weight_ih).defined()) {
        accumulate(by_input_, steps_.input().matmul(tangent(dual_.weight_ih).t()));
      }
    }
    accumulate(by_input_, tangent(dual_.bias_ih));
    by_input_ = by_input_.defined() ? by_input_.expand_symint(size) : zeros();
    if (d_hh.defined()) {
      Tensor operand = multiplied_.matmul(d_hh.t());
      if (in_.resets_first()) {
        const Tensor of_n = (gates_[0] * multiplied_).matmul(d_hh.narrow(0, 2 * hidden_, hidden_).t());
        operand = at::cat({part(operand, 0, 2), of_n}, 2);
      }
      by_product_ = operand;
    }
    // Of a GRU that resets first the mask goes through r ⊙ u as well, and is taken step by step.
    if (by_mask_.defined() && !in_.resets_first()) accumulate(by_product_, by_mask_.matmul(in_.weight_hh.t()));
    if (!by_product_.defined()) by_product_ = zeros();
    // The input's part of n is no part of what r multiplies.
    Tensor added = by_input_;
    if (!in_.is_lstm() && in_.reset_after) {
      added = at::cat({part(by_input_, 0, 2), at::zeros_like(part(by_input_, 2))}, 2);
    }
    accumulate(added, tangent(dual_.bias_hh));
    if (in_.has_norm()) {
      if (tangent(dual_.weight_norm).defined()) added = added + normed_ * tangent(dual_.weight_norm);
      after_norm_ = added.unbind(0);
    } else {
      by_product_ = by_product_ + added;
    }
    each_by_product_ = by_product_.unbind(0);
    by_state_ = in_.weight_hh.t();
  }

  // The tangents of the states as the step finds them.
  void begin(int64_t s) {
    for (Tensor* d : {&dh_, &dc_}) {
      if (!d->defined()) continue;
      if (steps_.is_cut(s)) *d = steps_.active_or(steps_.time(s), at::zeros_like(*d), *d);
      if (steps_.restarts.defined()) *d = Steps::choose(steps_.restarts, steps_.time(s), at::zeros_like(*d), *d);
    }
  }

  // The tangents of a step's sums, but for the input's part of a GRU's n.
  Tensor product(int64_t t) const {
    const Tensor d = at::addmm(each_by_product_[t], steps_.masked(dh_), by_state_);
    if (!in_.has_norm()) return d;
    return at::addcmul(after_norm_[t], through_norm(d, normed_[t], rstd_[t]), *in_.weight_norm);
  }

  void end(int64_t t, Tensor new_h, Tensor new_c = {}) {
    new_h = keep_h_.zone_out(dh_, new_h, t);
    if (new_c.defined()) new_c = keep_c_.zone_out(dc_, new_c, t);
    const auto finish = [&](const Tensor& after, Tensor& state, Tensor& out) {
      out = steps_.active_part(t, after);
      state = steps_.active_or(t, after, state);
    };
    finish(new_h, dh_, all_h_[t]);
    if (new_c.defined()) finish(new_c, dc_, all_c_[t]);
  }

  // A step is linear in the tangents of its sums and of the states: their factors are computed for all steps before the
  // first, the gates' tangents after the last.
  Tensor sum_of_parts(const Tensor& sums, const Tensor& factors) const {
    return (sums * factors).unflatten(1, {-1, hidden_}).sum(1);
  }

  Tensor lstm() {
    const Tensor &i = gates_[0], &f = gates_[1], &g = gates_[2], &o = gates_[3], cells = steps_.first(out_.cells);
    const Tensor c_before = steps_.before(cells, *in_.c);
    const Tensor c_after = in_.zones_out_c() ? f * c_before + i * g : cells;
    const Tensor tanh_c = c_after.tanh();
    const Tensor slope_g = in_.sigmoid_candidate() ? g * (1 - g) : 1 - g * g;
    const Tensor slopes = at::cat({i * (1 - i), f * (1 - f), slope_g, o * (1 - o)}, 2);
    const Tensor into_c = part(slopes, 0, 3) * at::cat({g, c_before, i}, 2), into_h = part(slopes, 3) * tanh_c;
    Tensor c_into_c = f, c_into_h = o * (1 - tanh_c * tanh_c), by_peephole;
    const Tensor peephole = autograd::tensor_or_none(in_.weight_peephole), d_peephole = tangent(dual_.weight_peephole);
    if (peephole.defined()) {
      c_into_c = c_into_c + part(into_c, 0) * peephole[0] + part(into_c, 1) * peephole[1];
      c_into_h = c_into_h + into_h * peephole[2];
    }
    if (d_peephole.defined()) {
      by_peephole = at::cat(
          {c_before * d_peephole[0], c_before * d_peephole[1], at::zeros_like(c_before), c_after * d_peephole[2]}, 2);
    }
    const auto each_into_c = into_c.unbind(0), each_into_h = into_h.unbind(0);
    const auto each_c_into_c = c_into_c.unbind(0), each_c_into_h = c_into_h.unbind(0);
    std::vector<Tensor> found_c(steps_.count), given_c(steps_.count);
    for (int64_t s = 0; s < steps_.count; ++s) {
      const int64_t t = steps_.time(s);
      begin(s);
      Tensor& sums = all_sums_[t] = product(t);
      if (by_peephole.defined()) sums = sums + by_peephole[t];
      found_c[t] = dc_;
      given_c[t] = at::addcmul(sum_of_parts(part(sums, 0, 3), each_into_c[t]), each_c_into_c[t], dc_);
      end(t, at::addcmul(given_c[t] * each_c_into_h[t], part(sums, 3), each_into_h[t]), given_c[t]);
    }
    Tensor sums = at::stack(all_sums_);
    if (peephole.defined()) {
      const Tensor found = at::stack(found_c);
      sums = sums + at::cat({found * peephole[0], found * peephole[1], at::zeros_like(found),
                             at::stack(given_c) * peephole[2]},
                            2);
    }
    return sums * slopes;
  }

  Tensor gru() {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2], &hidden = gates_[3];
    const Tensor slopes = at::cat({r * (1 - r), z * (1 - z)}, 2), slope_n = 1 - n * n, n_into_h = (1 - z) * slope_n;
    const Tensor r_into_n = part(slopes, 0) * hidden;
    const Tensor into_h = at::cat({r_into_n * n_into_h, part(slopes, 1) * (before_ - n), r * n_into_h}, 2);
    const Tensor of_n = part(by_input_, 2);
    const auto each_into_h = into_h.unbind(0), each_z = z.unbind(0), each_of_n = (of_n * n_into_h).unbind(0);
    for (int64_t s = 0; s < steps_.count; ++s) {
      const int64_t t = steps_.time(s);
      begin(s);
      all_sums_[t] = product(t);
      end(t, sum_of_parts(all_sums_[t], each_into_h[t]) + at::addcmul(each_of_n[t], each_z[t], dh_));
    }
    const Tensor sums = at::stack(all_sums_), d_hidden = part(sums, 2);
    const Tensor dn = (of_n + part(sums, 0) * r_into_n + d_hidden * r) * slope_n;
    return at::cat({part(sums, 0, 2) * slopes, dn, d_hidden}, 2);
  }

  Tensor gru_reset_first() {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2];
    const Tensor slopes = at::cat({r * (1 - r), z * (1 - z), 1 - n * n}, 2);
    const auto into_reset = (part(slopes, 0) * multiplied_).unbind(0), each_r = r.unbind(0), each_z = z.unbind(0);
    const auto z_into_h = (part(slopes, 1) * (before_ - n)).unbind(0), n_into_h = (part(slopes, 2) * (1 - z)).unbind(0);
    const Tensor by_gates = part(by_state_, 0, 2), by_n = part(by_state_, 2);
    for (int64_t s = 0; s < steps_.count; ++s) {
      const int64_t t = steps_.time(s);
      begin(s);
      Tensor du = steps_.masked(dh_);
      if (by_mask_.defined()) du = du + by_mask_[t];
      const Tensor rz = at::addmm(part(each_by_product_[t], 0, 2), du, by_gates);
      const Tensor d_reset = at::addcmul(each_r[t] * du, part(rz, 0), into_reset[t]);
      const Tensor sum_n = at::addmm(part(each_by_product_[t], 2), d_reset, by_n);
      all_sums_[t] = at::cat({rz, sum_n}, 1);
      end(t, at::addcmul(at::addcmul(each_z[t] * dh_, part(rz, 1), z_into_h[t]), sum_n, n_into_h[t]));
    }
    return at::stack(all_sums_) * slopes;
  }

  const Inputs& dual_;
  const Primals primals_;
  const Inputs& in_;
  const Steps steps_;
  const Outputs& out_;
  const KeptShare keep_h_, keep_c_;
  const int64_t hidden_;
  std::vector<Tensor> gates_;
  Tensor before_, multiplied_;  // the state before every step, and what of it is multiplied
  Tensor normed_, rstd_, by_mask_, by_input_, by_product_, by_state_;
  std::vector<Tensor> each_by_product_, after_norm_;  // of every step
  Tensor dh_, dc_;
  std::vector<Tensor> all_h_, all_c_, all_sums_;
};

}  // namespace

OutputGradients tangents(const Inputs& dual, const Outputs& out) { return Tangents(dual, out).run(); }

}  // namespace lect11ext::layer_op
