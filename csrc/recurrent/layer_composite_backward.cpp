// The backward of a layer in differentiable ATen, whose derivatives are those of the fused backward.
#include <ATen/ops/addcmul.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "common/tensors.h"
#include "recurrent/layer_composite.h"

namespace lect11ext::layer_op {
namespace {

Tensor sum_steps(const Tensor& a, const Tensor& b) { return a.flatten(0, 1).t().matmul(b.flatten(0, 1)); }

Tensor plus(const Tensor& a, const Tensor& b) { return b.defined() ? a + b : a; }

// The steps of a tensor over time, all taken at once: the derivative of taking one is a tensor of the size of all.
class ByStep {
 public:
  ByStep() = default;
  explicit ByStep(const Tensor& over_time) {
    if (over_time.defined()) steps_ = over_time.unbind(0);
  }
  Tensor operator[](int64_t t) const { return steps_.empty() ? Tensor() : steps_[t]; }

 private:
  std::vector<Tensor> steps_;
};

Tensor or_zeros(const Tensor& grad, const Tensor& like) { return grad.defined() ? grad : at::zeros_like(like); }

class CompositeBackward {
 public:
  CompositeBackward(const OutputGradients& grads, const Inputs& in, const Outputs& kept)
      : in_(in),
        steps_(in),
        grads_(grads),
        kept_(kept.gates.defined() ? kept : call_forward(in.without_recompute(), /*save=*/true)),
        keep_h_(steps_, in.zoneout_h, in.zoneout_rate_h, in.h),
        keep_c_(steps_, in.zoneout_c, in.zoneout_rate_c, in.h),
        hidden_(known(in.hidden())) {
    gates_ = steps_.first(kept_.gates).chunk(in.kept_gates(), 2);
    grad_out_ = ByStep(steps_.active_part(steps_.first(grads.out)));
    if (grads.gates.defined()) grad_gates_ = steps_.active_part(steps_.first(grads.gates)).chunk(in.kept_gates(), 2);
    before_ = steps_.before(steps_.first(kept_.out), in.h);
    multiplied_ = steps_.masked(before_);
    if (in.has_norm()) {
      std::tie(normed_, rstd_) = normalize(multiplied_.matmul(in.weight_hh.t()));
      normed_at_ = ByStep(normed_), rstd_at_ = ByStep(rstd_);
    }
    sums_.resize(steps_.known_count());
    sums_hidden_.resize(steps_.known_count());
    products_.resize(steps_.known_count());
  }

  Gradients run(const Mask& mask) {
    if (in_.is_lstm()) lstm();
    else if (in_.reset_after) gru();
    else gru_reset_first();
    const Tensor sums = stack(sums_, in_.gates() * hidden_);
    const Tensor hidden = in_.is_lstm() || in_.resets_first() ? sums : stack(sums_hidden_, 3 * hidden_);
    const Tensor product = in_.has_norm() ? through_norm(hidden * *in_.layer_norm, normed_, rstd_) : hidden;
    const bool multiplies = autograd::defined(in_.weight_ih);
    Gradients result;
    const auto give = [&](Input which, bool exists, const auto& make) {
      if (mask[which] && exists) result[which] = make();
    };
    give(kInput, true, [&] { return steps_.first(multiplies ? sums.matmul(*in_.weight_ih) : sums); });
    give(kH, true, [&] { return carry_h_; });
    give(kC, in_.is_lstm(), [&] { return carry_c_; });
    give(kWeightIh, multiplies, [&] { return sum_steps(sums, steps_.input()); });
    give(kWeightHh, true, [&] {
      if (!in_.resets_first()) return sum_steps(product, multiplied_);
      const Tensor reset = gates_[0] * multiplied_;
      return at::cat({sum_steps(sums.narrow(2, 0, 2 * hidden_), multiplied_),
                      sum_steps(sums.narrow(2, 2 * hidden_, hidden_), reset)});
    });
    give(kBiasIh, autograd::defined(in_.bias_ih), [&] { return sum_rows(sums); });
    give(kBiasHh, autograd::defined(in_.bias_hh), [&] { return sum_rows(hidden); });
    give(kPeephole, autograd::defined(in_.weight_peephole), [&] {
      const auto sum = [&](int64_t g, const Tensor& c) { return sum_rows(part(sums, g) * c); };
      return at::stack({sum(0, c_before_), sum(1, c_before_), sum(3, c_after_)});
    });
    give(kNorm, in_.has_norm(), [&] { return sum_rows(hidden * normed_); });
    give(kHiddenMask, autograd::defined(in_.hidden_mask), [&] { return (stack(products_, hidden_) * before_).sum(0); });
    return result;
  }

 private:
  Tensor part(const Tensor& t, int64_t g) const { return t.narrow(-1, g * hidden_, hidden_); }

  Tensor clip(const Tensor& grad) const {
    return std::isinf(in_.clip()) ? grad : at::clamp(grad, -in_.clip(), in_.clip());
  }

  Tensor stack(const std::vector<Tensor>& steps, int64_t columns) const {
    if (!steps.empty()) return at::stack(steps);
    return at::zeros_symint({0, in_.batch(), columns}, in_.input.options());
  }

  // The gradient with respect to a gate that came from outside, times the gate's slope.
  Tensor outer(int64_t gate, const Tensor& slope) const {
    return grad_gates_.empty() ? Tensor() : grad_gates_[gate] * slope;
  }

  // Where a step does not take place the gradient passes by; where the state before it was set to zero, or is cut off,
  // none does.
  Tensor leave(int64_t s, const Tensor& grad, const Tensor& outside) const {
    const int64_t t = steps_.time(s);
    Tensor carry = steps_.is_cut(s) ? at::zeros_like(grad) : grad;
    if (steps_.restarts.defined()) carry = Steps::choose(steps_.restarts, t, at::zeros_like(carry), carry);
    return steps_.active_or(t, carry, outside);
  }

  // The part of a gradient that zoneout lets by; the gradient keeps the rest. Undefined where there is none.
  static Tensor zone_out(const KeptShare& share, int64_t t, Tensor& grad) {
    if (!share.acts()) return {};
    const Tensor kept = share.of(grad, t);
    grad = grad - kept;
    return kept;
  }

  // From the gradient of the state's product after its norm to that of the state.
  Tensor to_state(int64_t t, const Tensor& sums) {
    const Tensor grad = in_.has_norm() ? through_norm(sums * *in_.layer_norm, normed_at_[t], rstd_at_[t]) : sums;
    products_[t] = grad.matmul(in_.weight_hh);
    return steps_.masked(products_[t]);
  }

  void lstm() {
    const Tensor &i = gates_[0], &f = gates_[1], &g = gates_[2], &o = gates_[3], cells = steps_.first(kept_.cells);
    c_before_ = steps_.before(cells, *in_.c);
    // The cells that are kept are behind the clip of their gradient, and behind zoneout.
    c_after_ = in_.zones_out_c() || !std::isinf(in_.clip()) ? f * c_before_ + i * g : cells;
    const Tensor tanh_c = c_after_.tanh();
    const Tensor slope_i = i * (1 - i), slope_f = f * (1 - f), slope_o = o * (1 - o);
    const Tensor slope_g = in_.sigmoid_candidate() ? g * (1 - g) : 1 - g * g;
    const ByStep by_c(at::stack({g * slope_i, c_before_ * slope_f, i * slope_g}, 2));  // [T, B, 3, H]
    const ByStep by_h(tanh_c * slope_o), into_c(o * (1 - tanh_c * tanh_c)), outer_o(outer(3, slope_o)), f_at(f);
    const ByStep outer_ifg(
        grad_gates_.empty() ? Tensor() : at::stack({outer(0, slope_i), outer(1, slope_f), outer(2, slope_g)}, 2));
    const ByStep grad_cells(steps_.active_part(steps_.first(grads_.cells)));
    const Tensor peephole = autograd::tensor_or_none(in_.weight_peephole);
    carry_h_ = or_zeros(grads_.h, in_.h);
    carry_c_ = or_zeros(grads_.c, *in_.c);
    for (int64_t s = steps_.known_count() - 1; s >= 0; --s) {
      const int64_t t = steps_.time(s);
      Tensor dh = clip(plus(carry_h_, grad_out_[t])), dc = clip(plus(carry_c_, grad_cells[t]));
      const Tensor by_zoned_h = zone_out(keep_h_, t, dh), by_zoned_c = zone_out(keep_c_, t, dc);
      const Tensor pre_o = plus(dh * by_h[t], outer_o[t]);
      dc = at::addcmul(dc, dh, into_c[t]);
      if (peephole.defined()) dc = at::addcmul(dc, pre_o, peephole[2]);
      const Tensor pre_ifg = plus(dc.unsqueeze(1) * by_c[t], outer_ifg[t]);
      sums_[t] = steps_.active_part(t, at::cat({pre_ifg, pre_o.unsqueeze(1)}, 1).flatten(1));
      Tensor to_c = plus(dc * f_at[t], by_zoned_c);
      if (peephole.defined()) to_c = to_c + (pre_ifg.narrow(1, 0, 2) * peephole.narrow(0, 0, 2)).sum(1);
      carry_h_ = leave(s, plus(to_state(t, sums_[t]), by_zoned_h), carry_h_);
      carry_c_ = leave(s, to_c, carry_c_);
    }
  }

  void gru() {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2], &hidden = gates_[3];
    const Tensor slope_r = r * (1 - r), slope_z = z * (1 - z), slope_n = 1 - n * n;
    const ByStep z_by_h((before_ - n) * slope_z), n_by_h((1 - z) * slope_n), r_by_n(hidden * slope_r), r_at(r), z_at(z);
    const ByStep outer_r(outer(0, slope_r)), outer_z(outer(1, slope_z)), outer_n(outer(2, slope_n));
    const ByStep outer_hidden(grad_gates_.empty() ? Tensor() : grad_gates_[3]);
    carry_h_ = or_zeros(grads_.h, in_.h);
    for (int64_t s = steps_.known_count() - 1; s >= 0; --s) {
      const int64_t t = steps_.time(s);
      Tensor dh = clip(plus(carry_h_, grad_out_[t]));
      const Tensor by_zoned = zone_out(keep_h_, t, dh);
      const Tensor dn = plus(dh * n_by_h[t], outer_n[t]), dz = plus(dh * z_by_h[t], outer_z[t]);
      const Tensor dr = plus(dn * r_by_n[t], outer_r[t]);
      const Tensor d_hidden = plus(dn * r_at[t], outer_hidden[t]);
      sums_[t] = steps_.active_part(t, at::cat({dr, dz, dn}, 1));
      sums_hidden_[t] = steps_.active_part(t, at::cat({dr, dz, d_hidden}, 1));
      const Tensor to_h = at::addcmul(to_state(t, sums_hidden_[t]), dh, z_at[t]);
      carry_h_ = leave(s, plus(to_h, by_zoned), carry_h_);
    }
  }

  void gru_reset_first() {
    const Tensor &r = gates_[0], &z = gates_[1], &n = gates_[2];
    const Tensor slope_r = r * (1 - r), slope_z = z * (1 - z), slope_n = 1 - n * n;
    const ByStep z_by_h((before_ - n) * slope_z), n_by_h((1 - z) * slope_n), r_by_product(multiplied_ * slope_r),
        r_at(r), z_at(z);
    const ByStep outer_r(outer(0, slope_r)), outer_z(outer(1, slope_z)), outer_n(outer(2, slope_n));
    const Tensor by_gates = in_.weight_hh.narrow(0, 0, 2 * hidden_), by_n = part(in_.weight_hh.t(), 2).t();
    carry_h_ = or_zeros(grads_.h, in_.h);
    for (int64_t s = steps_.known_count() - 1; s >= 0; --s) {
      const int64_t t = steps_.time(s);
      Tensor dh = clip(plus(carry_h_, grad_out_[t]));
      const Tensor by_zoned = zone_out(keep_h_, t, dh);
      const Tensor dn = plus(dh * n_by_h[t], outer_n[t]), dz = plus(dh * z_by_h[t], outer_z[t]);
      const Tensor d_reset = dn.matmul(by_n), dr = plus(d_reset * r_by_product[t], outer_r[t]);
      sums_[t] = steps_.active_part(t, at::cat({dr, dz, dn}, 1));
      const Tensor to_product = at::cat({dr, dz}, 1).matmul(by_gates) + d_reset * r_at[t];
      products_[t] = steps_.active_part(t, to_product);
      const Tensor to_h = at::addcmul(steps_.masked(to_product), dh, z_at[t]);
      carry_h_ = leave(s, plus(to_h, by_zoned), carry_h_);
    }
  }

  const Inputs& in_;
  const Steps steps_;
  const OutputGradients& grads_;
  const Outputs kept_;
  const KeptShare keep_h_, keep_c_;
  const int64_t hidden_;
  std::vector<Tensor> gates_, grad_gates_;
  Tensor before_, multiplied_;  // the state before every step, and what of it is multiplied
  Tensor normed_, rstd_, c_before_, c_after_;
  ByStep grad_out_, normed_at_, rstd_at_;
  std::vector<Tensor> sums_, sums_hidden_, products_;  // gradients, step by step: of the sums, the state's, and u
  Tensor carry_h_, carry_c_;
};

}  // namespace

Gradients composite_backward(const OutputGradients& grads, const Inputs& in, const Outputs& kept, const Mask& mask) {
  if (!loses_norms(in)) return CompositeBackward(grads, in, kept).run(mask);
  const Inputs wide = widened(in);
  const OutputGradients wide_grads{widened(grads.out), widened(grads.h), widened(grads.c), widened(grads.gates),
                                   widened(grads.cells)};
  Gradients result = CompositeBackward(wide_grads, wide, widened(kept)).run(mask);
  for (Tensor& t : result) t = narrowed(t, in);
  return result;
}

}  // namespace lect11ext::layer_op
