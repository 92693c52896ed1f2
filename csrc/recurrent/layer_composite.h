// What the definitions of a layer's derivatives in differentiable ATen share: tensors over time with the steps first.
//
// They take gates and cells from the forward op, whose derivative with respect to them is fused: what is left of a step
// are a handful of small operations, and all that does not depend on the state is done for all steps at once.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <utility>

#include "recurrent/layer.h"
#include "recurrent/layer_inputs.h"

namespace lect11ext::layer_op {

// A size that must be a number, which a trace with symbolic sizes then fixes: a loop over steps is unrolled, and a part
// of a weight has a place. The batch need not be one.
inline int64_t known(const c10::SymInt& size) { return size.guard_int(__FILE__, __LINE__); }

// Norms of a 16-bit type are found in float32, forwards and backwards: at a state of zero 1/σ is 316, whose cube, in
// its derivative, float16 has not, and neither type has digits for differences from a mean.
inline bool loses_norms(const Inputs& in) { return in.has_norm() && in.input.element_size() == 2; }
inline Tensor widened(const Tensor& t) { return t.defined() ? t.to(at::kFloat) : t; }
inline Inputs widened(const Inputs& in) {
  return in.mapped([](const Tensor& t) { return widened(t); });
}
inline Outputs widened(const Outputs& out) {
  return {widened(out.out),   widened(out.h),      widened(out.c),   widened(out.gates),
          widened(out.cells), widened(out.normed), widened(out.rstd)};
}
// Back, to the type of the layer.
inline Tensor narrowed(const Tensor& t, const Inputs& in) { return t.defined() ? t.to(in.input.scalar_type()) : t; }

// The masks of a step, and the states before it.
struct Steps {
  const Inputs in;
  c10::SymInt count;          // symbolic in a trace until a loop needs it
  Tensor inactive, restarts;  // [T, B, 1]; undefined where there are none

  explicit Steps(const Inputs& in) : in(in), count(in.steps()) {
    if (autograd::defined(in.lengths)) inactive = first(in.inactive()).unsqueeze(-1);
    if (autograd::defined(in.reset)) restarts = first(*in.reset).unsqueeze(-1);
    if (inactive.defined() && restarts.defined()) restarts = restarts.logical_and(inactive.logical_not());
  }

  // Steps first, from the order of the input; and back.
  Tensor first(const Tensor& t) const { return t.defined() && in.batch_first ? t.transpose(0, 1) : t; }

  int64_t known_count() const { return known(count); }
  int64_t time(int64_t s) const { return in.reverse ? known_count() - 1 - s : s; }

  // Whether no gradient passes from step s to those before it.
  bool is_cut(int64_t s) const { return in.truncate > 0 && s > 0 && s % in.truncate == 0; }

  static Tensor choose(const Tensor& mask, int64_t t, const Tensor& yes, const Tensor& no) {
    return at::where(mask[t], yes, no);
  }

  // One where step t takes place, the other where it does not.
  Tensor active_or(int64_t t, const Tensor& active, const Tensor& other) const {
    return inactive.defined() ? choose(inactive, t, other, active) : active;
  }

  // Zero where a step does not take place.
  Tensor active_part(const Tensor& over_time) const {
    if (!inactive.defined() || !over_time.defined()) return over_time;
    return at::where(inactive, at::zeros_like(over_time), over_time);
  }

  Tensor active_part(int64_t t, const Tensor& of_step) const {
    return inactive.defined() ? choose(inactive, t, at::zeros_like(of_step), of_step) : of_step;
  }

  // The states before every step, where `states` are those after it. Zero where it does not take place, both.
  Tensor before(const Tensor& states, const Tensor& initial) const {
    if (count == 0) return states;
    const Tensor start = initial.unsqueeze(0);
    Tensor shifted = in.reverse ? at::cat({states.narrow_symint(0, 1, count - 1), start})
                                : at::cat({start, states.narrow_symint(0, 0, count - 1)});
    if (in.reverse && inactive.defined()) {  // rows begin at their own end
      const Tensor begins =
          at::cat({inactive.narrow_symint(0, 1, count - 1), at::zeros_like(inactive.narrow(0, 0, 1))});
      shifted = at::where(begins, start, shifted);
    }
    if (in.truncate > 0) shifted = at::where(cuts(), shifted.detach(), shifted);
    if (restarts.defined()) shifted = at::where(restarts, at::zeros_like(shifted), shifted);
    return active_part(shifted);
  }

  Tensor cuts() const {  // [T, 1, 1]
    const Tensor t = at::arange(count, in.h.options().dtype(at::kLong));
    const Tensor s = in.reverse ? t.flip(0) : t;
    return s.remainder(in.truncate).eq(0).logical_and(s.gt(0)).unsqueeze(1).unsqueeze(2);
  }

  Tensor input() const { return active_part(first(in.input)); }

  // hidden_mask ⊙ h, of one step or of all.
  Tensor masked(const Tensor& h) const { return autograd::defined(in.hidden_mask) ? h * *in.hidden_mask : h; }
};

// How much of a state is kept at step t: a mask's row, or the rate.
class KeptShare {
 public:
  KeptShare(const Steps& steps, const OptionalTensor& mask, double rate, const Tensor& like) : rate_(rate) {
    if (autograd::defined(mask)) mask_ = steps.first(*mask).to(like.scalar_type());
  }
  bool acts() const { return mask_.defined() || rate_ != 0; }
  Tensor of(const Tensor& x, int64_t t) const { return mask_.defined() ? x * mask_[t] : x * rate_; }

  // The state that a step leaves, of the one before it and the one it computed; of their tangents too.
  Tensor zone_out(const Tensor& before, const Tensor& after, int64_t t) const {
    return acts() ? after + of(before - after, t) : after;
  }

 private:
  Tensor mask_;
  double rate_;
};

// (v − mean) / √(var + ε) over the last dimension, and 1 / √(var + ε).
inline std::pair<Tensor, Tensor> normalize(const Tensor& v) {
  const Tensor centred = v - v.mean(-1, /*keepdim=*/true);
  const Tensor rstd = ((centred * centred).mean(-1, /*keepdim=*/true) + kLayerNormEpsilon).rsqrt();
  return {centred * rstd, rstd};
}

// The projection that a norm's derivative is, forwards and backwards, but for its scale: rstd·(x − mean x −
// x̂·mean(x̂·x)).
inline Tensor through_norm(const Tensor& x, const Tensor& normed, const Tensor& rstd) {
  return rstd * (x - x.mean(-1, true) - normed * (x * normed).mean(-1, true));
}

}  // namespace lect11ext::layer_op
