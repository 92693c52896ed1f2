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
        all_gates_(steps_.count) {
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
    if (in_.is_lstm()) lstm();
    else if (in_.reset_after) gru();
    else gru_reset_first();
    const auto over_time = [&](const std::vector<Tensor>& parts, const Tensor& like) {
      return parts.empty() ? at::zeros_like(like) : steps_.first(at::stack(parts));
    };
    return {over_time(all_h_, out_.out), dh_, dc_, over_time(all_gates_, out_.gates),
            in_.is_lstm() ? over_time(all_c_, out_.cells) : Tensor()};
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
    Tensor d_bias = tangent(dual_.bias_hh);
    by_bias_ = d_bias.defined() ? d_bias : at::zeros({columns}, in_.input.options());
    if (!in_.has_norm()) by_product_ = by_product_ + by_bias_;
    else if (tangent(dual_.weight_norm).defined()) by_norm_ = normed_ * tangent(dual_.weight_norm);
  }

  // The tangents of the states as the step finds them.
  void begin(int64_t s) {
    for (Tensor* d : {&dh_, &dc_}) {
      if (!d->defined()) continue;
      if (steps_.is_cut(s)) *d = steps_.active_or(steps_.time(s), at::zeros_like(*d), *d);
      if (steps_.restarts.defined()) *d = Steps::choose(steps_.restarts, steps_.time(s), at::zeros_like(*d), *d);
    }
  }

  // The state's part of the sums, with its bias.
  Tensor product(int64_t t) const {
    const Tensor d = at::addmm(by_product_[t], steps_.masked(dh_), in_.weight_hh.t());
    if (!in_.has_norm()) return d;
    const Tensor scaled = through_norm(d, normed_[t], rstd_[t]) * *in_.weight_norm + by_bias_;
    return by_norm_.defined() ? scaled + by_norm_[t] : scaled;
  }

  void end(int64_t t, Tensor new_h, Tensor new_c, const Tensor& gates) {
    new_h = keep_h_.zone_out(dh_, new_h, t);
    if (new_c.defined()) new_c = keep_c_.zone_out(dc_, new_c, t);
    const auto finish = [&](const Tensor& after, Tensor& state, Tensor& out) {
      out = steps_.active_or(t, after, at::zeros_like(after));
      state = steps_.active_or(t, after, state);
    };
    all_gates_[t] = steps_.active_or(t, gates, at::zeros_like(gates));
    finish(new_h, dh_, all_h_[t]);
    if (new_c.defined()) finish(new_c, dc_, all_c_[t]);
  }

  void lstm() {
    const Tensor &i = gates_[0], &f = gates_[1], &g = gates_[2], &o = gates_[3], cells = steps_.first(out_.cells);
    const Tensor c_before = steps_.before(cells, *in_.c);
    const Tensor c_after = in_.zones_out_c() ? f * c_before + i * g : cells;
    const Tensor tanh_c = c_after.tanh(), by_c = o * (1 - tanh_c * tanh_c);
    const Tensor slope_g = in_.sigmoid_candidate() ? g * (1 - g) : 1 - g * g;
    const Tensor slopes = at::cat({i * (1 - i), f * (1 - f), slope_g}, 2), slope_o = o * (1 - o);
    const Tensor into_c = at::stack({g, c_before, i}, 2);  // [T, B, 3, H]
    const Tensor peephole = autograd::tensor_or_none(in_.weight_peephole), d_peephole = tangent(dual_.weight_peephole);
    Tensor by_peephole;  // of i, f and o
    if (d_peephole.defined()) {
      by_peephole = at::cat({c_before * d_peephole[0], c_before * d_peephole[1], c_after * d_peephole[2]}, 2);
    }
    for (int64_t s = 0; s < steps_.count; ++s) {
      const int64_t t = steps_.time(s);
      begin(s);
      const Tensor sums = by_input_[t] + product(t);
      Tensor sums_ifg = part(sums, 0, 3), sum_o = part(sums, 3);
      if (peephole.defined()) {
        Tensor peep = (dc_.unsqueeze(1) * peephole.narrow(0, 0, 2)).flatten(1);
        if (by_peephole.defined()) peep = peep + part(by_peephole[t], 0, 2);
        sums_ifg = at::cat({part(sums_ifg, 0, 2) + peep, part(sums_ifg, 2)}, 1);
      }
      const Tensor ifg = sums_ifg * slopes[t];
      const Tensor new_c = at::addcmul((ifg.unflatten(1, {3, hidden_}) * into_c[t]).sum(1), f[t], dc_);
      if (peephole.defined()) {
        sum_o = at::addcmul(sum_o, new_c, peephole[2]);
        if (by_peephole.defined()) sum_o = sum_o + part(by_peephole[t], 2);
      }
      const Tensor d_o = sum_o * slope_o[t];
      end(t, at::addcmul(d_o * tanh_c[t], new_c, by_c[t]), new_c, at::cat({ifg, d_o}, 1));
    }
  }

  void gru() {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2], &hidden = gates_[3];
    const Tensor slopes = at::cat({r * (1 - r), z * (1 - z)}, 2), slope_n = 1 - n * n;
    const Tensor n_to_h = 1 - z, z_to_h = before_ - n;
    for (int64_t s = 0; s < steps_.count; ++s) {
      const int64_t t = steps_.time(s);
      begin(s);
      const Tensor x = by_input_[t], sums = product(t), d_hidden = part(sums, 2);
      const Tensor rz = (part(x, 0, 2) + part(sums, 0, 2)) * slopes[t];
      const Tensor dn = (part(x, 2) + part(rz, 0) * hidden[t] + r[t] * d_hidden) * slope_n[t];
      end(t, part(rz, 1) * z_to_h[t] + n_to_h[t] * dn + z[t] * dh_, {}, at::cat({rz, dn, d_hidden}, 1));
    }
  }

  void gru_reset_first() {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2];
    const Tensor slopes = at::cat({r * (1 - r), z * (1 - z)}, 2), slope_n = 1 - n * n;
    const Tensor n_to_h = 1 - z, z_to_h = before_ - n, constant = by_input_ + by_product_;
    const Tensor by_gates = in_.weight_hh.narrow(0, 0, 2 * hidden_).t();
    const Tensor by_n = in_.weight_hh.narrow(0, 2 * hidden_, hidden_).t();
    for (int64_t s = 0; s < steps_.count; ++s) {
      const int64_t t = steps_.time(s);
      begin(s);
      Tensor du = steps_.masked(dh_);
      if (by_mask_.defined()) du = du + by_mask_[t];
      const Tensor rz = (part(constant[t], 0, 2) + du.matmul(by_gates)) * slopes[t];
      const Tensor d_reset = part(rz, 0) * multiplied_[t] + r[t] * du;
      const Tensor dn = (part(constant[t], 2) + d_reset.matmul(by_n)) * slope_n[t];
      end(t, part(rz, 1) * z_to_h[t] + n_to_h[t] * dn + z[t] * dh_, {}, at::cat({rz, dn}, 1));
    }
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
  Tensor normed_, rstd_, by_mask_, by_input_, by_product_, by_bias_, by_norm_;
  Tensor dh_, dc_;
  std::vector<Tensor> all_h_, all_c_, all_gates_;
};

}  // namespace

OutputGradients tangents(const Inputs& dual, const Outputs& out) { return Tangents(dual, out).run(); }

}  // namespace lect11ext::layer_op
